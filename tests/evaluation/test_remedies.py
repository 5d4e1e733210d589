"""Every option that an error of an evaluation names exists: in `structprune eval`, or in lm-eval where it is meant."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import typer

import structprune
from structprune.cli.main import app
from structprune.evaluation.settings import EvaluationConfig

ROOT = Path(structprune.__file__).parent
FOLDERS = ("models", "generation", "evaluation")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
FILES += [ROOT / "runs" / "evaluate.py", ROOT / "runs" / "evaluation_request.py", ROOT / "cli" / "evaluate.py"]
VERB = typer.main.get_command(app).commands["eval"]
OPTIONS = {option for parameter in VERB.params for option in parameter.opts}
KEYS = {*EvaluationConfig.known_keys(), "evaluation.generation"}
SECTIONS = "model|memory|calibration|sink|structured|masking|reconstruct|export|evaluation"
ELSEWHERE = {
    ("dream.py", "model.layers"),  # the name of a module
    ("resources.py", "memory.offload"),  # only pruning runs stream weights
    ("masked.py", "memory.offload"),  # of a pruning run's check: an evaluation hands over its own batches
    ("lm_tasks.py", "--confirm_run_unsafe_code"),  # of lm-eval's command line, which the message names
}


def texts(path: Path) -> list[str]:
    """String literals of a file, docstrings aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents
    ]


def named(text: str) -> list[str]:
    """Options and keys that a text names."""
    options = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
    return options + re.findall(rf"(?<![\w.'])(?:{SECTIONS})\.[a-z_]+(?![\w.])", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_remedies_exist(path):
    known = {*OPTIONS, *KEYS, "--apply_chat_template", "--nproc-per-node"}
    names = [name for text in texts(path) for name in named(text) if (path.name, name) not in ELSEWHERE]
    assert [name for name in names if name not in known and not name.endswith((".safetensors", ".py"))] == []


def test_the_exceptions_are_needed_and_options_are_seen():
    seen = {(path.name, name) for path in FILES for text in texts(path) for name in named(text)}
    assert seen >= ELSEWHERE
    assert seen >= {("checkpoint_files.py", "--allow-pickle"), ("evaluate.py", "evaluation.prompts")}
    assert named("lower memory.budget_gb or --ratio") == ["--ratio", "memory.budget_gb"]


def test_lm_eval_has_the_options_that_messages_name():
    from lm_eval._cli.run import Run

    text = Path(inspect.getfile(Run)).read_text(encoding="utf-8")
    assert "--confirm_run_unsafe_code" in text and "--apply_chat_template" in text
