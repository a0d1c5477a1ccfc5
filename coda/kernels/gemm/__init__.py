"""GEMMs with an epilogue, whose mainloops are quack's."""
