"""Single nodes that are computed by torch, since no kernel of coda computes them."""
