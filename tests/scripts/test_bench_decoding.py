"""The benchmark of decoding on the embedded model and a tiny Dream: every form beside a token a step."""

import json

import pytest

SMALL = [
    "--openings",
    "2",
    "--opening",
    "8",
    "--tokens",
    "8",
    "--block-length",
    "4",
    "--rounds",
    "1",
    "--device",
    "cpu",
]


@pytest.fixture
def bench(scripts):
    return scripts("bench_decoding")


def rows_of(bench, tmp_path, *arguments):
    out = tmp_path / "decoding.json"
    assert bench.main([*SMALL, *arguments, "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    return {row["form"]: row for row in json.loads(text)["rows"]}


def test_every_form_has_passes_times_and_a_price(bench, tmp_path, capsys):
    rows = rows_of(bench, tmp_path)
    plain = rows[bench.PLAIN]
    assert list(rows) == list(bench.FORMS)
    assert (plain["passes_per_token"], plain["speedup"], plain["equal"]) == (1.0, 1.0, 1.0)
    assert rows["two tokens a step"]["passes_per_token"] == 0.5
    passes = [rows[f"threshold {share}"]["passes_per_token"] for share in (0.9, 0.5, 0.2)]
    assert 1 >= passes[0] >= passes[1] >= passes[2]
    assert all(0 <= row["equal"] <= 1 and row["nelbo"] > 0 and row["tokens_per_second"] > 0 for row in rows.values())
    assert "equal tokens" in capsys.readouterr().out


def test_a_sampler_without_blocks_has_no_dual_cache(bench, tiny_checkpoint, tmp_path, text_path):
    rows = rows_of(bench, tmp_path, "--checkpoint", str(tiny_checkpoint("dream")), "--text", str(text_path))
    assert set(bench.FORMS) - set(rows) == {"dual cache", "dual cache, threshold 0.9"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rounds", "0"], "--rounds = 0: give at least 1"),
        (["--tokens", "1"], "--tokens 1 are too few for two a step: give at least 2"),
        (["--text", "nowhere.txt"], "--text: no text at 'nowhere.txt': name a file"),
        (["--openings", "1000000"], "tokens, and 8000000 are needed: lower --openings"),
        (["--block-length", "3"], "gen_length = 8 is not a multiple of block_length = 3"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(bench, arguments, words, tmp_path, capsys):
    out = tmp_path / "decoding.json"
    assert bench.main([*SMALL, *arguments, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench_decoding: error: ") and error.count("\n") == 1 and words in error
    assert not out.exists()
