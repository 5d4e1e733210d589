"""Times of parts: narrow parts compute what a cut model's do, and a clock that follows widths gives its own table."""

from dataclasses import replace

import pytest
import torch

from structprune.bench import part_latency
from structprune.bench.latency import Timing
from structprune.bench.part_latency import measure_table, narrow_block, shared_parts, table_identity
from structprune.bench.settings import Size
from structprune.errors import UserError
from structprune.models.adapter import Adapter, Widths
from structprune.structured.plan import BlockPlan, identity_plan
from structprune.structured.surgery import apply_plan


@pytest.mark.parametrize(
    "family, narrow",
    [("llada", BlockPlan((0, 1), (0, 1), tuple(range(16)))), ("dream", BlockPlan((0, 1, 2), (0,), tuple(range(24))))],
)
def test_a_narrow_block_is_that_of_a_cut_model(tiny_model, family, narrow):
    """With the first heads and channels left, both compute the same."""
    model = tiny_model(family)
    adapter, whole = Adapter(model), identity_plan(Adapter(model))
    cut = apply_plan(model, replace(whole, blocks=(whole.blocks[0], narrow, whole.blocks[2]))).blocks[1]
    block = narrow_block(adapter, adapter.blocks[1], narrow.widths)
    x, rotary = torch.randn(2, 5, 32), model.rotary(5, "cpu")  # (B, T, C)
    with torch.inference_mode():
        assert torch.equal(block(x, rotary), cut(x, rotary))


@pytest.mark.parametrize("widths", [Widths(0, 0, 16), Widths(2, 2, 0)])
def test_a_narrow_half(tiny_model, widths):
    adapter = Adapter(tiny_model())
    block = narrow_block(adapter, adapter.blocks[0], widths)
    assert (block.has_attention, block.has_mlp) == (widths.query_heads > 0, widths.channels > 0)


def test_a_clock_of_widths_gives_their_table(tiny_model, clock):
    table = measure_table(tiny_model(), "query_heads", 8, Size(2, 6), Timing(2, 1, clock=clock))
    attention, mlp = table.parts
    assert (attention.kind, attention.blocks, attention.steps) == ("attention", (0, 1, 2), 4)
    assert attention.removed == (0, 1, 2, 3) and attention.ms == pytest.approx((4, 3, 2, 1))
    assert mlp.removed == (0, 8, 16, 24, 32, 40) and mlp.ms == pytest.approx((2.4, 2, 1.6, 1.2, 0.8, 0.4))
    assert table.rest == pytest.approx(2) and table.scale == pytest.approx(1)
    assert table.dense == pytest.approx(2 + 3 * (4 + 2.4)) and table.identity["batch"] == 2


def test_parts_of_equal_shapes_are_measured_once(tiny_model, gaps, clock):
    model = tiny_model("dream", **gaps("dream"))
    shared = {key: [block.index for block in blocks] for key, blocks in shared_parts(Adapter(model)).items()}
    assert shared == {("attention", Widths(6, 2, 0)): [0, 1], ("channels", Widths(0, 0, 48)): [1, 3]}
    table = measure_table(model, "query_heads", 8, Size(1, 4), Timing(1, 0, clock=clock))
    # a removal step takes a query head of each of 2 KV heads
    assert table.parts[0].ms == pytest.approx((6, 4, 2)) and table.parts[0].steps == 3
    groups = measure_table(model, "kv_groups", 8, Size(1, 4), Timing(1, 0, clock=clock))
    assert groups.parts[0].ms == pytest.approx((6, 3)) and groups.parts[0].steps == 2


def test_blocks_that_take_no_time_are_refused(tiny_model):
    with pytest.raises(UserError, match="no time that can be told from noise: raise search.latency_batch"):
        measure_table(tiny_model(), "query_heads", 8, Size(1, 4), Timing(1, 0, clock=lambda: 0.0))


def test_what_a_table_is_of(tiny_model, monkeypatch):
    model = tiny_model()
    first = table_identity(model, "query_heads", 8, Size(1, 4))
    assert first["dtype"] == "float32" and first["number of threads"] == torch.get_num_threads()
    assert first["model"] == ["llada", 32, 8, 2048, *[[4, 4, 48]] * 3]
    for other in (
        table_identity(model, "query_heads", 8, Size(1, 5)), table_identity(model, "kv_groups", 8, Size(1, 4)),
        table_identity(tiny_model(mlp_hidden_size=56), "query_heads", 8, Size(1, 4)),
    ):  # fmt: skip
        assert other != first
    machine = part_latency.describe_machine()
    monkeypatch.setattr(part_latency, "describe_machine", lambda: machine | {"processor": "another"})
    assert table_identity(model, "query_heads", 8, Size(1, 4))["device"] == "another"
