"""structprune bench as a user meets it: what is written and said, and one line for what cannot be measured."""

import json

import pytest
import torch

from structprune.bench.settings import BenchSettings
from structprune.checkpoint.output import write_json
from structprune.cli.main import main
from structprune.models.adapter import Adapter
from structprune.models.loading import load_model
from structprune.report import plots
from structprune.runs.bench import BenchOutput, bench
from structprune.structured.sizes import forward_macs

QUICK = ["--length", "24", "--gen-length", "8", "--steps", "4", "--rounds", "2", "--generation-rounds", "1"]


@pytest.fixture
def pair(tiny_checkpoint):
    return [str(tiny_checkpoint(name="dense")), str(tiny_checkpoint(name="small", mlp_hidden_size=24))]


def refused(arguments, capsys, out=None) -> str:
    """The one line that is said, with exit code 2 and nothing written."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    line = said.err.strip()  # where a bar was shown before, its line is left empty
    assert said.out == "" and len(line.splitlines()) == 1 and line.startswith("structprune: error: ")
    assert out is None or not out.exists()
    return line


def test_everything_is_measured_and_written(pair, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "made"
    more = ["--batch", "1,2", "--block-length", "4", "--cache", "all"]
    assert main(["bench", *pair, "--out", str(out), *QUICK, *more]) == 0
    assert {path.name for path in out.iterdir()} == {"bench.json", "latency.png", "ideal.png", "memory.png"}
    actual = json.loads((out / "bench.json").read_text())
    assert [(row["batch"], row["model"]) for row in actual["forward"]] == [
        (batch, name) for batch in (1, 2) for name in ("dense", "small")
    ]
    assert [(row["batch"], row["cache"]) for row in actual["generation"][::2]] == [
        (batch, cache) for batch in (1, 2) for cache in ("none", "prefix", "dual")
    ]
    models = [load_model(path) for path in pair]
    for row, model in zip(actual["models"], models):
        assert row["parameters"] == model.num_parameters() and row["bytes"] == 4 * row["parameters"]
        assert row["widths"][0] == {"query_heads": 4, "kv_heads": 4, "channels": model.config.mlp_hidden_size}
    # of a block's 4 x 32 x 32 + 3 x 32 x 48
    assert actual["models"][1]["removed"] == pytest.approx(3 * 32 * 24 / (4 * 32 * 32 + 3 * 32 * 48))
    assert actual["forward"][3]["macs"] == 2 * forward_macs(Adapter(models[1]), 24)
    assert actual["settings"]["sampler"]["block_length"] == 4 and actual["settings"]["device"] == "cpu"
    assert actual["machine"]["torch"] == torch.__version__ and actual["semi_structured"] is None
    said = capsys.readouterr().out
    assert "of ideal" in said and "1 x 24, dual" in said and "latency.png" in said


def test_dream_has_no_blocks(tiny_checkpoint, tmp_path, capsys):
    checkpoint, out = str(tiny_checkpoint("dream")), tmp_path / "made"
    assert "this sampler has no blocks: use prefix" in refused(
        ["bench", checkpoint, "--out", str(out), *QUICK, "--cache", "dual"], capsys, out
    )
    assert "dream's sampler has no option 'block_length'" in refused(
        ["bench", checkpoint, "--out", str(out), *QUICK, "--block-length", "4"], capsys, out
    )
    assert main(["bench", checkpoint, "--out", str(out), *QUICK, "--cache", "all", "--no-plots"]) == 0
    actual = json.loads((out / "bench.json").read_text())
    assert [row["cache"] for row in actual["generation"]] == ["none", "prefix"]
    assert [path.name for path in out.iterdir()] == ["bench.json"]


@pytest.mark.slow
def test_compiled_rows_follow_the_eager_ones(pair, tmp_path, monkeypatch):
    """Nothing is compiled within a timed call or one whose memory is watched, and MACs are those of eager ones."""
    from structprune.bench import latency, workloads

    compile, graphs, made = torch.compile, [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def watched(call, device, *rest):
        before = len(graphs)
        call()
        made.append(len(graphs) - before)
        return 1.0

    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile(*a, **(k | {"backend": backend})))
    monkeypatch.setattr(latency, "elapsed", watched)
    monkeypatch.setattr(workloads, "peak_above", watched)
    settings = BenchSettings((1,), (24,), 8, 4, 4, ("all",), compiled=True, rounds=1, generation_rounds=1)
    actual = bench(pair, settings, BenchOutput(tmp_path / "made", plots=False)).result
    assert [row["mode"] for row in actual["forward"]] == ["eager"] * 2 + ["compiled"] * 2
    assert [(row["mode"], row["cache"]) for row in actual["generation"][::2]] == [
        ("eager", "none"), ("eager", "prefix"), ("eager", "dual"), ("compiled", "none")
    ]  # fmt: skip
    for part in ("forward", "generation"):
        counts = {mode: [row["macs"] for row in actual[part] if row["mode"] == mode] for mode in ("eager", "compiled")}
        assert counts["compiled"] == counts["eager"][:2]
    assert graphs and set(made) == {0}


def test_two_of_four_without_kernels_says_so_and_goes_on(pair, tmp_path, capsys):
    out, masked = tmp_path / "made", tmp_path / "masked"
    nothing = [*pair, "--out", str(out), "--gen-length", "0", "--length", "16", "--rounds", "1", "--semi-structured"]
    assert "none of dense, small has two of every four" in refused(["bench", *nothing], capsys, out)
    made = ["prune", pair[0], "--out", str(masked), "--method", "nm", "--set", "masking.score=magnitude"]
    assert main([*made, "--set", "reconstruct.enabled=false", "--set", "calibration.held_out=0"]) == 0
    capsys.readouterr()
    assert main(["bench", pair[0], str(masked), *nothing[2:], "--no-plots"]) == 0
    actual = json.loads((out / "bench.json").read_text())
    assert actual["semi_structured"] == {
        "refused": "torch has no 2:4 kernels for device cpu", "models": {"masked": {}}
    }  # fmt: skip
    assert actual["generation"] == [] and actual["forward"][1]["ideal_share"] is None
    assert "2:4 kernels were not measured: torch has no 2:4 kernels for device cpu" in capsys.readouterr().out


def test_two_of_four_with_kernels(pair, tmp_path, monkeypatch):
    """Stand-ins for the kernels, which no CPU has."""
    from structprune.bench import semi_structured
    from structprune.runs import bench as bench_run

    checkpoint = tmp_path / "masked"
    made = ["prune", pair[0], "--out", str(checkpoint), "--method", "nm", "--set", "masking.score=magnitude"]
    assert main([*made, "--set", "reconstruct.enabled=false", "--set", "calibration.held_out=0"]) == 0
    monkeypatch.setattr(bench_run, "refusal", lambda device, dtype: None)
    monkeypatch.setattr(semi_structured, "convert", lambda weight: weight.clone())
    settings = BenchSettings((1, 2), (8, 16), 0, semi_structured=True, rounds=1, warmup=0)
    actual = bench([pair[0], str(checkpoint)], settings, BenchOutput(tmp_path / "made", plots=False)).result[
        "semi_structured"
    ]
    (label, rows), *others = actual["models"].items()
    assert (label, others) == ("masked", [])
    shapes = [(row["outputs"], row["inputs"], row["tokens"]) for row in rows["shapes"]]
    assert len(shapes) == len(set(shapes)) == 3 * 3  # three shapes at 8, 16 and 32 tokens
    assert [(row["batch"], row["length"]) for row in rows["forward"]] == [(1, 8), (1, 16), (2, 8), (2, 16)]


def test_what_cannot_be_measured_together(pair, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "made"
    other = str(tiny_checkpoint(name="other", vocab_size=2100, embedding_size=2100))
    dream = str(tiny_checkpoint("dream"))
    for checkpoints, more, message in (
        ([pair[0], other], [], f"'{other}' has a vocabulary of 2100, '{pair[0]}' of 2048"),
        ([pair[0], dream], [], f"'{dream}' is of family dream, '{pair[0]}' of llada: compare within one family"),
        (pair, ["--length", "65"], "--length 65 is beyond the 64 positions of"),
        (pair, ["--cache", "duel"], "unknown --cache 'duel' (did you mean 'dual'?)"),
        (pair, ["--cache", "none,none"], "--cache none,none names a cache twice: give each once, or all alone"),
        (pair, ["--cache", "all,dual"], "--cache all,dual names a cache twice"),
        (pair, ["--batch", "1;2"], "--batch '1;2' is not a list of whole numbers: write --batch 1,8"),
        (pair, ["--dtype", "float64"], "--dtype = 'float64'"),
        (pair, ["--device", "tpu"], "unknown device 'tpu'"),
        ([pair[0], pair[0]], [], "is given twice"),
        ([str(tmp_path / "nowhere")], [], "nowhere"),
    ):
        assert message in refused(["bench", *checkpoints, "--out", str(out), *QUICK, *more], capsys, out), message


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), MemoryError()])
@pytest.mark.parametrize("stage", ["forward_rows", "generation_rows"])
def test_what_does_not_fit_is_named(pair, tmp_path, capsys, monkeypatch, error, stage):
    from structprune.runs import bench as bench_run

    monkeypatch.setattr(bench_run, stage, lambda *args: (_ for _ in ()).throw(error))
    out = tmp_path / "made"
    said = refused(["bench", *pair, "--out", str(out), *QUICK, "--batch", "3", "--no-plots"], capsys, out)
    assert "--batch 3 at --length 24 does not fit the memory beside 2 models: lower either, or give fewer" in said
    with pytest.raises(RuntimeError, match="--length 24 does not fit"):  # which gpu_report goes on after
        bench(pair, BenchSettings((1,), (24,), 8, 4, rounds=1), BenchOutput(out, plots=False))


def test_a_checkpoint_that_does_not_fit_is_named(pair, tmp_path, capsys, monkeypatch):
    from structprune.runs import bench as bench_run

    def load(checkpoint, *rest, **options):
        if checkpoint == pair[1]:
            raise torch.OutOfMemoryError("CUDA")
        return load_model(checkpoint, *rest, **options)

    monkeypatch.setattr(bench_run, "load_model", load)
    said = refused(["bench", *pair, "--out", str(tmp_path / "made"), *QUICK, "--no-plots"], capsys, tmp_path / "made")
    assert f"'{pair[1]}' does not fit the memory beside 1 models: give fewer checkpoints, or a half-precision" in said


def test_a_compiled_cache_is_not_put_in_the_place_of_another(pair, tmp_path, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile(*a, **(k | {"backend": "eager"})))
    settings = BenchSettings((1,), (24,), 8, 4, 4, ("dual",), compiled=True, rounds=1, generation_rounds=1)
    actual = bench(pair[:1], settings, BenchOutput(tmp_path / "made", plots=False)).result
    assert [(row["mode"], row["cache"]) for row in actual["generation"]] == [("eager", "dual")]


def test_another_mask_token_is_refused_where_text_is_generated(pair, tiny_checkpoint, tmp_path, capsys):
    """Else a random prompt may hold it, which is found out only after minutes."""
    out, other = tmp_path / "made", str(tiny_checkpoint(name="other", mask_token_id=3))
    arguments = ["bench", pair[0], other, "--out", str(out), "--length", "24", "--rounds", "1", "--no-plots"]
    said = refused([*arguments, "--gen-length", "8", "--steps", "4"], capsys, out)
    assert f"'{other}' has mask token 3, '{pair[0]}' 2047: set one for all with --mask-id" in said
    assert main([*arguments, "--gen-length", "0"]) == 0


def test_an_output_is_replaced_only_when_asked_and_only_if_it_is_one(pair, tmp_path, capsys):
    out = tmp_path / "made"
    arguments = ["bench", *pair, "--out", str(out), *QUICK, "--no-plots"]
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "exists" in refused(arguments, capsys)
    assert "holds something other than an earlier output" in refused([*arguments, "--overwrite"], capsys)
    write_json(out / "bench.json", {})
    assert main([*arguments, "--overwrite"]) == 0
    assert [path.name for path in out.iterdir()] == ["bench.json"]


def test_matplotlib_is_asked_for_first(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "made"
    message = refused(["bench", *pair, "--out", str(out), *QUICK], capsys, out)
    assert "pip install 'structprune[plot]'" in message and "--no-plots" in message
    assert main(["bench", *pair, "--out", str(out), *QUICK, "--no-plots"]) == 0


def test_a_failure_leaves_nothing(pair, tmp_path, monkeypatch):
    from structprune.runs import bench as bench_run

    monkeypatch.setattr(bench_run, "write_json", lambda path, values: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        bench(pair, BenchSettings((1,), (8,), 0, rounds=1), BenchOutput(tmp_path / "made", plots=False))
    assert [path.name for path in tmp_path.iterdir() if "made" in path.name] == []
