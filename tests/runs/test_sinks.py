"""`structprune sinks` as a user meets it: what is written, what is said, and one line for what cannot be."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from structprune.assets import model_directory, text_file
from structprune.cli.main import main
from structprune.config import ModelSettings, SinkSettings
from structprune.errors import UserError
from structprune.models.tokenizer import load_tokenizer
from structprune.runs import sinks as sink_run
from structprune.runs.evaluate import ALONE
from structprune.runs.sinks import measure, plan_run
from structprune.sinks.settings import SinkRun
from structprune.sinks.subjects import describe_subject, open_subject

pytestmark = pytest.mark.slow

SMALL = ["--windows", "2", "--length", "32"]
MADE = {"sinks.json", "heatmap.png", "drift.png", "heads.png", "survival.png", "drift.gif"}


@pytest.fixture
def causal(tmp_path):
    """A tiny random Llama with the embedded tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=2048, num_key_value_heads=2, max_position_embeddings=48, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama-tiny")
    load_tokenizer(model_directory()).save_pretrained(tmp_path / "llama-tiny")
    return tmp_path / "llama-tiny"


def test_two_models_side_by_side(tiny_checkpoint, causal, tmp_path, capsys):
    out = tmp_path / "sinks"
    more = ["--levels", "3", "--against", str(causal), "--kappa", "1"]
    assert main(["sinks", str(tiny_checkpoint()), "--out", str(out), *SMALL, *more]) == 0
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == MADE
    result = json.loads((out / "sinks.json").read_text(encoding="utf-8"))
    runs = {(run["model"], run["kind"]): run for run in result["runs"]}
    assert list(runs) == [("llada-tiny", "forward"), ("llada-tiny", "reverse"), ("llama-tiny", "reverse")]
    assert [run["steps"] for run in runs.values()] == [3, 16, 16]
    assert [run["positions"] for run in runs.values()] == [32, 32, 31]  # the last token is never an input
    assert result["settings"]["windows"] == 2 and result["settings"]["kappa"] == 1
    detail = runs["llada-tiny", "forward"]["detail"]
    assert len(detail["mass"]) == 2 and len(detail["mass"][0]) == 3 and len(detail["mass"][0][0]) == 32
    assert sum(detail["mass"][0][0]) == pytest.approx(3 * 4 * 32, rel=1e-3)  # layers x heads x queries
    for word in ("spatial concentration", "temporal stability", "positions across steps", "which tokens", "llama-tiny"):
        assert word in said
    assert f"Wrote {out}" in said.replace("\n", "") and not list(tmp_path.glob(".sinks*"))
    for name in MADE - {"sinks.json"}:
        with Image.open(out / name) as image:
            assert getattr(image, "n_frames", 1) == (16 if name == "drift.gif" else 1)


def test_block_diffusion(tiny_checkpoint, tmp_path):
    """Steps of a generation have mass up to the end of the block under way, and figures have all of them."""
    out = tmp_path / "sinks"
    assert main(["sinks", str(tiny_checkpoint("sdar")), "--out", str(out), *SMALL, "--levels", "3"]) == 0
    forward, reverse = json.loads((out / "sinks.json").read_text(encoding="utf-8"))["runs"]
    assert (forward["steps"], forward["positions"], reverse["positions"]) == (3, 32, 32)
    assert None not in forward["detail"]["mass"][0][0]
    seen = [sum(value is not None for value in step) for step in reverse["detail"]["mass"][0]]
    assert seen == sorted(seen) and seen[0] == reverse["prompt"] + 4 and seen[-1] == 32
    with Image.open(out / "drift.gif") as image:
        assert image.n_frames == reverse["steps"] and {path.name for path in out.iterdir()} == MADE


def test_dream_from_a_prompt(tiny_checkpoint, tmp_path):
    out = tmp_path / "sinks"
    checkpoint = tiny_checkpoint("dream")
    command = ["sinks", str(checkpoint), "--out", str(out), "--prompt", "Show the branch of a repository"]
    assert main([*command, "--gen-length", "8", "--steps", "4", "--levels", "2"]) == 0
    forward, reverse = json.loads((out / "sinks.json").read_text(encoding="utf-8"))["runs"]
    assert forward["sequences"] == 1 and reverse["positions"] == reverse["prompt"] + 8 and reverse["steps"] == 4
    assert forward["positions"] == reverse["prompt"]
    words = "".join(reverse["detail"]["last_tokens"][0][: reverse["prompt"]])
    assert words == "Show the branch of a repository"
    assert main([*command, "--trajectory", "forward"]) == 2  # there already
    assert main([*command, "--trajectory", "forward", "--overwrite"]) == 0
    assert len(json.loads((out / "sinks.json").read_text(encoding="utf-8"))["runs"]) == 1


def refused(capsys, *arguments) -> str:
    """The one line of an error."""
    assert main(["sinks", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert len(said.err.strip().splitlines()) == 1 and not said.out
    return said.err


def test_what_cannot_be_is_one_line(tiny_checkpoint, causal, tmp_path, capsys):
    checkpoint, out = tiny_checkpoint(), tmp_path / "out"
    short, other = tmp_path / "short.txt", tmp_path / "notes.md"
    short.write_text("Too few words.")
    other.write_text("x")
    base = [checkpoint, "--out", out, *SMALL]
    cases = {
        ("--text", tmp_path / "none.txt"): "no text at '",
        ("--text", other): "is not one of .txt, .jsonl, .parquet",
        ("--text", short): "too short for 2 windows of 32",
        ("--text", short, "--prompt", "a"): "--text and --prompt both",
        ("--trajectory", "revers"): "unknown trajectory 'revers' (did you mean 'reverse'?)",
        ("--length", "65"): "--length = 65 exceeds the 64 positions of llada-tiny: lower it",
        ("--gen-length", "32"): "leaves no prompt",
        ("--windows", "0"): "--windows = 0",
        ("--against", tmp_path / "none"): "no checkpoint directory at",
        ("--against", causal, "--trajectory", "both"): "is a causal language model, which has no noise levels",
        ("--trajectory", "forward", "--steps", "4"): "--steps = 4 applies to generation, and --trajectory is forward",
        ("--trajectory", "forward", "--gen-length", "4"): "--gen-length = 4 applies to generation",
        (
            "--trajectory",
            "reverse",
            "--levels",
            "4",
        ): "--levels = 4 applies to noise levels, and --trajectory is reverse",
        ("--prompt", "a b"): "--windows = 2 applies to windows of text, which --prompt replaces: leave it out",
        ("--alpha", "0"): "sink.alpha",
        ("--kappa", "-0.5"): "sink.kappa",
    }
    for more, message in cases.items():
        assert message in refused(capsys, *base, *more), more
    words = "Show the branch of a repository and what it holds"
    prompts = {
        ("  ",): "--prompt is empty",
        ("a " * 70,): "exceeds the 64 positions of llada-tiny",
        (words, "--length", "9"): "--length = 9 applies to windows of text",
        (words, "--trajectory", "reverse", "--gen-length", "4", "--seed", "0"): "--seed = 0 has no effect",
    }
    for more, message in prompts.items():
        assert message in refused(capsys, checkpoint, "--out", out, "--prompt", *more), more
    alone = {
        ("--steps", "4"): "--steps = 4 applies to diffusion LMs, and no model given is one: leave it out",
        ("--block-length", "4"): "--block-length = 4 applies to diffusion LMs",
        ("--levels", "4"): "--levels = 4 applies to diffusion LMs",
        ("--mask-id", "4"): "--mask-id applies to diffusion LMs",
        ("--allow-pickle",): "--allow-pickle applies to diffusion LMs",
    }
    for more, message in alone.items():
        assert message in refused(capsys, causal, "--out", out, *SMALL, "--against", causal, *more), more
    drawn = [causal, "--out", out, "--prompt", words, "--gen-length", "4", "--seed", "3"]
    assert "--seed = 3 has no effect" in refused(capsys, *drawn)
    assert not out.exists() and not list(tmp_path.glob(".out*"))


def test_both_models_are_checked_before_either_is_measured(tiny_checkpoint, causal, tmp_path, capsys, monkeypatch):
    """Texts, lengths and samplers are told from configurations and tokenizers."""
    monkeypatch.setattr(sink_run, "open_subject", lambda *arguments: pytest.fail("weights were read"))
    base = [tiny_checkpoint(), "--against", causal, "--out", tmp_path / "out", "--windows", "2"]
    cases = {
        ("--length", "49"): "--length = 49 exceeds the 48 positions of llama-tiny",
        ("--length", "32", "--block-length", "5"): "gen_length = 16 is not a multiple of block_length = 5",
        # 32 - 20 = 12 tokens of prompt, of which 5 are seen by 8 queries: z is at most 2
        ("--length", "32", "--gen-length", "20"): "5 positions of llama-tiny can be compared (the last 7 of a causal",
        ("--length", "5", "--gen-length", "1"): "5 positions of llada-tiny can be compared, of which none can be a sink"
        " at --kappa 2: it takes more than 5; give a longer",
    }
    for more, message in cases.items():
        assert message in refused(capsys, *base, *more), more
    values = json.loads((causal / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": 31}
    (causal / "config.json").write_text(json.dumps(values | {"architectures": ["MistralForCausalLM"]}))
    said = refused(capsys, *base, "--length", "32")
    assert "llama-tiny attends within a sliding window of 31 positions, fewer than the 32 of the run" in said


def test_steps_are_of_the_diffusion_model_of_a_comparison(tiny_checkpoint, causal, tmp_path):
    out = tmp_path / "sinks"
    command = ["sinks", str(tiny_checkpoint()), "--against", str(causal), "--out", str(out), *SMALL]
    assert main([*command, "--steps", "4", "--block-length", "8", "--levels", "2", "--gen-length", "8"]) == 0
    result = json.loads((out / "sinks.json").read_text(encoding="utf-8"))
    assert [(run["steps"], run["prompt"]) for run in result["runs"]] == [(2, 0), (4, 24), (8, 24)]
    assert (result["settings"]["length"], result["settings"]["seed"]) == (32, 0)


def test_a_checkpoint_of_neither_kind(tmp_path, capsys):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "deberta"}')
    said = refused(capsys, folder, "--out", tmp_path / "out")
    assert "unknown model_type 'deberta'" in said and "nor is it a causal language model" in said


def test_an_output_that_holds_something_else(tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert "holds something other than" in refused(capsys, tiny_checkpoint(), "--out", out, "--overwrite")
    assert (out / "thesis.tex").exists()


def test_without_matplotlib_nothing_is_begun(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert "plots need matplotlib" in refused(capsys, tiny_checkpoint(), "--out", tmp_path / "out")


def test_windows_are_the_same_for_both_trajectories(tiny_checkpoint, tmp_path):
    folder, run = str(tiny_checkpoint()), SinkRun(SinkSettings(), windows=2, length=32, levels=40)
    described = describe_subject(folder, ModelSettings())
    subject = open_subject(folder, described, ModelSettings(device="cpu"))
    forward, reverse = measure(subject, plan_run(described, run), run, ALONE)
    clean, generated = forward["detail"]["last_tokens"], reverse["detail"]["last_tokens"]
    for ours, theirs in zip(clean, generated):  # the last level leaves nearly all of the text
        same = [a == b for a, b in zip(ours[:16], theirs[:16]) if a != "<|mdm_mask|>"]
        assert all(same) and len(same) > 10
    assert forward["first_position"]["positions"] == pytest.approx(1 / 32)


def test_the_default_text_is_the_packages_own():
    assert Path(text_file("heldout.txt")).is_file() and SinkRun(SinkSettings()).text is None
    with pytest.raises(UserError, match="--levels = 0 is not a count"):
        SinkRun(SinkSettings(), levels=0)
