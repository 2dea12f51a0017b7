"""Recover: train what was compressed."""
