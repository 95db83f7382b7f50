"""What to learn from a sample: pure tensor functions, each small enough to check against its paper."""
