"""scripts/bench_masking.py and its workers, without the release: a stand-in of its layout takes its place."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune.models.loading import load_model

QUICK = "--quick --threads 1 --rounds 2".split()


@pytest.fixture
def scripts(monkeypatch):
    """Imports a module of scripts/ by name."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return importlib.import_module


@pytest.fixture
def bench(scripts):
    return scripts("bench_masking")


@pytest.fixture
def folder(bench, tmp_path):
    """A folder with the quick benchmark's checkpoint and data."""
    options = bench.parse_arguments(QUICK)
    bench.write_checkpoint(tmp_path / "checkpoint", options)
    bench.write_data(tmp_path / "data.safetensors", options)
    return tmp_path


def make_request(scripts, folder, **changes):
    base = {"checkpoint": str(folder / "checkpoint"), "data": str(folder / "data.safetensors"), "method": "sink-wanda"}
    base |= {"ratio": 0.25, "steps": 10, "interval": 5, "threads": 1}
    return scripts("published_worker").Request(**base | changes)


def test_sides_take_turns_and_the_short_method_gets_more_rounds(bench):
    options = bench.parse_arguments(["--rounds", "1"])
    options.published = Path("release")
    sides = [("sink-wanda", side) for side in ("ours", "release", "encode")]
    assert bench.plan_rounds(options)[:3] == sides
    assert bench.plan_rounds(options)[3:9] == [("sparsegpt", "ours"), ("sparsegpt", "release")] * 3
    options.published = None
    assert bench.plan_rounds(options)[:2] == [sides[0], sides[2]]


def test_ratios_are_medians_of_each_round(bench):
    figures = {
        "ours": [{"seconds": s, "peak_bytes": b} for s, b in ((1.0, 30), (2.0, 50), (4.0, 40))],
        "release": [{"seconds": s, "peak_bytes": b} for s, b in ((3.0, 80), (3.0, 90), (4.0, 70))],
        "encode": [{"seconds": s, "peak_bytes": 1} for s in (1.0, 1.0, 5.0)],
    }
    row = bench.summarise("sink-wanda", figures)
    assert row["times_faster"] == {"median": 1.5, "low": 1.0, "high": 3.0}  # of 3, 1.5 and 1
    assert row["over_forwards"] == {"median": 1.0, "low": 0.8, "high": 2.0}
    assert row["memory_ratio"] == 40 / 80 and "encode" not in row["peak_bytes"]


def test_data_is_noised_level_after_level(folder, bench):
    data = load_file(folder / "data.safetensors")
    ids, noisy, mask_id = data["ids"], data["noisy"], bench.QUICK["vocabulary"] - 1
    assert ids.shape == (4, 64) and noisy.shape == (4, 2, 64) and not (ids == mask_id).any()
    masked = noisy == mask_id  # (N, S, T)
    assert torch.equal(noisy[~masked], ids[:, None].expand_as(noisy)[~masked])
    assert masked[:, 1].all() and 0.3 < masked[:, 0].float().mean() < 0.7  # t = 1 and 1/2


def test_wrong_requests_are_one_line(bench, tmp_path, capsys):
    wrong = {
        "--methods wandaa": "wandaa",
        "--windows 0": "--windows = 0",
        "--ratio 1": "--ratio = 1.0",
        "--width 500": "--width = 500",
        "--methods wanda --windows 129": "room for 128",
        f"--published {tmp_path}": "not a checkout",
        "--rounds two": "--rounds",
    }
    for arguments, word in wrong.items():
        assert bench.main(arguments.split()) == 2
        message = capsys.readouterr().err
        assert word in message and message.count("\n") == 1


def test_measured_counts_seconds_and_bytes_of_the_call_only(scripts):
    size, kept = 64 * 2**20, []

    def hold(value):
        kept.append(torch.full((size,), value, dtype=torch.uint8))
        kept.clear()

    figures = scripts("published_worker").measured(lambda: hold(1), torch.nn.Linear(2, 2), lambda: hold(2))
    assert figures["peak_bytes"] == pytest.approx(size, rel=0.15) and 0 < figures["seconds"] < 5
    figures = scripts("published_worker").measured(lambda: None, torch.nn.Linear(2, 2), lambda: hold(2))
    assert figures["peak_bytes"] < 2**22


def test_our_worker_prunes_what_the_request_says(scripts, folder, capsys):
    out = folder / "ours.safetensors"
    threads = torch.get_num_threads()
    scripts("masking_worker").main(make_request(scripts, folder, out=str(out)), batch=2)
    assert torch.get_num_threads() == threads == 1
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
    found = load_file(out)
    assert len(found) == 14 and found["1.ff_out"].shape == (128, 384)
    for value in found.values():
        assert torch.equal((value == 0).sum(1), torch.full((len(value),), value.shape[1] // 4))


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A stand-in of the release's modules, whose method records its inputs and zeroes first columns."""
    root = tmp_path / "release"
    seen = []

    class Model(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, directory, torch_dtype):
            assert torch_dtype is torch.float32
            self, ours = cls(), load_model(directory)
            self.model = types.SimpleNamespace(transformer=types.SimpleNamespace(blocks=ours.blocks))
            self.inner, self.config = ours, ours.config
            return self

        def forward(self, ids):
            return self.inner(ids)

    def prune_sink(args, model, tokenizer, device):
        windows, _ = published.get_loaders("text", nsamples=args.nsamples)
        steps = range(args.sample_interval, args.diffusion_steps + 1, args.sample_interval)
        noisy = [published._forward_diffusion(ids, step) for ids, _ in windows for step in steps]
        seen.append((args, torch.cat([ids for ids, _ in windows]), torch.cat(noisy), model.seqlen, tokenizer))
        print("chatter")
        for block in model.model.transformer.blocks:
            for linear in (part for part in block.modules() if isinstance(part, torch.nn.Linear)):
                linear.weight.data[:, : int(args.sparsity_ratio * linear.in_features)] = 0

    lib, published, model = (types.ModuleType(name) for name in ("lib", "lib.prune_llada", "model"))
    lib.prune_llada, published.prune_sink, model.LLaDAModelLM = published, prune_sink, Model
    for module in (lib, published, model):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("synchronize", "empty_cache"):  # replaced by the worker
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    return root, seen


def test_the_release_gets_our_windows_and_noise_in_its_order(scripts, folder, release, capsys):
    root, seen = release
    out = folder / "sink-wanda-release.safetensors"
    scripts("published_worker").main(str(root), make_request(scripts, folder, out=str(out)))
    ((args, ids, noisy, length, tokenizer),) = seen
    data = load_file(folder / "data.safetensors")
    assert torch.equal(ids, data["ids"]) and torch.equal(noisy, data["noisy"].flatten(0, 1))
    assert (length, tokenizer.mask_token_id, args.nsamples, args.sparsity_ratio) == (64, 511, 4, 0.25)
    assert (args.sink_std, args.sink_alpha) == (2.0, 5.0)
    printed = capsys.readouterr()
    assert set(json.loads(printed.out)) >= {"seconds", "peak_bytes"} and "chatter" in printed.err
    weights = load_file(out)
    assert not weights["0.q_proj"][:, :32].any() and weights["0.q_proj"][:, 32:].all()


def test_agreement_counts_masks_and_outputs(scripts, folder):
    agreement = scripts("masking_agreement")
    weights = scripts("published_worker").linear_weights(load_model(folder / "checkpoint").blocks)
    weights = {name: value.clone() for name, value in weights.items()}
    for value in weights.values():
        value[:, ::2] = 0
    total = sum(value.numel() for value in weights.values())
    save_file(weights, folder / "sink-wanda-release.safetensors")
    save_file(weights, folder / "sink-wanda-ours.safetensors")
    same = agreement.judge("sink-wanda", agreement.compare("sink-wanda", folder), None)
    assert same["agree"] and same["masks_differ"] == same["outputs_differ"] == 0 and same["error_ratio"] == 1
    weights["1.ff_out"][:3, 1] = 0
    save_file(weights, folder / "sink-wanda-ours.safetensors")
    found = agreement.compare("sink-wanda", folder)
    assert found["masks_differ"] == 3 / total and found["first_block_differs"] == 0
    assert found["removed"] == [0.5 + 3 / total, 0.5] and 0 < found["outputs_differ"] < 0.2
    assert agreement.judge("sink-wanda", found, None)["agree"] == (3 / total <= 1e-5)
    itself = {"masks_differ": 0.02, "outputs_differ": 0.1}
    wide = found | {"masks_differ": 0.06, "outputs_differ": 0.3}
    assert agreement.judge("sparsegpt", wide, itself)["agree"]
    assert not agreement.judge("sparsegpt", wide | {"masks_differ": 0.061}, itself)["agree"]
    assert not agreement.judge("sparsegpt", wide | {"first_block_differs": 2e-5}, itself)["agree"]


def test_a_run_of_ours_alone_writes_figures(bench, tmp_path, capsys):
    out = tmp_path / "made" / "speed.json"
    assert bench.main([*QUICK, "--methods", "sink-wanda", "--out", str(out)]) == 0
    assert "sink-wanda" in capsys.readouterr().out
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert found["settings"]["windows"] == 4 and found["machine"]["threads"] == 1
    assert set(row["seconds"]) == {"ours", "encode"} and len(row["seconds"]["ours"]["rounds"]) == 2
    assert row["over_forwards"]["median"] > 0 and "times_faster" not in row
    assert [path.name for path in out.parent.iterdir()] == ["speed.json"]


def test_a_failing_side_is_named_in_one_line(bench, tmp_path, capsys):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "prune_llada.py").write_text("raise ImportError('of no use')")
    assert bench.main([*QUICK, "--methods", "sink-wanda", "--published", str(tmp_path)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "sink-wanda of release failed" in message and "of no use" in message
