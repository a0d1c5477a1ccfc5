"""Graphs of torch operators (torch.fx, ATen) -> Graphs of primitives."""
