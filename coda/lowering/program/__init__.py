"""The Program: kernels over buffers, with cost model, liveness, checks and text form."""
