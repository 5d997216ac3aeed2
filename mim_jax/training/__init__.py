"""The train loop: state, step, optimizer, sharding, checkpoints, logging."""
