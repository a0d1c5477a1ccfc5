"""The host side: launches by CuTe DSL host code -> `Launch` objects for the simulated device."""
