"""The samplers of the exported files: the published tokens, those of the package, and chance where it is asked for."""

import json

import pytest
import torch
from safetensors.torch import load_file

from structprune import load_model
from structprune.generation.generate import generate
from structprune.generation.samplers import DreamGeneration, LLaDAGeneration

MASK = 2047
PROMPTS = torch.arange(18).reshape(2, 9) * 7 % 2000  # (B, P)
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])  # (B, P)


@pytest.fixture
def llada(tiny_model):
    return tiny_model("llada")


@pytest.fixture
def dream(tiny_model):
    return tiny_model("dream")


def test_tokens_equal_the_published_samplers(parity):
    model, expected = load_model(parity), load_file(parity / "sampling.safetensors")
    sampler = model.diffusion_generate if parity.name == "dream" else model.generate
    cases = json.loads((parity / "cases.json").read_text())["generate"]
    assert len(cases) == {"dream": 5, "sdar": 4}.get(parity.name, 3)
    for case in cases:
        name = case.pop("name")
        output = sampler(expected[f"{name}/prompt"], expected.get(f"{name}/attention_mask"), **case)
        assert torch.equal(output, expected[f"{name}/output"]), name


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 6, "block_length": 6},
        {"steps": 4, "block_length": 12, "cfg_scale": 0.8},
        {"steps": 12, "block_length": 4, "threshold": 0.002},
        {"steps": 4, "block_length": 12, "cfg_scale": 0.5, "threshold": 0.9},
    ],
)
@pytest.mark.parametrize("mask", [None, PADDED])
def test_llada_writes_what_the_package_does(llada, options, mask):
    expected = generate(llada, PROMPTS, LLaDAGeneration(gen_length=12, **options), mask)
    assert torch.equal(llada.generate(PROMPTS, mask, gen_length=12, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 5, "alg": "entropy"},
        {"steps": 7, "alg": "topk_margin", "top_p": 0.8},
        {"steps": 12, "alg": "maskgit_plus", "top_k": 20, "eps": 0.01},
    ],
)
@pytest.mark.parametrize("mask", [None, PADDED])
def test_dream_writes_what_the_package_does(dream, options, mask):
    expected = generate(dream, PROMPTS, DreamGeneration(gen_length=12, **options), mask)
    assert torch.equal(dream.diffusion_generate(PROMPTS, mask, max_new_tokens=12, **options), expected)


def drawn(sampler, seed, **options):
    torch.manual_seed(seed)
    return sampler(PROMPTS, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.8},
        {"remasking": "random"},
        {"temperature": 0.5, "threshold": 0.5},
    ],
)
def test_lladas_chance_depends_on_torchs_seed(llada, options):
    options |= {"gen_length": 12, "block_length": 6, "steps": 6}
    first, again, other = (drawn(llada.generate, seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert MASK not in first[:, 9:] and torch.equal(first[:, :9], PROMPTS)


@pytest.mark.parametrize(
    "options",
    [
        {"alg": "origin"},
        {"alg": "origin", "temperature": 0.7, "top_p": 0.9},
        {"alg": "entropy", "alg_temp": 0.3},
        {"alg": "maskgit_plus", "temperature": 0.7, "top_k": 50},
    ],
)
def test_dreams_chance_depends_on_torchs_seed(dream, options):
    options |= {"max_new_tokens": 12, "steps": 6}
    first, again, other = (drawn(dream.diffusion_generate, seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert MASK not in first[:, 9:] and torch.equal(first[:, :9], PROMPTS)


def test_tokens_are_drawn_by_their_probability(llada):
    """One masked token, of which 4,000 rows draw: within four standard errors of the softmax at a temperature."""
    with torch.no_grad():
        llada.output_head.weight.mul_(20)
        prompt = PROMPTS[:1].repeat(4000, 1)
        ids = torch.cat((PROMPTS[:1], torch.tensor([[MASK]])), dim=1)
        p = (llada(ids).logits[0, -1].float() / 0.7).softmax(-1)  # (V,)
    torch.manual_seed(0)
    tokens = llada.generate(prompt, gen_length=1, block_length=1, steps=1, temperature=0.7)[:, -1]  # (B,)
    top = p.argmax()
    error = (p[top] * (1 - p[top]) / 4000).sqrt()
    assert 0.02 < p[top] < 0.98 and ((tokens == top).double().mean() - p[top]).abs() < 4 * error


def test_history_and_forms_of_dreams_answer(dream):
    options = {"max_new_tokens": 8, "steps": 4, "alg": "entropy"}
    plain = dream.diffusion_generate(PROMPTS, **options)
    output = dream.diffusion_generate(PROMPTS, "full", **options, output_history=True, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain) and len(output.history) == 4
    left = [int((ids == MASK).sum()) for ids in output.history]
    assert torch.equal(output.history[-1], plain) and left == sorted(left, reverse=True) and left[-1] == 0 < left[0]
    bare = dream.diffusion_generate(PROMPTS, **options, return_dict_in_generate=True)
    assert bare.history is None and torch.equal(bare.sequences, plain)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"gen_length": 10, "block_length": 4}, "gen_length = 10 must be a multiple of block_length = 4"),
        ({"gen_length": 8, "block_length": 4, "steps": 3}, "steps = 3 of the number of blocks"),
        ({"remasking": "worst"}, "remasking = 'worst' with threshold = None"),
        ({"remasking": "random", "threshold": 0.9}, "or random without a threshold"),
        ({"attention_mask": "half"}, "attention_mask = 'half' is unknown"),
        ({"gen_length": 8, "block_length": 0}, "block_length = 0: give at least 1"),
        ({"gen_length": 8, "block_length": 8, "steps": 0}, "steps = 0: give at least 1"),
        ({"gen_length": 8, "block_length": 8, "steps": 8, "threshold": 2.0}, "threshold = 2.0: give a probability"),
        ({"gen_length": 512, "steps": 512}, "a prompt of 9 tokens and 512 more do not fit the model's 64 positions"),
    ],
)
def test_lladas_bad_options(llada, options, words):
    with pytest.raises(ValueError) as error:
        llada.generate(PROMPTS, **{"gen_length": 32, "block_length": 32, "steps": 32} | options)
    assert words in str(error.value)


def test_dreams_bad_options(dream):
    for options, words in (
        ({"alg": "surest", "max_new_tokens": 8}, "alg = 'surest' is unknown: give one of origin, maskgit_plus"),
        ({"steps": 0}, "steps = 0: give at least 1"),
        ({"top_k": 0}, "top_k = 0: give at least 1"),
        ({"max_new_tokens": 100}, "a prompt of 9 tokens and 100 more do not fit"),
    ):
        with pytest.raises(ValueError, match=words):
            dream.diffusion_generate(PROMPTS, **options)
