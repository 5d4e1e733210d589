"""A whole evaluation on tiny checkpoints: numbers, comparing, warnings, batches."""

import json
import shutil

import pytest
import torch

from structprune.calibration.noise import stratified_noise
from structprune.errors import UserError
from structprune.evaluation.nelbo import masked_nelbo
from structprune.evaluation.perturb import item_generator
from structprune.evaluation.result_files import read_results
from structprune.models.loading import load_model
from structprune.runs.evaluate import Session, evaluate

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
def test_every_kind_of_unit(family, eval_checkpoint, text_path, piqa, gsm8k, tmp_path, eval_settings):
    tasks = [f"piqa:{piqa}", f"gsm8k:{gsm8k}"]
    options = {"gen_length": 8, "steps": 8} | ({"block_length": 8} if family == "llada" else {})
    result = evaluate(
        [str(eval_checkpoint(family))],
        eval_settings(text_path, tasks, evaluation__generation=options),
        tmp_path / "out",
    )
    (rows,) = result.results.rows.values()
    assert {task: len(each) for task, each in rows.items()} == {
        "text.txt": 20,
        "piqa:piqa.jsonl": 6,
        "gsm8k:gsm8k.jsonl": 1,
    }
    assert [row.gold for row in rows["piqa:piqa.jsonl"]] == [0, 1, 0, 1, 0, 1]
    row = rows["piqa:piqa.jsonl"][2]
    assert row.metrics == {"acc": float(row.choice == 0), "acc_norm": float(row.choice_norm == 0)} and row.samples == 8
    assert rows["gsm8k:gsm8k.jsonl"][0].metrics.keys() == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert result.summary["tasks"]["gsm8k:gsm8k.jsonl"]["main"] == "exact_match,strict-match"
    assert not (tmp_path / "out" / "partial").exists()


def test_a_window_is_its_own_masked_nelbo(eval_checkpoint, text_path, tmp_path, eval_settings):
    one = eval_checkpoint()
    result = evaluate([str(one)], eval_settings(text_path), tmp_path / "out")
    ((rows,),) = [tasks.values() for tasks in result.results.rows.values()]
    from structprune.runs.evaluation_request import prepare

    (subject,) = prepare([str(one)], eval_settings(text_path))
    (unit,) = subject.units
    window, key = unit.windows[7:8], unit.keys[7]  # (1, T)
    assert rows[7].key == key
    noise = stratified_noise(window, 2047, item_generator(0, key), 2)
    expected = masked_nelbo(load_model(one), window, *noise)
    assert rows[7].nelbo == pytest.approx(expected.nelbo.item(), rel=1e-5)
    assert rows[7].masked_tokens == expected.masked_tokens.item() == (noise[0] == 2047).sum()


def test_the_first_checkpoint_is_compared_with(eval_checkpoint, text_path, piqa, tmp_path, eval_settings):
    names = [str(eval_checkpoint(seed=seed, name=f"model-{seed}")) for seed in (0, 1)]
    names.append(shutil.copytree(names[0], tmp_path / "same").as_posix())
    result = evaluate(names, eval_settings(text_path, [f"piqa:{piqa}"]), tmp_path / "out")
    assert result.summary["baseline"] == "model-0"
    same = result.summary["differences"]["same"]["text.txt"]["nelbo"]
    assert same["difference"] == 0 and same["verdict"] == "no difference shown"  # common noise: exactly the same
    other = result.summary["differences"]["model-1"]["text.txt"]["nelbo"]
    assert other["difference"] != 0 and other["items"] == 20 and other["low"] < other["difference"] < other["high"]


def test_families_with_one_tokenizer_keep_their_own_forms(
    eval_checkpoint, text_path, piqa, tmp_path, eval_settings, plain_rows
):
    """Dream scores between BOS and EOS, LLaDA does not; beside each other each finds what it finds alone."""
    names = [str(eval_checkpoint("llada")), str(eval_checkpoint("dream"))]
    asked = eval_settings(text_path, [f"piqa:{piqa}"], evaluation__cfg_scale=0)
    both = plain_rows(evaluate(names, asked, tmp_path / "both").results)
    alone = [plain_rows(evaluate([name], asked, tmp_path / str(index)).results) for index, name in enumerate(names)]
    assert both == alone[0] | alone[1]


def test_the_order_of_checkpoints_says_what_is_compared_with(eval_checkpoint, text_path, tmp_path, eval_settings):
    """Also of a finished run: the other way round nothing is measured again, and differences change their sign."""
    names = [str(eval_checkpoint(seed=seed, name=f"model-{seed}")) for seed in (0, 1)]
    one = evaluate(names, eval_settings(text_path), tmp_path / "out").summary
    two = evaluate(names[::-1], eval_settings(text_path), tmp_path / "out").summary
    assert (one["baseline"], two["baseline"]) == ("model-0", "model-1")
    gaps = [
        each["differences"][label]["text.txt"]["nelbo"]["difference"]
        for each, label in ((one, "model-1"), (two, "model-0"))
    ]
    assert gaps[0] == pytest.approx(-gaps[1]) and gaps[0] != 0
    assert read_results(tmp_path / "out").summary == two


def test_an_earlier_run_is_compared_with(eval_checkpoint, text_path, piqa, tmp_path, eval_settings):
    tasks = [f"piqa:{piqa}"]
    evaluate([str(eval_checkpoint(name="dense"))], eval_settings(text_path, tasks), tmp_path / "first")
    later = eval_settings(text_path, tasks, evaluation__limit=4, evaluation__samples=4)
    result = evaluate([str(eval_checkpoint(seed=1, name="small"))], later, tmp_path / "out", against=tmp_path / "first")
    assert result.summary["baseline"] == "first-dense"
    shared = result.summary["differences"]["small"]["piqa:piqa.jsonl"]["acc"]
    assert (shared["items"], shared["left_out"]) == (4, 2)
    assert result.summary["differences"]["small"]["text.txt"]["nelbo"]["items"] == 20
    assert result.warnings == (
        f"piqa:piqa.jsonl was evaluated with other settings in '{tmp_path / 'first'}': samples was 8 and is 4",
    )
    kept = json.loads((tmp_path / "out" / "against.json").read_text())
    assert kept["summary"] == json.loads(json.dumps(result.summary))
    assert "first-dense" not in json.loads((tmp_path / "out" / "results.json").read_text())["summary"]["checkpoints"]


def test_an_earlier_run_of_other_tasks_is_refused(eval_checkpoint, text_path, piqa, tmp_path, eval_settings):
    one = str(eval_checkpoint())
    evaluate([one], eval_settings(text_path), tmp_path / "first")
    with pytest.raises(UserError, match="has none of these tasks: text.txt were evaluated"):
        evaluate([one], eval_settings(tasks=[f"piqa:{piqa}"]), tmp_path / "out", against=tmp_path / "first")
    assert not (tmp_path / "out").exists()


def test_text_that_was_calibrated_on_is_named(eval_checkpoint, text_path, tmp_path, tiny_calibration, eval_settings):
    one = eval_checkpoint()
    plain_run = evaluate([str(one)], eval_settings(text_path), tmp_path / "plain")
    assert plain_run.warnings == ()
    tiny_calibration(load_model(one), windows=8).save(one / "calibration.safetensors")
    heard = []
    result = evaluate([str(one)], eval_settings(text_path), tmp_path / "out", session=Session(say=heard.append))
    assert len(result.warnings) == 1 and result.warnings[0].startswith("llada-tiny was calibrated on text that ")
    assert result.warnings[0].endswith("of the items of text.txt hold: its figures there flatter it")
    assert heard == list(result.warnings)


def test_an_instruct_checkpoint_without_chat_is_warned_of(eval_checkpoint, text_path, piqa, tmp_path, eval_settings):
    one = eval_checkpoint(name="tiny-Instruct")
    result = evaluate([str(one)], eval_settings(text_path, [f"piqa:{piqa}"]), tmp_path / "out")
    assert "tiny-Instruct looks like an Instruct checkpoint" in result.warnings[0]
    assert evaluate([str(one)], eval_settings(text_path), tmp_path / "text").warnings == ()  # no prompt, no template


def test_one_text_through_two_tokenizers_shares_no_window(eval_checkpoint, text_path, tmp_path, eval_settings):
    one, two = eval_checkpoint(name="one"), eval_checkpoint(seed=1, name="two")
    path = two / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"] = values["model"]["merges"][:-300]
    path.write_text(json.dumps(values))
    result = evaluate([str(one), str(two)], eval_settings(text_path), tmp_path / "out")
    assert result.summary["differences"]["two"] == {"text.txt": {}}
    assert [len(rows["text.txt"]) for rows in result.results.rows.values()] == [20, 20]


def test_batches_change_nothing(eval_checkpoint, text_path, piqa, tmp_path, eval_settings):
    one, tasks = str(eval_checkpoint()), [f"piqa:{piqa}"]
    large = evaluate([one], eval_settings(text_path, tasks), tmp_path / "large")
    small = evaluate([one], eval_settings(text_path, tasks, evaluation__batch=40), tmp_path / "small")
    for task in ("text.txt", "piqa:piqa.jsonl"):
        pairs = zip(large.results.rows["llada-tiny"][task], small.results.rows["llada-tiny"][task], strict=True)
        for ours, theirs in pairs:
            values = (lambda row: row.log_likelihoods) if task.startswith("piqa") else (lambda row: (row.nelbo,))
            assert values(ours) == pytest.approx(values(theirs), rel=1e-5)


def test_tasks_of_one_name_are_refused(eval_checkpoint, piqa, tmp_path, eval_settings):
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / piqa.name
    row = {"goal": "Dry a wet shoe.", "sol1": "Stuff it with paper.", "sol2": "Stuff it with soup.", "label": 0}
    other.write_text(json.dumps(row) + "\n")
    for second in (piqa, other):
        with pytest.raises(UserError, match="'piqa:.*' is named twice: leave one out, or rename its file"):
            evaluate([eval_checkpoint()], eval_settings(tasks=[f"piqa:{piqa}", f"piqa:{second}"]), tmp_path / "out")
    with pytest.raises(UserError, match="evaluation.limit = 0"):
        eval_settings(tasks=[f"piqa:{piqa}"], evaluation__limit=0)


def test_memory_that_runs_out_for_good_is_one_line(
    eval_checkpoint, text_path, gsm8k, tmp_path, monkeypatch, eval_settings
):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("structprune.runs.evaluate.load_model", full)
    names, lower = [str(eval_checkpoint())], "lower evaluation.prompts or "
    options = {"gen_length": 8, "steps": 8, "block_length": 8}
    generating = eval_settings(text_path, [f"gsm8k:{gsm8k}"], evaluation__generation=options)
    for asked, remedy in (
        (eval_settings(text_path), "set model.dtype=bfloat16 or use"),
        (generating, f"{lower}set model.dtype=bfloat16 or use"),
        (eval_settings(text_path, model__dtype="bfloat16"), "use"),
    ):
        with pytest.raises(UserError, match=f"does not fit the memory: {remedy} another --device$"):
            evaluate(names, asked, tmp_path / "out", overwrite=True)


def test_memory_that_runs_out_is_halved(eval_checkpoint, text_path, tmp_path, monkeypatch, eval_settings):
    from structprune.evaluation import masked

    real, sizes = masked._row_sums, []

    def tight(model, rows, *others):
        sizes.append(len(rows[0]))
        if len(rows[0]) > 3:
            raise torch.OutOfMemoryError("full")
        return real(model, rows, *others)

    one = str(eval_checkpoint())
    whole = evaluate([one], eval_settings(text_path), tmp_path / "whole")
    monkeypatch.setattr(masked, "_row_sums", tight)
    result = evaluate([one], eval_settings(text_path), tmp_path / "out")
    assert max(sizes) > 3 and sizes[-1] <= 3 and sum(size <= 3 for size in sizes) >= 40 / 3
    values = [[row.nelbo for row in run.results.rows["llada-tiny"]["text.txt"]] for run in (whole, result)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)
