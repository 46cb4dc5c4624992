"""Training, from settings to a run folder."""
