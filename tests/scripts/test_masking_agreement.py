"""scripts.bench.masking_agreement: our masks are right to rounding, and a defect is not; judged in fp64."""

import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from structprune.config import Config
from structprune.masking import patterns, walk
from structprune.masking.scores import sparsegpt
from structprune.masking.scores.linears import ByScores
from structprune.masking.scores.table import SCORES
from structprune.masking.scores.wanda import wanda_scores
from structprune.models.loading import load_model
from structprune.runs import resolve
from structprune.statistics import sinks


def test_agreement_counts_masks_and_outputs(scripts, mask_dir):
    agreement = scripts("masking_agreement")
    weights = scripts("published_worker").linear_weights(load_model(mask_dir / "checkpoint").blocks)
    weights = {name: value.clone() for name, value in weights.items()}
    for value in weights.values():
        value[:, ::2] = 0
    total = sum(value.numel() for value in weights.values())
    save_file(weights, mask_dir / "sink-wanda-release.safetensors")
    save_file(weights, mask_dir / "sink-wanda-ours.safetensors")
    same = agreement.compare("sink-wanda", mask_dir)
    assert same["masks_differ"] == same["outputs_differ"] == 0 and same["error_ratio"] == 1
    weights["1.ff_out"][:3, 1] = 0
    save_file(weights, mask_dir / "sink-wanda-ours.safetensors")
    result = agreement.compare("sink-wanda", mask_dir)
    assert result["masks_differ"] == 3 / total and result["first_block_differs"] == 0
    assert result["removed"] == [0.5 + 3 / total, 0.5] and 0 < result["outputs_differ"] < 0.2


def test_ours_may_be_three_times_as_far_from_right_as_the_release(scripts):
    def agrees(ours, release):
        names = ("misplaced", "weights_differ", "widest_gap")
        return scripts("masking_agreement").judge(
            {"ours": dict(zip(names, ours)), "release": dict(zip(names, release))}
        )["agree"]

    assert agrees((3e-5, 6e-5, 0.5), (1e-5, 2e-5, 1e-4))
    assert not agrees((3.1e-5, 6e-5, 0.5), (1e-5, 2e-5, 1e-4)) and not agrees((3e-5, 6.1e-5, 0.5), (1e-5, 2e-5, 1e-4))
    assert agrees((1e-6, 1e-5, 0.5), (0.0, 0.0, 0.0)) and not agrees((2e-6, 0.0, 0.5), (0.0, 0.0, 0.0))
    assert not agrees((0.0, 0.0, 0.0), (1e-5, 2e-5, 0.2))  # then the referee is wrong, or the release


def test_the_referee_by_hand(scripts):
    """G = [[2, 1], [1, 2]]: the inverse (1/3) [[2, -1], [-1, 2]] is UᵀU with U = [[√2, -√2/2], [0, √6/2]] / √3."""
    referee, tally = scripts("masking_referee"), scripts("masking_referee").Tally()
    upper = torch.linalg.cholesky(torch.tensor([[2.0, -1.0], [-1.0, 2.0]]).double() / 3, upper=True)  # (C, C)
    dense = torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double()  # (O, C); scores w² / U²: 1.5, 8, 13.5, 2
    removed = torch.tensor([[True, False], [False, True]])
    right = referee.replay(dense, upper, removed, 0.25, tally)
    assert torch.allclose(right, torch.tensor([[0.0, 2.5], [3.0, 0.0]]).double())  # least squares: 2 + 1/2
    assert tally._misplaced == 0  # the threshold is the second lowest, 2
    referee.replay(dense, upper, ~removed, 0.25, tally)
    assert tally._misplaced == 4 and tally._weights == 8 and tally._gap == pytest.approx(13.5 / 2 - 1)
    tally.compare(right + 0.3, right, right + 3.0)
    assert tally.figures()["weights_differ"] == pytest.approx(0.1)


@pytest.fixture
def held_against(scripts, mask_dir, masking_request):
    """`judge`'s answer on a method as it is now, the release as far from fp64 as rounding takes it."""
    worker, referee = scripts("masking_worker"), scripts("masking_referee").Referee(mask_dir, 0.25)

    def answer(method):
        model, calibration = load_model(mask_dir / "checkpoint"), worker.read_data(mask_dir / "data.safetensors")
        worker.call_ours(model, masking_request(method=method), calibration, 1)()
        weights = scripts("published_worker").linear_weights(model.blocks)
        release = {"misplaced": 1e-6, "weights_differ": 4e-6, "widest_gap": 4e-5}
        return scripts("masking_agreement").judge({"ours": referee.judge(method, weights), "release": release})

    return answer


@pytest.mark.parametrize("method", ["wanda", "sink-wanda", "sparsegpt", "sink-sparsegpt"])
def test_ours_is_right_to_rounding(held_against, method):
    result = held_against(method)
    assert result["agree"], result
    assert result["against_fp64"]["ours"]["misplaced"] == 0


def defects():
    """Name -> method, and what of the package is replaced by what."""
    gram, factorise = walk.add_gram, sparsegpt.factorise

    def one_less(score, ratio):
        return score > score.flatten().sort().values[int(score.numel() * ratio) - 1]

    def one_more(score, ratio):
        return patterns.row_mask(score, ratio + 1 / score.shape[1])

    def sample_deviation(mass, kappa):
        return mass.mean(-1, keepdim=True) + kappa * mass.std(-1, keepdim=True)

    root = {(walk, "add_gram"): lambda total, x, omega=None: gram(total, x, omega.sqrt())}
    damping = {(sparsegpt, "factorise"): lambda matrix, share: factorise(matrix, 1.1 * share)}
    deviation = {(sinks, "sink_threshold"): sample_deviation}
    per_row = {
        (resolve, "MASK_SCORES"): SCORES | {"wanda": replace(SCORES["wanda"], mask=ByScores(wanda_scores, one_more))}
    }
    return {
        "omega, not its square": ("sink-sparsegpt", root),
        "damping": ("sparsegpt", damping),
        "one fewer": ("sparsegpt", {(sparsegpt, "pooled_mask"): one_less}),
        "one more of a row": ("sink-wanda", per_row),
        "sample deviation": ("sink-sparsegpt", deviation),
        "no update": ("sparsegpt", {(sparsegpt, "sparsegpt"): without_update}),
    }


def without_update(weights, *rest, prune=sparsegpt.sparsegpt):
    return [(weight * kept, kept) for weight, (_, kept) in zip(weights, prune(weights, *rest))]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(defects()))
def test_a_defect_is_no_rounding(held_against, monkeypatch, name):
    method, changes = defects()[name]
    for (owner, attribute), value in changes.items():
        monkeypatch.setattr(owner, attribute, value)
    assert not held_against(method)["agree"]


@pytest.mark.parametrize(
    "key, value", [("masking.order", "one-shot"), ("masking.column_block", 64), ("sink.kappa", 1.9)]
)
def test_another_choice_is_no_rounding(scripts, held_against, monkeypatch, key, value):
    """Blocks measured on dense blocks, columns that choose in other blocks, sinks from another threshold on."""
    load = Config.load
    changed = types.SimpleNamespace(load=lambda path, changes: load(path, changes | {key: value}))
    monkeypatch.setattr(scripts("masking_worker"), "Config", changed)
    assert not held_against("sink-sparsegpt")["agree"]
