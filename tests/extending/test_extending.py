"""Scores from outside the package, as docs/extending.md shows them: registered, configured, used and saved."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

from structprune.config import Config
from structprune.config.names import REGISTERED
from structprune.errors import UserError
from structprune.masking.scores import table as mask_table
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.statistics.moments import consumer_moments
from structprune.statistics.scan import Scan
from structprune.structured.scores import table

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "extending.md"


@pytest.fixture
def toy():
    """`toy(name)` -> one of the examples beside this file, registered for the length of a test."""
    before = dict(table.SCORES), dict(mask_table.SCORES), {key: set(names) for key, names in REGISTERED.items()}

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for scores, old in zip((table.SCORES, mask_table.SCORES), before[:2], strict=True):
        scores.clear()
        scores.update(old)
    REGISTERED.update(before[2])


def test_a_structured_score(toy, tiny_checkpoint, text_path, tmp_path):
    checkpoint = tiny_checkpoint()
    pruned = toy("toy_score").prune(checkpoint, str(text_path))
    assert pruned.report["config"]["structured"]["score"] == "mean-input" and pruned.report["arm"] == "masked"
    adapter = Adapter(load_model(checkpoint))
    moments = consumer_moments(Scan(adapter, pruned.calibration.fit), "masked")
    for block, kept in zip(adapter.blocks, pruned.plan.blocks, strict=True):
        order = moments[block.index, "down"].mean.abs().argsort(descending=True)
        assert set(kept.channels) == set(order[: len(kept.channels)].tolist()) and len(kept.channels) < 48
    again = load_model(pruned.save(tmp_path / "small"))
    ids = pruned.calibration.input_ids[:1]
    assert torch.equal(again(ids).logits, pruned.model(ids).logits)


@pytest.mark.parametrize("score, arm", [("root-wanda", "masked"), ("sink-root-wanda", "masked+sink")])
def test_a_mask_score(toy, tiny_checkpoint, text_path, score, arm):
    module = toy("toy_mask_score")
    masked = module.prune(tiny_checkpoint(), str(text_path), score)
    assert masked.report["score"] == "root-wanda" and masked.report["arm"] == arm
    assert masked.masks.sparsity() == pytest.approx(0.5)
    plain = module.prune(tiny_checkpoint(name="other"), str(text_path), "wanda")
    name = "model.transformer.blocks.0.q_proj.weight"
    assert not torch.equal(masked.masks.kept(name), plain.masks.kept(name))


def test_names_are_unknown_before_and_taken_after(toy):
    with pytest.raises(UserError, match="structured.score = 'mean-input'"):
        Config.load(overrides={"structured.score": "mean-input"})
    toy("toy_score")
    assert Config.load(overrides={"structured.score": "mean-input"}).structured.score == "mean-input"
    with pytest.raises(UserError, match="'mean-input' exists already"):
        toy("toy_score")
    toy("toy_mask_score")
    with pytest.raises(UserError, match="'root-wanda' exists already"):
        toy("toy_mask_score")


@pytest.mark.parametrize("name", ["toy_score", "toy_mask_score"])
def test_an_example_is_short_and_in_the_docs(name):
    text = (HERE / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 30
    assert f"```python\n{text}```" in DOCS.read_text(encoding="utf-8")


def test_the_family_in_the_docs_is_the_one_that_is_tested():
    """Every definition of the toy family stands in the page as the test has it."""
    source = (HERE.parent / "models" / "test_register_family.py").read_text(encoding="utf-8")
    lines, page = source.splitlines(), DOCS.read_text(encoding="utf-8")
    definitions = {
        getattr(node, "name", None) or node.targets[0].id: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(source).body
        if isinstance(node, (ast.ClassDef, ast.Assign))
    }
    for name in ("NAMES", "ToyConfig", "ToyLM", "TOY"):
        assert definitions[name] in page, name
