"""The small trained model and text of the embedded default."""

from pathlib import Path

NAME = "llada-docs"  # of the model, whose folder has a name that says nothing


def model_directory() -> Path:
    """LLaDA's official layout, 4.8 M parameters (README.md and train.log beside it)."""
    return Path(__file__).parent / "model"


def text_file(name: str) -> Path:
    """`calibration.txt` or `heldout.txt` (README.txt tells where they are from)."""
    return Path(__file__).parent / "text" / name
