"""The recipe language: its tables, read, refined and checked. No torch."""
