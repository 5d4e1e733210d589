"""Copies beside the computation: whatever their order, what is read is what was written before.

No GPU is needed: `LazyQueue` copies as late as its rules allow, so that a wait that is missing gives wrong numbers, and
`EagerQueue` at once, so that a buffer that is used too early does.
"""

import random

import pytest
import torch

from structprune.models import placement
from structprune.models.adapter import Adapter
from structprune.models.placement import streamed
from structprune.models.transfer import BUFFERS, Lane, StagedRows, carries
from structprune.statistics import hidden
from structprune.statistics.hidden import HiddenStates

CPU, GARBAGE = torch.device("cpu"), 77


class LazyQueue:
    """A stream of copies that runs only as far as somebody waits for. Events are positions in it."""

    def __init__(self, chunk: int = 32):
        self.buffers = [torch.full((chunk,), GARBAGE, dtype=torch.uint8) for _ in range(2 * BUFFERS)]
        self.copies, self.done, self.seen = [], 0, []

    def empty(self, shape, dtype):
        return torch.full(shape, float(GARBAGE)).to(dtype)

    def copy(self, target, source):
        self.copies.append((target, source))
        return len(self.copies)

    def run(self, event) -> None:
        for target, source in self.copies[self.done : event]:
            target.copy_(source)
        self.done = max(self.done, event)

    def computed(self):
        return "computed"

    def copy_after(self, event) -> None:
        assert event == "computed"
        self.seen.append((len(self.copies), event))

    def compute_after(self, event, uses) -> None:
        self.run(event)

    def wait(self, event) -> None:
        self.run(event)


class EagerQueue(LazyQueue):
    def copy(self, target, source):
        event = super().copy(target, source)
        self.run(event)
        return event


QUEUES = [LazyQueue, EagerQueue]


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("count", [0, 1, 8, 9, 40, 100])  # buffers hold 8 numbers
def test_there_and_back(queue, count):
    lane = Lane(queue(32))
    host = torch.arange(float(count))  # (count,)
    fetched = lane.fetch(host)
    host += 1  # what is fetched is what was there
    back = torch.full_like(host, -1.0)
    lane.settle(lane.deposit(lane.land(fetched) * 2), back)
    assert back.tolist() == [2.0 * number for number in range(count)]


def test_copies_back_follow_what_was_computed():
    queue = LazyQueue(32)
    lane = Lane(queue)
    there, back = torch.arange(20.0), torch.zeros(20)
    deposit = lane.deposit(there)
    assert queue.seen == [] and queue.copies == []  # nothing waits yet
    lane.settle(deposit, back)
    assert queue.seen == [(0, "computed")] and back.tolist() == there.tolist()  # before the first copy


@pytest.mark.parametrize("queue", QUEUES)
def test_fetches_under_way_do_not_share_buffers(queue):
    lane = Lane(queue(32))
    hosts = [torch.full((3, 5), float(number)) for number in range(7)]
    fetches = [lane.fetch(host) for host in hosts]
    for index in (3, 0, 6, 1, 2, 5, 4):
        assert torch.equal(lane.land(fetches[index]), hosts[index])


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("seed", range(12))
def test_rows_are_what_was_written_last(queue, seed):
    """Batches in order and out of it, whole and in part, read twice, written or not, over two stores of one lane."""
    draw, lane = random.Random(seed), Lane(queue(64))
    batch, count = draw.choice([(2, 7), (3, 9), (4, 4), (5, 3)])
    plain = [torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(number)) for number in range(2)]
    staged = [StagedRows(store.clone(), lane, batch) for store in plain]
    for step in range(60):
        which = draw.randrange(2)
        start = draw.randrange(count) if draw.random() < 0.3 else step * batch % count // batch * batch
        rows = slice(start, start + draw.choice([batch, batch, batch, 1]))
        for _ in range(draw.choice([0, 1, 1, 2])):
            assert torch.equal(staged[which].read(rows), plain[which][rows])
        if draw.random() < 0.7:
            plain[which][rows] = plain[which][rows] + step
            staged[which].write(rows, plain[which][rows].clone())
    for store, rows in zip(plain, staged, strict=True):
        assert torch.equal(torch.cat([rows.read(slice(row, row + 1)) for row in range(count)]), store)


def test_the_next_batch_is_under_way_and_what_is_written_is_not_waited_for():
    queue = LazyQueue(64)  # a batch of 2 x 4 numbers fills half a buffer
    rows = StagedRows(torch.zeros(6, 4), Lane(queue), 2)
    first = rows.read(slice(0, 2))
    assert len(queue.copies) == 2 and queue.done == 1  # that of the next batch has begun and is not waited for
    rows.write(slice(0, 2), first + 1)
    assert len(queue.copies) == 2  # on its way when the next is written
    second = rows.read(slice(2, 4))
    assert len(queue.copies) == 3 and queue.done == 2
    rows.write(slice(2, 4), second + 1)
    assert len(queue.copies) == 4 and queue.done == 4
    rows.read(slice(4, 6))
    assert len(queue.copies) == 5 and rows._ahead[0] == slice(0, 2)  # and so around
    assert rows.read(slice(0, 2)).tolist() == [[1.0] * 4] * 2
    rows.write(slice(2, 4), second + 2)  # fetched already, and no longer true
    assert rows.read(slice(2, 4)).tolist() == [[2.0] * 4] * 2


def test_carries_finds_out_a_lane_that_does_not():
    assert carries(Lane(LazyQueue(32)), 100) and carries(Lane(EagerQueue(32)), 100)

    class Hasty(LazyQueue):
        def compute_after(self, event, uses):
            pass

    class Forgetful(LazyQueue):
        def wait(self, event):
            pass

    assert not carries(Lane(Hasty(32)), 100) and not carries(Lane(Forgetful(32)), 100)


IDS = torch.randint(0, 2000, (5, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("budget", [2**30, 0])
def test_hidden_states_over_a_lane_are_the_same(queue, budget, tiny_model, monkeypatch):
    adapter = Adapter(tiny_model())

    def after_two_blocks(overlap: bool) -> torch.Tensor:
        with torch.inference_mode():
            states = HiddenStates(adapter, IDS, 2, budget, overlap)
            for rows in states.slices():
                states.write(rows, adapter.blocks[0].module(states.read(rows), *states.context))
        with torch.inference_mode():
            for rows in states.slices():
                states.write(rows, adapter.blocks[1].module(states.read(rows), *states.context))
            return torch.cat([states.read(rows) for rows in states.slices()])

    plain = after_two_blocks(False)
    lane = Lane(queue(1000))
    monkeypatch.setattr(hidden, "lane_to", lambda device: lane)
    assert torch.equal(after_two_blocks(True), plain)
    assert len(lane._queue.copies) > 20
    monkeypatch.setattr(hidden, "lane_to", lambda device: pytest.fail("no lane is asked for"))
    assert torch.equal(after_two_blocks(False), plain)


def lanes_of(monkeypatch, queue) -> LazyQueue:
    lane = Lane(queue(1000))
    monkeypatch.setattr(placement, "lane_to", lambda device: lane)
    return lane._queue


@pytest.mark.parametrize("queue", QUEUES)
def test_streamed_weights_over_a_lane_give_the_same_numbers(queue, tiny_model, monkeypatch):
    model = tiny_model("dream")
    plain = model(IDS).logits
    home = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    lanes_of(monkeypatch, queue)
    with streamed(model, CPU, True), torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(IDS).logits, plain)
    assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == home


def test_the_next_layer_is_under_way_once_the_order_is_known(tiny_model, monkeypatch):
    model, late, taken = tiny_model(), [], placement._Weights.take
    lanes_of(monkeypatch, LazyQueue)

    def take(self, module):
        late.append(self._ahead is None or self._ahead[0] is not module)
        return taken(self, module)

    monkeypatch.setattr(placement._Weights, "take", take)
    with streamed(model, CPU, True), torch.no_grad():
        for _ in range(3):
            model(IDS)
    layers = 3 * 9 + 3  # seven linears and two norms a block; embedding, last norm and head
    assert late == [True] * layers + [True] + [False] * (2 * layers - 1)  # what follows the head shows in the second


@pytest.mark.parametrize("how", ["replaced", "in place", "by data"])
def test_a_weight_changed_after_its_fetch_is_fetched_again(how, tiny_model, monkeypatch):
    model = tiny_model()
    first = model.blocks[0].part("attention_norm")
    lanes_of(monkeypatch, LazyQueue)
    with streamed(model, CPU, True), torch.no_grad():
        before = [model.blocks[0](model.embedding(IDS), model.rotary(7, CPU)) for _ in range(2)]
        query = model.blocks[0].part("query")
        first(torch.ones(1, 32))  # now the query is on its way
        if how == "replaced":
            query.weight = torch.nn.Parameter(query.weight * 2)
        elif how == "in place":
            query.weight.mul_(2)
        else:
            query.weight.data = query.weight * 2
        result = query(torch.ones(1, 32))
    assert torch.equal(before[0], before[1])
    assert torch.allclose(result, torch.ones(1, 32) @ query.weight.T)
