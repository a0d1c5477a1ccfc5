"""What users write: symbolic tensors, the op library and the text form, made into a graph."""
