"""The graph: what a block means, as nodes of primitives."""
