"""Graph -> Graph: the laws of sums, the derivative, and the passes that prepare both."""
