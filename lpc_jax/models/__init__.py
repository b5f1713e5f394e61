"""Models: the decoder, its adapters and latent, their parameters and files."""
