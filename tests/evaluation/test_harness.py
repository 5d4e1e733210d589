"""structprune's models in lm-eval's own evaluator, on task files of our own (needs lm-eval)."""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is an extra")
import datasets
import lm_eval.__main__
from lm_eval.tasks import TaskManager

from structprune import load_model
from structprune.errors import UserError
from structprune.evaluation import harness, lm_tasks
from structprune.evaluation.choices import MonteCarlo, score_items
from structprune.evaluation.documents import TaskOptions
from structprune.evaluation.harness import StructpruneLM, main, split_options
from structprune.evaluation.lm_tasks import load_tasks
from structprune.evaluation.openings import generate_texts
from structprune.evaluation.requests import to_item
from structprune.evaluation.tasks import open_task
from structprune.evaluation.texts import Texts
from structprune.generation.generate import generate
from structprune.generation.samplers import LLaDAGeneration
from structprune.models.configuration_structprune import StructpruneDreamConfig, StructpruneLLaDAConfig
from structprune.models.encode import Batches
from structprune.models.families import LLADA, family_named

ROWS = [
    {"goal": "Dry a shoe.", "sol1": "Use paper.", "sol2": "Use a long spoon of soup.", "label": 0},
    {"goal": "Open a jar.", "sol1": "Sing.", "sol2": "Warm the lid.", "label": 1},
    {"goal": "Cool tea.", "sol1": "Add ice.", "sol2": "Add sand.", "label": 0},
    {"goal": "Cut bread.", "sol1": "Boil it.", "sol2": "Take a knife.", "label": 1},
    {"goal": "Fix a chair.", "sol1": "Glue the leg.", "sol2": "Shout.", "label": 0},
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE, train: FILE}}
output_type: multiple_choice
validation_split: validation
training_split: train
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: "{{goal}}"
doc_to_target: "{{sol1}}"
metric_list:
  - metric: exact_match
generation_kwargs: {until: ["Question:"], max_gen_toks: 8, do_sample: false, temperature: 0.0}
filter_list:
  - name: whole
    filter: [{function: take_first}]
  - name: letters
    filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]
"""
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of task files and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("generation", GENERATION)):
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(folder / "rows.jsonl")))
    return folder


@pytest.fixture(autouse=True)
def own_folders_only(tmp_path_factory, monkeypatch):
    """Data sets are cached in a folder of the test's, and lm-eval's thousands of tasks are not scanned."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(lm_tasks, "_manager", lambda include: TaskManager(include_path=include, include_defaults=False))


@pytest.fixture
def checkpoint(tiny_checkpoint):
    """`checkpoint(family)` -> a tiny checkpoint that names BOS and has room for a prompt."""

    def make(family="llada", template=None, **options):
        positions = {"dream": "max_position_embeddings"}.get(family, "max_sequence_length")
        directory = tiny_checkpoint(family, **{positions: 128}, **options)
        path = directory / "tokenizer_config.json"
        values = json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}
        path.write_text(json.dumps(values | ({"chat_template": template} if template else {})))
        return directory

    return make


def evaluate(model, folder, task, **options):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_lm_evals_evaluator_and_ours_agree_on_choices(checkpoint, folder, family):
    directory = checkpoint(family)
    options = "samples=16,seed=3" + (",cfg_scale=0.5" if family == "llada" else "")
    results = evaluate("structprune", folder, "tiny_choice", model_args=f"pretrained={directory},{options}", limit=4)
    samples = sorted(results["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])

    model = load_model(directory)
    texts = Texts.open(directory, family_named(family).text_edges)
    [task] = load_tasks("tiny_choice", texts, TaskOptions(limit=4, include=folder))
    settings = MonteCarlo(samples=16, seed=3, cfg_scale=0.5 if family == "llada" else 0.0)
    scored = score_items(model, [to_item(document, texts) for document in task.documents], settings, Batches(256))
    graded = []
    for sample, document, result in zip(samples, task.documents, scored, strict=True):
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert theirs == pytest.approx(list(result.log_likelihoods), abs=1e-4)
        graded.append(task.grade(document, result.log_likelihoods))
        assert graded[-1] == {"acc": sample["acc"], "acc_norm": sample["acc_norm"]}
    for metric in ("acc", "acc_norm"):
        mean = sum(grade[metric] for grade in graded) / 4
        assert results["results"]["tiny_choice"][f"{metric},none"] == mean


@pytest.mark.slow
def test_a_few_items_are_scored_at_a_time(checkpoint, folder, monkeypatch):
    """The longest first, two and two and one; the answers come back in the order of the requests."""
    directory, parts = checkpoint(), []
    options = {"model_args": f"pretrained={directory},samples=16"}

    def logged(result):
        return [each["resps"] for each in sorted(result["samples"]["tiny_choice"], key=lambda s: s["doc_id"])]

    whole = logged(evaluate("structprune", folder, "tiny_choice", **options))
    count = lambda model, items, *rest: parts.append(list(items)) or score_items(model, items, *rest)  # noqa: E731
    monkeypatch.setattr(harness, "PART", 2)
    monkeypatch.setattr(harness, "score_items", count)
    result = logged(evaluate("structprune", folder, "tiny_choice", **options))
    assert [len(part) for part in parts] == [2, 2, 1]
    longest = [max(len(a.prompt) + len(a.target) for a in item.answers) for part in parts for item in part]
    assert longest == sorted(longest, reverse=True) and longest[0] > longest[-1]
    for one, other in zip(whole, result, strict=True):
        assert [float(r[0][0]) for r in one] == pytest.approx([float(r[0][0]) for r in other], rel=1e-4)


def test_choices_are_graded_by_lm_eval(checkpoint, folder):
    [task] = load_tasks("tiny_choice", Texts.open(checkpoint(), "none"), TaskOptions(include=folder))
    assert len(task.documents) == 5 and task.documents[0].key == "tiny_choice/0"
    assert task.documents[0].pairs[0] == ("Question: Dry a shoe.\nAnswer:", " Use paper.")
    assert task.documents[0].lengths == (10, 25)
    assert task.grade(task.documents[0], (-10.0, -12.0)) == {"acc": 1.0, "acc_norm": 0.0}
    assert task.grade(task.documents[0], (-12.0, -10.0)) == {"acc": 0.0, "acc_norm": 0.0}
    assert task.grade(task.documents[1], (-12.0, -10.0)) == {"acc": 1.0, "acc_norm": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_lm_evals_evaluator_and_ours_agree_on_generation(checkpoint, folder, family):
    directory = checkpoint(family)
    results = evaluate("structprune", folder, "tiny_generation", model_args=f"pretrained={directory},steps=4")
    samples = [s for s in results["samples"]["tiny_generation"] if s["filter"] == "whole"]
    model, texts = load_model(directory), Texts.open(directory, family_named(family).text_edges)
    [task] = load_tasks("tiny_generation", texts, TaskOptions(include=folder))
    result = generate_texts(model, task.documents, texts, {"steps": 4}, batch=2)
    assert [sample["resps"][0][0] for sample in samples] == result
    assert all(text and "<|mdm_mask|>" not in text for text in result)
    for sample, document, text in zip(samples, task.documents, result, strict=True):
        grades = task.grade(document, text)
        assert grades["exact_match,whole"] == sample["exact_match"]
        assert set(grades) == {"exact_match,whole", "exact_match,letters"}


def test_generations_are_graded_by_lm_eval(checkpoint, folder):
    [task] = load_tasks("tiny_generation", Texts.open(checkpoint(), "none"), TaskOptions(limit=1, include=folder))
    assert task.grade(task.documents[0], "Use paper.") == {"exact_match,whole": 1.0, "exact_match,letters": 0.0}


def test_a_generation_is_what_the_sampler_gives(checkpoint, folder):
    directory = checkpoint()
    model, texts = load_model(directory), Texts.open(directory, "none")
    [task] = load_tasks("tiny_generation", texts, TaskOptions(limit=1, include=folder))
    prompt = texts.prompt("Dry a shoe.")
    [ids] = generate(model, [prompt], LLaDAGeneration(8, 8, 8))  # max_gen_toks: 8
    assert generate_texts(model, task.documents, texts, {}) == [texts.answer(ids[len(prompt) :], ("Question:",))]


def test_drawn_tokens_depend_on_the_document_alone(checkpoint, folder):
    directory = checkpoint()
    model, texts = load_model(directory), Texts.open(directory, "none")
    [task] = load_tasks("tiny_generation", texts, TaskOptions(limit=3, include=folder))
    together = generate_texts(model, task.documents, texts, {"temperature": 1.0}, seed=5)
    assert generate_texts(model, task.documents[1:2], texts, {"temperature": 1.0}, seed=5) == together[1:2]
    assert generate_texts(model, task.documents, texts, {"temperature": 1.0}, seed=6) != together


def test_shots_seed_and_limit_are_lm_evals(checkpoint, folder):
    texts = Texts.open(checkpoint(), "none")
    contexts = [
        load_tasks("tiny_choice", texts, TaskOptions(2, 1, seed, folder))[0].documents[0].pairs[0][0]
        for seed in (1, 1, 2, 3, 4)
    ]
    assert all(context.count("Question:") == 3 for context in contexts)
    assert contexts[0] == contexts[1] and len(set(contexts)) > 1
    with pytest.raises(UserError, match="fixed at 0 examples by lm-eval: set evaluation.shots=0, not 2"):
        load_tasks("tiny_generation", texts, TaskOptions(shots=2, limit=1, seed=1, include=folder))


def test_the_chat_template_is_applied_by_both(checkpoint, folder):
    directory = checkpoint(template=TEMPLATE, name="Tiny-Instruct")
    texts = Texts.open(directory, "none", chat=True)
    [task] = load_tasks("tiny_choice", texts, TaskOptions(limit=2, include=folder))
    expected = "[user]Question: Dry a shoe.\nAnswer:[assistant]"
    assert task.documents[0].pairs[0] == (expected, "Use paper.") and task.documents[0].lengths == (10, 25)
    arguments = f"pretrained={directory},samples=8"
    results = evaluate("structprune", folder, "tiny_choice", model_args=arguments, limit=2, apply_chat_template=True)
    assert results["samples"]["tiny_choice"][0]["arguments"][0] == (expected, "Use paper.")


def test_names_that_lm_eval_has_not(checkpoint, folder):
    texts = Texts.open(checkpoint(), "none")
    with pytest.raises(UserError, match=r"unknown task 'tiny_choise' \(did you mean 'tiny_choice'\?\)"):
        open_task("tiny_choise", LLADA, texts, TaskOptions(include=folder))
    [task] = open_task(str(folder / "choice.yaml"), LLADA, texts, TaskOptions(limit=1))
    assert task.name == "tiny_choice"


def test_data_that_cannot_be_had(checkpoint, folder, tmp_path):
    (tmp_path / "broken.yaml").write_text(CHOICE.replace("FILE", "absent.jsonl").replace("tiny_choice", "broken"))
    with pytest.raises(UserError, match="the data of task 'broken' cannot be read"):
        load_tasks("broken", Texts.open(checkpoint(), "none"), TaskOptions(limit=1, seed=1, include=tmp_path))


@pytest.mark.parametrize(
    "line, message",
    [
        ("output_type: loglikelihood_rolling", "is of type loglikelihood_rolling"),
        ("repeats: 3", "needs 3 answers"),
        ("unsafe_code: true", "runs generated code"),
    ],
)
def test_kinds_that_are_not_run(checkpoint, folder, tmp_path, line, message):
    text = GENERATION.replace("FILE", str(folder / "rows.jsonl")).replace("tiny_generation", "odd")
    if line.startswith("output_type"):
        text = text.replace("output_type: generate_until", line).replace("exact_match", "bits_per_byte")
        text = text.split("generation_kwargs")[0]
    else:
        text += line + "\n"
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_tasks("odd", Texts.open(checkpoint(), "none"), TaskOptions(limit=1, seed=1, include=tmp_path))


def test_rolling_likelihoods_are_refused(checkpoint):
    with pytest.raises(UserError, match="--text FILE"):
        StructpruneLM(str(checkpoint())).loglikelihood_rolling([])


def test_arguments_of_the_model(checkpoint):
    settings, sampler = split_options(StructpruneLLaDAConfig(), {"samples": 8, "cfg_scale": 0.5, "gen_length": 4})
    assert settings == MonteCarlo(samples=8, cfg_scale=0.5) and sampler == {"cfg_scale": 0.5, "gen_length": 4}
    assert split_options(StructpruneDreamConfig(), {"alg": "entropy"}) == (MonteCarlo(), {"alg": "entropy"})
    with pytest.raises(UserError, match=r"unknown model argument 'sample' \(did you mean 'samples'\?\)"):
        StructpruneLM(str(checkpoint()), sample=3)


def test_a_model_needs_its_tokenizer(tiny_checkpoint):
    with pytest.raises(UserError, match="no tokenizer"):
        StructpruneLM(str(tiny_checkpoint(tokenizer=False)))


def test_an_instruct_checkpoint_without_its_template_is_told(checkpoint, caplog):
    StructpruneLM(str(checkpoint(template=TEMPLATE, name="LLaDA-Instruct")))
    assert "without --apply_chat_template" in caplog.text
    caplog.clear()
    base = StructpruneLM(str(checkpoint(template=TEMPLATE, name="LLaDA-Base")))
    assert not caplog.text
    base.apply_chat_template([{"role": "user", "content": "hi"}])
    assert "looks like a Base" in caplog.text


def test_the_command_line_says_in_one_line_what_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: StructpruneLM("absent"))
    assert main() == 2
    assert "error: no checkpoint directory at 'absent'" in capsys.readouterr().err
