"""Runs that make masks where something is unusual: allocation, memory, dtypes, bad Grams, pruned models, no text."""

import importlib.util
import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from structprune import Config, UserError, load_model, prune
from structprune.config.sections import within_positions
from structprune.masking import Masks
from structprune.models.adapter import READERS, Adapter
from structprune.models.loading import Source
from structprune.runs.mask import mask

WANDA = {"method": "unstructured", "masking.score": "wanda", "masking.arm": "clean", "reconstruct.enabled": False}
SPARSEGPT = WANDA | {"masking.score": "sparsegpt"}
REFIT = {"reconstruct.enabled": True}
ROLES = [role for roles in READERS.values() for role in roles]


@pytest.fixture(scope="module")
def given(shared_checkpoint, tiny_calibration):
    """A dense model and its calibration; no test changes either."""
    dense = load_model(shared_checkpoint("llada"))
    return dense, tiny_calibration(dense)


@pytest.fixture(scope="module")
def planted():
    """The model of tests/structured/scores/test_planted_sinks.py, whose sinks are known."""
    path = Path(__file__).parents[1] / "structured" / "scores" / "test_planted_sinks.py"
    spec = importlib.util.spec_from_file_location("planted_sinks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config(*parts: dict, **changes) -> Config:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    return Config.load(None, {key: value for part in (*parts, keys) for key, value in part.items()})


def projections(model) -> dict[str, torch.Tensor]:
    return {f"{block.names[role]}.weight": block[role].weight for block in Adapter(model).blocks for role in ROLES}


def same(one, other) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def zeros(model) -> list[float]:
    """Share of zeros of every block."""
    result = []
    for block in Adapter(model).blocks:
        flat = torch.cat([block[role].weight.flatten() for role in ROLES])
        result.append((flat == 0).double().mean().item())
    return result


PLANTED = [  # score, kind of input, the role that reads it, how 2 of its 4 live features are kept
    ("wanda", "attention", {"masking.ratio": 14 / 16}),  # 12 others are zero
    ("ria", "attention", {"masking.ratio": 14 / 16}),
    ("wanda", "channels", {"masking.ratio": 0.5}),
    ("ria", "channels", {"method": "nm"}),
    ("sparsegpt", "channels", {"method": "nm"}),
]


@pytest.mark.parametrize("score, kind, pattern", PLANTED, ids=lambda value: value if isinstance(value, str) else "")
@torch.no_grad()
def test_planted_sinks_decide_which_inputs_go(score, kind, pattern, planted):
    """Those of soft units where sink rows count, those of loud ones where they are weighted down, by hand."""
    model, calibration = planted.planted_model(), planted.planted_calibration()
    model.source = Source(Path("planted"), {}, torch.float32, "planted")
    for block in Adapter(model).blocks:  # all live inputs are worth the same by their weights
        block["attention_output"].weight[planted.OUT : planted.OUT + 4, :: planted.DIM] = 0.02
        block["down"].weight[planted.OUT + 4 :] = 0.005
    mass, reads = planted.plain_forward(model, calibration.noisy_ids.flatten(0, 1))
    role, row, width = ("attention_output", planted.OUT, 4) if kind == "attention" else ("down", planted.OUT + 4, 1)
    for arm, gone in (("masked", planted.SOFT), ("masked+sink", planted.LOUD)):
        omega = planted.plain_weights(mass, sinks_count=arm == "masked")  # (R*T,)
        keys = {"masking.score": score, "masking.arm": arm, "masking.order": "one-shot"}
        made = mask(model, config(WANDA, keys, pattern), calibration)
        for block in Adapter(made.model).blocks:
            power = (omega[:, None] * reads[block.index, kind]).pow(2).sum(0)[::width]  # (4,)
            assert set(power.argsort()[:2].tolist()) == gone
            kept = made.masks.kept(f"{block.names[role]}.weight")[row, ::width]  # (4,)
            assert set((~kept).nonzero()[:, 0].tolist()) == gone, (arm, block.index)


def test_owl_spreads_the_ratio_by_outliers_in_either_direction(given):
    """The blocks' deviations change sign with the spread; the whole keeps its ratio, and the masks follow."""
    keys = SPARSEGPT | {"masking.allocation": "owl", "masking.owl_threshold": 3.0}
    made = {spread: mask(given[0], config(keys, masking__owl_spread=spread), given[1]) for spread in (0.1, -0.1)}
    up, down = (made[spread].report["block_ratios"] for spread in (0.1, -0.1))
    assert max(up) - min(up) == pytest.approx(0.2) == max(down) - min(down)
    assert [value - 0.5 for value in up] == pytest.approx([0.5 - value for value in down])
    for one in made.values():
        ratios = one.report["block_ratios"]
        assert sum(ratios) / 3 == pytest.approx(0.5)
        assert zeros(one.model) == pytest.approx(ratios, abs=0.002)
        assert one.report["sparsity"]["total"] == pytest.approx(0.5, abs=0.002)


def outliers_by_hand(model, ids, threshold: float) -> list[float]:
    """Share of a block's |W| ‖X‖ above `threshold` times their mean over its seven projections."""
    result = []
    for block in Adapter(model).blocks:
        scores, handles = [], []
        for role in ROLES:

            def note(module, given, scores=scores):
                norm = given[0].double().pow(2).sum((0, 1)).sqrt()  # (C,)
                scores.append((module.weight.detach().double().abs() * norm).flatten())

            handles.append(block[role].register_forward_pre_hook(note))
        model(ids)
        [handle.remove() for handle in handles]
        flat = torch.cat(scores)
        result.append((flat > threshold * flat.mean()).double().mean().item())
    return result


@torch.no_grad()
def test_owl_removes_least_where_outliers_are_most(given):
    """Its ratios by hand; magnitude, which looks at no activations, takes them from noisy text."""
    dense, calibration = given
    keys = {"method": "unstructured", "masking.score": "magnitude", "masking.allocation": "owl"} | {
        "masking.owl_threshold": 3.0, "masking.owl_spread": 0.1, "reconstruct.enabled": False,
    }  # fmt: skip
    ratios = mask(dense, config(keys), calibration).report["block_ratios"]
    share = outliers_by_hand(dense, calibration.fit.noisy_ids.flatten(0, 1), 3.0)
    kept = [0.2 * (value - min(share)) / (max(share) - min(share)) for value in share]
    assert ratios == pytest.approx([0.5 + sum(kept) / 3 - value for value in kept], abs=1e-6)


@pytest.mark.parametrize("slope, expected", [(0.2, [0.6, 0.5, 0.4]), (-0.4, [0.3, 0.5, 0.7])])
def test_depth_is_linear(slope, expected, given):
    made = mask(given[0], config(SPARSEGPT, masking__allocation="depth", masking__depth_slope=slope), given[1])
    assert made.report["block_ratios"] == pytest.approx(expected)
    assert zeros(made.model) == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("keys", [
    SPARSEGPT | REFIT | {"masking.arm": "masked+sink"},
    SPARSEGPT | REFIT | {"masking.order": "one-shot", "reconstruct.target": "layer"},
    WANDA | {"masking.order": "one-shot", "masking.arm": "masked+sink", "masking.relative": True},
], ids=["sequential", "one-shot", "norms"])  # fmt: skip
def test_a_tiny_budget_changes_nothing(keys, given, monkeypatch):
    """Hidden states are in files, and what cannot be held is computed again."""
    whole, made = mask(given[0], config(keys), given[1]), []
    real = tempfile.NamedTemporaryFile
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **more: made.append(1) or real(**more))
    small = mask(given[0], config(keys, memory__budget_gb=1e-9), given[1])
    assert same(whole.model, small.model) and bool(made) == (keys["masking.score"] == "sparsegpt")


def test_in_place_and_on_a_copy(given, tmp_path, shared_checkpoint):
    dense, calibration = given
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    copy = mask(dense, config(SPARSEGPT, REFIT), calibration)
    assert copy.model is not dense and all(
        torch.equal(value, before[name]) for name, value in dense.state_dict().items()
    )
    assert copy.model.embedding.weight is dense.embedding.weight  # what no mask touches is shared
    other = load_model(dense.source.directory)
    inside = mask(other, config(SPARSEGPT, REFIT), calibration, in_place=True)
    assert inside.model is other and same(other, copy.model)
    assert inside.report["held_out_nelbo"] == copy.report["held_out_nelbo"]
    assert not other.training and all(p.requires_grad for p in copy.model.parameters())


def test_the_same_seed_gives_the_same_files(given, text_path, tmp_path):
    """From text to weights, twice; and once more from the calibration that the first run saved."""
    text = {"calibration.source": str(text_path), "calibration.windows": 4, "calibration.held_out": 2} | {
        "calibration.length": 32, "calibration.interval": 25,
    }  # fmt: skip
    keys = SPARSEGPT | REFIT | {"masking.arm": "masked+sink"}
    saved = tmp_path / "0" / "calibration.safetensors"
    runs = [keys | text, keys | text, keys | {"calibration.source": str(saved)}, keys | text | {"calibration.seed": 1}]
    for index, each in enumerate(runs):
        mask(given[0], config(each)).save(tmp_path / str(index))
    first, again, replayed, other = ((tmp_path / str(index) / "model.safetensors").read_bytes() for index in range(4))
    assert first == again == replayed != other
    ours, theirs = (load_file(tmp_path / name / "calibration.safetensors") for name in "02")
    assert ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())
    packed = [Masks.load(tmp_path / name / "masks.safetensors").packed for name in "02"]
    assert all(torch.equal(bits, packed[1][name]) for name, bits in packed[0].items())


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
def test_a_bfloat16_model(family, tiny_checkpoint, tiny_calibration, tmp_path):
    dense = load_model(tiny_checkpoint(family, torch_dtype="bfloat16"), dtype="auto")
    made = mask(dense, config(SPARSEGPT, REFIT, masking__arm="masked+sink"), tiny_calibration(dense))
    made.save(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in projections(made.model).items():
        assert weight.dtype == written[name].dtype == torch.bfloat16 and torch.isfinite(weight).all()
        assert torch.equal(written[name], weight) and torch.equal(weight != 0, made.masks.kept(name))
    assert made.report["sparsity"]["total"] == pytest.approx(0.5, abs=0.002)
    assert any(fit["damping"] is not None for fit in made.report["refit"])


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
def test_a_pruned_model_can_be_masked(family, tiny_checkpoint, tiny_calibration, tmp_path):
    """Per-layer widths, and biases that a refit added, stay."""
    dense = load_model(tiny_checkpoint(family))
    keys = {
        "structured.ratio": 0.4,
        "structured.score": "magnitude",
        "structured.split": 3,
        "reconstruct.constant": True,
    }
    calibration = tiny_calibration(dense)
    prune(dense, Config.load(None, keys), calibration).save(tmp_path / "small")
    small = load_model(tmp_path / "small")
    assert len({block.widths for block in Adapter(small).blocks}) > 1
    made = mask(small, config(SPARSEGPT, REFIT), calibration)
    made.save(tmp_path / "masked")
    depth = mask(small, config(SPARSEGPT, masking__allocation="depth"), calibration)  # of blocks of different sizes
    assert depth.report["block_ratios"][0] - depth.report["block_ratios"][2] == pytest.approx(0.2)
    assert sum(depth.report["block_ratios"]) / 3 != pytest.approx(0.5, abs=1e-4)
    assert depth.report["sparsity"]["total"] == pytest.approx(0.5, abs=0.003)
    back = load_model(tmp_path / "masked")
    assert same(back, made.model) and [b.widths for b in Adapter(back).blocks] == [
        b.widths for b in Adapter(small).blocks
    ]
    for name, weight in projections(back).items():
        assert torch.equal(weight != 0, made.masks.kept(name))
        assert made.masks.sparsity(name) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("nm", [None, "2:4"])
def test_a_gram_that_cannot_be_factored(nm, given, tiny_calibration, tiny_checkpoint):
    """8 tokens for 32 and 48 inputs, one of them dead, no damping asked for: it is raised, and the report says so."""
    dense = load_model(tiny_checkpoint("llada", name="dead"))
    norm = Adapter(dense).blocks[1].module.part("attention_norm").weight
    with torch.no_grad():
        norm[5] = 0
    calibration = tiny_calibration(dense, windows=1, held_out=1, length=8)
    keys = SPARSEGPT | ({} if nm is None else {"method": "nm", "masking.nm": nm})
    made = mask(dense, config(keys, masking__damping=0.0), calibration)
    factored = {(each["block"], each["input"]): each for each in made.report["factored"]}
    assert set(factored) == {(block, name) for block in range(3) for name in READERS}
    assert all(each["damping"] >= 1e-4 for each in factored.values())
    assert {key: each["dead"] for key, each in factored.items() if each["dead"]} == {(1, "attention_input"): 1}
    for name, weight in projections(made.model).items():
        assert torch.isfinite(weight).all()
        if "blocks.1.q_proj" in name:
            assert (weight[:, 5] == 0).all()
    enough = mask(given[0], config(SPARSEGPT, masking__damping=0.02), given[1])
    assert all(each["damping"] == 0.02 and each["dead"] == 0 for each in enough.report["factored"])


def test_magnitude_alone_needs_no_text(given, monkeypatch, tmp_path):
    monkeypatch.setattr("structprune.runs.run.calibrate", lambda *_: pytest.fail("text was asked for"))
    keys = {"method": "unstructured", "masking.score": "magnitude", "reconstruct.enabled": False}
    made = mask(given[0], config(keys, calibration__held_out=0))
    made.save(tmp_path / "out")
    assert made.calibration is None and made.report["calibration"] is None and made.report["held_out_nelbo"] is None
    assert not (tmp_path / "out" / "calibration.safetensors").exists()
    assert "no calibration text was looked at" in (tmp_path / "out" / "README.md").read_text()


def test_a_refit_without_held_out_windows_is_refused(given, tiny_calibration):
    with pytest.raises(UserError, match="holds out no window .* or set reconstruct.enabled = false"):
        mask(given[0], config(SPARSEGPT, REFIT), tiny_calibration(given[0], held_out=0))


def test_the_report_is_that_of_the_written_file(given, tmp_path):
    made = mask(given[0], config(SPARSEGPT, REFIT, masking__arm="clean+sink"), given[1])
    made.save(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    written = load_file(tmp_path / "out" / "model.safetensors")
    tensors, counted = report["sparsity"]["tensors"], {}
    for name, share in tensors.items():
        counted[name] = int((written[name] == 0).sum())
        assert share == counted[name] / written[name].numel()
    total = sum(written[name].numel() for name in tensors)
    assert report["sparsity"]["total"] == sum(counted.values()) / total
    assert report["parameters"] == {
        "all": sum(value.numel() for value in written.values()), "projections": total, "zero": sum(counted.values())
    }  # fmt: skip
    assert (report["score"], report["arm"], report["ratio"]) == ("sparsegpt", "clean+sink", 0.5)
    assert (report["family"], report["device"], report["dtype"]) == ("llada", "cpu", "float32")
    assert [(fit["block"], fit["kind"]) for fit in report["refit"]] == [(b, role) for b in range(3) for role in ROLES]
    assert report["calibration"]["windows"] == 6 and report["calibration"]["length"] == 32
    check = report["held_out_nelbo"]
    assert check["windows"] == 2 and check["masked"] - check["dense"] == pytest.approx(check["loss"]["mean"], abs=1e-6)
    assert set(report["seconds"]) == {"check", "sinks", "statistics", "masks", "refit", "total"}
    asked = config(SPARSEGPT, REFIT, masking__arm="clean+sink")  # its default windows are longer than the model takes
    length = {"calibration": within_positions(asked.calibration, 64)}
    assert Config.build(report["config"]) == asked.model_copy(update=length)
    assert Masks.load(tmp_path / "out" / "masks.safetensors").sparsity() == report["sparsity"]["total"]
