"""Base utilities for every other package: JSON files, progress bars, terminal, text. Standard library only."""
