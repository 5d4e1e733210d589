"""Forward passes that are cut short: equal to full ones, and robust against a lack of memory."""

import pytest
import torch

from structprune.errors import UserError
from structprune.models import encode
from structprune.models.adapter import Adapter
from structprune.models.encode import Batches, encode_at
from tests.tiny_values import DENSE, GRAPHS


def full_logits(model, ids: torch.Tensor, attention_mask=None) -> torch.Tensor:
    """Logits that predict the token at every position: (B, T, V)."""
    logits = model(ids, attention_mask=attention_mask).logits  # (B, T, V)
    return torch.cat((logits[:, :1], logits[:, :-1]), dim=1) if model.shifted else logits


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["mmada", *GRAPHS])
@torch.inference_mode()
def test_wanted_positions_equal_the_full_forward_pass(tiny_model, family, padded):
    model, generator = tiny_model(family), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2000, (3, 11), generator=generator)
    targets = torch.rand(3, 11, generator=generator) < 0.5
    targets[0, :2], targets[2] = True, False  # the first position too; a row without any
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    targets[1, :5] = False  # nothing is asked of padding, nor of what a shift would take from it
    mask = mask if padded else None
    result = model.output_head(encode_at(model, ids, targets, mask))  # (M, V)
    assert result.shape == (targets.sum(), 2048)
    assert torch.allclose(result, full_logits(model, ids, mask)[targets], atol=2e-5)
    assert encode_at(model, ids, torch.zeros_like(targets)).shape == (0, 32)


@pytest.mark.parametrize("family", DENSE)
@torch.inference_mode()
def test_what_follows_the_last_attention_runs_at_the_wanted_positions(gap_pair, family):
    """The last attention is in the second of four blocks."""
    gapped, whole = gap_pair(family)
    ids = torch.randint(0, 2000, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(2, 9, dtype=torch.bool)
    targets[0, 3] = targets[1, 4] = targets[1, 8] = True
    shapes = []
    for block in Adapter(gapped).blocks:
        if "channels" in block.kinds:
            block["down"].register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    states = encode_at(gapped, ids, targets)
    assert shapes == [(3, 32), (3, 32)]
    assert torch.allclose(states, encode_at(whole, ids, targets), atol=1e-5)
    assert torch.allclose(gapped.output_head(states), full_logits(gapped, ids)[targets], atol=2e-5)


@torch.inference_mode()
def test_padding_is_not_attended_to(tiny_model):
    model = tiny_model()
    ids, targets = torch.arange(1, 9)[None], torch.tensor([[False] * 5 + [True] * 3])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    padded = encode_at(model, ids, targets, mask)
    assert torch.allclose(padded, encode_at(model, ids[:, 2:], targets[:, 2:]), atol=1e-5)
    assert (padded - encode_at(model, ids, targets)).abs().max() > 1e-2


@torch.inference_mode()
def test_the_last_block_ends_at_the_wanted_positions(tiny_model):
    model, shapes = tiny_model(), []
    for block in model.blocks:
        block.part("down").register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    targets = torch.zeros(2, 6, dtype=torch.bool)
    targets[0, 1] = targets[1, 3] = targets[1, 5] = True
    encode_at(model, torch.zeros(2, 6, dtype=torch.long), targets)
    assert shapes == [(2, 6, 32), (2, 6, 32), (3, 32)]


def test_rows_of_a_pass():
    batch = Batches(100)
    assert [batch.rows(length) for length in (1, 30, 50, 51, 100, 101, 1000)] == [100, 3, 2, 1, 1, 1, 1]
    assert Batches.automatic(torch.device("cpu")).tokens == encode.CPU_TOKENS
    assert Batches.automatic(torch.device("cuda")).tokens == encode.CUDA_TOKENS


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True, "8"])
def test_a_batch_of_no_size_is_refused(tokens):
    with pytest.raises(UserError, match="cannot be a batch: give a whole number from 1"):
        Batches(tokens)


class Memory:
    """Squares rows and keeps account; more than `limit` rows at once do not fit."""

    def __init__(self, limit: int):
        self.limit, self.tried = limit, []
        self.values = torch.arange(13.0)

    def __call__(self, part: slice) -> torch.Tensor:
        self.tried.append(part.stop - part.start)
        if self.tried[-1] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.values[part] ** 2


def test_batches_cover_all_rows_in_order():
    memory = Memory(100)
    assert torch.equal(Batches(20).map(memory, 13, 4), torch.arange(13.0) ** 2)
    assert memory.tried == [5, 5, 3]


def test_running_out_of_memory_halves_the_rows_and_is_remembered():
    memory, batch = Memory(3), Batches(43)
    assert torch.equal(batch.map(memory, 13, 4), torch.arange(13.0) ** 2)
    assert memory.tried == [10, 5, 2, 2, 2, 2, 2, 2, 1]  # 13 = 6 · 2 + 1
    assert batch.tokens == 8
    memory.tried.clear()
    batch.map(memory, 4, 4)
    assert memory.tried == [2, 2]


def test_a_row_that_does_not_fit_is_an_error_of_one_line():
    with pytest.raises(
        UserError, match="^one row of 9 tokens does not fit the device's memory: use a device with more"
    ):
        Batches(100).map(Memory(0), 13, 9)
    with pytest.raises(UserError, match="does not fit the device's memory: wait$"):
        Batches(100, "wait").map(Memory(0), 13, 9)


def test_other_errors_are_not_swallowed():
    def fail(part):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        Batches(100).map(fail, 3, 9)
