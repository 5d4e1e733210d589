"""What the studies share: intervals over seeds by hand, and runs that resume only as they were begun."""

import errno
import importlib
import json
import math
import sys
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from structprune.errors import UserError

SETTINGS = {"windows": 4, "ratios": (0.25, 0.5), "variants": {"a": {"k": 1}, "b": {}}}
MEASURE = """
from pathlib import Path


def measure(name, seed, log, threads):
    with Path(log).open("a") as file:
        file.write(f"{name}{seed} ")
    if name == "broken":
        raise ValueError("no such variant")
    return {"variant": name, "seed": seed, "ratios": {"0.5": {"loss": [seed + 0.1, len(name) / 3]}}}
"""


@pytest.fixture
def studies(scripts):
    return scripts("studies")


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """A function that another process can import, and the log of its calls."""
    (tmp_path / "quick_measure.py").write_text(MEASURE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("quick_measure").measure
    sys.modules.pop("quick_measure")


def test_the_interval_is_students_over_the_means_of_seeds(studies):
    """Seed means 1, 2, 3: mean 2, deviation 1, half width t(2) / sqrt(3)."""
    done = {("a", seed): {"ratios": {"0.5": {"loss": [seed - 10.0, seed + 12.0]}}} for seed in range(3)}
    row = studies.loss_row(done, "a", [0, 1, 2], "0.5")
    half = 4.302653 / math.sqrt(3)
    assert row["by_seed"] == [1.0, 2.0, 3.0] and row["mean"] == 2.0
    assert (row["low"], row["high"]) == pytest.approx((2 - half, 2 + half)) and row["shown"] is False
    # Pooled: -10, 12, -9, 13, -8, 14 have mean 2 and squared deviations 144 + 100 + 121 + 121 + 100 + 144 = 730.
    error = math.sqrt(730 / 5 / 6)
    assert row["windows"] == pytest.approx({"standard_error": error, "low": 2 - 1.96 * error, "high": 2 + 1.96 * error})


def test_a_contrast_is_paired(studies):
    losses = {("a", 0): [1.0, 3.0], ("a", 1): [2.0, 4.0], ("b", 0): [0.0, 2.0], ("b", 1): [1.0, 1.0]}
    done = {key: {"ratios": {"0.5": {"loss": loss}}} for key, loss in losses.items()}
    row = studies.contrast_row(done, ("a", "0.5"), ("b", "0.5"), [0, 1])
    half = 12.706205 * math.sqrt(0.5) / math.sqrt(2)  # gaps of 1 and 2
    assert row["by_seed"] == [1.0, 2.0] and row["mean"] == 1.5 and row["high"] - 1.5 == pytest.approx(half)


@pytest.mark.parametrize(
    "by_seed, shown",
    [
        ([1.0, 1.1, 0.9], True),  # 1 +- 4.303 * 0.1 / 1.732 = 0.248
        ([-1.0, -1.1, -0.9], True),
        ([0.1, 1.0, 1.9], False),  # one sign, but 1 +- 2.236
        ([-0.1, 2.0, 2.0, 2.0, 2.0], False),  # 1.58 +- 1.166 excludes 0, but a seed disagrees
        ([0.1, 2.0, 2.0, 2.0, 2.0], True),
        ([0.0, 0.0], False),
    ],
)
def test_shown_needs_the_interval_and_every_seed(studies, by_seed, shown):
    row = studies.seed_interval(by_seed)
    assert row["shown"] is shown
    assert studies.cell(row, paired=True).endswith(" *") is shown and not studies.cell(row).endswith("*")


def test_disagreeing_seeds_are_not_shown_though_the_interval_excludes_0(studies):
    row = studies.seed_interval([-0.1, 2.0, 2.0, 2.0, 2.0])
    assert row["low"] == pytest.approx(1.58 - 2.776445 * 2.1 / 5) and row["low"] > 0 and row["shown"] is False


def test_a_single_seed_has_no_interval(studies):
    row = studies.over_seeds(torch.tensor([[1.0, 3.0]], dtype=torch.float64))
    assert (row["mean"], row["low"], row["high"], row["shown"]) == (2.0, None, None, False)
    assert studies.cell(row, paired=True) == "+2.0000" and studies.cell(None) == "-"


def run(studies, measure, tmp_path, settings=SETTINGS, names=("a", "b")):
    tasks = [(name, seed, str(tmp_path / "log")) for name in names for seed in (0, 1)]
    return studies.run_all(measure, tasks, settings, tmp_path / "x.part.jsonl", 1, Console(quiet=True))


def test_what_was_cut_off_resumes_to_equal_results(studies, measure, tmp_path):
    """The first line holds the settings, then three whole rows and a torn one: two are run again."""
    partial, log = tmp_path / "x.part.jsonl", tmp_path / "log"
    whole = run(studies, measure, tmp_path)
    assert log.read_text() == "a0 a1 b0 b1 " and len(whole) == 4
    lines = partial.read_bytes().splitlines(keepends=True)
    assert json.loads(lines[0]) == {"settings": json.loads(json.dumps(SETTINGS))} and len(lines) == 5
    partial.write_bytes(b"".join(lines[:3]) + lines[3][:25])
    log.write_text("")
    assert run(studies, measure, tmp_path) == whole
    assert log.read_text() == "b0 b1 "
    assert partial.read_bytes() == b"".join(lines)


def test_a_row_without_its_newline_is_torn(studies, tmp_path):
    partial = tmp_path / "x.part.jsonl"
    assert studies.resume(partial, SETTINGS) == []
    begun = partial.read_bytes()
    partial.write_bytes(begun + b'{"variant": "a", "seed": 0}\n{"variant": "a", "seed": 1}')
    assert studies.resume(partial, SETTINGS) == [{"variant": "a", "seed": 0}]
    assert partial.read_bytes() == begun + b'{"variant": "a", "seed": 0}\n'


def test_torn_settings_start_anew(studies, tmp_path):
    partial = tmp_path / "x.part.jsonl"
    studies.resume(partial, SETTINGS)
    begun = partial.read_bytes()
    partial.write_bytes(begun[:20])
    assert studies.resume(partial, SETTINGS) == [] and partial.read_bytes() == begun


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"windows": 5}, "windows = 4, not 5"),
        ({"ratios": [0.25]}, r"ratios = \[0.25, 0.5\], not \[0.25\]"),
        ({"variants": {"a": {"k": 2}, "b": {}}}, "another variants.a"),
        ({"variants": {"a": {"k": 1}}}, "another variants.b"),
        ({"length": 8}, "length = None, not 8"),
    ],
)
def test_other_settings_are_refused_and_the_file_kept(studies, tmp_path, changes, named):
    partial = tmp_path / "x.part.jsonl"
    studies.resume(partial, SETTINGS)
    with partial.open("a") as file:
        file.write('{"variant": "a", "seed": 0}\n{"vari')
    before = partial.read_bytes()
    with pytest.raises(UserError, match=f"x.part.jsonl was begun with {named}.*delete it to start anew"):
        studies.resume(partial, SETTINGS | changes)
    assert partial.read_bytes() == before


def test_a_file_without_settings_or_with_a_broken_line_is_refused(studies, tmp_path):
    partial = tmp_path / "x.part.jsonl"
    partial.write_text('{"variant": "a", "seed": 0}\n')
    with pytest.raises(UserError, match="without its settings: delete it"):
        studies.resume(partial, SETTINGS)
    partial.write_text(json.dumps({"settings": SETTINGS}) + '\n{"vari{"variant": "a", "seed": 0}\n')
    with pytest.raises(UserError, match="x.part.jsonl has a broken line .*: delete it"):
        studies.resume(partial, SETTINGS)


def test_a_failure_ends_the_study_at_once(studies, measure, tmp_path):
    with pytest.raises(ValueError, match="no such variant"):
        run(studies, measure, tmp_path, names=("broken", *(f"v{index}" for index in range(400))))
    assert len((tmp_path / "log").read_text().split()) < 400  # of 802; on a busy machine some dozens are run


def study_of(studies, base):
    def summarise(done, seeds):
        return {"losses": [{"variant": "a", **studies.loss_row(done, "a", seeds, "0.5")}]}

    return studies.Study(
        "tiny_study", "About.", "tiny.json", base, [0.5], {"a": {}}, None, summarise, lambda result: []
    )  # fmt: skip


@pytest.fixture
def instant(studies, monkeypatch):
    """`measure` in this process, so that only settings and files are tried."""

    def run_all(measure, tasks, settings, partial, jobs):
        studies.resume(partial, settings)
        return {task[:2]: {"ratios": {"0.5": {"loss": [task[1] + 1.0] * task[2]}}} for task in tasks}

    monkeypatch.setattr(studies, "run_all", run_all)


def test_main_keeps_the_json_and_refuses_a_study_begun_otherwise(studies, instant, tmp_path, capsys):
    study, out = study_of(studies, {"calibration.source": "/anywhere"}), tmp_path / "tiny.json"
    partial = tmp_path / "tiny.part.jsonl"
    assert studies.main(study, ["--out", str(out), "--seeds", "3", "--windows", "2", "--length", "8"]) == 0
    actual = json.loads(out.read_text())
    base = {"calibration.source": "calibration.txt"}
    assert actual["settings"] == {"seeds": [0, 1, 2], "windows": 2, "length": 8, "base": base}
    assert actual["losses"][0]["mean"] == 2.0 and actual["variants"] == {"a": {}} and not partial.exists()
    studies.resume(partial, {"windows": 2, "length": 8})
    capsys.readouterr()
    assert studies.main(study, ["--out", str(out), "--windows", "9", "--length", "8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "tiny.part.jsonl was begun with" in error and "windows = 2, not 9" in error
    assert json.loads(out.read_text()) == actual


def test_main_decides_by_the_defaults_of_a_configuration_too(studies, instant, tmp_path, monkeypatch):
    study, out = study_of(studies, {}), tmp_path / "tiny.json"
    studies_write = studies.write_result

    def fail(path, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(studies, "write_result", fail)
    assert studies.main(study, ["--out", str(out)]) == 2  # what was measured stays
    kept = json.loads((tmp_path / "tiny.part.jsonl").read_text())["settings"]
    assert kept["defaults"]["masking"]["score"] == "sparsegpt" and kept["variants"] == {"a": {}}
    monkeypatch.setattr(studies, "write_result", studies_write)
    assert studies.main(study, ["--out", str(out)]) == 0 and not (tmp_path / "tiny.part.jsonl").exists()
    kept["defaults"]["masking"]["score"] = "wanda"
    (tmp_path / "tiny.part.jsonl").write_text(json.dumps({"settings": kept}) + "\n")
    assert studies.main(study, ["--out", str(out)]) == 2


def test_a_summary_takes_whole_seeds_and_the_study_goes_on(studies, instant, tmp_path, monkeypatch, capsys):
    """Of two variants and three seeds, the second lacks its last: two seeds are summarised, nothing is run or lost."""
    study, out = replace(study_of(studies, {}), variants={"a": {}, "b": {}}), tmp_path / "tiny.json"
    arguments, partial = ["--out", str(out), "--windows", "2", "--length", "8"], tmp_path / "tiny.part.jsonl"
    assert studies.main(study, [*arguments, "--summary"]) == 2
    assert "no interrupted study at" in capsys.readouterr().err and not partial.exists()

    def cut_off(measure, tasks, settings, partial, jobs):
        studies.resume(partial, settings)
        raise UserError("cut off")

    monkeypatch.setattr(studies, "run_all", cut_off)
    assert studies.main(study, arguments) == 2
    for rows in ([("a", 0), ("a", 1), ("b", 1)], [("b", 0), ("a", 2)]):
        with partial.open("a", encoding="utf-8") as file:
            for name, seed in rows:
                loss = {"loss": [seed + 1.0, seed + 2.0]}
                file.write(json.dumps({"variant": name, "seed": seed, "ratios": {"0.5": loss}}) + "\n")
        before = partial.read_bytes()
        assert studies.main(study, [*arguments, "--summary"]) == 0 and partial.read_bytes() == before
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["settings"]["seeds"] == [0, 1] and result["losses"][0]["by_seed"] == [1.5, 2.5]
    assert studies.main(study, [*arguments, "--windows", "9", "--summary"]) == 2  # of another study


def test_a_summary_of_no_whole_seed_names_what_is_missing(studies, tmp_path):
    partial = tmp_path / "tiny.part.jsonl"
    studies.resume(partial, SETTINGS)
    with partial.open("a", encoding="utf-8") as file:
        file.write('{"variant": "a", "seed": 0}\n{"variant": "b", "seed": 1}\n{"variant": "b", "se')
    before = partial.read_bytes()
    with pytest.raises(UserError, match=r"no seed of all variants yet \('b' is missing\): go on without --summary"):
        studies.finished(partial, SETTINGS, ["a", "b"], [0, 1])
    assert studies.finished(partial, SETTINGS, ["a"], [0, 1])[1] == [0]
    assert partial.read_bytes() == before  # another process may be writing that line


def test_processes_share_the_cores_they_may_use(studies, measure, tmp_path, monkeypatch):
    monkeypatch.setattr(studies.os, "sched_getaffinity", lambda _: {0, 3, 5, 6, 7}, raising=False)
    threads = []
    monkeypatch.setattr(studies, "ProcessPoolExecutor", lambda jobs, mp_context: Inline(threads))
    tasks = [("a", 0, str(tmp_path / "log"))]
    studies.run_all(measure, tasks, SETTINGS, tmp_path / "x.part.jsonl", 2, Console(quiet=True))
    assert threads == [2] and studies.usable_cores() == 5


class Inline:
    """A pool that works at once, and notes the last argument of every call."""

    def __init__(self, last):
        self.last = last

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, work, *arguments):
        self.last.append(arguments[-1])
        future = Future()
        future.set_result(work(*arguments))
        return future


def test_a_count_below_one_is_refused(studies, tmp_path, capsys):
    study = study_of(studies, {})
    assert studies.main(study, ["--out", str(tmp_path / "x.json"), "--seeds", "0"]) == 2
    assert capsys.readouterr().err == "tiny_study: error: --seeds = 0: give at least 1\n"
