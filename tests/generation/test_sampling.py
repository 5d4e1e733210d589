"""The parts of the samplers, by hand."""

import math

import pytest
import torch

from structprune.generation.samplers import DreamGeneration, LLaDAGeneration
from structprune.models import sampling_structprune as sampling


def logs(*probabilities: float) -> torch.Tensor:
    """Logits whose softmax is `probabilities`, shifted: (1, V)."""
    return torch.tensor([probabilities]).log() + 0.7


def test_a_blocks_masks_are_shared_with_the_rest_first():
    masks = torch.tensor([8, 5, 2, 0])
    counts = [sampling.reveal_counts(masks, 3, step).tolist() for step in range(3)]
    assert counts == [[3, 2, 1, 0], [3, 2, 1, 0], [2, 1, 0, 0]]


def test_shares_of_dreams_times():
    assert sampling.reveal_shares(4, 0.2).tolist() == pytest.approx([0.2, 0.25, 1 / 3, 1])  # t = 1, .8, .6, .4, .2
    assert sampling.reveal_shares(1, 1e-3).tolist() == [1]


def test_dreams_counts_are_truncated_per_row():
    assert sampling.shared_counts(torch.tensor([7, 8, 3, 0]), torch.tensor(0.25)).tolist() == [1, 2, 0, 0]


def test_guidance():
    result = sampling.guided(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 4.0]]), 0.5)
    assert result.tolist() == [[2.5, -2.0]]  # 1 + 1.5 · 1, 4 + 1.5 · (-4)


@pytest.mark.parametrize(
    "top_p, kept", [(0.4, [1]), (0.6, [1, 3]), (0.79, [1, 3]), (0.81, [1, 2, 3]), (0.999, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_token_that_passes_the_sum(top_p, kept):
    logits = logs(0.05, 0.5, 0.15, 0.3)
    result = sampling.top_p_filter(logits, top_p)
    assert result.isfinite()[0].nonzero().flatten().tolist() == kept
    assert torch.equal(result[0, kept], logits[0, kept])


def test_top_k_keeps_ties_with_the_last():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    inf = -math.inf
    assert sampling.top_k_filter(logits, 2).tolist() == [[inf, 3, 2, 2], [4, 3, inf, inf]]
    assert torch.equal(sampling.top_k_filter(logits, 9), logits)


def test_choice_by_hand():
    logits, uniform = torch.tensor([[0.0, 1.0, 0.5]]), torch.tensor([[0.9, 0.2, 0.5]])
    gumbel = [-math.log(-math.log(u)) for u in (0.9, 0.2, 0.5)]  # 2.25, -0.48, 0.37
    assert sampling.gumbel(uniform[0]).tolist() == pytest.approx(gumbel, abs=1e-6)
    assert sampling.gumbel(uniform).dtype == torch.float64
    assert sampling.gumbel_choice(logits, 0).tolist() == [1]
    assert sampling.gumbel_choice(logits, 0.2, uniform).tolist() == [1]  # 0.45, 0.90, 0.57
    assert sampling.gumbel_choice(logits, 1.0, uniform).tolist() == [0]  # 2.25, 0.52, 0.87


def test_choice_is_lladas_formula_in_fp64():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 20, generator=generator)
    uniform = torch.rand(500, 20, generator=generator, dtype=torch.float64)
    for temperature in (0.3, 1.0, 1.7):
        published = (logits.double().exp() / (-uniform.log()) ** temperature).argmax(-1)
        assert torch.equal(sampling.gumbel_choice(logits, temperature, uniform), published)
    close = torch.tensor([[0.5, 0.5 + 1e-12]], dtype=torch.float64)  # equal in fp32
    assert sampling.gumbel_choice(torch.zeros(1, 2), 1.0, close).tolist() == [1]
    assert sampling.gumbel_choice(torch.zeros(1, 2), 1.0, torch.tensor([[0.0, 0.1]])).tolist() == [1]  # log 0


@pytest.mark.parametrize("settings", [LLaDAGeneration(temperature=2.0), DreamGeneration(temperature=2.0)])
def test_tokens_have_the_tempered_distribution(settings):
    """LLaDA's confidence is the probability before the temperature, Dream's after it."""
    uniform = torch.rand(40_000, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = logs(0.6, 0.3, 0.1)
    tempered = (logits / 2).softmax(-1)[0]  # (V,)
    shaped = settings.shape_logits(logits)  # (1, V)
    result = sampling.gumbel_choice(shaped.expand(40_000, 3), settings.draw_temperature, uniform).bincount() / 40_000
    assert result.tolist() == pytest.approx(tempered.tolist(), abs=0.01)
    expected = 0.3 if type(settings) is LLaDAGeneration else -(tempered * -tempered.log()).sum().item()
    assert settings.confidence(shaped, torch.tensor([1])).item() == pytest.approx(expected)


def test_dream_shapes_by_temperature_then_top_p_then_top_k():
    logits = logs(0.4, 0.3, 0.2, 0.1)
    inf = -math.inf
    flat = DreamGeneration(temperature=10.0, top_p=0.6).shape_logits(logits)[
        0
    ]  # at 0.27, 0.26, 0.25, 0.23 three are needed
    assert flat.tolist() == pytest.approx([*(logits[0, :3] / 10).tolist(), inf])
    # the cut by top-p sees all tokens: after top-k 0.4 / 0.7 alone would pass 0.5
    assert DreamGeneration(top_p=0.5, top_k=2).shape_logits(logits)[0].isfinite().tolist() == [True, True, False, False]
    assert DreamGeneration(top_p=0.95, top_k=1).shape_logits(logits)[0].isfinite().tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert DreamGeneration(top_p=1.0).shape_logits(logits) is logits


def test_confidences():
    logits = torch.cat((logs(0.2, 0.5, 0.3), logs(0.1, 0.1, 0.8)))
    assert sampling.token_probability(logits, torch.tensor([1, 0])).tolist() == pytest.approx([0.5, 0.1])
    assert sampling.top_margin(logits).tolist() == pytest.approx([0.2, 0.7])
    entropy = [sum(p * math.log(p) for p in row) for row in ((0.2, 0.5, 0.3), (0.1, 0.1, 0.8))]
    assert sampling.negative_entropy(logits).tolist() == pytest.approx(entropy)
    certain = torch.tensor([[0.0, -math.inf]])  # what a filter leaves: no NaN
    assert sampling.negative_entropy(certain).item() == pytest.approx(0, abs=1e-6)
    assert sampling.top_margin(certain).item() == 1


def test_top_positions():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.8], [0.1, 0.2, 0.3, 0.4], [0.7, 0.7, 0.7, 0.7], [0.3, 0.2, 0.1, 0.0]])
    eligible = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    result = sampling.top_positions(scores, eligible, torch.tensor([2, 4, 2, 0]))
    # the best allowed and the earlier of two equal; all there are; the earlier ones; none
    assert result.long().tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_alg_temp_draws_positions_from_the_softmax_of_confidence():
    settings, rows = DreamGeneration(alg="maskgit_plus", alg_temp=0.5), 40_000
    uniform = torch.rand(rows, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    confidence = torch.tensor([0.9, 0.5, 0.1, 0.7])
    eligible = torch.tensor([1, 1, 1, 0]).bool().expand(rows, 4)
    scores = settings.scores(confidence.expand(rows, 4), uniform)  # (R, 4)
    one = sampling.top_positions(scores, eligible, torch.ones(rows, dtype=torch.long)).float().mean(0)
    p = (confidence[:3] / 0.5).softmax(0)
    assert one.tolist() == pytest.approx([*p.tolist(), 0], abs=0.01)
    two = sampling.top_positions(scores, eligible, torch.full((rows,), 2)).float().mean(0)
    inclusion = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(3) if j != i) for i in range(3)]  # without return
    assert two[:3].tolist() == pytest.approx([value.item() for value in inclusion], abs=0.01)


def test_origin_reveals_each_mask_with_its_share():
    settings = DreamGeneration(alg="origin", steps=4, eps=0.2)  # shares 0.2, 0.25, 1/3, 1
    scores = torch.tensor([[0.19, 0.21, 0.26, 0.99]], dtype=torch.float64)
    eligible = torch.tensor([[True, True, True, True]])
    counts = settings.counts(0, torch.tensor([4]), torch.tensor([4]))
    result = [settings.reveal(step, scores, eligible, counts).sum().item() for step in range(4)]
    assert result == [1, 2, 3, 4]
