"""What a policy's codes are, in numbers and on a page."""
