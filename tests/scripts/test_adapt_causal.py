"""scripts/studies/adapt_causal.py: its output loads and prunes, a killed run ends as a whole one, errors: one line."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune import load_model, load_tokenizer
from structprune.assets import model_directory
from structprune.calibration.noise import stratified_noise
from structprune.cli.main import main as structprune
from structprune.evaluation.nelbo import masked_nelbo

PROJECTION = "model.layers.1.mlp.gate_proj.weight"
SMALL = [
    "--length", "16", "--batch", "4", "--rank", "4", "--valid-windows", "8", "--log-every", "2", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def script(scripts):
    return scripts("adapt_causal")


@pytest.fixture
def adapt(script, text_path, tmp_path, capsys):
    """`adapt(source, out name, *options)` -> (exit code, directory, stdout, stderr)."""

    def run(source, name: str, *options: str, text=text_path):
        arguments = [str(source), "--text", str(text), "--out", str(tmp_path / name), *SMALL, *map(str, options)]
        code = script.main(arguments)
        return code, tmp_path / name, *capsys.readouterr()

    return run


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def report(directory: Path) -> dict:
    return json.loads((directory / "adaptation.json").read_text())


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_training_writes_a_dream_that_loads_and_prunes(adapt, causal_source, text_path, prune_command, tmp_path):
    source = causal_source("llama", tie_word_embeddings=True, head_dim=16)
    before = sorted(path.stat().st_mtime_ns for path in source.iterdir())
    code, out, said, _ = adapt(source, "dlm", "--steps", "40", "--lr", "0.02", "--valid-text", text_path)
    assert code == 0 and f"Wrote {out}" in said and "head_dim = 16" in said and not list(tmp_path.glob("*.training"))
    assert sorted(path.stat().st_mtime_ns for path in source.iterdir()) == before
    values = report(out)
    held, losses = values["held_out"], values["losses"]
    assert len(losses) == 40 and sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 1
    assert held["after"]["nelbo"] < held["before"]["nelbo"] - 0.5 and held["windows"] == 8
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "Dream" and config["torch_dtype"] == "float32" and config["mask_token_id"] == 2047
    text, tokenizers = text_path.read_text(), (load_tokenizer(out), load_tokenizer(source))
    assert tokenizers[0].mask_token_id == 2047
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert structprune(prune_command(out, tmp_path / "pruned", text_path, "--ratio", "0.3")) in (0, None)
    dense, pruned = load_model(out), load_model(tmp_path / "pruned")
    sizes = [sum(p.numel() for p in model.blocks.parameters()) for model in (pruned, dense)]
    assert 0.6 < sizes[0] / sizes[1] < 0.8


@pytest.mark.slow
def test_held_out_figures_are_those_of_the_written_checkpoint(script, adapt, causal_source):
    code, out, _, err = adapt(causal_source("qwen2"), "dlm", "--steps", "3", "--mask-token", "<|mdm_mask|>")
    assert code == 0 and "Mask token <|mdm_mask|> (id 2047)" in err
    model, held = load_model(out), report(out)["held_out"]
    windows = torch.randint(2047, (4, 16), generator=torch.Generator().manual_seed(0))  # (N, T)
    noise = stratified_noise(windows, 2047, torch.Generator().manual_seed(2), edges_visible=True)
    expected = masked_nelbo(model, windows, *noise)
    measured = script.measure(model, windows, torch.device("cpu"), "held out")
    assert measured["nelbo"] == pytest.approx(expected.mean) and held["after"] != held["before"]
    assert measured["cross_entropy"] == pytest.approx(expected.cross_entropy)


def test_held_out_windows_are_the_end_of_the_text_and_not_trained_on(script, scripts, text_path, tmp_path):
    arguments = ["--text", str(text_path), "--out", str(tmp_path / "out"), "--length", "16", "--valid-windows", "5"]
    tokenizer, mask = load_tokenizer(model_directory()), scripts("causal_layout").MaskToken("<|mdm_mask|>", 2047, 2048)
    options = script.parse_arguments(None, [str(model_directory()), *arguments])
    tokens, windows = script.prepare_text(options, tokenizer, mask)
    whole = torch.tensor(tokenizer(text_path.read_text(), add_special_tokens=False)["input_ids"])
    assert torch.equal(tokens, whole[:-80].int())
    assert sorted(windows.tolist()) == sorted(whole[-80:].view(5, 16).tolist())


def killed(action, place: str, scripts) -> None:
    """Run `action` in a fork that ends by SIGKILL: before step 5, while saving the state of step 6, or the output."""
    driver, layout = scripts("adapt_causal"), scripts("causal_layout")
    advance = driver.Run.advance

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def step(run):
        if place == "step" and run.step == 4:
            die()
        if place == "state" and run.step == 5:
            os.replace = die  # the new state is written, and not in place
        if place == "output":
            layout.write_json = die  # the weights are written, config.json is not
        advance(run)

    child = os.fork()
    if child == 0:
        try:
            driver.Run.advance = step
            action()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("place", "saved"), [("step", 3), ("state", 3), ("output", 7)])
def test_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    adapt, causal_source, scripts, tmp_path, place, saved
):
    source = causal_source("qwen2", tie_word_embeddings=True)
    command = ("--steps", "7", "--save-every", "3", "--rate-rise", "0.8")
    assert adapt(source, "whole", *command)[0] == 0
    killed(lambda: adapt(source, "killed", *command), place, scripts)
    assert not (tmp_path / "killed").exists() and (tmp_path / "killed.training" / "state.pt").exists()
    code, out, _, err = adapt(source, "killed", *command, "--resume")
    whole = tmp_path / "whole"
    assert code == 0 and f"continuing from step {saved}" in err
    assert equal(weights(out), weights(whole))
    assert not torch.equal(weights(out)[PROJECTION], weights(source)[PROJECTION])
    assert report(out)["losses"] == report(whole)["losses"] and report(out)["held_out"] == report(whole)["held_out"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".", "killed."))]
    code, _, _, err = adapt(source, "killed", *command, "--resume")
    assert code == 0 and "complete" in err


@pytest.mark.slow
def test_micro_batches_give_the_same_steps_and_another_seed_others(adapt, causal_source):
    source = causal_source("qwen2")
    losses = {
        name: report(adapt(source, name, "--steps", "4", *options)[1])["losses"]
        for name, options in {"one": (), "parts": ("--micro-batch", "3"), "other": ("--seed", "1")}.items()
    }
    assert losses["parts"] == pytest.approx(losses["one"], rel=1e-4) and losses["parts"] != losses["one"]
    assert losses["other"] != pytest.approx(losses["one"], rel=1e-3)


@pytest.mark.slow
def test_an_unfinished_run_is_neither_lost_nor_mixed_with_another(adapt, causal_source, scripts, text_path):
    source = causal_source("llama")
    command = ("--steps", "6", "--save-every", "2")
    killed(lambda: adapt(source, "half", *command), "step", scripts)
    text = text_path.with_name("other.txt")
    text.write_text(text_path.read_text()[500:])
    other = causal_source("qwen2")
    for from_, options, words in [
        (source, command, "continue with --resume"),
        (source, ("--steps", "9", "--resume"), "steps = 6, not 9"),
        (source, (*command, "--resume", "--rate-low", "0.1"), "rate_low = 0.05, not 0.1"),
        (other, (*command, "--resume"), "the source's weights have changed"),
    ]:
        code, out, _, err = adapt(from_, "half", *options)
        assert code == 2 and words in err and "--overwrite" in err
    code, out, _, err = adapt(source, "half", *command, "--resume", text=text)
    assert code == 2 and "was saved with text = " in err
    state = out.with_name("half.training") / "state.pt"
    whole = state.read_bytes()
    state.write_bytes(whole[:-1000])
    code, _, _, err = adapt(source, "half", *command, "--resume")
    assert code == 2 and "cannot be read" in err
    state.write_bytes(whole)
    assert adapt(source, "half", *command, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--device", "abacus"), "unknown device 'abacus'"),
        (("--steps", "0"), "--steps = 0"),
        (("--micro-batch", "5"), "--micro-batch = 5 exceeds --batch = 4"),
        (("--lr", "nan"), "--lr = nan"),
        (("--rate-low", "0.7"), "--rate-low 0.7 --rate-high 0.5"),
        (("--rate-rise", "2"), "--rate-rise = 2"),
        (("--length", "2"), "--length = 2"),
        (("--length", "65"), "--length = 65: SOURCE has 64 positions"),
        (("--mask-token", "<|nothing|>"), "--mask-token '<|nothing|>' is not in the vocabulary"),
        (("--mask-token", "<|endoftext|>"), "--mask-token '<|endoftext|>' is the tokenizer's"),
        (("--valid-text", "nowhere.txt"), "--valid-text 'nowhere.txt' is no file"),
        (("--column", "body"), "--column 'body' means nothing"),
        (("--dtype", "int8"), "--dtype"),
        (("--bogus",), "--bogus"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(adapt, causal_source, tmp_path, options, words):
    source = causal_source("llama")
    before = sorted(tmp_path.rglob("*"))
    code, out, _, err = adapt(source, "never", *options)
    assert code == 2 and words.replace("SOURCE", str(source)) in err
    assert err.count("\n") == 1 and err.startswith("adapt_causal: error: ")
    assert sorted(tmp_path.rglob("*")) == before and not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "is of model type 'gpt2': only llama and qwen2"),
        ({"model_type": "llada"}, "cannot be read as a causal language model"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None}, "rope_type = 'yarn'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"intermediate_size": 96}, "cannot be read as a causal language model"),
        ({"vocab_size": 2000}, "the embedding only 2000 rows"),
    ],
)
def test_sources_that_cannot_be_converted(adapt, causal_source, tmp_path, change, words):
    source = causal_source("llama")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = sorted(tmp_path.rglob("*"))
    code, _, _, err = adapt(source, "never")
    assert code == 2 and words in err and err.startswith("adapt_causal: error: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_missing_or_damaged_sources_and_text(adapt, causal_source, text_path, tmp_path):
    code, _, _, err = adapt(tmp_path / "nowhere", "never")
    assert code == 2 and "no causal checkpoint at" in err
    source = causal_source("llama")
    (tmp_path / "short.txt").write_text("Too short. " * 20)
    code, _, _, err = adapt(source, "never", text=tmp_path / "short.txt")
    assert code == 2 and "fewer than 10 windows of 16" in err
    (tmp_path / "masks.txt").write_text(text_path.read_text() + "<|mdm_mask|>" * 3)
    code, _, _, err = adapt(source, "never", text=tmp_path / "masks.txt")
    assert code == 2 and "holds the mask token <|mdm_mask|> 3 times" in err
    code, _, _, err = adapt(source, "llama")
    assert code == 2 and "lies inside the input" in err
    state = weights(source)
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    code, out, _, err = adapt(source, "never")
    assert code == 2 and "the loss is no number" in err
    shutil.rmtree(source)
    shutil.copytree(model_directory(), source)
    assert adapt(source, "never")[0] == 2 and not out.exists() and not list(tmp_path.glob("*.training"))


def test_training_that_diverges_says_so(adapt, causal_source, script, monkeypatch):
    monkeypatch.setattr(script.Run, "_backward", lambda self, *parts: float("nan"))
    code, out, _, err = adapt(causal_source("llama"), "never", "--steps", "2")
    assert code == 2 and "diverged at step 1: lower --lr" in err and not out.exists()
