"""Events of the simulated machine -> findings (races, leaks, uninitialised reads) and counters."""
