"""The small trained model and the texts that are part of the package."""

from pathlib import Path

NAME = "llada-docs"  # of the model; its folder is just called "model"


def model_directory() -> Path:
    """A checkpoint in LLaDA's official layout, 4.8 M parameters, with its README.md and train.log."""
    return Path(__file__).parent / "model"


def text_file(name: str) -> Path:
    """`calibration.txt` or `heldout.txt` (README.txt names their origin)."""
    return Path(__file__).parent / "text" / name
