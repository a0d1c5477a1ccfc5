"""Arithmetic instructions -> functions on arrays of lanes."""
