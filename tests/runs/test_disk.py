"""Runs whose weights stay on disk: the same outputs, byte for byte, as with weights in memory."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

import structprune
from structprune.config import Config, MemorySettings, ModelSettings
from structprune.errors import Interrupted, UserError
from structprune.models import maps, placement
from structprune.models.adapter import Adapter
from structprune.models.journal import Journal
from structprune.models.loading import load_model, map_model
from structprune.models.maps import place_of
from structprune.models.resources import resolve_resources
from structprune.runs.checkpoints import mask_checkpoint, prune_checkpoint
from structprune.runs.mask import mask
from structprune.runs.pruner import Pruner
from structprune.runs.resolve import resolve_structured

SMALL = {
    "calibration.windows": 3, "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 25,
    "structured.rounds": 8,
}  # fmt: skip
MASK_SMALL = {key: value for key, value in SMALL.items() if not key.startswith("structured")}
STRUCTURED = {
    "default": {"structured.split_candidates": 2, "structured.split_windows": 2},
    "wanda, uniform": {"structured.score": "wanda", "structured.allocation": "uniform", "structured.split": "equal"},
    "magnitude, no refit": {"structured.score": "magnitude", "structured.split": "equal", "reconstruct.enabled": False},
    "bias and head": {"structured.split": "by-cost", "reconstruct.constant": True, "reconstruct.head": True},
    "fluctuation, bias": {"structured.score": "fluctuation", "structured.split": "equal", "reconstruct.mode": "bias"},
}
MASKS = {
    f"{method} {score}{', refit' if refit else ''}": {
        "method": method, "masking.score": score, "reconstruct.enabled": refit,
    }
    for method in ("unstructured", "nm")
    for score, refit in (
        ("magnitude", False), ("wanda", False), ("sink-wanda", False), ("ria", False), ("sparsegpt", False),
        ("sink-sparsegpt", True),
    )
} | {
    "one-shot": {"method": "unstructured", "masking.score": "sink-wanda", "masking.order": "one-shot"},
    "owl": {"method": "unstructured", "masking.score": "magnitude", "masking.allocation": "owl"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def shared_room(monkeypatch):
    """Layers of these sizes share the memory of their copies, as large ones do."""
    monkeypatch.setattr(placement, "SMALL_WEIGHT", 100)


def weights_of(directory) -> dict[str, str]:
    """Digests of what an output's files of weights and masks hold."""
    names = [path for path in directory.iterdir() if path.suffix == ".safetensors"]
    assert names
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def both(run, checkpoint, tmp_path, values) -> list[dict[str, str]]:
    result = []
    for offload in ("false", "disk"):
        config = Config.load(overrides=values | {"memory.offload": offload, "model.device": "cpu"})
        run(str(checkpoint), tmp_path / offload, config)
        result.append(weights_of(tmp_path / offload))
    return result


@pytest.mark.parametrize("case", STRUCTURED)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_structured_run_from_disk_writes_the_same_bytes(case, family, tiny_checkpoint, text_path, tmp_path):
    checkpoint = tiny_checkpoint(family, torch_dtype="bfloat16")
    values = SMALL | STRUCTURED[case] | {"calibration.source": str(text_path)}
    if values.get("structured.score", "obs") != "obs":
        del values["structured.rounds"]
    held, mapped = both(prune_checkpoint, checkpoint, tmp_path, values)
    assert held == mapped


@pytest.mark.parametrize("case", MASKS)
def test_masks_from_disk_are_the_same_bytes(case, tiny_checkpoint, text_path, tmp_path):
    checkpoint = tiny_checkpoint(torch_dtype="bfloat16")
    values = MASK_SMALL | MASKS[case] | {"calibration.source": str(text_path)}
    held, mapped = both(mask_checkpoint, checkpoint, tmp_path, values)
    assert held == mapped and "masks.safetensors" in mapped


@pytest.mark.parametrize("values", [{"structured.split": "by-cost"}, MASKS["unstructured wanda"]])
def test_a_tied_head_is_its_embedding_on_disk_too(values, tiny_checkpoint, text_path, tmp_path):
    checkpoint = tiny_checkpoint("a2d-qwen3", torch_dtype="bfloat16")
    small, run = (MASK_SMALL, mask_checkpoint) if "method" in values else (SMALL, prune_checkpoint)
    held, mapped = both(run, checkpoint, tmp_path, small | values | {"calibration.source": str(text_path)})
    assert held == mapped
    model = map_model(tmp_path / "disk")
    assert model.followers and model.output_head.weight is model.embedding.weight and in_memory(model) == []


def test_a_head_that_differs_from_its_embedding_is_refused_on_disk_too(tiny_checkpoint):
    checkpoint = tiny_checkpoint("a2d-qwen3")
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, checkpoint / "model.safetensors")
    for load in (load_model, map_model):
        with pytest.raises(UserError, match="lm_head.weight is not model.embed_tokens.weight"):
            load(checkpoint)


def in_memory(model) -> list[str]:
    return [name for name, weight in model.state_dict().items() if place_of(weight) is None]


def test_no_weight_is_in_memory_at_any_time(tiny_checkpoint, text_path, monkeypatch):
    """Neither after loading nor in what a run leaves, with a refit that changes weights and adds biases."""
    model = map_model(tiny_checkpoint(torch_dtype="bfloat16"))
    assert in_memory(model) == [] and in_memory(load_model(tiny_checkpoint(name="held"))) == [*model.state_dict()]
    values = SMALL | STRUCTURED["bias and head"] | {"calibration.source": str(text_path), "memory.offload": "disk"}
    pruned = structprune.prune(model, Config.load(overrides=values))
    assert in_memory(pruned.model) == [] and in_memory(model) == []
    assert pruned.report["held_out_nelbo"]["kept"] == "refit" and pruned.report["dtype"] == "float32"
    values = MASK_SMALL | {"calibration.source": str(text_path), "memory.offload": "disk", "method": "unstructured"}
    masked = structprune.prune(model, Config.load(overrides=values))
    assert in_memory(masked.model) == [] and masked.report["sparsity"]["total"] == pytest.approx(0.5, abs=0.01)


def test_pages_of_every_layer_are_given_back(tiny_checkpoint, text_path, monkeypatch):
    """What is read of the checkpoint's own file is given back, block by block."""
    model = map_model(tiny_checkpoint(torch_dtype="bfloat16"))
    place, given = place_of(model.embedding.weight), []
    advise = maps._advise
    monkeypatch.setattr(maps, "_advise", lambda address, size: (given.append((address, size)), advise(address, size)))
    values = SMALL | STRUCTURED["wanda, uniform"] | {"calibration.source": str(text_path), "memory.offload": "disk"}
    del values["structured.rounds"]
    structprune.prune(model, Config.load(overrides=values))
    for name, weight in model.state_dict().items():
        first, last = weight.data_ptr(), weight.data_ptr() + weight.nbytes
        own = [size for address, size in given if address <= first and last <= address + size]
        assert min(own) < place.size, f"{name} is given back with the whole file alone"


@pytest.mark.parametrize("case", ["structured", "masks"])
def test_a_killed_run_goes_on_to_the_same_model(case, tiny_checkpoint, text_path, tmp_path):
    checkpoint = tiny_checkpoint(torch_dtype="bfloat16")
    values = {"calibration.source": str(text_path), "memory.offload": "disk"}
    if case == "masks":
        config = Config.load(overrides=MASK_SMALL | values | {"method": "nm", "masking.score": "sparsegpt"})
    else:
        config = Config.load(overrides=SMALL | values | STRUCTURED["default"])

    def run(journal):
        model = map_model(checkpoint)
        if case == "masks":
            return mask(model, config, journal=journal).model.state_dict()
        pruner = Pruner(model, config)
        pruner.keep_in(journal)
        return pruner.prune().model.state_dict()

    parts = []

    def stop():
        parts.append(1)
        if len(parts) == 12:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        run(Journal(tmp_path / "parts", stop))
    whole, resumed = run(Journal(None)), run(Journal(tmp_path / "parts"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert all(place_of(weight) for weight in resumed.values())


def test_the_dtype_to_compute_in_is_the_users(tiny_checkpoint, text_path, tmp_path):
    """In bfloat16 the result differs from float32's, and is that of weights in memory."""
    checkpoint = tiny_checkpoint(torch_dtype="bfloat16")
    values = SMALL | STRUCTURED["default"] | {"calibration.source": str(text_path)}
    held, mapped = both(prune_checkpoint, checkpoint, tmp_path, values | {"model.dtype": "bfloat16"})
    assert held == mapped
    (tmp_path / "fp32").mkdir()
    assert both(prune_checkpoint, checkpoint, tmp_path / "fp32", values)[1] != mapped


REFUSED = {
    "structured.score=taylor": "score 'taylor' needs a backward pass, which memory.offload does not do",
    "reconstruct.weighting=gradient": "reconstruct.weighting = gradient needs a backward pass, which memory.offload",
    "search.enabled=true": "search.enabled = true holds levels in memory, which memory.offload = disk is to save",
    "model.allow_pickle=true": "memory.offload = disk reads safetensors files: leave out model.allow_pickle",
}


@pytest.mark.parametrize("choice", REFUSED)
def test_what_cannot_be_read_from_disk_is_refused(choice, tiny_model):
    key, value = choice.split("=")
    with pytest.raises(UserError, match=REFUSED[choice]):
        resolve_structured(Config.load(overrides={key: value, "memory.offload": "disk"}), tiny_model())


@pytest.mark.parametrize("value", ["cloud", "2", "Disk"])
def test_another_place_is_refused(value):
    with pytest.raises(UserError, match=f"memory.offload = '{value}': input should be true, false or disk"):
        Config.load(overrides={"memory.offload": value})


def test_a_model_and_its_run_agree_on_the_place_of_weights(tiny_checkpoint, text_path):
    config = {"calibration.source": str(text_path)} | SMALL
    for load, offload in ((load_model, "disk"), (map_model, False)):
        with pytest.raises(UserError, match="memory.offload = disk is for a model of structprune.map_model"):
            structprune.prune(load(tiny_checkpoint()), Config.load(overrides=config | {"memory.offload": offload}))


def test_a_cpu_streams_from_disk_only(text_path):
    resources = resolve_resources(ModelSettings(device="cpu"), MemorySettings(offload="disk"))
    assert resources.on_disk and resources.stream_target == torch.device("cpu") == resources.home
    assert resources.weight_dtype(torch.bfloat16) == torch.float32
    with pytest.raises(UserError, match="the device is cpu: leave it off, or set it to disk"):
        resolve_resources(ModelSettings(device="cpu"), MemorySettings(offload=True))


@pytest.mark.parametrize("case", ["structured", "masks"])
def test_kept_parts_are_where_the_weights_lie(case, tiny_checkpoint, text_path, tmp_path):
    """Each changed weight is on disk once: in the part that was kept of its block, also after that was read again."""
    values = {"calibration.source": str(text_path), "memory.offload": "disk"}
    own = SMALL | STRUCTURED["bias and head"] if case == "structured" else MASK_SMALL | MASKS["nm wanda"]
    config = Config.load(overrides=values | own)
    parts, sizes = tmp_path / "parts", []
    for _ in range(2):
        model = map_model(tiny_checkpoint(torch_dtype="bfloat16"))
        if case == "masks":
            result = mask(model, config, journal=Journal(parts)).model
        else:
            pruner = Pruner(model, config)
            pruner.keep_in(Journal(parts))
            result = pruner.prune().model
        block = Adapter(result).blocks[1]
        sizes.append({place_of(block[role].weight).size for role in block.names})
    files = {path.stat().st_size for path in parts.rglob("block-001*.safetensors")}
    assert sizes[0] == sizes[1] <= files


def test_saved_weights_need_no_temporary_file(tiny_checkpoint, text_path, tmp_path):
    """Those that are written as they are lie in the output then, which is the same model."""
    values = MASK_SMALL | MASKS["unstructured wanda"] | {"calibration.source": str(text_path), "memory.offload": "disk"}
    masked = mask(map_model(tiny_checkpoint(torch_dtype="bfloat16")), Config.load(overrides=values))
    before = {name: masked.model.get_parameter(name).clone() for name in masked.masks.packed}
    assert all(place_of(masked.model.get_parameter(name)).temporary for name in before)
    masked.save(tmp_path / "out")
    assert not any(place_of(masked.model.get_parameter(name)).temporary for name in before)
    again = map_model(tmp_path / "out").state_dict()
    for name, weight in before.items():
        assert torch.equal(masked.model.get_parameter(name), weight) and torch.equal(again[name], weight)
