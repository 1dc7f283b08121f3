"""From generated rows to a training set: merge, near-duplicates, decontamination, packing."""
