"""Reward stage: scores of rollout images under the judge, and reference log-probs."""
