"""The published presets, through the command line, give the weights of the released implementation (tests/parity)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune.cli.main import main
from structprune.config import Config
from structprune.masking import Masks

PARITY = Path(__file__).parents[1] / "parity"
PRESETS = Path(__file__).parents[2] / "configs" / "published"
CASES = [
    (family, case)
    for family in ("llada", "dream")
    for case in json.loads((PARITY / family / "cases.json").read_text(encoding="utf-8"))["cases"]
]
SCORES = ("magnitude", "wanda", "sparsegpt", "sink-wanda", "sink-sparsegpt")


def calibration_file(expected: dict, method: str, path: Path) -> Path:
    """What the release looked at, as a calibration.safetensors: its noise is stored sample after sample."""
    ids = expected["calibration_ids"]  # (N, T)
    source = "sink_sparsegpt_50" if method == "sink_sparsegpt" else "sink_wanda_50"
    noisy = expected[f"{source}/noisy_ids"].unflatten(0, (len(ids), -1))  # (N, S, T)
    save_file({"input_ids": ids, "noisy_ids": noisy.contiguous()}, path)
    return path


@pytest.mark.parametrize("family, case", CASES, ids=lambda value: value if isinstance(value, str) else value["name"])
def test_a_preset_gives_the_released_weights(family, case, tmp_path, capsys):
    checkpoint, out, method = PARITY / family, tmp_path / "out", case["method"]
    expected = load_file(checkpoint / "expected.safetensors")
    replayed = calibration_file(expected, method, tmp_path / "calibration.safetensors")
    preset = PRESETS / f"{family}-{method.replace('_', '-')}.yaml"
    nm = ["--method", "nm", "--nm", ":".join(map(str, case["nm"]))] if "nm" in case else []
    given = ["prune", str(checkpoint), "--out", str(out), "--config", str(preset), "--calibration", str(replayed)]
    assert main([*given, *nm]) == 0, capsys.readouterr().err
    written, masks = load_file(out / "model.safetensors"), Masks.load(out / "masks.safetensors")
    prefix = f"{case['name']}/weight/"
    target = {name.removeprefix(prefix): value for name, value in expected.items() if name.startswith(prefix)}
    assert len(target) == case["pruned_tensors"] and target.keys() == masks.packed.keys()
    dense = load_file(checkpoint / "model.safetensors")
    for name, theirs in target.items():  # no scores that a mask divides are closer than 9e-6: equal means equal
        ours = written[name]
        if "wanda" in method:
            assert torch.equal(ours, theirs), name
        else:
            assert torch.equal(ours != 0, theirs != 0), name
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)  # 8e-7 is the most that was seen
        assert torch.equal(masks.kept(name), theirs != 0) and not torch.equal(ours, dense[name])
    zero = sum(int((value == 0).sum()) for value in target.values()) / sum(value.numel() for value in target.values())
    assert zero == pytest.approx(case["zero_fraction"], abs=1e-12)
    assert json.loads((out / "report.json").read_text())["sparsity"]["total"] == pytest.approx(zero, abs=1e-12)
    assert all(torch.equal(written[name], value) for name, value in dense.items() if name not in target)


def test_all_cases_are_run():
    assert len(CASES) == 12 and sum("nm" in case for _, case in CASES) == 4


def test_every_preset_has_its_test_and_none_is_missing():
    assert {file.stem for file in PRESETS.iterdir()} == {
        f"{family}-{s}" for family in ("llada", "dream") for s in SCORES
    }


@pytest.mark.parametrize("file", sorted(PRESETS.glob("*.yaml")), ids=lambda file: file.stem)
def test_presets_hold_the_released_choices(file):
    """Half of the weights, no refit, 128 windows of 4096 tokens of WikiText-2 train from seed 0, 10 of 50 steps."""
    config, score = Config.load(file), file.stem.partition("-")[2]
    masking, calibration = config.masking, config.calibration
    assert (config.method, masking.ratio, masking.score) == ("unstructured", 0.5, score)
    arms = {"magnitude": None, "sink-wanda": "masked+sink", "sink-sparsegpt": "clean+sink"}
    assert masking.arm == arms.get(score, "clean")
    oneshot = ("one-shot", "summed") if score == "sink-wanda" else ("sequential", "joint")
    assert (masking.order, masking.norms) == oneshot
    assert (masking.damping, masking.column_block, masking.allocation) == (0.01, 128, "uniform")
    assert (masking.relative, config.reconstruct.enabled, calibration.held_out) == (False, False, 0)
    assert (config.sink.mask, config.sink.alpha, config.sink.kappa, config.sink.scale_free) == ("soft", 5, 2, False)
    if score != "magnitude":
        assert (calibration.source, calibration.subset, calibration.split) == ("wikitext2", None, "train")
        assert (calibration.windows, calibration.length, calibration.seed) == (128, 4096, 0)
        assert (calibration.steps, calibration.interval) == (50, 5)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_magnitude_preset_runs_without_any_text(family, tmp_path, capsys):
    """It removes what is at most the value at sorted index int(n / 2) of a matrix, by hand; nothing else moves."""
    checkpoint, out = PARITY / family, tmp_path / "out"  # a directory without a tokenizer
    preset = str(PRESETS / f"{family}-magnitude.yaml")
    assert main(["prune", str(checkpoint), "--out", str(out), "--config", preset]) == 0, capsys.readouterr().err
    written, dense = load_file(out / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    masked = Masks.load(out / "masks.safetensors").packed.keys()
    assert len(masked) == 14 and not (out / "calibration.safetensors").exists()
    for name, value in dense.items():
        if name in masked:
            threshold = value.abs().flatten().sort().values[value.numel() // 2]
            value = torch.where(value.abs() <= threshold, 0.0, value)
        assert torch.equal(written[name], value), name
