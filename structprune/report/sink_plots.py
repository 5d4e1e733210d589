"""Plots of sinks over a trajectory, from the runs of sinks.json side by side; matplotlib is an extra.

Shapes: N sequences, S steps, T positions. A None of sinks.json is NaN here.
"""

from pathlib import Path

import numpy as np

from structprune.report.plots import COLOURS, GREY, hide_frame, pyplot_for_files, save_figure
from structprune.report.sink_tables import run_title

PROGRESS = {"forward": "share of tokens visible", "reverse": "share of the generation done"}
MAP = "cividis"
SINK = 0.5
FRAMES, FRAME_MS, LAST_MS = 32, 160, 1200
LIGHT_GREY = "#9A9A9A"
BELOW = {"loc": "outside lower center", "frameon": False}  # a legend's place
CORNER = {"xy": (0.98, 0.97), "xycoords": "axes fraction", "ha": "right", "va": "top"}  # a note's place


def draw_all(runs: list[dict], folder: Path) -> list[str]:
    """Write all plots into `folder`; returns their names.

    Args:
        runs: of sinks.json, with `detail`; every plot has a column for each.
    Raises:
        UserError: matplotlib is not installed.
    """
    plots = {"heatmap": draw_heatmap, "drift": draw_drift, "heads": draw_heads, "survival": draw_survival}
    names = [save_figure(draw(runs), folder / f"{name}.png", 130).name for name, draw in plots.items()]
    animate_drift(runs, folder / "drift.gif")
    return [*names, "drift.gif"]


def _panels(runs: list[dict], height: float, width: float = 4.0):
    """A figure with one titled panel per run."""
    size = (max(5.5, width * len(runs) + 0.8), height)
    figure, grid = pyplot_for_files().subplots(1, len(runs), figsize=size, layout="constrained", squeeze=False)
    for axes, run in zip(grid[0], runs, strict=True):
        axes.set_title(run_title(run), fontsize=10)
        hide_frame(axes)
    return figure, grid[0]


def _numbers(values: list) -> np.ndarray:
    """Nested lists as an array, NaN for None."""
    return np.array(values, dtype=float)


def _relative(run: dict) -> np.ndarray:
    """Mass of the first sequence divided by its mean at each step, (S, T)."""
    mass = _numbers(run["detail"]["mass"][0])  # (S, T)
    return mass / np.nanmean(mass, axis=1, keepdims=True)


def draw_heatmap(runs: list[dict]):
    """Incoming attention by position and step, for each run's first sequence, with the sinks marked."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    figure, panels = _panels(runs, 4.4)
    for axes, run in zip(panels, runs, strict=True):
        mass = _relative(run)  # (S, T)
        steps, length = mass.shape
        style = {"aspect": "auto", "cmap": MAP, "norm": LogNorm(0.25, 16), "interpolation": "nearest"}
        image = axes.imshow(mass, extent=(0, length, steps, 0), **style)
        rows, positions = np.nonzero(_numbers(run["detail"]["phi"][0]) > SINK)  # 2 x (M,)
        if len(rows):
            style = {"markersize": max(1.0, min(6.0, 150 / steps)), "markeredgewidth": 0}
            axes.plot(positions + 0.5, rows + 0.5, "s", color=COLOURS[1], label="sink (φ > 0.5)", **style)
        if run["prompt"]:
            line = {"linewidth": 1.2, "linestyle": ":"}
            axes.axvline(run["prompt"], color="white", **line)
            axes.plot([], [], color=GREY, label="end of the prompt", **line)  # the legend is white
        ylabel = "noise level, most noise on top" if run["kind"] == "forward" else "step of the generation"
        axes.set(xlabel="position in the text", ylabel=ylabel, xlim=(-1.5, length + 1.5))
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=list(panels), label="incoming attention / mean", extend="both", pad=0.01)
    bar.set_ticks([0.25, 0.5, 1, 2, 4, 8, 16], labels=["1/4", "1/2", "1", "2", "4", "8", "16"])
    bar.minorticks_off()
    _legend(figure, panels)
    return figure


def _legend(figure, panels) -> None:
    """One legend below all panels; a label of several panels once, two lines of one panel that share a label both."""
    handles: list = []
    labels: list[str] = []
    for axes in panels:
        pairs = [pair for pair in zip(*axes.get_legend_handles_labels(), strict=True) if pair[1] not in labels]
        handles += [handle for handle, _ in pairs]
        labels += [label for _, label in pairs]
    if handles:
        figure.legend(handles, labels, ncols=len(handles), fontsize=9, **BELOW)


def draw_drift(runs: list[dict]):
    """The sinks' centroid over the trajectory: every sequence, and the first one's spread."""
    figure, panels = _panels(runs, 3.6)
    for axes, run in zip(panels, runs, strict=True):
        at = run["per_step"]["progress"]
        first, *others = _numbers(run["per_step"]["centroid"])  # N x (S,)
        spread = _numbers(run["per_step"]["spread"][0])  # (S,)
        for centre in others:
            axes.plot(at, centre, color=LIGHT_GREY, linewidth=1, alpha=0.8)
        axes.plot(at, first, color=COLOURS[0], linewidth=2, label="first sequence")
        band = {"color": COLOURS[0], "alpha": 0.18, "linewidth": 0, "label": "its spread (± φ-weighted std)"}
        axes.fill_between(at, first - spread, first + spread, **band)
        if others:
            axes.plot([], [], color=LIGHT_GREY, linewidth=1, label="other sequences")
        drift = run["summary"]["drift"]["mean"]
        note = "no centroid" if drift is None else f"drift: {drift:.1%} of the positions"
        axes.annotate(note, fontsize=9, **CORNER)
        ylabel = "centroid of the sinks, position" + (" in the prompt" if run["causal"] else "")
        axes.set(xlabel=PROGRESS[run["kind"]], ylabel=ylabel, xlim=(0, 1), ylim=(0, 1.12 * run["compared_positions"]))
        axes.grid(alpha=0.25)
    _legend(figure, panels)
    return figure


def draw_heads(runs: list[dict]):
    """How much of each head's attention goes to its own sinks, by layer and head."""
    figure, panels = _panels(runs, 3.8, 3.4)
    for axes, run in zip(panels, runs, strict=True):
        width = max(map(len, run["strength"]))
        rows = _numbers([layer + [None] * (width - len(layer)) for layer in run["strength"]])  # (layers, heads)
        image = axes.imshow(rows, aspect="auto", cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="head", ylabel="layer")
        for side in (axes.xaxis, axes.yaxis):
            side.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(panels), label="share of attention on the head's sinks (ε = 3)", pad=0.01)
    return figure


def draw_survival(runs: list[dict]):
    """How many of the first step's sinks remain at every step, and for how many steps positions are sinks."""
    figure, (first, lifetime) = pyplot_for_files().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for run, colour, style in zip(runs, COLOURS, ("-", "--", "-.", ":", "-"), strict=False):
        line = {"color": colour, "linestyle": style, "linewidth": 2, "label": run_title(run)}
        remaining = _numbers(run["per_step"]["from_first"])  # (S,)
        first.plot(np.arange(len(remaining)) / max(1, len(remaining) - 1), remaining, **line)
        shares = _numbers([row[: run["compared_positions"]] for row in run["detail"]["survival"]])  # (N, t)
        shares = np.sort(shares[shares > 0])  # (M,)
        if len(shares):
            longer = 1 - np.arange(len(shares)) / len(shares)  # share of positions that last so long
            lifetime.step([0, *shares, shares[-1]], [1, *longer, 0], where="pre", **line)
    first.set(xlabel="progress through the trajectory", ylabel="share of the first step's sinks")
    first.set_title("sinks of the first step that have stayed sinks", fontsize=10)
    lifetime.set(xlabel="share of all steps", ylabel="share of positions that are ever a sink")
    lifetime.set_title("positions that are a sink for at least this share of the steps", fontsize=10)
    for axes in (first, lifetime):
        axes.set(xlim=(0, 1.01), ylim=(0, 1.04))
        axes.grid(alpha=0.25)
        hide_frame(axes)
    _legend(figure, [first])
    return figure


def animate_drift(runs: list[dict], path: Path) -> None:
    """A GIF of each run's first sequence: incoming attention by position, its sinks and their centroid."""
    from PIL import Image

    pyplot = pyplot_for_files()
    figure, panels = _panels(runs, 3.1, 3.7)
    figure.set_dpi(75)
    panel_bars = [_Bars(axes, run) for axes, run in zip(panels, runs, strict=True)]
    panels[0].set_ylabel("incoming attention / mean")
    marks = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[1]), pyplot.Line2D([], [], color=COLOURS[0], linestyle="--")]
    figure.legend(marks, ["sink", "centroid of the sinks"], ncols=2, fontsize=8, **BELOW)
    figure.canvas.draw()  # once: everything that does not move
    background = figure.canvas.copy_from_bbox(figure.bbox)
    frames, images = min(FRAMES, max(len(bars.mass) for bars in panel_bars)), []
    for frame in range(frames):
        figure.canvas.restore_region(background)
        for bars in panel_bars:
            bars.draw(frame / max(1, frames - 1))
        size, pixels = figure.canvas.get_width_height(), figure.canvas.buffer_rgba()
        image = Image.frombuffer("RGBA", size, pixels, "raw", "RGBA", 0, 1).convert("RGB")
        images.append(image.quantize(32, dither=Image.Dither.NONE))
    pyplot.close(figure)
    times = [FRAME_MS] * (frames - 1) + [LAST_MS]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=times, loop=0)


class _Bars:
    """One panel of the animation."""

    def __init__(self, axes, run: dict):
        self.axes, self.mass = axes, _relative(run)  # (S, T)
        self.phi, self.centroid = _numbers(run["detail"]["phi"][0]), _numbers(run["per_step"]["centroid"][0])
        length, highest = self.mass.shape[1], np.nanmax(self.mass)
        self.all, self.sinks = (
            axes.stairs(np.zeros(length), np.arange(length + 1) - 0.5, color=colour, fill=True)
            for colour in (LIGHT_GREY, COLOURS[1])
        )
        self.centre = axes.axvline(0, color=COLOURS[0], linewidth=1.5, linestyle="--")
        self.note = axes.annotate("", fontsize=8, **CORNER)
        self.moving = (self.all, self.centre, self.sinks, self.note)  # in drawing order: sinks are in front
        for artist in self.moving:
            artist.set_animated(True)
        axes.set_yscale("symlog", linthresh=1)
        ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64) if tick <= highest]
        axes.set_yticks(ticks, labels=map(str, ticks))
        axes.minorticks_off()
        axes.set(xlabel="position in the text", xlim=(-2.5, length + 1.5), ylim=(0, 1.6 * highest))

    def draw(self, progress: float) -> None:
        """Draw the step at this share of the trajectory on the canvas."""
        step = round(progress * (len(self.mass) - 1))
        heights, centre = np.nan_to_num(self.mass[step]), self.centroid[step]  # (T,)
        self.all.set_data(heights)
        self.sinks.set_data(np.where(self.phi[step] > SINK, heights, 0))
        self.centre.set_visible(not np.isnan(centre))
        self.centre.set_xdata([centre, centre])
        self.note.set_text(f"step {step + 1} of {len(self.mass)}")
        for artist in self.moving:
            self.axes.draw_artist(artist)
