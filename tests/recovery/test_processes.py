"""Recoveries from the command line, in one process and in two."""

import json
import os
import subprocess
import sys

import pytest
import torch

from structprune.cli.main import main
from structprune.config import Config
from structprune.masking.masks import Masks
from structprune.models.loading import load_model
from structprune.recovery.folder import training_folder
from structprune.runs.checkpoints import mask_checkpoint

FEW = ["--set", "data.held_out=6"]  # windows: fewer than one process measures at a time
BLOCKS = ["--set", "blocks.tokens=256", "--set", "blocks.learning_rate=1e-3"]  # a first stage
SHORT = ["--set", "data.length=4", "--set", "train.pass_windows=1"]  # passes without a masked token


@pytest.fixture
def command(pair, text_path):
    """`command(out, *more)` -> arguments of a recovery of a moment."""
    dense, small = pair()
    keys = {
        "data.length": 16, "data.held_out": 20, "data.noise": 2, "train.method": "full", "train.batch": 8,
        "train.pass_windows": 2, "train.learning_rate": 2e-3, "train.evaluations": 2,
    }  # fmt: skip
    sets = [f"--set={key}={value}" for key, value in keys.items()]

    def make(out, *more):
        asking = ["recover", str(small), "--teacher", str(dense), "--out", str(out), "--data", str(text_path)]
        return [*asking, "--device", "cpu", "--tokens", str(16 * 8 * 6), *sets, *more]

    return make


@pytest.fixture
def together():
    """`together(arguments)` -> that command, done by two processes."""

    def run(arguments):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [*launch, "structprune", *arguments], env=environment, capture_output=True, text=True, timeout=180
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


def figures(out):
    return json.loads((out / "report.json").read_text(encoding="utf-8"))["recoveries"][0]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], BLOCKS, SHORT])
def test_two_processes_learn_what_one_learns(command, together, tmp_path, more):
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert main(command(alone, *more)) == 0
    done = together(command(both, *more))
    ours, theirs = figures(both), figures(alone)
    assert ours["before"] == theirs["before"] and ours["tokens"] == theirs["tokens"] == 768 + 256 * (more is BLOCKS)
    layers = [each["blocks"] and each["blocks"]["layers"] for each in (ours, theirs)]
    assert layers[0] == layers[1] and bool(layers[0]) == (more is BLOCKS)
    for one, other in zip(ours["history"], theirs["history"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    one, other = (load_model(out, device="cpu").state_dict() for out in (both, alone))
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4
    moved = load_model(tmp_path / "llada-small", device="cpu").state_dict()
    assert max((one[name] - moved[name]).abs().max().item() for name in one) > 1e-3
    assert done.stdout.count("Wrote") == 1 and not training_folder(both).exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_learn_a_mixture_whose_experts_do_not_all_see_tokens(pair, text_path, together, tmp_path, method):
    """A pass of one window of 4 tokens leaves experts without any, in one process and in the other."""
    dense, small = pair("llada-moe")
    keys = {
        "data.length": 4, "data.held_out": 20, "data.noise": 2, "train.method": method, "train.batch": 8,
        "train.pass_windows": 1, "train.learning_rate": 2e-3, "train.evaluations": 2, "train.tokens": 4 * 8 * 6,
        "data.source": text_path, "model.device": "cpu", "train.rank": 2,
    }  # fmt: skip
    sets = [f"--set={key}={value}" for key, value in keys.items() if method == "lora" or key != "train.rank"]
    alone, both = (["recover", str(small), "--teacher", str(dense), "--out", str(tmp_path / name), *sets]
                   for name in ("alone", "both"))  # fmt: skip
    assert main(alone) == 0
    together(both)
    ours, theirs = figures(tmp_path / "both"), figures(tmp_path / "alone")
    for one, other in zip(ours["history"], theirs["history"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    one, other = (load_model(tmp_path / name, device="cpu").state_dict() for name in ("both", "alone"))
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4


@pytest.mark.slow
def test_two_processes_learn_the_updates_of_a_masked_model_that_one_learns(command, together, text_path, tmp_path):
    """LoRA of whole weights, merged where the masks are; the zeros stay."""
    alone, both, sparse = tmp_path / "alone", tmp_path / "both", tmp_path / "sparse"
    keys = {"method": "unstructured", "masking.score": "magnitude", "model.device": "cpu"}
    keys |= {"calibration.source": str(text_path), "calibration.length": 16}
    keys |= {"calibration.windows": 3, "calibration.held_out": 2}
    more = ["--set", "train.method=lora", "--set", "train.rank=4"]
    first = command(alone, *more)
    mask_checkpoint(str(tmp_path / "llada-tiny"), sparse, Config.load(overrides=keys))
    second = command(both, *more)
    first[1] = second[1] = str(sparse)
    assert main(first) == 0
    together(second)
    ours, theirs = figures(both), figures(alone)
    assert ours["kept"] == theirs["kept"] == "trained" and ours["tokens"] == theirs["tokens"] == 768
    for one, other in zip(ours["history"], theirs["history"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    one, other, before = (load_model(out, device="cpu").state_dict() for out in (both, alone, sparse))
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4
    for name in Masks.load(both / "masks.safetensors").packed:
        assert torch.equal(one[name] == 0, before[name] == 0)
        assert (one[name] - before[name]).abs().max() > 1e-3


KILLED = """
import os
from structprune.cli.main import run
from structprune.recovery.watch import Watch

class Killed(Watch):
    def on_step_end(self, args, state, control, **more):
        if state.global_step == 4:
            os._exit(9)
        super().on_step_end(args, state, control, **more)

import structprune.runs.training as training
training.Watch = Killed
run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [FEW, BLOCKS])
def test_two_processes_that_share_the_weights_learn_what_one_learns_also_after_a_kill(command, tmp_path, capsys, more):
    alone, both, killed = tmp_path / "alone", tmp_path / "both", tmp_path / "killed.py"
    killed.write_text(KILLED, encoding="utf-8")
    assert main(command(alone, *more)) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    keys = {"env": os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}, "timeout": 180}
    first = subprocess.run([*launch, str(killed), *command(both, *more)], capture_output=True, text=True, **keys)
    whole = training_folder(both) / "checkpoint-3" / "pytorch_model_fsdp.bin"
    assert first.returncode != 0 and whole.exists() and not both.exists(), first.stderr
    done = subprocess.run([*launch, "-m", "structprune", *command(both, *more)], capture_output=True, text=True, **keys)
    assert done.returncode == 0, done.stderr
    ours, theirs = figures(both), figures(alone)
    assert ours["learnt"]["resumed_at"] == 3 and ours["before"] == pytest.approx(theirs["before"], rel=1e-5)
    assert ours["tokens"] == theirs["tokens"] == 768 + 256 * (more is BLOCKS)
    layers = [each["blocks"] and each["blocks"]["layers"] for each in (ours, theirs)]
    assert layers[0] == layers[1] and bool(layers[0]) == (more is BLOCKS)
    for one, other in zip(ours["history"], theirs["history"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    one, other = (load_model(out, device="cpu").state_dict() for out in (both, alone))
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4
    assert done.stdout.count("Wrote") == 1 and not training_folder(both).exists()


@pytest.mark.slow
def test_the_command_shows_a_table_and_what_it_wrote(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(out)) == 0
    shown = capsys.readouterr()
    assert "llada-small, 768 tokens" in shown.out and "divergence from the teacher" in shown.out
    assert f"Wrote {out} (model, report.json, README.md)" in shown.out and not shown.err
    assert torch.isfinite(torch.tensor(figures(out)["after"]["kl"]))


@pytest.mark.parametrize(
    "more, reason",
    [
        (["--set", "train.batch=7"], "train.batch = 7 windows cannot be dealt to 1 processes"),
        (["--set", "train.methods=full"], "unknown config key 'train.methods'"),
        (["--data", "missing.txt"], "no data text at 'missing.txt'"),
        (["--tokens", "0"], "train.tokens = 0"),
        (["--teacher", "nowhere"], "nowhere"),
        (["--set", "data.length=65"], "data.length = 65 exceeds the 64 positions of 'llada-small'"),
        (["--set", "data.held_out=5000"], "windows of 16 tokens, and 5000 are held out"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, capsys, more, reason):
    out = tmp_path / "out"
    assert main(command(out, *more)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and reason in error
    assert not list(tmp_path.glob("out*"))
