"""Calibrate: record a model's hidden states on the calibration set."""
