"""Local PIQA and GSM8K, and names of tasks: made-up lines of their forms."""

import json
import os
import sys
from pathlib import Path

import pytest

from structprune.assets import model_directory
from structprune.errors import UserError
from structprune.evaluation import lm_tasks
from structprune.evaluation.documents import TaskOptions
from structprune.evaluation.local_tasks import (
    INVALID,
    choice_metrics,
    flexible_answer,
    normalise,
    strict_answer,
)
from structprune.evaluation.tasks import LocalSpec, open_task, parse_local
from structprune.evaluation.texts import Texts
from structprune.models.families import DREAM, LLADA

PIQA = [
    {"goal": "Dry a wet shoe.", "sol1": "Stuff it with paper.", "sol2": "Stuff it with soup."},
    {"goal": "Open a tight jar.", "sol1": "Sing to the lid.", "sol2": "Warm the lid under a hot tap."},
    {"goal": "Keep a door open.", "sol1": "Push a wedge under it.", "sol2": "Push a cloud under it."},
    {"goal": "Sharpen a pencil.", "sol1": "Boil it.", "sol2": "Turn it in a sharpener."},
    {"goal": "Cool a drink.", "sol1": "Add ice.", "sol2": "Add sand."},
]
LABELS = [0, 1, 0, 1, 0]
GSM8K = [
    {"question": "Ann has 3 pens and buys 4. How many now?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
    {"question": "A box holds 1,000 nuts. Two boxes?", "answer": "1000 * 2 = 2000\n#### 2,000"},
    {"question": "Tom is 5 degrees below zero. What is it?", "answer": "Below zero\n#### -5"},
    {"question": "Half of 9?", "answer": "9 / 2\n#### 4.5"},
    {"question": "Two and two?", "answer": "#### 4"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def texts():
    return Texts.open(model_directory(), "none")


@pytest.fixture
def piqa(tmp_path):
    (tmp_path / "piqa-valid-labels.lst").write_text("".join(f"{label}\n" for label in LABELS))
    return write(tmp_path / "piqa-valid.jsonl", PIQA)


@pytest.fixture
def gsm8k(tmp_path):
    return write(tmp_path / "gsm8k-test.jsonl", GSM8K)


def opened(texts, name, **options):
    [task] = open_task(name, LLADA, texts, TaskOptions(**options))
    return task


def test_piqa_prompts_are_lm_evals(piqa, texts):
    task = opened(texts, f"piqa:{piqa}")
    assert (task.name, len(task.documents)) == ("piqa:piqa-valid.jsonl", 5)
    document = task.documents[1]
    context = "Question: Open a tight jar.\nAnswer:"
    assert document.key == "piqa/1" and document.gold == 1 and document.lengths == (16, 29)
    assert document.pairs == ((context, " Sing to the lid."), (context, " Warm the lid under a hot tap."))
    assert [document.gold for document in task.documents] == LABELS


def test_labels_in_the_lines_do_as_well(tmp_path, texts):
    path = write(tmp_path / "piqa.jsonl", [row | {"label": label} for row, label in zip(PIQA, LABELS, strict=True)])
    assert [document.gold for document in opened(texts, f"piqa:{path}").documents] == LABELS


def test_the_limit_takes_the_first(piqa, texts):
    assert [document.key for document in opened(texts, f"piqa:{piqa}", limit=2).documents] == ["piqa/0", "piqa/1"]


def test_solved_examples_stand_before_the_question(tmp_path, piqa, texts):
    train = write(tmp_path / "train.jsonl", [row | {"label": label} for row, label in zip(PIQA, LABELS, strict=True)])
    document = opened(texts, f"piqa:{piqa}:{train}", shots=2).documents[4]
    assert document.pairs[0][0] == (
        "Question: Dry a wet shoe.\nAnswer: Stuff it with paper.\n\n"
        "Question: Open a tight jar.\nAnswer: Warm the lid under a hot tap.\n\n"
        "Question: Cool a drink.\nAnswer:"
    )


def test_gsm8k_takes_the_published_shots_where_it_can(tmp_path, gsm8k, texts):
    train = write(tmp_path / "train.jsonl", GSM8K + GSM8K[:3])
    alone, shown = opened(texts, f"gsm8k:{gsm8k}"), opened(texts, f"gsm8k:{gsm8k}:{train}")
    assert alone.documents[0].context == "Question: Ann has 3 pens and buys 4. How many now?\nAnswer:"
    assert shown.documents[0].context.count("Question:") == 6  # 5 for LLaDA, and the question
    assert shown.documents[0].context.startswith(
        f"{alone.documents[0].context} 3 + 4 = <<3+4=7>>7\n#### 7\n\nQuestion:"
    )
    [dream] = open_task(f"gsm8k:{gsm8k}:{train}", DREAM, texts)
    assert dream.documents[0].context.count("Question:") == 9
    assert alone.documents[0].until == ("Question:", "</s>", "<|im_end|>")


def test_a_chat_template_wraps_the_prompt_and_drops_the_delimiter(piqa, texts):
    class Chat:
        chat = True

        def question(self, text):
            return f"<{text}>"

        def delimiter(self):
            return ""

    document = opened(Chat(), f"piqa:{piqa}").documents[0]
    assert document.pairs[0] == ("<Question: Dry a wet shoe.\nAnswer:>", "Stuff it with paper.")
    assert document.lengths == (20, 19)


def test_choices_by_sum_and_by_length():
    assert choice_metrics([-10.0, -12.0], [4, 12], 0) == {"acc": 1.0, "acc_norm": 0.0}
    assert choice_metrics([-10.0, -12.0], [4, 12], 1) == {"acc": 0.0, "acc_norm": 1.0}
    assert choice_metrics([-3.0, -3.0], [2, 2], 0) == {"acc": 1.0, "acc_norm": 1.0}  # the first of equals


def test_piqa_is_graded(piqa, texts):
    task = opened(texts, f"piqa:{piqa}")
    assert task.grade(task.documents[1], (-16.0, -20.0)) == {"acc": 0.0, "acc_norm": 1.0}


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        (" 3 + 4 = 7\n#### 7", "7", "7"),
        ("So 7. #### 7 and #### 8", "7", "8"),
        ("It is $1,234.50", INVALID, "$1,234.50"),
        ("minus #### -5.", "-5.", "-5."),
        ("one 1 two", INVALID, "1"),
        ("nothing", INVALID, INVALID),
        ("", INVALID, INVALID),
        ("####7", INVALID, "7"),
    ],
)
def test_answers_are_found_as_lm_eval_finds_them(text, strict, flexible):
    assert (strict_answer(text), flexible_answer(text)) == (strict, flexible)


def test_answers_are_compared_without_marks():
    assert normalise("text\n#### 2,000") == normalise("$2000.") == "2000"
    assert normalise("4.5") == "4.5" and normalise("A") == "a"


@pytest.mark.parametrize(
    "index, text, strict, flexible",
    [(1, "#### 2000", 1, 1), (1, "It makes $2,000.", 0, 1), (2, "#### 5", 0, 0), (3, " #### 4.5\n\n7", 1, 0)],
)
def test_gsm8k_is_graded(gsm8k, texts, index, text, strict, flexible):
    task = opened(texts, f"gsm8k:{gsm8k}")
    expected = {"exact_match,strict-match": strict, "exact_match,flexible-extract": flexible}
    assert task.grade(task.documents[index], text) == expected


def test_names_are_taken_apart():
    assert parse_local("piqa") is None
    assert parse_local("piqa:a/b.jsonl") == LocalSpec("piqa", Path("a/b.jsonl"))
    spec = parse_local("gsm8k:a/b.jsonl:c.jsonl")
    assert (spec.task, str(spec.path), str(spec.train)) == ("gsm8k", "a/b.jsonl", "c.jsonl")


@pytest.mark.parametrize(
    "name, message",
    [
        ("piqua:x.jsonl", r"'piqua' has no local form \(did you mean 'piqa'\?\)"),
        ("piqa:", "names no files"),
        ("piqa:a:b:c", "names no files"),
        ("piqa:absent.jsonl", "no file at 'absent.jsonl'"),
    ],
)
def test_bad_names(texts, name, message):
    with pytest.raises(UserError, match=message):
        open_task(name, LLADA, texts)


def test_shots_that_cannot_be_shown(piqa, texts):
    with pytest.raises(UserError, match="2 shots need a file"):
        open_task(f"piqa:{piqa}", LLADA, texts, TaskOptions(shots=2))
    with pytest.raises(UserError, match="has 5 lines, too few for 6 shots"):
        open_task(f"piqa:{piqa}:{piqa}", LLADA, texts, TaskOptions(shots=6))


@pytest.mark.parametrize(
    "lines, message",
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n{"goal"', "line 2 is not JSON"),
        ('{"goal": "g", "sol1": "a", "label": 0}', "line 1 lacks the field 'sol2'"),
        ('{"goal": "g", "sol1": "a", "sol2": "b"}', "line 1 lacks the field 'label'"),
        ('{"goal": "g", "sol1": "a", "sol2": 3, "label": 0}', "line 1: the field 'sol2' is 3, not a text: give one in"),
        ('{"goal": "g", "sol1": "a", "sol2": "", "label": 0}', "line 1: the field 'sol2' is empty .*: write a text"),
        ('{"goal": "g", "sol1": " \\t", "sol2": "b", "label": 0}', "line 1: the field 'sol1' is empty"),
        ('{"goal": "g", "sol1": "a", "sol2": "\\ud83d", "label": 0}', "line 1: the field 'sol2' holds half a char"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}', "line 1: label 2 is neither"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": true}', "line 1: the field 'label' is True, .* give 0 or 1"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 1.0}', "line 1: the field 'label' is 1.0, not a whole"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": -%s}' % ("9" * 4000), r"line 1: label -9+\.+9+ is neither"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": %s}' % ("9" * 5000), "line 1 holds a number of too many"),
        ("[1]", "line 1 holds a list"),
        ('\n{"goal": %s' % ("[" * 100_000), "line 1 is not JSON"),
        ('{"goal": %s' % ("[" * 100_000), "line 1 has brackets nested too deep"),
    ],
)
def test_bad_lines_are_named(tmp_path, texts, lines, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(lines)
    with pytest.raises(UserError, match=message) as error:
        open_task(f"piqa:{path}", LLADA, texts)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(str(path)) + 150


def test_bad_labels_are_named(piqa, texts):
    labels = piqa.with_name("piqa-valid-labels.lst")
    labels.write_text("0\n1\n0\n1\n")
    with pytest.raises(UserError, match="has 4 labels for 5 lines of piqa-valid.jsonl"):
        opened(texts, f"piqa:{piqa}")
    labels.write_text("0\n1\ntwo\n1\n0\n")
    with pytest.raises(UserError, match="line 3: 'two' is not a label"):
        opened(texts, f"piqa:{piqa}")


def test_bad_answers_of_gsm8k_are_named(tmp_path, texts):
    path = write(tmp_path / "bad.jsonl", [*GSM8K, {"question": "?", "answer": "42"}])
    with pytest.raises(UserError, match="line 6: the field 'answer' does not end in"):
        opened(texts, f"gsm8k:{path}", limit=1)
    for name, row in (("question", {"question": " ", "answer": "#### 1"}), ("answer", {"question": "?", "answer": ""})):
        write(path, [*GSM8K, row])
        with pytest.raises(UserError, match=f"line 6: the field '{name}' is empty .*: write a text there"):
            opened(texts, f"gsm8k:{path}", limit=1)
    path.write_bytes(json.dumps(GSM8K[0]).encode() + b"\r\n\r\n\xff\xfe")
    with pytest.raises(UserError, match="bad.jsonl, line 3 is not UTF-8 text .*: convert the file"):
        opened(texts, f"gsm8k:{path}")


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path, texts):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="is a pipe or device, not a file"):
        opened(texts, f"gsm8k:{tmp_path / 'pipe.jsonl'}")


def test_without_lm_eval_its_tasks_are_refused(monkeypatch, texts):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    lm_tasks._manager.cache_clear()  # another test may have made the index
    with pytest.raises(UserError, match=r"'piqa' is lm-eval's, and .* is not installed: install lm-eval"):
        open_task("piqa", LLADA, texts)
