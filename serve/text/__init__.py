"""What a model's text means: its thinking and its tool calls, found while it streams. Plain Python."""
