"""The demo on a small scale, and what the default recipe must reach on the embedded model."""

import json

import pytest

from structprune.assets import model_directory
from structprune.calibration.build import calibrate
from structprune.cli.main import main
from structprune.config import Config
from structprune.models.loading import load_model
from structprune.report import plots
from structprune.runs import demo
from structprune.runs.pruner import Pruner

pytestmark = pytest.mark.slow

SMALL = {
    "calibration.windows": 4, "calibration.held_out": 2, "calibration.interval": 25, "structured.split_windows": 2,
    "structured.split_candidates": 2,
}  # fmt: skip


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(demo, "BASE", demo.BASE | SMALL)
    monkeypatch.setattr(demo, "METHODS", demo.METHODS | {demo.OURS: {"structured.rounds": 8}})
    monkeypatch.setattr(demo, "RATIOS", (0.3, 0.5))
    monkeypatch.setattr(demo, "WINDOWS", 8)


def test_the_demo_measures_saves_and_draws(small_demo, tmp_path, capsys):
    out = tmp_path / "made"
    assert main(["demo", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    result = json.loads((out / "demo.json").read_text())
    assert [(row["method"], row["ratio"]) for row in result["rows"]] == [
        (name, ratio) for name in ("structprune", "FLAP", "magnitude") for ratio in (0.3, 0.5)
    ]
    assert {path.name for path in out.iterdir()} == {
        "demo.json",
        "nelbo.png",
        *(f"{name}-{ratio}" for name in ("structprune", "flap", "magnitude") for ratio in (0.3, 0.5)),
    }
    for row in result["rows"]:
        weights = out / f"{row['method'].lower()}-{row['ratio']}" / "model.safetensors"
        assert row["bytes"] == weights.stat().st_size and row["latency_ms"] > 0
        # half a rounding step of one block, or of all five
        assert abs(row["ratio_met"] - row["ratio"]) < 0.01
        saved = load_model(weights.parent)
        assert saved.num_parameters() == row["parameters"]
    assert (out / "nelbo.png").read_bytes().startswith(b"\x89PNG")
    assert max(len(line) for line in said.splitlines() if "±" in line) <= 80
    assert result["run"]["peak_memory_bytes"]["host"] > 0


def test_an_existing_output_is_kept(small_demo, tmp_path, capsys):
    out = tmp_path / "made"
    out.mkdir()
    (out / "demo.json").write_text("{}")
    assert main(["demo", "--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err and (out / "demo.json").read_text() == "{}"


def test_the_default_recipe_finds_the_split_by_itself():
    """At 0.3 it must lose at most 0.045 nats per token, at 0.5 at most 0.45."""
    model = load_model(model_directory(), device="cpu")
    config = Config.load(overrides=demo.BASE)
    held_out = demo.HeldOut(model, 1, demo.WINDOWS, demo.LENGTH)
    held_out.ids, held_out.noise = held_out.ids[:64], [part[:64] for part in held_out.noise]
    dense = held_out.nelbo(model).mean
    pruner = Pruner(model, config, calibrate(model, config))
    losses, heads = {}, {}
    for ratio in (0.3, 0.5):
        pruned = pruner.prune(ratio)
        losses[ratio] = held_out.nelbo(pruned.model).mean - dense
        heads[ratio] = sum(pruned.report["choice"]["attention"])
        assert pruned.report["held_out_nelbo"]["kept"] == "refit"
    assert losses[0.3] < 0.045 and losses[0.5] < 0.45
    assert heads[0.3] < heads[0.5] < 20  # the equal split would take 12 and 20 of 40


@pytest.fixture
def drawn(monkeypatch):
    """The points (ratio, loss) of each line of the pictures that are written, by name."""
    lines, save = {}, plots.save_figure

    def look(figure, *given):
        for line in figure.axes[0].containers:
            lines[line.get_label()] = [tuple(point) for point in line.lines[0].get_xydata().tolist()]
        return save(figure, *given)

    monkeypatch.setattr(plots, "save_figure", look)
    return lines


@pytest.mark.slow
def test_the_demo_can_train_its_model_back(small_demo, drawn, tmp_path, monkeypatch, capsys):
    few = {"blocks.tokens": 8 * 128 * 2, "train.tokens": 8 * 128 * 6, "train.learning_rate": 1e-3}
    few |= {"train.evaluations": 1, "data.held_out": 8}
    monkeypatch.setattr(demo, "RECOVER", demo.RECOVER | few)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--recover"]) == 0
    rows = {(row["method"], row["ratio"]): row for row in json.loads((out / "demo.json").read_text())["rows"]}
    before, after = rows[demo.OURS, 0.5], rows["trained back", 0.5]
    assert after["tokens"] == 8 * 128 * 8 and after["loss"]["mean"] != before["loss"]["mean"]
    assert all(after[key] == before[key] for key in ("parameters", "macs", "bytes", "latency_ms"))
    assert set(drawn) == {*demo.METHODS, "trained back"} and len(drawn[demo.OURS]) == 2
    assert drawn["trained back"] == [(after["ratio_met"], after["loss"]["mean"])]
    assert (out / "nelbo.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "structprune-0.5-recovered" / "report.json").read_text())
    assert [each["student"] for each in report["recoveries"]] == ["structprune-0.5"]
    assert not list(out.glob("*.training"))
    shown = capsys.readouterr().out
    assert "trained back" in shown and f"{out / 'structprune-0.5-recovered'}" in shown.replace("\n", "")
