"""A synthetic world with exact truth: coloured shapes on a 2x2 grid, prompts, questions, detector."""
