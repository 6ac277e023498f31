"""Evaluation: images of held-out prompts under fixed seeds, their scores, and the comparison of two checkpoints."""
