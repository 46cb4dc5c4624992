"""A run as one page of HTML, and its model card."""
