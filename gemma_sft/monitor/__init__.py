"""What a run says, writes and watches; how it stops."""
