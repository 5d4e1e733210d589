"""Prunings that two processes share, against one: the same plans, masks and figures, weights up to rounding."""

import json

import pytest
import torch
from safetensors.torch import load_file

from structprune.assets import text_file
from structprune.cli.main import main
from structprune.config import Config
from structprune.models.journal import Journal
from structprune.models.loading import load_model
from structprune.runs.pruner import Pruner
from tests.runs.processes import (
    CLOSE,
    KEYS,
    LAUNCHERS,
    ONE,
    SMALL,
    SPLIT,
    both_ways,
    check_alike,
    differences,
    launched,
)

HEAD = {"reconstruct.head": True, "reconstruct.producers": True, "reconstruct.stream": 1.0}
SEARCH = {"search.enabled": True, "search.sequences": 5}
WIDTHS = {"search.levels": 3, "search.generations": 2, "search.offspring": 3, "search.rounds": 1}
EQUAL = {"export.compat": "uniform", "structured.allocation": "uniform", "structured.ratio": 0.5}
MASKS = {"method": "unstructured"}
# seed 38 masks no token of the second window, which is the second process's
RARE = {"calibration.windows": 2, "calibration.held_out": 4, "calibration.interval": 1, "calibration.copies": 1,
        "calibration.batch": 1, "calibration.seed": 38, "structured.split": "by-cost"} | SMALL  # fmt: skip
LARGER = ONE | {"reconstruct.damping": [0.1]}  # where a refit at 0.01 loses on the held-out windows
CASES = {
    "obs": ONE, "obs on a sink arm": ONE | {"structured.arm": "masked+sink"}, "head": ONE | HEAD,
    "wanda on a sink arm": LARGER | {"structured.score": "wanda", "structured.arm": "masked+sink"},
    "fluctuation": ONE | {"structured.score": "fluctuation"}, "taylor": ONE | {"structured.score": "taylor"},
    "bias": SPLIT | {"reconstruct.mode": "bias"}, "gradients": ONE | {"reconstruct.weighting": "gradient"},
    "certainty": ONE | {"reconstruct.weighting": "certainty"}, "noise": LARGER | {"reconstruct.weighting": "noise"},
    "reverse": LARGER | {"sink.trajectory": "reverse", "sink.policy": "unstable", "structured.arm": "masked+sink"},
    "no masked token": RARE | {"reconstruct.weighting": "noise", "reconstruct.visible": 0.1},
    "search": ONE | SEARCH | WIDTHS, "dropped blocks": ONE | SEARCH | EQUAL,
    "wanda, no refit": MASKS | {"masking.score": "wanda", "reconstruct.enabled": False},
    "sparsegpt, no refit": MASKS | {"reconstruct.enabled": False, "masking.arm": "masked+sink"},
    "sparsegpt": MASKS | SMALL | {"masking.arm": "masked+sink"}, "2:4": {"method": "nm"},
    "wanda": MASKS | SMALL | {"masking.score": "wanda", "masking.order": "one-shot", "masking.allocation": "owl"},
    "ria, refit": MASKS | SMALL | {"masking.score": "ria", "reconstruct.enabled": True},
    "sink-wanda": MASKS | {"masking.score": "sink-wanda", "masking.norms": "summed"},
}  # fmt: skip
# refits that the held-out windows undo: their reports say what they were
UNDONE = ("taylor", "dropped blocks", "2:4", "sink-wanda")


@pytest.fixture(scope="module")
def runs(shared_checkpoint, tmp_path_factory):
    return both_ways(CASES, tmp_path_factory.mktemp("processes"), str(shared_checkpoint()))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_prune_as_one(runs, name):
    check_alike(runs, name, CASES[name])
    if CASES[name].get("reconstruct.enabled", True):  # else equal weights would say nothing of a refit
        report = json.loads((runs[0] / f"{name}.json").read_text())
        assert (report["held_out_nelbo"]["kept"] == "refit") == (name not in UNDONE)


def test_a_run_of_two_goes_on_in_one(runs, tmp_path, monkeypatch, shared_checkpoint):
    """Parts, attention mass among them, do not depend on the number of processes."""
    name = "obs on a sink arm"
    keys = KEYS | {"calibration.source": str(text_file("calibration.txt"))} | CASES[name]
    for part in ("statistics.rows.mass_of", "structured.ranking._advance_with_grams", "runs.run.masked_nelbo"):
        monkeypatch.setattr(f"structprune.{part}", None)  # is not computed again
    run = Pruner(load_model(shared_checkpoint()), Config.load(overrides=keys))
    run.keep_in(Journal(runs[1] / f"work {name}"))
    result = run.prune()
    two = load_file(runs[1] / f"{name}.st")
    assert all(torch.equal(weight, two[key]) for key, weight in result.model.state_dict().items())
    report = json.loads((runs[1] / f"{name}.json").read_text())
    assert not differences(json.loads(json.dumps(result.report | {"plan": result.plan.to_json()})), report, 1e-9)


def command(source, out, *more):
    """Arguments of `torchrun` for a pruning of a moment."""
    sets = [f"--set={key}={value}" for key, value in KEYS.items()]
    text = ["--calibration", str(text_file("calibration.txt")), "--device", "cpu"]
    text += [] if "--ratio" in more else ["--ratio", "0.5"]
    return ["-m", "structprune", "prune", str(source), "--out", str(out), *text, *sets, *more]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_of_two_processes_reports_and_writes(launcher, tiny_checkpoint, tmp_path):
    source, out = tiny_checkpoint(), tmp_path / "out"
    done = launched(*command(source, out), launcher=launcher)
    assert done.returncode == 0 and done.stdout.count("Wrote") == 1, done.stderr
    assert done.stdout.count("Load it anywhere") == 1 and not (tmp_path / "out.work").exists()
    again = launched(*command(source, out))
    assert again.returncode and again.stderr.count("structprune: error") == 1 and "exists" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("more, message", [
    (["--set=structured.split_windows=1"], "2 processes cannot share 1 windows of a candidate"),
    (["--score", "odd"], "structured.score"),
])  # fmt: skip
def test_what_all_processes_refuse_is_said_once(tiny_checkpoint, tmp_path, more, message):
    done = launched(*command(tiny_checkpoint(), tmp_path / "out", *more))
    lines = [line for line in done.stderr.splitlines() if line.startswith("structprune: ")]
    assert done.returncode and len(lines) == 1 and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["llada-tiny"]


LEARN = ["--recover", *(f"--recover-set={pair}" for pair in (
    "data.length=16", "data.held_out=6", "data.noise=2", "train.method=full", "train.batch=4", "train.pass_windows=2",
    "train.evaluations=1", "train.learning_rate=2e-3", "train.tokens=256",
))]  # fmt: skip
COMMANDS = {
    "two ratios": [
        "--ratio",
        "0.3,0.5",
        "--levels",
        "LEVELS",
        *(f"--set={k}={v}" for k, v in (SEARCH | WIDTHS).items()),
    ],
    "trained back": ["--ratio", "0.5", *LEARN],
}


@pytest.mark.slow
@pytest.mark.parametrize("more", COMMANDS.values(), ids=COMMANDS)
def test_commands_of_two_processes_write_what_one_writes(tiny_checkpoint, tmp_path, capsys, more):
    source, single = tiny_checkpoint(), ["--set", "reconstruct.damping=[0.01]"]
    arguments = {
        out: [each.replace("LEVELS", str(tmp_path / f"levels-{out}")) for each in [*more, *single]]
        for out in ("one", "two")
    }
    assert main(command(source, tmp_path / "one", *arguments["one"])[2:]) == 0
    done = launched(*command(source, tmp_path / "two", *arguments["two"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote") == capsys.readouterr().out.count("Wrote") >= 1
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("model.safetensors"))
    assert len(files) == (2 if "--levels" in more else 1)
    for file in files:
        one, two = (load_file(tmp_path / out / file) for out in ("one", "two"))
        assert one.keys() == two.keys()
        close = 1e-4 if "--recover" in more else CLOSE  # steps of a training add up their rounding
        assert max((weight - two[key]).abs().max() for key, weight in one.items()) <= close, file
    levels = [sorted(path.name for path in (tmp_path / f"levels-{out}").glob("*")) for out in ("one", "two")]
    assert levels[0] == levels[1] and bool(levels[0]) == ("--levels" in more)


@pytest.mark.slow
def test_two_processes_measure_the_sinks_of_one(tiny_checkpoint, tmp_path):
    sizes = ["--windows", "3", "--length", "16", "--levels", "3", "--device", "cpu"]
    results = []
    for out, run in {
        "one": lambda *line: main([*line]),
        "two": lambda *line: launched("-m", "structprune", *line),
    }.items():
        done = run("sinks", str(tiny_checkpoint()), "--out", str(tmp_path / out), *sizes)
        assert done == 0 or done.returncode == 0, done
        results.append(json.loads((tmp_path / out / "sinks.json").read_text()))
    assert not differences(*results, 1e-6)


ENDED = """
import os, sys
from structprune.cli.main import run
import structprune.refit.reconstruct as reconstruct

def end(*given):
    if os.environ["RANK"] == "1" and given[1] == (1, "attention"):
        {action}
    return keep(*given)

keep, reconstruct.keep = reconstruct.keep, end
sys.argv[0] = "structprune"
run()
"""
ACTIONS = {
    "an error": ("raise MemoryError", "out of memory"),
    "a kill": ("os._exit(9)", "another process of this run was killed or lost"),
    "a signal": ("os.kill(os.getpid(), 15)", "interrupted; finished parts are kept"),
}


@pytest.mark.slow
@pytest.mark.parametrize("action, message", ACTIONS.values(), ids=ACTIONS)
def test_the_end_of_one_process_ends_all_with_one_line(tiny_checkpoint, tmp_path, action, message):
    source, out, script = tiny_checkpoint(), tmp_path / "out", tmp_path / "script.py"
    script.write_text(ENDED.format(action=action))
    arguments = command(source, out)[2:]
    done = launched(str(script), *arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("structprune: ")]
    assert done.returncode and len(lines) == 1 and message in lines[0], done.stderr
    assert not out.exists() and (tmp_path / "out.work").exists()
    if "_exit" in action:
        assert launched(*command(source, out)).returncode == 0 and not (tmp_path / "out.work").exists()


SIGNALLED = """
import os, sys
from structprune.cli.main import run
import structprune.levels.build as build
from structprune.levels.search import StitchedModel

def signalled(*given, **named):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        os.kill(os.getpid(), 15)
    return work(*given, **named)

calls, work = [], {place}.{name}
{place}.{name} = signalled
sys.argv[0] = "structprune"
run()
"""
STEPS = {  # of a search -> what is called in it, and how many losses and blocks of levels there are then
    "a loss": ("StitchedModel", "loss", 2),
    "a block of levels": ("build", "kind_levels", 0),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("place, name, losses", STEPS.values(), ids=STEPS)
def test_a_signal_to_one_of_two_ends_a_search_after_the_step_under_way(tiny_checkpoint, tmp_path, place, name, losses):
    source, out, script = tiny_checkpoint(), tmp_path / "out", tmp_path / "script.py"
    script.write_text(SIGNALLED.format(place=place, name=name))
    sets = [f"--set={key}={value}" for key, value in (SEARCH | WIDTHS).items()]
    done = launched(str(script), *command(source, out, *sets)[2:])
    lines = [line for line in done.stderr.splitlines() if line.startswith("structprune: ")]
    assert len(lines) == 1 and "interrupted; finished parts are kept" in lines[0], done.stderr
    records = [json.loads(path.read_text()) for path in (tmp_path / "out.work").rglob("search.json")]
    assert sum(len(record["losses"]) for record in records) == losses and not out.exists()
    blocks = list((tmp_path / "out.work" / "levels").rglob("block-*.safetensors"))
    assert len(blocks) == (1 if losses == 0 else len(load_model(source).blocks))
