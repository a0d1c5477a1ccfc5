"""A graph in normal form -> the kernels that compute its nodes."""
