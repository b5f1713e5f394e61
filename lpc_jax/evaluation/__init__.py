"""Evaluation of a trained policy: held-out pairs, codes, standard benchmarks."""
