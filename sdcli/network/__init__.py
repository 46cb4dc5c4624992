"""A timm model, where it can be cut, and what is put on it."""
