"""Plots of sinks over a trajectory, from the runs of sinks.json side by side; matplotlib is an extra."""

from pathlib import Path

from structprune.report.plots import COLOURS, GREY, hide_frame, pyplot_for_files, save_figure
from structprune.report.sink_tables import run_title

PROGRESS = {"forward": "share of tokens visible", "reverse": "share of the generation done"}
MAP = "cividis"
SINK = 0.5
FRAMES, FRAME_MS, LAST_MS = 32, 160, 1200
LIGHT_GREY = "#9A9A9A"


def draw_all(runs: list[dict], folder: Path) -> list[str]:
    """Write all plots into `folder`; returns their names.

    Args:
        runs: of sinks.json, with `detail`; every plot has a column for each.
    Raises:
        UserError: matplotlib is not installed.
    """
    plots = {
        "heatmap.png": draw_heatmap, "drift.png": draw_drift, "heads.png": draw_heads, "survival.png": draw_survival,
    }  # fmt: skip
    for name, draw in plots.items():
        save_figure(draw(runs), folder / name, 130)
    animate_drift(runs, folder / "drift.gif")
    return [*plots, "drift.gif"]


def _panels(runs: list[dict], height: float, width: float = 4.0, **options):
    """A figure with one titled panel per run."""
    size = (max(5.5, width * len(runs) + 0.8), height)
    figure, grid = pyplot_for_files().subplots(
        1, len(runs), figsize=size, layout="constrained", squeeze=False, **options
    )
    for axes, run in zip(grid[0], runs, strict=True):
        axes.set_title(run_title(run), fontsize=10)
        hide_frame(axes)
    return figure, grid[0]


def _relative(run: dict, sequence: int = 0) -> list[list[float]]:
    """Mass of one sequence divided by its mean at each step, NaN where it is missing: S lists of T."""
    rows = []
    for masses in run["detail"]["mass"][sequence]:
        values = [value for value in masses if value is not None]
        mean = sum(values) / len(values)
        rows.append([value / mean for value in _nan(masses)])
    return rows


def draw_heatmap(runs: list[dict]):
    """Incoming attention by position and step, for each run's first sequence, with the sinks marked."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    figure, panels = _panels(runs, 4.4)
    for axes, run in zip(panels, runs, strict=True):
        rows = _relative(run)
        edges = (0, len(rows[0]), len(rows), 0)
        image = axes.imshow(
            rows, aspect="auto", cmap=MAP, norm=LogNorm(0.25, 16), extent=edges, interpolation="nearest"
        )
        phi = run["detail"]["phi"][0]
        marks = [(j + 0.5, s + 0.5) for s, row in enumerate(phi) for j, value in enumerate(row) if (value or 0) > SINK]
        size = max(1.0, min(6.0, 150 / len(rows)))
        if marks:
            axes.plot(
                *zip(*marks, strict=True),
                "s",
                color=COLOURS[1],
                markersize=size,
                markeredgewidth=0,
                label="sink (φ > 0.5)",
            )
        if run["prompt"]:
            axes.axvline(run["prompt"], color="white", linewidth=1.2, linestyle=":")
            axes.plot(
                [], [], color=GREY, linewidth=1.2, linestyle=":", label="end of the prompt"
            )  # the legend is white
        axes.set_xlabel("position in the text")
        axes.set_ylabel("noise level, most noise on top" if run["kind"] == "forward" else "step of the generation")
        for side in (axes.xaxis, axes.yaxis):
            side.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(-1.5, len(rows[0]) + 1.5)
    bar = figure.colorbar(image, ax=list(panels), label="incoming attention / mean", extend="both", pad=0.01)
    bar.set_ticks([0.25, 0.5, 1, 2, 4, 8, 16], labels=["1/4", "1/2", "1", "2", "4", "8", "16"])
    bar.minorticks_off()
    _legend(figure, panels)
    return figure


def _legend(figure, panels) -> None:
    """One legend below all panels, each label once."""
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if handles:
        place = {"loc": "outside lower center", "frameon": False, "fontsize": 9}
        figure.legend(handles.values(), handles.keys(), ncols=len(handles), **place)


def draw_drift(runs: list[dict]):
    """The sinks' centroid over the trajectory: every sequence, and the first one's spread."""
    figure, panels = _panels(runs, 3.6)
    for axes, run in zip(panels, runs, strict=True):
        series, at = run["per_step"], run["per_step"]["progress"]
        for centre in series["centroid"][1:]:
            axes.plot(at, _nan(centre), color=LIGHT_GREY, linewidth=1, alpha=0.8)
        centre, spread = _nan(series["centroid"][0]), _nan(series["spread"][0])
        axes.plot(at, centre, color=COLOURS[0], linewidth=2, label="first sequence")
        low, high = ([c + sign * s for c, s in zip(centre, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(
            at, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, label="its spread (± φ-weighted std)"
        )
        if run["sequences"] > 1:
            axes.plot([], [], color=LIGHT_GREY, linewidth=1, label="other sequences")
        drift = run["summary"]["drift"]["mean"]
        note = "no centroid" if drift is None else f"drift: {drift:.1%} of the positions"
        axes.annotate(note, (0.98, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=9)
        axes.set_xlabel(PROGRESS[run["kind"]])
        axes.set_ylabel("centroid of the sinks, position" + (" in the prompt" if run["causal"] else ""))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.12 * run["compared_positions"])
        axes.grid(alpha=0.25)
    _legend(figure, panels)
    return figure


def _nan(values: list) -> list[float]:
    """NaN for None."""
    return [float("nan") if value is None else value for value in values]


def draw_heads(runs: list[dict]):
    """How much of each head's attention goes to its own sinks, by layer and head."""
    figure, panels = _panels(runs, 3.8, 3.4)
    for axes, run in zip(panels, runs, strict=True):
        width = max(map(len, run["strength"]))
        rows = [_nan([*layer, *[None] * (width - len(layer))]) for layer in run["strength"]]
        image = axes.imshow(rows, aspect="auto", cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=list(panels), label="share of attention on the head's sinks (ε = 3)", pad=0.01)
    return figure


def draw_survival(runs: list[dict]):
    """How many of the first step's sinks remain at every step, and for how many steps positions are sinks."""
    figure, (first, lifetime) = pyplot_for_files().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for run, colour, style in zip(runs, COLOURS, ("-", "--", "-.", ":", "-"), strict=False):
        series, title = run["per_step"], run_title(run)
        count = len(series["from_first"])
        at = [step / max(1, count - 1) for step in range(count)]
        line = {"color": colour, "linestyle": style, "linewidth": 2, "label": title}
        first.plot(at, _nan(series["from_first"]), **line)
        shares = sorted(
            value for row in run["detail"]["survival"] for value in row[: run["compared_positions"]] if value
        )
        if shares:
            longer = [1 - index / len(shares) for index in range(len(shares))]  # share of positions that last so long
            lifetime.step([0, *shares, shares[-1]], [1, *longer, 0], where="pre", **line)
    first.set_xlabel("progress through the trajectory")
    first.set_ylabel("share of the first step's sinks")
    first.set_title("sinks of the first step that have stayed sinks", fontsize=10)
    lifetime.set_xlabel("share of all steps")
    lifetime.set_ylabel("share of positions that are ever a sink")
    lifetime.set_title("positions that are a sink for at least this share of the steps", fontsize=10)
    for axes in (first, lifetime):
        axes.set_xlim(0, 1.01)
        axes.set_ylim(0, 1.04)
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
    figure.legend(
        marks, ["sink", "centroid of the sinks"], loc="outside lower center", ncols=2, frameon=False, fontsize=8
    )
    figure.canvas.draw()  # once: everything that does not move
    background = figure.canvas.copy_from_bbox(figure.bbox)
    frames, images = min(FRAMES, max(len(bars.rows) for bars in panel_bars)), []
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
        self.axes, self.run, self.rows = axes, run, _relative(run)
        length = len(self.rows[0])
        edges = [index - 0.5 for index in range(length + 1)]
        self.all, self.sinks = (
            axes.stairs([0.0] * length, edges, color=colour, fill=True) for colour in (LIGHT_GREY, COLOURS[1])
        )
        self.centre = axes.axvline(0, color=COLOURS[0], linewidth=1.5, linestyle="--")
        self.note = axes.annotate("", (0.98, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=8)
        self.moving = (self.all, self.centre, self.sinks, self.note)  # in drawing order: sinks are in front
        for artist in self.moving:
            artist.set_animated(True)
        axes.set_yscale("symlog", linthresh=1)
        highest = max(value for row in self.rows for value in row if value == value)
        axes.set_ylim(0, 1.6 * highest)
        ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64) if tick <= highest]
        axes.set_yticks(ticks, labels=map(str, ticks))
        axes.minorticks_off()
        axes.set_xlim(-2.5, length + 1.5)
        axes.set_xlabel("position in the text")

    def draw(self, progress: float) -> None:
        """Draw the step at this share of the trajectory on the canvas."""
        step = round(progress * (len(self.rows) - 1))
        phi, centre = self.run["detail"]["phi"][0][step], self.run["per_step"]["centroid"][0][step]
        heights = [0 if height != height else height for height in self.rows[step]]
        self.all.set_data(heights)
        self.sinks.set_data([height if (value or 0) > SINK else 0 for height, value in zip(heights, phi, strict=True)])
        self.centre.set_visible(centre is not None)
        if centre is not None:
            self.centre.set_xdata([centre, centre])
        self.note.set_text(f"step {step + 1} of {len(self.rows)}")
        for artist in self.moving:
            self.axes.draw_artist(artist)
