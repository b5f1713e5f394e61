"""Models: the only room that speaks Flax."""
