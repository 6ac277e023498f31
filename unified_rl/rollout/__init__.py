"""Rollout stage: G images per prompt, drawn by the current policy."""
