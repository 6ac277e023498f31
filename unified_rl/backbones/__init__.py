"""Unified multimodal models behind one interface: what draws, reads and is trained."""
