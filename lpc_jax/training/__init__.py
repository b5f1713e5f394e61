"""Training: optimizer, reference, step, loop and run log."""
