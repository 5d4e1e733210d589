"""scripts/gpu/gpu_report.py, all stages at a tiny size on the CPU."""

import json
import sys
from pathlib import Path

import pytest
import torch

from structprune.errors import UserError

pytestmark = pytest.mark.slow

TINY = ["--shape", "tiny", "--device", "cpu"]
SMALL = [*TINY, "--windows", "3", "--held-out", "2"]


@pytest.fixture(scope="module")
def script(scripts):
    return scripts("gpu_report")


@pytest.fixture(scope="module")
def ran(script, tmp_path_factory) -> Path:
    """Folder of the results of all stages, run in two calls."""
    folder = tmp_path_factory.mktemp("gpu")
    places = ["--work", str(folder / "work"), "--out", str(folder / "out")]
    assert script.main([*SMALL, *places, "--stages", "make,prune,forward"]) == 0
    rest = ["--generation-lengths", "32,48", "--stages", "generation,nm,widths,mass,sparsegpt,overlap"]
    assert script.main([*SMALL, *places, *rest]) == 0  # goes on
    return folder / "out"


def results(folder: Path) -> dict:
    return {path.stem.split("_")[-1]: json.loads(path.read_text()) for path in folder.iterdir()}


def test_every_stage_writes_its_file(script, ran):
    result = results(ran)
    assert set(result) == set(script.STAGES)
    assert all(each["weights"] == "random" and each["machine"]["transformers"] for each in result.values())
    sizes = [(row["batch"], row["length"]) for row in result["forward"]["forward"][::3]]
    assert sizes == [(1, 32), (1, 64), (2, 32), (2, 64)] and result["forward"]["generation"] == []
    assert {(row["batch"], row["length"], row["cache"]) for row in result["generation"]["generation"]} == {
        (batch, length, cache) for batch in (1, 2) for length in (32, 48) for cache in ("none", "prefix", "dual")
    }  # one block of 8
    assert result["nm"]["semi_structured"]["refused"] == "torch has no 2:4 kernels for device cpu"
    assert "costs" in result["widths"] and result["make"]["bytes"] > 0
    assert (
        result["overlap"]["refused"] == "memory.overlap is for accelerators, not for cpu"
        and result["overlap"]["runs"] == []
    )
    check_pruning(result["prune"])
    check_mass(result["mass"])
    check_sparsegpt(result["sparsegpt"])


def test_compile_is_for_generations_too(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["scripts.gpu.gpu_stages"], "_bench", lambda options, settings, track: settings)
    places = ["--work", str(tmp_path), "--stages", "make,prune,generation", "--generation-rounds", "7"]
    for flags, compiled in (([], False), (["--compile"], True)):
        settings = script.STAGES["generation"](script.parse_arguments([*SMALL, *places, *flags]), None)
        assert (settings.compiled, settings.generation_rounds, settings.lengths) == (compiled, 7, (32,))


def test_the_readmes_tables_come_from_them(scripts, ran, tmp_path):
    module, result = scripts("readme_gpu"), results(ran)
    text = module.gpu(ran)
    row = next(row for row in result["forward"]["forward"] if (row["batch"], row["length"]) == (2, 64))
    assert f"| forward, 2 x 64 | dense | {row['ms']['median']:.1f} ms | {row['tokens_per_second']:.1f} |" in text
    assert "| generation, prefix cache, 1 x 32 | pruned-0.5 |" in text and "| dense | 0.000 B | 0.00 GB |" in text
    for run in result["prune"]["runs"]:
        share = f"{run['forward_share']:.0%}"
        times = f"{run['whole_seconds']:.1f} s | {run['seconds']:.1f} s | {share} | - | 8.0 GB |"
        assert f"| {run['asked']} | {run['ratio']:.3f} | {times}" in text
    assert "Calibration: 3 windows of 16 tokens at 2 levels, 1.8e-05 of the published volume." in text
    assert f"2 of 2 blocks, in one run: ours is {result['sparsegpt']['times_faster']:.2f}x faster" in text
    added = result["mass"]["rows"][0]["on_top_of_a_block"]
    assert f"{added['tiled']['median']:+.0%} | {added['flex']['median']:+.0%} |" in text
    assert "`memory.overlap`: not compared, it is for accelerators, not for cpu." in text
    assert "2:4: torch has no 2:4 kernels for device cpu." in text and "| 128 | +0.0% |" in text
    assert "Not measured yet" not in text and "owed" not in text and "transformers " in text
    assert module.gpu(tmp_path) == module.OWED
    (tmp_path / "gpu_tiny_mass.json").write_text(json.dumps(result["mass"]))
    part = module.gpu(tmp_path)
    assert (
        "Not measured yet: forward, generation, prune, sparsegpt, overlap, nm, widths." in part
        and "forward, 1 x" not in part
    )


def check_pruning(result: dict) -> None:
    """Both ratios from one scoring, at the volume given, with the bytes of the weights counted by hand."""
    size, (first, second) = result["calibration"], result["runs"]
    assert (first["asked"], second["asked"]) == (0.3, 0.5)
    assert "scores" in first["phases"] and "scores" not in second["phases"]
    assert first["whole_seconds"] == first["seconds"]
    assert second["whole_seconds"] == pytest.approx(second["seconds"] + first["phases"]["scores"])
    assert size["took_seconds"] == pytest.approx(first["seconds"] + second["seconds"])
    assert (size["windows"], size["held_out"], size["window"], size["levels"], size["tokens"]) == (3, 2, 16, 2, 96)
    assert size["share_of_published"] == 96 / (128 * 4096 * 10) and size["extrapolated_full_seconds"] is None
    bytes_ = 4 * (2 * 256 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64)  # two blocks, embedding, head, norms
    for row, left in ((first, 0.7), (second, 0.5)):
        memory = row["memory"]
        assert memory["weights_bytes"]["dense"] == bytes_ and memory["wanted_above_weights"] == 8e9
        assert memory["weights_bytes"]["pruned"] == pytest.approx(left * 4 * 2 * (4 * 64 * 64 + 3 * 64 * 128), rel=0.06)
        assert memory["device_peak_bytes"] is None and memory["host_peak_bytes"] > bytes_
        assert 0 < row["forward_share"] < 1


def check_mass(result: dict) -> None:
    rows = result["rows"]
    assert [(row["batch"], row["length"]) for row in rows] == [(1, 32), (1, 64), (2, 32), (2, 64)]
    assert (result["heads"], result["kv_heads"], result["head_dim"], result["wanted_on_top"]) == (4, 4, 16, 0.1)
    for row in rows:
        times, added = row["median_ms"], row["on_top_of_a_block"]
        assert row["largest_difference"] < 1e-3 and min(times.values()) > 0
        extra = times["attention and mass, flex"] - times["attention"]
        assert added["flex"]["median"] == pytest.approx(extra / times["block"])
        low, high = added["tiled"]["p25"], added["tiled"]["p75"]
        half = (high - low) / 2 + 1e-9  # of two rounds, whose ratios lie beyond their quartiles by that
        assert low - half <= times["block with mass"] / times["block"] - 1 <= high + half


def check_sparsegpt(result: dict) -> None:
    assert (result["blocks"], result["of_blocks"], result["arm"], result["wanted"]) == (2, 2, "masked", 3.0)
    seconds = result["seconds"]
    assert result["times_faster"] == seconds["plain"] / seconds["ours"]
    assert set(result["phases"]["plain"]) == {"statistics", "factorisation", "columns", "moving on"}
    assert sum(result["phases"]["plain"].values()) <= seconds["plain"]
    assert result["agreement"]["masks_of_first_block"] > 0.999 and result["agreement"]["weights_of_first_block"] < 1e-3
    assert result["agreement"]["masks"] > 0.99 and result["calibration"]["held_out"] == 0


def test_a_pilot_chooses_the_volume(script, tmp_path, capsys):
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert script.main([*TINY, *places, "--stages", "make,prune,sparsegpt", "--blocks", "1"]) == 0
    result = results(tmp_path / "out")
    for stage, blocks, held_out in (("prune", 2, 1), ("sparsegpt", 1, 0)):
        size = result[stage]["calibration"]
        cost, copies = size["cost"], (size["windows"] + held_out) * size["levels"]
        assert size["chosen"] == "by a pilot" and 1 <= size["windows"] <= 128 and size["pilot_seconds"] > 0
        estimate = cost["start"] + blocks * (cost["block"] + copies * cost["copy"])
        assert size["estimate_seconds"] == pytest.approx(estimate)
        missing = 128 * 10 * 4096 / 16 - size["windows"] * size["levels"]
        full = size["took_seconds"] + blocks * missing * cost["copy"]
        assert size["extrapolated_full_seconds"] == pytest.approx(full)
    assert result["sparsegpt"]["blocks"] == 1 and "1 of 2 blocks" in capsys.readouterr().out


def test_costs_by_hand(scripts):
    """3 s for all, 2 s a block and 0.5 s a copy in a block: 4 copies are 7, 11 and (8 copies) 15 s."""
    module = scripts("gpu_volume")
    cost = module.Cost.of(7.0, 11.0, 15.0, copies=4, more=4)
    assert (cost.start, cost.block, cost.copy) == (3.0, 2.0, 0.5)
    assert cost.seconds(32, 10) == 3 + 32 * (2 + 5)
    assert cost.copies(32, 3 + 32 * (2 + 5)) == 10 and cost.copies(32, 226.9) == 9 and cost.copies(32, 60) == 0
    noisy = module.Cost.of(7.0, 6.0, 5.0, copies=4, more=4)  # two blocks were faster: nothing turns negative
    assert noisy.copy == 6 / 160 and noisy.block == 0 and noisy.start == pytest.approx(7 - 0.15)


def test_volumes_by_hand(scripts):
    share_out = scripts("gpu_volume").share_out
    assert share_out(40, 10, held_out=1, most=128) == (3, 10)
    assert share_out(5000, 10, held_out=1, most=128) == (128, 10) and share_out(5000, 10, 0, 5) == (5, 10)
    assert share_out(19, 10, held_out=1, most=128) == (2, 5)  # not two windows at ten levels
    assert share_out(7, 10, held_out=2, most=128) == (1, 2)
    assert share_out(0, 10, held_out=1, most=128) == (1, 1) and share_out(3, 4, 0, 9) == (1, 2)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_first_blocks_are_the_models_own(scripts, tiny_model, family):
    model = tiny_model(family)
    small = scripts("gpu_volume").first_blocks(model, 1)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        x = model.blocks[0](model.embedding(ids), model.rotary(6, ids.device))
        assert len(small.blocks) == 1 and len(model.blocks) > 1
        assert torch.equal(small(ids).logits, model.output_head(model.final_norm(x)))
    assert small.embedding.weight.data_ptr() == model.embedding.weight.data_ptr()


def test_no_stage_starts_too_late(script, tmp_path, capsys):
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert script.main([*TINY, *places, "--seconds", "0"]) == 0
    assert "run --stages mass separately" in capsys.readouterr().out and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("error", [RuntimeError("no memory"), UserError("no memory"), OSError("no memory")])
def test_a_stage_that_fails_stops_no_other(script, tmp_path, capsys, monkeypatch, error):
    def fail(options, track):
        raise error

    monkeypatch.setitem(script.STAGES, "make", fail)
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert script.main([*TINY, *places, "--stages", "make,prune,widths"]) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu_tiny_widths.json"]
    said = capsys.readouterr().err
    assert "no memory" in said and "make failed (see above)" in said and "prune failed (see above)" in said
    assert ("gpu_report: make: no memory" in said) == isinstance(error, UserError)


def test_readme_says_how_many_layers_ran_on_the_kernels(scripts):
    times = {"dense_ms": {"median": 3.0}, "2:4_ms": {"median": 2.0}, "speedup": {"median": 1.5}}
    row = {"batch": 1, "length": 512, "layers": 220, "of_layers": 224, **times}
    sparse = {"refused": None, "models": {"2of4": {"shapes": [], "forward": [row]}}}
    text = scripts("readme_gpu")._nm({"semi_structured": sparse})
    assert "| 1 x 512 | whole pass, 220 of 224 layers on the kernels | 3.00 ms | 2.00 ms | 1.50x |" in text


def test_a_package_to_carry_is_asked_for_before_any_stage(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert script.main([*TINY, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]) == 2
    assert "package 'torch-pruning' is missing" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stages", "forwards"], "unknown stage 'forwards' (did you mean 'forward'?)"),
        (["--stages", "forward"], "does not exist: run --stages make,prune first"),
        (["--stages", "make,sparsegpt,generation"], "pruned-0.3' does not exist"),
        (["--lengths", "512;64"], "--lengths '512;64' is not a list of numbers"),
        (["--lengths", "256"], "--lengths 256 is beyond the 128 positions of tiny"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--windows", "few"], "--windows 'few' is not a number from 1: give one, or auto"),
        (["--windows", "0"], "--windows '0' is not a number from 1"),
        (["--split", "even"], "structured.split = 'even'"),
        (["--levels", "51"], "--levels 51: give 1 to 50"),
        (["--blocks", "-1"], "--blocks = -1: give at least 0"),
        (["--gen-length", "32"], "--generation-lengths 32 leaves no prompt before --gen-length 32"),
        (["--generation-lengths", "256"], "--generation-lengths 256 is beyond the 128 positions of tiny"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--shape"], "argument --shape: expected one argument (see --help)"),
    ],
)
def test_what_cannot_be_run(script, tmp_path, capsys, more, message):
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert script.main([*TINY, *places, *more]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
