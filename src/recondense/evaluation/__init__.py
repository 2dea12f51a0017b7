"""Evaluate: perplexity, lm-eval tasks, memory and speed."""
