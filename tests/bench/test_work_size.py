"""The predicted size of finished parts, against what runs keep."""

import pytest
import torch

from structprune.bench.work_size import mask_work_bytes, structured_work_bytes
from structprune.config import Config
from structprune.models.adapter import Adapter
from structprune.models.journal import Journal
from structprune.models.loading import load_model, map_model
from structprune.runs.mask import MaskRun
from structprune.runs.pruner import Pruner
from structprune.runs.resolve import at_ratio, resolve_masking, resolve_structured

SMALL = {"calibration.windows": 4, "calibration.held_out": 2, "calibration.length": 16, "calibration.batch": 2}
WIDE = {"d_model": 128, "n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": 256}  # so that headers of files are little


@pytest.fixture
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint("llada", **WIDE))


def size_of(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "keys",
    [
        {}, {"structured.ratio": 0.3, "reconstruct.head": True}, {"structured.arm": "masked"},
        {"calibration.windows": 64, "structured.arm": "masked+sink", "sink.trajectory": "reverse"},
        {"calibration.windows": 64, "structured.score": "wanda", "reconstruct.weighting": "gradient"},
    ],
)  # fmt: skip
def test_a_structured_run(keys, model, text_path, tmp_path):
    few = {"structured.split_candidates": 2, "structured.split_windows": 2}
    request = resolve_structured(
        Config.load(overrides=SMALL | few | {"calibration.source": str(text_path)} | keys), model
    )
    pruner = Pruner(model, request)
    pruner.keep_in(Journal(tmp_path / "work"))
    pruner.prune()
    predicted = structured_work_bytes(Adapter(model), [request], 4)
    assert size_of(tmp_path / "work") == pytest.approx(predicted, rel=0.25)


def test_ratios_share_what_is_measured_of_the_text(model, text_path):
    sinks = {"structured.arm": "masked+sink", "structured.ratio": 0.5, "calibration.source": str(text_path)}
    request = resolve_structured(Config.load(overrides=SMALL | sinks), model)
    requests = [at_ratio(request, 0.3), at_ratio(request, 0.5)]
    apart = sum(structured_work_bytes(Adapter(model), [each], 4) for each in requests)
    tokens, units = 4 * request.calibration.noisy_copies * 16, model.config.n_layers * (8 + 256)
    shared = 3 * 4 * tokens + units * (8 + 2 * 8)  # mass; steps, costs and ranks of units
    assert apart - structured_work_bytes(Adapter(model), requests, 4) == shared


def test_clean_text_beside_windows_is_measured_too(tiny_checkpoint, text_path, tmp_path):
    sinks = {"calibration.windows": 128, "structured.arm": "masked+sink", "reconstruct.enabled": False}
    config = Config.load(overrides=SMALL | sinks | {"calibration.source": str(text_path)})
    model = load_model(tiny_checkpoint("sdar"))
    pruner = Pruner(model, resolve_structured(config, model))
    pruner.keep_in(Journal(tmp_path / "work"))
    pruner.prune()
    predicted, kept = structured_work_bytes(Adapter(model), [pruner.request], 4), size_of(tmp_path / "work")
    assert kept < predicted < 1.7 * kept  # without a refit two of the three sets of mass are kept


@pytest.mark.parametrize("keys", [{}, {"masking.score": "wanda", "reconstruct.enabled": True}])
def test_a_run_for_masks(keys, model, text_path, tmp_path):
    words = {"method": "unstructured", "calibration.source": str(text_path)}
    request = resolve_masking(Config.load(overrides=SMALL | words | keys), model)
    run = MaskRun(model, request, None, lambda items, title: items)
    run.keep_in(Journal(tmp_path / "work"))
    run.run()
    assert size_of(tmp_path / "work") == pytest.approx(mask_work_bytes(Adapter(model), request, torch.float32), rel=0.1)


@pytest.mark.parametrize("keys", [{"masking.score": "wanda", "reconstruct.enabled": False}, {}])
def test_masks_of_weights_on_disk(keys, tiny_checkpoint, text_path, tmp_path):
    """In parts too, weights that only lose numbers stay in the dtype of their files."""
    words = {"method": "unstructured", "calibration.source": str(text_path), "memory.offload": "disk"}
    mapped = map_model(tiny_checkpoint("llada", torch_dtype="bfloat16", **WIDE))
    request = resolve_masking(Config.load(overrides=SMALL | words | keys), mapped)
    run = MaskRun(mapped, request, None, lambda items, title: items)
    run.keep_in(Journal(tmp_path / "work"))
    run.run(in_place=True)
    assert size_of(tmp_path / "work") == pytest.approx(
        mask_work_bytes(Adapter(mapped), request, torch.bfloat16), rel=0.1
    )
