"""Methods of teaching: points, losses, signals, and the objective that sums them."""
