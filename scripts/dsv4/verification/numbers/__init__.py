"""Level 2: every value of a bundle against its source, and SHA-256 of its files."""
