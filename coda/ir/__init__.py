"""The IR: a block as a Graph of primitive nodes, with its types, text form and reference."""
