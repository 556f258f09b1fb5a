"""Which layers are trained, adapter folders, merging."""
