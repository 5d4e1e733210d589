"""Measurements on a GPU, stage by stage."""
