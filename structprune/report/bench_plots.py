"""Plots of a benchmark: latency against the removed share, the share of the ideal saving, and memory."""

from pathlib import Path

from structprune.report.plots import COLOURS, GREY, REMOVED, SIZE, hide_frame, pyplot_for_files, save_figure, styles

GOAL = 0.9  # of the ideal saving; drawn as a line
INSIDE = 5  # a legend with at most so many entries is placed among the lines, a longer one beside them


def plot_bench(result: dict, folder: str | Path) -> list[Path]:
    """latency.png, ideal.png (if a model has fewer MACs than the first) and memory.png.

    Args:
        result: the contents of bench.json.
        folder: where to write them.
    Raises:
        UserError: matplotlib is not installed.
    """
    removed = {row["model"]: row["removed"] for row in result["models"]}
    forward, rows = result["forward"], result["forward"] + result["generation"]
    drawings = {
        "latency": (SIZE[1], lambda axes: draw_latency(axes, forward, removed)),
        "ideal": (1.2 + 0.36 * len(series(rows)), lambda axes: draw_ideal(axes, rows)),
        "memory": (SIZE[1], lambda axes: draw_memory(axes, result["models"], forward)),
    }
    if not any(row.get("ideal_share") for row in forward):
        del drawings["ideal"]
    paths = []
    for name, (height, draw) in drawings.items():
        figure, axes = pyplot_for_files().subplots(figsize=(SIZE[0], height), layout="constrained")
        axes.grid(alpha=0.25, axis="y")
        draw(axes)
        axes.set_axisbelow(True)
        hide_frame(axes)
        paths.append(save_figure(figure, Path(folder) / f"{name}.png", 110))
    return paths


def series(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows grouped by what they measure, such as 'forward, 1 x 512, compiled', in the order measured."""
    groups: dict[str, list[dict]] = {}
    modes, sizes = {row["mode"] for row in rows}, {(row["batch"], row["length"]) for row in rows}
    for row in rows:
        parts = ["generation" if "cache" in row else "forward"]
        parts += [f"{row['cache']} cache"] if row.get("cache", "none") != "none" else []
        parts += [f"{row['batch']} x {row['length']}"] if len(sizes) > 1 else []
        parts += [row["mode"]] if len(modes) > 1 else []
        groups.setdefault(", ".join(parts), []).append(row)
    return groups


def _errors(values: list[dict[str, float]]) -> list[list[float]]:
    """Distances of both quartiles from the median, as `errorbar` takes them."""
    return [[abs(value["median"] - value[side]) for value in values] for side in ("p25", "p75")]


def draw_latency(axes, rows: list[dict], removed: dict[str, float]) -> None:
    """Forward latency with quartiles, and the latency expected from the MACs (dashed)."""
    lines = series(rows)
    for (name, line), (colour, marker) in zip(lines.items(), styles(), strict=False):
        line = sorted(line, key=lambda row: removed[row["model"]])
        x = [removed[row["model"]] for row in line]
        medians, errors = [row["ms"]["median"] for row in line], _errors([row["ms"] for row in line])
        label = name if len(lines) > 1 else "measured"
        axes.errorbar(x, medians, yerr=errors, color=colour, marker=marker, markersize=5, capsize=2, label=label)
        dense = next(row for row in line if "speedup" not in row)["ms"]["median"]
        ideal = [dense * (1 - row["macs_removed"]) for row in line]
        axes.plot(x, ideal, color=colour, linewidth=1, linestyle="--", alpha=0.7)
    axes.plot([], [], color=GREY, linewidth=1, linestyle="--", label="proportional to MACs")
    medians = [row["ms"]["median"] for row in rows]
    if max(medians) > 8 * min(medians):
        axes.set_yscale("log", subs=(2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=REMOVED, ylabel="latency, ms (median, quartiles)")
    axes.set_title(_title("Latency of a forward pass", rows), fontsize=11)
    _legend(axes)


def draw_ideal(axes, rows: list[dict]) -> None:
    """Share of the ideal saving that is reached: a row for each measurement, a colour for each model."""
    measurements = series(rows)
    models = list(dict.fromkeys(row["model"] for row in rows if row.get("ideal_share")))
    axes.axvline(100, color=GREY, linewidth=1, label="ideal")
    axes.axvline(100 * GOAL, color=GREY, linewidth=1, linestyle="--", label=f"goal, {100 * GOAL:.0f} %")
    for index, (model, (colour, marker)) in enumerate(zip(models, styles(), strict=False)):
        shift = 0.4 * ((index + 0.5) / len(models) - 0.5)  # so that quartiles do not cover each other
        points = [
            ({side: 100 * value for side, value in row["ideal_share"].items()}, y + shift)
            for y, group in enumerate(measurements.values())
            for row in group
            if row["model"] == model and row.get("ideal_share")
        ]
        shares, heights = zip(*points, strict=True)
        style = {"color": colour, "marker": marker, "linestyle": "", "markersize": 5, "capsize": 2}
        axes.errorbar([share["median"] for share in shares], heights, xerr=_errors(shares), label=model, **style)
    axes.set_yticks(range(len(measurements)), list(measurements))
    axes.set_ylim(len(measurements) - 0.4, -0.6)  # the first on top
    low, high = axes.get_xlim()
    xlabel = "(1 - 1 / speed-up) / share of MACs removed, % (median, quartiles)"
    axes.set(xlabel=xlabel, xlim=(min(low, 80), max(high, 104)))
    axes.set_title(_title("Share of the ideal saving reached", rows), fontsize=11)
    axes.grid(False, axis="y")
    axes.grid(alpha=0.25, axis="x")
    _legend(axes, beside=True)


def draw_memory(axes, models: list[dict], rows: list[dict]) -> None:
    """Weights, and above them the peak of a forward pass at the largest size measured."""
    rows = [row for row in rows if row["mode"] == rows[0]["mode"]]
    largest = max(rows, key=lambda row: row["batch"] * row["length"])
    size = (largest["batch"], largest["length"])
    peaks = {row["model"]: row["peak_above_weights"] for row in rows if (row["batch"], row["length"]) == size}
    known = None not in peaks.values()
    scale, unit = (1e9, "GB") if max(row["bytes"] for row in models) >= 1e9 else (1e6, "MB")
    names, weights = [row["model"] for row in models], [row["bytes"] / scale for row in models]
    working = [peaks[name] / scale if known else 0 for name in names]
    axes.bar(names, weights, width=0.55, color=COLOURS[0], label="weights")
    if known:
        axes.bar(names, working, width=0.55, bottom=weights, color=COLOURS[4], label="peak above the weights")
    for index, total in enumerate(map(sum, zip(weights, working, strict=True))):
        axes.annotate(f"{total:.3g}", (index, total), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    if len(names) * max(map(len, names)) > 60:  # they would overlap
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
    axes.set_ylabel(f"memory, {unit}")
    title = f"Memory of a forward pass, batch {size[0]}, {size[1]} tokens"
    axes.set_title(title if known else "Memory of the weights (peaks are not known on this system)", fontsize=11)
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=9)


def _title(start: str, rows: list[dict]) -> str:
    """With the size, if there is only one."""
    sizes = {(row["batch"], row["length"]) for row in rows}
    return start if len(sizes) > 1 else f"{start}, batch {rows[0]['batch']}, {rows[0]['length']} tokens"


def _legend(axes, beside: bool = False) -> None:
    """A short legend among the lines; a long one, or with `beside` any, to their right on a wider figure."""
    if not beside and len(axes.get_legend_handles_labels()[1]) <= INSIDE:
        axes.legend(frameon=False, fontsize=9)
        return
    axes.figure.set_figwidth(axes.figure.get_figwidth() + 2.6)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
