"""Evaluation: what a trained policy is worth."""
