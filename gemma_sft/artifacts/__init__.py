"""What a tuned model is handed on as, and the proof that it still works."""
