"""Trajectories of diffusion LMs against the full attention matrix of what the model was given."""

import pytest
import torch

from structprune.generation.generate import Options, generate
from structprune.generation.samplers import generation_settings
from structprune.models.adapter import Adapter
from structprune.models.rotary_structprune import rotate
from structprune.sinks.diffusion import forward_trajectory, reverse_trajectory
from structprune.statistics import capture, sinks
from structprune.statistics.capture import HeadMeter

PLAIN = lambda items, title: items  # noqa: E731


@torch.no_grad()
def full_mass(model, ids, visible=None, positions=None):
    """(B, T) incoming attention over all layers and heads, from whole matrices, in shares of what a position would get
    if every query looked at all that it sees alike.

    Args:
        visible: (T, T) bool, keys that queries see; None: all. positions: (1, T); None: 0..
    """
    x, rotary, mass = model.embedding(ids), model.rotary(ids.shape[1], ids.device, position_ids=positions), 0
    visible = torch.ones(2 * (ids.shape[1],), dtype=torch.bool) if visible is None else visible
    for view in Adapter(model).blocks:
        h = view.module.part("attention_norm")(x)  # (B, T, C)
        query, key = (view[role](h).unflatten(-1, (-1, view.head_dim)).transpose(1, 2) for role in ("query", "key"))
        if "query_norm" in view.module.roles:
            query, key = view.module.part("query_norm")(query), view.module.part("key_norm")(key)
        key = rotate(key, *rotary).repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # (B, H, T, D)
        scores = rotate(query, *rotary) @ key.transpose(2, 3) / view.head_dim**0.5  # (B, H, T, T)
        mass = mass + scores.masked_fill(~visible, -torch.inf).softmax(-1).sum((1, 2))  # (B, T)
        x = view.module(x, rotary, visible[None, None])
    return mass / (visible / visible.sum(-1, keepdim=True)).sum(0)


@pytest.fixture(params=["llada", "dream"])
def model(request, tiny_model):
    return tiny_model(request.param)


def test_noise_levels_go_from_noise_to_text(model):
    windows = torch.randint(0, 2000, (3, 20), generator=torch.Generator().manual_seed(0))
    result = forward_trajectory(model, windows, 5, 0, PLAIN)
    masked = result.ids == model.config.mask_token_id  # (N, S, T)
    assert (result.ids[~masked] == windows[:, None].expand_as(result.ids)[~masked]).all()
    assert (result.progress.diff(dim=1) > 0).all()
    if model.edges_visible:
        assert not masked[..., [0, -1]].any()
    else:
        assert torch.allclose(result.progress[0], 0.999 * torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8]))
        assert masked[:, 0].all() and masked[:, -1].float().mean() < 0.5
    assert torch.allclose(result.mass.flatten(0, 1), full_mass(model, result.ids.flatten(0, 1)), rtol=1e-4)
    again = forward_trajectory(model, windows, 5, 0, PLAIN)
    assert torch.equal(result.ids, again.ids)


@pytest.mark.parametrize("family", ["sdar", "a2d-qwen3-blocks", "llada2"])
def test_noise_levels_of_block_diffusion_see_clean_text_before_their_block(tiny_model, family):
    """A position gets the mass of both its tokens, the noisy and the clean one, half of each."""
    model, size = tiny_model(family), 4
    windows = torch.randint(0, 2000, (3, 10), generator=torch.Generator().manual_seed(0))
    result = forward_trajectory(model, windows, 4, 0, PLAIN)
    noisy = result.ids.flatten(0, 1)  # (N * S, T)
    block = torch.arange(10) // size  # (T,)
    same, before = block[:, None] == block, block[:, None] > block
    visible = torch.cat((torch.cat((same, before), 1), torch.cat((torch.zeros_like(same), same | before), 1)))
    rows = torch.cat((noisy, windows.repeat_interleave(4, 0)), dim=1)  # (N * S, 2 T)
    whole = full_mass(model, rows, visible, torch.arange(10).repeat(2)[None])
    assert torch.allclose(result.mass.flatten(0, 1), (whole[:, :10] + whole[:, 10:]) / 2, rtol=1e-4)
    assert not torch.allclose(result.mass.flatten(0, 1), full_mass(model, noisy), rtol=0.1)


@pytest.mark.parametrize("family", ["sdar", "a2d-qwen3-blocks", "llada2"])
def test_generation_in_blocks_sees_none_behind_the_block_under_way(tiny_model, family):
    """Positions behind it have no mass yet, and text before it does not see it."""
    model, size = tiny_model(family), 4
    prompts = torch.randint(0, 2000, (3, 7), generator=torch.Generator().manual_seed(1))
    settings = generation_settings(model.config, {"gen_length": 6, "steps": 6})
    result = reverse_trajectory(model, prompts, settings, 0, PLAIN)
    ends = (~result.mass[0].isnan()).sum(-1)  # (S,)
    assert set(ends.tolist()) <= {8, 12, 16} and len(set(ends.tolist())) > 1 and (ends.diff() >= 0).all()
    for step, end in enumerate(ends.tolist()):
        block, mass = torch.arange(end) // size, result.mass[:, step]  # (t,), (N, T)
        expected = full_mass(model, result.ids[:, step, :end], block[:, None] >= block)
        assert torch.allclose(mass[:, :end], expected, rtol=1e-4) and mass[:, end:].isnan().all()
        assert (result.ids[:, step, end:] == model.config.mask_token_id).all()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_blocks_without_attention_have_no_heads(gap_pair, family):
    """Every block has its place in the figures; mass comes from those with attention."""
    gapped, whole = gap_pair(family)
    windows = torch.randint(0, 2000, (2, 12), generator=torch.Generator().manual_seed(0))
    ours, theirs = (forward_trajectory(model, windows, 2, 0, PLAIN) for model in (gapped, whole))
    heads = Adapter(gapped).blocks[1].widths.query_heads
    assert [len(layer) for layer in ours.strength] == [len(layer) for layer in ours.sinks] == [heads, heads, 0, 0]
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(ours.strength[:2], theirs.strength))
    assert torch.allclose(ours.mass.sum(-1), torch.tensor(float(2 * heads * 12))) and ours.heads == 2 * heads
    asked = {"gen_length": 6, "steps": 3} | ({} if gapped.shifted else {"block_length": 6})
    made = reverse_trajectory(gapped, windows, generation_settings(gapped.config, asked), 0, PLAIN)
    assert [len(layer) for layer in made.strength] == [heads, heads, 0, 0]


def test_generation_is_the_samplers_own(model):
    prompts = torch.randint(0, 2000, (3, 7), generator=torch.Generator().manual_seed(1))
    asked = {"gen_length": 6, "steps": 3} | ({} if model.shifted else {"block_length": 6})
    settings = generation_settings(model.config, asked)
    result = reverse_trajectory(model, prompts, settings, 0, PLAIN)
    given = []
    generate(model, prompts, settings, options=Options(record=lambda step: given.append(step.ids)))
    assert torch.equal(result.ids, torch.stack(given, dim=1))  # (N, S, T)
    assert torch.equal(result.ids[:, :, :7], prompts[:, None].expand(3, 3, 7)) and result.prompt == 7
    left = (result.ids == model.config.mask_token_id).sum(2)  # (N, S)
    assert (left[:, 0] == 6).all() and (left.diff(dim=1) < 0).all()
    assert torch.allclose(result.mass.flatten(0, 1), full_mass(model, result.ids.flatten(0, 1)), rtol=1e-4)
    assert torch.allclose(result.progress[0], torch.tensor([0.0, 1 / 3, 2 / 3]))
    assert not any("forward" in vars(view.core) for view in Adapter(model).blocks)


@pytest.mark.parametrize("one_pass", [0, 1024])
@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_length(tiny_model, largest, monkeypatch, one_pass):
    monkeypatch.setattr(capture, "ONE_PASS", one_pass)
    monkeypatch.setattr(sinks, "TILE_BYTES", {"cpu": 2**15})
    model = tiny_model(max_sequence_length=1024, n_layers=1)
    ids = torch.zeros(1, 512, dtype=torch.long)
    with largest() as plain:
        model.encode(ids)
    with HeadMeter().on(Adapter(model).cores) as meter, largest() as metered:
        model.encode(ids)
    assert metered.size <= max(plain.size, 2 * 2**15) < 512**2
    assert meter.take()[0].shape == (1, 4, 512)
