"""The small trained model, texts, templates, settings and help that are part of the package."""

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
    """The template `pruned`, `masked`, `recovered` or `packed` of a README.md, for `str.format`."""
    return (Path(__file__).parent / "cards" / f"{name}.md").read_text(encoding="utf-8")


def help_text(verb: str) -> str:
    """What `structprune VERB --help` says above the options, in rich's markup."""
    return (Path(__file__).parent / "help" / f"{verb}.txt").read_text(encoding="utf-8")


def demo_settings() -> Path:
    """Settings of the demo: those of every method, and the methods that ours is compared with."""
    return Path(__file__).parent / "demo.yaml"
