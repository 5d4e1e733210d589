"""Hidden states in memory or in a file, and a model run consumer by consumer."""

import copy
import errno
import os
import re
import tempfile
import weakref
from pathlib import Path

import pytest
import torch

from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.models.maps import give_back_pages, place_of
from structprune.statistics.hidden import HiddenStates, empty_on_host
from structprune.statistics.residual import ResidualRun, TargetRun

IDS = torch.randint(0, 2000, (5, 7), generator=torch.Generator().manual_seed(0))
BYTES = 5 * 7 * 32 * 4
KINDS = ("attention", "channels")


def advanced(adapter: Adapter, budget: int, batch: int) -> torch.Tensor:
    """All hidden states after the first two blocks."""
    states = HiddenStates(adapter, IDS, batch, budget)
    for block in adapter.blocks[:2]:
        for rows in states.slices():
            states.write(rows, block.module(states.read(rows), *states.context))
    return torch.cat([states.read(rows) for rows in states.slices()])


@torch.inference_mode()
def test_file_and_memory_hold_the_same(tiny_model):
    adapter = Adapter(tiny_model())
    inputs = []
    adapter.model.encode(IDS, keep=inputs)
    memory, file = advanced(adapter, BYTES, batch=2), advanced(adapter, BYTES - 1, batch=2)
    assert torch.equal(memory, file)
    assert torch.allclose(memory, inputs[2], atol=1e-5)


@torch.inference_mode()
def test_the_file_is_there_only_beyond_the_budget_and_goes_with_the_object(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    adapter = Adapter(tiny_model())
    assert place_of(HiddenStates(adapter, IDS, 2, BYTES).read(slice(0, 1))) is None
    states = HiddenStates(adapter, IDS, 2, 0)
    place = weakref.ref(place_of(states.read(slice(0, 1))))
    assert place().size == BYTES
    give_back_pages()  # what was written is read from the file again
    assert torch.equal(states.read(slice(0, 5)), adapter.model.embedding(IDS))
    del states
    assert place() is None and list(tmp_path.iterdir()) == []


def consumer_traffic(adapter: Adapter) -> tuple[dict, dict]:
    """What every consumer reads and writes in one plain forward pass: (block, kind) -> (R, T, .)."""
    inputs, outputs, handles = {}, {}, []
    for block in adapter.blocks:
        for kind, role in zip(KINDS, ("attention_output", "down")):

            def hook(_, args, out, key=(block.index, kind)):
                inputs[key], outputs[key] = args[0], out

            handles.append(block[role].register_forward_hook(hook))
    adapter.model.encode(IDS)
    for handle in handles:
        handle.remove()
    return inputs, outputs


BUDGETS = [0, 5 * 7 * 48 * 4, 2**30]  # nothing held, one consumer's input, everything


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind_of_run", [ResidualRun, TargetRun])
@torch.no_grad()
def test_a_run_reads_and_gives_what_the_consumers_do(tiny_model, kind_of_run, budget):
    adapter = Adapter(tiny_model("dream"))
    inputs, outputs = consumer_traffic(adapter)
    run = kind_of_run(adapter, IDS, 2, budget)
    for index in range(3):
        for kind in KINDS:
            for rows in run.slices():
                for _ in range(2):  # also from what is held
                    assert torch.allclose(run.output((index, kind), rows), outputs[index, kind][rows], atol=1e-5)
                    assert torch.allclose(run.read((index, kind), rows), inputs[index, kind][rows], atol=1e-5)
            run.advance((index, kind))


@pytest.mark.parametrize("budget, passes", [(0, 2), (2**30, 1)])
@torch.no_grad()
def test_a_target_run_starts_again_and_is_computed_once_where_it_fits(tiny_model, budget, passes):
    adapter = Adapter(tiny_model("dream"))
    outputs = consumer_traffic(adapter)[1]
    run, calls = TargetRun(adapter, IDS, 5, budget), []
    handle = adapter.blocks[1]["down"].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        for index in range(3):
            for kind in KINDS:
                for rows in run.slices():
                    assert torch.allclose(run.output((index, kind), rows), outputs[index, kind][rows], atol=1e-5)
                run.advance((index, kind))
        run.restart()
    handle.remove()
    assert len(calls) == passes * (2 if budget == 0 else 1)  # not held: once to be read, once to advance


@torch.no_grad()
def test_residual_run_goes_on_with_the_weights_of_the_moment(tiny_model):
    model = tiny_model()
    run = ResidualRun(Adapter(model), IDS, 5, 2**30)
    rows = slice(0, 5)
    run.read((0, "attention"), rows)
    changed = copy.deepcopy(model)
    for each in (model, changed):  # refitted between reading and advancing
        each.blocks[0].part("attention_output").weight.mul_(3.0)
    run.advance((0, "attention"))
    x = changed.embedding(IDS)
    block = changed.blocks[0]
    x = x + block.part("attention_output")(block.mix(x, changed.rotary(7, "cpu")))
    assert torch.allclose(run.read((0, "channels"), rows), block.activate(x), atol=1e-5)
    assert torch.allclose(run.states(rows), x, atol=1e-5)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_is_one_line(code, monkeypatch, tmp_path):
    """Not a signal in the midst of a run: pages of a sparse file are mapped without the disk having room for them."""

    def full(descriptor, start, size):
        assert (start, size) == (0, 40)
        raise OSError(code, "full")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=f"temporary files do not fit {tmp_path} .* free.: set TMPDIR to a larger disk"):
        empty_on_host((2, 5), torch.float32, 39)
    assert list(tmp_path.iterdir()) == []
    assert place_of(empty_on_host((2, 5), torch.float32, 40)) is None


def test_bytes_of_a_file_are_reserved_where_the_file_system_can(monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "posix_fallocate", lambda descriptor, start, size: sizes.append((start, size)))
    assert empty_on_host((3, 4), torch.float64, 0).shape == (3, 4) and sizes == [(0, 96)]
    monkeypatch.delattr(os, "posix_fallocate")
    assert empty_on_host((3, 4), torch.float64, 0).shape == (3, 4)


def resident(place) -> int:
    """Bytes of a mapping that are in memory, by the system's count."""
    pattern = rf"^{place.address:x}-.*?^Rss:\s+(\d+) kB"
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    return 1024 * int(re.search(pattern, text, re.MULTILINE | re.DOTALL)[1])


@torch.inference_mode()
def test_states_in_a_file_are_resident_batch_by_batch(tiny_model):
    """All of them would be in memory until a block's end else, whatever their budget."""
    adapter = Adapter(tiny_model())
    ids = torch.zeros(64, 512, dtype=torch.int64)  # (R, T)
    states = HiddenStates(adapter, ids, 1, budget=0)  # 4 MB
    place = place_of(states._states)
    for rows in states.slices():
        states.write(rows, states.read(rows) + 1)
        assert resident(place) <= 3 * 512 * 32 * 4 + 2**16
    expected = adapter.model.embedding(ids[:1]) + 1
    assert all(torch.equal(states.read(rows), expected) for rows in states.slices())
