"""What happens to outputs while others write, on full disks, and at places that are no plain directories."""

import errno
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from structprune import UserError, load_model, save_pruned
from structprune.bench.latency import Latency
from structprune.checkpoint import atomic, output
from structprune.cli.main import main
from structprune.runs import demo, sinks
from structprune.runs.work import clear, has_parts

pytestmark = pytest.mark.slow
RESULTS = {
    "prune": "plan.json", "masks": "masks.safetensors", "bench": "bench.json", "sinks": "sinks.json",
    "demo": "demo.json", "eval": "results.json",
}  # fmt: skip
WHOLE = [verb for verb in RESULTS if verb != "eval"]  # those whose directory appears at the end


def sets(*pairs: str) -> list[str]:
    return [part for pair in pairs for part in ("--set", pair)]


@pytest.fixture
def command(tiny_checkpoint, text_path, prune_command, monkeypatch):
    """`command(verb, out, *more)` -> arguments of a quick run; only pictures and the demo's measuring are left out."""
    checkpoint = tiny_checkpoint()
    no_text = sets("masking.score=magnitude", "reconstruct.enabled=false", "calibration.held_out=0")
    text = ["--text", str(text_path), *sets("evaluation.windows=2", "evaluation.length=16", "evaluation.noise=2")]
    rest = {
        "masks": ["prune", str(checkpoint), "--method", "unstructured", *no_text],
        "bench": ["bench", str(checkpoint), "--length", "8", "--gen-length", "0", "--rounds", "1", "--no-plots"],
        "sinks": ["sinks", str(checkpoint), "--windows", "1", "--length", "16", "--levels", "2", "--kappa", "1"],
        "demo": ["demo"],
        "eval": ["eval", str(checkpoint), *text],
    }
    monkeypatch.setattr(sinks, "draw_all", lambda runs, draft: [])
    _shorten_demo(monkeypatch, load_model(checkpoint))

    def make(verb: str, out, *more: str) -> list[str]:
        if verb == "prune":
            return prune_command(checkpoint, out, text_path, *more)
        return [*rest[verb], "--out", str(out), *more]

    return make


def _shorten_demo(monkeypatch, model) -> None:
    """One row and one saved model, in place of two minutes of pruning and measuring."""
    nelbo = SimpleNamespace(mean=4.0, standard_error=0.1)
    row = {
        "method": "structprune", "ratio": 0.3, "ratio_met": 0.3, "nelbo": 4.1, "standard_error": 0.1,
        "loss": {"mean": 0.1, "standard_error": 0.01, "low": 0.0, "high": 0.2}, "parameters": 1, "macs": 1,
        "macs_before": 2, "attention_steps": 0, "seconds": 1.0,
    }  # fmt: skip
    pruned = SimpleNamespace(model=model, report={}, save=lambda directory: save_pruned(model, directory))
    latency = {name: Latency((0.01, 0.02)) for name in ("dense", "structprune 0.3")}
    monkeypatch.setattr(demo, "HeldOut", lambda *arguments: SimpleNamespace(dense=nelbo))
    monkeypatch.setattr(demo, "_prune_all", lambda *arguments: ([dict(row)], {("structprune", 0.3): pruned}))
    monkeypatch.setattr(demo, "measure_latency", lambda *arguments: latency)
    monkeypatch.setattr(demo, "_plot", lambda rows, draft: None)
    monkeypatch.setattr("structprune.report.demo_tables.demo_table", lambda rows, dense: "")


def said(capsys, arguments: list[str], code: int = 2) -> str:
    """The one line on stderr."""
    capsys.readouterr()
    assert main(arguments) == code
    line = capsys.readouterr().err.strip()  # where a bar was shown before, its line is left empty
    assert len(line.splitlines()) == (code != 0), line
    return line


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("verb", WHOLE)
def test_a_directory_that_appears_while_a_run_works(verb, overwrite, command, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    check = output.check_space

    def appear(*arguments):  # once the output was found free
        check(*arguments)
        out.mkdir(exist_ok=True)
        (out / "letter").write_text("dear")

    monkeypatch.setattr(output, "check_space", appear)
    line = said(capsys, command(verb, out, *overwrite))
    assert f"output '{out}' came to hold something else meanwhile" in line and f"is kept in '{out}.new'" in line
    assert tree(out) == {"letter": b"dear"} and (tmp_path / "out.new" / RESULTS[verb]).stat().st_size
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("earlier", [False, True])
def test_two_writers(earlier, tiny_checkpoint, tmp_path):
    """One wins whole, the other one's run is kept beside it and told; also where both may overwrite."""
    model, out = load_model(tiny_checkpoint()), tmp_path / "out"
    if earlier:
        save_pruned(model, out, files={"mark": "earlier"})

    def write(name: str, other: str) -> None:
        def meet(path: Path) -> None:
            path.write_text(name)
            (tmp_path / name).touch()
            while not (tmp_path / other).exists():
                time.sleep(0.001)

        try:
            save_pruned(model, out, files={"mark": meet}, overwrite=earlier)
            os._exit(0)
        except UserError as error:
            os._exit(2 if f"is kept in '{out}.new'" in str(error) and "\n" not in str(error) else 1)

    children = []
    for names in (("one", "two"), ("two", "one")):
        if not (child := os.fork()):
            write(*names)
        children.append(child)
    codes = Counter(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == {0: 1, 2: 1}
    winner, kept = tree(out), tree(tmp_path / "out.new")
    assert {winner.pop("mark"), kept.pop("mark")} == {b"one", b"two"} and winner == kept
    assert {path.name for path in tmp_path.iterdir()} == {"llada-tiny", "one", "two", "out", "out.new"}


@pytest.mark.parametrize("verb", RESULTS)
def test_the_directory_above(verb, command, tmp_path, capsys, monkeypatch):
    inside = tmp_path / "work" / "here"
    inside.mkdir(parents=True)
    (tmp_path / "work" / "letter").write_text("dear")
    monkeypatch.chdir(inside)
    for more in ([], ["--overwrite"]):
        assert "output '" in said(capsys, command(verb, "..", *more))
    assert tree(tmp_path / "work") == {"letter": b"dear"} and not list(inside.iterdir())
    assert said(capsys, command(verb, "new/../out"), code=0) == ""
    assert {path.name for path in inside.iterdir()} - {"new"} == {"out"} and (inside / "out" / RESULTS[verb]).exists()


@pytest.mark.parametrize("verb", WHOLE)
def test_the_current_directory(verb, command, tmp_path, capsys, monkeypatch):
    inside = tmp_path / "here"
    inside.mkdir()
    monkeypatch.chdir(inside)
    assert said(capsys, command(verb, "."), code=0) == ""
    assert Path(RESULTS[verb]).exists() and not list(Path(".").glob(".*"))
    before = tree(inside)
    assert "holds the current directory, so that it cannot be replaced" in said(
        capsys, command(verb, inside, "--overwrite")
    )
    assert tree(inside) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("verb", WHOLE)
def test_a_signal_during_the_swap(verb, number, command, tmp_path, capsys, monkeypatch):
    out, put = tmp_path / "out", atomic._put_in_place

    def signalled(draft, *arguments):
        if draft.output == out:  # the demo's models are outputs too, within its draft
            os.kill(os.getpid(), number)
        put(draft, *arguments)

    monkeypatch.setattr(atomic, "_put_in_place", signalled)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
        arguments = command(verb, out)
        line = said(capsys, arguments, code=128 + number)
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert line == f"structprune: interrupted; '{out}' was complete by then"
    assert (out / RESULTS[verb]).stat().st_size and not list(tmp_path.glob(".*"))


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_WITHIN = SafetensorError(f"Error while serializing: I/O error: {FULL.strerror} (os error {errno.ENOSPC})")
WRITERS = [
    ("prune", "structprune.checkpoint.output.write_streamed", FULL), ("prune", "pathlib.Path.write_text", FULL),
    ("prune", "structprune.models.tensor_files.save_file", FULL_WITHIN), ("prune", "shutil.copyfile", FULL),
    ("bench", "os.mkdir", FULL), ("masks", "shutil.copyfile", FULL), ("masks", "shutil.copyfileobj", FULL),
    ("masks", "structprune.models.tensor_files.save_file", FULL_WITHIN), ("bench", "pathlib.Path.write_text", FULL),
    ("sinks", "pathlib.Path.write_text", FULL), ("demo", "structprune.checkpoint.output.write_streamed", FULL),
    ("demo", "pathlib.Path.write_text", FULL), ("eval", "os.fsync", FULL),
]  # fmt: skip


@pytest.mark.parametrize("verb, writer, error", WRITERS, ids=[f"{verb}-{writer}" for verb, writer, _ in WRITERS])
def test_a_disk_that_is_full_for_one_writer(verb, writer, error, command, tmp_path, capsys, monkeypatch):
    """It fails at the first write into a draft; `os.mkdir` at the second draft, since the first one tries the place."""
    out, before, drafts = tmp_path / "deep" / "out", tree(tmp_path), []
    arguments, write = command(verb, out), pkgutil.resolve_name(writer)

    def fail(*given, **options):
        hit = any(".draft" in str(each) for each in given if not isinstance(each, dict)) or writer == "os.fsync"
        drafts.extend([given] * hit)
        if len(drafts) > (writer == "os.mkdir"):
            raise error
        return write(*given, **options)

    monkeypatch.setattr(writer, fail)
    line = said(capsys, arguments)
    monkeypatch.undo()
    assert f"no space left while writing '{out}" in line and ".draft" not in line and drafts
    if verb in ("prune", "masks"):  # what was finished stays, for when there is room
        assert has_parts(tmp_path / "deep" / "out.work")
        clear(tmp_path / "deep" / "out.work", [tmp_path / "deep"])
    assert tree(tmp_path) == before and not (tmp_path / "deep").exists()


@pytest.fixture
def mounted(tmp_path):
    """A disk of 64 KiB, mounted in a directory of its own; needs the rights to mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("verb", RESULTS)
def test_a_small_disk_that_fills_up(verb, command, mounted, capsys, monkeypatch):
    """Nobody sees it coming; what was on the disk stays, and there is nothing else."""
    out = mounted / "out"
    with (mounted / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(b"x" * 4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**15))
    assert f"no space left while writing '{out}" in said(capsys, command(verb, out))
    assert [path.name for path in mounted.iterdir()] == ["filler"]


def test_a_mount_point_is_filled_and_never_replaced(command, mounted, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**15))
    assert said(capsys, command("bench", mounted), code=0) == ""
    assert [path.name for path in mounted.iterdir()] == ["bench.json"] and os.path.ismount(mounted)
    before = tree(mounted)
    assert "exists: choose another" in said(capsys, command("bench", mounted))
    assert "is a mount point or holds" in said(capsys, command("bench", mounted, "--overwrite"))
    assert tree(mounted) == before and json.loads(before["bench.json"])["models"]
