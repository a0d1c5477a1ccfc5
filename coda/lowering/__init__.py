"""Graph -> Program: algebra, placement into kernels, tile configs, memory, and the reports."""
