"""Evaluation: masked-diffusion NELBO and paired comparison."""
