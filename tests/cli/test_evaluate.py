"""`structprune eval` as typed: what it says, and one line for everything that is wrong."""

import json
from unittest.mock import Mock

import pytest

from structprune.cli.main import main
from structprune.evaluation.result_files import ResultStore, read_results


@pytest.fixture
def piqa(tmp_path):
    path = tmp_path / "piqa.jsonl"
    rows = [{"goal": f"How to wash {n} cups?", "sol1": "Use soap.", "sol2": "Use sand.", "label": 0} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


QUICK = ["--set=evaluation.windows=4", "--set=evaluation.length=32", "--set=evaluation.noise=2"]
FEW = ["--set=evaluation.samples=8"]


def said(capsys, *arguments, code=0):
    assert main(["eval", *map(str, arguments)]) == code
    return capsys.readouterr()


def test_a_table_and_where_it_is(tiny_checkpoint, text_path, piqa, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    names = [tiny_checkpoint(name="dense"), tiny_checkpoint(seed=1, name="small")]
    out = tmp_path / "out"
    shown = said(capsys, *names, "--text", text_path, "--tasks", f"piqa:{piqa}", "--out", out, *QUICK, *FEW)
    assert f"Wrote {out} (results.json, items/: a line per item)" in shown.out
    assert "difference: against dense" in shown.out and "nelbo, nats ↓" in shown.out and "acc_norm, % ↑" in shown.out
    assert {path.name for path in out.iterdir()} == {"items", "results.json", "settings.json"}
    assert {path.name for path in (out / "items" / "small").iterdir()} == {"text.txt.jsonl", "piqa-piqa.jsonl.jsonl"}
    lines = (out / "items" / "small" / "piqa-piqa.jsonl.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 3 and first["samples"] == 8 and len(first["log_likelihoods"]) == 2


def test_adaptive_spends_fewer_samples(tiny_checkpoint, piqa, tmp_path, capsys):
    name, out = tiny_checkpoint(), tmp_path / "out"
    said(
        capsys,
        name,
        "--tasks",
        f"piqa:{piqa}",
        "--out",
        out,
        "--adaptive",
        "--limit",
        2,
        *FEW,
        "--set=evaluation.block=1",
    )
    (rows,) = read_results(out).rows["llada-tiny"].values()
    assert len(rows) == 2 and all(row.samples <= 8 and row.full_samples == 8 for row in rows)


def test_a_changed_preset_is_followed(tiny_checkpoint, piqa, tmp_path, capsys):
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        f"task: piqa:{piqa}\nllada: {{shots: 0, likelihood: {{samples: 4, block: 2, cfg_scale: 1.5}}}}\n"
        "dream: {shots: 0, likelihood: {samples: 4, block: 2}}\n"
    )
    out = tmp_path / "out"
    said(capsys, tiny_checkpoint(), "--tasks", preset, "--out", out)
    result = read_results(out).settings["tasks"]["llada-tiny"]["piqa:piqa.jsonl"]
    assert (result["samples"], result["block"], result["cfg_scale"]) == (4, 2, 1.5)


def test_published_settings_are_the_defaults(tiny_checkpoint, piqa, tmp_path, capsys):
    out = tmp_path / "out"
    said(capsys, tiny_checkpoint(), "--tasks", f"piqa:{piqa}", "--limit", 1, "--out", out)
    result = read_results(out).settings["tasks"]["llada-tiny"]["piqa:piqa.jsonl"]
    assert (result["samples"], result["block"], result["cfg_scale"], result["adaptive"]) == (128, 8, 0.5, False)


TASK = "--tasks=piqa:{piqa}"
ASK = "--tasks=gsm8k:{gsm8k}"
SHORT = "--set=evaluation.generation={{gen_length: 4, steps: 4, block_length: 4}}"
WRONG = {
    "nothing": ([], "nothing to evaluate: give --text FILE, --tasks LIST"),
    "no text": (["--text=none.txt"], "no evaluation text at 'none.txt'"),
    "empty text": (["--text={empty}"], "evaluation text '{empty}' is empty"),
    "short text": (["--text={short}"], "has 1 tokens, less than one window of 64: give longer text"),
    "length": (["--text={text}", "--set=evaluation.length=65"], "evaluation.length = 65 exceeds the 64 positions"),
    "task": (["--tasks=piqua"], "unknown task 'piqua' (did you mean 'piqa'?)"),
    "local task": (["--tasks=piqua:x.jsonl"], "'piqua' has no local form (did you mean 'piqa'?)"),
    "no file": (["--tasks=piqa:x.jsonl"], "no file at 'x.jsonl'"),
    "empty file": (["--tasks=piqa:{empty_jsonl}"], "is empty: give a file with one JSON object a line"),
    "empty name": ([TASK + ",,"], "has an empty name"),
    "named twice": ([TASK + ",piqa:{piqa}"], "the task 'piqa:piqa.jsonl' is named twice: leave one out"),
    "too long": (["--tasks=piqa:{long}"], "item piqa/0@"),
    "idle text": ([TASK, "--set=evaluation.windows=5"], "evaluation.windows = 5 has no effect without a text (--text)"),
    "idle task": (["--text={text}", "--limit=5"], "evaluation.limit = 5 has no effect without tasks (--tasks)"),
    "idle fidelity": ([TASK, "--fidelity"], "evaluation.fidelity = True has no effect without a text (--text)"),
    "idle top": (
        ["--text={text}", "--set=evaluation.fidelity_top=9"],
        "evaluation.fidelity_top = 9 has no effect without evaluation.fidelity = true (--fidelity)",
    ),
    "idle opening": (
        ["--text={text}", "--fidelity", "--set=evaluation.fidelity_prompts=0", "--set=evaluation.fidelity_opening=9"],
        "evaluation.fidelity_opening = 9 has no effect without evaluation.fidelity_prompts above 0",
    ),
    "idle prompts": (
        ["--text={text}", "--fidelity", "--set=evaluation.fidelity_prompts=0", "--set=evaluation.prompts=9"],
        "evaluation.prompts = 9 has no effect without",
    ),
    "opening": (
        ["--text={text}", "--fidelity", "--set=evaluation.length=32", "--set=evaluation.fidelity_opening=40"],
        "evaluation.fidelity_opening = 40 exceeds the 32 tokens of a window: lower it",
    ),
    "tokens": (
        ["--text={text}", "--fidelity", "--set=evaluation.fidelity_tokens=60"],
        "fidelity_tokens = 60 after openings of 32 do not fit the model's 64 positions: lower it, or evaluation.fid",
    ),
    "steps": (
        ["--text={text}", "--fidelity", "--set=evaluation.fidelity_steps=60"],
        "evaluation.fidelity_steps = 60 exceeds the 32 tokens to generate: lower it",
    ),
    "top": (["--text={text}", "--fidelity", "--set=evaluation.fidelity_top=0"], "config key evaluation.fidelity_top"),
    "idle adaptive": (["--text={text}", "--adaptive"], "evaluation.adaptive = True has no effect without tasks"),
    "idle confidence": ([TASK, "--set=evaluation.confidence=0.5"], "evaluation.adaptive = true (--adaptive)"),
    "samples": ([TASK, "--set=evaluation.samples=12"], "samples = 12 is not a multiple of block = 8"),
    "key": ([TASK, "--set=evaluation.sample=8"], "unknown config key 'evaluation.sample' (did you mean 'samples'?)"),
    "limit": ([TASK, "--limit=0"], "config key evaluation.limit = 0"),
    "idle scoring": (
        [ASK, SHORT, "--adaptive"],
        "evaluation.adaptive = True has no effect without a task with answers",
    ),
    "idle guidance": ([ASK, SHORT, "--set=evaluation.cfg_scale=1"], "guidance of generation: generation.cfg_scale"),
    "idle batch": ([ASK, SHORT, "--set=evaluation.batch=9"], "evaluation.batch = 9 has no effect without a text or"),
    "idle generation": ([TASK, SHORT], "has no effect without a task that is answered by generation"),
    "idle include": ([TASK, "--set=evaluation.include=x"], "has no effect without a task of lm-eval"),
    "no preset": (["--tasks=configs/none.yaml"], "no file of a task at 'configs/none.yaml'"),
    "half a character": (["--tasks=piqa:{half}"], "the field 'goal' holds half a character"),
    "skip_empty": ([TASK, "--set=evaluation.skip_empty=true"], "skip_empty has no effect where every sample has a"),
    "chat": ([TASK, "--chat"], "has no chat template: add chat_template.jinja, or do without the template"),
    "option": (
        ["--tasks=gsm8k:{gsm8k}", "--set=evaluation.generation={{gen_len: 8}}"],
        "llada's sampler has no option 'gen_len' (did you mean 'gen_length'?)",
    ),
    "generation": (["--tasks=gsm8k:{gsm8k}"], "gen_length = 1024 more do not fit the model's 64 positions"),
    "against": ([TASK, "--against={empty}"], "holds no results of structprune eval"),
    "device": ([TASK, "--device=cuda:7"], "device 'cuda:7' is not on this machine"),
    "split": (
        ["--text={text}", "--set=evaluation.split=test"],
        "evaluation.split = 'test' means nothing for the local file",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(name, tiny_checkpoint, text_path, piqa, tmp_path, capsys):
    rows = [{"goal": "g " * 90, "sol1": "a b", "sol2": "c", "label": 0}]
    files = {
        "empty.txt": "", "empty.jsonl": "", "short.txt": "a", "long.jsonl": json.dumps(rows[0]),
        "half.jsonl": json.dumps({"goal": "\ud800", "sol1": "a", "sol2": "b", "label": 0}),
        "gsm8k.jsonl": json.dumps({"question": "1 + 1?", "answer": "#### 2"}),
    }  # fmt: skip
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    places = {
        "piqa": piqa, "text": text_path, "empty": tmp_path / "empty.txt", "empty_jsonl": tmp_path / "empty.jsonl",
        "short": tmp_path / "short.txt", "long": tmp_path / "long.jsonl", "gsm8k": tmp_path / "gsm8k.jsonl",
        "half": tmp_path / "half.jsonl",
    }  # fmt: skip
    arguments, words = WRONG[name]
    out = tmp_path / "out"
    result = said(capsys, tiny_checkpoint(), *(a.format(**places) for a in arguments), "--out", out, code=2)
    assert words.format(**places) in result.err and result.err.count("\n") == 1 and "Traceback" not in result.err
    assert not result.out and not out.exists()


def test_wrong_checkpoints(tiny_checkpoint, text_path, tmp_path, capsys):
    one, bare = tiny_checkpoint(), tiny_checkpoint(tokenizer=False, name="bare")
    rest = ["--text", text_path, "--out", tmp_path / "out", *QUICK]
    assert "no tokenizer that can be read" in said(capsys, one, bare, *rest, code=2).err
    assert "is given twice" in said(capsys, one, one, *rest, code=2).err
    assert "no checkpoint directory at" in said(capsys, tmp_path / "none", *rest, code=2).err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert "holds something else than results" in said(capsys, one, *rest, "--overwrite", code=2).err
    assert (tmp_path / "out" / "thesis.tex").exists()


@pytest.mark.parametrize("stored", [True, False])
def test_an_interrupted_run_says_what_is_kept(stored, tiny_checkpoint, text_path, tmp_path, capsys, monkeypatch):
    add = ResultStore.add

    def stop(*arguments, **options):
        if stored:
            add(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(ResultStore, "add", stop)
    out = tmp_path / "deep" / "out"
    result = said(capsys, tiny_checkpoint(), "--text", text_path, "--out", out, *QUICK, code=130)
    kept = f"what is done is kept in {out}: the same command goes on" if stored else "nothing was written"
    assert f"interrupted; {kept}" in result.err and out.parent.exists() == stored


def test_a_refused_run_leaves_nothing_that_would_refuse_the_mended_one(
    tiny_checkpoint, text_path, tmp_path, capsys, monkeypatch
):
    """Weights are read once the results are open; what was mended has another content, which is another setting."""
    one, out = tiny_checkpoint(), tmp_path / "out"
    weights = one / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    rest = ["--text", text_path, "--out", out, *QUICK]
    said(capsys, one, *rest, code=2)
    assert not out.exists()
    weights.write_bytes(whole)
    monkeypatch.setattr("structprune.evaluation.result_files.ResultStore.discard", lambda store: None)
    with monkeypatch.context() as patch:  # killed before anything is stored, in another dtype
        patch.setattr(ResultStore, "add", Mock(side_effect=KeyboardInterrupt))
        said(capsys, one, *rest, "--set", "model.dtype=bfloat16", code=130)
    assert (out / "settings.json").exists()
    said(capsys, one, *rest)
    assert (out / "results.json").exists() and not (out / "partial").exists()


def test_results_in_a_checkpoint_or_over_those_compared_with_are_refused(tiny_checkpoint, text_path, tmp_path, capsys):
    one, other, out = tiny_checkpoint(), tiny_checkpoint(seed=1, name="other"), tmp_path / "out"
    before = sorted(tmp_path.rglob("*"))
    for place in (one, one / "eval", other / "a" / "b"):
        line = said(capsys, one, other, "--text", text_path, "--out", place, *QUICK, code=2).err
        assert "lies inside the input checkpoint" in line and line.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    said(capsys, one, "--text", text_path, "--out", out, *QUICK)
    line = said(capsys, other, "--text", text_path, "--out", out, "--against", out, "--overwrite", *QUICK, code=2).err
    assert "is the earlier run to compare with" in line and (out / "results.json").exists()
    for _ in range(2):  # against.json is part of what --overwrite removes
        compared = ["--text", text_path, "--out", tmp_path / "second", "--against", out, "--overwrite", *QUICK]
        said(capsys, other, *compared)
    assert (tmp_path / "second" / "against.json").exists()
