"""What runs inside the forward and backward pass: blocks, attention, head."""
