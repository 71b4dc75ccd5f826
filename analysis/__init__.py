"""Results from run folders on disk, without torch: frames -> selection -> statistics -> tables.

`python -m analysis RUNS_DIR` prints the leave-one-domain-out table, also while a sweep is still running.
"""
