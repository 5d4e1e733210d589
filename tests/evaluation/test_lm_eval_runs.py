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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, count in (("one", 3), ("two", 5)):
        rows = [{"goal": f"{name} {n}?", "sol1": "Yes.", "sol2": "Not at all.", "label": n % 2} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = CHOICE.replace("NAME", f"tiny_{name}").replace("FILE", str(tmp_path / f"{name}.jsonl"))
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "group.yaml").write_text(GROUP)
    (tmp_path / "generation.yaml").write_text(GENERATION.replace("FILE", str(tmp_path / "one.jsonl")))
    (tmp_path / "bleu.yaml").write_text(BLEU.replace("FILE", str(tmp_path / "one.jsonl")))
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
import os, pathlib, sys
from structprune.evaluation import harness

score = harness.StructpruneLM.loglikelihood
def counted(self, requests):
    count = len({request.doc_id for request in requests})
    place = pathlib.Path(os.environ["COUNTS"]) / f"rank {self.rank} of {self.world_size}"  # lines of two would mix
    place.write_text(str(count))
    return score(self, requests)
harness.StructpruneLM.loglikelihood = counted
sys.exit(harness.main())
"""


def test_two_processes_of_lm_evals_command_line_find_what_one_finds(folder, tiny_checkpoint):
    """Documents are split unevenly: 5 between 2."""
    wrapped, places = folder / "counted.py", {}
    wrapped.write_text(COUNTED)
    given = [
        str(wrapped), "--model", "structprune", "--tasks", "tiny_two", "--include_path", str(folder),
        "--model_args", f"pretrained={tiny_checkpoint()},samples=8", "--log_samples",
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(folder)}
    result = {}
    for name, start in (("one", []), ("two", launcher)):
        command = [sys.executable, *start, *given, "--output_path", str(folder / name)]
        counts = folder / f"counts-{name}"
        counts.mkdir()
        environment["COUNTS"] = str(counts)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        (samples,) = (folder / name).rglob("samples_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        result[name] = {row["doc_id"]: [float(value[0]) for value in row["filtered_resps"]] for row in rows}
        places[name] = {path.name: int(path.read_text()) for path in counts.iterdir()}
    assert places == {
        "one": {"rank 0 of 1": 5},
        "two": {"rank 0 of 2": 3, "rank 1 of 2": 2},
    }
    assert len(result["one"]) == 5 and result["one"].keys() == result["two"].keys()
    for document, values in result["one"].items():
        assert values == pytest.approx(result["two"][document], rel=1e-5)
