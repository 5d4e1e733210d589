"""The dry run: exact counts of the true 8B and 7B shapes from config.json alone, and agreement with a real run."""

import io
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from structprune import Config, UserError, load_model, prune
from structprune.cli.main import main
from structprune.models import loading
from structprune.report.tables import inspect_tables
from structprune.runs.inspect import inspect_checkpoint

# LLaDA-8B: embedding and head, 32 blocks of 4 d^2 + 3 d m and two norms, the final norm
LLADA_PROJECTIONS = 4 * 4096**2 + 3 * 4096 * 12288
LLADA_TOTAL = 2 * 126464 * 4096 + 32 * (LLADA_PROJECTIONS + 2 * 4096) + 4096
# Dream-7B: q and output 3584 x 3584, k and v 512 x 3584, biases on q, k and v
DREAM_PROJECTIONS = 2 * 3584**2 + 3584 + 2 * (512 * 3584 + 512) + 3 * 3584 * 18944
DREAM_TOTAL = 2 * 152064 * 3584 + 28 * (DREAM_PROJECTIONS + 2 * 3584) + 3584


def settings(**options) -> Config:
    return Config.load(None, {f"structured.{key}": value for key, value in options.items()})


def test_llada_8b(published_config):
    assert LLADA_TOTAL == 8_015_581_184
    result = inspect_checkpoint(published_config("llada"), settings(ratio=0.5, split="equal"))
    half = LLADA_PROJECTIONS // 2  # 16 heads and 6144 channels fewer
    assert result["parameters"] == {"before": LLADA_TOTAL, "after": LLADA_TOTAL - 32 * half}
    assert result["parameters"]["after"] == 4_525_920_256
    assert result["block_parameters"] == {"before": 32 * LLADA_PROJECTIONS, "after": 32 * half}
    assert result["bytes"] == {key: 2 * count for key, count in result["parameters"].items()}
    for row in result["blocks"]:
        assert row["before"] == {"query_heads": 32, "kv_heads": 32, "channels": 12288}
        assert row["after"] == {"query_heads": 16, "kv_heads": 16, "channels": 6144}
        assert row["parameters"] == [LLADA_PROJECTIONS, half]
    length, head = 2048, 126464 * 4096
    before = length * (32 * LLADA_PROJECTIONS + head + 32 * 2 * 32 * 128 * length)
    after = length * (32 * half + head + 32 * 2 * 16 * 128 * length)
    assert (result["tokens"], result["macs"]) == (length, {"before": before, "after": after})
    assert (result["source"], result["family"], result["rounding"]) == ("LLaDA-8B", "llada", 128)


def test_llada_8b_at_0_3_is_met_within_one_rounding_step(published_config):
    """10 of 32 heads (nearest to 0.3); channels make up for them in steps of 128, here 28 steps."""
    result = inspect_checkpoint(published_config("llada"), settings(ratio=0.3, split="equal"))
    removed = 10 * 4 * 128 * 4096 + 28 * 128 * 3 * 4096
    assert result["blocks"][31]["after"] == {"query_heads": 22, "kv_heads": 22, "channels": 12288 - 28 * 128}
    assert result["parameters"]["after"] == LLADA_TOTAL - 32 * removed
    step = 128 * 3 * 4096 / LLADA_PROJECTIONS
    assert abs(removed / LLADA_PROJECTIONS - 0.3) <= step / 2
    for choice in result["choices"]:  # every number of heads on offer meets it
        assert abs(choice["ratio"] - 0.3) <= step / 2 + 1e-9 and choice["query_heads"] == 32 - choice["steps"]


def test_dream_7b(published_config):
    assert DREAM_TOTAL == 7_615_616_512
    config = settings(ratio=0.5, split=3, allocation="uniform")
    result = inspect_checkpoint(published_config("dream"), config)
    heads = 3 * 4 * 128 * (2 * 3584 + 1)  # 3 query heads of each of 4 groups: rows and biases of q, columns of output
    removed = heads + 77 * 128 * 3 * 3584
    assert removed == 116_983_296
    assert result["parameters"] == {"before": DREAM_TOTAL, "after": DREAM_TOTAL - 28 * removed}
    assert result["block_parameters"]["before"] == 28 * DREAM_PROJECTIONS
    assert result["blocks"][0]["after"] == {"query_heads": 16, "kv_heads": 4, "channels": 18944 - 77 * 128}
    assert abs(removed / DREAM_PROJECTIONS - 0.5) <= 128 * 3 * 3584 / DREAM_PROJECTIONS / 2


def test_dream_7b_by_whole_groups(published_config):
    config = settings(ratio=0.5, split=1, allocation="uniform", gqa="kv_groups")
    result = inspect_checkpoint(published_config("dream"), config)
    widths = result["blocks"][0]["after"]
    assert (widths["query_heads"], widths["kv_heads"]) == (21, 3)
    group = 7 * 128 * (2 * 3584 + 1) + 2 * 128 * (3584 + 1)
    removed = (DREAM_TOTAL - result["parameters"]["after"]) / 28
    assert (removed - group) % (128 * 3 * 3584) == 0
    assert abs(removed / DREAM_PROJECTIONS - 0.5) <= 128 * 3 * 3584 / DREAM_PROJECTIONS / 2


def decoder_total(width, heads, kv_heads, channels, depth, vocabulary, norms):
    """Parameters of a decoder without biases, heads of 128, the LM head apart; and those of a block's projections."""
    projections = 2 * width * 128 * (heads + kv_heads) + 3 * width * channels
    return depth * (projections + 2 * width + norms) + 2 * vocabulary * width + width, projections


def test_sdar_and_nemotron(published_config):
    """Half of the channels and of the KV groups of every block."""
    shapes = {
        "sdar": decoder_total(2048, 16, 8, 6144, 28, 151936, 2 * 128),
        "nemotron-labs": decoder_total(3072, 32, 8, 9216, 26, 131072, 0),
    }
    assert [total for total, _ in shapes.values()] == [2_031_739_904, 3_831_659_520]
    for family, (total, projections) in shapes.items():
        config = settings(ratio=0.5, split=4, allocation="uniform", gqa="kv_groups", round_to=32)
        result = inspect_checkpoint(published_config(family), config)
        depth, after = len(result["blocks"]), result["blocks"][0]["after"]
        assert result["parameters"]["before"] == total and after["kv_heads"] == 4
        left = decoder_total(
            *{
                "sdar": (2048, 8, 4, after["channels"], 28, 151936, 2 * 128),
                "nemotron-labs": (3072, 16, 4, after["channels"], 26, 131072, 0),
            }[family]
        )
        assert result["parameters"]["after"] == left[0]
        assert abs(left[1] / projections - 0.5) < 0.01 and result["block_parameters"]["before"] == depth * projections


def test_a2d_counts_its_tied_embedding_once(published_config):
    """A2D-Qwen3-0.6B at 0.3: one query head of both of every group, and 7 steps of 128 channels."""
    total, projections = decoder_total(1024, 16, 8, 3072, 28, 151936, 2 * 128)
    total, removed = total - 151936 * 1024, 2 * 8 * 128 * 1024 + 3 * 7 * 128 * 1024
    result = inspect_checkpoint(published_config("a2d-qwen3"), settings(ratio=0.3, split="equal"))
    assert result["parameters"] == {"before": 596_049_920, "after": 460_259_328}
    assert result["parameters"] == {"before": total, "after": total - 28 * removed}
    assert result["blocks"][27]["after"] == {"query_heads": 8, "kv_heads": 8, "channels": 2176}
    assert abs(removed / projections - 0.3) <= 128 * 3 * 1024 / projections / 2


def sparse_shard(path, shapes):
    """A safetensors file with a true header whose gigabytes of bf16 weights are a hole in the file."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


@pytest.mark.slow
def test_8b_with_shards_takes_under_a_gigabyte(published_config):
    """Headers of 16 GB are read, not the weights: peak memory of a fresh process."""
    directory = published_config("llada")
    values, config = json.loads((directory / "config.json").read_text()), loading.load_config(directory)[2]
    with torch.device("meta"):
        model = loading.detect_family(values, directory).model_class(config)
    sparse_shard(directory / "model.safetensors", {name: tuple(t.shape) for name, t in model.state_dict().items()})
    code = (
        "import sys; from structprune.cli.main import main; "
        f"code = main(['inspect', {str(directory)!r}, '--ratio', '0.5', '--json']); "
        "from structprune.bench.memory import peak_memory_bytes; "
        "print(peak_memory_bytes()['host'], code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    peak, code = done.stderr.splitlines()[-1].split()
    assert code == "0" and json.loads(done.stdout)["parameters"]["before"] == LLADA_TOTAL
    assert 1e8 < int(peak) < 1e9


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_numbers_are_those_of_a_real_run(tiny_checkpoint, text_path, family):
    directory = tiny_checkpoint(family)
    config = Config.load(None, {
        "structured.ratio": 0.4, "structured.allocation": "uniform", "structured.split": 1,
        "structured.protect_first": 1, "structured.score": "magnitude", "reconstruct.enabled": False,
        "calibration.source": str(text_path),
        "calibration.windows": 1, "calibration.held_out": 1, "calibration.length": 16, "calibration.steps": 2,
        "calibration.interval": 1,
    })  # fmt: skip
    result = inspect_checkpoint(directory, config)
    pruned = prune(load_model(directory), config)
    assert pruned.report["parameters"] == result["parameters"]
    assert result["parameters"]["after"] == sum(p.numel() for p in pruned.model.parameters())
    assert [row["after"] for row in result["blocks"]] == pruned.report["widths"]
    assert {key: pruned.report["macs"][key] for key in ("before", "after")} == result["macs"]
    assert result["blocks"][0]["before"] == result["blocks"][0]["after"] != result["blocks"][1]["after"]
    removed = sum(row["parameters"][0] - row["parameters"][1] for row in result["blocks"])
    total = sum(row["parameters"][0] for row in result["blocks"][1:])
    assert pruned.report["ratio"] == pytest.approx(removed / total) == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"structured.split": 99, "structured.allocation": "uniform"}, "structured.split = 99 does not fit"),
        ({"structured.split": 1000}, "over all blocks 0 to 9 attention steps"),
        ({"calibration.interval": 60}, "leaves no noise level"),
        ({"export.compat": "official"}, "export.compat = official is not possible"),
        ({"structured.depth_slope": 0.1}, "has no effect"),
        ({"structured.score": "taylor", "structured.arm": "clean"}, "cannot use arm"),
    ],
)
def test_what_a_run_would_refuse_is_refused(tiny_checkpoint, changes, message):
    with pytest.raises(UserError, match=message):
        inspect_checkpoint(tiny_checkpoint(), Config.load(None, {"calibration.length": 64} | changes))


@pytest.mark.parametrize("method", ["structured", "unstructured", "nm"])
def test_windows_beyond_the_positions_are_refused_by_both(
    method, tiny_checkpoint, text_path, tmp_path, capsys, monkeypatch
):
    """In one and the same line, before weights are read; as many tokens as the model has positions are fine."""
    monkeypatch.setattr(loading, "_read_shard", lambda path: pytest.fail("a weight was read"))
    directory, out = str(tiny_checkpoint()), str(tmp_path / "out")
    look, run = ["inspect", directory], ["prune", directory, "--out", out, "--calibration", str(text_path)]
    for verb in (look, run):
        assert main([*verb, "--method", method, "--set", "calibration.length=65"]) == 2
        line = "structprune: error: calibration.length = 65 exceeds the model's 64 positions: lower it"
        assert capsys.readouterr().err.splitlines() == [line]
    assert main([*look, "--method", method, "--set", "calibration.length=64"]) == 0


@pytest.mark.parametrize("method", ["structured", "nm"])
def test_a_dry_run_may_be_of_a_device_that_is_elsewhere(method, published_config, tmp_path, capsys):
    """It predicts the memory of a GPU that this machine lacks, also with offload; a run is refused there."""
    directory = str(published_config("llada"))

    def memory(*pairs) -> dict:
        sets = [f"--set={pair}" for pair in pairs]
        assert main(["inspect", directory, "--method", method, "--json", *sets]) == 0
        return json.loads(capsys.readouterr().out)["memory"]

    elsewhere = "model.device=cuda:99"
    whole, streamed = memory(elsewhere), memory(elsewhere, "memory.offload=true")
    assert "peak device" not in memory("model.device=cpu")
    assert whole["peak device"] - streamed["peak device"] > 1e10  # the weights are at home
    assert main(["prune", directory, "--out", str(tmp_path / "out"), "--method", method, "--device", "cuda:99"]) == 2
    assert "device 'cuda:99' is not on this machine" in capsys.readouterr().err
    for name, message in (("quantum", "unknown device 'quantum'"), ("meta", "device 'meta' cannot be used")):
        assert main(["inspect", directory, "--method", method, f"--set=model.device={name}"]) == 2
        assert message in capsys.readouterr().err


def test_a_number_of_heads_is_per_block_or_over_all_blocks(published_config):
    directory = published_config("llada")
    per_block = inspect_checkpoint(directory, settings(ratio=0.5, split=2, allocation="uniform"))
    assert [row["after"]["query_heads"] for row in per_block["blocks"]] == [30] * 32
    over_all = inspect_checkpoint(directory, settings(ratio=0.5, split=64))  # the same number, shown spread evenly
    assert over_all["blocks"] == per_block["blocks"]


def test_pickled_weights_are_allowed_by_name(tiny_checkpoint, capsys):
    directory = tiny_checkpoint()
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert main(["inspect", str(directory)]) == 2 and "--allow-pickle" in capsys.readouterr().err
    assert main(["inspect", str(directory), "--allow-pickle", "--set", "calibration.length=64"]) == 0


def test_no_weight_is_read(tiny_checkpoint, monkeypatch):
    directory = tiny_checkpoint("llada", torch_dtype="bfloat16")
    monkeypatch.setattr(loading, "_read_shard", lambda path: pytest.fail("a weight was read"))
    values = json.loads((directory / "config.json").read_text()) | {"torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(values))
    config = Config.load(None, {"structured.ratio": 0.3, "calibration.length": 64})
    assert inspect_checkpoint(directory, config)["stored_dtype"] == "bfloat16"  # of the headers


@pytest.mark.parametrize("key, name, itemsize", [("dtype", "float16", 2), ("torch_dtype", "torch.float32", 4)])
def test_dtype_of_a_lone_config(key, name, itemsize, published_config):
    directory = published_config("dream")
    values = json.loads((directory / "config.json").read_text())
    values.pop("torch_dtype")
    (directory / "config.json").write_text(json.dumps(values | {key: name}))
    result = inspect_checkpoint(directory, settings(ratio=0.3))
    assert result["bytes"]["before"] == itemsize * DREAM_TOTAL


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan"), 2])
def test_ratio_outside(ratio, published_config):
    with pytest.raises(UserError, match=r"lies outside \[0, 1\)"):
        inspect_checkpoint(published_config("llada"), settings(ratio=ratio))


def test_ratio_that_no_plan_meets_names_the_nearest(published_config):
    """At most 31 heads and all channels but 128 of a block can go."""
    most = (31 * 4 * 128 * 4096 + (12288 - 128) * 3 * 4096) / LLADA_PROJECTIONS
    with pytest.raises(UserError, match=f"no plan meets ratio 0.9.*: the most is {most:.4f}"):
        inspect_checkpoint(published_config("llada"), settings(ratio=0.995))


def test_broken_shards_are_refused_here_too(tiny_checkpoint):
    directory = tiny_checkpoint("llada")
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[:-4])
    with pytest.raises(UserError, match="cut short"):
        inspect_checkpoint(directory, settings(ratio=0.3))
    places = {"a": "model-00001-of-00001.safetensors"}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match="lacks model-00001-of-00001.safetensors"):
        inspect_checkpoint(directory, settings(ratio=0.3))


def test_tables_show_it(published_config):
    result = inspect_checkpoint(published_config("llada"), settings(ratio=0.5, split="equal"))
    console = Console(width=140, file=io.StringIO())
    for table in inspect_tables(result):
        console.print(table)
    text = console.file.getvalue()
    for shown in ("8.016 B", "4.526 B", "32 → 16", "12288 → 6144", "0-31"):
        assert shown in text
