"""Supervised fine-tuning of a Llama with DeepSpeed."""
