"""scripts/studies/reproduce.py from a tiny checkpoint and a local PIQA to the table, and again where it stopped."""

import json

import pytest

from scripts.studies import reproduce
from scripts.studies.reproduce import DENSE, TABLES, main

pytestmark = pytest.mark.slow

QUICK = {
    "structured": ["calibration.windows=4", "calibration.held_out=2", "calibration.length=32",
                   "calibration.interval=25", "structured.split=equal", "export.dtype=float32"],
    "unstructured": ["calibration.windows=4", "calibration.length=32"],
}  # fmt: skip


@pytest.fixture
def piqa(tmp_path):
    path = tmp_path / "piqa.jsonl"
    rows = [{"goal": f"Count to {n}", "sol1": "One, two.", "sol2": "Blue.", "label": n % 2} for n in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(table, model, piqa, text_path, out):
    given = ["--model", str(model), "--table", table, "--tasks", f"piqa:{piqa}", "--calibration", str(text_path)]
    return [*given, "--out", str(out), "--eval-set=evaluation.samples=8", *(f"--set={key}" for key in QUICK[table])]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_end_to_end(table, tiny_checkpoint, piqa, text_path, tmp_path, capsys, monkeypatch):
    model, out = tiny_checkpoint(), tmp_path / "out"
    command = arguments(table, model, piqa, text_path, out)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert (
        "74.10" in shown
        and "45.9 and 74.8" in " ".join(shown.split())
        and f"Wrote {out / 'reproduction.json'}" in shown
    )
    result = json.loads((out / "reproduction.json").read_text())
    variants = TABLES[table][1]
    assert [row["title"] for row in result["rows"]] == ["dense", *(variant.title for variant in variants.values())]
    for name, row in zip(variants, result["rows"][1:]):
        cell = row["tasks"]["piqa:piqa.jsonl"]
        assert cell["published"] == variants[name].published["piqa"] and cell["items"] == 7
        lines = (out / "evaluation" / "items" / name / "piqa-piqa.jsonl.jsonl").read_text().splitlines()
        right = [json.loads(line)["metrics"]["acc"] for line in lines]
        assert cell["metrics"]["acc"]["value"] == pytest.approx(100 * sum(right) / 7)
    reports = [json.loads((out / name / "report.json").read_text())["config"] for name in variants]
    if table == "structured":
        assert [(config["structured"]["ratio"], config["structured"]["arm"]) for config in reports] == [
            (0.3, "masked"), (0.3, None), (0.5, "masked"), (0.5, None),
        ]  # fmt: skip
    else:
        assert [config["masking"]["score"] for config in reports] == list(variants)
        assert {config["masking"]["ratio"] for config in reports} == {0.5}
    monkeypatch.setattr(reproduce, "command_line", lambda command: pytest.fail("a model that is there is made again"))
    monkeypatch.setattr("structprune.runs.evaluate.load_model", lambda *a, **k: pytest.fail("evaluated again"))
    assert main(command) == 0
    assert json.loads((out / "reproduction.json").read_text())["rows"] == result["rows"]


def test_a_model_of_another_command_is_not_taken_for_ours(tiny_checkpoint, piqa, text_path, tmp_path, capsys):
    model, out = tiny_checkpoint(), tmp_path / "out"
    (out / "masked-0.3").mkdir(parents=True)
    assert main(arguments("structured", model, piqa, text_path, out)) == 2
    said = capsys.readouterr().err
    assert "masked-0.3' was made by another command: remove it" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "change, words",
    [
        (["--set=calibration.window=3"], "unknown config key 'calibration.window' (did you mean 'windows'?)"),
        (["--model=none"], "no checkpoint directory at 'none'"),
    ],
)
def test_wrong_input_is_one_line(change, words, tiny_checkpoint, piqa, text_path, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*arguments("structured", tiny_checkpoint(), piqa, text_path, out), *change]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not out.exists()


def test_published_figures_are_those_of_the_paper():
    """README of the released implementation; the means it states are over more tasks than it lists."""
    assert DENSE.published["mmlu"] == 65.97 and DENSE.average == 57.93
    assert [variant.average for variant in TABLES["unstructured"][1].values()] == [52.70, 53.18, 52.34, 52.36]
    sinks = TABLES["structured"][1]["sinks-0.5"].published
    assert sinks == {"piqa": 60.37, "winogrande": 57.24, "arc_easy": 52.79, "arc_challenge": 23.62}
