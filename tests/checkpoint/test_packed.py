"""Written checkpoints whose masked weights are packed: what is chosen, what is written, and what stops it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune import UserError, load_model, save_pruned
from structprune.checkpoint import packed as module
from structprune.checkpoint.bitmask import unpack
from structprune.checkpoint.packed import check_zeros, choose_packing, pack_directory
from structprune.config import ExportSettings
from structprune.masking.masks import Masks, pack_bits
from structprune.masking.patterns import group_mask, row_mask

BLOCKS = "model.transformer.blocks"
UP, DOWN = f"{BLOCKS}.0.up_proj.weight", f"{BLOCKS}.2.ff_out.weight"
HEAD = "model.transformer.ff_out.weight"


def masks_of(model, names, pattern) -> Masks:
    """Masks of some weights of a model, by a pattern of their magnitudes."""
    state = model.state_dict()
    keeps = {name: pattern(state[name].abs()) for name in names}  # (O, C) bool each
    packed = {name: pack_bits(keep) for name, keep in keeps.items()}
    return Masks(packed, {name: tuple(keep.shape) for name, keep in keeps.items()})


def two_of_four(score):
    return group_mask(score, 2, 4)  # (O, C)


@pytest.fixture
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint("llada"))


def test_pairs_only_where_all_masks_are(model):
    masks = masks_of(model, (UP, DOWN), two_of_four)
    packing = choose_packing(masks, model, 4)
    assert packing.layout == "sparse-24-bitmask" and packing.kept == {UP: 48 * 16, DOWN: 32 * 24}
    names = [UP.removesuffix(".weight"), DOWN.removesuffix(".weight")]
    sparsity = {"format": "sparse-24-bitmask", "targets": names, "sparsity_structure": "2:4"}
    assert packing.settings == {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    # of 48 x 32 and 32 x 48 values of 4 bytes: half, a bit for each, and the shape
    assert packing.saved_bytes(4) == 2 * (1536 * 4 - (768 * 4 + 192 + 16))
    other = masks_of(model, (f"{BLOCKS}.1.q_proj.weight",), lambda score: row_mask(score, 0.5))
    mixed = Masks(masks.packed | other.packed, masks.shapes | other.shapes)
    packing = choose_packing(mixed, model, 4)
    assert packing.layout == "sparse-bitmask" and packing.settings["sparsity_config"]["format"] == "sparse-bitmask"
    assert packing.settings["sparsity_config"]["sparsity_structure"] == "unstructured" and len(packing.kept) == 3


@pytest.mark.parametrize("removed, group", [(1, 4), (3, 4), (4, 8)])
def test_other_groups_are_packed_freely(model, removed, group):
    packing = choose_packing(masks_of(model, (UP,), lambda score: group_mask(score, removed, group)), model, 4)
    assert packing.layout == "sparse-bitmask" and packing.kept == {UP: 48 * 32 * (group - removed) // group}


def test_only_projections_that_become_smaller_are_packed(model):
    full = masks_of(model, (DOWN,), lambda score: row_mask(score, 0.02))  # none of 48
    head = masks_of(model, (HEAD,), lambda score: row_mask(score, 0.5))
    half = masks_of(model, (UP,), lambda score: row_mask(score, 0.5))
    masks = Masks(full.packed | head.packed | half.packed, full.shapes | head.shapes | half.shapes)
    assert choose_packing(masks, model, 2).kept == {UP: 48 * 16}
    with pytest.raises(UserError, match="the masks remove too few weights for packed ones to be smaller: leave it out"):
        choose_packing(full, model, 2)


def test_masks_of_another_checkpoint(model):
    masks = masks_of(model, (UP,), two_of_four)
    wrong = Masks({UP: masks.packed[UP][:47]}, {UP: (47, 32)})
    with pytest.raises(UserError, match=r"checkpoint \(.*up_proj.weight is \(48, 32\), not \(47, 32\)\)"):
        choose_packing(wrong, model, 4)
    wrong = Masks({"a.weight": masks.packed[UP]}, {"a.weight": (48, 32)})
    with pytest.raises(UserError, match=r"\(a.weight is not there, not \(48, 32\)\): mask it anew"):
        choose_packing(wrong, model, 4)


def test_a_family_without_code_beside_the_weights(model, monkeypatch):
    monkeypatch.setattr(module, "auto_map", lambda family: {})
    with pytest.raises(UserError, match="^--format compressed-tensors needs files that define family 'llada' and"):
        choose_packing(masks_of(model, (UP,), two_of_four), model, 4)


def test_weights_that_their_mask_removes(model):
    masks = masks_of(model, (UP, DOWN), two_of_four)
    masks.apply(model)
    check_zeros(model, masks)
    with torch.no_grad():
        model.state_dict()[DOWN][~masks.kept(DOWN)] += torch.arange(768) % 3 > 0  # two of three
    with pytest.raises(UserError, match=r"ff_out.weight has 512 weights other than 0 that masks.safetensors removes: "):
        check_zeros(model, masks)


@pytest.fixture
def written(model, tmp_path):
    """`written(max_shard_size)` -> a plain export with masked weights, its state, and how they are packed."""

    def write(size="5GB"):
        masks = masks_of(model, (UP, DOWN), two_of_four)
        masks.apply(model)
        with torch.no_grad():
            model.state_dict()[UP][0] *= -1  # so that removed weights are -0
        out = save_pruned(model, tmp_path / "out", ExportSettings(dtype="bfloat16", max_shard_size=size))
        state = {name: value.bfloat16() for name, value in model.state_dict().items()}
        return out, state, choose_packing(masks, model, 2)

    return write


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_a_directory(written, size):
    out, state, packing = written(size)
    before = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert (len(before) > 2) == (size == "100KB")
    total = pack_directory(out, packing)
    assert {path.name for path in out.glob("*.safetensors")} == before.keys()
    tensors = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    flat = {name: tensor for shard in tensors.values() for name, tensor in shard.items()}
    prefixes = [name.removesuffix("weight") for name in (UP, DOWN)]
    parts = {f"{prefix}{part}" for prefix in prefixes for part in ("shape", "compressed", "bitmask")}
    assert flat.keys() == (state.keys() - {UP, DOWN}) | parts
    assert total == sum(tensor.nbytes for tensor in flat.values())
    assert total == sum(value.nbytes for value in state.values()) - packing.saved_bytes(2)
    for name, value in state.items():
        prefix = name.removesuffix("weight")
        found = {part: flat[prefix + part] for part in ("shape", "compressed", "bitmask") if prefix + part in flat}
        again = unpack(found) if name in (UP, DOWN) else flat[name]
        assert torch.equal(again, value) and again.dtype == torch.bfloat16, name
        assert name not in (UP, DOWN) or not torch.signbit(again[again == 0]).any()
    assert torch.signbit(state[UP][0][state[UP][0] == 0]).all()
    values = json.loads((out / "config.json").read_text())
    assert values["quantization_config"] == packing.settings and values["model_type"] == "structprune_llada"
    if size == "100KB":
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: shard for shard, each in tensors.items() for name in each}
        assert index["metadata"] == {"total_size": total}


@pytest.mark.parametrize("damage", [
    lambda parts: parts | {"compressed": parts["compressed"] + 1},
    lambda parts: parts | {"compressed": parts["compressed"].half()},
    lambda parts: parts | {"compressed": parts["compressed"][1:]},
    lambda parts: parts | {"bitmask": parts["bitmask"].flip(0)},
])  # fmt: skip
def test_what_is_packed_wrongly_is_found(written, monkeypatch, damage):
    out, _, packing = written()
    plain, pack = (out / "model.safetensors").read_bytes(), module.pack
    monkeypatch.setattr(module, "pack", lambda weight, layout: damage(pack(weight, layout)))
    with pytest.raises(RuntimeError, match=r"\.weight is not the same once packed: please report this$"):
        pack_directory(out, packing)
    assert (out / "model.safetensors").read_bytes() == plain


def test_a_tensor_that_changes_on_its_way_is_found(written, monkeypatch):
    out, state, packing = written()

    def save(tensors, path, metadata):
        save_file(tensors | {HEAD: -tensors[HEAD]}, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", save)
    with pytest.raises(RuntimeError, match=f"^{HEAD} is not the same"):
        pack_directory(out, packing)
