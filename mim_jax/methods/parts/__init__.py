"""What several methods are made of: read from configs, sized like checkpoints, taken over."""
