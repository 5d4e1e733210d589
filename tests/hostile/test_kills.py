"""A kill at every change of the file system: the name holds the old output whole, or the new one, or nothing as before.

A fork of this process does the real writing, and ends by SIGKILL at its k-th rename, removal, new directory or opening
for writing, for every k. What safetensors does inside one file is not seen; that file is in a draft all the while.
"""

import itertools
import os
import signal
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from structprune import UserError, load_model, save_pruned
from structprune.checkpoint import swap
from structprune.checkpoint.drafts import clean_up
from structprune.checkpoint.masked import save_masked
from structprune.evaluation.results import Window
from structprune.evaluation.settings import EvaluationConfig
from structprune.models.tensor_files import write_tensors
from structprune.runs import evaluate as evaluation
from structprune.runs.evaluation_request import Subject
from structprune.runs.work import FORMAT, Work, working

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.link", "os.symlink")
MOST = 300  # changes of a run; more would mean that leavings pile up
MASKED = "model.transformer.blocks.0.q_proj.weight"
SAVES = {
    "prune": save_pruned,
    "masks": lambda model, out, **options: save_masked(model, out, changed=[MASKED], **options),
}


def survives(action, step: int) -> bool:
    """Whether a fork gets through `action` without a change number `step`, at which it is killed."""
    child = os.fork()
    if child == 0:
        changes = itertools.count(1)

        def watch(event, arguments):
            written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and _is_file(arguments)
            if (written or event in CHANGES) and next(changes) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(watch)
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), f"step {step}: the writing failed"
    return status == 0


def _is_file(arguments) -> bool:
    return not str(arguments[0]).startswith(("/dev/", "/proc/"))


def contents(directory: Path) -> dict[str, bytes] | None:
    """Relative path -> bytes of every file, hidden names aside; None where there is nothing."""
    if not os.path.lexists(directory):
        return None
    paths = [path for path in directory.rglob("*") if path.is_file()]
    names = {path.relative_to(directory).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(".")}


@pytest.fixture(params=SAVES)
def save(request, tiny_checkpoint, tmp_path):
    """`save(out, mark, overwrite=False)` writes an output, the checkpoint of which is at `tmp_path / "llada-tiny"`."""
    model = load_model(tiny_checkpoint())

    def run(out, mark: str, overwrite: bool = False) -> Path:
        files = {
            "report.json": {"mark": mark},
            "masks.safetensors": lambda path: write_tensors(path, {"mark": torch.ones(3)}, {"mark": mark}),
        }
        return SAVES[request.param](model, out, files=files, overwrite=overwrite)

    return run


@pytest.mark.slow
def test_a_first_output(save, tmp_path):
    new = contents(save(tmp_path / "whole", "new"))
    for step in range(1, MOST):
        out = tmp_path / "deep" / "out"
        end = survives(lambda out=out: save(out, "new"), step)
        state = contents(out)
        assert state in (None, new), step
        if state is None:
            save(out, "new")
        else:
            with pytest.raises(UserError, match="exists: choose another"):
                save(out, "new")
        assert contents(out) == new and [path.name for path in out.parent.iterdir()] == ["out"], step
        if end:
            break
        out.rename(tmp_path / f"done-{step}")
        out.parent.rmdir()
    assert 12 < step < MOST - 1


@pytest.mark.slow
@pytest.mark.parametrize("way", ["at once", "by renames"])
def test_an_output_that_is_replaced(save, way, tmp_path, monkeypatch):
    if way == "by renames":  # as on file systems that cannot exchange
        monkeypatch.setattr(swap, "_rename_at_once", lambda *arguments, **options: False)
    out, lacking = tmp_path / "place" / "out", 0
    new, old = contents(save(out, "new")), contents(save(out, "old", overwrite=True))
    assert new != old
    for step in range(1, MOST):
        end = survives(lambda: save(out, "new", overwrite=True), step)
        if way == "by renames" and contents(out) is None:
            lacking += 1
            clean_up(out)  # as the next run does when it starts
        assert contents(out) in (old, new), step
        save(out, "new", overwrite=True)
        assert contents(out) == new and [path.name for path in out.parent.iterdir()] == ["out"], step
        if end:
            break
        save(out, "old", overwrite=True)
    assert 20 < step < MOST - 1 and lacking == (way == "by renames")


@pytest.mark.slow
def test_a_directory_that_is_filled(save, tmp_path, monkeypatch):
    """The current directory, which cannot be renamed over: without its config.json it is not read as a model."""
    new, halves = contents(save(tmp_path / "whole", "new")), 0
    for step in range(1, MOST):
        out = tmp_path / f"place-{step}"
        out.mkdir()
        monkeypatch.chdir(out)
        end = survives(lambda: save(".", "new"), step)
        state = contents(out)
        assert state == new or "config.json" not in state, step
        halves += 0 < len(state) < len(new)
        clean_up(out)
        assert contents(out) in ({}, new), step
        if not contents(out):
            save(".", "new")
        assert contents(out) == new and not list(out.glob(".*")), step
        if end:
            break
    assert 12 < step < MOST - 1 and halves > 3


class Unit:
    """Six items in three chunks, whose rows cost nothing."""

    task, settings, by_reference = "notes", {"noise": 1}, False
    keys = [str(item) for item in range(6)]

    def __init__(self):
        self.chunks_run = []

    def bound(self, run):
        return self

    def is_kept(self, indices):
        return True

    def chunks(self):
        return [(0, 1), (2, 3), (4, 5)]

    def run(self, model, chunk, batch):
        self.chunks_run.append(chunk)
        return [Window("notes", str(item), 1.0 + item, 3.0, 2, 4, 4) for item in chunk]


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """`evaluate(out, seed=0, overwrite=False)` -> chunks run; all is real but the model, its settings and its rows."""
    unit, source = Unit(), tmp_path / "model"
    subject = Subject("model", str(source), source, None, None, None, None, (unit,))
    monkeypatch.setattr(evaluation, "prepare", lambda checkpoints, config: [subject])
    monkeypatch.setattr(evaluation, "load_model", lambda *arguments, **options: SimpleNamespace())
    settings = {"tasks": {"model": {"notes": unit.settings}}}
    monkeypatch.setattr(evaluation, "_settings", lambda subjects, config, device: settings | {"seed": config.seed})

    def run(out: Path, seed: int = 0, overwrite: bool = False) -> list:
        config = EvaluationConfig.load(overrides={"evaluation.batch": 64, "model.device": "cpu"})
        config = SimpleNamespace(model=config.model, evaluation=config.evaluation, seed=seed)
        unit.chunks_run.clear()
        evaluation.evaluate([str(source)], config, out, overwrite=overwrite)
        return list(unit.chunks_run)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("earlier", [None, "finished", "begun"])
def test_rows(earlier, evaluate, tmp_path, monkeypatch):
    """Every stored chunk stays, and the same command ends with the same files. An earlier run has other settings."""
    evaluate(tmp_path / "whole")
    new, overwrite = contents(tmp_path / "whole"), earlier is not None
    stored = set()
    for step in range(1, MOST):
        out = tmp_path / f"place-{step}" / "out"
        if earlier is not None:
            evaluate(out, seed=1)
        if earlier == "begun":
            (out / "results.json").unlink()
            (out / "partial").mkdir()
            (out / "partial" / "rank-0.jsonl").write_bytes(b"{}\n")
        end = survives(lambda out=out: evaluate(out, overwrite=overwrite), step)
        rows = (contents(out) or {}).get("partial/rank-0.jsonl", b"")
        own = b'"seed": 0' in (contents(out) or {}).get("settings.json", b"")
        finished = own and (out / "results.json").exists()
        chunks = evaluate(out, overwrite=overwrite and not finished)
        if own:
            assert len(chunks) == (0 if finished else 3 - rows.count(b"\n")), step
            stored.add(rows.count(b"\n"))
        assert contents(out) == new and not list(out.rglob(".*")), step
        if end:
            break
    assert 10 < step < MOST - 1 and stored == {0, 3}  # writing a chunk changes no name


def test_parts_of_a_run_are_there_whole_or_not_at_all(tmp_path):
    """Killed at every change from its work directory to the end, a run goes on from the parts that are there."""
    tensors = {"weight": torch.arange(6.0)}

    def run(work, made=None):
        with working(work, lambda: {"format": FORMAT}) as journal:
            for name in ("one", "two"):
                if (entry := journal.within("scores").read(name)) is None:
                    journal.within("scores").keep(name, tensors, {"of": name})
                    [] if made is None else made.append(name)
                else:
                    assert torch.equal(entry.tensors["weight"], tensors["weight"]) and entry.notes == {"of": name}

    seen = set()
    for step in range(1, MOST):
        work = Work(tmp_path / f"work-{step}")
        done, made = survives(lambda work=work: run(work), step), []
        there = frozenset(
            name for name in ("one", "two") if (work.directory / "scores" / f"{name}.safetensors").exists()
        )
        run(work, made)
        assert frozenset(made) == {"one", "two"} - there and not work.directory.exists()
        seen.add(there)
        if done:
            break
    assert step > 10 and seen >= {frozenset(), frozenset({"one"}), frozenset({"one", "two"})}  # others while they go
    run(Work(tmp_path / "kept", stays=True))
    assert sorted(path.name for path in (tmp_path / "kept" / "scores").iterdir()) == [
        "one.safetensors",
        "two.safetensors",
    ]
