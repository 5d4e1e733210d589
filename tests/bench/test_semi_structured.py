"""2:4 kernels: what counts as 2:4, what is said without kernels, and what is measured with them (here: stand-ins)."""

import pytest
import torch

from structprune.bench import semi_structured as module
from structprune.bench.latency import Timing
from structprune.bench.semi_structured import has_pattern, masked_linears, refusal, semi_structured_row, shape_rows
from structprune.bench.settings import Size
from structprune.models.adapter import Adapter

CPU = torch.device("cpu")


def test_two_of_every_four():
    assert has_pattern(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 0]]))
    assert not has_pattern(torch.tensor([[1.0, 1, 1, 0, 0, 0, 0, 0]]))  # half are zero, but not in every group
    assert not has_pattern(torch.tensor([[1.0, 0, 0, 0, 0, 0]]))
    assert not has_pattern(torch.ones(2, 8))


@pytest.fixture
def masked(tiny_model):
    """Every projection of blocks 0 and 1 is 2:4, and gate and up of block 2."""
    model = tiny_model()
    for view in Adapter(model).blocks:
        for role in view.names if view.index < 2 else ("gate", "up"):
            with torch.no_grad():
                view[role].weight.unflatten(1, (-1, 4))[..., :2] = 0
    return model


def test_masked_linears_are_found(masked, tiny_model):
    names = list(masked_linears(masked))
    assert len(names) == 2 * 7 + 2 and not masked_linears(tiny_model())
    assert names[-1] == "model.transformer.blocks.2.up_proj"


def test_without_kernels_it_says_so(monkeypatch):
    assert refusal(CPU, torch.float32) == "torch has no 2:4 kernels for device cpu"

    class Cuda:
        type = "cuda"

    def none(weight):
        raise RuntimeError("cuSPARSELt not supported on your machine.\ntrace")

    made = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda values, device: made(values))
    monkeypatch.setattr(torch, "ones", lambda *shape, device, dtype: torch.zeros(*shape, dtype=dtype))
    monkeypatch.setattr(module, "convert", none)
    assert refusal(Cuda(), torch.bfloat16) == "cuSPARSELt not supported on your machine."
    monkeypatch.setattr(module, "convert", lambda weight: weight)
    assert refusal(Cuda(), torch.bfloat16) is None
    result = refusal(Cuda(), torch.float32)  # torch's own words name no remedy
    assert result == "torch has no 2:4 kernels for float32: use --dtype bfloat16 or float16"


def test_torch_refuses_on_cpu():
    """So that the stand-ins below stand for something."""
    with pytest.raises(RuntimeError, match="CUDA"):
        module.convert(torch.zeros(128, 128))


def test_shapes_are_measured_once_each_and_refusals_kept(masked, monkeypatch):
    def convert(weight):
        if weight.shape == (32, 48):
            raise RuntimeError("shape is not supported!\ntrace")
        return weight.clone()

    monkeypatch.setattr(module, "convert", convert)
    rows = {(row["outputs"], row["inputs"]): row for row in shape_rows(masked, 5, Timing(3, 1))}
    assert {shape: row["layers"] for shape, row in rows.items()} == {(32, 32): 8, (48, 32): 6, (32, 48): 2}
    assert rows[32, 48]["refused"] == "shape is not supported!" and "speedup" not in rows[32, 48]
    assert rows[32, 32]["first"] == "model.transformer.blocks.0.q_proj" and rows[32, 32]["tokens"] == 5
    assert set(rows[32, 32]) >= {"dense_ms", "2:4_ms", "speedup"}


def test_the_kernels_run_in_a_copy_that_shares_all_else(masked, monkeypatch):
    monkeypatch.setattr(module, "convert", lambda weight: 2 * weight)  # so that its use shows
    copy, taken, layers = module.with_kernels(masked, 12)
    assert taken == layers == 16
    old, new = Adapter(masked).blocks, Adapter(copy).blocks
    assert torch.equal(new[0]["query"].weight, 2 * old[0]["query"].weight)
    assert new[2]["query"].weight is old[2]["query"].weight and new[2]["up"].weight is not old[2]["up"].weight
    assert copy.output_head.weight is masked.output_head.weight
    row = semi_structured_row(masked, Size(2, 6), Timing(2, 1))
    assert row["relative_difference"] > 0.01 and (row["batch"], row["length"]) == (2, 6)
    assert row["layers"] == row["of_layers"] == 16
    monkeypatch.setattr(module, "convert", lambda weight: weight.clone())
    assert semi_structured_row(masked, Size(2, 6), Timing(2, 1))["relative_difference"] == 0


def test_a_kernel_that_fails_only_when_it_runs_is_refused_too(masked, monkeypatch):
    """Whole passes then run that shape dense, and a lack of memory is none of it."""
    linear, seen = module.F.linear, []

    def failing(x, weight, bias=None):
        if getattr(weight, "sparse", False) and weight.shape == (32, 48):
            seen.append(len(x))
            raise RuntimeError("CUDA error: operation not supported\ntrace")
        return linear(x, weight, bias)

    def convert(weight):
        made = 2 * weight
        made.sparse = True
        return made

    monkeypatch.setattr(module.F, "linear", failing)
    monkeypatch.setattr(module, "convert", convert)
    rows = {(row["outputs"], row["inputs"]): row for row in shape_rows(masked, 5, Timing(1, 0))}
    assert rows[32, 48]["refused"] == "CUDA error: operation not supported" and "speedup" in rows[32, 32]
    copy, taken, layers = module.with_kernels(masked, 6)
    new, old = (Adapter(model).blocks[0] for model in (copy, masked))
    assert (taken, layers) == (14, 16)
    assert new["down"].weight is old["down"].weight and torch.equal(new["up"].weight, 2 * old["up"].weight)
    assert seen == [5, 6, 6]  # one shape; two layers

    def full(weight):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "convert", full)
    with pytest.raises(torch.OutOfMemoryError):
        shape_rows(masked, 5, Timing(1, 0))


@torch.no_grad()
def test_the_difference_of_logits_is_over_all_rows(masked, tiny_model):
    other, ids = tiny_model(seed=3), torch.arange(12).view(2, 6)
    one, two = masked(ids).logits, other(ids).logits
    assert module._difference(masked, other, ids) == pytest.approx(((two - one).norm() / one.norm()).item())
