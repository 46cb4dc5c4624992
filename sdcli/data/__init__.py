"""Images: opened, split, augmented and batched."""
