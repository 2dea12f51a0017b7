"""Evaluate: measure perplexity, lm-eval tasks, memory and speed."""
