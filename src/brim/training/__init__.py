"""Build a recipe's model, optimizer and step on any device, and run it."""
