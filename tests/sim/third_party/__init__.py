"""Kernels that nobody here wrote: quack's, flash-attention's and CUTLASS's, with torch references.

They are known to be good on hardware, so they judge the simulator. Nothing of them is copied here.
"""
