"""The version of coda."""

__version__ = "0.1.0"
