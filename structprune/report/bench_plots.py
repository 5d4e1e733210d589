"""Pictures of a benchmark: latency against the removed share, the share of the ideal saving, and memory."""

import os
from pathlib import Path

from structprune.report.plots import COLOURS, MARKERS, check_matplotlib

WANTED = 0.9  # of the ideal saving: drawn as a line
GREY = "#555555"
INSIDE = 5  # entries of a legend that leave room for the lines; more of them stand beside
SIZE = (7, 4.4)  # inches


def plot_bench(result: dict, folder: str | Path) -> list[Path]:
    """latency.png, ideal.png (where a model has fewer MACs than the first) and memory.png.

    Args:
        result: the contents of bench.json.
        folder: where to write them, each whole or not at all.
    Raises:
        UserError: matplotlib is not installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    removed = {row["model"]: row["removed"] for row in result["models"]}
    drawings = [("latency.png", SIZE, lambda axes: draw_latency(axes, result["forward"], removed))]
    rows = result["forward"] + result["generation"]
    if any(row.get("ideal_share") for row in result["forward"]):
        size = (SIZE[0], 1.2 + 0.36 * len(series(rows)))
        drawings.append(("ideal.png", size, lambda axes: draw_ideal(axes, rows)))
    drawings.append(("memory.png", SIZE, lambda axes: draw_memory(axes, result["models"], result["forward"])))
    return [_save(Path(folder) / name, size, draw) for name, size, draw in drawings]


def series(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by what they measure, such as 'forward, 1 x 512, compiled', in the order measured."""
    found: dict[str, list[dict]] = {}
    modes, sizes = {row["mode"] for row in rows}, {(row["batch"], row["length"]) for row in rows}
    for row in rows:
        kind = "forward" if "cache" not in row else "generation"
        if row.get("cache", "none") != "none":
            kind += f", {row['cache']} cache"
        parts = [kind]
        if len(sizes) > 1:
            parts.append(f"{row['batch']} x {row['length']}")
        if len(modes) > 1:
            parts.append(row["mode"])
        found.setdefault(", ".join(parts), []).append(row)
    return found


def draw_latency(axes, rows: list[dict], removed: dict[str, float]) -> None:
    """Forward latency with quartiles, and the latency that fewer MACs alone would give (dashed)."""
    for (name, line), (colour, marker) in zip(series(rows).items(), _styles()):
        line = sorted(line, key=lambda row: removed[row["model"]])
        x = [removed[row["model"]] for row in line]
        middle = [row["ms"]["median"] for row in line]
        spread = [[abs(row["ms"]["median"] - row["ms"][side]) for row in line] for side in ("p25", "p75")]
        axes.errorbar(x, middle, yerr=spread, color=colour, marker=marker, markersize=5, capsize=2, label=name)
        whole = next(row for row in line if "speedup" not in row)["ms"]["median"]
        ideal = [whole * (1 - row["macs_removed"]) for row in line]
        axes.plot(x, ideal, color=colour, linewidth=1, linestyle="--", alpha=0.7)
    axes.plot([], [], color=GREY, linewidth=1, linestyle="--", label="in proportion to MACs")
    values = [row["ms"]["median"] for row in rows]
    if max(values) > 8 * min(values):
        axes.set_yscale("log", subs=(2, 5))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("removed share of block projections")
    axes.set_ylabel("forward pass, ms (median, quartiles)")
    axes.set_title(_title("Forward latency", rows), fontsize=11)
    _legend(axes)


def draw_ideal(axes, rows: list[dict]) -> None:
    """Share of the ideal saving that is reached: a line of its own for everything measured, a colour for each model."""
    measured = series(rows)
    models = list(dict.fromkeys(row["model"] for row in rows if row.get("ideal_share")))
    axes.axvline(100, color=GREY, linewidth=1)
    axes.axvline(100 * WANTED, color=GREY, linewidth=1, linestyle="--")
    for place, (model, (colour, marker)) in enumerate(zip(models, _styles())):
        shift = 0.4 * ((place + 0.5) / len(models) - 0.5)  # so that quartiles do not cover each other
        found = [(row, y + shift) for y, line in enumerate(measured.values()) for row in line if row["model"] == model]
        shares = [({side: 100 * value for side, value in row["ideal_share"].items()}, y) for row, y in found
                  if row.get("ideal_share")]  # fmt: skip
        x, y = [share["median"] for share, _ in shares], [y for _, y in shares]
        spread = [[abs(share["median"] - share[side]) for share, _ in shares] for side in ("p25", "p75")]
        axes.errorbar(
            x, y, xerr=spread, color=colour, marker=marker, linestyle="", markersize=5, capsize=2, label=model
        )
    axes.set_yticks(range(len(measured)), list(measured))
    axes.set_ylim(len(measured) - 0.4, -0.6)  # the first on top
    axes.set_xlabel("share of the ideal saving reached, % (median, quartiles)")
    axes.set_title(_title("(1 - 1 / speed-up) / share of MACs removed", rows), fontsize=11)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 80), max(high, 104))
    axes.grid(False, axis="y")
    axes.grid(alpha=0.25, axis="x")
    _legend(axes, beside=True)


def draw_memory(axes, models: list[dict], rows: list[dict]) -> None:
    """Weights, and above them the peak of a forward pass at the largest size measured."""
    rows = [row for row in rows if row["mode"] == rows[0]["mode"]]
    largest = max(rows, key=lambda row: row["batch"] * row["length"])
    size = (largest["batch"], largest["length"])
    above = {row["model"]: row["peak_above_weights"] for row in rows if (row["batch"], row["length"]) == size}
    known = None not in above.values()
    scale = 1e9 if max(row["bytes"] for row in models) >= 1e9 else 1e6
    names = [row["model"] for row in models]
    weights = [row["bytes"] / scale for row in models]
    working = [above[name] / scale if known else 0 for name in names]
    axes.bar(names, weights, width=0.55, color=COLOURS[0], label="weights")
    if known:
        axes.bar(names, working, width=0.55, bottom=weights, color=COLOURS[4], label="peak above them")
    for place, total in enumerate(map(sum, zip(weights, working))):
        axes.annotate(f"{total:.3g}", (place, total), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    axes.set_ylabel("GB" if scale == 1e9 else "MB")
    what = f"Memory of a forward pass, batch {size[0]}, {size[1]} tokens"
    axes.set_title(what if known else "Memory of the weights (the system does not tell peaks)", fontsize=11)
    axes.margins(y=0.12)
    axes.legend(frameon=False, fontsize=9)


def _title(start: str, rows: list[dict]) -> str:
    """With the size, where there is only one."""
    sizes = {(row["batch"], row["length"]) for row in rows}
    return start if len(sizes) > 1 else f"{start}, batch {rows[0]['batch']}, {rows[0]['length']} tokens"


def _legend(axes, beside: bool = False) -> None:
    """Among the lines while it is short, unless it is to stand to their right, on a figure that is as much wider."""
    if not beside and len(axes.get_legend_handles_labels()[1]) <= INSIDE:
        axes.legend(frameon=False, fontsize=9)
        return
    axes.figure.set_figwidth(axes.figure.get_figwidth() + 2.6)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


def _styles():
    """Endless pairs of colour and marker, all different until both begin again."""
    count = 0
    while True:
        yield COLOURS[count % len(COLOURS)], MARKERS[(count + count // len(COLOURS)) % len(MARKERS)]
        count += 1


def _save(path: Path, size: tuple[float, float], draw) -> Path:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.grid(alpha=0.25, axis="y")
    draw(axes)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    draft = path.with_name(f".{path.name}.part")
    figure.savefig(draft, dpi=110, format="png")
    pyplot.close(figure)
    os.replace(draft, path)
    return path
