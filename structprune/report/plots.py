"""Pictures of results; matplotlib is an extra."""

import importlib.util
import os
from pathlib import Path

from structprune.errors import UserError

# Okabe-Ito colours, which stay apart for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v")


def check_matplotlib(otherwise: str = "") -> None:
    """Raises UserError where matplotlib is not installed; call it before long work that ends in a picture.

    Args:
        otherwise: another remedy, to end the message with.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"pictures need matplotlib: pip install 'structprune[plot]'{otherwise and ', ' + otherwise}")


def plot_nelbo(
    series: dict[str, list[tuple[float, float, float]]], dense: tuple[float, float], path: str | Path, title: str
) -> Path:
    """NELBO against the removed ratio, one line per method, with standard errors.

    Args:
        series: name -> points (ratio, nats per token, standard error).
        dense: NELBO of the dense model and its standard error.
        path: PNG to write, whole or not at all.
    Raises:
        UserError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    axes.axhline(dense[0], color="#555555", linewidth=1, linestyle="--", zorder=1)
    axes.annotate("dense", (0.0, dense[0]), (3, -11), textcoords="offset points", color="#555555", fontsize=9)
    for (name, points), colour, marker in zip(series.items(), COLOURS, MARKERS):
        ratios, values, errors = zip(*points)
        axes.errorbar(ratios, values, yerr=errors, color=colour, marker=marker, markersize=5, capsize=2, label=name)
    axes.set_xlabel("removed share of block projections")
    axes.set_ylabel("masked-diffusion NELBO, nats per token")
    axes.set_title(title, fontsize=11)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path = Path(path)
    draft = path.with_name(f".{path.name}.part")
    figure.savefig(draft, dpi=160, format="png")
    pyplot.close(figure)
    os.replace(draft, path)
    return path
