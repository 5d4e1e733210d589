"""Evaluations that die and go on, are asked for again, or run in several processes: the same numbers, nothing twice."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from structprune.errors import UserError
from structprune.evaluation.result_files import read_results
from structprune.runs.evaluate import Session, evaluate

pytestmark = pytest.mark.slow


class Killed(Exception):
    pass


def interrupted(after):
    """A `track` under which the run dies before the chunk of that number."""
    count = [0]

    def track(items, title):
        for item in items:
            count[0] += 1
            if count[0] > after:
                raise Killed
            yield item

    return track


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_that_died_goes_on_and_ends_with_the_same_numbers(
    after, eval_checkpoint, text_path, piqa, tmp_path, eval_settings, plain_rows
):
    names = [str(eval_checkpoint(seed=seed, name=f"model-{seed}")) for seed in (0, 1)]  # 2 + 1 chunks each
    asked = eval_settings(text_path, [f"piqa:{piqa}"])
    whole = evaluate(names, asked, tmp_path / "whole")
    with pytest.raises(Killed):
        evaluate(names, asked, tmp_path / "out", session=Session(track=interrupted(after)))
    assert (tmp_path / "out").exists() == (after > 0)  # nothing that would bind the next run to these settings
    with pytest.raises(UserError, match="are not finished" if after else "holds no results"):
        read_results(tmp_path / "out")
    seen = []
    again = evaluate(
        names, asked, tmp_path / "out", session=Session(track=lambda items, title: [seen.append(title), items][1])
    )
    assert plain_rows(again.results) == plain_rows(whole.results) and again.summary == whole.summary
    assert (
        seen
        == ["model-0, text.txt", "model-0, piqa:piqa.jsonl", "model-1, text.txt", "model-1, piqa:piqa.jsonl"][
            {0: 0, 1: 0, 3: 2}[after] :
        ]
    )


def test_a_finished_run_is_not_done_again(eval_checkpoint, text_path, tmp_path, monkeypatch, eval_settings):
    names, asked = [str(eval_checkpoint())], eval_settings(text_path)
    first = evaluate(names, asked, tmp_path / "out")
    monkeypatch.setattr("structprune.runs.evaluate.load_model", lambda *a, **k: pytest.fail("weights are read"))
    assert evaluate(names, asked, tmp_path / "out").summary == first.summary


def test_other_settings_or_weights_are_refused_until_overwritten(eval_checkpoint, text_path, tmp_path, eval_settings):
    one = eval_checkpoint()
    names = [str(one)]
    evaluate(names, eval_settings(text_path), tmp_path / "out")
    with pytest.raises(UserError, match=r"seed was 0 and is 1 .*--overwrite"):
        evaluate(names, eval_settings(text_path, evaluation__seed=1), tmp_path / "out")
    shutil.rmtree(one)
    eval_checkpoint(seed=3)
    with pytest.raises(UserError, match="checkpoints.llada-tiny.content was"):
        evaluate(names, eval_settings(text_path), tmp_path / "out")
    evaluate(names, eval_settings(text_path), tmp_path / "out", overwrite=True)


def test_overwriting_keeps_this_very_run_where_it_is_unfinished(
    eval_checkpoint, text_path, piqa, tmp_path, eval_settings
):
    names, asked = [str(eval_checkpoint())], eval_settings(text_path, [f"piqa:{piqa}"])
    with pytest.raises(Killed):
        evaluate(names, asked, tmp_path / "out", overwrite=True, session=Session(track=interrupted(1)))
    for chunk_count in (2, 3):  # of three; then, since it is finished, all anew
        chunks = []
        session = Session(track=lambda items, title, chunks=chunks: [chunks.extend(items), items][1])
        evaluate(names, asked, tmp_path / "out", overwrite=True, session=session)
        assert len(chunks) == chunk_count


def test_another_number_of_prompts_takes_up_the_same_run(eval_checkpoint, gsm8k, tmp_path, eval_settings):
    line = gsm8k.read_text()
    gsm8k.write_text("".join(line.replace("2 + 3", f"{n} + 3") for n in range(11)))  # 8 and 3
    options = {"evaluation__generation": {"gen_length": 4, "steps": 4, "block_length": 4}}
    names, tasks = [str(eval_checkpoint())], [f"gsm8k:{gsm8k}"]
    with pytest.raises(Killed):
        evaluate(
            names,
            eval_settings(tasks=tasks, evaluation__prompts=2, **options),
            tmp_path / "out",
            session=Session(track=interrupted(1)),
        )
    result = evaluate(names, eval_settings(tasks=tasks, evaluation__prompts=5, **options), tmp_path / "out")
    assert len(result.results.rows["llada-tiny"]["gsm8k:gsm8k.jsonl"]) == 11


def test_a_problem_of_the_first_process_is_everybodys(monkeypatch):
    from structprune import workers as module

    def broadcast(told, src):
        told[0] = ("no room", None)

    monkeypatch.setattr(module.torch.distributed, "broadcast_object_list", broadcast)
    with pytest.raises(UserError, match="no room"):
        module.Workers(1, 2).agree(None)
    module.Workers(0, 1).agree(None)


COUNTED = """
import os, pathlib, sys
from structprune.cli.main import main
from structprune.evaluation.result_files import ResultStore

count, add = [0], ResultStore.add
def counted(self, *arguments):
    count[0] += 1
    return add(self, *arguments)
ResultStore.add = counted
code = main(sys.argv[1:])
(pathlib.Path(__file__).parent / f"rank {os.environ['RANK']}").write_text(str(count[0]))
sys.exit(code)
"""


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def command(checkpoint, text_path, piqa, out):
    return [
        "eval", str(checkpoint), "--text", str(text_path), "--tasks", f"piqa:{piqa}", "--out", str(out),
        *(f"--set=evaluation.{pair}" for pair in ("windows=40", "length=32", "noise=2", "samples=8", "block=4")),
    ]  # fmt: skip


def test_two_processes_find_what_one_finds(eval_checkpoint, text_path, piqa, tmp_path, eval_settings, plain_rows):
    one = eval_checkpoint()
    asked = eval_settings(text_path, [f"piqa:{piqa}"], evaluation__windows=40)
    alone = evaluate([str(one)], asked, tmp_path / "alone")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    counter = tmp_path / "counted.py"  # as `python -m structprune`, and says how many chunks each process did
    counter.write_text(COUNTED)
    launch = [*launcher, str(counter), *command(one, text_path, piqa, tmp_path / "out")]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Wrote ") == 1
    assert {path.name: path.read_text() for path in tmp_path.glob("rank *")} == {"rank 0": "2", "rank 1": "2"}
    both = read_results(tmp_path / "out")
    assert plain_rows(both) == plain_rows(alone.results) and both.summary == alone.results.summary
    assert not (tmp_path / "out" / "partial").exists()


def test_a_killed_process_leaves_what_it_did(eval_checkpoint, text_path, piqa, tmp_path, eval_settings, plain_rows):
    """kill -9 in the middle, then the same command."""
    one, out = eval_checkpoint(), tmp_path / "out"
    arguments = [
        sys.executable,
        "-m",
        "structprune",
        *command(one, text_path, piqa, out),
        "--set=evaluation.samples=128",
    ]
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial, deadline = out / "partial" / "rank-0.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (partial.is_file() and partial.read_bytes().count(b"\n")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (out / "results.json").exists()
    kept = partial.read_bytes().count(b"\n")
    assert 1 <= kept < 4
    asked = eval_settings(text_path, [f"piqa:{piqa}"], evaluation__windows=40, evaluation__samples=128)
    whole, chunks = evaluate([str(one)], asked, tmp_path / "whole"), []
    again = evaluate(
        [str(one)], asked, out, session=Session(track=lambda items, title: [chunks.extend(items), items][1])
    )
    assert len(chunks) == 4 - kept and plain_rows(again.results) == plain_rows(whole.results)


def test_what_cannot_be_cleared_is_told_to_all_processes(
    eval_checkpoint, eval_settings, text_path, tmp_path, monkeypatch
):
    """Any error of the system too: the others must not wait for a process that is gone."""

    def fail(*given):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("structprune.runs.evaluate.is_resumable", fail)
    with pytest.raises(UserError, match="out' cannot be cleared .*Input/output error.*: remove it, or choose another"):
        evaluate([str(eval_checkpoint())], eval_settings(text_path), tmp_path / "out", overwrite=True)
