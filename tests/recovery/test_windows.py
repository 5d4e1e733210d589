"""Noisy windows: item i is the same whatever was read before, and items in a row see all noise levels."""

import pytest
import torch

from structprune.recovery.windows import NoisyWindows, windows_of

MASK, LENGTH = 99, 20


def windows(count=6):
    return torch.arange(count * LENGTH).view(count, LENGTH) % 90


def make(count=24, learnt=None, **options):
    return NoisyWindows(windows(), learnt, range(count), MASK, **{"seed": 0} | options)


def test_an_item_depends_on_its_index_alone():
    one, other = make(), make()
    later = other[17]
    for index in range(17):
        one[index]
    item = one[17]
    assert len(one) == 24 and set(item) == {"input_ids", "noisy_ids", "rate", "index"}
    assert all(torch.equal(item[key], later[key]) for key in item) and item["index"] == 17
    assert not torch.equal(item["noisy_ids"], make(seed=1)[17]["noisy_ids"])


def test_every_epoch_has_every_window_once_in_another_order():
    items = [make()[index]["input_ids"][0].item() for index in range(24)]
    epochs = [items[start : start + 6] for start in range(0, 24, 6)]
    firsts = sorted(windows()[:, 0].tolist())
    assert all(sorted(epoch) == firsts for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1


def test_noise_replaces_tokens_by_the_mask_at_its_rate():
    data = make(count=600)
    shares = []
    for index in range(600):
        item = data[index]
        masked = item["noisy_ids"] == MASK
        assert torch.equal(item["noisy_ids"][~masked], item["input_ids"][~masked])
        shares.append((masked.float().mean() - item["rate"]).item())
    assert abs(sum(shares) / 600) < 0.02
    rates = torch.stack([data[index]["rate"] for index in range(16)])
    assert torch.histc(rates, 4, 0, 1).min() >= 3  # a batch of 16 fills all quarters


def test_only_learnt_tokens_and_no_edges_are_masked():
    learnt = torch.zeros(6, LENGTH, dtype=torch.bool)
    learnt[:, 5:9] = True
    masked = torch.stack([make(learnt=learnt)[index]["noisy_ids"] == MASK for index in range(24)])
    assert masked[:, 5:9].any() and not masked[:, :5].any() and not masked[:, 9:].any()
    edges = torch.stack([make(edges_visible=True)[index]["noisy_ids"] == MASK for index in range(24)])
    assert edges[:, 1].any() and not edges[:, 0].any() and not edges[:, -1].any()


def test_later_numbers_of_the_row_are_its_later_items():
    whole, later = make(), NoisyWindows(windows(), None, range(9, 24), MASK, seed=0)
    assert len(later) == 15
    for index in range(15):
        one, other = later[index], whole[index + 9]
        assert all(torch.equal(one[key], other[key]) for key in ("input_ids", "noisy_ids", "rate"))
        assert one["index"] == index


@pytest.mark.parametrize("numbers", [range(0), range(2, 5), range(4, 9), range(6, 7), range(0, 7), range(3, 20)])
def test_which_windows_items_are_made_of(numbers):
    windows = torch.arange(7)[:, None].expand(7, 4)  # each of its own number
    items = NoisyWindows(windows, None, numbers, 99, seed=3)
    assert windows_of(numbers, 7, 3).tolist() == sorted({int(item["input_ids"][0]) for item in items})
