"""Policy maths: pure functions of tensors, without configuration, files or processes."""
