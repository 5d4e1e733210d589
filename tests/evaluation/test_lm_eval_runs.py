"""`structprune eval` on tasks of lm-eval: groups are one task, generation has its filters (needs lm-eval)."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is an extra")
import datasets
from lm_eval.tasks import TaskManager

from structprune.evaluation import lm_tasks
from structprune.evaluation.settings import EvaluationConfig
from structprune.runs.evaluate import evaluate

pytestmark = pytest.mark.slow

CHOICE = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
output_type: multiple_choice
validation_split: validation
num_fewshot: 0
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list: [{metric: acc}]
"""
GROUP = "group: tiny_group\ntask: [tiny_one, tiny_two]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: "{{goal}}"
doc_to_target: "{{sol1}}"
metric_list: [{metric: exact_match}]
generation_kwargs: {until: ["Question:"], max_gen_toks: 8, do_sample: false}
"""
BLEU = GENERATION.replace("tiny_generation", "tiny_bleu").replace("exact_match", "bleu")


def write_tasks(folder):
    """The files of all tasks and their documents: 3 of `tiny_one` and `tiny_generation`, 5 of `tiny_two`."""
    for name, count in (("one", 3), ("two", 5)):
        rows = [{"goal": f"{name} {n}?", "sol1": "Yes.", "sol2": "Not at all.", "label": n % 2} for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = CHOICE.replace("NAME", f"tiny_{name}").replace("FILE", str(folder / f"{name}.jsonl"))
        (folder / f"{name}.yaml").write_text(text)
    (folder / "group.yaml").write_text(GROUP)
    (folder / "generation.yaml").write_text(GENERATION.replace("FILE", str(folder / "one.jsonl")))
    (folder / "bleu.yaml").write_text(BLEU.replace("FILE", str(folder / "one.jsonl")))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_tasks(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(lm_tasks, "_manager", lambda include: TaskManager(include_path=include, include_defaults=False))
    return tmp_path


def settings(folder, *tasks, **changes):
    values = {"tasks": list(tasks), "include": str(folder), "samples": 8} | changes
    return EvaluationConfig.load(overrides={f"evaluation.{key}": value for key, value in values.items()})


def test_a_group_is_one_task_and_its_mean_is_over_items(folder, tiny_checkpoint, tmp_path):
    result = evaluate([str(tiny_checkpoint())], settings(folder, "tiny_group"), tmp_path / "out")
    ((task, rows),) = next(iter(result.results.rows.values())).items()
    assert task == "tiny_group" and len(rows) == 8
    assert [row.key.partition("@")[0] for row in rows] == [
        *(f"tiny_one/{n}" for n in range(3)), *(f"tiny_two/{n}" for n in range(5)),
    ]  # fmt: skip
    right = [row.metrics["acc"] for row in rows]
    assert result.summary["checkpoints"]["llada-tiny"]["tiny_group"]["metrics"]["acc"]["value"] == sum(right) / 8
    for row in rows:
        assert row.metrics["acc"] == float(row.choice == int(row.key.partition("@")[0][-1]) % 2)
    assert result.results.settings["lm_eval"] and list(row.metrics) == ["acc"]


def test_generation_is_graded_by_lm_eval(folder, tiny_checkpoint, tmp_path):
    result = evaluate([str(tiny_checkpoint())], settings(folder, "tiny_generation", samples=None), tmp_path / "out")
    (rows,) = next(iter(result.results.rows.values())).values()
    assert len(rows) == 3 and rows[0].metrics == {"exact_match": 0.0} and rows[0].text


def test_a_task_without_a_metric_per_item_is_refused_before_weights_are_read(folder, tiny_checkpoint, tmp_path):
    from structprune.errors import UserError

    with pytest.raises(UserError, match="tiny_bleu.*no metric"):
        evaluate([str(tiny_checkpoint())], settings(folder, "tiny_bleu", samples=None), tmp_path / "out")
    assert not (tmp_path / "out").exists()


COUNTED = """
import functools, os, pathlib, sys
import lm_eval.tasks
from structprune.evaluation import harness

lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
def counted(name):
    work = getattr(harness.StructpruneLM, name)
    def count(self, inputs):
        place = pathlib.Path(os.environ["COUNTS"]) / f"{name} {self.workers.rank}"  # lines of two would mix
        place.write_text(str(len(inputs)))
        return work(self, inputs)
    return count
for name in ("_score", "_generate"):
    setattr(harness.StructpruneLM, name, counted(name))
sys.exit(harness.main())
"""


@pytest.fixture(scope="module")
def lm_eval_run(tmp_path_factory, shared_checkpoint):
    """`lm_eval_run(processes, *arguments)` -> answers by (task, document), and how many each process found."""
    folder = tmp_path_factory.mktemp("runs")
    write_tasks(folder)
    (folder / "counted.py").write_text(COUNTED)
    checkpoint = shared_checkpoint()

    def run(processes, *arguments):
        out, counts = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("counts")
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
        command = [
            sys.executable, *(launcher if processes > 1 else ()), str(folder / "counted.py"), "--model", "structprune",
            "--tasks", "tiny_two,tiny_generation", "--include_path", str(folder), "--log_samples",
            "--model_args", f"pretrained={checkpoint},samples=8", "--output_path", str(out), *arguments,
        ]  # fmt: skip
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(folder)}
        environment = os.environ | variables | {"COUNTS": str(counts)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(list(out.rglob("results_*.json"))) == 1  # one process writes
        answers = {}
        for path in out.rglob("samples_*.jsonl"):
            task = path.name.removeprefix("samples_").rpartition("_")[0]
            for row in map(json.loads, path.read_text().splitlines()):
                answers[task, row["doc_id"]] = row["filtered_resps"]
        return answers, {path.name: int(path.read_text()) for path in counts.iterdir()}

    return run


@pytest.fixture(scope="module")
def alone(lm_eval_run):
    """Answers of one process on all documents."""
    answers, counts = lm_eval_run(1)
    assert len(answers) == 8 and counts == {"_score 0": 5, "_generate 0": 3}
    return answers


def assert_same(answers, expected):
    """Equal texts, and log-likelihoods equal up to rounding."""
    for key, values in answers.items():
        if key[0] == "tiny_generation":
            assert values == expected[key] and values[0]
        else:
            assert [float(v[0]) for v in values] == pytest.approx([float(v[0]) for v in expected[key]], rel=1e-5)


def test_two_processes_of_lm_evals_command_line_find_what_one_finds(lm_eval_run, alone):
    """Documents are split unevenly: 5 between 2, and 3 between 2."""
    answers, counts = lm_eval_run(2)
    assert answers.keys() == alone.keys()
    assert_same(answers, alone)
    assert counts == {"_score 0": 3, "_score 1": 2, "_generate 0": 2, "_generate 1": 1}


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_without_a_document_wait_for_the_others(lm_eval_run, alone, processes):
    answers, counts = lm_eval_run(processes, "--limit", "1")
    assert answers.keys() == {("tiny_two", 0), ("tiny_generation", 0)}
    assert_same(answers, alone)
    expected = {f"{work} {rank}": int(rank == 0) for work in ("_score", "_generate") for rank in range(processes)}
    assert counts == expected


def test_a_cache_of_answers_that_one_process_filled_serves_all(lm_eval_run, alone, tmp_path):
    """All are in the first process's cache and none in the second's, which would wait for the first's share."""
    cache = ("--use_cache", str(tmp_path / "cache"))
    assert lm_eval_run(1, *cache)[1] == {"_score 0": 5, "_generate 0": 3}
    answers, counts = lm_eval_run(2, *cache)
    assert answers.keys() == alone.keys() and counts == {}
    assert_same(answers, alone)
