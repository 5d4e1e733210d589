"""Checkpoints written again: the same logits in another class or dtype, the family's own code, and what is refused."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune import Plan, UserError, apply_plan, load_model, save_pruned
from structprune.checkpoint.card import exported_card
from structprune.cli.main import main
from structprune.config import ExportSettings
from structprune.errors import Interrupted
from structprune.runs import export as module
from structprune.runs.export import ExportRequest, checked_export, export_checkpoint
from structprune.structured.plan import BlockPlan

IDS = torch.arange(1, 13).reshape(2, 6)  # (B, T)
OWN_CODE = {"configuration_toy.py": "CONFIG = 1\n", "modeling_toy.py": "raise RuntimeError('was run')\n"}


@pytest.fixture
def pruned(tiny_checkpoint, tmp_path):
    """`pruned(channels per block, ...)` -> a pruned LLaDA in our own layout, with what a run leaves beside it."""

    def make(channels=(24, 24, 24), heads=(0, 1, 2, 3), files=True):
        blocks = tuple(BlockPlan(tuple(heads), tuple(heads), tuple(range(count))) for count in channels)
        model = apply_plan(load_model(tiny_checkpoint()), Plan("llada", blocks))
        beside = {"plan.json": "{}", "README.md": "# A card", "report.json": {"ratio": 0.5}} if files else {}
        return save_pruned(model, tmp_path / "pruned", ExportSettings(compat="free"), files=beside)

    return make


def logits(directory) -> torch.Tensor:
    with torch.no_grad():
        return load_model(directory, "float32")(IDS).logits  # (B, T, V)


@pytest.mark.parametrize("compat, kind", [("official", "llada"), ("uniform", "llada"), ("free", "structprune_llada")])
def test_a_pruned_directory_in_every_class(pruned, tmp_path, compat, kind):
    source = pruned()
    exported = export_checkpoint(ExportRequest(str(source), tmp_path / "out", compat))
    assert exported.facts["difference"] == 0 and exported.facts["agreement"] == 1
    assert exported.facts["class"] == "official" and exported.facts["compat"] == compat
    assert torch.equal(logits(tmp_path / "out"), logits(source))
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["model_type"] == kind and values["block_type"] == "llama"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    facts = {"compat": compat, "dtype": "float32", "source": "pruned", "difference": 0.0, "agreement": 1.0}
    assert report == {"ratio": 0.5, "exports": [facts]}
    assert (tmp_path / "out" / "README.md").read_text() == "# A card" and (tmp_path / "out" / "plan.json").exists()


def test_another_dtype_changes_weights_by_rounding_only(pruned, tmp_path):
    source = pruned(files=False)
    facts = export_checkpoint(ExportRequest(str(source), tmp_path / "out", dtype="bf16")).facts
    assert facts["dtype"] == "bfloat16" and 0 < facts["difference"] < 0.1 and facts["agreement"] > 0.9
    assert load_model(tmp_path / "out", "auto").dtype == torch.bfloat16
    assert (logits(tmp_path / "out") - logits(source)).abs().max() < 0.1
    again = export_checkpoint(ExportRequest(str(tmp_path / "out"), tmp_path / "again", dtype="bfloat16")).facts
    assert again["difference"] == 0
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert [each["source"] for each in report["exports"]] == ["pruned", "out"]


def test_other_logits_are_no_export(pruned, tmp_path, monkeypatch):
    source = pruned()
    monkeypatch.setattr(module, "compare_logits", lambda *given: {"difference": 0.25, "agreement": 0.5})
    with pytest.raises(RuntimeError, match="the export's logits are 0.25 off"):
        export_checkpoint(ExportRequest(str(source), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_familys_own_code_is_kept_but_not_run(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(auto_map={"AutoConfig": "configuration_toy.Config", "AutoModel": "modeling_toy.Model"})
    for name, text in OWN_CODE.items():
        (source / name).write_text(text)
    export_checkpoint(ExportRequest(str(source), tmp_path / "out", "official"))
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["auto_map"]["AutoModel"] == "modeling_toy.Model"
    assert {name: (tmp_path / "out" / name).read_text() for name in OWN_CODE} == OWN_CODE
    assert (tmp_path / "out" / "modeling_structprune.py").exists()
    export_checkpoint(ExportRequest(str(source), tmp_path / "free", "free"))
    assert not (tmp_path / "free" / "modeling_toy.py").exists()
    (source / "modeling_toy.py").unlink()  # what auto_map names is not there
    export_checkpoint(ExportRequest(str(source), tmp_path / "ours", "official"))
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert values["auto_map"]["AutoModel"].startswith("modeling_structprune.")
    assert not (tmp_path / "ours" / "configuration_toy.py").exists()


def test_a_file_for_llama_cpp_and_a_directory_at_once(pruned, tmp_path, capsys):
    source, out, file = pruned(heads=(0, 2)), tmp_path / "out", tmp_path / "model.gguf"
    assert main(["export", str(source), "--out", str(out), "--compat", "uniform", "--gguf", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "uniform, float32: logits are the source's, bit for bit" in said
    assert f"Wrote {file} ({file.stat().st_size / 1e6:.1f} MB)" in said
    assert main(["export", str(source), "--gguf", str(file)]) == 2
    assert f"--gguf {file} exists: choose another, or add --overwrite" in capsys.readouterr().err
    assert main(["export", str(source), "--gguf", str(file), "--overwrite", "--dtype", "q8_0"]) == 0


def test_a_dry_run_names_the_classes(pruned, tmp_path, capsys):
    source = pruned(heads=(0, 2))
    assert main(["export", str(source), "--out", str(tmp_path / "out"), "--compat", "uniform", "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not official: heads were removed: 2 heads of 8 are not the hidden size 32" in said
    assert "Would write" in said and "Nothing was written." in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, message", [
    ([], "nothing to write: give --out DIR, --gguf FILE or --push REPO"),
    (["--out", "OUT", "--compat", "best"], "unknown --compat 'best': give official, uniform, free"),
    (["--out", "OUT", "--compat", "official"], "--compat official is not possible: heads were removed"),
    (["--out", "OUT", "--dtype", "int8"], "unknown --dtype 'int8': give f32, f16, bf16, or q8_0 with --gguf"),
    (["--out", "OUT", "--gguf", "OUT.gguf", "--dtype", "q8_0"], "--dtype q8_0 is for a GGUF file alone"),
    (["--gguf", "OUT.gguf", "--compat", "free"], "--compat is for --out DIR: add it, or leave --compat out"),
    (["--out", "OUT", "--gguf-pre", "x"], "--gguf-pre is for --gguf FILE"),
    (["--out", "OUT", "--private"], "--private is for --push REPO"),
    (["--push", "me/model", "--dtype", "f16"], "--dtype is for --out DIR or --gguf FILE"),
    (["--gguf", "."], "--gguf . is a directory: give a file"),
    (["--push", "me/model", "--overwrite"], "--overwrite is for --out DIR or --gguf FILE"),
    (["--out", "OUT", "--compat", "uniform", "--gguf", "OUT"], "lie in each other: give them places of their own"),
    (["--out", "OUT", "--compat", "uniform", "--gguf", "OUT/a.gguf"], "lie in each other: give them"),
    (["--gguf", "SOURCE/model.gguf"], "lies inside the input checkpoint"),
    (["--gguf", "SOURCE/config.json", "--overwrite"], "is no GGUF file, and is not replaced: choose another"),
    (["--out", "OUT", "--compat", ""], "unknown --compat ''"),
    (["--push", "model"], "--push model has no owner: give USER/NAME"),
    (["--push", "a b/c"], "--push a b/c is no name of a repository: give USER/NAME"),
])  # fmt: skip
def test_refused(pruned, tmp_path, capsys, arguments, message):
    source, before = pruned(heads=(0, 2)), sorted(tmp_path.iterdir())
    arguments = [text.replace("OUT", str(tmp_path / "out")).replace("SOURCE", str(source)) for text in arguments]
    assert main(["export", str(source), *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and sorted(tmp_path.iterdir()) == before


def test_blocks_that_differ_are_refused_before_weights_are_read(pruned, tmp_path):
    source = pruned(channels=(24, 16, 24))
    (source / "model.safetensors").write_bytes(b"")
    (source / "model.safetensors").unlink()
    for request in (
        ExportRequest(str(source), tmp_path / "out", "uniform"), ExportRequest(str(source), gguf=tmp_path / "x.gguf")
    ):  # fmt: skip
        with pytest.raises(UserError, match="its blocks differ in width"):
            checked_export(request)


def test_what_only_the_files_tell_is_refused_before_weights_are_read(pruned, tmp_path, monkeypatch):
    source = pruned()
    request = ExportRequest(str(source), gguf=tmp_path / "deep" / "model.gguf")
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="--gguf needs the package gguf"):
        export_checkpoint(request)
    monkeypatch.undo()
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        checked_export(request)
    (source / "report.json").write_text("[")
    with pytest.raises(UserError, match="report.json is not valid JSON"):
        checked_export(ExportRequest(str(source), tmp_path / "out"))
    assert not (tmp_path / "deep").exists()


def test_folders_of_a_file_are_made_and_removed_again(pruned, tmp_path, monkeypatch):
    request = ExportRequest(str(pruned()), gguf=tmp_path / "deep" / "er" / "model.gguf")
    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(request)
    assert not (tmp_path / "deep").exists()
    monkeypatch.undo()
    assert export_checkpoint(request).request.gguf.read_bytes()[:4] == b"GGUF"


def test_weights_that_half_precision_cannot_hold(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint()
    state = load_file(source / "model.safetensors")
    name = "model.transformer.blocks.1.ff_out.weight"
    state[name][0, 0] = 1e6
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    for keys in ({"out": tmp_path / "out"}, {"gguf": tmp_path / "model.gguf"}):
        with pytest.raises(UserError, match=r"^float16 cannot hold .* \(largest 1e\+06\): write bfloat16 or float32$"):
            export_checkpoint(ExportRequest(str(source), dtype="f16", **keys))
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name]


def test_an_interrupt_says_what_is_complete(pruned, tmp_path, monkeypatch):
    source, file = pruned(), tmp_path / "model.gguf"
    monkeypatch.setattr(module, "compare_logits", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(Interrupted, match="model.gguf' is complete, '.*out' was not written"):
        export_checkpoint(ExportRequest(str(source), tmp_path / "out", gguf=file))
    assert file.exists() and not (tmp_path / "out").exists()


def test_the_card_follows_its_checkpoint():
    card = "Export class: `official`. Every figure\n\n`auto_map` leads to the family's own code, copied from the source"
    card += " and never run (modeling_toy.py). `model(ids)`"
    free = exported_card(card, {"own_code": ["modeling_toy.py"]}, {"own_code": []}, "free")
    assert free.startswith("Export class: `official`; written as `free`. Every")
    assert "The code beside the weights is structprune's own. `model(ids)`" in free and "modeling_toy" not in free
    assert exported_card(free, {}, {}, "uniform").startswith("Export class: `official`; written as `uniform`. Every")
