"""A transformers model whose decoder layers are visited one chunk at a time."""
