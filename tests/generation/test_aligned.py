"""The sampler of block diffusion models against a plain loop over the blocks of one prompt, without batch or cache."""

import pytest
import torch

from structprune.errors import UserError
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import generation_settings, low_confidence
from tests.conftest import MASK_ID

SIZE, LENGTH = 4, 12


@pytest.fixture
def model(tiny_model):
    """A random SDAR model with blocks of four tokens."""
    return tiny_model("sdar")


@pytest.fixture
def prompts() -> list[torch.Tensor]:
    """Prompts shorter than a block, of whole blocks, and with a part of one."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 2000, (size,), generator=generator) for size in (3, 8, 10, 5)]


@torch.no_grad()
def plain(
    model, prompt: torch.Tensor, each: int, sequential: bool = False, threshold: float | None = None, length=LENGTH
):
    """Greedy text behind a prompt, `each` tokens a step: (P,) -> (P + `length`,)."""
    count = -(-(len(prompt) + length) // SIZE) * SIZE
    ids = torch.full((count,), MASK_ID)  # (T,) up to the end of the last block
    ids[: len(prompt)] = prompt
    for end in range(len(prompt) // SIZE * SIZE + SIZE, count + 1, SIZE):
        while (masked := (ids[:end] == MASK_ID).nonzero()[:, 0]).numel():
            sure, tokens = model(ids[None, :end]).logits[0, masked].softmax(-1).max(-1)  # (m,) each
            first = torch.arange(each) if sequential else sure.argsort(descending=True)[:each]
            chosen = torch.zeros(len(masked), dtype=torch.bool)
            chosen[first[: len(masked)]] = True
            if threshold is not None:
                chosen |= sure >= threshold
            ids[masked[chosen]] = tokens[chosen]
    return ids[: len(prompt) + length]


CASES = {
    "surest": ({}, {"each": 1}),
    "two at once": ({"steps": 6}, {"each": 2}),
    "from the left": ({"remasking": "sequential"}, {"each": 1, "sequential": True}),
    "all that are sure": ({"threshold": 0.02}, {"each": 1, "threshold": 0.02}),
}


@pytest.mark.parametrize("cache", ["none", "prefix"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_a_plain_loop(model, prompts, case, cache):
    """A cache is exact here: clean blocks do not see what comes after them."""
    options, reference = CASES[case]
    settings = generation_settings(model.config, {"gen_length": LENGTH, "steps": LENGTH, **options})
    texts = generate(model, prompts, settings, options=Options(batch=3, cache=cache))
    for prompt, text in zip(prompts, texts):
        assert text.tolist() == plain(model, prompt, **reference).tolist()


@pytest.mark.parametrize("case", CASES)
def test_the_exported_files_write_the_same(model, prompts, case):
    options, _ = CASES[case]
    width, pad = max(map(len, prompts)), torch.nn.functional.pad
    ids = torch.stack([pad(prompt, (width - len(prompt), 0), value=5) for prompt in prompts])  # (B, P)
    real = torch.stack([pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in prompts])  # (B, P)
    settings = generation_settings(model.config, {"gen_length": LENGTH, "steps": LENGTH, **options})
    expected = generate(model, ids, settings, real)  # (B, P + G)
    assert torch.equal(model.generate(ids, real, gen_length=LENGTH, **{"steps": LENGTH, **options}), expected)
    (alone,) = model.generate(prompts[0][None], gen_length=LENGTH, **{"steps": LENGTH, **options})
    assert torch.equal(alone, torch.cat((prompts[0], expected[0, width:])))


@pytest.mark.parametrize("steps, each", [(10, 1), (5, 2), (3, 2), (2, 4)])
def test_a_length_need_not_be_a_number_of_blocks(model, prompts, steps, each):
    """The last block is generated whole and cut; a block of 4 of 10 tokens has 0.4 of the steps, rounded up."""
    settings = generation_settings(model.config, {"gen_length": 10, "steps": steps})
    assert (settings.blocks, settings.steps_of_block) == (3, 4 // each)
    for cache in ("none", "prefix"):
        texts = generate(model, prompts, settings, options=Options(batch=3, cache=cache))
        for prompt, text in zip(prompts, texts):
            assert text.tolist() == plain(model, prompt, each, length=10).tolist()
    for prompt in prompts:
        (text,) = model.generate(prompt[None], gen_length=10, steps=steps)
        assert text.tolist() == plain(model, prompt, each, length=10).tolist()


def test_a_prompt_and_whole_blocks_must_fit(model):
    longest = model.config.max_position_embeddings  # a number of blocks
    settings = generation_settings(model.config, {"gen_length": 5, "steps": 5})
    (text,) = generate(model, [torch.arange(longest - 5)], settings)
    assert len(text) == longest
    assert settings.reach(longest - 5) == longest and settings.reach(longest - 4) == longest + SIZE


def test_exported_draws_follow_the_seed(model, prompts):
    def draw(seed: int, **options) -> list[int]:
        torch.manual_seed(seed)
        return model.generate(prompts[1][None], steps=LENGTH, gen_length=LENGTH, **options)[0].tolist()

    assert draw(0, temperature=1.0) == draw(0, temperature=1.0) != draw(1, temperature=1.0)
    assert draw(0, temperature=1.0, top_k=1) == draw(1, temperature=1.0, top_p=1e-6)
    with pytest.raises(ValueError, match="remasking = 'sequential' with threshold = 0.5"):
        draw(0, remasking="sequential", threshold=0.5)


def test_finished_blocks_stay_cached(model, prompts):
    """The prompt runs once; then a block's first step runs the finished one before it and itself, others itself."""
    prompt, counts = prompts[1], []  # two whole blocks
    settings = generation_settings(model.config, {"gen_length": LENGTH, "steps": LENGTH})
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    (text,) = generate(model, [prompt], settings, options=Options(cache="prefix"))
    handle.remove()
    assert counts == [8 + SIZE, SIZE, SIZE, SIZE] + [2 * SIZE, SIZE, SIZE, SIZE] * 2
    assert text.tolist() == plain(model, prompt, 1).tolist()
    counts.clear()
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    generate(model, [prompt], settings, options=Options(cache="prefix", refresh=4))
    handle.remove()
    assert counts == [8 + SIZE, *[SIZE] * 3, 12 + SIZE, *[SIZE] * 3, 16 + SIZE, *[SIZE] * 3]  # at a block's first step


def test_rows_that_end_leave_the_cache(model, prompts):
    """As without a cache, where the rows that still run become fewer between blocks."""
    free = generate(model, prompts, generation_settings(model.config, {"gen_length": LENGTH, "steps": LENGTH}))
    ends = int(free[1][len(prompts[1]) + 1])  # made in the first block of one row
    settings = generation_settings(model.config, {"gen_length": LENGTH, "steps": LENGTH, "stop_at_eos": True})
    texts = [
        generate(model, prompts, settings, options=Options(eos_id=ends, cache=cache)) for cache in ("none", "prefix")
    ]
    assert all(torch.equal(one, other) for one, other in zip(*texts))
    assert (texts[0][1][len(prompts[1]) + SIZE :] == ends).all() and not torch.equal(texts[0][2], texts[0][1])


def test_an_eos_of_the_prompt_ends_nothing(model, prompts):
    prompt = prompts[2]  # two whole blocks and two tokens of the first block
    settings = generation_settings(model.config, {"gen_length": LENGTH, "steps": LENGTH})
    free = generate(model, [prompt], settings)[0]
    stopping = generation_settings(model.config, {"gen_length": LENGTH, "steps": LENGTH, "stop_at_eos": True})
    (text,) = generate(model, [prompt], stopping, options=Options(eos_id=int(prompt[-1])))
    assert torch.equal(text, free)
    made = int(free[10])
    (text,) = generate(model, [prompt], stopping, options=Options(eos_id=made))
    assert text[10:12].tolist() == free[10:12].tolist() and (text[12:] == made).all()


def test_the_block_is_the_models_own(model, prompts):
    settings = generation_settings(model.config, {"gen_length": 16, "steps": 16, "block_length": 8})
    with pytest.raises(UserError, match="block_length = 8 is not the model's own, 4: leave it out"):
        generate(model, prompts, settings)
    assert low_confidence(model.config, 8, 8).block_length == SIZE
    with pytest.raises(UserError, match="cache 'dual' keeps what follows a block, but blocks see no later one"):
        settings = generation_settings(model.config, {"gen_length": 16, "steps": 16})
        generate(model, prompts, settings, options=Options(cache="dual"))
