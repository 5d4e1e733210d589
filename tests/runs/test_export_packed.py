"""Masked checkpoints exported with packed weights: what is written and said, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from structprune import UserError, load_model, save_pruned
from structprune.checkpoint.bitmask import unpack
from structprune.checkpoint.export import CODE_FILES
from structprune.checkpoint.masked import save_masked
from structprune.cli.main import main
from structprune.masking.masks import Masks, pack_bits
from structprune.masking.patterns import group_mask, row_mask
from structprune.models.adapter import Adapter
from structprune.models.configuration_structprune import StructpruneLLaDAConfig
from structprune.models.modeling_structprune import StructpruneLLaDA
from structprune.runs import export as module
from structprune.runs.export import ExportRequest, export_checkpoint

PATTERNS = {"2:4": lambda score: group_mask(score, 2, 4), "half": lambda score: row_mask(score, 0.5)}
PATTERNS["none"] = lambda score: row_mask(score, 0.0)
LAYOUTS = {"2:4": "sparse-24-bitmask", "half": "sparse-bitmask"}
CARD = "---\nlibrary_name: transformers\n---\n\n# A card\n"
PACKED = ("--format", "compressed-tensors")


@pytest.fixture
def masked(tiny_checkpoint, tmp_path):
    """`masked(pattern, family)` -> a bf16 checkpoint with its smallest weights at zero, masks, report and card."""

    def make(pattern="2:4", family="llada"):
        model, packed, shapes = load_model(tiny_checkpoint(family, torch_dtype="bfloat16")), {}, {}
        for block in Adapter(model).blocks:
            for role, name in block.names.items():
                weight = block[role].weight.detach()  # (O, C)
                packed[f"{name}.weight"] = pack_bits(PATTERNS[pattern](weight.abs()))
                shapes[f"{name}.weight"] = (weight.shape[0], weight.shape[1])
        masks = Masks(packed, shapes)
        masks.apply(model)
        files = {"masks.safetensors": masks.save, "report.json": {"ratio": 0.5}, "README.md": CARD}
        return save_masked(model, tmp_path / "masked", changed=packed, files=files)

    return make


def unpacked(directory, names) -> dict[str, torch.Tensor]:
    """All tensors of an export, those of `names` from their parts."""
    state = load_file(directory / "model.safetensors")
    for name in names:
        prefix, parts = name.removesuffix("weight"), ("shape", "compressed", "bitmask", "row_offsets")
        state[name] = unpack({part: state.pop(prefix + part) for part in parts if prefix + part in state})
    return state


@pytest.mark.parametrize("family", ["llada", "dream", "a2d-qwen3"])
@pytest.mark.parametrize("pattern", LAYOUTS)
def test_every_weight_comes_back(masked, tmp_path, capsys, family, pattern):
    source, out, layout = masked(pattern, family), tmp_path / "out", LAYOUTS[pattern]
    assert main(["export", str(source), "--out", str(out), *PACKED]) == 0
    masks, before = Masks.load(source / "masks.safetensors"), load_file(source / "model.safetensors")
    after = unpacked(out, masks.shapes)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    stored = load_file(out / "model.safetensors")
    written, plain = (sum(value.nbytes for value in state.values()) for state in (stored, before))
    said = " ".join(capsys.readouterr().out.split())
    sizes = f"{written / 1e6:.1f} MB instead of {plain / 1e6:.1f} MB"
    assert f"21 weights packed as {layout}: {sizes}; each was unpacked from the file again, bit for bit" in said
    assert "free, bfloat16: logits are the source's, bit for bit" in said and written < plain
    values = json.loads((out / "config.json").read_text())
    sparsity = values["quantization_config"]["sparsity_config"]
    assert sparsity["format"] == layout and sorted(sparsity["targets"]) == sorted(name[:-7] for name in masks.shapes)
    assert values["model_type"] == f"structprune_{family.replace('-', '_')}" and values["torch_dtype"] == "bfloat16"
    report = json.loads((out / "report.json").read_text())
    facts = {"compat": "free", "dtype": "bfloat16", "source": "masked", "format": "compressed-tensors"}
    facts |= {"layout": layout, "difference": 0.0, "agreement": 1.0, "written_bytes": written}
    assert report == {"ratio": 0.5, "exports": [facts]}
    assert {*CODE_FILES, "tokenizer.json", "README.md"} <= {path.name for path in out.iterdir()}
    assert (out / "masks.safetensors").read_bytes() == (source / "masks.safetensors").read_bytes()


def test_the_card_says_how_to_load_it(masked, tmp_path):
    export_checkpoint(ExportRequest(str(masked("half")), tmp_path / "out", format="compressed-tensors"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: transformers\n---\n\n# Packed weights\n\nThe masked weights are packed as"
    )
    assert "`sparse-bitmask`, for transformers 4.51 to 4.55 with" in card and card.endswith("larger.\n\n# A card\n")


def test_its_code_refuses_the_transformers_of_today_and_structprune_refuses_it(masked, tmp_path, capsys):
    out = tmp_path / "out"
    export_checkpoint(ExportRequest(str(masked()), out, format="compressed-tensors"))
    config = StructpruneLLaDAConfig.from_pretrained(out)
    with pytest.raises(ImportError, match="^weights packed as sparse-24-bitmask are not read by transformers 5"):
        StructpruneLLaDA(config)
    before = sorted(tmp_path.iterdir())
    for arguments in (["export", str(out), "--out", str(tmp_path / "again")], ["inspect", str(out), "--ratio", "0.5"]):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "is I64, quantised with compressed-tensors, but weights must be one of" in said
        assert said.endswith("give the checkpoint as it was before it was quantised or converted\n")
        assert said.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_another_dtype_is_packed_as_it_is_written(masked, tmp_path):
    request = ExportRequest(str(masked()), tmp_path / "out", dtype="f16", format="compressed-tensors")
    assert export_checkpoint(request).facts["difference"] < 1e-2
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(value.dtype) for value in state.values()} == {"torch.float16", "torch.int64", "torch.uint8"}


def test_a_dry_run_and_an_output_that_is_there(masked, tmp_path, capsys):
    source, out = masked(), tmp_path / "out"
    command = ["export", str(source), "--out", str(out), *PACKED]
    assert main([*command, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "21 weights packed as sparse-24-bitmask: " in said and "Nothing was written." in said and not out.exists()
    assert main(command) == 0
    written = json.loads((out / "report.json").read_text())["exports"][0]["written_bytes"]
    plan = module.plan_facts(request := ExportRequest(str(source), out, overwrite=True, format="compressed-tensors"),
                             module.checked_export(request))  # fmt: skip
    assert plan["out_bytes"] == written < plan["plain_bytes"]
    assert main(command) == 2 and "exists: choose another, or add --overwrite" in capsys.readouterr().err
    (out / "left").write_text("x")
    assert main([*command, "--overwrite"]) == 0 and not (out / "left").exists()


def test_an_interrupt_while_it_is_packed_leaves_nothing(masked, tmp_path, monkeypatch):
    source = masked()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(module, "pack_directory", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(ExportRequest(str(source), tmp_path / "out", format="compressed-tensors"))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("arguments, message", [
    (["--out", "OUT", "--format", "zip"], "unknown --format 'zip': give compressed-tensors"),
    (["--out", "OUT", "--format", ""], "unknown --format ''"),
    (["--gguf", "OUT.gguf", *PACKED], "--format is for --out DIR: add it, or leave --format out"),
    (["--push", "me/model", *PACKED], "--format is for --out DIR: add it, or leave --format out"),
    (["--out", "OUT", "--compat", "official", *PACKED], "--format compressed-tensors writes class free, whose code"),
    (["--out", "OUT", "--compat", "uniform", *PACKED], "leave out --compat uniform"),
    (["--out", "OUT", "--dtype", "q8_0", *PACKED], "unknown --dtype 'q8_0'"),
])  # fmt: skip
def test_contradictions(masked, tmp_path, capsys, arguments, message):
    source = masked()
    assert message in refusal(
        tmp_path, capsys, source, [text.replace("OUT", str(tmp_path / "out")) for text in arguments]
    )


def refusal(tmp_path, capsys, source, arguments) -> str:
    """The one line of an export that ends with code 2, and writes nothing."""
    before = sorted(tmp_path.iterdir())
    assert main(["export", str(source), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and sorted(tmp_path.iterdir()) == before
    return said


def test_sources_without_zeros_to_pack(tiny_checkpoint, masked, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out"), *PACKED]
    dense = tiny_checkpoint("llada", name="dense")
    message = (
        "and dense has no masks.safetensors, so that no zeros are known: mask it first (structprune prune --method"
    )
    assert message in refusal(tmp_path, capsys, dense, arguments)
    pruned = save_pruned(load_model(dense), tmp_path / "pruned")
    assert "and pruned has no masks.safetensors" in refusal(tmp_path, capsys, pruned, arguments)
    assert "the masks remove too few weights for packed ones to be smaller" in refusal(
        tmp_path, capsys, masked("none"), arguments
    )


def test_masks_that_are_not_those_of_the_weights(masked, tiny_checkpoint, tmp_path, capsys):
    source, arguments = masked(), ["--out", str(tmp_path / "out"), *PACKED]
    masks = (source / "masks.safetensors").read_bytes()
    dense = tiny_checkpoint("llada", name="dense")
    (dense / "masks.safetensors").write_bytes(masks)
    assert "weights other than 0 that masks.safetensors removes: set them to zero" in refusal(
        tmp_path, capsys, dense, arguments
    )
    other = tiny_checkpoint("dream", name="other")
    (other / "masks.safetensors").write_bytes(masks)
    assert "masks.safetensors is not of this checkpoint (model.transformer.blocks.0" in refusal(
        tmp_path, capsys, other, arguments
    )
    (source / "masks.safetensors").write_bytes(masks[:100])
    assert "masks.safetensors cannot be read as safetensors" in refusal(tmp_path, capsys, source, arguments)


def test_masks_of_a_hub_id(masked, tmp_path, monkeypatch):
    """They are downloaded alone, before any weight."""
    source, asked = masked(), []

    def snapshot(hub_id, weights, code=False):
        asked.append(weights)
        return source if weights else tmp_path / "settings"

    (tmp_path / "settings").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "settings" / name).write_bytes((source / name).read_bytes())
    monkeypatch.setattr("structprune.models.checkpoint_files._snapshot", snapshot)
    monkeypatch.setattr("structprune.models.headers._hub_headers", lambda hub_id: {})
    checked = module.checked_export(ExportRequest("me/masked", tmp_path / "out", format="compressed-tensors"))
    assert checked.packing.layout == "sparse-24-bitmask" and asked == [[], ["masks.safetensors"]]
    (source / "masks.safetensors").unlink()
    with pytest.raises(UserError, match="and me/masked has no masks.safetensors"):
        module.checked_export(ExportRequest("me/masked", tmp_path / "out", format="compressed-tensors"))
