"""From a trajectory to figures, by hand."""

import json
from dataclasses import replace

import pytest
import torch

from structprune.config import SinkSettings
from structprune.sinks.figures import position_figures, pretty_json, rounded, soft_mask, trajectory_figures
from structprune.sinks.tokens import Vocabulary
from structprune.sinks.trajectory import Trajectory

LOW, HIGH = 1.0, 41.0  # of five positions one is a sink: mean 9, deviation 16, so kappa = 1 puts the threshold at 25


def trajectory(places, causal=False, prompt=0, absent=()):
    """One sequence of five positions whose sink is at places[s] at step s; `absent`: (step, position) pairs."""
    mass = torch.full((1, len(places), 5), LOW)
    for step, place in enumerate(places):
        mass[0, step, place] = HIGH
    present = torch.ones(len(places), 5, dtype=torch.bool)
    for step, place in absent:
        mass[0, step, place], present[step, place] = torch.nan, False
    ids = torch.arange(5).expand(1, len(places), 5).masked_fill(~present, -1)
    at = torch.arange(len(places))[None] / len(places)
    heads = [torch.tensor([0.5, 0.25])]
    return Trajectory("reverse", causal, prompt, at, ids, present, mass, torch.zeros_like(mass), heads, heads)


SINK = SinkSettings(kappa=1.0)


@pytest.fixture
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, mask_id=2047)


def means(summary):
    return {name: figure["mean"] for name, figure in summary.items()}


def test_a_sink_that_moves_and_one_that_stays(vocabulary):
    moving = means(trajectory_figures(trajectory([0, 4, 0, 4]), SINK, vocabulary)["summary"])
    staying = means(trajectory_figures(trajectory([2, 2, 2, 2]), SINK, vocabulary)["summary"])
    assert moving["temporal_variance"] == pytest.approx(4) and staying["temporal_variance"] == pytest.approx(0)
    assert moving["drift"] == pytest.approx(2 / 5)
    assert (moving["survival"], staying["survival"]) == (0.5, 1) and (moving["kept"], staying["kept"]) == (0, 1)
    assert (moving["lasting"], staying["lasting"]) == (0, 1) and (moving["ever_sinks"], staying["ever_sinks"]) == (2, 1)
    assert moving["instability_of_sinks"] == pytest.approx(0.25) and moving["instability"] == pytest.approx(0.1)
    assert staying["spatial_variance"] == pytest.approx(256) and staying["spatial_variation"] == pytest.approx(16 / 9)
    assert moving["spatial_variance"] == pytest.approx(96)  # mean masses 21, 1, 1, 1, 21
    assert staying["mass_of_sinks"] == pytest.approx(41 / 45) and staying["sinks_per_step"] == 1


def test_only_positions_of_every_step_are_compared(vocabulary):
    grown = trajectory([0, 3, 0], causal=True, prompt=3, absent=[(0, 3), (0, 4)])
    figures = trajectory_figures(grown, SINK, vocabulary)
    assert figures["compared_positions"] == 3 and "prompt_only" not in figures
    assert means(figures["summary"])["survival"] == pytest.approx(2 / 3)  # the sink at position 3 is not among them
    assert means(figures["summary"])["temporal_variance"] == pytest.approx(0)
    detail = position_figures(grown, SINK, vocabulary)
    assert detail["survival"][0] == pytest.approx([0.6667, 0, 0, 0.5, 0]) and detail["mass"][0][0][3:] == [None, None]
    assert figures["first_position"]["sink_rate"] == pytest.approx(2 / 3)


def test_thresholds_are_over_present_positions():
    grown = trajectory([0, 0], absent=[(0, 4)])
    phi = soft_mask(grown, SINK)
    assert phi[0, 0, 4].isnan() and (phi[0, :, 0] > 0.99).all() and phi[0, 1, 4] < 0.01


def test_the_prompt_of_a_generation_is_told_apart(vocabulary):
    figures = trajectory_figures(trajectory([0, 4, 4, 4], prompt=2), SINK, vocabulary)
    assert means(figures["prompt_only"])["ever_sinks"] == 1 and means(figures["summary"])["ever_sinks"] == 2
    assert means(figures["prompt_only"])["temporal_variance"] is None  # one step has a sink there
    assert figures["per_step"]["from_first"] == [1, 0, 0, 0]


def test_no_sink_at_all_is_none_not_a_number(vocabulary):
    flat = trajectory([0, 1])
    flat.mass.fill_(1.0)  # φ is 0.5 everywhere, which is no sink
    summary = means(trajectory_figures(flat, SINK, vocabulary)["summary"])
    assert summary["temporal_variance"] is summary["survival"] is summary["kept"] is None
    assert summary["sinks_per_step"] == summary["mass_of_sinks"] == 0


def test_means_and_standard_errors_are_over_sequences(vocabulary):
    one, other = trajectory([0, 4, 0]), trajectory([2, 2, 2])
    other.mass[:, 1:] = 1.0  # flat: no sink at the last two steps
    votes = torch.tensor([0.5, 0.1, 1.0, 0.2, 0.25]).expand(2, 3, 5)  # sinks: 0.5, 0.25, 0.5, and 1
    both = {name: torch.cat((getattr(one, name), getattr(other, name))) for name in ("mass", "ids", "progress")}
    figures = trajectory_figures(replace(one, votes=votes, **both), SINK, vocabulary)
    assert figures["summary"]["sinks_per_step"] == pytest.approx(
        {"mean": 2 / 3, "standard_error": 1 / 3, "sequences": 2}  # 1 and 1/3: std sqrt(2) / 3, over sqrt(2)
    )
    assert figures["summary"]["votes_of_sinks"] == pytest.approx(
        {"mean": (1.25 / 3 + 1) / 2, "standard_error": (1 - 1.25 / 3) / 2, "sequences": 2}
    )
    assert figures["per_step"]["sinks"] == [1, 0.5, 0.5]
    assert figures["per_step"]["mass_of_sinks"] == pytest.approx([41 / 45, 41 / 90, 41 / 90], rel=1e-3)


def test_json_has_a_list_of_numbers_on_one_line():
    values = {"a": [1.5, None], "b": [[1], [2]], "c": {}, "d": [{"e": "ä"}], "f": []}
    text = pretty_json(values)
    assert json.loads(text) == values and '"a": [1.5, null]' in text and text.count("\n") > 6
    assert rounded(torch.tensor([[0.123456, torch.nan], [1e-7, 2.0]])) == [[0.1235, None], [1e-7, 2.0]]
