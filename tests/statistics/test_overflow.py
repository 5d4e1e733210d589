"""What is said of numbers that are not finite."""

import pytest
import torch

from structprune.statistics.overflow import largest_weight, overflow, place


def test_parts_of_a_block_have_the_names_of_the_field():
    assert place(3, "channels") == "block 3, MLP channels" and place(0, "attention") == "block 0, attention heads"
    assert place(1, "down") == "block 1, down"


def test_the_largest_weight_is_named_and_the_first_nan_before_it(tiny_model):
    model = tiny_model()
    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        model.get_parameter(names[5]).view(-1)[3] = -2.5e20
    assert largest_weight(model) == f"the largest weight is 2.5e+20, in {names[5]}"
    with torch.no_grad():
        model.get_parameter(names[7]).view(-1)[0] = float("nan")
    assert largest_weight(model) == f"the largest weight is nan, in {names[7]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_range_is_advised_only_where_there_is_more(dtype):
    name = str(dtype).removeprefix("torch.")
    assert (
        str(overflow("here", "sums", torch.float16)) == "here: its sums overflow in float16: use model.dtype = float32"
    )
    assert str(overflow("here", "sums", dtype)).startswith(
        f"here: its sums overflow in {name}: the checkpoint's weights"
    )
