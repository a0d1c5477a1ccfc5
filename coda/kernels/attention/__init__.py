"""Attention as one kernel: both contractions and the softmax between them, by flash-attention 4."""
