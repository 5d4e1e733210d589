"""Sinks planted by construction, one that stays and one that moves: policies tell them apart, in both pruning paths.

Two tokens draw the attention of every query: STAYS is visible at one place at all levels; MOVES stands at as many
places as there are levels and is visible at another one at each. Attention adds nothing to the stream, so the one
block's MLP reads the embeddings: one channel each fires at STAYS, at MOVES, at text and at masks, and nowhere else, so
that its Gram matrix is diagonal and known. All consumer columns have equal norms.
"""

import math

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import Config, SinkSettings, StructuredSettings
from structprune.masking.blocks import mask_readers
from structprune.masking.request import MaskRequest
from structprune.masking.rows import plan_walk
from structprune.masking.scores.linears import Removal
from structprune.masking.walk import Walk
from structprune.models.adapter import Adapter
from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.layers_structprune import Layout
from structprune.models.modeling_structprune import StructpruneLLaDA
from structprune.runs.resolve import resolve_masking
from structprune.statistics.moments import consumer_moments
from structprune.statistics.norms import one_shot_norms
from structprune.statistics.policies import instability, policy_report, survival
from structprune.statistics.rows import measure_mass
from structprune.statistics.scan import Limits, Scan
from structprune.statistics.sink_log import SinkLog
from structprune.statistics.sinks import keep_weights, sink_phi
from structprune.structured.ranking import rank_units

STAYS, MOVES, TEXT, MASK = range(4)  # token ids, and the channel that fires at each
WIDTH, HEADS, DIM, LENGTH, LEVELS = 8, 2, 4, 16, 4
GAINS = (2.0, 2.0, 0.75, 3.0)  # of the channels' gate and up
PLACES = [(3, (6, 9, 12, 15)), (8, (1, 5, 2, 11))]  # of STAYS, and of MOVES at each level, in each window
POLICIES = ("all", "unstable", "none")


def planted_model() -> StructpruneLLaDA:
    config = StructpruneLLaDAConfig(
        d_model=WIDTH, n_heads=HEADS, n_layers=1, mlp_hidden_size=4, vocab_size=4, embedding_size=4,
        max_sequence_length=LENGTH, rope_theta=1e8, mask_token_id=MASK,
    )  # fmt: skip
    model = StructpruneLLaDA(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
        model.embedding.weight[:, 4] = 1  # a constant, and the token's own flag: the norm makes 2 of each
        model.embedding.weight[:, :4] = torch.eye(4)
        block = Adapter(model).blocks[0]
        for head in range(HEADS):
            slow = head * DIM + 1  # RoPE turns this pair by 1e-4 a position: not at all
            block["query"].weight[slow, 4] = block["key"].weight[slow, [STAYS, MOVES]] = 3**0.5  # score 6
        for channel, gain in enumerate(GAINS):
            block["gate"].weight[channel, channel] = block["up"].weight[channel, channel] = gain
            block["down"].weight[:, channel] = 0.1
    return model


@pytest.fixture(scope="module")
def planted():
    """The planted model's adapter, and its calibration."""
    ids = torch.full((len(PLACES), LENGTH), TEXT)  # (N, T)
    for row, (stays, moves) in zip(ids, PLACES):
        row[stays], row[list(moves)] = STAYS, MOVES
    noisy = ids[:, None].repeat(1, LEVELS, 1)  # (N, S, T)
    for window, (_, moves) in zip(noisy, PLACES):
        for level in range(LEVELS):
            window[level, [place for index, place in enumerate(moves) if index != level]] = MASK
    p = torch.linspace(0.2, 0.8, LEVELS).repeat(len(PLACES), 1)  # (N, S)
    return Adapter(planted_model()), Calibration(ids, noisy, p, {}, held_out=0)


def mask_request(adapter: Adapter, policy: str, score: str, batch: int) -> MaskRequest:
    """A run for masks on the noisy sink arm, without a refit."""
    config = Config.load(overrides={
        "method": "unstructured", "masking.score": score, "masking.arm": "masked+sink", "sink.policy": policy,
        "reconstruct.enabled": False, "calibration.batch": batch, "calibration.length": LENGTH,
        "memory.budget_gb": 1,
    })  # fmt: skip
    return resolve_masking(config, adapter.model)


def fires(channel: int) -> float:
    """silu(g) * u, with a normed flag of 2."""
    x = 2 * GAINS[channel]
    return x * x / (1 + math.exp(-x))


def squares(policy: str) -> torch.Tensor:
    """Σ ω² x² of each channel by hand, over 2 windows x 4 levels: 1 STAYS, 1 MOVES, 3 masks and 11 text each."""
    # at one level of four: variance 3/16, so 1 - 3/4 is kept
    stays, moves = {"all": (0, 0), "unstable": (1, 0.25), "none": (1, 1)}[policy]
    rows = len(PLACES) * LEVELS
    return torch.tensor([
        rows * stays * fires(STAYS) ** 2,
        rows * moves**2 * fires(MOVES) ** 2,
        rows * (LENGTH - 5) * fires(TEXT) ** 2,
        rows * 3 * fires(MASK) ** 2,
    ]).double()  # fmt: skip


FIRST = {"all": {STAYS, MOVES}, "unstable": {MOVES}, "none": {TEXT}}  # the channels that are worth least


def test_what_is_planted_decides():
    for policy, least in FIRST.items():
        ranked = squares(policy).argsort().tolist()
        assert set(ranked[: len(least)]) == least


def test_the_measures_find_both_sinks(planted):
    adapter, calibration = planted
    mass = measure_mass(Scan(*planted))  # (N, S, T)
    # every query gives e⁶ parts of 2 e⁶ + 14 to each of the two sinks, in each of 2 heads
    expected = torch.full_like(mass, HEADS * LENGTH / (2 * math.exp(6) + LENGTH - 2))  # (N, S, T)
    is_sink = (calibration.noisy_ids == STAYS) | (calibration.noisy_ids == MOVES)
    expected[is_sink] *= math.exp(6)
    assert torch.allclose(mass, expected, rtol=1e-3)
    phi = sink_phi(mass, SinkSettings())
    assert torch.equal(phi > 0.5, is_sink)
    for window, (stays, moves) in enumerate(PLACES):
        assert survival(phi)[window, stays] == 1 and (survival(phi)[window, list(moves)] == 1 / LEVELS).all()
        assert instability(phi)[window, stays] < 1e-6
        assert torch.allclose(instability(phi)[window, list(moves)], torch.tensor(3 / 16), atol=1e-5)
        assert survival(phi)[window].count_nonzero() == 1 + LEVELS


def test_unstable_spares_the_sink_that_stays(planted):
    adapter, calibration = planted
    mass = measure_mass(Scan(*planted))
    for policy, stays, moves in (("all", 0.0, 0.0), ("unstable", 1.0, 0.25), ("none", 1.0, 1.0)):
        weights = keep_weights(mass, SinkSettings(policy=policy))  # (N, S, T)
        for token, kept in ((STAYS, stays), (MOVES, moves), (TEXT, 1.0), (MASK, 1.0)):
            result = weights[calibration.noisy_ids == token]
            assert torch.allclose(result, torch.full_like(result, kept), atol=1e-5), (policy, token)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("windows, budget", [(1, 2**30), (2, 2**30), (1, 0)])
def test_moments_of_the_structured_path_by_hand(planted, policy, windows, budget):
    adapter, calibration = planted
    scan = Scan(adapter, calibration, SinkSettings(policy=policy), Limits(windows, budget))
    result = consumer_moments(scan, "masked+sink")
    assert torch.allclose(result[0, "down"].squared_norm, squares(policy), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("score", ["wanda", "obs"])
def test_the_structured_path_removes_what_the_policy_says(planted, policy, score):
    settings = StructuredSettings(score=score, relative=False if score == "obs" else None)
    paths = rank_units(Scan(*planted, SinkSettings(policy=policy)), settings, "masked+sink")
    least = FIRST[policy]
    assert set(paths[0, "channels"].removed(len(least))) == least
    if score == "wanda":  # every column of `down` has the squared norm 8 * 0.01
        cost = paths[0, "channels"].cost
        assert torch.allclose(cost, 0.08 * squares(policy).sort().values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("summed", [False, True])
def test_norms_see_all_levels_of_a_window_whatever_the_batch(planted, policy, batch, summed):
    scan = Scan(*planted, SinkSettings(policy=policy), Limits(batch=batch))
    result = one_shot_norms(scan, "masked+sink", summed)[0, "activated"]
    # all sequences are alike, so the sum of their 8 norms is 8 times that of an eighth of the squares
    expected = 8 * (squares(policy) / 8).sqrt() if summed else squares(policy).sqrt()
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_grams_of_the_mask_path_by_hand(planted, policy, batch):
    adapter, calibration = planted
    request = mask_request(adapter, policy, "sparsegpt", batch)
    plan = plan_walk(Scan(adapter, calibration, request.sink, request.limits), request)
    gram = Walk(adapter, adapter, plan, request.limits).measure(0)["activated"]  # (4, 4)
    assert torch.allclose(gram.double(), squares(policy).diag(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("score", ["wanda", "ria", "sparsegpt"])
def test_the_mask_path_removes_what_the_policy_says(planted, policy, score):
    adapter, calibration = planted
    request, removal = mask_request(adapter, policy, score, 3), Removal(0.25 * len(FIRST[policy]))
    plan = plan_walk(Scan(adapter, calibration, request.sink, request.limits), request)
    if score == "sparsegpt":  # which removes one entry more than the ratio
        removal = Removal(0.25 * len(FIRST[policy]) - 1 / 32)
    statistics = {"activated": Walk(adapter, adapter, plan, request.limits).measure(0)["activated"]}
    arguments = (adapter.blocks[0], "activated", request, removal, statistics, torch.device("cpu"))
    kept = mask_readers(*arguments)[0]["down"][1]  # (O, C)
    assert all(set((~row).nonzero().flatten().tolist()) == FIRST[policy] for row in kept)


def test_clean_rows_lose_the_mean_over_the_levels(planted):
    for policy, stays, moves in (("all", 0.0, 0.75), ("unstable", 1.0, 1 - 0.75 / 4)):
        result = consumer_moments(Scan(*planted, SinkSettings(policy=policy)), "clean+sink")[0, "down"]
        # clean text shows all places of MOVES at once, each a sink at one level of four
        expected = torch.tensor([2 * stays**2 * fires(STAYS) ** 2, 8 * moves**2 * fires(MOVES) ** 2])
        assert torch.allclose(result.squared_norm[:2], expected.double(), rtol=1e-4, atol=1e-6)


def test_the_report_tells_what_went(planted):
    adapter, calibration = planted
    log = SinkLog()
    consumer_moments(Scan(*planted, SinkSettings(policy="unstable"), observe=log.observe), "masked+sink")
    result = log.report(calibration, SinkSettings(policy="unstable"), MASK, Layout())
    whole = SinkLog()
    one_shot_norms(Scan(*planted, limits=Limits(batch=3), observe=whole.observe), "masked+sink")
    assert whole.report(calibration, SinkSettings(), MASK, Layout())["taken"].keys() == result["taken"].keys()
    assert result["taken"]["all"]["share"] == pytest.approx(2 / LENGTH, rel=1e-4)  # both sinks of every copy
    assert result["taken"]["unstable"]["share"] == pytest.approx(0.75 / LENGTH, rel=1e-4)
    assert result["taken"]["unstable"]["by_level"] == pytest.approx([0.75 / LENGTH] * LEVELS, rel=1e-4)
    places = {place for place, _ in result["taken"]["unstable"]["top"][:8]}
    assert places == {place for _, moves in PLACES for place in moves}
    assert result["taken"]["all"]["of_mask"] == pytest.approx(0, abs=1e-5)
    assert result["survival"] == pytest.approx((1 + LEVELS / LEVELS) / (1 + LEVELS))  # of 1 + 4 places a window
    phi = sink_phi(measure_mass(Scan(*planted)), SinkSettings())
    again = policy_report(phi, calibration.noisy_ids == MASK, "unstable")
    assert again["taken"]["unstable"]["share"] == pytest.approx(result["taken"]["unstable"]["share"])
