"""Sizes of units and rounding of widths."""

import pytest

from structprune.config import StructuredSettings
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.structured.choose import candidates
from structprune.structured.sizes import BlockSize, block_size, forward_macs, rounding

STEP, STEPS = {"attention": 400, "channels": 30}, {"attention": 4, "channels": 64}
SIZE = BlockSize(0, 3520, STEP, STEPS, {"attention": 1600, "channels": 1920})


def test_rounding():
    cases = {12288: 128, 18944: 128, 2048: 128, 1920: 64, 640: 32, 96: 1, 48: 1, 256: 16, 12300: 1, 2112: 64}
    assert {width: rounding(width, "auto") for width in cases} == cases
    assert rounding(12288, 256) == 256 and rounding(640, 1) == 1
    for asked, width in ((0, 64), (65, 64), (-8, 64)):
        with pytest.raises(UserError, match=f"round_to = {asked}: MLPs are {width} wide, give 1 to {width}"):
            candidates([SIZE], StructuredSettings(ratio=0.3, allocation="uniform", round_to=asked))


@pytest.mark.parametrize(
    "form, step", [("query_heads", 2 * (2 * 8 * 32 + 8)), ("kv_groups", 3 * (2 * 8 * 32 + 8) + 2 * 264)]
)
def test_sizes_of_grouped_heads(tiny_model, form, step):
    size = block_size(Adapter(tiny_model("dream")).blocks[0], form)
    linears = 48 * 32 + 48 + 2 * (16 * 32 + 16) + 32 * 48 + 3 * 32 * 48  # q, k and v with biases, output, MLP
    assert size.total == linears and size.step == {"attention": step, "channels": 96}
    assert size.steps == {"attention": 3 if form == "query_heads" else 2, "channels": 48}
    # the whole attention takes keys and values along, also where query heads are the units
    attention = 2 * 48 * 32 + 48 + 2 * (16 * 32 + 16)
    assert size.whole == {"attention": attention, "channels": 3 * 32 * 48}
    assert size.removed("attention", 1) == step and size.removed("attention", size.steps["attention"]) == attention


def test_sizes_with_biases(tiny_model):
    size = block_size(Adapter(tiny_model("llada", include_bias=True)).blocks[0], "query_heads")
    assert size.total == 4 * (32 * 32 + 32) + 3 * 32 * 48 + 48 + 48 + 32
    assert size.step == {"attention": 4 * 8 * 32 + 3 * 8, "channels": 3 * 32 + 2}


def test_macs_of_a_forward_pass(tiny_model):
    blocks = 3 * (4 * 32 * 32 + 3 * 32 * 48)  # weights of the linears, each used once a token
    scores = 3 * 2 * 4 * 8 * 10  # q k and p v: heads x head dim x keys
    assert forward_macs(Adapter(tiny_model()), 10) == 10 * (blocks + 2048 * 32 + scores)
