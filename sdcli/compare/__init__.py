"""Finished runs compared: what is known of each, what may be compared, and what the differences are worth."""
