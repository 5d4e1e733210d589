"""Tables and pictures of sinks, from plain data alone."""

import copy
import io

import pytest
from rich.console import Console

from structprune.report import sink_plots
from structprune.report.sink_tables import cell, columns, property_table, token_tables
from structprune.statistics import policies

FIGURE = {"mean": 0.25, "standard_error": 0.0123, "sequences": 2}
KEYS = (
    "spatial_variance", "spatial_variation", "sinks_per_step", "mass_of_sinks", "votes_of_sinks", "temporal_variance",
    "drift", "instability", "instability_of_sinks", "ever_sinks", "survival", "lasting", "kept",
)  # fmt: skip
ROW = {"count": 4, "positions": 0.25, "mass": 0.5, "sinks": 1.0, "sink_rate": 0.125}


def make_run(**changes) -> dict:
    """Two steps of three positions; position 2 is a sink at the second step only."""
    return {
        "model": "ours", "kind": "reverse", "causal": False, "sequences": 1, "steps": 2, "positions": 3,
        "compared_positions": 3, "prompt": 1, "summary": {key: FIGURE for key in KEYS},
        "by_kind": [{"kind": "mask"} | ROW], "by_token": [{"token": "\n", "id": 3} | ROW], "first_position": ROW,
        "per_step": {
            "progress": [0.0, 0.5], "sinks": [0, 1], "kept": [None], "from_first": [None, None],
            "centroid": [[None, 2.0]], "spread": [[None, 0.0]],
        },
        "strength": [[0.1, 0.2], [0.3]],
        "head_sinks": [[0, 1], [1]],
        "detail": {
            "mass": [[[1.0, 1.0, 1.0], [0.5, None, 8.0]]], "phi": [[[0.0, 0.0, 0.0], [0.0, None, 0.9]]],
            "survival": [[0.0, None, 0.5]],
        },
    } | changes  # fmt: skip


def shown(renderable) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_cells_and_columns():
    assert cell(FIGURE) == "0.25 ± 0.01" and cell({"mean": None, "standard_error": None}) == "none"
    assert cell({"mean": 1234.5, "standard_error": 120.0}) == "1234 ± 120"
    assert cell({"mean": 0.5, "standard_error": None}) == "0.5"
    runs = [make_run(), make_run(prompt_only={}), make_run(model="theirs", causal=True)]
    assert [(model, what) for model, what, _ in columns(runs)] == [
        ("ours", "generation"), ("ours", "generation"), ("ours", "generation, prompt"),
        ("theirs", "generation, prompt"),
    ]  # fmt: skip


def test_tables():
    text = shown(property_table([make_run()]))
    assert text.count("0.25 ± 0.01") == len(KEYS) and "positions across steps" in text
    text = shown(token_tables([make_run()])[0])
    assert "'\\n'" in text and "(the first position)" in text and text.count("12.5%") == 3


def test_pictures_mark_what_the_figures_call_a_sink():
    """Stages before `report` are not imported by it, so that the constant is there twice."""
    assert sink_plots.SINK == policies.SINK


def test_pictures_show_the_data():
    run = make_run()
    heat = sink_plots.draw_heatmap([run])
    axes = heat.axes[0]
    assert axes.images[0].get_array()[1, 2] == pytest.approx(8 / 4.25) and axes.images[0].get_array()[0, 1] == 1
    marks = axes.lines[0].get_xydata().tolist()
    assert marks == [[2.5, 1.5]] and axes.get_xlabel() and axes.get_ylabel()
    drift = sink_plots.draw_drift([run, copy.deepcopy(run)])
    assert len([axes for axes in drift.axes if axes.get_title() == "ours, generation"]) == 2
    line = next(line for line in drift.axes[0].lines if line.get_label() == "first sequence")
    assert line.get_ydata()[1] == 2 and line.get_ydata()[0] != line.get_ydata()[0]
    heads = sink_plots.draw_heads([run])
    array = heads.axes[0].images[0].get_array()
    assert array.shape == (2, 2) and array.mask.tolist() == [[False, False], [False, True]]  # a layer of one head
    assert array.compressed().tolist() == [0.1, 0.2, 0.3]
    assert "share of attention" in heads.axes[-1].get_ylabel()
    run["per_step"] = run["per_step"] | {"centroid": [[1.0, 2.0]], "spread": [[0.25, 0.5]]}
    band = sink_plots.draw_drift([run]).axes[0].collections[0].get_paths()[0].vertices.tolist()
    assert {tuple(corner) for corner in band} == {(0, 0.75), (0, 1.25), (0.5, 1.5), (0.5, 2.5)}
    lasting = sink_plots.draw_survival([run]).axes[1].lines[0]
    assert lasting.get_xdata().tolist() == [0, 0.5, 0.5] and lasting.get_ydata().tolist() == [1, 1, 0]
    run["detail"] = run["detail"] | {"survival": [[0.75, 0.5, 0.25], [0.0, 0.5, None]]}
    lasting = sink_plots.draw_survival([run]).axes[1].lines[0]  # 1 up to 1/4, 3/4 to 1/2, 1/4 to 3/4
    assert lasting.get_xdata().tolist() == [0, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert lasting.get_ydata().tolist() == [1, 1, 0.75, 0.5, 0.25, 0] and lasting.get_drawstyle() == "steps-pre"


def test_steps_of_a_heat_map_are_whole_numbers_and_its_legend_hides_nothing():
    heat = sink_plots.draw_heatmap([make_run()])
    heat.canvas.draw()
    axes = heat.axes[0]
    assert all(tick == int(tick) for line in (axes.xaxis, axes.yaxis) for tick in line.get_majorticklocs())
    assert not heat.legends[0].get_window_extent().overlaps(axes.get_window_extent())


def test_everything_is_drawn_where_nothing_is_a_sink(tmp_path):
    run = make_run(per_step={
        "progress": [0.0, 0.5], "sinks": [0, 0], "kept": [None], "from_first": [None, None],
        "centroid": [[None, None]], "spread": [[None, None]],
    })  # fmt: skip
    run["summary"] = {key: {"mean": None, "standard_error": None, "sequences": 0} for key in KEYS}
    run["detail"] = run["detail"] | {"phi": [[[0.0] * 3] * 2], "survival": [[0.0] * 3]}
    names = sink_plots.draw_all([run], tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir()) and len(names) == 5


def test_two_curves_of_the_same_name_both_have_a_legend():
    legend = sink_plots.draw_survival([make_run(), make_run()]).legends[0]
    assert len(legend.get_texts()) == 2 and len({text.get_text() for text in legend.get_texts()}) == 1
