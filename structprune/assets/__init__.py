"""The small trained model, texts, model-card templates and published task settings that are part of the package."""

from pathlib import Path

NAME = "llada-docs"  # of the model; its folder is just called "model"


def model_directory() -> Path:
    """A checkpoint in LLaDA's official layout, 4.8 M parameters, with its README.md and train.log."""
    return Path(__file__).parent / "model"


def preset_directory() -> Path:
    """Published settings of evaluation tasks, one YAML file each (`configs/eval` links to it)."""
    return Path(__file__).parent / "eval"


def text_file(name: str) -> Path:
    """`calibration.txt` or `heldout.txt` (README.txt names their origin)."""
    return Path(__file__).parent / "text" / name


def card_template(name: str) -> str:
    """The template `pruned` or `masked` of a README.md, for `str.format`."""
    return (Path(__file__).parent / "cards" / f"{name}.md").read_text(encoding="utf-8")
