"""What a run looks like: timings, TensorBoard logs, pictures, and a self-contained HTML page."""
