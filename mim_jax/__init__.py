"""Masked image modelling in JAX and Flax: one train loop, many methods."""

__version__ = "0.1.0"
