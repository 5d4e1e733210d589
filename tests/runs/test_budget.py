"""Memory that is given: what a run holds, streams or reads from disk, by what it is predicted to take."""

import re

import pytest

from structprune.config import Config
from structprune.errors import UserError
from structprune.models.loading import load_model, map_model
from structprune.models.placement import stays_on_disk
from structprune.models.resources import Resources
from structprune.runs import budget
from structprune.runs.budget import within_memory
from structprune.runs.checkpoints import mask_checkpoint, prune_checkpoint
from structprune.runs.ghost import read_ghost
from structprune.runs.inspect import inspect_checkpoint, inspect_masking
from structprune.runs.mask import mask
from structprune.runs.pruner import Pruner
from structprune.runs.resolve import resolve_masking, resolve_structured

EQUAL = {"structured.split": "equal", "structured.score": "wanda"}
GPU = {"model.device": "cuda:0"}
MASKS = {"method": "unstructured", "masking.score": "wanda", "reconstruct.enabled": False}


@pytest.fixture
def chosen(published_config):
    """`chosen(host, device, **keys)`: the resources of a run at LLaDA-8B's shapes, and its predicted peaks in GB."""
    directory = published_config("llada")

    def choose(host=None, device=None, **keys) -> tuple[Resources, dict[str, float]]:
        keys = {key.replace("__", "."): value for key, value in keys.items()} | {"memory.host_gb": host}
        config = Config.load(overrides={"model.device": "cpu", "memory.device_gb": device} | keys)
        ghost = read_ghost(directory, config.model)
        resolve = resolve_structured if config.method == "structured" else resolve_masking
        request = within_memory(resolve(config, ghost.model, dry_run=True), ghost.model, ghost.stored)
        peaks = budget.predicted_memory(request, ghost.model, ghost.stored)
        return request.resources, {key: size / 1e9 for key, size in peaks.items() if key.startswith("peak")}

    return choose


@pytest.mark.parametrize("method", [EQUAL, MASKS], ids=["structured", "masks"])
def test_a_smaller_host_means_files_and_then_the_disk(chosen, method):
    """fp32 weights of 8 billion parameters take 32 GB, whatever else goes to files."""
    keys = {key.replace(".", "__"): value for key, value in method.items()}
    free, peaks = chosen(**keys)
    assert (free.offload, free.budget) == (False, 8_000_000_000)
    seen = []
    for host in (peaks["peak host"] + 1, peaks["peak host"] - 1, 20.0, 8.0):
        resources, peaks_there = chosen(host, **keys)
        assert peaks_there["peak host"] <= host
        seen.append((resources.offload, resources.budget < free.budget))
    assert seen[0] == (False, False) and seen[1][0] in (False, "disk") and seen[-1] == ("disk", seen[-1][1])
    assert [offload for offload, _ in seen] == sorted((offload for offload, _ in seen), key=str, reverse=False)


def test_an_accelerator_holds_streams_from_the_host_or_from_disk(chosen, monkeypatch):
    keys = {key.replace(".", "__"): value for key, value in (MASKS | GPU).items()}
    assert chosen(device=80.0, **keys)[0].offload is False
    assert chosen(device=8.0, host=40.0, **keys)[0].offload is True
    small, peaks = chosen(device=8.0, host=8.0, **keys)
    assert small.offload == "disk" and max(peaks["peak host"], peaks["peak device"]) <= 8


def test_what_the_user_sets_stays(chosen):
    keys = {key.replace(".", "__"): value for key, value in MASKS.items()}
    with pytest.raises(UserError, match=r"memory.host_gb = 20 is too little: .* all weights where it computes: raise"):
        chosen(20.0, memory__offload=False, **keys)
    assert chosen(40.0, memory__offload="disk", **keys)[0].offload == "disk"
    assert chosen(100.0, memory__budget_gb=3.0, **keys)[0].budget == 3_000_000_000
    with pytest.raises(UserError, match=r"memory.host_gb = 20 is too little: .*with all weights where it computes"):
        chosen(20.0, structured__score="taylor")  # whose backward pass holds them


def test_the_least_is_named_where_nothing_fits(chosen):
    keys = {key.replace(".", "__"): value for key, value in MASKS.items()}
    with pytest.raises(UserError, match="memory.host_gb = 1 is too little") as caught:
        chosen(1.0, **keys)
    least = float(re.search(r"takes is ([\d.]+) GB \(host\), with weights on disk", str(caught.value))[1])
    peaks = chosen(least + 0.01, **keys)[1]
    spare = 0.03 + 0.04 * 2 * 8.015581184  # bf16 weights of 8 billion parameters
    assert peaks["peak host"] + spare == pytest.approx(least, abs=0.01)
    with pytest.raises(UserError, match="memory.device_gb = 8.0 has no effect without an accelerator"):
        chosen(device=8.0, **keys)


@pytest.mark.parametrize(
    "run, keys", [(prune_checkpoint, EQUAL), (mask_checkpoint, MASKS)], ids=["structured", "masks"]
)
def test_a_run_does_what_its_dry_run_says(run, keys, tiny_checkpoint, text_path, tmp_path):
    """A budget between the predictions with weights in memory and, with what must be free beside it, on disk."""
    checkpoint = tiny_checkpoint(torch_dtype="bfloat16", vocab_size=600_000, embedding_size=600_000)
    small = {"calibration.windows": 2, "calibration.held_out": 1, "calibration.length": 16, "calibration.interval": 25}
    keys = keys | small | {"calibration.source": str(text_path), "model.device": "cpu"}

    def peak(**more) -> int:
        config = Config.load(overrides=keys | {f"memory.{key}": value for key, value in more.items()})
        inspect = inspect_checkpoint if config.method == "structured" else inspect_masking
        return inspect(str(checkpoint), config)["memory"]["peak host"]

    held, disk = peak(offload=False), peak(offload="disk")
    between = held / 1e9 - 0.002
    assert disk / 1e9 + 0.04 < between
    assert peak(host_gb=between) == disk and peak(host_gb=held / 1e9 + 0.01) == held
    config = Config.load(overrides=keys | {"memory.host_gb": between})
    assert stays_on_disk(run(str(checkpoint), tmp_path / "out", config).result.model)


def test_processes_share_the_memory_of_a_machine(chosen, monkeypatch):
    """Each takes as much; one on a machine of its own has it alone."""
    keys = {key.replace(".", "__"): value for key, value in MASKS.items()}
    alone, peaks = chosen(40.0, **keys)
    assert alone.offload is False and 20 < peaks["peak host"] < 40
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert chosen(40.0, **keys)[0].offload == "disk" and chosen(80.0, **keys)[0].offload is False
    with pytest.raises(
        UserError, match=r"memory.host_gb = 5 is too little: .* GB \(host\) in 2 processes, with weights"
    ):
        chosen(5.0, **keys)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert chosen(40.0, **keys)[0].offload is False


def test_a_loaded_model_is_only_checked(tiny_checkpoint, text_path):
    config = Config.load(overrides=MASKS | {"memory.host_gb": 0.1, "calibration.source": str(text_path)})
    with pytest.raises(UserError, match="memory.host_gb = 0.1 is too little: .*, with all weights where it computes"):
        mask(load_model(tiny_checkpoint()), config)
    on_disk = Config.load(overrides=MASKS | {"memory.host_gb": 0.1, "memory.offload": "disk"})
    with pytest.raises(UserError, match="memory.host_gb = 0.1 is too little: .*, with weights on disk"):
        mask(map_model(tiny_checkpoint()), on_disk)


def test_predictions_on_disk_by_hand(published_config):
    """LLaDA-8B in fp32 over bf16: copies of the widest layers of two models, or of the head, and a few pages."""
    config = Config.load(overrides=MASKS | {"memory.offload": "disk", "model.device": "cpu"})
    memory = inspect_masking(published_config("llada"), config)["memory"]
    widest, pages = 4096 * 12288, 2 * 2**24
    assert memory["weights on disk"] == 2 * 8_015_581_184 and "weights" not in memory
    assert memory["layers under way"] == 2 * 4 * widest + pages
    assert memory["head under way"] == 4 * 126464 * 4096 + pages
    assert memory["one block's masks"] == 17 * 2 * widest  # the new weights go to files as soon as they are there
    projections = 32 * (4 * 4096**2 + 3 * widest)
    working = memory["layers under way"] + memory["activations of one batch"] + memory["one block's masks"]
    assert memory["peak host"] == working + projections // 8 + 450_000_000 + memory["hidden states"]
    assert memory["temporary files"] == 2 * projections + 4 * 4096 * 2048 * 128 * 10 * (memory["hidden states"] == 8e9)


def test_predictions_on_an_accelerator(chosen):
    """Its copies of layers are the device's; the host has the pages of one, and buffers where copies overlap."""
    keys = {key.replace(".", "__"): value for key, value in (MASKS | GPU).items()} | {"memory__offload": "disk"}
    plain, ahead = (chosen(memory__overlap=overlap, **keys)[1] for overlap in (False, True))
    head, widest, pages = 2 * 126464 * 4096, 4096 * 12288, 2 * 2**24
    batch = 2048 * 2 * 4096  # a sequence's hidden states
    assert 1e9 * (ahead["peak host"] - plain["peak host"]) == pytest.approx(4 * 2**26)
    layers = 2 * 2 * widest + pages
    assert 1e9 * (ahead["peak device"] - plain["peak device"]) == pytest.approx(layers + 2 * batch)
    assert 1e9 * plain["peak host"] > head + 450_000_000 and plain["peak device"] < 6


def test_grams_are_freed_input_by_input(published_config):
    """Gate and up with their Gram matrix and that of `down`, which is still to be used, take more than `down` alone."""
    keys = MASKS | {"masking.score": "sparsegpt", "memory.offload": "disk", "model.device": "cpu"}
    memory = inspect_masking(published_config("llada"), Config.load(overrides=keys))["memory"]
    narrow, wide = 4096**2, 12288**2
    assert memory["one block's masks"] == 17 * 2 * 4096 * 12288 + 4 * (narrow + wide) + 6 * narrow
    assert memory["one block's masks"] > 17 * 4096 * 12288 + 10 * wide
    assert memory["statistics (sparsegpt)"] == 8 * (3 * narrow + wide) + 4 * wide  # fp64 sums, one as fp32
    assert memory["peak host"] < 8e9 + memory["hidden states"]


def test_a_calibration_that_is_given_counts_with_its_own_sizes(tiny_checkpoint, tiny_calibration):
    model = load_model(tiny_checkpoint())
    given = tiny_calibration(model, windows=3, length=24)
    structured = Pruner(model, Config.load(overrides=EQUAL), given).request
    masks = resolve_masking(Config.load(overrides=MASKS), model, calibration=given)
    for request in (structured, masks):
        text = request.calibration
        assert (text.windows, text.held_out, text.length, text.noisy_copies) == (3, 2, 24, 2)
        assert request.config.calibration.windows == 128  # what was asked for stays in the report
