"""Slurm and containers: what is asked of them, and what they say. Imports without torch."""
