"""Broken texts, tokenizers, templates and options: one line for each."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

READERS = ("prune", "masks", "nm", "sinks", "eval")  # verbs that read text
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
CHAT = json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n"
Break = Callable[[Path], object]
Content = str | bytes | Callable[[Path], object]


def parquet(**columns) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    return write


def not_utf8(path: Path) -> None:
    import pyarrow

    raw = pyarrow.array([b"fine", b"\xff\xfe"], type=pyarrow.binary())
    parquet(text=raw.view(pyarrow.string()))(path)


TEXTS: dict[str, tuple[str, Content, str]] = {
    "missing": ("a.txt", lambda path: None, "at '"),
    "empty": ("a.txt", "", "is empty"),
    "blank": ("a.txt", " \n \n", "tokens"),
    "short": ("a.txt", "a few words", " 4 tokens"),
    "not utf-8": ("a.txt", b"\xff\xfe\xfd" * 1000, "is not UTF-8 text"),
    "other kind": ("a.csv", "a,b", "is not one of .txt, .jsonl, .parquet"),
    "directory": ("a.txt", Path.mkdir, "at '"),
    "pipe": ("a.txt", os.mkfifo, "at '"),
    "jsonl cut": ("a.jsonl", '{"text": "a', "line 1 is not valid JSON"),
    "jsonl of numbers": ("a.jsonl", "1\n2\n", "line 1 holds 1, not an object"),
    "jsonl nested": ("a.jsonl", '{"text": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested too deeply"),
    "jsonl digits": ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "is not valid JSON (Exceeds"),
    "jsonl without text": ("a.jsonl", '{"x": 1}\n', "has no column 'text' in row 1"),
    "jsonl of lists": ("a.jsonl", '{"text": [1]}\n', "is neither text nor a conversation"),
    "jsonl half a pair": ("a.jsonl", '{"text": "\\ud800"}\n', "which is no character"),
    "jsonl of nulls": ("a.jsonl", '{"text": null}\n', "is empty"),
    "parquet junk": ("a.parquet", b"PAR1" + os.urandom(100), "cannot be read as parquet"),
    "parquet empty file": ("a.parquet", b"", "cannot be read as parquet"),
    "parquet not utf-8": ("a.parquet", not_utf8, "cannot be read as parquet"),
    "parquet of numbers": ("a.parquet", parquet(text=[1, 2]), "is neither text nor a conversation"),
    "parquet without text": ("a.parquet", parquet(x=["a"]), "has no column 'text'"),
    "conversations": ("a.jsonl", CHAT, "the tokenizer has no chat template"),
}


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("name", TEXTS)
def test_a_broken_text(put, refused, name, verb):
    *file, said = TEXTS[name]
    assert said in refused(verb, "--calibration" if verb in READERS[:3] else "--text", put(*file))


def whole(**changes) -> Break:
    """Keys of tokenizer.json are changed."""
    return _merged("tokenizer.json", changes)


def settings(**changes) -> Break:
    """Keys of tokenizer_config.json are changed."""
    return _merged("tokenizer_config.json", changes)


def _merged(name: str, changes: dict) -> Break:
    def change(model: Path) -> None:
        values = json.loads((model / name).read_text(encoding="utf-8")) | changes
        (model / name).write_text(json.dumps(values), encoding="utf-8")

    return change


def without(*names: str) -> Break:
    return lambda model: [(model / name).unlink() for name in names]


OWN_CODE = settings(auto_map={"AutoTokenizer": ["a.B", None]})
SPLIT = {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}
UNIGRAM = {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": False}
TOKENIZERS: dict[str, Break] = {
    "missing": without("tokenizer.json"),
    "all missing": without("tokenizer.json", "tokenizer_config.json"),
    "sentencepiece junk": lambda model: [without("tokenizer.json")(model), (model / "tokenizer.model").write_text("x")],
    "code of its own": lambda model: [without("tokenizer.json")(model), OWN_CODE(model)],
    "panics on load": whole(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "panics on text": whole(
        post_processor={
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}], "pair": [],
            "special_tokens": {},
        }
    ),
    "fails on text": whole(model=UNIGRAM),
    "pattern": whole(pre_tokenizer=SPLIT),
    "added tokens an object": whole(added_tokens={"a": 1}),
    "vocabulary a list": whole(model={"type": "BPE", "vocab": [1], "merges": []}),
    "decoder a list": settings(added_tokens_decoder=[1]),
    "decoder of text": settings(added_tokens_decoder={"7": "x"}),
    "mask token a number": settings(mask_token={"content": 5}),
    "special tokens": settings(extra_special_tokens=[1, {}]),
    "length as text": settings(model_max_length="x"),
}  # fmt: skip


NAMED = {  # cases whose line names key and value
    "added tokens an object": "added_tokens = {'a': 1} is not a list",
    "decoder a list": "added_tokens_decoder = [1] is not an object",
    "decoder of text": "the added token '7': 'x' must be a number and an object",
    "mask token a number": "mask_token = {'content': 5} is not text",
    "length as text": "model_max_length = 'x' is not a number",
}


@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_broken_tokenizer(place, refused, name, verb):
    TOKENIZERS[name](place / "model")
    assert NAMED.get(name, "no tokenizer that can be read without remote code (") in refused(verb)


TEMPLATES = [
    ENDLESS, "{{ 9**(9**9) }}", "{% generation %}{{ 9**(9**9) }}{% endgeneration %}", "{{ ('a-' * 30000000) | title }}",
    "{{ raise_exception('no') }}", "{{", "{{ messages[7].x.y }}",
]  # fmt: skip


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("verb", READERS)
def test_a_broken_template(place, put, refused, monkeypatch, verb, template):
    monkeypatch.setattr("structprune.models.tokenizer.TEMPLATE_SECONDS", 0.2)
    settings(chat_template=template)(place / "model")
    said = refused(verb, "--calibration" if verb in READERS[:3] else "--text", put("a.jsonl", CHAT * 3))
    assert "the chat template refuses a conversation" in said


OPTIONS: list[tuple[str, list[str], str]] = [
    ("prune", ["--ratio", "1"], "ratio 1.0 lies outside"),
    ("prune", ["--ratio", "nan"], "ratio nan lies outside"),
    ("prune", ["--ratio", "x"], "Invalid value for '--ratio'"),
    ("prune", ["--set", "structured.ratio"], "is not key=value"),
    ("prune", ["--set", "structured.ratio=[" + "x," * 10**4], "cannot be read as YAML"),
    ("prune", ["--set", "calibration.seed=1e99"], "calibration.seed = '1e99'"),
    ("prune", ["--set", "calibration.windows=0"], "calibration.windows = 0"),
    ("prune", ["--set", f"calibration.windows={10**18}"], "lower calibration.windows = 1000000000000000000"),
    ("prune", ["--set", f"calibration.length={10**30}"], "calibration.length"),
    ("prune", ["--set", "memory.budget_gb=-1"], "memory.budget_gb = -1"),
    ("prune", ["--set", "model.dtype=int8"], "model.dtype = 'int8'"),
    ("prune", ["--mask-id", str(10**20)], "mask id 100000000000000000000 lies outside"),
    ("prune", ["--mask-id", "-1"], "mask id -1 lies outside"),
    ("prune", ["--device", "cuda:99999999999999999999"], "device"),
    ("prune", ["--device", "\ud800"], "device"),
    ("masks", ["--nm", "4:2"], "4:2"),
    ("nm", ["--nm", "0:0"], "0:0"),
    ("nm", ["--nm", "2:" + "9" * 30], "2:999"),
    ("inspect", ["--ratio", "-0.1"], "ratio -0.1 lies outside"),
    ("inspect", ["--mask-id", str(10**20)], "lies outside the embedding"),
    ("sinks", ["--length", "0"], "length"),
    ("sinks", ["--length", str(10**18)], "is not a count: give a whole number from 1 to 1048576"),
    ("sinks", ["--levels", str(10**18)], "levels"),
    ("sinks", ["--windows", str(10**15)], "is not a count"),
    ("sinks", ["--kappa", "nan"], "sink.kappa = nan"),
    ("sinks", ["--seed", str(10**30)], "seed"),
    ("sinks", ["--dtype", "float8"], "--dtype = 'float8'"),
    ("eval", ["--limit", "0"], "limit"),
    ("eval", ["--set", "evaluation.noise=0"], "evaluation.noise = 0"),
    ("eval", ["--set", f"evaluation.noise={10**15}"], "evaluation.noise = 1000000000000000"),
    ("eval", ["--tasks", "piqa:nowhere.jsonl"], "nowhere.jsonl"),
    ("eval", ["--against", "nowhere"], "'nowhere' holds no results"),
    ("bench", ["--length", "x"], "x"),
    ("bench", ["--length", "65"], "is beyond the 64 positions"),
    ("bench", ["--batch", str(10**18)], "1000000000000000000"),
    ("bench", ["--rounds", "0"], "rounds"),
    ("bench", ["--gen-length", str(10**20)], "gen"),
    ("bench", ["--cache", "x"], "x"),
]


@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_a_broken_option(refused, number):
    verb, more, said = OPTIONS[number]
    assert said in refused(verb, *more)
