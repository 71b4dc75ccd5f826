"""Readers: run folders on disk -> one tidy frame."""
