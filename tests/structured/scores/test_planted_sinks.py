"""Sinks planted by construction: which units go depends on whether sink rows count, and the right ones go.

Two token ids (SINK_1, SINK_2) have a key that every head's ordinary query attends to. Heads 0 and 1 and channels 0 and
1 are loud at the positions of one of the two sinks each and silent elsewhere; heads 2 and 3 and channels 2 and 3 speak
more softly, but at ordinary tokens. So with all rows counted the soft units are the cheapest, and with the sink rows
weighted down the loud ones are. All consumer columns have equal norms.
"""

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import StructuredSettings
from structprune.models.adapter import Adapter
from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.modeling_structprune import StructpruneLLaDA
from structprune.statistics.scan import Scan
from structprune.structured.ranking import rank_units

SINK_1, SINK_2, CONTENT, MASK = 1, 2, 3, 63  # content tokens are CONTENT .. CONTENT + 15: four bits
CONST, FLAG_1, FLAG_2, BITS, FILL, OUT = 0, 1, 2, (3, 4, 5, 6), 7, 8  # features of the residual stream
HEADS, DIM, WIDTH, LENGTH, BLOCKS = 4, 4, 16, 32, 2
LOUD, SOFT = {0, 1}, {2, 3}
DAMPING = 0.01


def embeddings() -> torch.Tensor:
    """(64, 16): a constant, the token's flag or bits, and a fill that gives all tokens the same norm, sqrt(6)."""
    table = torch.zeros(64, WIDTH)
    table[:, CONST] = 1
    table[SINK_1, FLAG_1] = table[SINK_2, FLAG_2] = 1
    for token in range(16):
        for place, feature in enumerate(BITS):
            table[CONTENT + token, feature] = token >> place & 1
    table[:, FILL] = (6 - table.pow(2).sum(1)).sqrt()
    return table


def planted_model() -> StructpruneLLaDA:
    config = StructpruneLLaDAConfig(
        d_model=WIDTH, n_heads=HEADS, n_layers=BLOCKS, mlp_hidden_size=4, vocab_size=64, embedding_size=64,
        max_sequence_length=LENGTH, rope_theta=1e8, mask_token_id=MASK,
    )  # fmt: skip
    model = StructpruneLLaDA(config).eval()
    with torch.no_grad():
        model.embedding.weight.copy_(embeddings())
        for block in Adapter(model).blocks:
            for role in ("query", "key", "value", "attention_output", "gate", "up", "down"):
                block[role].weight.zero_()
            for head in range(HEADS):
                slow = head * DIM + 1  # RoPE turns this pair by 1e-4 a position: not at all
                query, key, value = (block[role].weight for role in ("query", "key", "value"))
                key[slow, [FLAG_1, FLAG_2]] = 3.0
                query[slow, CONST] = 3.0  # every query attends to the sinks, but
                if head in LOUD:  # its own sink's does to everything else, where loud values are
                    query[slow, FLAG_1 + head] = -6.0
                    value[head * DIM, CONST] = 10.0
                    value[head * DIM, [FLAG_1, FLAG_2]] = -10.0
                else:  # a content bit's does to everything alike, and values are at the sinks
                    query[slow, BITS[head - 2]] = -3.0
                    value[head * DIM, [FLAG_1, FLAG_2]] = 1.0
                block["attention_output"].weight[OUT + head, head * DIM] = 0.1
            for channel in range(4):
                feature, gain = (FLAG_1 + channel, 4.0) if channel in LOUD else (BITS[channel], 1.0)
                block["gate"].weight[channel, feature] = block["up"].weight[channel, feature] = gain
                block["down"].weight[OUT + HEADS + channel, channel] = 0.02
    return model


def planted_calibration() -> Calibration:
    """Content at random, one sink of each kind per window at a random place, half of the content masked."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(CONTENT, CONTENT + 16, (6, LENGTH), generator=generator)
    for row in ids:
        row[torch.randperm(LENGTH, generator=generator)[:2]] = torch.tensor([SINK_1, SINK_2])
    noisy = ids[:, None].repeat(1, 2, 1)  # (N, S, T)
    drawn = torch.rand(noisy.shape, generator=generator) < torch.tensor([0.3, 0.6])[:, None]
    noisy[drawn & (noisy >= CONTENT)] = MASK
    return Calibration(ids, noisy, torch.tensor([[0.3, 0.6]]).repeat(6, 1), {}, held_out=0)


def plain_forward(model, ids):
    """Attention mass (R, T), and what consumers read: (block, kind) -> (R*T, C). Full matrices, fp64, no RoPE."""
    x, mass, reads = embeddings().double()[ids], 0.0, {}
    normed = lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()  # noqa: E731
    for block in Adapter(model).blocks:
        w = {role: block[role].weight.double() for role in block.names}
        q, k, v = (
            (normed(x) @ w[role].T).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for role in ("query", "key", "value")
        )
        attention = torch.softmax(q @ k.transpose(2, 3) / DIM**0.5, dim=-1)  # (R, H, T, T)
        mass = mass + attention.sum(dim=(1, 2))
        mixed = (attention @ v).transpose(1, 2).flatten(2)
        reads[block.index, "attention"] = mixed.flatten(0, 1)
        x = x + mixed @ w["attention_output"].T
        gate, up = normed(x) @ w["gate"].T, normed(x) @ w["up"].T
        reads[block.index, "channels"] = (gate * torch.sigmoid(gate) * up).flatten(0, 1)
        x = x + reads[block.index, "channels"].view(*ids.shape, -1) @ w["down"].T
    return mass, reads


def plain_weights(mass, sinks_count: bool):
    """ω of every row: 1 where sinks count like any other, else 1 - φ."""
    if sinks_count:
        return torch.ones_like(mass).flatten()
    threshold = mass.mean(1, keepdim=True) + 2 * mass.std(1, correction=0, keepdim=True)
    return 1 - torch.sigmoid(5 * (mass - threshold)).flatten()


def least_rise(weight, hessian, gone):
    """min over W' without the columns `gone` of ½ tr((W' - W) H (W' - W)ᵀ)."""
    keep = [c for c in range(weight.shape[1]) if c not in gone]
    root = torch.linalg.cholesky(hessian).T
    best = torch.zeros_like(weight)
    best[:, keep] = torch.linalg.lstsq(root[:, keep], root @ weight.T).solution.T
    return 0.5 * ((best - weight) @ root.T).pow(2).sum().item()


def plain_choice(score, x, weight, omega, units) -> set[int]:
    """The two units that go first, by hand."""
    width, square = weight.shape[1] // units, omega[:, None] ** 2
    if score == "obs":
        gram = (square * x).T @ x / square.sum()
        hessian = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram)).double()
        gone: list[int] = []
        for _ in range(2):
            columns = lambda u: [c for unit in (*gone, u) for c in range(unit * width, (unit + 1) * width)]  # noqa: E731
            gone.append(min(set(range(units)) - set(gone), key=lambda u: least_rise(weight, hessian, columns(u))))
        return set(gone)
    center = (square * x).sum(0) / square.sum() if score == "fluctuation" else 0.0
    costs = ((square * (x - center) ** 2).sum(0) * weight.pow(2).sum(0)).view(units, -1).sum(1)
    return set(costs.argsort()[:2].tolist())


def check_choices(score):
    """`masked` removes the soft units and `masked+sink` the loud ones, as computed by hand, in every block."""
    model, calibration = planted_model(), planted_calibration()
    mass, reads = plain_forward(model, calibration.noisy_ids.flatten(0, 1))
    # obs weighs rows by their residual's RMS by default; off here, so that only the sinks differ
    settings = StructuredSettings(score=score, damping=DAMPING, relative=False if score == "obs" else None)
    for arm, expected in (("masked", SOFT), ("masked+sink", LOUD)):
        omega = plain_weights(mass, sinks_count=arm == "masked")
        paths = rank_units(Scan(Adapter(model), calibration), settings, arm)
        for block in Adapter(model).blocks:
            for kind, role in (("attention", "attention_output"), ("channels", "down")):
                key = block.index, kind
                assert plain_choice(score, reads[key], block[role].weight.double(), omega, 4) == expected, (key, arm)
                assert set(paths[key].removed(2)) == expected, (key, arm)


SCORES = ["wanda", "fluctuation", "obs"]


@torch.no_grad()
def test_the_planted_tokens_are_the_sinks():
    ids = planted_calibration().noisy_ids.flatten(0, 1)
    mass, _ = plain_forward(planted_model(), ids)
    omega = plain_weights(mass, sinks_count=False).view(ids.shape)
    planted = (ids == SINK_1) | (ids == SINK_2)
    assert planted.sum(1).eq(2).all()
    assert omega[planted].max() < 1e-6 and omega[~planted].min() > 1 - 1e-6


@pytest.mark.parametrize("score", SCORES)
@torch.no_grad()
def test_sinks_decide_which_heads_and_channels_go(score):
    check_choices(score)


@pytest.mark.parametrize("score", SCORES)
@torch.no_grad()
def test_without_phi_the_arms_agree_and_the_check_above_fails(score, monkeypatch):
    monkeypatch.setattr("structprune.statistics.sinks.sink_mask", lambda mass, *_: torch.zeros_like(mass))
    with pytest.raises(AssertionError):
        check_choices(score)
    scan, settings = Scan(Adapter(planted_model()), planted_calibration()), StructuredSettings(score=score)
    masked, weighted = (rank_units(scan, settings, arm) for arm in ("masked", "masked+sink"))
    for key in masked:
        assert masked[key].removed(2) == weighted[key].removed(2) == sorted(SOFT)


@torch.no_grad()
def test_the_default_obs_sees_the_sinks_too():
    scan, settings = Scan(Adapter(planted_model()), planted_calibration()), StructuredSettings(score="obs")
    for arm, expected in (("masked", SOFT), ("masked+sink", LOUD)):
        paths = rank_units(scan, settings, arm)
        assert all(set(path.removed(2)) == expected for path in paths.values())
