"""A Program and tensors -> outputs: compile, cache, launch and replay kernels; autograd."""
