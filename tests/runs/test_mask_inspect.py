"""The dry run of masks at the true shapes, from config.json alone: counts, predicted memory, tables."""

import json

import pytest
import torch

from structprune.cli.main import main

LLADA_BLOCK, DREAM_BLOCK = 4 * 4096**2 + 3 * 4096 * 12288, 2 * 3584**2 + 2 * 512 * 3584 + 3 * 3584 * 18944
SHAPES = {  # parameters, weights of the projections, inputs of a block's four readers
    "llada": (8_015_581_184, 32 * LLADA_BLOCK, (4096, 4096, 4096, 12288)),
    "dream": (7_615_616_512, 28 * DREAM_BLOCK, (3584, 3584, 3584, 18944)),
}
NO_TEXT = [
    f"--set={pair}" for pair in ("masking.score=magnitude", "reconstruct.enabled=false", "calibration.held_out=0")
]


def inspected(capsys, *arguments) -> dict:
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_inspect_of_the_true_shapes(family, published_config, capsys):
    """Counts, and the parts of the predicted peak that can be computed by hand; on a CPU weights are fp32."""
    directory, (total, projections, inputs) = published_config(family), SHAPES[family]
    cpu = ["--set=model.device=cpu"]
    result = inspected(capsys, directory, "--method", "nm", *cpu)
    assert (result["family"], result["method"], result["pattern"], result["ratio"]) == (family, "nm", "2:4", 0.5)
    assert (result["score"], result["arm"], result["stored_dtype"]) == ("sparsegpt", "masked", "bfloat16")
    assert (result["parameters"], result["bytes"], result["mask_bytes"]) == (total, 2 * total, projections // 8)
    assert sum(role["weights"] for role in result["projections"].values()) == projections
    assert all(2 * role["zero"] == role["weights"] for role in result["projections"].values())
    memory = result["memory"]
    assert memory["weights"] == 4 * total and memory["hidden states"] == 16e9  # two stores at the budget of 8 GB
    squares = [width**2 for width in inputs]
    assert memory["statistics (sparsegpt)"] == 8 * sum(squares) + 4 * max(squares)  # fp64, and one as fp32
    assert memory["one block's masks"] > memory["statistics (sparsegpt)"]  # one after the other
    states = (128 + 16) * 10 * 2048 * 4 * inputs[0]  # windows x levels x tokens x fp32 features, in two streams
    assert memory["temporary files"] == 2 * states + 4 * projections
    apart = ("peak host", "temporary files", "statistics (sparsegpt)")
    assert memory["peak host"] == sum(size for part, size in memory.items() if part not in apart) + 450_000_000
    less = inspected(capsys, directory, "--method", "nm", *cpu, "--set=memory.budget_gb=1")["memory"]
    assert memory["weights before the refit"] == 8e9 and memory["packed masks"] == projections // 8
    assert memory["peak host"] - less["peak host"] == 21e9  # and the weights before the refit
    plain = inspected(capsys, directory, "--method", "nm", *cpu, "--set=reconstruct.enabled=false")["memory"]
    assert plain["refit"] == plain["weights before the refit"] == 0 and plain["hidden states"] == 8e9
    bare = inspected(capsys, directory, "--method", "unstructured", "--ratio", "0.25", *cpu, *NO_TEXT)
    assert bare["arm"] is None and bare["pattern"] is None
    assert bare["projections"]["up"]["zero"] * 4 == bare["projections"]["up"]["weights"]
    assert bare["memory"]["hidden states"] == bare["memory"]["activations of one batch"] == 0
    assert bare["memory"]["peak host"] == 4 * total + 5_000_000_000 + 450_000_000  # while loading: a shard beside them


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_inspect_on_an_accelerator(family, published_config, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    directory, total = published_config(family), SHAPES[family][0]
    whole, streamed = (
        inspected(capsys, directory, "--method", "nm", *more)["memory"] for more in ([], ["--set=memory.offload=true"])
    )
    assert whole["weights"] == 2 * total < whole["peak device"]
    assert whole["peak device"] - streamed["peak device"] > 0.8 * 2 * total
    assert streamed["peak host"] - whole["peak host"] == 2 * total


def test_inspect_shows_tables(published_config, capsys):
    directory = published_config("dream")
    assert main(["inspect", str(directory), "--method", "unstructured", "--set=masking.score=sink-wanda"]) == 0
    said = capsys.readouterr().out
    for shown in (
        "wanda on masked+sink",
        "unstructured 0.5",
        "attention output",
        "950.534 M",
        "815.66 MB",
        "peak host",
    ):
        assert shown in said
    assert max(map(len, said.splitlines())) <= 80
    assert main(["inspect", str(directory), "--method", "nm", "--nm", "4:8"]) == 0
    assert "sparsegpt on masked, 4:8" in capsys.readouterr().out
