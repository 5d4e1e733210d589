"""Prunings that one process and two make, and how their outputs compare; as a script, what two processes run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune.assets import text_file
from structprune.config import Config
from structprune.models.journal import Journal
from structprune.models.loading import load_model
from structprune.progress import untracked
from structprune.runs.mask import MaskRun
from structprune.runs.pruner import Pruner
from structprune.runs.resolve import resolve_masking
from structprune.workers import ALONE, workers

KEYS = {
    "calibration.windows": 11, "calibration.held_out": 5, "calibration.length": 32, "calibration.interval": 25,
    "calibration.batch": 2,
}  # fmt: skip
SPLIT = {"structured.split_windows": 5, "structured.split_candidates": 2}
# one small damping: it amplifies the rounding of sums; of several, two that are nearly as good may change places
SMALL = {"reconstruct.damping": [0.01]}
ONE = SPLIT | SMALL
CLOSE = 1e-5  # of the weights of two runs


def pruned(cases, out, checkpoint, place=ALONE):
    """Save weights and report of every case, from the first process."""
    for name, keys in cases.items():
        model, config = load_model(checkpoint), Config.load(overrides=keys)
        if config.method == "structured":
            run = Pruner(model, config, workers=place)
            run.keep_in(Journal(out / f"work {name}", workers=place))
            result = run.prune()
        else:
            result = MaskRun(model, resolve_masking(config, model), None, untracked, place).run()
        if place.main:
            out.mkdir(exist_ok=True)
            save_file({key: value.clone() for key, value in result.model.state_dict().items()}, out / f"{name}.st")
            plan = result.plan.to_json() if config.method == "structured" else None
            (out / f"{name}.json").write_text(json.dumps(result.report | ({"plan": plan} if plan else {})))


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"],
    "accelerate": ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--cpu",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip


def launched(*arguments, launcher="torchrun"):
    """A command that a launcher starts twice."""
    launch = [sys.executable, *LAUNCHERS[launcher]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([*launch, *arguments], env=environment, capture_output=True, text=True, timeout=180)


def both_ways(cases, folder, checkpoint):
    """Directories of weights and reports of cases: made by one process, and by two."""
    text = {"calibration.source": str(text_file("calibration.txt"))}
    cases = {name: KEYS | text | each for name, each in cases.items()}
    pruned(cases, folder / "one", checkpoint)
    done = launched(__file__, json.dumps(cases), str(folder / "two"), checkpoint)
    assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two"


def differences(one, two, close, place=""):
    """Where two reports differ by more than rounding; time and memory do not count, nor does the damping of a refit
    that has the same error with either."""
    if isinstance(one, dict):
        uncounted = {"seconds", "peak_memory_bytes"}
        if "error" in one and not differences(one["error"], two.get("error"), close):
            uncounted.add("damping")
        keys = (one.keys() | two.keys()) - uncounted
        return [line for key in keys for line in differences(one.get(key), two.get(key), close, f"{place}.{key}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return [line for i, pair in enumerate(zip(one, two)) for line in differences(*pair, close, f"{place}[{i}]")]
    alike = one == pytest.approx(two, rel=100 * close, abs=close) if isinstance(one, float) else one == two
    return [] if alike else [f"{place}: {one} and {two}"]


def check_alike(runs, name, keys):
    """Weights, zeros and reports of a case are those of one process."""
    masks = "method" in keys
    one, two = (load_file(folder / f"{name}.st") for folder in runs)
    assert one.keys() == two.keys()
    for key, weight in one.items():
        assert torch.equal(weight == 0, two[key] == 0) or not masks, key
        assert (weight - two[key]).abs().max() <= CLOSE, key
    assert not differences(*(json.loads((folder / f"{name}.json").read_text()) for folder in runs), CLOSE)


if __name__ == "__main__":
    with workers() as place:
        pruned(json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], place)
