"""A process's place among several."""

from contextlib import nullcontext

import pytest
import torch

from structprune import workers as module
from structprune.cli.main import main
from structprune.errors import Elsewhere, Interrupted, UserError
from structprune.workers import LAUNCHED, Workers, check_shares, join, workers


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


def test_spans_follow_each_other_and_cover_everything():
    spans = [Workers(rank, 3).span(8) for rank in range(3)]
    assert [(span.start, span.stop) for span in spans] == [(0, 2), (2, 5), (5, 8)]
    assert Workers().span(5) == slice(0, 5)


def test_rows_come_back_in_the_order_of_the_spans(monkeypatch):
    rows = torch.arange(10).view(5, 2)
    monkeypatch.setattr(Workers, "gather", lambda self, own: [rows[Workers(rank, 2).span(5)] for rank in range(2)])
    assert torch.equal(Workers(1, 2).rows(rows[2:]), rows)
    assert Workers().rows(rows) is rows


def test_a_mean_counts_the_things_of_every_process(monkeypatch):
    monkeypatch.setattr(Workers, "gather", lambda self, own: [own, (7.0, 1)])
    assert Workers(0, 2).mean(1.0, 3) == (3 * 1.0 + 7.0) / 4


def test_more_processes_than_things_are_refused():
    check_shares(Workers(0, 3), [(3, "windows")])
    check_shares(Workers(), [(1, "windows")])
    with pytest.raises(UserError, match="3 processes cannot share 2 held-out windows: start at most 2"):
        check_shares(Workers(1, 3), [(8, "windows"), (2, "held-out windows")])


def fail():
    raise UserError("no such thing")


def test_the_first_process_works_before_the_others(monkeypatch):
    calls = []
    monkeypatch.setattr(Workers, "first", lambda self, work: calls.append("first") or (self.main and work()))
    monkeypatch.setattr(Workers, "gather", lambda self, own: [own])
    assert [Workers(rank, 2).in_turn(lambda: calls.append("work") or 5) for rank in range(2)] == [5, 5]
    assert calls == ["first", "work", "first", "work"]
    monkeypatch.setattr(Workers, "gather", lambda self, own: [None, own])
    with pytest.raises(UserError, match="no such thing") as caught:
        Workers(1, 2).in_turn(fail)
    assert not isinstance(caught.value, Elsewhere)
    monkeypatch.setattr(Workers, "gather", lambda self, own: [own, UserError("the other's")])
    with pytest.raises(Elsewhere, match="the other's"):
        Workers(0, 2).in_turn(lambda: 5)


def test_an_end_of_the_first_process_ends_the_others(monkeypatch):
    sent = []

    def broadcast(values, src):
        sent.extend(values if not sent else [])  # of the first process, which comes first here
        values[:] = sent

    def halt():
        raise Interrupted("parts are kept", 143)

    monkeypatch.setattr(module, "connected", nullcontext)
    monkeypatch.setattr(module.torch.distributed, "broadcast_object_list", broadcast)
    for rank, work in enumerate((halt, None)):
        with pytest.raises(Interrupted, match="parts are kept") as caught:
            Workers(rank, 2).from_first(work)
        assert caught.value.code == 143


@pytest.mark.parametrize("first", [True, False])
def test_of_several_the_first_to_fail_says_why(monkeypatch, first):
    monkeypatch.setattr(module, "join", lambda reduces: Workers(1, 2))
    monkeypatch.setattr(module, "_first_to_fail", lambda: first)
    with pytest.raises(UserError, match="no such thing") as caught, workers():
        fail()
    assert isinstance(caught.value, Elsewhere) != first
    with pytest.raises((KeyboardInterrupt, Elsewhere)) as caught, workers():
        raise KeyboardInterrupt
    assert isinstance(caught.value, Elsewhere) != first
    with pytest.raises(Exception, match="stopped") as caught, workers():
        raise Interrupted("stopped", 143)
    assert caught.value.code == 143 and isinstance(caught.value, Elsewhere) != first


def test_a_lost_connection_is_another_process_that_ended():
    with pytest.raises(Elsewhere, match="another process of this run was killed or lost"), module.connected():
        raise RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    for other in ("shapes do not match", "NCCL error: Duplicate GPU detected", "gloo: sizes differ"):
        with pytest.raises(RuntimeError, match=other), module.connected():
            raise RuntimeError(other)


def test_one_that_was_killed_says_nothing_so_another_does(monkeypatch):
    monkeypatch.setattr(module, "join", lambda reduces: Workers(0, 2))
    monkeypatch.setattr(module, "_first_to_fail", lambda: True)
    with pytest.raises(UserError, match="was killed or lost") as caught, workers(), module.connected():
        raise RuntimeError("Connection closed by peer")
    assert not isinstance(caught.value, Elsewhere)


def test_what_all_refuse_before_they_join_the_first_one_says(monkeypatch, capsys):
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "_joined", False)
    assert main(["prune", "nowhere", "--out", "out", "--score", "odd"]) == 2 and not capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    assert main(["prune", "nowhere", "--out", "out", "--score", "odd"]) == 2
    assert "structured.score = 'odd'" in capsys.readouterr().err
