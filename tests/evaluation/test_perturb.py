"""Monte Carlo perturbations, by hand and against exact expectations."""

import itertools
import math

import pytest
import torch

from structprune.evaluation.perturb import (
    FORMS,
    aligned_columns,
    draw_uniform,
    fixed_count,
    independent,
    item_generator,
    masked_counts,
    spread,
)


def test_numbers_of_masked_tokens_of_a_block_by_hand():
    # from k on in steps of L / b = 0.75, halves to even, and round again after L = 6:
    # 3, 3.75, 4.5, 5.25, 6, 6.75, 7.5, 8.25 -> 3, 4, 4, 5, 6, 7, 8, 8; 1, 1.75, 2.5, 3.25, 4, 4.75, 5.5, 6.25
    result = masked_counts(torch.tensor([3, 1]), length=6, block=8)
    assert result.tolist() == [[3, 4, 4, 5, 6, 1, 2, 2], [1, 2, 2, 3, 4, 5, 6, 6]]
    assert masked_counts(torch.tensor([2]), length=5, block=1).tolist() == [[2]]
    assert masked_counts(torch.tensor([1]), length=1, block=8).tolist() == [[1] * 8]
    assert masked_counts(torch.tensor([10]), length=20, block=4).tolist() == [[10, 15, 20, 5]]


def test_llada_masks_the_lowest_numbers_and_weighs_by_the_share():
    levels = torch.tensor([0.3, 0.999999], dtype=torch.float64)  # L = 4: k = 2, 4; a block of two goes on by 2
    positions = torch.tensor([[0.4, 0.1, 0.9, 0.2], [0.4, 0.1, 0.9, 0.2], [0.5, 0.6, 0.7, 0.1], [0.9, 0.3, 0.2, 0.8]])
    result = fixed_count(levels, positions)
    assert result.masked.long().tolist() == [[0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    assert result.weight.tolist() == [2, 1, 1, 2]
    assert fixed_count(torch.tensor([1.0]), torch.rand(1, 3)).masked.all()  # a level rounded up to 1 is no L + 1


def test_dream_masks_by_chance_but_never_the_last():
    levels = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)  # p = 0.001, 0.5005, 1
    positions = torch.tensor([[0.0009, 0.002, 0.0], [0.5, 0.501, 0.0], [0.999, 0.0, 0.0]], dtype=torch.float64)
    result = independent(levels, positions)
    assert result.masked.long().tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert result.weight.tolist() == pytest.approx([1000, 1 / 0.5005, 1])


def test_guidance_of_the_families():
    assert [FORMS["fixed_count"].guidance(w) for w in (0.0, 0.5)] == [0.0, 0.5]
    assert [FORMS["independent"].guidance(w) for w in (0.0, 0.5, 1.0, 1.5)] == [0.0, 0.0, 0.0, 0.5]


def test_spread_is_even_in_every_prefix_and_so_are_its_multiples():
    for period in (1, 8):
        points = spread(64, period, torch.Generator().manual_seed(3))
        for count in (2, 3, 5, 8, 16, 64):
            gaps = (points[:count] * (period if period > 1 else 1) % 1).sort().values.diff()
            assert gaps.max() < 2.7 / count  # independent points leave gaps of log(n) / n
            assert gaps.min() > 0.3 / count
    steps = spread(5, 8, torch.Generator().manual_seed(0)).diff() % 1
    assert torch.allclose(steps, steps[0].expand(4)) and 0.5 < steps[0] < 0.7  # near the golden ratio, 0.618
    assert (8 * steps[0] % 1).item() == pytest.approx((math.sqrt(5) - 1) / 2)


def test_an_items_noise_depends_on_seed_and_key():
    draws = [torch.rand(3, generator=item_generator(*each)) for each in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    first = torch.rand(1, generator=item_generator(0, "piqa/0"), dtype=torch.float64).item()
    assert first == pytest.approx(FIRST)  # a run that is resumed elsewhere must see the same noise


FIRST = 0.12898365890143115


@pytest.mark.parametrize("form, count", [("fixed_count", 4), ("independent", 32)])
def test_shapes_of_the_uniform_numbers(form, count):
    for sampling in ("stratified", "published"):
        levels, positions = draw_uniform(FORMS[form], 32, 8, 5, sampling, item_generator(0, "x"))
        assert (levels.shape, positions.shape) == ((count,), (32, 5))
        assert levels.dtype == positions.dtype == torch.float64
    # levels drawn independently are no Kronecker sequence
    published = draw_uniform(FORMS[form], 32, 8, 5, "published", item_generator(0, "x"))[0]
    assert (published.diff() % 1).std() > 0.1


LENGTH, BLOCK, SAMPLES = 3, 4, 16  # L / b = 0.75 is rounded to even here and there


def nats(length: int) -> dict[tuple[bool, ...], float]:
    """An arbitrary value of every mask of a target: none is 0."""
    generator = torch.Generator().manual_seed(5)
    patterns = list(itertools.product((False, True), repeat=length))
    values = (10 * torch.rand(len(patterns), generator=generator)).tolist()
    return dict(zip(patterns, values, strict=True)) | {(False,) * length: 0.0}


def fixed_count_expectation(value: dict) -> float:
    """Over every k, place in the block and set of that many masked tokens, all equally likely."""
    total = 0.0
    for k in range(1, LENGTH + 1):
        for number in masked_counts(torch.tensor([k]), LENGTH, BLOCK)[0].tolist():
            sets = [mask for mask in value if sum(mask) == number]
            total += LENGTH / number * sum(map(value.get, sets)) / len(sets)
    return total / LENGTH / BLOCK


def independent_expectation(value: dict) -> float:
    """∫ Σ_mask p^m (1-p)^(L-1-m) value / p dp over p in (0.001, 1), by the midpoint rule."""
    p = 1e-3 + 0.999 * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    masks = [mask for mask in value if not mask[-1]]
    return sum(value[mask] * (p ** (sum(mask) - 1) * (1 - p) ** (LENGTH - 1 - sum(mask))).mean() for mask in masks)


def estimates(form: str, sampling: str, value: dict, seeds: range) -> torch.Tensor:
    """One Monte Carlo estimate per seed."""
    result = []
    for seed in seeds:
        drawn = draw_uniform(FORMS[form], SAMPLES, BLOCK, LENGTH, sampling, item_generator(seed, "x"))
        samples = FORMS[form].perturb(*drawn)
        of_sample = torch.tensor([value[tuple(mask)] for mask in samples.masked.tolist()], dtype=torch.float64)
        result.append((of_sample * samples.weight).mean())
    return torch.stack(result)


@pytest.mark.parametrize("sampling", ["stratified", "published"])
@pytest.mark.parametrize(
    "form, expectation", [("fixed_count", fixed_count_expectation), ("independent", independent_expectation)]
)
def test_estimates_are_unbiased(form, expectation, sampling):
    value = nats(LENGTH)
    result, exact = estimates(form, sampling, value, range(1500)), expectation(value)
    error = (result.std() / len(result) ** 0.5).item()
    assert error < 0.03 * exact  # so that a bias would show
    assert abs(result.mean().item() - exact) < 3.5 * error


@pytest.mark.parametrize("form", ["fixed_count", "independent"])
def test_stratified_estimates_vary_less(form):
    """Where the number of masks is all that matters, spread levels are much better than independent ones."""
    value = {mask: float(sum(mask)) ** 2 for mask in nats(LENGTH)}
    variance = {each: estimates(form, each, value, range(300)).var() for each in ("stratified", "published")}
    assert variance["stratified"] < 0.9 * variance["published"]


def columns_of(*texts):
    result, width = aligned_columns([torch.tensor([ord(letter) for letter in text]) for text in texts])
    return [each.tolist() for each in result], width


def test_what_answers_have_in_common_shares_its_numbers():
    assert columns_of("abcd") == ([[0, 1, 2, 3]], 4)
    assert columns_of("abcd", "abXcd") == ([[0, 1, 2, 3], [0, 1, 4, 2, 3]], 5)  # inserted: a number of its own
    assert columns_of("abcd", "ad") == ([[0, 1, 2, 3], [0, 3]], 4)
    assert columns_of("abcd", "aXYZd") == ([[0, 1, 2, 3], [0, 1, 2, 4, 3]], 5)  # replaced: pairs, then its own
    result, width = columns_of("abcd", "XabYcdZ", "dcba", "")
    assert width == 4 + 3 + 3 and all(len(set(each)) == len(each) for each in result)


def test_a_shared_token_is_masked_in_both_answers():
    """Of two answers that differ by an insertion, Dream's masks are the same at every shared token."""
    (one, two), width = aligned_columns([torch.tensor([5, 6, 7, 8, 9]), torch.tensor([5, 1, 2, 6, 7, 8, 9])])
    levels, positions = draw_uniform(FORMS["independent"], 64, 8, width, "stratified", item_generator(0, "x"))
    first, second = (FORMS["independent"].perturb(levels, positions[:, each]).masked for each in (one, two))
    assert torch.equal(first[:, :4], second[:, [0, 3, 4, 5]]) and first.any()
