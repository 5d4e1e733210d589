"""Decoding by a confidence threshold: against the published rule, with few passes where a model is sure."""

import pytest
import torch

from structprune.errors import UserError
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import DreamGeneration, LLaDAGeneration

MASK = 2047
PROMPT = torch.arange(3, 12) * 7 % 2000  # (9,)


def settings_of(family, block, steps, threshold):
    """Twelve tokens in blocks, or Dream's in one."""
    if family == "dream":
        return DreamGeneration(12, steps, "maskgit_plus", threshold=threshold)
    return LLaDAGeneration(12, steps, block, threshold=threshold)


@torch.inference_mode()
def published(model, prompt, block, threshold):
    """Fast-dLLM's loop over one prompt: every masked token of a block that is as sure as the threshold, and the surest.

    Returns:
        Tokens (P + 12,), and the number of passes.
    """
    ids, passes = torch.cat((prompt, torch.full((12,), MASK))), 0  # (T,)
    for start in range(len(prompt), len(ids), block):
        places = torch.arange(start, start + block)
        while len(masked := places[ids[places] == MASK]):
            logits = model(ids[None]).logits[0, masked - int(model.shifted)]  # (m, V)
            sure, tokens = logits.float().softmax(-1).max(-1)  # (m,) each
            chosen = sure >= threshold  # (m,)
            chosen[sure.argmax()] = True
            ids[masked[chosen]] = tokens[chosen]
            passes += 1
    return ids, passes


def sure_model(tiny_model, family):
    """A tiny model whose predictions are as sure as a trained one's: some nearly certain, some not."""
    model = tiny_model(family)
    with torch.no_grad():
        model.output_head.weight.mul_(60)
    return model


def run(model, prompts, settings, **options):
    """Outputs, and the rows of every pass."""
    passes = []
    outputs = generate(model, prompts, settings, options=Options(record=passes.append, **options))
    return outputs, passes


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("family, block", [("llada", 6), ("llada", 12), ("dream", 12)])
def test_tokens_and_passes_are_those_of_the_published_loop(tiny_model, family, block, threshold):
    model = sure_model(tiny_model, family)
    expected, count = published(model, PROMPT, block, threshold)
    (tokens,), passes = run(model, [PROMPT], settings_of(family, block, 12, threshold))
    assert torch.equal(tokens, expected) and len(passes) == count
    if threshold == 0.3:
        assert count < 12  # the model is sure of several at a time


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_what_nothing_reaches_is_one_token_a_pass(tiny_model, family):
    model = tiny_model(family)
    (tokens,), passes = run(model, [PROMPT], settings_of(family, 12, 12, 1.0))
    assert len(passes) == 12 and torch.equal(tokens, published(model, PROMPT, 12, 1.0)[0])
    if family == "llada":  # whose schedule has one token a step too; Dream's has none at first
        assert torch.equal(tokens, generate(model, [PROMPT], settings_of(family, 12, 12, None))[0])


def test_a_low_threshold_takes_one_pass_a_block(tiny_model):
    _, passes = run(tiny_model(), [PROMPT], settings_of("llada", 4, 12, 1e-9))
    assert [each.index for each in passes] == [0, 4, 8]


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_no_step_reveals_less_than_without(tiny_model, family):
    """In fewer steps than tokens, the schedule still ends in time."""
    model = sure_model(tiny_model, family)
    (tokens,), passes = run(model, [PROMPT], settings_of(family, 12, 4, 0.999))
    counts = [int((each.ids == MASK).sum()) for each in passes] + [0]
    revealed = [before - after for before, after in zip(counts, counts[1:], strict=False)]
    assert MASK not in tokens and len(passes) <= 4 and min(revealed) >= 1
    if family == "llada":
        assert min(revealed[:-1], default=3) >= 3


def test_rows_of_a_batch_go_at_their_own_pace(tiny_model):
    model, prompts = sure_model(tiny_model, "llada"), [PROMPT, PROMPT[:5], PROMPT.flip(0), PROMPT[2:4]]
    settings = settings_of("llada", 6, 12, 0.8)
    together, passes = run(model, prompts, settings, batch=4)
    alone = [run(model, [prompt], settings) for prompt in prompts]
    for prompt, one, ((tokens,), own) in zip(prompts, together, alone, strict=True):
        assert torch.equal(one, tokens), len(prompt)
        assert len(own) <= len(passes)
    assert any(len(each.prompts) < 4 for each in passes)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_with_a_cache_that_is_always_rebuilt_tokens_are_the_same(tiny_model, cache):
    model, settings = sure_model(tiny_model, "llada"), settings_of("llada", 6, 12, 0.6)
    plain, _ = run(model, [PROMPT], settings)
    cached, _ = run(model, [PROMPT], settings, cache=cache, refresh=1)
    assert torch.equal(plain[0], cached[0])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LLaDAGeneration(threshold=0.0), "threshold = 0.0 cannot be used: give a number above 0, up to 1"),
        (lambda: LLaDAGeneration(threshold=1.5), "threshold = 1.5 cannot be used"),
        (lambda: LLaDAGeneration(threshold=True), "threshold = True cannot be used"),
        (lambda: LLaDAGeneration(remasking="random", threshold=0.9), "which remasking = random lacks: drop it"),
        (lambda: DreamGeneration(threshold=0.9), "threshold = 0.9 needs a probability, which alg = entropy lacks"),
        (lambda: DreamGeneration(alg="origin", threshold=0.9), "which alg = origin lacks: drop it"),
    ],
)  # fmt: skip
def test_thresholds_that_would_change_nothing_are_refused(make, words):
    with pytest.raises(UserError) as error:
        make()
    assert words in str(error.value)
