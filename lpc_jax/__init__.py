"""Preference alignment in JAX, plain or with Latent Preference Coding (LPC)."""
