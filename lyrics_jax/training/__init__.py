"""One loop for every stage: state, optimizer, step, checkpoints, metrics, hosts."""
