"""Any prompt and completion, judged by equality."""
