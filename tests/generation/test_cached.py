"""Generation with a key/value cache: what is kept, what runs again, and what it agrees with."""

import pytest
import torch

from structprune.errors import UserError
from structprune.generation.cached import KeyValueCache, check_cache
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import DreamGeneration, LLaDAGeneration
from structprune.models.encode import encode_at

PROMPTS = [torch.arange(start, start + length) * 7 % 2000 for start, length in ((3, 9), (40, 4), (77, 6))]
LLADA, DREAM = LLaDAGeneration(12, 12, 4), DreamGeneration(12, 6)
CASES = [("llada", "prefix", LLADA), ("llada", "dual", LLADA), ("dream", "prefix", DREAM)]


def ids_of(model, seed: int = 0, rows: int = 2, length: int = 14) -> torch.Tensor:
    return torch.randint(2000, (rows, length), generator=torch.Generator().manual_seed(seed))


def at(*positions: int, rows: int = 2, length: int = 14) -> torch.Tensor:
    """The same positions in every row, (R, T)."""
    targets = torch.zeros(rows, length, dtype=torch.bool)
    targets[:, list(positions)] = True
    return targets


@torch.no_grad()
def substituted(model, old, new, targets, span, mask=None):
    """Full pass over `new` whose attention sees, outside `span`, the keys and values of a full pass over `old`."""
    outside = [place for place in range(old.shape[1]) if place not in span]
    kept, handles = [], []
    for block in model.blocks:
        handles.append(block.part("core").register_forward_pre_hook(lambda _, args: kept.append(args[1:3])))
    encode_at(model, old, targets, mask)
    [handle.remove() for handle in handles]
    stored = iter(kept)

    def put_back(_, args):
        sides = [side.clone() for side in args[1:3]]
        for side, before in zip(sides, next(stored), strict=True):
            side[:, :, outside] = before[:, :, outside]
        return (args[0], *sides, *args[3:])

    handles = [block.part("core").register_forward_pre_hook(put_back) for block in model.blocks]
    result = encode_at(model, new, targets, mask)
    [handle.remove() for handle in handles]
    return result


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "family, form, span",
    [
        ("llada", "prefix", range(6, 14)),
        ("llada", "dual", range(6, 10)),
        ("dream", "prefix", range(5, 14)),  # the token at 6 is predicted at 5
        ("dream", "dual", range(5, 10)),
    ],
)
@torch.no_grad()
def test_what_is_kept_is_what_the_block_began_with(tiny_model, family, form, span, padded):
    model, targets, block = tiny_model(family), at(6, 8), slice(6, 10)
    mask = torch.ones(2, 14, dtype=torch.bool)
    mask[1, :3] = False
    mask = mask if padded else None
    old = ids_of(model)
    new = old.clone()
    new[:, [6, 7]] = 1234
    cache = KeyValueCache(model, form)
    first = cache.encode(old, targets, mask, [0, 1], block)
    assert torch.equal(first, encode_at(model, old, targets, mask))
    assert (cache.encode(old, targets, mask, [0, 1], block) - first).abs().max() < 1e-5  # nothing changed: exact
    result = cache.encode(new, targets, mask, [0, 1], block)
    assert (result - substituted(model, old, new, targets, span, mask)).abs().max() < 1e-5
    full = encode_at(model, new, targets, mask)
    assert (result - full).abs().max() > 1e-3  # approximate
    again = cache.encode(new, at(11, 12), mask, [0, 1], slice(10, 14))  # another block
    assert (again - encode_at(model, new, at(11, 12), mask)).abs().max() < 1e-5


@torch.no_grad()
def test_rows_may_leave_and_a_new_one_starts_again(tiny_model):
    model, targets, block, old = tiny_model(), at(7, rows=3), slice(6, 10), ids_of(None, rows=3)
    new = old.clone()
    new[:, 6] = 55
    cache = KeyValueCache(model, "dual")
    cache.encode(old, targets, None, [4, 2, 9], block)
    all_rows = cache.encode(new, targets, None, [4, 2, 9], block)  # (3, C)
    result = cache.encode(new[[0, 2]], targets[[0, 2]], None, [4, 9], block)
    assert (result - all_rows[[0, 2]]).abs().max() < 1e-5
    fresh = cache.encode(new, targets, None, [4, 2, 7], block)
    assert torch.equal(fresh, encode_at(model, new, targets))


def spans_run(model, settings, prompts, **options) -> list[tuple[int, int]]:
    """(rows, positions) that the first block runs at every step."""
    seen = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    generate(model, prompts, settings, options=Options(**options))
    handle.remove()
    return seen


@pytest.mark.parametrize(
    "family, settings, form, expected",
    [
        # a prompt of 9, then blocks of 4: three full passes of 21, the rest from the block on (prefix) or of it (dual)
        ("llada", LLADA, "none", [21] * 12),
        ("llada", LLADA, "prefix", [21, 12, 12, 12, 21, 8, 8, 8, 21, 4, 4, 4]),
        ("llada", LLADA, "dual", [21, 4, 4, 4, 21, 4, 4, 4, 21, 4, 4, 4]),
        ("dream", DREAM, "prefix", [21] + [13] * 5),  # from the last token of the prompt, which predicts the first
    ],
)
def test_which_positions_run(tiny_model, family, settings, form, expected):
    model = tiny_model(family)
    assert [count for _, count in spans_run(model, settings, PROMPTS[:1], cache=form)] == expected
    rows = [count for count, _ in spans_run(model, settings, PROMPTS, cache=form)]
    assert rows == [3] * len(expected)


def test_refreshing_within_a_block(tiny_model):
    settings = LLaDAGeneration(12, 6, 12)
    result = spans_run(tiny_model(), settings, PROMPTS[:1], cache="prefix", refresh=2)
    assert [count for _, count in result] == [21, 12] * 3


@pytest.mark.parametrize("family, form, settings", CASES)
def test_a_cache_made_anew_at_every_step_changes_nothing(tiny_model, family, form, settings):
    model = tiny_model(family)
    full = generate(model, PROMPTS, settings)
    assert all(map(torch.equal, full, generate(model, PROMPTS, settings, options=Options(cache=form, refresh=1))))
    kept = generate(model, PROMPTS, settings, options=Options(cache=form))
    assert not all(map(torch.equal, full, kept))  # so it was not by chance
    alone = generate(model, PROMPTS, settings, options=Options(cache=form, batch=1))
    assert all(map(torch.equal, kept, alone))  # padding and batch are as inert as without


@pytest.mark.parametrize("form", ["prefix", "dual"])
def test_one_step_per_block_needs_no_cache(tiny_model, form):
    model, settings = tiny_model(), LLaDAGeneration(12, 3, 4)
    full = generate(model, PROMPTS, settings)
    assert all(map(torch.equal, full, generate(model, PROMPTS, settings, options=Options(cache=form))))


def test_guidance_keeps_both_branches(tiny_model):
    model, settings = tiny_model(), LLaDAGeneration(12, 12, 4, cfg_scale=0.7)
    seen = spans_run(model, settings, PROMPTS, cache="dual")
    assert seen == [(6, 21), (6, 4), (6, 4), (6, 4)] * 3
    full = generate(model, PROMPTS, settings)
    assert all(map(torch.equal, full, generate(model, PROMPTS, settings, options=Options(cache="dual", refresh=1))))


def test_rows_that_end_leave_the_cache(tiny_model):
    settings = LLaDAGeneration(12, 12, 4, stop_at_eos=True, temperature=0.9)
    free = generate(
        tiny_model(), PROMPTS[:2], LLaDAGeneration(12, 12, 4, temperature=0.9), options=Options(cache="dual",
        generator=torch.Generator().manual_seed(0)),
    )  # fmt: skip
    eos = next(token for token in free[0][-12:-8].tolist() if token not in free[1][-12:])
    options = {"cache": "dual", "eos_id": eos, "generator": torch.Generator().manual_seed(0)}
    seen = spans_run(tiny_model(), settings, PROMPTS[:2], **options)
    assert [rows for rows, _ in seen] == [2] * 4 + [1] * 8
    options["generator"] = torch.Generator().manual_seed(0)
    result = generate(tiny_model(), PROMPTS[:2], settings, options=Options(**options))
    assert torch.equal(result[1], free[1]) and result[0][-8:].tolist() == [eos] * 8


def test_hooks_are_gone_afterwards(tiny_model):
    model = tiny_model()
    generate(model, PROMPTS, LLADA, options=Options(cache="dual"))
    assert not any(block.part("core")._forward_pre_hooks for block in model.blocks)


def test_caches_that_cannot_be(tiny_model):
    with pytest.raises(UserError, match=r"unknown cache 'prefx' \(did you mean 'prefix'\?\): choose one of none, pre"):
        generate(tiny_model(), PROMPTS, LLADA, options=Options(cache="prefx"))
    with pytest.raises(UserError, match="this sampler has no blocks: use prefix"):
        generate(tiny_model("dream"), PROMPTS, DREAM, options=Options(cache="dual"))
    with pytest.raises(UserError, match="block_length leaves only one block: use prefix"):
        check_cache("dual", LLaDAGeneration(12, 12, 12))
    check_cache("dual", LLaDAGeneration(12, 12, 6))
    for cache, refresh in (("none", 1), ("dual", 0)):
        with pytest.raises(ValueError, match="give a number from 1, and a cache"):
            generate(tiny_model(), PROMPTS, LLADA, options=Options(cache=cache, refresh=refresh))


@pytest.mark.parametrize("family, cache, settings", [*CASES, ("llada", "none", LLADA), ("dream", "none", DREAM)])
def test_blocks_without_attention_have_nothing_to_cache(gap_pair, family, cache, settings):
    """The tokens are those of a whole model that computes the same; only two blocks have keys and values."""
    gapped, whole = gap_pair(family)
    ours, theirs = (
        generate(model, PROMPTS, settings, options=Options(cache=cache, generator=torch.Generator().manual_seed(0)))
        for model in (gapped, whole)
    )
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    if cache != "none":
        store = KeyValueCache(gapped, cache)
        with torch.no_grad():
            store.encode(ids_of(gapped), at(6, 8), None, [0, 1], slice(6, 10))
        assert len(store._layers) == 2
