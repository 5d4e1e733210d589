"""Calibration: windows of tokens, noise levels, and the file that replays both."""
