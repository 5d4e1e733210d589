"""Every shipped configuration runs on a tiny checkpoint of its family, at its own ratio."""

from pathlib import Path

import pytest

import structprune
from structprune.config import Config
from structprune.models.adapter import Adapter
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.trainer import passes_of
from structprune.runs.recover import checked
from structprune.structured.allocate import ratio_of
from structprune.structured.choose import open_blocks

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
TINY = {
    "llada-1.5": "llada",
    "a2d": "a2d-qwen3",
    "llada2-mini": "llada2",
}  # a file's name -> the tiny checkpoint's, where it is another
SMALL = {
    "calibration.windows": 3, "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 25,
    "structured.split_candidates": 2, "structured.split_windows": 2, "structured.rounds": 8,
}  # fmt: skip


def test_every_family_has_both_ratios():
    names = {file.stem for file in FILES}
    families = (
        "llada", "llada-1.5", "mmada", "dream", "a2d", "sdar", "llada-moe", "nemotron-labs", "llada2-mini",
    )  # fmt: skip
    assert names == {f"{family}-{ratio}" for family in families for ratio in (0.3, 0.5)}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_prunes_a_tiny_checkpoint_of_its_family(file, tiny_checkpoint, text_path):
    name = file.stem.rpartition("-")[0]
    family = TINY.get(name, name)
    shipped = Config.load(file)
    experts = {"structured.experts": 2} if shipped.structured.experts else {}  # of six or eight
    config = Config.load(file, SMALL | experts | {"calibration.source": str(text_path)})
    assert shipped.structured.ratio == float(file.stem.rpartition("-")[2])
    model = structprune.load_model(tiny_checkpoint(family))
    pruned = structprune.prune(model, config)
    widest_step = max(step for size in open_blocks(Adapter(model), config.structured) for step in size.step.values())
    sizes = open_blocks(Adapter(model), config.structured)
    total = sum(size.total for size in sizes)
    assert abs(pruned.report["ratio"] - shipped.structured.ratio) <= widest_step / total
    assert pruned.model.num_parameters() < model.num_parameters()
    gone = sum(size.gone for size in sizes) / total
    assert ratio_of(sizes, {(s.index, k): 0 for s in sizes for k in s.step}) == gone and (gone > 0) == bool(experts)


@pytest.mark.parametrize("file", sorted((FOLDER / "recover").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recovery_config_names_its_family_and_can_be_run(file, tiny_checkpoint, text_path, tmp_path):
    """At small sizes, on a tiny checkpoint of its family."""
    config = RecoverConfig.load(file)
    assert passes_of(config.train, 1) == 16 and passes_of(config.train, 8) == 2
    text = file.read_text(encoding="utf-8")
    assert f"--config configs/recover/{file.name}" in text and f"structprune recover {file.stem}-0.5 " in text
    small = {"data.source": str(text_path), "data.length": 16, "data.held_out": 4, "model.device": "cpu"}
    tiny = str(tiny_checkpoint(TINY.get(file.stem, file.stem)))
    plan = checked(tiny, tiny, tmp_path / "out", RecoverConfig.load(file, small)).plan()
    assert plan["steps"] == 50_000_000 // (32 * 16) and plan["memory"]["gradients and optimiser"] > 0
