"""Python functions over symbolic tensors -> Graphs: tensors, operations, layers and tracing."""
