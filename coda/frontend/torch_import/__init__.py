"""torch.fx graphs of ATen operators -> Graphs of coda's primitives."""
