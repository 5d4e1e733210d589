"""A rehearsal with one block: it changes nothing, ends early what would end late, and only where it pays."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from structprune.cli.main import main
from structprune.config import Config
from structprune.models.adapter import Adapter
from structprune.models.journal import Journal
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.runs import rehearsal
from structprune.runs.pruner import Pruner
from structprune.runs.rehearsal import few_windows, one_block
from structprune.runs.resolve import resolve_structured
from structprune.structured.plan import identity_plan
from structprune.structured.surgery import apply_plan

KEYS = {"calibration.windows": 6, "calibration.held_out": 4, "calibration.length": 16, "calibration.batch": 2}
RUNS = {
    "structured": {}, "every refit": {"reconstruct.head": True, "reconstruct.producers": True},
    "no refit": {"reconstruct.enabled": False}, "wanda": {"structured.score": "wanda"},
    "taylor": {"structured.score": "taylor"}, "masks": {"method": "unstructured"},
    "2:4": {"method": "nm", "masking.score": "wanda", "reconstruct.enabled": True},
}  # fmt: skip


@pytest.fixture
def prune(tiny_checkpoint, text_path, tmp_path):
    """`prune(keys, out)`: exit code of a run from the command line."""
    source = tiny_checkpoint("dream")

    def run(keys, out, *more):
        sets = [f"--set={key}={value}" for key, value in (KEYS | keys).items()]
        text = ["--calibration", str(text_path), "--device", "cpu"]
        return main(["prune", str(source), "--out", str(tmp_path / out), *text, *sets, *more])

    return run


@pytest.mark.parametrize("keys", RUNS.values(), ids=RUNS)
def test_a_rehearsal_changes_nothing(prune, tmp_path, keys):
    assert prune(keys, "plain") == prune(keys | {"memory.rehearsal": "true"}, "rehearsed") == 0
    plain, rehearsed = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "rehearsed"))
    assert plain.keys() == rehearsed.keys() and all(torch.equal(plain[key], rehearsed[key]) for key in plain)
    plain, rehearsed = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("plain", "rehearsed"))
    assert rehearsed["seconds"].pop("rehearsal") > 0 and plain["seconds"].keys() == rehearsed["seconds"].keys()
    assert plain["sinks"] == rehearsed["sinks"] and plain["held_out_nelbo"] == rehearsed["held_out_nelbo"]


def test_what_a_block_ends_with_ends_the_run_before_the_first_pass(prune, tmp_path, monkeypatch, capsys):
    layers = []
    encode = DiffusionLM.encode
    monkeypatch.setattr(
        DiffusionLM, "encode", lambda self, *given: layers.append(len(self.blocks)) or encode(self, *given)
    )

    def overflow(*_):
        raise rehearsal.UserError("block 0: the sums of its refit overflow: use model.dtype = float32")

    monkeypatch.setattr("structprune.refit.reconstruct.Reconstructor.refit", overflow)
    assert prune({"memory.rehearsal": "true"}, "out") == 2
    message = "in a rehearsal with one block, block 0: the sums of its refit overflow: use model.dtype = float32"
    assert message in capsys.readouterr().err
    assert set(layers) <= {1} and [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_small_models_and_what_was_rehearsed_need_none(prune, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(rehearsal, "_one_block", lambda run, request: calls.append(type(run).__name__))
    assert prune({}, "out") == 0 and not calls
    monkeypatch.setattr(rehearsal, "WORTH", 1000)
    assert prune({}, "two") == 0 and calls == ["Pruner"]
    assert prune({"memory.rehearsal": "false"}, "three") == 0 and calls == ["Pruner"]
    work = ("--work", str(tmp_path / "work"))
    assert prune({}, "four", *work) == 0 and len(calls) == 2
    assert prune({}, "five", *work) == 0 and len(calls) == 2
    assert prune({"calibration.batch": 3}, "six", *work) == 0 and len(calls) == 3  # other settings, on the same parts
    assert prune({"reconstruct.enabled": "false"}, "seven", *work) == 0 and len(calls) == 4
    assert prune({"memory.rehearsal": "true"}, "eight", *work) == 0 and len(calls) == 5  # as asked


def test_a_rehearsal_alone_is_no_finished_part(prune, tmp_path, monkeypatch):
    """A run that fails after it leaves nothing behind."""
    monkeypatch.setattr("structprune.runs.pruner.Pruner.prune_each", None)
    assert prune({"memory.rehearsal": "true"}, "out") == 1
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_run_that_reads_nothing_rehearses_nothing(tiny_checkpoint, tmp_path, capsys):
    none = {"calibration.held_out": 0, "reconstruct.enabled": "false", "memory.rehearsal": "true"}
    keys = {"method": "unstructured", "masking.score": "magnitude"} | none
    sets = [f"--set={key}={value}" for key, value in keys.items()]
    assert main(["prune", str(tiny_checkpoint()), "--out", str(tmp_path / "out"), "--device", "cpu", *sets]) == 2
    assert "memory.rehearsal = True has no effect" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_block_has_both_halves_and_shares_its_tensors(tiny_model):
    model = tiny_model("llada")
    block = one_block(model)
    assert len(block.blocks) == 1 and Adapter(block).blocks[0].kinds == ("attention", "channels")
    shared = {value.data_ptr() for value in model.parameters()}
    assert all(value.data_ptr() in shared for value in block.parameters())


def test_few_rows_do_not_refuse_a_small_damping(prune):
    few = {"calibration.batch": 1, "calibration.windows": 40, "structured.damping": 1e-8, "memory.rehearsal": "true"}
    assert prune(few, "out") == 0


def cpu_is_full(*_):
    torch.empty(10**14)


def gpu_is_full(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("full", [cpu_is_full, gpu_is_full])
def test_a_full_memory_is_named(prune, monkeypatch, capsys, full):
    monkeypatch.setattr(rehearsal, "rank_units", full)
    assert prune({"memory.rehearsal": "true"}, "out") == 2
    remedy = "lower calibration.batch or memory.budget_gb, or set memory.offload = disk"
    assert f"in a rehearsal with one block the memory of cpu is full: {remedy}" in capsys.readouterr().err


def test_other_errors_of_torch_are_no_lack_of_memory(prune, monkeypatch, capsys):
    monkeypatch.setattr(rehearsal, "rank_units", lambda *_: torch.ones(2) @ torch.ones(3))
    assert prune({"memory.rehearsal": "true"}, "out") == 1
    assert "memory" not in capsys.readouterr().err


def test_a_model_without_a_whole_block_needs_none(tiny_model, monkeypatch):
    model = tiny_model("llada")
    plan = identity_plan(Adapter(model))
    heads, channels = replace(plan.blocks[0], channels=()), replace(plan.blocks[1], query_heads=(), kv_heads=())
    halves = apply_plan(model, replace(plan, blocks=(heads, channels, heads)))
    request = resolve_structured(Config.load(overrides={"memory.rehearsal": True}), model)
    calls: list = []
    monkeypatch.setattr(rehearsal, "_one_block", lambda run, request: calls.append(run.model))
    for each in (halves, model):
        run = SimpleNamespace(
            model=each, adapter=Adapter(each), track=lambda items, title: items, timed=lambda name, work: work()
        )
        rehearsal.rehearse(run, request, Journal())
    assert calls == [model]


def test_windows_are_those_of_a_pass(prune, tiny_checkpoint, text_path):
    config = Config.load(overrides=KEYS | {"calibration.source": str(text_path)})
    pruner = Pruner(load_model(tiny_checkpoint("llada")), config)
    whole, few = pruner.calibration, few_windows(pruner.calibration, 2)
    assert (few.windows, few.held_out) == (4, 2)
    assert torch.equal(few.input_ids, whole.input_ids[[0, 1, 6, 7]])
    assert (few_windows(whole, 9).windows, few_windows(whole, 9).held_out) == (10, 4)


def test_a_refit_is_rehearsed_with_one_damping(prune, monkeypatch):
    dampings = []

    class Noted(rehearsal.Reconstructor):
        def __init__(self, scan, settings):
            dampings.append(settings.damping)
            super().__init__(scan, settings)

    monkeypatch.setattr(rehearsal, "Reconstructor", Noted)
    assert prune({"memory.rehearsal": "true", "reconstruct.damping": "[0.01, 0.3, 0.1]"}, "out") == 0
    assert dampings == [(0.3,)]
