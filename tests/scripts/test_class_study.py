"""The study of export classes: every variant can be run, the summary is paired, and the picture is drawn."""

import pytest

from structprune.assets import model_directory
from structprune.config import Config
from structprune.runs.inspect import inspect_checkpoint


@pytest.fixture
def study(scripts):
    return scripts("class_study")


def runs_of(study, losses: dict[str, float]) -> dict:
    """Two seeds of every variant, the second 0.1 nats worse."""
    runs = {}
    for name in study.VARIANTS:
        for seed in (0, 1):
            sides = {"median": 0.6 + seed / 10, "p25": 0.5, "p75": 0.8}
            row = {
                "loss": [losses[name] + seed / 10, losses[name] + seed / 10], "seconds": 2.0, "widths": [{}] * 4,
                "removed": 0.5, "latency": {"share": sides},
            }  # fmt: skip
            runs[name, seed] = {"dense_nelbo": 4.0, "ratios": dict.fromkeys(study.ratios_of(name), row)}
    return runs


LOSSES = {
    "free": 0.1,
    "free, search": 0.05,
    "uniform": 0.5,
    "uniform, search": 0.3,
    "official": 0.6,
    "official, search": 0.5,
}


def test_every_variant_can_be_run(study):
    for name, keys in study.VARIANTS.items():
        config = Config.load(overrides=study.BASE | {"structured.ratio": 0.5} | keys)
        assert (inspect_checkpoint(model_directory(), config)["search"] is not None) == name.endswith(", search")
        assert config.export.compat == name.removesuffix(", search")
        for ratio in study.ratios_of(name):
            inspect_checkpoint(
                model_directory(), Config.load(overrides=study.BASE | {"structured.ratio": ratio} | keys)
            )


def test_the_summary_is_paired(study):
    result = study.summarise(runs_of(study, LOSSES), [0, 1])
    back = {row["variant"]: row["by_seed"] for row in result["gap_closed"] if row["ratio"] == "0.5"}
    assert {(row["variant"], row["ratio"]) for row in result["losses"]} == {
        (name, ratio) for name in LOSSES for ratio in ("0.3", "0.5", "0.7") if (name[:8], ratio) != ("official", "0.7")
    }
    assert back["uniform, search"] == pytest.approx([0.5, 0.5])  # (0.5 - 0.3) / (0.5 - 0.1)
    assert back["official, search"] == pytest.approx([0.2, 0.2])
    gap = next(row for row in result["contrasts"] if row["variant"] == "uniform, search" and row["against"] == "free")
    assert gap["mean"] == pytest.approx(0.2)
    share = result["losses"][0]["latency_share"]
    assert share == {"median": pytest.approx(0.65), "p25": 0.5, "p75": 0.8}
    losses, gaps = study.tables(result)
    assert len(losses.columns[0]._cells) == 6 and len(gaps.columns[0]._cells) == len(study.CONTRASTS)


def test_the_picture_is_drawn(study, tmp_path):
    pytest.importorskip("matplotlib")
    path = study.draw(study.summarise(runs_of(study, LOSSES), [0, 1]), tmp_path / "class_pareto.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_both_models_are_timed(study, tiny_model, monkeypatch):
    monkeypatch.setattr(study, "PASSES", 3)
    monkeypatch.setattr(study, "LENGTH", 8)
    timed = study.timed(tiny_model(), tiny_model(n_layers=1))
    assert set(timed) == {"dense", "pruned", "share"}
    assert all(0 < each["p25"] <= each["median"] <= each["p75"] for each in timed.values())
