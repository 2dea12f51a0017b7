"""Calibrate: hidden states of a model on the calibration set."""
