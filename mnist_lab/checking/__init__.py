"""What is refused, or said, before a run."""
