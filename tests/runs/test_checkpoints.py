"""From a checkpoint to an output directory without a console: what is checked, in which order, and what comes back."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from structprune import Config, UserError, load_model
from structprune.models import loading
from structprune.runs import checkpoints, load, rooms
from structprune.runs.checkpoints import mask_checkpoint, prune_at_ratios, prune_checkpoint
from structprune.runs.work import WRITTEN, Work
from structprune.workers import Workers

SMALL = {
    "calibration.windows": 3, "calibration.held_out": 2, "calibration.length": 16, "calibration.interval": 25,
}  # fmt: skip
STRUCTURED = SMALL | {"structured.ratio": 0.4, "structured.split": 3, "structured.score": "magnitude"}
MASKS = SMALL | {"method": "unstructured", "masking.score": "wanda", "reconstruct.enabled": False}
WAYS = {"prune": (prune_checkpoint, STRUCTURED), "mask": (mask_checkpoint, MASKS)}


@pytest.fixture(params=WAYS)
def way(request, text_path):
    """Name, function, and `config(**changes)` of either way."""
    function, keys = WAYS[request.param]

    def config(**changes) -> Config:
        more = {key.replace("__", "."): value for key, value in changes.items()}
        return Config.load(None, keys | {"calibration.source": str(text_path)} | more)

    return request.param, function, config


@pytest.fixture
def no_weights(monkeypatch):
    """A test that fails where a weight is read."""
    monkeypatch.setattr(loading, "_read_shard", lambda path: pytest.fail("weights were read"))


def test_room_is_asked_for_the_output_before_and_after_loading(way, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    _, function, config = way
    checkpoint, out, sizes = tiny_checkpoint(), tmp_path / "out", []
    monkeypatch.setattr(
        rooms, "check_rooms", lambda asked: sizes.extend(room.needed for room in asked if room.path == out)
    )
    written = function(str(checkpoint), out, config())
    size = sum(path.stat().st_size for path in out.glob("*.safetensors") if "calibration" not in path.name)
    assert sizes[0] == sizes[1] == pytest.approx(size, rel=0.05) and len(sizes) == 2
    assert written.source_bytes == 4 * load_model(checkpoint).num_parameters()
    assert load_model(out).num_parameters() == written.result.model.num_parameters()
    assert capsys.readouterr() == ("", "")  # what is shown is up to the caller


def test_a_full_disk_is_known_before_weights_are_read(way, tiny_checkpoint, tmp_path, monkeypatch, no_weights):
    _, function, config = way
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(UserError, match=r"output '.*out' needs 0.00 GB, but 0.00 GB are free there"):
        function(str(tiny_checkpoint()), tmp_path / "out", config())
    assert not (tmp_path / "out").exists()


def test_a_disk_that_a_download_fills_is_known_before_the_long_work(way, tiny_checkpoint, tmp_path, monkeypatch):
    name, function, config = way
    real, load_model = shutil.disk_usage, load.load_model

    def loaded(*arguments, **options):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        return load_model(*arguments, **options)

    monkeypatch.setattr(load, "load_model", loaded)
    for work in ("Pruner", "MaskRun"):
        monkeypatch.setattr(checkpoints, work, lambda *_, **__: pytest.fail("the long work began"))
    assert real(tmp_path).free > 1e6
    with pytest.raises(UserError, match="are free there: free some space, or choose another place"):
        function(str(tiny_checkpoint()), tmp_path / "out", config())
    assert not (tmp_path / "out").exists()


def test_configuration_and_headers_come_before_the_output(way, tiny_checkpoint, tmp_path, no_weights):
    """A request that no place can meet is refused as such, whatever stands at the output."""
    _, function, config = way
    checkpoint, out = tiny_checkpoint(), tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("{}")
    with pytest.raises(UserError, match="exists: choose another, or add --overwrite"):
        function(str(checkpoint), out, config())
    with pytest.raises(UserError, match="sink.kappa = 1.0 has no effect"):
        function(str(checkpoint), out, config(sink__kappa=1.0))
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="cut short"):
        function(str(checkpoint), out, config())
    assert [path.name for path in out.iterdir()] == ["report.json"]


@pytest.mark.parametrize("stays", [True, False])
def test_a_run_killed_after_its_last_output_ends(tiny_checkpoint, text_path, tmp_path, stays):
    """Only as the run that it was: parts of another one are refused, and stay."""
    config = Config.load(overrides=STRUCTURED | {"calibration.source": str(text_path)})
    work, outputs = Work(tmp_path / "parts", stays=stays), {0.3: tmp_path / "a", 0.4: tmp_path / "b"}
    run = prune_at_ratios(str(tiny_checkpoint()), outputs, config, work=work)
    next(run), next(run)
    run.close()
    parts = sorted((tmp_path / "parts").rglob("*.safetensors"))
    assert len(list((tmp_path / "parts" / WRITTEN).iterdir())) == 2
    other = str(tiny_checkpoint(name="other", seed=1))
    with pytest.raises(UserError, match="has parts of a run with another checkpoint"):
        list(prune_at_ratios(other, outputs, config, work=work))
    assert sorted((tmp_path / "parts").rglob("*.safetensors")) == parts
    assert list(prune_at_ratios(str(tiny_checkpoint()), outputs, config, work=work)) == []
    left = [path for path in parts if path.parent.name != WRITTEN] if stays else []
    assert sorted((tmp_path / "parts").rglob("*.safetensors")) == left and (tmp_path / "parts").exists() == stays


@pytest.mark.parametrize("named, device", [(None, "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu")])
def test_every_process_has_an_accelerator_of_its_own(monkeypatch, named, device):
    config = Config.load(overrides={"model.device": named} if named else {})
    request = SimpleNamespace(config=config, resources=SimpleNamespace(device=torch.device(named or "cuda")))
    monkeypatch.setattr(Workers, "in_turn", lambda self, work: work())
    monkeypatch.setattr(checkpoints, "replace", lambda one, **changes: SimpleNamespace(**(vars(one) | changes)))
    placed = checkpoints._together(Workers(1, 2, "cuda:1"), lambda: request)
    assert str(placed.resources.device) == device


def test_one_accelerator_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setattr(Workers, "in_turn", lambda self, work: work())
    request = SimpleNamespace(config=Config.load(overrides={"model.device": "cuda:0"}))
    with pytest.raises(UserError, match="2 processes cannot share device 'cuda:0': leave it out, or give cuda"):
        checkpoints._together(Workers(1, 2, "cuda:1"), lambda: request)
