"""BAGEL: one language model with two sets of experts, one for reading and one for drawing by rectified flow."""
