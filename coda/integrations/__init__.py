"""Existing torch models -> models whose layers run as blocks, by torch.compile or by patching."""
