"""scripts/tools/script_line.py: results' places are tried before any work."""

from pathlib import Path

import pytest


@pytest.fixture
def line(scripts):
    return scripts("script_line")


def run(line, *arguments):
    parser = line.OneLineParser("what it does")
    parser.add_argument("--out", type=line.result_file, default=Path("x.json"))
    result = []
    code = line.one_line("tool", lambda: result.append(parser.parse_args([*arguments]).out))
    return code, result


def test_a_result_can_be_written_where_it_was_tried(line, tmp_path):
    out = tmp_path / "new" / "out.json"
    assert run(line, "--out", str(out)) == (0, [out])
    assert not list(tmp_path.iterdir())  # nothing is left of the trial
    line.write_result(out, {"a": 1})
    assert run(line, "--out", str(out)) == (0, [out]) and out.read_text() == '{\n "a": 1\n}\n'


@pytest.mark.parametrize(
    "name, words",
    [
        (".", "is a directory: name a file"),
        ("file/out.json", "cannot be written (Not a directory): choose another place"),
        ("x" * 256, "cannot be written (File name too long)"),
    ],
)
def test_other_places_are_refused_in_one_line(line, tmp_path, capsys, name, words):
    (tmp_path / "file").write_text("x")
    assert run(line, "--out", str(tmp_path / name)) == (2, [])
    error = capsys.readouterr().err
    assert error.startswith("tool: error: argument --out: ") and words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_every_script_that_writes_a_result_tries_its_place():
    for path in sorted((Path(__file__).parents[2] / "scripts").glob("*/*.py")):
        text = path.read_text(encoding="utf-8")
        if "write_result(options.out" in text:
            assert '"--out", type=result_file' in text or "parse_counts(" in text, path.name


def test_options_of_counts_have_their_defaults_and_refuse_less_than_one(line, tmp_path, capsys):
    counts = {"windows": (4, "how many"), "threads": (2, "of torch")}
    options = line.parse_counts("About.", counts, "x.json", ["--windows", "3", "--out", str(tmp_path / "new.json")])
    assert (options.windows, options.threads, options.out) == (3, 2, tmp_path / "new.json")
    wrong = line.one_line("tool", lambda: line.parse_counts("About.", counts, "x.json", ["--threads", "0"]))
    assert wrong == 2 and capsys.readouterr().err == "tool: error: --threads = 0: give at least 1\n"
    assert (
        line.one_line("tool", lambda: line.parse_counts("About.", counts, str(tmp_path / "x.json"), ["--out", "."]))
        == 2
    )
