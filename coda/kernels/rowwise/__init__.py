"""Row-wise kernels: one warp takes a row."""
