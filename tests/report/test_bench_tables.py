"""Tables and pictures of a benchmark, from figures made by hand."""

import io
from copy import deepcopy

import pytest
from rich.console import Console

from structprune.errors import UserError
from structprune.report import plots
from structprune.report.bench_plots import draw_ideal, draw_latency, draw_memory, plot_bench, series
from structprune.report.bench_tables import bench_tables


def spread(middle: float) -> dict:
    return {"median": middle, "p25": 0.9 * middle, "p75": 1.2 * middle}


def row(model: str, ms: float, macs: int, **more) -> dict:
    actual = {
        "mode": "eager", "batch": 1, "length": 512, "model": model, "ms": spread(ms), "macs": macs,
        "tokens_per_second": 1e5 / ms, "macs_removed": 1 - macs / 10**10, "peak_above_weights": 30_000_000,
    }  # fmt: skip
    if model != "dense":
        actual |= {"speedup": spread(200 / ms), "ideal_share": spread((1 - ms / 200) / (1 - macs / 10**10))}
    return actual | more


RESULT = {
    "models": [
        {"model": "dense", "removed": 0.0, "parameters": 90_000_000, "bytes": 360_000_000, "dtype": "float32"},
        {"model": "half", "removed": 0.5, "parameters": 45_000_000, "bytes": 180_000_000, "dtype": "float32"},
    ],
    "forward": [row("dense", 200.0, 10**10), row("half", 110.0, 5 * 10**9)],
    "generation": [
        row("dense", 200.0, 10**10, cache="none", agreement=None),
        row("half", 120.0, 5 * 10**9, cache="none", agreement=None),
        row("dense", 20.0, 10**9, cache="dual", agreement=0.9),
        row("half", 11.0, 10**9 // 2, cache="dual", agreement=0.8),
    ],
    "semi_structured": None,
    "settings": {"sampler": {"gen_length": 128, "steps": 32, "block_length": 32}},
}  # fmt: skip


def printed(result: dict, width: int = 80) -> str:
    text = io.StringIO()
    for table in bench_tables(result):
        Console(file=text, width=width).print(table)
    return text.getvalue()


def words(text: str, start: str, nth: int = 0) -> list[str]:
    return [line.split() for line in text.splitlines() if line.strip().startswith(start)][nth]


def test_what_is_printed_fits_80_columns():
    text = printed(RESULT)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert words(text, "half") == ["half", "50.0", "%", "45.000", "M", "180.00", "MB", "float32"]
    assert words(text, "half", 1) == ["half", "110", "(99.0-132)", "1.82x", "-50.0", "%", "90.0", "%", "30.00", "MB"]
    assert words(text, "dense", 1) == ["dense", "200", "(180-240)", "10.0", "G", "30.00", "MB"]
    assert "generation, 128 tokens in 32 steps, blocks of 32" in text
    # 1e5 / 11 tokens/s at the median; a fifth more time is a sixth less
    figures = ["9091", "(7576-10101)", "18.18x", "-95.0", "%", "99.5", "%", "80", "%", "30.00", "MB"]
    assert words(text, "half", 3) == ["half", *figures]
    assert "1 x 512, dual" in text and "1 x 512 " in text.partition("generation")[2]


def test_a_long_name_never_takes_the_place_of_a_figure():
    result = deepcopy(RESULT)
    for part in ("models", "forward", "generation"):
        for each in result[part]:
            each["model"] = f"LLaDA-8B-Instruct-{each['model']}"
    for each in result["generation"]:
        each["mode"] = "compiled"
    text = printed(result)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert "9091 (7576-10101)  18.18x  -95.0 %    99.5 %   80 %  30.00 MB" in text
    assert "110 (99.0-132)  1.82x  -50.0 %    90.0 %    30.00 MB" in text


def test_the_kernels_table_says_what_was_refused():
    kernels = {"dense_ms": spread(2.0), "2:4_ms": spread(1.0), "speedup": spread(2.0)}
    shape = {"outputs": 64, "inputs": 32, "layers": 6, "first": "model.blocks.0.q_proj", "tokens": 512}
    shapes = [shape | kernels, shape | {"outputs": 30, "refused": "no multiple of 32"}]
    result = RESULT | {
        "semi_structured": {
            "refused": None,
            "models": {
                "masked": {
                    "shapes": shapes,
                    "forward": [
                        {"batch": 1, "length": 512, "layers": count, "of_layers": 12, "relative_difference": 0.0123}
                        | kernels
                        for count in (6, 12)
                    ],
                }
            },
        }
    }
    text = printed(result)
    assert words(text, "6 as q_proj")[3:] == ["512", "64x32", "2.00", "(1.80-2.40)", "1.00", "(0.900-1.20)", "2.00x"]
    assert words(text, "6 as q_proj", 1)[-1] == "refused" and "no multiple of 32" in text
    assert words(text, "whole pass")[:8] == ["whole", "pass", "1", "x", "512", "6", "of", "12"]  # layers on kernels
    figures = ["1", "x", "512", "2.00", "(1.80-2.40)", "1.00", "(0.900-1.20)", "2.00x"]
    assert words(text, "whole pass", 1) == ["whole", "pass", *figures]
    assert "relative difference of the logits: 0.01" in " ".join(text.split())
    assert "kernels" not in printed(RESULT | {"semi_structured": {"refused": "none here", "models": {}}})


def test_one_line_for_everything_that_was_measured():
    assert list(series(RESULT["forward"] + RESULT["generation"])) == ["forward", "generation", "generation, dual cache"]
    more = RESULT["forward"] + [each | {"length": 64, "mode": "compiled"} for each in RESULT["forward"]]
    assert list(series(more)) == ["forward, 1 x 512, eager", "forward, 1 x 64, compiled"]


@pytest.fixture
def axes():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    yield axes
    pyplot.close(figure)


REMOVED = {"dense": 0.0, "half": 0.5}


def test_latency_and_what_macs_alone_would_give(axes):
    draw_latency(axes, RESULT["forward"], REMOVED)
    measured, ideal = axes.containers[0].lines[0], axes.get_lines()[-2]
    assert list(measured.get_xdata()) == [0, 0.5] and list(measured.get_ydata()) == [200, 110]
    assert list(ideal.get_ydata()) == [200, 100]


def test_shares_of_the_ideal_in_percent(axes):
    """Three things measured, one pruned model: its share of each, from top to bottom."""
    draw_ideal(axes, RESULT["forward"] + RESULT["generation"])
    (actual,) = axes.containers
    assert actual.get_label() == "half" and [line.get_xdata()[0] for line in axes.get_lines()[:2]] == [100, 90]
    assert list(actual.lines[0].get_xdata()) == pytest.approx([90, 80, 100 * 0.945 / 0.95])
    assert list(actual.lines[0].get_ydata()) == [0, 1, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["forward", "generation", "generation, dual cache"]
    low, high = (segment[0] for segment in actual.lines[2][0].get_segments()[0])
    assert (low, high) == pytest.approx((81, 108)) and axes.get_ylim()[0] > axes.get_ylim()[1]


def many(count: int) -> list[dict]:
    """So many sizes of the forward pass."""
    return [each | {"length": 64 * (size + 1)} for size in range(count) for each in RESULT["forward"]]


@pytest.mark.parametrize("draw", [draw_ideal, lambda axes, rows: draw_latency(axes, rows, REMOVED)])
def test_names_of_all_that_was_measured_cover_nothing(axes, draw):
    axes.figure.set_size_inches(7, 1.2 + 0.36 * 12)
    axes.figure.set_layout_engine("constrained")
    draw(axes, many(12))
    axes.figure.canvas.draw()
    whole, inner, legend = (box.get_window_extent() for box in (axes.figure, axes, axes.get_legend()))
    assert legend.x0 >= inner.x1 and legend.x1 <= whole.x1 and whole.y0 <= legend.y0 and legend.y1 <= whole.y1
    names = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(not one.overlaps(other) for one, other in zip(names, names[1:])) and inner.height > 0.7 * whole.height


@pytest.mark.slow
def test_pictures_grow_with_what_was_measured(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    heights = []
    for count in (1, 20):
        plot_bench(RESULT | {"forward": many(count)}, tmp_path)
        heights.append(image.imread(tmp_path / "ideal.png").shape[0])
    assert heights[1] - heights[0] == pytest.approx(19 * 0.36 * 110, abs=2)


def test_a_long_legend_stands_beside_the_lines(axes):
    draw_latency(axes, RESULT["forward"], REMOVED)  # two entries
    width = axes.figure.get_figwidth()
    assert axes.get_legend().get_bbox_to_anchor().x1 <= axes.bbox.x1
    many = [each | {"length": 64 + number} for number in range(5) for each in RESULT["forward"]]
    axes.clear()
    draw_latency(axes, many, REMOVED)
    assert axes.get_legend().get_bbox_to_anchor().x0 >= axes.bbox.x1 and axes.figure.get_figwidth() > width


def test_memory_is_stacked(axes):
    draw_memory(axes, RESULT["models"], RESULT["forward"])
    assert [bar.get_height() for bar in axes.containers[0]] == [360, 180]
    assert [(bar.get_y(), bar.get_height()) for bar in axes.containers[1]] == [(360, 30), (180, 30)]
    assert axes.get_ylabel() == "memory, MB"


def test_memory_that_is_not_known_is_not_drawn_as_none(axes):
    draw_memory(axes, RESULT["models"], [each | {"peak_above_weights": None} for each in RESULT["forward"]])
    assert [bar.get_height() for (bar, *_) in axes.containers] == [360] and "weights" in axes.get_title()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["weights"]


def test_pictures_are_written_whole(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    made = plot_bench(RESULT, tmp_path)
    assert [path.name for path in made] == ["latency.png", "ideal.png", "memory.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in made)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    same = deepcopy(RESULT)
    same["forward"][1]["ideal_share"] = None  # zeros in place save nothing
    assert [path.name for path in plot_bench(same, tmp_path / ".")] == ["latency.png", "memory.png"]
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="plots need matplotlib"):
        plot_bench(RESULT, tmp_path)
