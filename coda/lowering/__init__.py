"""From a graph to a Program of kernels, and from a kernel to its source."""
