"""Images: opened, split, varied and batched."""
