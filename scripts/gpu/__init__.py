"""The report of a GPU, stage by stage."""
