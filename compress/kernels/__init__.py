"""The feature-matching losses, fused: one pass reads student and teacher and writes the gradient. See README.md."""
