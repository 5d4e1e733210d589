"""Continuations of openings: against the sampler itself, and their cost under a reference by hand."""

from dataclasses import replace

import pytest
import torch

from structprune.calibration.noise import stratified_noise
from structprune.errors import UserError
from structprune.evaluation.continuations import _equal, continuation_units
from structprune.evaluation.fidelity_units import Run
from structprune.evaluation.perturb import item_generator
from structprune.evaluation.prediction_files import PredictionFiles
from structprune.evaluation.results import Continuation
from structprune.evaluation.settings import EvaluationSettings
from structprune.evaluation.units import TextUnit, window_keys
from structprune.generation.generate import generate
from structprune.generation.samplers import low_confidence
from structprune.models.encode import Batches

MASK = 2047


class Tokenizer:
    def decode(self, ids, clean_up_tokenization_spaces):
        return " ".join(map(str, ids))


@pytest.fixture
def text():
    """Three windows of 12 tokens."""
    windows = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(0))

    def noise(ids, generator):
        return stratified_noise(ids, MASK, generator, 4)

    return TextUnit("notes", window_keys(windows), windows, 4, 7, noise)


def units(text, positions=64, **changes):
    return continuation_units(text, EvaluationSettings(**changes), Tokenizer(), positions)


def test_defaults_follow_windows_and_positions(text):
    continued, judged = units(text)
    assert continued.prompts.shape == (3, 6) and (continued.tokens, continued.steps) == (58, 58)
    assert (continued.task, judged.task) == ("notes continued", "notes continued, under the reference")
    assert judged.source == continued.task and judged.by_reference and not continued.by_reference
    assert units(text, positions=500)[0].tokens == 64
    asked = units(text, fidelity_prompts=2, fidelity_opening=4, fidelity_tokens=10, fidelity_steps=5)[0]
    assert torch.equal(asked.prompts, text.windows[:2, :4]) and (asked.tokens, asked.steps) == (10, 5)
    assert asked.keys == text.keys[:2] and asked.settings["items"] != continued.settings["items"]


def test_settings_that_do_not_fit(text, tiny_model):
    with pytest.raises(UserError, match="evaluation.fidelity_opening = 13 exceeds the 12 tokens of a window: lower it"):
        units(text, fidelity_opening=13)
    with pytest.raises(UserError, match="evaluation.fidelity_steps = 9 exceeds the 8 tokens to generate: lower it"):
        units(text, fidelity_tokens=8, fidelity_steps=9)
    with pytest.raises(UserError, match="fidelity_tokens = 60 after openings of 6 do not fit the model's 64 positions"):
        units(text, fidelity_tokens=60)[0].check(tiny_model().config)


def run_of(tmp_path, is_reference, theirs=(), own=()):
    def rows(kept):
        return lambda task: {row.key: row for row in kept if row.task == task}

    return Run(PredictionFiles(tmp_path), is_reference, rows(theirs), rows(own))


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_what_is_kept_of_the_reference(family, text, tiny_model, tmp_path):
    unit = units(text, fidelity_tokens=8)[0]
    reference, model = tiny_model(family), tiny_model(family, seed=1)
    theirs = unit.bound(run_of(tmp_path, True)).run(reference, range(3), Batches(64))
    greedy = low_confidence(reference.config, 8, 8)
    for row, prompt in zip(theirs, text.windows[:, :6], strict=True):
        assert row.tokens == tuple(generate(reference, [prompt], greedy)[0][6:].tolist()) and row.kept is None
        assert row.text == " ".join(map(str, row.tokens))
    same = unit.bound(run_of(tmp_path, False, theirs)).run(reference, [2, 0], Batches(64))
    assert [row.kept for row in same] == [8, 8] and [row.key for row in same] == [unit.keys[2], unit.keys[0]]
    near = [replace(theirs[0], tokens=(*theirs[0].tokens[:6], 91, 92))]
    assert unit.bound(run_of(tmp_path, False, near)).run(reference, [0], Batches(64))[0].kept == 6
    other = unit.bound(run_of(tmp_path, False, theirs)).run(model, range(3), Batches(64))
    assert [row.kept for row in other] == [
        _equal(mine.tokens, own.tokens) for mine, own in zip(other, theirs, strict=True)
    ]
    assert sum(row.kept for row in other) < 12


@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.inference_mode()
def test_the_cost_under_the_reference_by_hand(family, tiny_model, text, tmp_path):
    model = tiny_model(family)
    edges = model.edges_visible

    def noise(ids, generator):
        return stratified_noise(ids, MASK, generator, 4, edges)

    _, judged = units(replace(text, noise=noise), fidelity_tokens=5)
    tokens = (7, 8, 9, 10, 11)
    own = [Continuation("notes continued", key, tokens, "") for key in text.keys]
    (row,) = judged.bound(run_of(tmp_path, True, own=own)).run(model, [1], Batches(64))
    ids = torch.cat((text.windows[1, :6], torch.tensor(tokens)))  # (T,)
    noisy, p = noise(ids[None], item_generator(7, text.keys[1]))  # (1, S, T), (1, S)
    total, count = 0.0, 0
    for copy in range(4):
        seen = torch.cat((ids[:6], noisy[0, copy, 6:]))  # the opening is not masked
        logits = model(seen[None]).logits[0]  # (T, V)
        for position in range(6, 11):
            if seen[position] == MASK:
                source = position - 1 if model.shifted else position
                total -= (logits[source].log_softmax(0)[ids[position]] / p[0, copy]).item()
                count += 1
    maskable = 4 if edges else 5  # Dream's last token is never masked
    assert row.nelbo == pytest.approx(total / maskable / 4, rel=1e-4) and row.masked_tokens == count > 0
    assert row.task == judged.task and row.samples == 4
