"""How broad a text is, and the line that says that it is narrow."""

import json

import pytest
import torch

from structprune.cli.main import main
from structprune.recovery.breadth import breadth_of, narrow_line
from structprune.recovery.text import RecoveryText
from structprune.runs.evaluate import Session
from structprune.runs.recover import recover

BROAD = {"tokens": 1_000_000, "epochs": 4.0, "different": 0.9}


def text(rows, learnt=None):
    return RecoveryText(torch.tensor(rows), torch.zeros(1, 16, dtype=torch.long), learnt)


def test_measures_by_hand():
    period = [1, 2, 3, 4] * 4  # 9 runs of 8 tokens, of which 4 are different
    assert breadth_of(text([period, list(range(16))]), 6) == {"tokens": 32, "epochs": 3.0, "different": 13 / 18}
    assert breadth_of(text([[1, 2, 3, 4]]), 1)["different"] is None


def test_prompts_and_filling_do_not_count():
    prompt, filling = list(range(100, 110)), [0] * 12
    rows = [[*prompt, *range(start, start + 10), *filling] for start in (1, 50)]
    learnt = torch.tensor([[False] * 10 + [True] * 22] * 2)
    runs = {"all": breadth_of(text(rows), 2)["different"], "learnt": breadth_of(text(rows, learnt), 2)["different"]}
    # of 2 x 25 runs, 3 of the prompt are in both rows, and 10 of the filling are one
    assert runs["learnt"] == 1.0 and runs["all"] == pytest.approx((2 * 25 - 3 - 9) / (2 * 25))


@pytest.mark.parametrize(
    "source, changes, reason",
    [
        ("notes.txt", {"epochs": 4.1}, "(its 1,000,000 tokens are repeated 4.1 times)"),
        ("notes.txt", {"different": 0.42}, "(only 42% of its runs of 8 tokens are different)"),
        ("wikitext2", {}, "(it is of one encyclopaedia)"),
        ("Salesforce/wikitext", {"epochs": 9.0}, "repeated 9.0 times, it is of one encyclopaedia)"),
    ],
)
def test_narrow_text_is_one_line_with_its_reasons(source, changes, reason):
    line = narrow_line(source, BROAD | changes)
    assert reason in line and "\n" not in line and line.endswith("(such as data.source = c4), or lower train.tokens")


def test_broad_text_is_none():
    assert narrow_line("c4", BROAD) is None
    assert narrow_line("notes.txt", BROAD | {"different": None}) is None


@pytest.mark.slow
def test_a_recovery_says_so_before_it_trains_and_reports_it(pair, recover_config, tmp_path, text_path):
    dense, small = pair()
    short = tmp_path / "short.txt"
    short.write_text(text_path.read_text(encoding="utf-8")[:900], encoding="utf-8")
    heard = []
    config = recover_config(data__source=str(short))
    report = recover(str(small), str(dense), tmp_path / "out", config, session=Session(say=heard.append)).report
    assert len(heard) == 1 and heard[0].startswith("the text 'short.txt' is narrow (its ")
    assert report["breadth"]["warning"] == heard[0] and report["breadth"]["epochs"] > 4
    written = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert written["recoveries"][0]["breadth"] == report["breadth"]


def test_a_dry_run_says_so(pair, tmp_path, text_path, capsys):
    dense, small = pair()
    asking = ["recover", str(small), "--teacher", str(dense), "--out", str(tmp_path / "out"), "--data", str(text_path)]
    keys = ["--device", "cpu", "--dry-run", "--set", "data.length=16", "--set", "data.held_out=4"]
    assert main([*asking, *keys, "--tokens", "20000"]) == 0
    assert "is narrow" not in capsys.readouterr().out
    assert main([*asking, *keys, "--tokens", "2000000"]) == 0
    assert "Warning: the text 'text.txt' is narrow (its " in capsys.readouterr().out.replace("\n", " ")
