"""The two passes over the domain gradients: torch (the definition) and Triton (for CUDA)."""
