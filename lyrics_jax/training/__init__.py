"""One loop for all stages: state, optimizer, sharding, checkpoints, metrics."""
