"""Whether a training job fits its accelerators, how fast it runs, and what limits it."""
