"""Block diffusion: one pass over a noisy window and its clean text against a pass for every block."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from structprune import load_model, save_pruned
from structprune.calibration.batches import Calibration
from structprune.config import ExportSettings, SinkSettings
from structprune.errors import UserError
from structprune.evaluation.likelihood import MaskedRows, token_nats
from structprune.evaluation.nelbo import masked_nelbo
from structprune.models.adapter import Adapter
from structprune.models.blockwise_structprune import Pairs, block_mask, pair_mask
from structprune.models.encode import Batches, encode_noisy, encode_rows
from structprune.recovery.settings import LossSettings
from structprune.recovery.student import Lesson, loss_of
from structprune.statistics.gradients import gradient_sums
from structprune.statistics.hidden import HiddenStates
from structprune.statistics.norms import one_shot_norms
from structprune.statistics.rows import arm_rows, mass_of, scan_rows
from structprune.statistics.scan import Limits, Scan
from structprune.statistics.sinks import even_mass
from tests.conftest import MASK_ID

SIZE, LENGTH = 4, 11  # the last block is a token short
SINK = SinkSettings()


@pytest.fixture
def model(tiny_model):
    """A random SDAR model with blocks of four tokens."""
    return tiny_model("sdar")


@pytest.fixture
def windows() -> Calibration:
    """Three windows at two noise levels."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 2000, (3, LENGTH), generator=generator)  # (N, T)
    p = torch.tensor([[0.3, 0.6], [0.4, 0.7], [0.5, 0.9]])  # (N, L)
    noisy = ids[:, None].repeat(1, 2, 1)  # (N, L, T)
    noisy[torch.rand(noisy.shape, generator=generator) < p[..., None]] = MASK_ID
    return Calibration(ids, noisy, p, {}, held_out=0)


@torch.no_grad()
def by_block(model, noisy: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Hidden states of noisy tokens from a pass for every block, clean text before it: (B, T) -> (B, T, C)."""
    parts = []
    for start in range(0, noisy.shape[1], SIZE):
        ids = torch.cat((clean[:, :start], noisy[:, start : start + SIZE]), dim=1)
        parts.append(model.encode(ids)[:, start:])  # (B, n, C)
    return torch.cat(parts, dim=1)


def test_the_size_of_blocks_must_be_known(tiny_checkpoint):
    with pytest.raises(UserError, match="config.json has no positive integer 'block_size', which sdar needs"):
        load_model(tiny_checkpoint("sdar", block_size=None))
    assert load_model(tiny_checkpoint("sdar", name="other", block_size=8)).layout.size == 8


def test_an_official_export_loads_with_the_files_beside_it(tiny_checkpoint, tmp_path):
    """The published config.json asks for flex attention, which these files do not have."""
    dense = tiny_checkpoint("sdar")
    assert json.loads((dense / "config.json").read_text())["attn_implementation"] == "flex_attention"
    model = load_model(dense)
    directory = save_pruned(model, tmp_path / "out", export=ExportSettings(compat="official"))
    values = json.loads((directory / "config.json").read_text())
    assert values["model_type"] == "sdar" and values["block_size"] == SIZE and "attn_implementation" not in values
    again = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    ids = torch.arange(2 * LENGTH).view(2, LENGTH)  # (B, T)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_masks_by_hand():
    positions = torch.arange(4)[None]  # two blocks of two tokens
    assert block_mask(positions, 2)[0, 0].int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert pair_mask(positions, 2)[0, 0, ::2].int().tolist() == [
        [1, 1, 0, 0, 0, 0, 0, 0],  # noisy, first block: its own
        [0, 0, 1, 1, 1, 1, 0, 0],  # noisy, second block: its own and the clean one before
        [0, 0, 0, 0, 1, 1, 0, 0],  # clean text never sees noise
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]


def test_rows_by_hand():
    layout = Pairs(2)
    noisy, clean = torch.tensor([[[9, 1], [0, 9]]]), torch.tensor([[[0, 1]]])  # (1, 2, T), (1, 1, T)
    rows = layout.rows(noisy, clean)
    assert rows.tolist() == [[[9, 1, 0, 1], [0, 9, 0, 1]]]
    assert [each.tolist() for each in layout.windows(rows)] == [noisy.tolist(), [[[0, 1], [0, 1]]]]
    assert layout.spread(noisy == 9, False).int().tolist() == [[[1, 0, 0, 0], [0, 1, 0, 0]]]


def test_even_attention_has_a_mass_of_one():
    mask = pair_mask(torch.arange(4)[None], 2)  # (1, 1, S, S)
    # noisy keys: by two queries that see two, or four keys; clean ones of the first block by three pairs of queries
    expected = torch.tensor([1.0, 1.0, 0.5, 0.5, 2.0, 2.0, 0.5, 0.5])
    assert torch.allclose(even_mass(mask)[0, 0], expected)
    assert torch.equal(even_mass(torch.ones(1, 1, 3, 3, dtype=torch.bool)), torch.ones(1, 1, 3))


def test_logits_are_those_of_qwen3_with_a_mask_of_blocks(model, windows):
    """The published forward pass takes its mask from the caller, and is Qwen3's else."""
    values = model.config.to_dict()
    keys = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings",
    )  # fmt: skip
    config = transformers.Qwen3Config(**{key: values[key] for key in keys})
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict())
    block = torch.arange(LENGTH) // SIZE
    mask = torch.where(block[:, None] >= block, 0.0, -torch.inf)[None, None]  # (1, 1, T, T)
    with torch.no_grad():
        expected = theirs(windows.input_ids, attention_mask=mask).logits  # (N, T, V)
        logits = model(windows.input_ids).logits
        whole = model(windows.input_ids, attention_mask=torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)).logits
    assert (logits - expected).abs().max() < 1e-5 < 0.01 < (logits - whole).abs().max()


@torch.no_grad()
def test_one_pass_over_a_pair_is_a_pass_for_every_block(model, windows):
    clean, noisy = windows.input_ids, windows.noisy_ids[:, 0]  # (N, T)
    hidden = encode_rows(model, model.layout.rows(noisy, clean))  # (N, 2 T, C)
    assert torch.allclose(hidden[:, :LENGTH], by_block(model, noisy, clean), atol=1e-5)
    assert torch.allclose(hidden[:, LENGTH:], model.encode(clean), atol=1e-5)
    targets = noisy == MASK_ID
    assert torch.allclose(encode_noisy(model, noisy, clean, targets), hidden[:, :LENGTH][targets], atol=1e-5)


@torch.no_grad()
def test_padding_moves_blocks_with_the_text(model, windows):
    ids = windows.input_ids[:1]  # (1, T)
    padded = torch.cat((torch.full((1, 3), 7), ids), dim=1)  # (1, 3 + T)
    real = torch.arange(LENGTH + 3)[None] >= 3  # (1, 3 + T)
    assert torch.allclose(model.encode(padded, real)[:, 3:], model.encode(ids), atol=1e-5)


@torch.no_grad()
def test_losses_and_likelihoods_are_of_blocks_after_clean_text(model, windows):
    clean, noisy, p = windows.input_ids, windows.noisy_ids, windows.mask_probability
    nats = torch.zeros(noisy.shape)  # (N, L, T)
    for level in range(2):
        logits = model.output_head(by_block(model, noisy[:, level], clean))  # (N, T, V)
        nats[:, level] = torch.nn.functional.cross_entropy(logits.transpose(1, 2), clean, reduction="none")
    masked = noisy == MASK_ID  # (N, L, T)
    nats = nats * masked
    expected = nats.sum(2) / p / LENGTH  # (N, L)
    assert torch.allclose(masked_nelbo(model, clean, noisy, p).nelbo, expected.mean(1), rtol=1e-4)
    loss = model(noisy[:, 1], labels=clean, mask_probability=p[:, 1]).loss
    assert torch.allclose(loss, expected[:, 1].mean(), rtol=1e-4)
    lesson = Lesson(LossSettings(kl=0, cross_entropy=1, weighting="nelbo"), None, 0.0)
    assert torch.allclose(loss_of(model, clean, noisy[:, 1], p[:, 1], lesson)["loss"], loss, rtol=1e-4)
    rows = MaskedRows(clean, masked[:, 0], torch.full((3,), 2))
    assert torch.allclose(token_nats(model, rows, 0.0, Batches(64)).float(), nats[:, 0], rtol=1e-4)


@pytest.mark.parametrize("parity", ["sdar"], indirect=True)
def test_the_loss_is_that_of_the_released_training_code(parity):
    """On the noise that it drew; the answer of one row begins behind a prompt."""
    recorded = load_file(parity / "expected.safetensors")
    noisy, labels, p = (recorded[name] for name in ("noisy_ids", "labels", "mask_probability"))  # 2 x (N, T), (N,)
    loss = load_model(parity)(noisy, labels=labels, mask_probability=p).loss
    assert loss.item() == pytest.approx(recorded["loss"].item(), rel=1e-6)


@pytest.mark.parametrize("arm", ["clean", "masked", "masked+sink"])
@torch.no_grad()
def test_statistics_see_the_rows_of_the_layout(model, windows, arm):
    adapter = Adapter(model)
    rows = scan_rows(Scan(adapter, windows, SINK), arm)
    copies = 1 if arm == "clean" else 2
    assert rows.ids.shape == rows.masked.shape == (3 * copies, 2 * LENGTH)
    assert torch.equal(rows.masked[:, :LENGTH], rows.ids[:, :LENGTH] == MASK_ID) and not rows.masked[:, LENGTH:].any()
    states = HiddenStates(adapter, rows.ids, 2, 2**30)
    for block in adapter.blocks:
        for part in states.slices():
            states.write(part, block.module(states.read(part), *states.context))
    last = model.final_norm(states.read(slice(0, len(rows.ids))))  # (R, 2 T, C)
    clean = windows.input_ids.repeat_interleave(copies, 0)
    assert torch.allclose(last[:, :LENGTH], by_block(model, rows.ids[:, :LENGTH], clean), atol=1e-5)


def test_gradients_are_those_of_the_loss(model, windows):
    scan, weight = Scan(Adapter(model), windows, SINK), model.blocks[0].part("down").weight
    (sums,) = gradient_sums(scan, scan_rows(scan, "masked"), [weight])
    clean = windows.input_ids.repeat_interleave(2, 0)  # (R, T)
    loss = model(
        windows.noisy_ids.flatten(0, 1), labels=clean, mask_probability=windows.mask_probability.flatten()
    ).loss
    (expected,) = torch.autograd.grad(loss, weight)
    assert expected.abs().max() > 1e-4 and torch.allclose(sums, expected, rtol=1e-3, atol=1e-7)


def test_norms_are_the_same_within_and_beyond_the_budget(model, windows):
    results = []
    for budget in (2**30, 0):
        results.append(one_shot_norms(Scan(Adapter(model), windows, SINK, Limits(budget=budget)), "masked+sink"))
    assert all(torch.allclose(value, results[1][key], rtol=1e-4) for key, value in results[0].items())


@torch.no_grad()
def test_mass_is_relative_to_what_a_query_sees(model, windows):
    """Queries of zeros attend evenly, so that no token is a sink."""
    for block in model.blocks:
        block.part("query").weight.zero_()
    rows = arm_rows(windows, "masked", SINK, None, MASK_ID, model.layout)
    mass = mass_of(Adapter(model), rows.ids)  # (R, 2 T)
    heads = sum(block.part("query").out_features // 8 for block in model.blocks)
    assert torch.allclose(mass, torch.full_like(mass, heads), rtol=1e-4)
