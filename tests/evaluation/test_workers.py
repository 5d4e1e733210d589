"""A process's place among several."""

import pytest

from structprune.errors import UserError
from structprune.evaluation import workers as module
from structprune.evaluation.workers import LAUNCHED, Workers, join, workers


def test_chunks_are_shared_out_without_gap_or_overlap():
    places = [Workers(rank, 3) for rank in range(3)]
    assert [[place.mine(number) for place in places].count(True) for number in range(7)] == [1] * 7
    assert [number for number in range(7) if places[1].mine(number)] == [1, 4]
    assert [place.main for place in places] == [True, False, False]


@pytest.mark.parametrize("rank", range(3))
def test_outputs_of_shared_work_are_in_the_order_of_the_inputs(monkeypatch, rank):
    given = []
    monkeypatch.setattr(Workers, "gather", lambda self, own: given.append(own) or [[0, 30], [10, 40], [20]])
    assert Workers(rank, 3).share(lambda inputs: [10 * each for each in inputs], range(5)) == [0, 10, 20, 30, 40]
    assert given == [[[0, 30], [10, 40], [20]][rank]]


def test_a_problem_in_one_process_ends_them_all(monkeypatch):
    def fail(inputs):
        raise UserError(f"{inputs} is too much")

    monkeypatch.setattr(Workers, "gather", lambda self, own: [[1], own])
    with pytest.raises(UserError, match=r"\[2\] is too much"):
        Workers(1, 2).share(fail, [1, 2])
    monkeypatch.setattr(Workers, "gather", lambda self, own: [own, UserError("the other's")])
    with pytest.raises(UserError, match="the other's"):
        Workers(0, 2).share(lambda inputs: inputs, [1, 2])


def test_a_single_process_has_all(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    with workers() as place:
        place.wait()
        assert place == Workers(0, 1, None) and place.mine(5)


@pytest.mark.parametrize("missing", LAUNCHED)
def test_a_scheduler_that_sets_some_variables_is_no_launcher(monkeypatch, missing):
    values = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name in set(values) - {missing}:
        monkeypatch.setenv(name, values[name])
    with workers() as place:
        assert place.count == 1


def test_every_process_has_its_own_accelerator(monkeypatch):
    values = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(module.torch.distributed, "init_process_group", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(module.torch.distributed, "destroy_process_group", lambda: calls.append("destroyed"))
    monkeypatch.setattr(module.torch.distributed, "is_initialized", lambda: bool(calls))
    with workers() as place:
        assert join() == place and len(calls) == 1  # once
        assert place == Workers(5, 8, "cuda:1")
    assert calls[0][0] == ("gloo",) and calls[0][1]["timeout"].days >= 1 and calls[1] == "destroyed"
