"""The kinds of kernel: how each is emitted as CuTe DSL and launched."""
