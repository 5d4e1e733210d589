"""Forward passes put together: what is summed, what is compared, which steps stay."""

import torch

from structprune.sinks.trajectory import UNSEEN, Recorder
from structprune.workers import Workers

EVEN = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
PEAK = [0.2, 0.2, 5.0, 0.2, 0.2, 0.2]  # exceeds the mean of the others by 4.8


def layers():
    """Two sequences, layers of 1 and 2 heads, 6 positions."""
    first = torch.tensor([[PEAK], [EVEN]])  # (2, 1, 6)
    second = torch.tensor([[PEAK, EVEN], [EVEN, EVEN]])  # (2, 2, 6)
    return [first, second]


def test_sums_votes_and_strength_by_hand():
    recorder = Recorder(2, causal=False)
    ids = torch.arange(12).view(2, 6)
    recorder.add([0, 0], [0, 1], ids, layers())
    recorder.add([1, 1], [1, 0], ids.flip(0), [layer.flip(0) for layer in layers()])  # rows may come in any order
    result = recorder.finish("forward", 0, torch.tensor([[0.0, 0.5]] * 2))
    assert torch.equal(result.ids, ids[:, None].expand(2, 2, 6))
    assert torch.allclose(result.mass[0, 1], torch.tensor([1.4, 1.4, 11.0, 1.4, 1.4, 1.4]))
    assert torch.allclose(result.votes[0, 0], torch.tensor([0, 0, 2 / 3, 0, 0, 0])) and not result.votes[1].any()
    assert [layer.tolist() for layer in result.sinks] == [[0.5], [0.5, 0.0]]  # of two sequences one has it
    assert torch.allclose(torch.cat(result.strength), torch.tensor([2.5 / 6, 2.5 / 6, 0.0]))
    assert result.present.all() and result.common.all() and result.heads == 3


def test_steps_that_a_sequence_left_out_are_dropped():
    recorder = Recorder(2, causal=False)
    for step, rows in ((0, [0, 1]), (1, [1]), (3, [0, 1])):
        recorder.add([step] * len(rows), rows, torch.full((len(rows), 6), step), [layers()[0][rows]])
    result = recorder.finish("reverse", 2, torch.tensor([[0.0, 0.25, 0.5, 0.75]] * 2))
    assert result.ids[:, :, 0].tolist() == [[0, 3], [0, 3]] and result.progress.tolist() == [[0.0, 0.75]] * 2


def test_positions_of_a_causal_model_grow_and_its_last_ones_are_not_compared():
    recorder = Recorder(1, causal=True)
    for step, length in enumerate((10, 11)):
        seen = torch.arange(length, 0, -1.0)  # (T,) queries: each gives 1 of its attention per position it sees
        recorder.add([step], [0], torch.zeros(1, length, dtype=torch.long), [seen.view(1, 1, -1)])
    result = recorder.finish("reverse", 10, torch.tensor([[0.0, 0.5]]))
    count = 10 - UNSEEN + 1
    assert result.present.sum(1).tolist() == [count, count + 1] and result.common.sum() == count
    assert torch.allclose(result.mass[0, 0, :count], torch.tensor(5.5))  # the total, 55, over ten even positions
    assert result.mass[0, 0, count:].isnan().all() and result.ids[0, 0].tolist() == [0] * 10 + [-1]


def test_epsilon_means_the_same_in_a_causal_head():
    """Rates are scaled to a mean of 1 over what is compared: 3 is three even shares above the rest."""
    rate = torch.tensor([3.0, *[0.2] * 4, *[8.2 / 7] * 7])  # (T,) mean 1; the last 7 positions are not compared
    mass = rate * torch.arange(12, 0, -1.0)
    mass = mass * (12 / mass.sum())  # 12 queries
    recorder = Recorder(1, causal=True)
    recorder.add([0], [0], torch.zeros(1, 12, dtype=torch.long), [mass.view(1, 1, -1)])
    result = recorder.finish("reverse", 12, torch.zeros(1, 1))
    # the mean of the first 5 is 0.76: (3 - 0.2) / 0.76 = 3.7 is above 3, which 3 - 0.2 is not
    assert torch.allclose(result.mass[0, 0, :5], rate[:5]) and result.votes[0, 0, :5].tolist() == [1, 0, 0, 0, 0]
    assert torch.allclose(result.strength[0], torch.tensor([3 / 3.8]))


def test_sequences_of_several_processes_follow_each_other(monkeypatch):
    ids, whole, parts = torch.arange(12).view(2, 6), Recorder(2, causal=False), []
    whole.add([0, 0], [0, 1], ids, layers())
    for row in range(2):
        part = Recorder(1, causal=False)
        part.add([0], [0], ids[row : row + 1], [layer[row : row + 1] for layer in layers()])
        parts.append(part)
    monkeypatch.setattr(Workers, "gather", lambda self, own: parts)
    progress = torch.zeros(2, 1)
    one = whole.finish("forward", 0, progress)
    two = parts[0].joined(Workers(0, 2)).finish("forward", 0, progress)
    for name in ("ids", "mass", "votes", "present"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert all(torch.equal(*pair) for pair in zip(one.strength + one.sinks, two.strength + two.sinks))
    assert whole.joined(Workers()) is whole
