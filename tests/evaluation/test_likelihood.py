"""Cross-entropy of masked rows against full forward passes, one row at a time."""

import pytest
import torch
import torch.nn.functional as F

from structprune.errors import UserError
from structprune.evaluation.likelihood import MaskedRows, token_nats
from structprune.models import logits
from structprune.models.encode import Batches

MASK, LENGTH = 2047, 9


@pytest.fixture
def rows():
    """Seven rows of two prompts' lengths; the last has no mask, two are equal."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 2000, (7, LENGTH), generator=generator)
    clean[4] = clean[1]
    prompt = torch.tensor([3, 5, 3, 5, 5, 4, 3])
    masked = (torch.rand(7, LENGTH, generator=generator) < 0.6) & (torch.arange(LENGTH) >= prompt[:, None])
    masked[4], masked[6] = masked[1], False
    assert masked[:6].any(1).all()
    return MaskedRows(clean, masked, prompt)


def by_hand(model, rows: MaskedRows, scale: float) -> torch.Tensor:
    """(N, T) one row, one branch and one position at a time."""
    result = torch.zeros(rows.clean.shape, dtype=torch.float64)
    for row, clean, masked, prompt in zip(result, rows.clean, rows.masked, rows.prompt, strict=True):
        noisy = clean.masked_fill(masked, MASK)
        bare = torch.cat((torch.full((int(prompt),), MASK), noisy[prompt:]))
        with_prompt, without = (model(ids[None]).logits[0] for ids in (noisy, bare))  # 2 x (T, V)
        logits = without + (1 + scale) * (with_prompt - without) if scale else with_prompt  # (T, V)
        for position in masked.nonzero().flatten().tolist():
            source = max(position - 1, 0) if model.shifted else position
            row[position] = F.cross_entropy(logits[source], clean[position]).item()
    return result


@pytest.mark.parametrize("scale", [0.0, 0.5])
@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
@torch.inference_mode()
def test_nats_by_hand_for_any_batch_and_order(tiny_model, rows, family, scale, monkeypatch):
    model = tiny_model(family)
    expected = by_hand(model, rows, scale)
    assert torch.equal(expected > 0, rows.masked)
    for tokens in (1, 2 * LENGTH, 5 * LENGTH, 1000):
        result = token_nats(model, rows, scale, Batches(tokens))
        assert result.dtype == torch.float64 and torch.allclose(result, expected, rtol=1e-4)
    order = torch.tensor([5, 2, 6, 0, 4, 3, 1])
    assert torch.allclose(token_nats(model, rows[order], scale, Batches(50)), expected[order], rtol=1e-4)
    monkeypatch.setattr(logits, "LOGIT_BYTES", 4 * 2048 * 3)  # three positions' logits at once
    assert torch.allclose(token_nats(model, rows, scale, Batches(1000)), expected, rtol=1e-4)


def test_no_rows_need_no_pass(tiny_model, rows):
    assert token_nats(tiny_model(), rows[:0], 0.5, Batches(9)).tolist() == []


def count_rows(model) -> list[int]:
    """Numbers of rows of every forward pass from now on."""
    counts = []
    model.embedding.register_forward_hook(lambda module, inputs, output: counts.append(len(output)))
    return counts


def two_answers() -> MaskedRows:
    """Two answers to one prompt and one to another, each once all masked and once in part."""
    prompts = torch.tensor([[1, 2, 3], [1, 2, 3], [4, 5, 6]])
    targets = torch.tensor([[10, 11, 12], [10, 21, 22], [30, 31, 32]])
    clean = torch.cat((prompts, targets), dim=1).repeat_interleave(2, 0)  # (6, 6)
    masked = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool().repeat(3, 1)
    return MaskedRows(clean, masked, torch.full((6,), 3))


def test_sequences_in_common_are_run_once(tiny_model):
    """Whole-masked answers to a prompt are one sequence, and those without a prompt too; so are 10 [M] [M] twice."""
    model, rows = tiny_model(), two_answers()
    counts = count_rows(model)
    token_nats(model, rows, 0.0, Batches(1000))
    assert counts == [4]  # 123MMM, 12310MM, 456MMM, 45630MM
    counts.clear()
    token_nats(model, rows, 0.5, Batches(1000))
    assert counts == [4 + 3]  # and MMMMMM, MMM10MM, MMM30MM
    counts.clear()
    result = token_nats(model, rows, 0.5, Batches(2 * 2 * 6))  # two rows with both branches a pass
    assert sorted(counts) == [2, 3, 4]  # rows without a prompt that are equal meet; in the given order 4, 4 and 4
    assert torch.allclose(result, by_hand(model, rows, 0.5), rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_results_are_the_same_when_memory_runs_out(tiny_model, rows, scale):
    model = tiny_model()
    expected, tried = token_nats(model, rows, scale, Batches(1000)), []

    def limited(module, inputs):
        tried.append(len(inputs[0]))
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle, batch = model.embedding.register_forward_pre_hook(limited), Batches(1000)
    assert torch.allclose(token_nats(model, rows, scale, batch), expected, rtol=1e-5)
    assert max(tried) > 3 and batch.tokens == (LENGTH * 3 if not scale else LENGTH * 2)
    handle.remove()
    model.embedding.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(UserError, match="one row of .* tokens does not fit the device's memory"):
        token_nats(model, rows, scale, Batches(1000))
