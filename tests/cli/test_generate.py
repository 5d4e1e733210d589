"""`structprune generate` as typed: text on stdout, all else on stderr; prompts given, piped in, or asked for."""

import io
import json
import subprocess
import sys

import pytest

import structprune
from structprune.assets import model_directory
from structprune.cli.main import main

MODEL = str(model_directory())
SHORT = ["--gen-length", "8", "--device", "cpu"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def text():
    """What the model writes after "The server is"."""
    return structprune.generate(MODEL, "The server is", gen_length=8).text


def said(capsys, *arguments, code=0):
    assert main(["generate", MODEL, *SHORT, *arguments]) == code
    return capsys.readouterr()


def test_the_text_alone_is_on_stdout(text, capsys):
    shown = said(capsys, "--prompt", "The server is")
    assert shown.out == text + "\n"
    assert shown.err.startswith("structprune: 8 tokens in 8 passes and ") and shown.err.count("\n") == 1


def test_a_piped_prompt_is_read_whole(text, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The server is\n"))
    assert said(capsys).out == text + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "no prompt: give --prompt TEXT, or pipe text in" in said(capsys, code=2).err


def test_bytes_that_are_no_text_and_closed_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe abc"), errors="surrogateescape"))
    assert "standard input is no UTF-8 text: give --prompt TEXT" in said(capsys, code=2).err
    monkeypatch.setattr(sys, "stdin", None)
    assert "no prompt: give --prompt TEXT, or pipe text in" in said(capsys, code=2).err
    assert "is no UTF-8 text" in said(capsys, "--prompt", "\udcff", code=2).err


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m structprune generate {MODEL} --gen-length 4 --prompt Use | true"
    done = subprocess.run(["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True)
    assert done.stdout.strip().endswith("0") and "Broken" not in done.stderr and "4 tokens in 4 passes" in done.stderr


def test_several_prompts_as_lines_of_json(text, capsys):
    shown = said(capsys, "--prompt", "The server is", "--prompt", "Use", "--json", "--steps", "4")
    first, second = map(json.loads, shown.out.splitlines())
    assert (first["prompt"], second["prompt"]) == ("The server is", "Use") and len(first["ids"]) == 8
    assert "16 tokens in 4 passes" in shown.err
    (line,) = said(capsys, "--prompt", "The server is", "--json").out.splitlines()
    assert json.loads(line)["text"] == text


def test_lines_are_asked_for_until_the_end_of_input(text, capsys, monkeypatch):
    lines = iter(["The server is", "  ", "x " * 400, "Use"])

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    shown = said(capsys)
    assert shown.out.startswith(text + "\n") and shown.err.count("8 tokens in 8 passes") == 2
    assert shown.err.count("structprune: error: prompt 0 has ") == 1
    assert "--json is for prompts that are given" in said(capsys, "--json", code=2).err


def test_a_conversation_is_kept(tiny_checkpoint, capsys, monkeypatch):
    name = tiny_checkpoint()
    path = name / "tokenizer_config.json"
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    lines, read = iter(["One", "Two"]), []
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines, None) or (_ for _ in ()).throw(EOFError))
    from structprune.runs.generate import TextGenerator

    run = TextGenerator.run
    monkeypatch.setattr(
        TextGenerator, "run", lambda self, prompts, *rest: read.append(prompts) or run(self, prompts, *rest)
    )
    assert main(["generate", str(name), "--chat", "--gen-length", "4", "--device", "cpu"]) == 0
    capsys.readouterr()
    (first,), (second,) = read
    assert first == [{"role": "user", "content": "One"}]
    assert [each["role"] for each in second] == ["user", "assistant", "user"] and second[2]["content"] == "Two"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--threshold", "2"], "generation.threshold = 2.0: input should be less than or equal to 1"),
        (["--set", "generation.alg=entropy"], "llada's sampler has no option 'alg'"),
        (["--cache", "dual"], "use prefix, which does the same"),
        (["--set", "generation.temprature=1"], "did you mean"),
        (["--chat"], "has no chat template"),
    ],
)
def test_bad_options_are_one_line(arguments, words, capsys):
    shown = said(capsys, "--prompt", "The server is", *arguments, code=2)
    assert words in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_an_interrupted_generation_says_what_is_lost(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("structprune.runs.generate.TextGenerator.run", interrupted)
    shown = said(capsys, "--prompt", "The server is", code=130)
    assert shown.err == "structprune: interrupted; the text under way is lost\n" and not shown.out


def test_help_has_examples(capsys):
    assert main(["generate", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Generate text by iterative denoising" in shown and "--threshold 0.9 \\ --cache dual" in shown
