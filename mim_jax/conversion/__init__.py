"""Weights in and out: official checkpoints of papers, and files other libraries read."""
