"""What teaches: points, losses, signals and their sum."""
