"""What is on disk: the run directory and the formats in it, each committed atomically."""
