"""Existing models: a backend for torch.compile, patches of a model's layers, modules to drop in."""
