"""What the result is worth: held-out loss, benchmarks, privacy, diversity."""
