"""The folders of runs: their lock, status and records; listing and removing runs. Standard library only."""
