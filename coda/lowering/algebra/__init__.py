"""Graph -> Graph: laws of sums, the derivative, and what follows from both."""
