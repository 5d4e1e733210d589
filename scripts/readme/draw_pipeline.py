"""The picture of the pipeline in the README.

python -m scripts.readme.draw_pipeline --out scripts/results/pipeline.png
"""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from scripts.tools.script_line import OneLineParser, one_line, result_file

# (column, row, title, what happens there, colour)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
BOXES = {
    "checkpoint": (0, 0, "official checkpoint", "LLaDA, LLaDA-1.5,\nMMaDA, Dream;\nno remote code runs", GREY),
    "calibration": (1, 0, "calibration", "real text, masked at\nS noise levels", BLUE),
    "sinks": (2, 0, "sinks", "weights ω from attention\nper position and level", ORANGE),
    "scores": (3, 0, "scores", "of heads and channels,\non ω-weighted activations", BLUE),
    "plan": (3, 1, "plan", "how many heads and\nhow many channels:\nthe best measured split", BLUE),
    "surgery": (2, 1, "surgery", "coupled slices are\nremoved together,\nby dependency graph", BLUE),
    "refit": (1, 1, "refit", "least squares towards\nthe dense outputs,\nchecked on held-out text", ORANGE),
    "out": (0, 1, "smaller dense model", "AutoModel loads it;\nreport, card, plan", GREEN),
}
ARROWS = ["checkpoint", "calibration", "sinks", "scores", "plan", "surgery", "refit", "out"]
WIDTH, HEIGHT, ACROSS, DOWN = 2.25, 1.25, 2.75, 1.75  # inches: a box, and the pitch of the grid


def centre(name: str) -> tuple[float, float]:
    column, row = BOXES[name][:2]
    return column * ACROSS + WIDTH / 2, (1 - row) * DOWN + HEIGHT / 2


def draw(path: Path) -> None:
    figure = pyplot.figure(figsize=(3 * ACROSS + WIDTH + 0.3, DOWN + HEIGHT + 0.3))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-0.15, 3 * ACROSS + WIDTH + 0.15)
    axes.set_ylim(-0.15, DOWN + HEIGHT + 0.15)
    axes.axis("off")
    for name, (_, _, title, text, colour) in BOXES.items():
        x, y = centre(name)
        corner = (x - WIDTH / 2, y - HEIGHT / 2)
        style = "round,pad=0,rounding_size=0.1"
        axes.add_patch(
            FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, facecolor="white", edgecolor=colour, linewidth=1.8)
        )
        axes.text(x, y + 0.38, title, ha="center", va="center", fontsize=12.5, fontweight="bold", color=colour)
        axes.text(x, y - 0.16, text, ha="center", va="center", fontsize=10, color="#222222", linespacing=1.25)
    for start, end in pairwise(ARROWS):
        (x0, y0), (x1, y1) = centre(start), centre(end)
        along, up = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)
        tail = (x0 + along * WIDTH / 2, y0 + up * HEIGHT / 2)
        tip = (x1 - along * WIDTH / 2, y1 - up * HEIGHT / 2)
        axes.add_patch(
            FancyArrowPatch(tail, tip, arrowstyle="-|>", mutation_scale=16, color=GREY, shrinkA=3, shrinkB=3)
        )
    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)


def run() -> None:
    parser = OneLineParser(__doc__)
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/pipeline.png"))
    target = parser.parse_args().out
    target.parent.mkdir(parents=True, exist_ok=True)
    draw(target)
    print(f"Wrote {target}")


if __name__ == "__main__":
    sys.exit(one_line("draw_pipeline", run))
