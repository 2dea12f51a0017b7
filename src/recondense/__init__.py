"""recondense: condense a Mixture-of-Experts language model, then recover what was lost."""

__version__ = "0.1.0"
