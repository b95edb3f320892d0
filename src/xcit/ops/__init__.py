"""Equations: tensors in, tensors out, no parameters and no state."""
