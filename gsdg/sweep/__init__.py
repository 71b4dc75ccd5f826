"""Sweeps: enumerates the runs, submits them to SLURM, shows and cancels them. All state is on disk (folder.py)."""
