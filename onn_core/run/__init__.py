"""A run around its steps: checkpoints, resume, stopping, progress."""
