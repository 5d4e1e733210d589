"""scripts/tools/train_tiny.py: its output loads and prunes, a killed run ends as a whole one, errors are one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from structprune import load_model, load_tokenizer, prune
from structprune.assets import model_directory
from structprune.config import Config

SMALL = [
    "--d-model", "16", "--heads", "2", "--blocks", "2", "--mlp", "24", "--vocabulary", "300", "--length", "16",
    "--batch", "4", "--log-every", "2", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def script(scripts):
    return scripts("train_tiny")


@pytest.fixture
def train(script, text_path, tmp_path, capsys):
    """`train(out name, *options)` -> (exit code, directory, stderr)."""

    def run(name: str, *options: str, text=text_path):
        code = script.main(["--text", str(text), "--out", str(tmp_path / name), *SMALL, *options])
        return code, tmp_path / name, capsys.readouterr().err

    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(directory: Path) -> list[float]:
    lines = (directory / "train.log").read_text().splitlines()
    return [float(line.split(" loss ")[1].split()[0]) for line in lines if line.startswith("step ")]


@pytest.fixture
def die_at(script, monkeypatch):
    """`die_at(step)`: the run is killed when it has done that many steps (None: never)."""
    advance = script.Run.advance

    def arrange(last: int | None):
        def step(self):
            if self.step == last:
                raise KeyboardInterrupt
            advance(self)

        monkeypatch.setattr(script.Run, "advance", step)

    return arrange


@pytest.mark.slow
def test_training_writes_a_checkpoint_that_loads_and_prunes(train, text_path):
    code, out, err = train("tiny", "--steps", "40", "--valid-text", str(text_path), "--valid-windows", "16")
    assert code == 0 and "Wrote" in err and str(out) in err.replace("\n", "")
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "train.log"]
    assert sorted(path.name for path in out.iterdir()) == names and not out.with_name("tiny.training").exists()
    values, official = (json.loads((d / "config.json").read_text()) for d in (out, model_directory()))
    assert values.keys() == official.keys() and values["architectures"] == ["LLaDAModelLM"]
    assert (values["d_model"], values["n_layers"], values["mask_token_id"], values["eos_token_id"]) == (16, 2, 299, 298)
    assert weights(out)["model.transformer.blocks.1.ff_proj.weight"].dtype == torch.bfloat16
    tokenizer = load_tokenizer(out)
    assert tokenizer("<|endoftext|><|mdm_mask|>")["input_ids"] == [298, 299]
    assert tokenizer.decode(tokenizer("It's näive,\n  or not")["input_ids"]) == "It's näive,\n  or not"
    result = losses(out)
    assert len(result) == 20 and result[0] == pytest.approx(torch.tensor(300.0).log().item(), abs=0.1)
    assert sum(result[-3:]) / 3 < result[0] - 0.5
    last = (out / "train.log").read_text().splitlines()[-1].split()
    assert last[:3] == ["final", "steps", "40"] and 3.0 < float(last[last.index("nelbo") + 1]) < 5.6
    settings = {"calibration.source": str(text_path), "calibration.length": 16, "calibration.windows": 6,
                "calibration.held_out": 2, "calibration.interval": 25, "structured.ratio": 0.5}  # fmt: skip
    pruned = prune(load_model(out), Config.load(overrides=settings))
    assert pruned.model.num_parameters() < load_model(out).num_parameters()


@pytest.mark.slow
def test_killed_run_ends_with_the_weights_of_an_uninterrupted_one(train, die_at):
    command = ("--steps", "11", "--save-every", "3")
    assert train("whole", *command)[0] == 0
    die_at(5)
    code, out, err = train("killed", *command, "--resume")
    assert code == 130 and "interrupted" in err and not out.exists()
    die_at(8)
    code, out, err = train("killed", *command, "--resume")
    assert code == 130 and "from step 3" in err and not out.exists()
    die_at(None)
    code, out, err = train("killed", *command, "--resume")
    assert code == 0 and "from step 6" in err
    assert equal(weights(out), weights(out.with_name("whole")))
    assert losses(out) == losses(out.with_name("whole")) and len(losses(out)) == 6
    assert not equal(weights(out), weights(train("other", *command, "--seed", "1")[1]))


def test_resume_starts_where_there_is_no_state_and_stops_where_all_is_done(train):
    code, out, _ = train("again", "--steps", "2", "--resume")
    before = (out / "model.safetensors").stat().st_mtime_ns
    code_again, _, err = train("again", "--steps", "2", "--resume")
    assert (code, code_again) == (0, 0) and "complete" in err
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_by_the_clock_ends_by_the_clock(train, script, monkeypatch):
    ticks = iter(range(10_000))
    monkeypatch.setattr(script.time, "perf_counter", lambda: float(next(ticks)))  # every step takes a second
    code, out, _ = train("timed", "--minutes", "0.1")
    assert code == 0 and "final steps 6" in (out / "train.log").read_text()


def test_tokenizer_of_another_checkpoint_is_reused(train):
    code, out, _ = train("reuse", "--steps", "1", "--tokenizer", str(model_directory()))
    assert code == 0 and (out / "tokenizer.json").read_bytes() == (model_directory() / "tokenizer.json").read_bytes()
    assert json.loads((out / "config.json").read_text())["mask_token_id"] == 2047
    assert len(weights(out)["model.transformer.wte.weight"]) == 2048


def test_jsonl_text_and_a_log_elsewhere(train, text_path, tmp_path):
    rows = [json.dumps({"body": line}) for line in text_path.read_text(encoding="utf-8").splitlines() if line]
    (tmp_path / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = ("--steps", "2", "--column", "body", "--log", str(tmp_path / "here.log"))
    code, out, _ = train("jsonl", *options, text=tmp_path / "text.jsonl")
    assert code == 0 and (tmp_path / "here.log").read_text() == (out / "train.log").read_text()


def test_existing_output_stays_until_overwritten(train):
    _, out, _ = train("out", "--steps", "1")
    before = weights(out)
    code, _, err = train("out", "--steps", "2")
    assert code == 2 and "exists" in err and equal(before, weights(out))
    assert train("out", "--steps", "2", "--overwrite")[0] == 0
    assert not equal(before, weights(out))


def test_unfinished_run_is_neither_lost_nor_mixed_with_another(train, die_at):
    die_at(3)
    _, out, _ = train("half", "--steps", "4", "--save-every", "2")
    die_at(None)
    code, _, err = train("half", "--steps", "4")
    assert code == 2 and "--resume" in err and "--overwrite" in err
    code, _, err = train("half", "--steps", "9", "--resume")
    assert code == 2 and "steps = 4, not 9" in err
    state = out.with_name("half.training") / "state.pt"
    kept = state.read_bytes()
    state.write_bytes(kept[:-1000])
    code, _, err = train("half", "--steps", "4", "--resume")
    assert code == 2 and "cannot be read" in err and "--overwrite" in err
    state.write_bytes(kept)
    assert train("half", "--steps", "4", "--resume")[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--steps", "0"), "--steps = 0"),
        (("--steps", "3", "--minutes", "1"), "give one"),
        (("--minutes", "nan"), "--minutes = nan"),
        (("--heads", "3"), "3 heads"),
        (("--vocabulary", "100"), "at least 258"),
        (("--tokenizer", "nowhere"), "nowhere"),
        (("--valid-text", "nowhere.txt"), "nowhere.txt"),
        (("--length", "1000000"), "fewer than one window of 2000000"),
        (("--bogus",), "--bogus"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(train, tmp_path, options, words):
    before = sorted(tmp_path.rglob("*"))
    code, out, err = train("never", *options)
    assert code == 2 and words in err and err.count("\n") == 1 and err.startswith("train_tiny: error: ")
    assert sorted(tmp_path.rglob("*")) == before and not out.exists()


def test_text_that_is_missing_or_too_short(train, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")
    code, _, err = train("never", text=tmp_path / "short.txt")
    assert code == 2 and "fewer than one window of 32" in err and not (tmp_path / "never.training").exists()
    code, _, err = train("never", text=tmp_path / "missing.txt")
    assert code == 2 and "missing.txt" in err


def test_tokenizer_without_a_mask_token(train, tmp_path):
    shutil.copytree(model_directory(), tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    code, _, err = train("never", "--tokenizer", str(tmp_path / "bare"))
    assert code == 2 and "no mask token" in err


def test_diverged_training_says_so(train, script, monkeypatch):
    loss = script.maths.masked_loss
    monkeypatch.setattr(script.maths, "masked_loss", lambda *args: loss(*args) * float("nan"))
    code, out, err = train("never", "--steps", "4")
    assert code == 2 and "diverged" in err and not out.exists()
