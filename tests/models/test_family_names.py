"""No module outside models/ decides by a family's name or classes: behaviours are named in the family's row."""

import ast
from pathlib import Path

import pytest

import structprune
from structprune.generation.samplers import SAMPLERS
from structprune.models.families import FAMILIES

ROOT = Path(structprune.__file__).parent
NAMES = {name.lower() for family in FAMILIES for name in (family.name, *family.model_types)}
ROWS = {family.name.upper() for family in FAMILIES}
CLASSES = {each.__name__ for family in FAMILIES for each in (family.config_class, family.model_class)}
CLASSES |= {sampler.__name__ for sampler in SAMPLERS.values()}


def decisions(tree: ast.AST) -> list[str]:
    """Places that can decide by a family's name: a literal that is one (in a comparison, as a key, in a set, ...), an
    attribute of that name, a row taken from the table, a comparison with one of its classes.

    Published settings stay allowed: they are data in fields and keyword arguments of the families' names.
    """
    places = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            wrong = node.value.lower() in NAMES
        elif isinstance(node, ast.Attribute):
            wrong = node.attr.lower() in NAMES or node.attr in ROWS
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            wrong = any(alias.name.rpartition(".")[2].lower() in NAMES for alias in node.names)
        elif isinstance(node, ast.Compare):
            wrong = any(_class_of(side) for side in (node.left, *node.comparators))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            wrong = node.func.id in ("isinstance", "issubclass") and _class_of(node.args[1])
        else:
            wrong = False
        if wrong:
            places.append(f"line {node.lineno}: {ast.unparse(node)}")
    return places


def _class_of(node: ast.expr) -> bool:
    """Whether an expression names a class of one family."""
    return any(
        getattr(each, "id", None) in CLASSES or getattr(each, "attr", None) in CLASSES for each in ast.walk(node)
    )


def test_no_module_decides_by_a_familys_name():
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "models"]
    assert len(files) > 100
    wrong = {str(path.relative_to(ROOT)): decisions(ast.parse(path.read_text(encoding="utf-8"))) for path in files}
    assert {name: places for name, places in wrong.items() if places} == {}


@pytest.mark.parametrize("source", [
    'family: ClassVar[str] = "llada"',  # generation/samplers.py
    'only = "no blocks" if settings.family == "dream" else "one block"',  # generation/cached.py
    'FORMS = {"llada": one, "dream": other}',  # evaluation/perturb.py
    "from structprune.models.families import DREAM",  # evaluation/texts.py
    "if family != families.DREAM.name:\n    pass",
    'kind = {"llada": FamilyPreset, "likelihood": Likelihood}.get(part, kind)',  # evaluation/presets.py
    'if isinstance(values, dict) and {"llada", "dream"} & values.keys():\n    pass',  # runs/evaluation_request.py
    "text = f\"predicts {'i + 1' if report['family'] == 'dream' else 'i'}\"",  # checkpoint/card.py
    "if SAMPLERS[family_of(config).name] is LLaDAGeneration:\n    pass",  # bench/settings.py
    "if isinstance(settings, samplers.DreamGeneration):\n    pass",
    'match family:\n    case "mmada":\n        pass',
    'settings = preset.llada if shifted else getattr(preset, "dream")',
])  # fmt: skip
def test_every_form_of_such_a_decision_is_seen(source):
    assert decisions(ast.parse(source))


def test_published_settings_of_the_families_are_data():
    source = """
class Preset(Section):
    llada: FamilyPreset
    dream: FamilyPreset

PRESETS = (Preset(task="gsm8k", llada={"shots": 5}, dream={"shots": 8}),)
"""
    assert decisions(ast.parse(source)) == []
