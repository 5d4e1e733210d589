"""Every option and key that an error names exists for the verb that can show it (eval: tests/evaluation)."""

import ast
import re
from pathlib import Path

import pytest
import typer

import structprune
from structprune.assets import model_directory
from structprune.cli.main import OUT_OF_MEMORY, app, main
from structprune.config import Config

ROOT = Path(structprune.__file__).parent
VERBS = typer.main.get_command(app).commands
KEYS = {*Config.known_keys(), *(f"{name}.*" for name in Config.model_fields)}
SECTIONS = "|".join(name for name in Config.model_fields if name != "method")
SHARED = ("cli/configuration.py", "config", "calibration", "structured", "masking", "runs/resolve.py", "runs/ghost.py")
PRUNING = [f"runs/{name}.py" for name in ("run", "checkpoints", "prune", "mask", "search", "latency")]
PRUNING.append("bench/part_latency.py")
FORMATS = [f"checkpoint/{name}.py" for name in ("gguf_file", "gguf_tokens", "packed", "bitmask")]
ROOMS = {  # verb -> what can raise while it runs, shared loading aside, which tests/evaluation holds to eval's options
    "prune": [*SHARED, "statistics", "refit", "checkpoint", "cli/prune.py", *PRUNING],
    "inspect": [*SHARED, "runs/inspect.py", "bench/memory.py", "bench/mask_memory.py", "cli/inspect.py"],
    "sinks": ["sinks", "runs/sinks.py", "cli/sinks.py"],
    "bench": ["bench/settings.py", "bench/semi_structured.py", "bench/compiled.py", "runs/bench.py", "cli/bench.py"],
    "demo": ["runs/demo.py", "cli/demo.py"],
    "export": [*FORMATS, "runs/export.py", "runs/push.py", "cli/export.py"],
}
ELSEWHERE = {
    ("bench", "--method"), ("bench", "--nm"),  # of `structprune prune`, which the message names
    ("prune", "model.safetensors"),  # a file
    ("prune", "--gguf"), ("prune", "--gguf-pre"), ("prune", "--format"),  # in its rooms, but of `structprune export`
    ("export", "--method"),  # of `structprune prune`, which the message names
}  # fmt: skip


def files(verb: str) -> list[Path]:
    places = [ROOT / place for place in ROOMS[verb]]
    return [path for place in places for path in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]


def raised_texts(path: Path) -> list[str]:
    """Sentences among the string literals of a file, docstrings aside; keys and file names have no blank."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documents]
    return [node.value for node in nodes if isinstance(node.value, str) and " " in node.value]


def named(text: str) -> list[str]:
    """Options and keys that a text names."""
    options = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
    keys = re.findall(rf"(?<![\w.'/])(?:{SECTIONS})\.[a-z_]+(?![\w.])", text)
    return options + [key for key in keys if not key.endswith(".safetensors")]


@pytest.mark.parametrize("verb", ROOMS)
def test_remedies_exist(verb):
    options = {option for parameter in VERBS[verb].params for option in parameter.opts}
    known = options | (KEYS if "--set" in options else set())
    names = {(path.name, name) for path in files(verb) for text in raised_texts(path) for name in named(text)}
    assert {each for each in names if each[1] not in known and (verb, each[1]) not in ELSEWHERE} == set()


def test_names_are_seen():
    assert named("lower memory.budget_gb or --ratio") == ["--ratio", "memory.budget_gb"]
    seen = {name for verb in ROOMS for path in files(verb) for text in raised_texts(path) for name in named(text)}
    assert {"--gen-length", "--no-plots", "calibration.interval", "reconstruct.enabled"} <= seen


@pytest.mark.parametrize("verb", OUT_OF_MEMORY)
def test_a_lack_of_memory_names_what_the_verb_has(verb, monkeypatch, capsys):
    options = {option for parameter in VERBS[verb].params for option in parameter.opts}
    assert {name for name in named(OUT_OF_MEMORY[verb]) if name not in options | KEYS} == set()
    monkeypatch.setattr("structprune.cli.main.app", lambda *args, **options: (_ for _ in ()).throw(MemoryError()))
    assert main([verb]) == 1
    assert capsys.readouterr().err == f"structprune: error: out of memory: {OUT_OF_MEMORY[verb]}\n"


def test_sinks_has_no_key_for_a_column(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"words": "one"}\n')
    arguments = ["sinks", str(model_directory()), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--text", str(tmp_path / "a.jsonl"), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.endswith(
        "has no column 'text' in row 1: it has words; call the text column 'text'\n"
    )
