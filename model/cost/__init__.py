"""What the network costs: parameters, operations, bytes kept for the backward pass."""
