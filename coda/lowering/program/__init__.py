"""The Program: kernels over buffers, what they cost, when their memory is free."""
