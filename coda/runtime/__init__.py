"""From a Program to launched kernels: compile, cache, launch, torch operators."""
