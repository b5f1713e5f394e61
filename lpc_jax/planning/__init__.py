"""What a run needs on chips that are elsewhere: memory, traffic, operations."""
