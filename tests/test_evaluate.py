"""A whole evaluation on tiny checkpoints: numbers, resuming, comparing, several processes, warnings."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from structprune.calibration.noise import stratified_noise
from structprune.errors import UserError
from structprune.evaluate import evaluate
from structprune.evaluation.nelbo import masked_nelbo
from structprune.evaluation.perturb import item_generator
from structprune.evaluation.result_files import read_results
from structprune.evaluation.settings import EvaluationConfig
from structprune.models.loading import load_model

GOALS = ["boil an egg", "open a jar", "dry wet shoes", "clean a window", "find a lost key", "carry water home"]


@pytest.fixture
def piqa(tmp_path):
    path = tmp_path / "piqa.jsonl"
    rows = [
        {"goal": f"How to {goal}?", "sol1": f"Use {goal[-3:]} and wait.", "sol2": "Run to the sea.", "label": index % 2}
        for index, goal in enumerate(GOALS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def gsm8k(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "2 + 3?", "answer": "It is five.\n#### 5"}) + "\n")
    return path


@pytest.fixture
def checkpoint(tiny_checkpoint):
    def make(family="llada", seed=0, name=None):
        positions = "max_position_embeddings" if family == "dream" else "max_sequence_length"
        made = tiny_checkpoint(family, seed, name=name, **{positions: 128})
        path = made / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}))
        return made

    return make


def settings(text=None, tasks=(), **changes):
    """Quick ones."""
    values = {
        "evaluation.source": None if text is None else str(text),
        "evaluation.tasks": [str(task) for task in tasks],
    }
    if text is not None:
        values |= {"evaluation.windows": 20, "evaluation.length": 32, "evaluation.noise": 2}
    if any(str(task).startswith("piqa") for task in tasks):
        values |= {"evaluation.samples": 8, "evaluation.block": 4}
    return EvaluationConfig.load(overrides=values | {key.replace("__", "."): value for key, value in changes.items()})


def plain(results):
    """Checkpoint -> task -> key -> numbers, without the keys of other rows."""
    return {
        label: {task: {row.key: tuple(sorted(row.parts.items())) for row in rows} for task, rows in tasks.items()}
        for label, tasks in results.rows.items()
    }


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_every_kind_of_unit(family, checkpoint, text_path, piqa, gsm8k, tmp_path):
    tasks = [f"piqa:{piqa}", f"gsm8k:{gsm8k}"]
    options = {"gen_length": 8, "steps": 8} | ({"block_length": 8} if family == "llada" else {})
    found = evaluate(
        [str(checkpoint(family))], settings(text_path, tasks, evaluation__generation=options), tmp_path / "out"
    )
    (rows,) = found.results.rows.values()
    assert {task: len(each) for task, each in rows.items()} == {
        "text.txt": 20,
        "piqa:piqa.jsonl": 6,
        "gsm8k:gsm8k.jsonl": 1,
    }
    assert [row.gold for row in rows["piqa:piqa.jsonl"]] == [0, 1, 0, 1, 0, 1]
    row = rows["piqa:piqa.jsonl"][2]
    assert row.metrics == {"acc": float(row.choice == 0), "acc_norm": float(row.choice_norm == 0)} and row.samples == 8
    assert rows["gsm8k:gsm8k.jsonl"][0].metrics.keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert found.summary["tasks"]["gsm8k:gsm8k.jsonl"]["main"] == "exact_match,strict-match"
    assert not (tmp_path / "out" / "partial").exists()


def test_a_window_is_its_own_masked_nelbo(checkpoint, text_path, tmp_path):
    one = checkpoint()
    found = evaluate([str(one)], settings(text_path), tmp_path / "out")
    ((rows,),) = [tasks.values() for tasks in found.results.rows.values()]
    from structprune.evaluation_request import prepare

    (subject,) = prepare([str(one)], settings(text_path))
    (unit,) = subject.units
    window, key = unit.windows[7:8], unit.keys[7]  # (1, T)
    assert rows[7].key == key
    noise = stratified_noise(window, 2047, item_generator(0, key), 2)
    expected = masked_nelbo(load_model(one), window, *noise)
    assert rows[7].nelbo == pytest.approx(expected.nelbo.item(), rel=1e-5)
    assert rows[7].masked_tokens == expected.masked_tokens.item() == (noise[0] == 2047).sum()


def test_the_first_checkpoint_is_compared_with(checkpoint, text_path, piqa, tmp_path):
    names = [str(checkpoint(seed=seed, name=f"model-{seed}")) for seed in (0, 1)]
    names.append(shutil.copytree(names[0], tmp_path / "same").as_posix())
    found = evaluate(names, settings(text_path, [f"piqa:{piqa}"]), tmp_path / "out")
    assert found.summary["baseline"] == "model-0"
    same = found.summary["differences"]["same"]["text.txt"]["nelbo"]
    assert same["difference"] == 0 and same["verdict"] == "no difference shown"  # common noise: exactly the same
    other = found.summary["differences"]["model-1"]["text.txt"]["nelbo"]
    assert other["difference"] != 0 and other["items"] == 20 and other["low"] < other["difference"] < other["high"]


def test_families_with_one_tokenizer_keep_their_own_forms(checkpoint, text_path, piqa, tmp_path):
    """Dream scores between BOS and EOS, LLaDA does not; beside each other each finds what it finds alone."""
    names = [str(checkpoint("llada")), str(checkpoint("dream"))]
    asked = settings(text_path, [f"piqa:{piqa}"], evaluation__cfg_scale=0)
    both = plain(evaluate(names, asked, tmp_path / "both").results)
    alone = [plain(evaluate([name], asked, tmp_path / str(index)).results) for index, name in enumerate(names)]
    assert both == alone[0] | alone[1]


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
def test_a_run_that_died_goes_on_and_ends_with_the_same_numbers(after, checkpoint, text_path, piqa, tmp_path):
    names = [str(checkpoint(seed=seed, name=f"model-{seed}")) for seed in (0, 1)]  # 2 + 1 chunks each
    asked = settings(text_path, [f"piqa:{piqa}"])
    whole = evaluate(names, asked, tmp_path / "whole")
    with pytest.raises(Killed):
        evaluate(names, asked, tmp_path / "out", track=interrupted(after))
    with pytest.raises(UserError, match="are not finished"):
        read_results(tmp_path / "out")
    seen = []
    again = evaluate(names, asked, tmp_path / "out", track=lambda items, title: [seen.append(title), items][1])
    assert plain(again.results) == plain(whole.results) and again.summary == whole.summary
    assert (
        seen
        == ["model-0, text.txt", "model-0, piqa:piqa.jsonl", "model-1, text.txt", "model-1, piqa:piqa.jsonl"][
            {0: 0, 1: 0, 3: 2}[after] :
        ]
    )


def test_a_finished_run_is_not_done_again(checkpoint, text_path, tmp_path, monkeypatch):
    names, asked = [str(checkpoint())], settings(text_path)
    first = evaluate(names, asked, tmp_path / "out")
    monkeypatch.setattr("structprune.evaluate.load_model", lambda *a, **k: pytest.fail("weights are read"))
    assert evaluate(names, asked, tmp_path / "out").summary == first.summary


def test_other_settings_or_weights_are_refused_until_overwritten(checkpoint, text_path, tmp_path):
    one = checkpoint()
    names = [str(one)]
    evaluate(names, settings(text_path), tmp_path / "out")
    with pytest.raises(UserError, match=r"seed was 0 and is 1 .*--overwrite"):
        evaluate(names, settings(text_path, evaluation__seed=1), tmp_path / "out")
    shutil.rmtree(one)
    checkpoint(seed=3)
    with pytest.raises(UserError, match="checkpoints.llada-tiny.content was"):
        evaluate(names, settings(text_path), tmp_path / "out")
    evaluate(names, settings(text_path), tmp_path / "out", overwrite=True)


def test_the_order_of_checkpoints_says_what_is_compared_with(checkpoint, text_path, tmp_path):
    """Also of a finished run: the other way round nothing is measured again, and differences change their sign."""
    names = [str(checkpoint(seed=seed, name=f"model-{seed}")) for seed in (0, 1)]
    one = evaluate(names, settings(text_path), tmp_path / "out").summary
    two = evaluate(names[::-1], settings(text_path), tmp_path / "out").summary
    assert (one["baseline"], two["baseline"]) == ("model-0", "model-1")
    gaps = [
        each["differences"][label]["text.txt"]["nelbo"]["difference"]
        for each, label in ((one, "model-1"), (two, "model-0"))
    ]
    assert gaps[0] == pytest.approx(-gaps[1]) and gaps[0] != 0
    assert read_results(tmp_path / "out").summary == two


def test_overwriting_keeps_this_very_run_where_it_is_unfinished(checkpoint, text_path, piqa, tmp_path):
    names, asked = [str(checkpoint())], settings(text_path, [f"piqa:{piqa}"])
    with pytest.raises(Killed):
        evaluate(names, asked, tmp_path / "out", overwrite=True, track=interrupted(1))
    chunks = []
    evaluate(
        names, asked, tmp_path / "out", overwrite=True, track=lambda items, title: [chunks.extend(items), items][1]
    )
    assert len(chunks) == 2  # of three
    chunks.clear()
    evaluate(
        names, asked, tmp_path / "out", overwrite=True, track=lambda items, title: [chunks.extend(items), items][1]
    )
    assert len(chunks) == 3  # finished: all anew


def test_another_number_of_prompts_takes_up_the_same_run(checkpoint, gsm8k, tmp_path):
    line = gsm8k.read_text()
    gsm8k.write_text("".join(line.replace("2 + 3", f"{n} + 3") for n in range(11)))  # 8 and 3
    options = {"evaluation__generation": {"gen_length": 4, "steps": 4, "block_length": 4}}
    names, tasks = [str(checkpoint())], [f"gsm8k:{gsm8k}"]
    with pytest.raises(Killed):
        evaluate(names, settings(tasks=tasks, evaluation__prompts=2, **options), tmp_path / "out", track=interrupted(1))
    found = evaluate(names, settings(tasks=tasks, evaluation__prompts=5, **options), tmp_path / "out")
    assert len(found.results.rows["llada-tiny"]["gsm8k:gsm8k.jsonl"]) == 11


def test_a_problem_of_the_first_process_is_everybodys(monkeypatch):
    from structprune.evaluation import workers as module

    def broadcast(told, src):
        told[0] = "no room"

    monkeypatch.setattr(module.torch.distributed, "broadcast_object_list", broadcast)
    with pytest.raises(UserError, match="no room"):
        module.Workers(1, 2).agree(None)
    module.Workers(0, 1).agree(None)


def test_an_earlier_run_is_compared_with(checkpoint, text_path, piqa, tmp_path):
    tasks = [f"piqa:{piqa}"]
    evaluate([str(checkpoint(name="dense"))], settings(text_path, tasks), tmp_path / "first")
    later = settings(text_path, tasks, evaluation__limit=4, evaluation__samples=4)
    found = evaluate([str(checkpoint(seed=1, name="small"))], later, tmp_path / "out", against=tmp_path / "first")
    assert found.summary["baseline"] == "first-dense"
    shared = found.summary["differences"]["small"]["piqa:piqa.jsonl"]["acc"]
    assert (shared["items"], shared["left_out"]) == (4, 2)
    assert found.summary["differences"]["small"]["text.txt"]["nelbo"]["items"] == 20
    assert found.warnings == (
        f"piqa:piqa.jsonl was evaluated otherwise in '{tmp_path / 'first'}': samples was 8 and is 4",
    )
    kept = json.loads((tmp_path / "out" / "against.json").read_text())
    assert kept["summary"] == json.loads(json.dumps(found.summary))
    assert "first-dense" not in json.loads((tmp_path / "out" / "results.json").read_text())["summary"]["checkpoints"]


def test_an_earlier_run_of_other_tasks_is_refused(checkpoint, text_path, piqa, tmp_path):
    one = str(checkpoint())
    evaluate([one], settings(text_path), tmp_path / "first")
    with pytest.raises(UserError, match="has none of these tasks: text.txt were evaluated"):
        evaluate([one], settings(tasks=[f"piqa:{piqa}"]), tmp_path / "out", against=tmp_path / "first")
    assert not (tmp_path / "out").exists()


def test_text_that_was_calibrated_on_is_named(checkpoint, text_path, tmp_path, tiny_calibration):
    one = checkpoint()
    plain_run = evaluate([str(one)], settings(text_path), tmp_path / "plain")
    assert plain_run.warnings == ()
    tiny_calibration(load_model(one), windows=8).save(one / "calibration.safetensors")
    heard = []
    found = evaluate([str(one)], settings(text_path), tmp_path / "out", say=heard.append)
    assert len(found.warnings) == 1 and found.warnings[0].startswith("llada-tiny was calibrated on text that ")
    assert found.warnings[0].endswith("of the items of text.txt hold: its figures there flatter it")
    assert heard == list(found.warnings)


def test_an_instruct_checkpoint_without_chat_is_warned_of(checkpoint, text_path, piqa, tmp_path):
    one = checkpoint(name="tiny-Instruct")
    found = evaluate([str(one)], settings(text_path, [f"piqa:{piqa}"]), tmp_path / "out")
    assert "tiny-Instruct looks like an Instruct checkpoint" in found.warnings[0]
    assert evaluate([str(one)], settings(text_path), tmp_path / "text").warnings == ()  # no prompt, no template


def test_one_text_through_two_tokenizers_shares_no_window(checkpoint, text_path, tmp_path):
    one, two = checkpoint(name="one"), checkpoint(seed=1, name="two")
    path = two / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"] = values["model"]["merges"][:-300]
    path.write_text(json.dumps(values))
    found = evaluate([str(one), str(two)], settings(text_path), tmp_path / "out")
    assert found.summary["differences"]["two"] == {"text.txt": {}}
    assert [len(rows["text.txt"]) for rows in found.results.rows.values()] == [20, 20]


COUNTED = """
import os, pathlib, sys
from structprune.cli import main
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


def test_two_processes_find_what_one_finds(checkpoint, text_path, piqa, tmp_path):
    one = checkpoint()
    asked = settings(text_path, [f"piqa:{piqa}"], evaluation__windows=40)
    alone = evaluate([str(one)], asked, tmp_path / "alone")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    counter = tmp_path / "counted.py"  # as `python -m structprune`, and says how many chunks each process did
    counter.write_text(COUNTED)
    launch = [*launcher, str(counter), *command(one, text_path, piqa, tmp_path / "out")]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Wrote ") == 1
    assert {path.name: path.read_text() for path in tmp_path.glob("rank *")} == {"rank 0": "2", "rank 1": "2"}
    both = read_results(tmp_path / "out")
    assert plain(both) == plain(alone.results) and both.summary == alone.results.summary
    assert not (tmp_path / "out" / "partial").exists()


def test_a_killed_process_leaves_what_it_did(checkpoint, text_path, piqa, tmp_path):
    """kill -9 in the middle, then the same command."""
    one, out = checkpoint(), tmp_path / "out"
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
    asked = settings(text_path, [f"piqa:{piqa}"], evaluation__windows=40, evaluation__samples=128)
    whole, chunks = evaluate([str(one)], asked, tmp_path / "whole"), []
    again = evaluate([str(one)], asked, out, track=lambda items, title: [chunks.extend(items), items][1])
    assert len(chunks) == 4 - kept and plain(again.results) == plain(whole.results)


def test_batches_change_nothing(checkpoint, text_path, piqa, tmp_path):
    one, tasks = str(checkpoint()), [f"piqa:{piqa}"]
    large = evaluate([one], settings(text_path, tasks), tmp_path / "large")
    small = evaluate([one], settings(text_path, tasks, evaluation__batch=40), tmp_path / "small")
    for task in ("text.txt", "piqa:piqa.jsonl"):
        pairs = zip(large.results.rows["llada-tiny"][task], small.results.rows["llada-tiny"][task])
        for ours, theirs in pairs:
            values = (lambda row: row.log_likelihoods) if task.startswith("piqa") else (lambda row: (row.nelbo,))
            assert values(ours) == pytest.approx(values(theirs), rel=1e-5)


def test_memory_that_runs_out_is_halved(checkpoint, text_path, tmp_path, monkeypatch):
    from structprune.evaluation import nelbo

    real, sizes = nelbo._masked_nats, []

    def tight(model, ids, target, masked):
        sizes.append(len(ids))
        if len(ids) > 3:
            raise torch.OutOfMemoryError("full")
        return real(model, ids, target, masked)

    one = str(checkpoint())
    whole = evaluate([one], settings(text_path), tmp_path / "whole")
    monkeypatch.setattr(nelbo, "_masked_nats", tight)
    found = evaluate([one], settings(text_path), tmp_path / "out")
    assert max(sizes) > 3 and sizes[-1] <= 3 and sum(size <= 3 for size in sizes) >= 40 / 3
    values = [[row.nelbo for row in run.results.rows["llada-tiny"]["text.txt"]] for run in (whole, found)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
