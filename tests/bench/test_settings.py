"""Choices of a benchmark that can and cannot be met."""

import pytest

from structprune.bench.settings import BenchSettings
from structprune.errors import UserError
from structprune.generation.samplers import DreamGeneration, LLaDAGeneration


@pytest.mark.parametrize(
    "values, message",
    [
        ({"batches": (0,)}, "--batch 0 is not a batch size: give whole numbers from 1"),
        ({"lengths": (512, -1)}, "--length -1 is not a length"),
        ({"lengths": (512, 512)}, "--length 512,512: give each number once"),
        ({"rounds": 0}, "--rounds 0 is not a count"),
        ({"generation_rounds": 0}, "--generation-rounds 0 is not a count"),
        ({"gen_length": -1}, "--gen-length -1 is not a count: give 0"),
        ({"caches": ("dul",)}, r"unknown --cache 'dul' \(did you mean 'dual'\?\): choose from none, prefix, dual, all"),
        ({"gen_length": 16}, "--steps 32 are more than the 16 tokens of --gen-length.* give at most 16"),
        ({"lengths": (512, 128)}, "--length 128 leaves no room for a prompt before --gen-length 128"),
    ],
)
def test_values_that_cannot_be_used(values, message):
    with pytest.raises(UserError, match=message) as caught:
        BenchSettings(**values)
    assert "\n" not in str(caught.value)


def test_generation_of_a_family(tiny_model):
    llada, dream = tiny_model().config, tiny_model("dream").config
    assert BenchSettings().generation(llada) == LLaDAGeneration(128, 32, 32)
    assert BenchSettings(gen_length=16, steps=4).generation(llada) == LLaDAGeneration(16, 4, 16)
    assert BenchSettings(gen_length=16, steps=4, block_length=8).generation(llada) == LLaDAGeneration(16, 4, 8)
    dual = BenchSettings(gen_length=16, steps=4, caches=("all",))
    assert dual.generation(llada) == LLaDAGeneration(16, 4, 8) and dual.generation(dream) == DreamGeneration(16, 4)
    assert BenchSettings(gen_length=16, steps=5, caches=("all",)).generation(llada) == LLaDAGeneration(16, 5, 16)
    assert BenchSettings(gen_length=16, steps=4).generation(dream) == DreamGeneration(16, 4)
    assert BenchSettings(gen_length=0).generation(llada) is None
    with pytest.raises(UserError, match="dream's sampler has no option 'block_length'"):
        BenchSettings(block_length=8).generation(dream)
    with pytest.raises(UserError, match="steps = 6 cannot be shared by 4 blocks"):
        BenchSettings(steps=6).generation(llada)


def test_caches_of_a_sampler(tiny_model):
    blocks, one = LLaDAGeneration(16, 4, 8), LLaDAGeneration(16, 4, 16)
    everything = BenchSettings(caches=("all",))
    assert everything.caches_of(blocks) == ("none", "prefix", "dual")
    assert everything.caches_of(one) == everything.caches_of(DreamGeneration(16, 4)) == ("none", "prefix")
    for family in ("sdar", "llada2", "a2d-qwen3-blocks", "nemotron-labs"):  # of blocks that see none behind them
        several = BenchSettings(gen_length=16, steps=4).generation(tiny_model(family).config)
        assert several.blocks == 4 and everything.caches_of(several) == ("none", "prefix")
    assert BenchSettings(caches=("dual", "none")).caches_of(blocks) == ("none", "dual")
    with pytest.raises(UserError, match="this sampler has no blocks"):
        BenchSettings(caches=("dual",)).caches_of(DreamGeneration(16, 4))


@pytest.mark.parametrize(
    "options, option",
    [
        ({"steps": 4}, "--steps"),
        ({"block_length": 8}, "--block-length"),
        ({"caches": ("all",)}, "--cache"),
        ({"generation_rounds": 9}, "--generation-rounds"),
    ],
)
def test_what_is_said_of_a_generation_that_is_left_out(options, option):
    with pytest.raises(UserError, match=f"^{option} has no effect with --gen-length 0"):
        BenchSettings(gen_length=0, **options)
    BenchSettings(gen_length=0)
    BenchSettings(gen_length=32, **options)
