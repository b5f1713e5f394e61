"""Answers to prompts: how tokens are drawn, and what is asked and kept."""
