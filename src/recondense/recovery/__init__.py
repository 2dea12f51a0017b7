"""Recover: train a compressed model."""
