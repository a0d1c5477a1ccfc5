"""The host's side: CuTe DSL's launches brought to the simulated device."""
