"""Losses: arrays in, one number per pair out."""
