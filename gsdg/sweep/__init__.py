"""Many runs on a cluster: which there are, how each stands, what is submitted. Everything is on disk (folder.py)."""
