"""PTX text -> Python functions on arrays of lanes, one for each basic block."""
