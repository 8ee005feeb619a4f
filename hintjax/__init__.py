"""Hint learning in JAX and Flax."""
