"""Plots of results, and what all plots share; matplotlib is an extra."""

import importlib.util
import io
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from structprune.errors import UserError
from structprune.files import write_whole

# Okabe-Ito colours, which colour-blind readers can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v")
GREY = "#555555"
REMOVED = "share of block projections removed"  # label of an axis
SIZE = (7, 4.4)  # inches


def check_matplotlib(otherwise: str = "") -> None:
    """Raise UserError if matplotlib is not installed; call it before long work that ends in a plot.

    Args:
        otherwise: another remedy, to end the message with.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"plots need matplotlib: pip install 'structprune[plot]'{otherwise and ', ' + otherwise}")


def pyplot_for_files() -> Any:
    """matplotlib.pyplot without a display.

    Raises:
        UserError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def styles() -> Iterator[tuple[str, str]]:
    """Endless pairs of colour and marker, all different until both repeat."""
    shifted = (MARKERS[shift:] + MARKERS[:shift] for shift in range(len(MARKERS)))
    return cycle(pair for markers in shifted for pair in zip(COLOURS, markers, strict=True))


def hide_frame(axes) -> None:
    """Draw only the left and bottom axis."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(figure, path: Path, dpi: int) -> Path:
    """Write a figure as PNG, completely or not at all, and free its memory."""
    pyplot, png = pyplot_for_files(), io.BytesIO()
    figure.savefig(png, dpi=dpi, format="png")
    pyplot.close(figure)
    write_whole(path, png.getvalue())
    return path


LINEAR = 0.02  # nats per token, up to which the axis of losses is linear
LOSS_TICKS = (0, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


def plot_loss(series: dict[str, list[tuple[float, float, float]]], path: str | Path, title: str) -> Path:
    """Loss of NELBO against the dense model by removed ratio, one line per method, with standard errors.

    The axis is linear up to `LINEAR` and logarithmic above, so that a bad method does not flatten the others.

    Args:
        series: name -> points (ratio, loss in nats per token, its standard error).
        path: PNG to write.
    Raises:
        UserError: matplotlib is not installed.
    """
    figure, axes = pyplot_for_files().subplots(figsize=SIZE, layout="constrained")
    axes.axhline(0, color=GREY, linewidth=1, linestyle="--", zorder=1)
    axes.annotate("dense", (0.0, 0), (3, 3), textcoords="offset points", color=GREY, fontsize=9)
    for (name, points), (colour, marker) in zip(series.items(), styles(), strict=False):
        ratios, values, errors = zip(*points, strict=True)
        axes.errorbar(ratios, values, yerr=errors, color=colour, marker=marker, markersize=5, capsize=2, label=name)
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.5)
    top = max(value + error for points in series.values() for _, value, error in points)
    ticks = [tick for tick in LOSS_TICKS if tick <= max(top, LINEAR)]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=REMOVED, ylabel="loss of NELBO against dense, nats per token", xlim=(0, None))
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", facecolor="white", edgecolor="none", framealpha=1)  # over the dense model's line
    hide_frame(axes)
    return save_figure(figure, Path(path), 160)
