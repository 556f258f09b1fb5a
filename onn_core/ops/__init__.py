"""Arithmetic on frozen weights: matmul, cross-entropy in blocks, norm in parts."""
