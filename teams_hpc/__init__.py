"""TeaMs-RL on HPC clusters: instruction-tuning data made with reinforcement learning."""

__version__ = "0.1.0"
