"""Tokenizers and chat templates that came with a checkpoint: what is damaged is refused, and no code of theirs runs."""

import ast
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

import structprune
from structprune import UserError, load_model
from structprune.assets import model_directory
from structprune.calibration.text import render
from structprune.checkpoint.save import save_pruned
from structprune.models import tokenizer as tokenizers
from structprune.models.loading import load_config
from structprune.models.tokenizer import encode, load_tokenizer, render_chat

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"


@pytest.fixture
def damaged(tmp_path):
    """`damaged(whole={}, settings={})` -> a tokenizer directory, keys of tokenizer.json and its settings replaced."""

    def make(whole=(), settings=()):
        for name, changes in (("tokenizer.json", whole), ("tokenizer_config.json", settings)):
            values = json.loads((model_directory() / name).read_text(encoding="utf-8")) | dict(changes)
            (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
        return tmp_path

    return make


PANICS = {
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}], "pair": [],
            "special_tokens": {},
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PANICS)
def test_a_panic_of_the_library_is_one_line(damaged, capfd, name):
    """It is no `Exception`, and its hook writes a backtrace to file descriptor 2."""
    with pytest.raises(UserError, match="no tokenizer that can be read .*: download tokenizer.json and") as caught:
        load_tokenizer(damaged(PANICS[name]))
    assert "\n" not in str(caught.value) and capfd.readouterr().err == ""


def test_a_panic_on_a_text_is_one_line_too(damaged, capfd):
    """Its pattern takes exponential time on some texts, for which the library has a limit, and no error."""
    pattern = {"Regex": "^(([a-z ])+.)+[A-Z]([a-z])+$"}
    tokenizer = load_tokenizer(
        damaged({"pre_tokenizer": {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}})
    )
    with pytest.raises(UserError, match="the tokenizer fails on the text .*: download tokenizer.json again"):
        encode(tokenizer, "a few words and no end of them " * 50)
    assert capfd.readouterr().err == ""


def test_what_others_write_to_stderr_meanwhile_is_not_lost(capfd):
    with tokenizers.hidden_panics():
        os.write(2, b"a warning")
    assert capfd.readouterr().err == "a warning"


SETTINGS = [  # of tokenizer_config.json, and what is said of them
    ({"added_tokens_decoder": [1]}, "added_tokens_decoder = [1] is not an object: correct it"),
    ({"added_tokens_decoder": {"7": "x"}}, "the added token '7': 'x' must be a number and an object with its text"),
    ({"added_tokens_decoder": {"x": {"content": "a"}}}, "the added token 'x': {'content': 'a'} must be a number"),
    ({"mask_token": {"content": 5}}, "mask_token = {'content': 5} is not text or an object with its text as 'content'"),
    ({"model_max_length": "x"}, "model_max_length = 'x' is not a number"),
    ({"tokenizer_class": ["x"]}, "tokenizer_class = ['x'] is not text"),
    ({"chat_template": 5}, "chat_template = 5 is not text or a list or an object"),
]


@pytest.mark.parametrize("settings, said", SETTINGS)
def test_settings_of_a_wrong_type(damaged, settings, said):
    with pytest.raises(UserError, match=re.escape(said)):
        load_tokenizer(damaged(settings=settings))


def test_files_are_checked_with_the_configuration(tiny_checkpoint):
    """So that every verb refuses them before long work, also one that reads no text."""
    directory = tiny_checkpoint("llada")
    (directory / "special_tokens_map.json").write_text("[]")
    with pytest.raises(UserError, match=r"special_tokens_map.json holds \[\], not an object"):
        load_config(directory)
    (directory / "special_tokens_map.json").unlink()
    os.mkfifo(directory / "vocab.json")
    with pytest.raises(UserError, match="vocab.json is a pipe or device"):
        load_config(directory)


def test_the_mask_token_is_looked_for_in_both_files(tiny_checkpoint):
    directory = tiny_checkpoint("llada", mask_token_id=None)
    assert load_config(directory)[2].mask_token_id == 2047  # tokenizer.json has it
    path, entry = directory / "tokenizer_config.json", {"content": "<|mdm_mask|>"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": {"2046": entry}}))
    assert load_config(directory)[2].mask_token_id == 2046


def test_an_endless_template_is_ended(monkeypatch):
    monkeypatch.setattr(tokenizers, "TEMPLATE_SECONDS", 0.2)
    tokenizer, before = load_tokenizer(model_directory()), sys.gettrace()
    tokenizer.chat_template = ENDLESS
    with pytest.raises(UserError, match="refuses a conversation .* did not end within 0.2 seconds"):
        render([{"role": "user", "content": "a"}], tokenizer)
    assert sys.gettrace() is before
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert render_chat(tokenizer, [{"content": "a"}, {"content": "b"}]) == "ab"
    tokenizer.chat_template = "{{ enable_thinking }}"  # as Qwen3's, which thinks where it is not told
    assert render_chat(tokenizer, [{"content": "a"}]) == "False"
    assert render_chat(tokenizer, [{"content": "a"}], enable_thinking=True) == "True"


def refuse(*_):
    pytest.fail("it was asked whether to run code")


@pytest.mark.parametrize("settings", [None, {"auto_map": {"AutoTokenizer": ["x.Y", None]}}, {}])
@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_loading_only_the_tokenizer_of_an_output_asks_nothing(tiny_checkpoint, monkeypatch, tmp_path, settings, form):
    """On a terminal transformers 4 asks where no tokenizer class is named, and 5 asks unless told not to."""
    source = tiny_checkpoint("llada")
    (source / "tokenizer_config.json").unlink()
    if settings is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    if form == "vocab.json":
        whole = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
        (source / "tokenizer.json").unlink()
        (source / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]), encoding="utf-8")
        (source / "merges.txt").write_text("\n".join(" ".join(pair) for pair in whole["model"]["merges"]), "utf-8")
    out = save_pruned(load_model(source), tmp_path / "out")
    monkeypatch.setattr("builtins.input", refuse)
    monkeypatch.setattr("transformers.dynamic_module_utils.signal.alarm", refuse)
    five = int(transformers.__version__.split(".")[0]) >= 5
    ids = AutoTokenizer.from_pretrained(out, **({"trust_remote_code": False} if five else {}))("a few words")[
        "input_ids"
    ]
    names = ("PreTrainedTokenizerFast", "Qwen2Tokenizer")
    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"] == names[form == "vocab.json"]
    assert ids == load_tokenizer(source)("a few words")["input_ids"] and len(ids) > 2


def test_the_tokenizer_of_a_checkpoint_with_code_of_its_own_asks_nothing(tiny_checkpoint, monkeypatch):
    directory = tiny_checkpoint("llada", auto_map={"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.T", None]})
    (directory / "tokenizer.json").unlink()
    (directory / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    monkeypatch.setattr("builtins.input", refuse)
    with pytest.raises(UserError, match="no tokenizer that can be read without remote code .*: add tokenizer.json"):
        load_tokenizer(directory)
    assert torch.is_tensor(load_model(directory).embedding.weight)  # the same for the weights


def test_no_call_of_from_pretrained_runs_code():
    """Every one in the package says so, in its own arguments or in options made in the same function."""
    root, calls = Path(structprune.__file__).parent, 0
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                given = {word.arg: word.value for word in node.keywords}
                assert ast.unparse(given.get("trust_remote_code", node.func)) != "True", path
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                calls += 1
                if None in given:  # **options: they come from `_reading`, which sets it
                    assert '{"trust_remote_code": False}' in text, path
                else:
                    assert ast.unparse(given["trust_remote_code"]) == "False", path
    assert calls >= 4
