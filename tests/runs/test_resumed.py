"""A pruning that was stopped after any of its parts goes on to the same bytes, and repeats no finished part."""

from contextlib import contextmanager

import pytest
import torch

from structprune.config import Config
from structprune.errors import Interrupted
from structprune.models.journal import NOWHERE, Journal
from structprune.models.loading import load_model
from structprune.runs.mask import mask
from structprune.runs.pruner import Pruner

KEYS = {
    "calibration.windows": 4, "calibration.held_out": 2, "calibration.length": 16, "calibration.batch": 2,
    "structured.split_windows": 2, "structured.split_candidates": 2,
}  # fmt: skip
SCORES = {
    "obs": {}, "plain rows": {"structured.arm": "masked"}, "wanda": {"structured.score": "wanda"},
    "magnitude": {"structured.score": "magnitude"}, "taylor": {"structured.score": "taylor"},
    "head": {"reconstruct.head": True, "reconstruct.producers": True}, "layer": {"reconstruct.target": "layer"},
    "certainty": {"reconstruct.weighting": "certainty"}, "gradients": {"reconstruct.weighting": "gradient"},
    "dropped blocks": {"search.enabled": True, "search.sequences": 2, "export.compat": "uniform",
                       "structured.allocation": "uniform"},
    "reverse": {"sink.trajectory": "reverse", "structured.arm": "masked+sink"},
}  # fmt: skip


@pytest.fixture
def stopping(monkeypatch):
    """`stopping(parts)`: while open, runs are ended after so many parts, as by a kill; it counts them."""

    @contextmanager
    def stop_after(parts=None):
        keep, count = Journal.keep, []

        def counted(self, *given, **named):
            keep(self, *given, **named)
            if self.directory is not None:
                count.append(given[0])
                if len(count) == parts:
                    raise Interrupted("stopped")

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "keep", counted)
            yield count

    return stop_after


@pytest.fixture
def prune(tiny_checkpoint, text_path):
    """`prune(keys, journal)`: the result of a run on one tiny model."""
    model = load_model(tiny_checkpoint("llada"))

    def run(keys, journal=None):
        pruner = Pruner(model, Config.load(overrides=KEYS | {"calibration.source": str(text_path)} | keys))
        if journal is not None:
            pruner.keep_in(journal)
        return pruner.prune()

    return run


def same(one, other):
    states = one.model.state_dict(), other.model.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def repeated(run, stopping):
    """The result of a run that is stopped after every part that it makes, and repeated until it makes none."""
    for stops in range(60):
        try:
            with stopping(1):
                result = run()
        except Interrupted:
            continue
        assert stops >= 5
        return result
    raise AssertionError("a part is made anew every time")


def plain(report):
    return {name: value for name, value in report.items() if name not in ("seconds", "peak_memory_bytes")}


@pytest.mark.parametrize("keys", SCORES.values(), ids=SCORES)
def test_a_run_stopped_after_every_part_in_turn_is_the_undisturbed_one(prune, keys, tmp_path, stopping):
    undisturbed = prune(keys)
    resumed = repeated(lambda: prune(keys, Journal(tmp_path / "work")), stopping)
    assert same(undisturbed, resumed) and undisturbed.plan == resumed.plan
    assert plain(undisturbed.report) == plain(resumed.report)


def test_a_finished_part_is_not_computed_again(prune, tmp_path, monkeypatch, stopping):
    with stopping() as whole:
        prune({}, Journal(tmp_path / "work"))
    monkeypatch.setattr("structprune.structured.ranking._advance_with_grams", None)
    monkeypatch.setattr("structprune.refit.reconstruct.Reconstructor.refit", None)
    monkeypatch.setattr("structprune.runs.run.masked_nelbo", None)
    with stopping() as again:
        prune({}, Journal(tmp_path / "work"))
    assert len(whole) > 10 and not again


MASKS = {
    "sparsegpt": {}, "sinks": {"masking.arm": "masked+sink"},
    "wanda on the dense model": {"masking.score": "wanda", "masking.order": "one-shot"},
    "sink-wanda, summed": {"masking.score": "sink-wanda", "masking.order": "one-shot", "masking.norms": "summed"},
    "outliers": {"masking.score": "wanda", "masking.allocation": "owl"}, "2:4": {"method": "nm"},
    "refit": {"masking.score": "wanda", "reconstruct.enabled": True},
    "refit to the layer": {"masking.score": "ria", "reconstruct.enabled": True, "reconstruct.target": "layer"},
    "one-shot, refit": {"masking.score": "wanda", "masking.order": "one-shot", "reconstruct.enabled": True},
    "magnitude": {"masking.score": "magnitude"},
}  # fmt: skip


@pytest.fixture
def make_masks(tiny_checkpoint, text_path):
    """`make_masks(keys, journal)`: the result of a run on a tiny model of its own, in place."""

    def run(keys, journal=NOWHERE):
        words = {"method": "unstructured", "calibration.source": str(text_path)}
        few = {name: value for name, value in KEYS.items() if name.startswith("calibration")}
        config = Config.load(overrides=words | few | keys)
        return mask(load_model(tiny_checkpoint("llada")), config, in_place=True, journal=journal)

    return run


@pytest.mark.parametrize("keys", MASKS.values(), ids=MASKS)
def test_masks_stopped_after_every_part_in_turn_are_the_undisturbed_ones(make_masks, keys, tmp_path, stopping):
    undisturbed = make_masks(keys)
    resumed = repeated(lambda: make_masks(keys, Journal(tmp_path / "work")), stopping)
    assert same(undisturbed, resumed)
    assert undisturbed.masks.packed.keys() == resumed.masks.packed.keys()
    assert all(torch.equal(bits, resumed.masks.packed[name]) for name, bits in undisturbed.masks.packed.items())
    assert plain(undisturbed.report) == plain(resumed.report)


def test_a_damaged_part_is_computed_again(make_masks, tmp_path):
    first = make_masks({}, Journal(tmp_path / "work"))
    [path] = (tmp_path / "work").rglob("block-001.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    assert same(first, make_masks({}, Journal(tmp_path / "work")))
    assert Journal(path.parent).has("block-001")


def test_a_given_plan_keeps_its_report_of_sinks(tiny_checkpoint, text_path, tmp_path, stopping):
    """Also where the whole refit is there already, so that no mass is read."""
    model = load_model(tiny_checkpoint("llada"))
    keys = KEYS | {"calibration.source": str(text_path), "reconstruct.arm": "masked+sink"}
    config = Config.load(overrides=keys)
    plan = Pruner(model, config).plan()[0]

    def run(directory, parts=None):
        pruner = Pruner(model, config)
        with stopping(parts) as names:
            pruner.keep_in(Journal(directory))
            return pruner.prune(plan=plan), names

    undisturbed, names = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "work", len(names))  # after the last part
    resumed, again = run(tmp_path / "work")
    assert undisturbed.report["sinks"] == resumed.report["sinks"] is not None and not again


def test_scores_and_refits_of_one_work_share_the_attention_mass(prune, tmp_path):
    journal = Journal(tmp_path / "work")
    prune({}, journal)
    prune({"structured.damping": 0.02}, journal)
    assert len(list((tmp_path / "work").rglob("mass-*"))) == 1


def test_a_signal_ends_a_pass_too(prune, tmp_path, monkeypatch):
    """Between the steps of a part that has not been kept: the calls of the watcher that are not those of `keep`."""
    calls, keeping = [], []
    watch_all = Journal.watch_all

    def marked(self):
        keeping.append(True)
        watch_all(self)
        keeping.pop()

    monkeypatch.setattr(Journal, "watch_all", marked)

    def run(name, last=None):
        calls.clear()

        def watch():
            calls.append(bool(keeping))
            if len(calls) == last:
                raise Interrupted("stopped")

        prune({}, Journal(tmp_path / name, watch))

    run("whole")
    assert calls[0] and calls.count(False) > 20
    step = calls.index(False, 10) + 1  # a batch, after some parts
    parts = sum(calls[:step])
    with pytest.raises(Interrupted):
        run("stopped", step)
    keeping.clear()
    assert len(calls) == step and len(list((tmp_path / "stopped").rglob("*.safetensors"))) == parts
