"""The parts of `benchmarks/gpu.py`, one module each. Not yet run on a GPU."""
