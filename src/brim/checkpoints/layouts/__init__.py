"""How a checkpoint says what its tensors are: one module per layout, each with tensors and config of its own."""
