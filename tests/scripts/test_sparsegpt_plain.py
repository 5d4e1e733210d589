"""scripts/bench/sparsegpt_plain.py by hand, and against the package's own SparseGPT."""

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import Config
from structprune.masking.masks import unpack_bits
from structprune.masking.scores.sparsegpt import factorise, sparsegpt
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.runs.mask import mask


@pytest.fixture
def script(scripts):
    return scripts("sparsegpt_plain")


def test_one_column_by_hand(script):
    """G⁻¹ = [[1, -1], [-1, 2]] = UᵀU with U = [[1, -1], [0, 1]]; of four entries the two least go, both in column 0,
    and what is left of a row is the least-squares answer w₁ + w₀ G₀₁ / G₁₁."""
    upper, dead = script.inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double(), damping=0.0)
    assert torch.allclose(upper, torch.tensor([[1.0, -1.0], [0.0, 1.0]]).double()) and not dead.any()
    weight, kept = script.prune_columns(torch.tensor([[1.0, 3.0], [2.0, 5.0]]).double(), upper, dead, ratio=0.25)
    assert weight.tolist() == [[0.0, 4.0], [0.0, 7.0]] and kept.tolist() == [[False, True], [False, True]]


def test_damping_and_dead_inputs_by_hand(script):
    """Diagonal 4, 0: half of the mean 2 is added, to 1 where it is dead."""
    upper, dead = script.inverse_factor(torch.diag(torch.tensor([4.0, 0.0])).double(), damping=0.5)
    assert torch.allclose(upper.diagonal(), torch.tensor([5.0, 2.0]).double() ** -0.5) and dead.tolist() == [
        False,
        True,
    ]
    weight, kept = script.prune_columns(torch.tensor([[3.0, 9.0]]).double(), upper, dead, ratio=0.0)
    assert weight.tolist() == [[3.0, 0.0]] and kept.tolist() == [[True, False]]


def test_damping_rises_where_nothing_is_positive_definite(script):
    """[[1, 1], [1, 1]] undamped is singular; 1e-4 of its mean diagonal 1 is enough."""
    upper, _ = script.inverse_factor(torch.ones(2, 2).double(), damping=0.0)
    inverse = torch.linalg.inv(torch.tensor([[1.0001, 1.0], [1.0, 1.0001]], dtype=torch.float64))
    assert torch.allclose(upper.T @ upper, inverse)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_equal_to_the_packages_own(script, ratio):
    """More columns than a block, updates across blocks; in fp64 on the one side and fp32 on the other."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 160, generator=generator) @ torch.randn(160, 160, generator=generator)  # (R, C)
    weight = torch.randn(24, 160, generator=generator)  # (O, C)
    gram = x.T @ x  # (C, C)
    upper, dead = script.inverse_factor(gram.double())
    plain, kept = script.prune_columns(weight.double(), upper, dead, ratio)
    ((ours, ours_kept),) = sparsegpt([weight], factorise(gram.clone()), ratio)
    assert torch.equal(kept, ours_kept)
    assert torch.allclose(plain.float(), ours, atol=1e-3 * ours.abs().max().item())
    assert (~kept[:, :128]).sum() == int(24 * 128 * ratio) + 1 and (~kept[:, 128:]).sum() == int(24 * 32 * ratio) + 1


def test_a_whole_model(script, scripts, tmp_path):
    """Block after block on what was pruned before: masks equal to ours, and the weights of all projections."""
    checkpoint = scripts("random_checkpoint")
    values = checkpoint.llada_values(checkpoint.LLaDAShape(64, 4, 2, 160, 32, 64), "float32")
    model = load_model(checkpoint.write_random(tmp_path / "dense", values))
    ids = torch.randint(0, 31, (8, 2, 24), generator=torch.Generator().manual_seed(1))  # (N, S, T)
    calibration = Calibration(ids[:, 0], ids, None, {}, held_out=0)
    overrides = {"method": "unstructured", "reconstruct.enabled": False, "calibration.held_out": 0}
    ours = mask(model, Config.load(overrides=overrides), calibration)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    masks, seconds = script.prune_plainly(model, ids.flatten(0, 1), 0.5)
    assert set(masks) == set(ours.masks.packed) and set(seconds) == set(
        ("statistics", "factorisation", "columns", "moving on")
    )
    for name, kept in masks.items():
        weight, own = model.get_parameter(name), ours.model.get_parameter(name)
        assert torch.equal(kept, unpack_bits(ours.masks.packed[name], kept.shape[1]))
        assert torch.allclose(weight, own, atol=1e-4) and torch.equal(weight != 0, kept)
    untouched = set(before) - set(masks)
    assert untouched and all(torch.equal(before[name], model.get_parameter(name)) for name in untouched)


def test_each_linear_has_a_gram_of_its_own(script, tiny_model):
    model = tiny_model()
    block, context = Adapter(model).blocks[0], model.context((1, 5), torch.device("cpu"))
    states = [model.embedding(torch.arange(start, start + 5)[None]).detach() for start in (0, 3)]  # 2 x (1, 5, C)
    with torch.no_grad():
        grams = script._grams(block, states, context)
        rows = torch.cat([block.module.part("attention_norm")(x)[0] for x in states])  # (10, C)
    assert set(grams) == set(block.names) and grams["query"].data_ptr() != grams["key"].data_ptr()
    assert torch.allclose(grams["query"], rows.T @ rows, atol=1e-5) and torch.equal(grams["query"], grams["value"])
