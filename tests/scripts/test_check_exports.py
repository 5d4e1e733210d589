"""The way of an export class, with one tiny case of each outcome."""

import json

import pytest


@pytest.fixture
def check(scripts):
    return scripts("check_exports")


@pytest.mark.slow
def test_two_cases_on_their_way(check, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = tmp_path / "exports.json"
    assert check.main(["--cases", "llada-uniform,dream-free", "--out", str(out)]) == 0
    uniform, free = json.loads(out.read_text())["rows"]
    for row in (uniform, free):
        assert set(row["differences"].values()) == {0.0} and row["layout_kept"] and row["changed_by_training"] > 0.1
    assert (uniform["strictest_class"], uniform["gguf"]) == ("uniform", "written")
    assert free["strictest_class"] == "free" and free["gguf"].startswith("llama.cpp reads a dream of class official")
    assert "elsewhere" in capsys.readouterr().out


@pytest.mark.slow
def test_cut_mixtures_in_every_class(check, tmp_path, monkeypatch):
    """One process loads all of them, so a layout must not be taken for that of another case."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    names, out = [name for name in check.CASES if name.startswith(("llada-moe", "llada2"))], tmp_path / "exports.json"
    assert len(names) == 5 and check.main(["--cases", ",".join(names), "--out", str(out)]) == 0
    for row in json.loads(out.read_text())["rows"]:
        assert row["strictest_class"] == row["class"] == row["case"].rpartition("-")[2] and row["layout_kept"]
        assert max(row["differences"].values()) <= 1e-5 and row["changed_by_training"] > 0.1, row


def test_an_unknown_case(check, tmp_path, capsys):
    assert check.main(["--cases", "gpt", "--out", str(tmp_path / "x.json")]) == 2
    assert "--cases has the unknown 'gpt': give some of llada-free" in capsys.readouterr().err
