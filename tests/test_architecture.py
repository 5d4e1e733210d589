"""The house keeps its shape: stages import only earlier ones, and extras stay optional."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import structprune
from structprune.assets import model_directory, text_file
from structprune.checkpoint.export import code_files

ROOT, HOME = Path(structprune.__file__).parent, Path(__file__).parents[1]
BASE = ("errors", "files", "progress", "workers", "config", "assets")  # what every stage may use
STAGES = (
    "models",
    "generation",
    "calibration",
    "statistics",
    "refit",
    "structured",
    "masking",
    "evaluation",
    "levels",
    "recovery",
    "sinks",
    "bench",
    "report",
    "checkpoint",
)
DRIVERS = ("runs", "cli", "__main__", "__init__")  # what knows several stages
SELF_CONTAINED = tuple(sorted(code_files()))  # of all families
EXTRAS = ("datasets", "lm_eval", "matplotlib", "peft", "accelerate", "pandas", "pyarrow", "gguf")


def imported(path: Path) -> set[str]:
    """Full names of every module that a file imports anywhere, relative imports resolved."""
    package, result = ["structprune", *path.relative_to(ROOT).parent.parts], set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            result.add(name)
            result |= {f"{name}.{alias.name}" for alias in node.names}
    return result


def parts(path: Path) -> set[str]:
    """The stages and modules of structprune that a file imports: `statistics`, `runs`, ..."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("structprune.")}


FILES = sorted(ROOT.rglob("*.py"))


def test_every_file_has_a_place():
    tops = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert tops == {*STAGES, *BASE, *DRIVERS}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_no_later_one(stage):
    later = {*STAGES[STAGES.index(stage) + 1 :], *DRIVERS}
    for path in (ROOT / stage).rglob("*.py"):
        wrong = later & parts(path)
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("name", BASE)
def test_the_base_knows_no_stage(name):
    files = (ROOT / name).rglob("*.py") if (ROOT / name).is_dir() else [ROOT / f"{name}.py"]
    for path in files:
        assert parts(path) <= set(BASE), path


def test_outputs_do_not_know_each_others_inputs():
    """Evaluation looks at models only, tables and plots at plain data only."""
    for path in (ROOT / "evaluation").rglob("*.py"):
        assert parts(path) <= {"models", "generation", "evaluation", *BASE}, path
    for path in (ROOT / "report").rglob("*.py"):
        assert parts(path) <= {"report", *BASE}, path


def test_torch_pruning_is_known_in_one_place():
    known = {path.name for path in FILES if any(name.split(".")[0] == "torch_pruning" for name in imported(path))}
    assert known == {"graph.py"}


@pytest.mark.parametrize("name", SELF_CONTAINED)
def test_exported_files_need_only_torch_and_transformers(name):
    roots = {module.split(".")[0] for module in imported(ROOT / "models" / name)}
    beside = {module for module in imported(ROOT / "models" / name) if module.startswith("structprune")}
    assert roots <= {"torch", "transformers", "structprune"} | sys.stdlib_module_names
    files = tuple(f"structprune.models.{file.removesuffix('.py')}" for file in SELF_CONTAINED)
    assert all(module.startswith(files) for module in beside)
    text = (ROOT / "models" / name).read_text(encoding="utf-8")
    assert "import structprune" not in text and "from structprune" not in text  # relative, in its own folder


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((HOME / folder).rglob("*.py"))]


def test_files_are_short():
    lines = {
        str(path.relative_to(HOME)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files("structprune", "scripts", "tests")
    }
    assert {"structprune/cli/main.py", "scripts/studies/reproduce.py", "tests/conftest.py"} <= lines.keys()
    assert {name: count for name, count in lines.items() if count > 300} == {}


def test_functions_are_short():
    """From `def` to the last line, docstring included; methods and functions within functions too."""
    lengths = [
        (f"{path.relative_to(HOME)}:{node.name}", node.end_lineno - node.lineno + 1)
        for path in python_files("structprune", "scripts")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert {"structprune/cli/main.py:main", "scripts/studies/reproduce.py:main"} <= {name for name, _ in lengths}
    assert [name for name, count in lengths if count >= 50] == []


@pytest.mark.slow
def test_only_the_command_line_prints():
    """Drivers take `track` and return what they made; report builds tables, and Group is a container of them."""
    for path in FILES:
        if path.relative_to(ROOT).parts[0] == "cli" or path.name == "harness.py":  # lm-eval's own command line
            continue
        consoles = imported(path) & {"rich.console.Console", "rich.print", "rich.get_console", "rich.progress"}
        assert not consoles, f"{path.relative_to(ROOT)} imports {sorted(consoles)}"
        names = {
            node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)
        }
        assert "print" not in names, path


def parameters(node: ast.FunctionDef) -> list[str]:
    """Names of a function's parameters, `self` and `cls` aside."""
    names = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_context_travels_as_one_value():
    """Functions with seven or more parameters, verbs and model configurations aside, are few."""
    aside = {"cli", *SELF_CONTAINED}
    many = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and len(parameters(node)) >= 7
        if not aside & {path.name, path.relative_to(ROOT).parts[0]}
    ]
    assert len(many) <= 8, many


def test_no_machine_paths():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "../shared" not in text and not re.search(r"/(work|root|home)/", text), path


def test_no_code_from_a_checkpoint_is_run():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                given = {keyword.arg: keyword.value for keyword in node.keywords}
                assert "trust_remote_code" not in given or given["trust_remote_code"].value is False, path


ABSENT = """
import sys
from importlib.machinery import PathFinder

class Absent(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {extras!r} else super().find_spec(name, path, target)

sys.meta_path = [Absent if finder is PathFinder else finder for finder in sys.meta_path]
for name in {extras!r}:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " was found")
"""

RUN = """
import torch
torch.set_num_threads(1)
import structprune

config = structprune.Config.load(overrides={overrides!r})
model = structprune.load_model({model!r})
pruned = structprune.prune(model, config)
pruned.save({out!r})
again = structprune.load_model({out!r})
ids = pruned.calibration.input_ids[:2]
with torch.inference_mode():
    print((again(ids).logits - pruned.model(ids).logits).abs().max().item(), pruned.report["ratio"])
"""


def test_import_is_light():
    code = "import sys, structprune; print([m for m in ('torch', 'transformers', 'torch_pruning') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_run_on_local_text_needs_no_extra(tmp_path):
    overrides = {
        "calibration.source": str(text_file("calibration.txt")), "calibration.windows": 4, "calibration.held_out": 2,
        "calibration.length": 32, "calibration.interval": 25, "structured.ratio": 0.3, "structured.split": "equal",
        "export.dtype": "float32",
    }  # fmt: skip
    code = ABSENT.format(extras=EXTRAS) + RUN.format(
        overrides=overrides, model=str(model_directory()), out=str(tmp_path / "small")
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    difference, ratio = map(float, done.stdout.split()[-2:])
    assert difference == 0 and ratio == pytest.approx(0.3, abs=0.02)
