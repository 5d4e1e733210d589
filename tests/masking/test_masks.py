"""Packed masks: bits by hand, counts, the file, and finding a weight under every wrapper's name."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from structprune.errors import UserError
from structprune.masking import Masks
from structprune.masking.masks import FORMAT, pack_bits, plain_name, unpack_bits

Q = "model.transformer.blocks.0.q_proj.weight"
DOWN = "model.transformer.blocks.2.ff_out.weight"


def random_kept(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5  # (O, C)


@pytest.fixture
def masks(pack_masks) -> Masks:
    return pack_masks({Q: random_kept(32, 32), DOWN: random_kept(32, 48, 1), "odd.weight": random_kept(3, 13, 2)})


@pytest.fixture
def model_masks(pack_masks) -> Masks:
    """Masks of two weights of the tiny LLaDA."""
    return pack_masks({Q: random_kept(32, 32), DOWN: random_kept(32, 48, 1)})


def test_bits_by_hand():
    kept = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0, 1, 0, 1]], dtype=torch.bool)
    packed = pack_bits(kept)
    assert packed.dtype == torch.uint8 and packed.tolist() == [[1, 3], [2 + 4 + 128, 2]]
    assert unpack_bits(packed, 10).dtype == torch.bool and torch.equal(unpack_bits(packed, 10), kept)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 37])
def test_every_width_comes_back(columns):
    kept = random_kept(5, columns, columns)
    packed = pack_bits(kept)
    assert packed.shape == (5, -(-columns // 8))
    assert torch.equal(unpack_bits(packed, columns), kept)
    assert torch.equal(pack_bits(kept.t().contiguous().t()), packed)  # any memory layout


def test_sparsity_counts_weights_exactly(pack_masks):
    kept = {"a.weight": torch.ones(3, 13, dtype=torch.bool), "b.weight": torch.zeros(2, 5, dtype=torch.bool)}
    kept["a.weight"][0, 12] = kept["a.weight"][2, 0] = False
    kept["b.weight"][1, 4] = True
    masks = pack_masks(kept)
    assert masks.sparsity("a.weight") == 2 / 39 and masks.sparsity("b.weight") == 9 / 10
    assert masks.sparsity() == 11 / 49
    assert Masks({}, {}).sparsity() == 0
    assert torch.equal(masks.kept("a.weight"), kept["a.weight"])
    for call in (masks.kept, masks.sparsity):
        with pytest.raises(UserError, match=r"^no mask of 'a.weigth' \(did you mean 'a.weight'\?\)$"):
            call("a.weigth")


def test_the_file_brings_everything_back(masks, tmp_path):
    masks.save(tmp_path / "masks.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["masks.safetensors"]
    with safe_open(tmp_path / "masks.safetensors", "pt") as file:
        assert file.metadata() == {"format": FORMAT, Q: "32x32", DOWN: "32x48", "odd.weight": "3x13"}
        assert {name: file.get_tensor(name).dtype for name in list(file.keys())} == dict.fromkeys(
            masks.packed, torch.uint8
        )
    again = Masks.load(tmp_path / "masks.safetensors")
    assert again.shapes == masks.shapes and set(again.packed) == set(masks.packed)
    for name in masks.packed:
        assert torch.equal(again.kept(name), masks.kept(name))
    Masks({}, {}).save(tmp_path / "none.safetensors")
    assert Masks.load(tmp_path / "none.safetensors").packed == {}


def test_one_tensor_under_two_names_can_be_saved(tmp_path):
    bits = pack_bits(random_kept(4, 8))
    Masks({"a.weight": bits, "b.weight": bits}, {"a.weight": (4, 8), "b.weight": (4, 8)}).save(tmp_path / "m")
    assert torch.equal(Masks.load(tmp_path / "m").packed["b.weight"], bits)


def test_a_failed_save_leaves_the_old_file(masks, tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    path.write_bytes(b"old")

    def fail(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("structprune.models.tensor_files.save_file", fail)
    with pytest.raises(UserError, match=r"masks.safetensors cannot be written \(No space left on device\)$"):
        masks.save(path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


BYTES = torch.zeros(3, 2, dtype=torch.uint8)
BAD = {
    "no_marker": ({"w": BYTES}, {"w": "3x13"}, r"is not a mask file of format"),
    "weights": ({"w": torch.zeros(3, 13)}, {"format": "pt"}, r"is not a mask file of format"),
    "no_shape": ({"w": BYTES}, {"format": FORMAT}, r"'w' has a mask or a shape, but not both"),
    "no_mask": ({}, {"format": FORMAT, "w": "3x13"}, r"'w' has a mask or a shape, but not both"),
    "shape_text": ({"w": BYTES}, {"format": FORMAT, "w": "3 by 13"}, r"metadata 'w' is '3 by 13', not a shape"),
    "columns": ({"w": BYTES}, {"format": FORMAT, "w": "3x17"}, r"'w' is \(3, 2\) uint8, not \(3, 3\) uint8 as 3 x 17"),
    "rows": ({"w": BYTES}, {"format": FORMAT, "w": "2x13"}, r"'w' is \(3, 2\) uint8, not \(2, 2\) uint8"),
    "dtype": ({"w": BYTES.bool()}, {"format": FORMAT, "w": "3x13"}, r"'w' is \(3, 2\) bool, not \(3, 2\) uint8"),
    "padding": ({"w": BYTES + 32}, {"format": FORMAT, "w": "3x13"}, r"'w' has bits beyond its 13 columns"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_line(case, tmp_path):
    tensors, metadata, message = BAD[case]
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=f"bad.safetensors.*{message}") as caught:
        Masks.load(tmp_path / "bad.safetensors")
    assert "\n" not in str(caught.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(
        UserError, match="^no mask file at '.*gone.safetensors': give the masks.safetensors of a masked checkpoint$"
    ):
        Masks.load(tmp_path / "gone.safetensors")
    (tmp_path / "text").write_text("not safetensors at all")
    with pytest.raises(UserError, match="text cannot be read as safetensors"):
        Masks.load(tmp_path / "text")


def test_apply_zeroes_what_is_removed_and_nothing_else(tiny_model, model_masks):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.get_parameter(Q).data[~model_masks.kept(Q)] = float("nan")
    model_masks.apply(model)
    for name, value in model.state_dict().items():
        kept = model_masks.kept(name) if name in model_masks.packed else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value, torch.where(kept, before[name], torch.zeros(())))
        assert not torch.signbit(value[~kept]).any()


def test_masks_of_a_model_are_its_zeros(tiny_model, model_masks):
    model = tiny_model()
    assert Masks.of(model).packed == {}
    model_masks.apply(model)
    zeros = Masks.of(model)
    assert zeros.shapes == model_masks.shapes
    for name in model_masks.packed:
        assert torch.equal(zeros.packed[name], model_masks.packed[name])


def test_zeros_survive_dtypes_and_reloading(tiny_model, model_masks, tmp_path):
    """Casts move no zero, and make none here: float16 and bfloat16 hold weights of this size."""
    model = tiny_model()
    model_masks.apply(model)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        zeros = Masks.of(model.to(dtype))
        assert all(torch.equal(zeros.packed[name], model_masks.packed[name]) for name in model_masks.packed)
    model.save_pretrained(tmp_path)
    zeros = Masks.of(type(model).from_pretrained(tmp_path))
    assert zeros.shapes == model_masks.shapes
    assert all(torch.equal(zeros.packed[name], model_masks.packed[name]) for name in model_masks.packed)


def test_masks_of_another_model_are_refused_before_anything_changes(tiny_model, model_masks, pack_masks):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    missing = "model.transformer.blocks.9.q_proj.weight"
    wrong = pack_masks({Q: model_masks.kept(Q), missing: random_kept(32, 32)})
    with pytest.raises(UserError, match=r"no weight 'model.transformer.blocks.9.q_proj.weight', .* \(did you mean"):
        wrong.apply(model)
    wrong = pack_masks({Q: model_masks.kept(Q), DOWN: random_kept(32, 40)})
    with pytest.raises(
        UserError, match=r"blocks.2.ff_out.weight' has shape \(32, 48\), but its mask is for \(32, 40\)"
    ):
        wrong.apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_not_in_memory_are_refused(tiny_model, model_masks):
    model = tiny_model().to("meta")
    for call in (model_masks.apply, Masks.of):
        with pytest.raises(UserError, match=r"is offloaded \(meta\): masks need whole weights in memory"):
            call(model)


@pytest.mark.parametrize(
    "name",
    [
        "a.q.weight",
        "module.a.q.weight",
        "_orig_mod.a.q.weight",
        "base_model.model.a.q.base_layer.weight",
        "module.base_model.model.a.q.modules_to_save.default.weight",
        "base_model.model.a.q.original_module.weight",
        "a._checkpoint_wrapped_module.q.weight",
    ],
)
def test_wrappers_add_nothing_to_a_name(name):
    assert plain_name(name) == "a.q.weight"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing")
def test_a_peft_model_has_the_same_masks_and_can_be_masked(tiny_model, model_masks):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    model_masks.apply(model)
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["up_proj"])
    wrapped = peft.get_peft_model(model, settings)  # lora_B is all zeros, and no weight of the model
    wrapped.get_submodule("base_model.model.model.transformer.blocks.1.up_proj").weight.data[0] = 0  # the trained copy
    zeros = Masks.of(wrapped)
    assert zeros.shapes == model_masks.shapes
    assert all(torch.equal(zeros.packed[name], model_masks.packed[name]) for name in model_masks.packed)
    base = wrapped.get_parameter(f"base_model.model.{Q.removesuffix('.weight')}.base_layer.weight")
    base.data.fill_(1)
    model_masks.apply(wrapped)
    assert torch.equal(base != 0, model_masks.kept(Q))
