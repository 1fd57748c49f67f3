"""What an export writes, and the proof that it is the tuned model."""
