"""Making new data with a trained generator."""
