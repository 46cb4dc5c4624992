"""Networks in the formats of other programs: written, read back and compared."""
