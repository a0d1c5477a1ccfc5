"""Graph in normal form -> Program: which kernel computes and stores which node."""
