"""scripts/bench/bench_masking.py and its workers, without the release: a stand-in of its layout takes its place."""

import hashlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from structprune.models.loading import load_model

pytestmark = pytest.mark.slow

QUICK = ["--quick", "--threads", "1", "--rounds", "2"]


@pytest.fixture
def bench(scripts):
    return scripts("bench_masking")


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
        "encode": [{"seconds": s, "forwards": f} for s, f in ((1.1, 1.0), (2.6, 2.0), (4.8, 4.0))],
    }
    row = bench.summarise("sink-wanda", figures)
    assert row["times_faster"] == {"median": 1.5, "low": 1.0, "high": 3.0}  # of 3, 1.5 and 1
    assert row["over_forwards"] == {"median": 1.2, "low": 1.1, "high": 1.3}  # of one process each, not of "ours"
    assert row["seconds"]["encode"]["rounds"] == [1.0, 2.0, 4.0]
    assert row["memory_ratio"] == 40 / 80 and "encode" not in row["peak_bytes"]
    figures["release"][1]["peak_bytes"] = None
    row = bench.summarise("sink-wanda", figures)
    assert set(row["peak_bytes"]) == {"ours"} and "memory_ratio" not in row and row["times_faster"]["median"] == 1.5


def test_data_is_noised_level_after_level(mask_dir, bench):
    data = load_file(mask_dir / "data.safetensors")
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
        "--methods wanda --windows 129": "holds at most 128",
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

    figures = scripts("published_worker").measure(lambda: hold(1), torch.nn.Linear(2, 2), lambda: hold(2))
    assert figures["peak_bytes"] == pytest.approx(size, rel=0.15) and 0 < figures["seconds"] < 5
    figures = scripts("published_worker").measure(lambda: None, torch.nn.Linear(2, 2), lambda: hold(2))
    assert figures["peak_bytes"] < 2**22


def test_no_bytes_where_the_peak_cannot_be_reset(scripts, bench, mask_dir, monkeypatch, capsys):
    """Else the peak of the warm-up would be given as that of the call."""
    write = Path.write_text

    def refuse(path, *arguments, **options):
        if path.name == "clear_refs":
            raise PermissionError(path)
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", refuse)
    figures = scripts("published_worker").measure(lambda: None, torch.nn.Linear(2, 2), lambda: None)
    assert figures["peak_bytes"] is None and figures["seconds"] > 0
    monkeypatch.setattr(bench, "run_worker", lambda *arguments: figures | {"forwards": 1.0})
    assert bench.main([*QUICK, "--methods", "sparsegpt"]) == 0
    assert "cannot be reset" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 3])
def test_bare_passes_are_made_one_for_every_copy_between_our_own(
    scripts, mask_dir, monkeypatch, batch, masking_request
):
    worker, seen, clock = scripts("masking_worker"), [], iter(range(1000))
    original = worker.bare_pass
    ids = load_file(mask_dir / "data.safetensors")["noisy"].flatten(0, 1)  # (N*S, T)
    monkeypatch.setattr(worker, "bare_pass", lambda adapter, part: (seen.append(part), original(adapter, part)))
    monkeypatch.setattr(worker.time, "perf_counter", lambda: next(clock))
    model, calibration = load_model(mask_dir / "checkpoint"), worker.read_data(mask_dir / "data.safetensors")
    figures = worker.measure_passes(model, masking_request(), calibration, batch, lambda: None)
    assert [len(part) for part in seen] == ([1] * 8 if batch == 1 else [3, 3, 2]) and torch.equal(torch.cat(seen), ids)
    assert figures["forwards"] == len(seen) and figures["seconds"] > 0  # one tick of the clock each
    plain = load_model(mask_dir / "checkpoint")
    worker.call_ours(plain, masking_request(), calibration, batch)()
    for ours, other in zip(model.parameters(), plain.parameters()):
        assert torch.equal(ours, other)
    monkeypatch.setattr(worker, "call_ours", lambda *arguments: lambda: None)
    with pytest.raises(RuntimeError, match="0 bare passes"):
        worker.measure_passes(model, masking_request(), calibration, batch, lambda: None)


def test_a_bare_pass_ends_at_the_last_linear(scripts, mask_dir):
    worker, ran = scripts("masking_worker"), []
    model, calibration = load_model(mask_dir / "checkpoint"), worker.read_data(mask_dir / "data.safetensors")
    names = [f"{index}.{role}" for index in (0, 1) for role in ("query", "attention_output", "gate", "down")]
    for name in names:
        index, role = name.split(".")
        model.blocks[int(index)].part(role).register_forward_hook(lambda *_, name=name: ran.append(name))
    worker.bare_pass(worker.Adapter(model), calibration.noisy_ids[0])
    assert ran == names[:-1]


def test_the_release_is_named(bench, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "prune_llada.py").write_bytes(b"code")
    digest = hashlib.sha256(b"code").hexdigest()
    options = bench.parse_arguments(["--published", str(tmp_path)])
    assert bench.identify(options) == {"release_commit": None, "release_sha256": digest}
    named = bench.parse_arguments(["--published", str(tmp_path), "--release-commit", "abc"])
    assert bench.identify(named) == {"release_commit": "abc", "release_sha256": digest}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert bench.identify(options)["release_commit"] is None  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert len(head) == 40 and bench.identify(options)["release_commit"] == head


def test_our_worker_prunes_what_the_request_says(scripts, mask_dir, capsys, masking_request):
    out = mask_dir / "ours.safetensors"
    threads = torch.get_num_threads()
    scripts("masking_worker").main(masking_request(out=str(out)), batch=2)
    assert torch.get_num_threads() == threads == 1
    assert json.loads(capsys.readouterr().out)["seconds"] > 0
    result = load_file(out)
    assert len(result) == 14 and result["1.ff_out"].shape == (128, 384)
    for value in result.values():
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


def test_the_release_gets_our_windows_and_noise_in_its_order(scripts, mask_dir, release, capsys, masking_request):
    root, seen = release
    out = mask_dir / "sink-wanda-release.safetensors"
    scripts("published_worker").main(str(root), masking_request(out=str(out)))
    ((args, ids, noisy, length, tokenizer),) = seen
    data = load_file(mask_dir / "data.safetensors")
    assert torch.equal(ids, data["ids"]) and torch.equal(noisy, data["noisy"].flatten(0, 1))
    assert (length, tokenizer.mask_token_id, args.nsamples, args.sparsity_ratio) == (64, 511, 4, 0.25)
    assert (args.sink_std, args.sink_alpha) == (2.0, 5.0)
    printed = capsys.readouterr()
    assert set(json.loads(printed.out)) >= {"seconds", "peak_bytes"} and "chatter" in printed.err
    weights = load_file(out)
    assert not weights["0.q_proj"][:, :32].any() and weights["0.q_proj"][:, 32:].all()


def test_a_run_of_ours_alone_writes_figures(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.QUICK, "rounds", 1)
    out = tmp_path / "made" / "speed.json"
    assert bench.main([*QUICK, "--methods", "sink-wanda", "--out", str(out)]) == 0
    assert "sink-wanda" in capsys.readouterr().out
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert result["settings"]["windows"] == 4 and result["machine"]["threads"] == 1
    assert set(row["seconds"]) == {"ours", "encode"} and len(row["seconds"]["ours"]["rounds"]) == 1
    assert row["over_forwards"]["median"] > 0 and not {"times_faster", "agreement"} & row.keys()
    assert "release_commit" not in result["settings"]
    assert [path.name for path in out.parent.iterdir()] == ["speed.json"]


def test_a_failing_side_is_named_in_one_line(bench, tmp_path, capsys):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "prune_llada.py").write_text("raise ImportError('of no use')")
    assert bench.main([*QUICK, "--methods", "sink-wanda", "--published", str(tmp_path)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "sink-wanda of release failed" in message and "of no use" in message
