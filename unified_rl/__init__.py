"""Self-rewarding reinforcement learning for unified multimodal models, on DeepSpeed."""

__version__ = "0.1.0"
