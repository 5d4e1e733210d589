"""Masks from scores, by hand and against a slow search."""

import pytest
import torch

from structprune.errors import UserError
from structprune.masking.patterns import check_pattern, group_mask, parse_nm, pooled_mask, row_mask
from structprune.models.adapter import Adapter


def test_nm_is_read_as_removed_of_every():
    assert parse_nm("2:4") == (2, 4) and parse_nm("1:16") == (1, 16) and parse_nm("3:6") == (3, 6)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0", "3:0"])
def test_nm_that_removes_nothing_or_all_is_refused(text):
    with pytest.raises(UserError, match=f"^masking.nm = {text} removes .*: give N:M with 0 < N < M, such as 2:4$"):
        parse_nm(text)


@pytest.mark.parametrize("family, wide", [("llada", r"\.0\.ff_out"), ("dream", r"\.0\.self_attn\.o_proj")])
def test_every_projection_needs_whole_groups(tiny_model, family, wide):
    blocks = Adapter(tiny_model(family)).blocks  # of 32 features, and 48 channels; Dream's attention mixes 48
    check_pattern(blocks, "2:4")
    check_pattern(blocks, "8:16")
    with pytest.raises(
        UserError, match=r"^masking.nm = 2:5 needs inputs in groups of 5, but .*\.0\..*q_proj has 32 inp"
    ):
        check_pattern(blocks, "2:5")
    with pytest.raises(UserError, match=f"{wide} has 48 inputs: choose an M that divides it$"):
        check_pattern(blocks, "1:32")


def test_rows_lose_their_lowest_by_hand():
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0, 9.0], [1.0, 8.0, 7.0, 6.0, 5.0]])
    assert row_mask(score, 0.4).tolist() == [[True, False, True, False, True], [False, True, True, True, False]]
    assert row_mask(score, 0.39).int().tolist() == [[1, 0, 1, 1, 1], [0, 1, 1, 1, 1]]  # int(1.95) = 1 per row
    assert row_mask(score, 0.0).all() and row_mask(score, 0.19).all()


@pytest.mark.parametrize("columns, ratio, count", [(100, 0.5, 50), (33, 0.3, 9), (7, 0.99, 6), (48, 1 / 3, 16)])
def test_row_counts_are_exact_even_among_ties(columns, ratio, count):
    score = torch.randint(0, 3, (20, columns), generator=torch.Generator().manual_seed(0)).float()
    kept = row_mask(score, ratio)
    assert ((~kept).sum(1) == count).all()
    for row, mask in zip(score, kept):
        assert row[~mask].max() <= row[mask].min()


def test_a_pool_loses_what_is_at_most_the_threshold():
    score = torch.tensor([[6.0, 1.0, 2.0], [5.0, 4.0, 3.0]])
    assert pooled_mask(score, 0.5).int().tolist() == [[1, 0, 0], [1, 0, 0]]  # sorted index 3 holds 4: four go
    assert pooled_mask(score, 0.49).int().tolist() == [[1, 0, 0], [1, 1, 0]]  # index 2 holds 3
    assert pooled_mask(score, 1e-9).int().tolist() == [[1, 0, 1], [1, 1, 1]]
    assert pooled_mask(score, 0.0).all()
    assert not pooled_mask(score, 0.999).any()


def test_ties_with_the_threshold_go_too():
    score = torch.tensor([[0.0, 1.0, 2.0], [2.0, 2.0, 5.0]])
    assert pooled_mask(score, 0.34).int().tolist() == [[0, 0, 0], [0, 0, 1]]  # index 2 holds 2, as two others


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.77])
def test_a_pool_is_cut_at_the_sorted_index(ratio):
    score = torch.rand(13, 29, generator=torch.Generator().manual_seed(1))
    threshold = score.flatten().sort().values[int(13 * 29 * ratio)]
    kept = pooled_mask(score, ratio)
    assert torch.equal(kept, score > threshold)
    assert (~kept).sum() == int(13 * 29 * ratio) + 1


def test_groups_by_hand():
    score = torch.tensor([[1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0]])
    assert group_mask(score, 2, 4).int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    assert group_mask(score, 1, 2).int().tolist() == [[0, 1, 0, 1, 1, 0, 1, 0]]
    assert group_mask(score, 3, 8).int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    "removed, group", [(1, 2), (2, 4), (4, 8), (1, 3), (3, 6), (2, 5), (15, 16), (3, 17), (10, 20)]
)
def test_groups_lose_their_lowest_the_first_of_equals(removed, group, valid_groups):
    score = torch.randint(0, 4, (6, 3 * group), generator=torch.Generator().manual_seed(group)).float()
    kept = group_mask(score, removed, group)
    assert kept.shape == score.shape and kept.dtype == torch.bool
    for row in range(6):
        for start in range(0, 3 * group, group):
            lowest = sorted(range(group), key=lambda index: (score[row, start + index].item(), index))[:removed]
            removed_here = [index for index in range(group) if not kept[row, start + index]]
            assert removed_here == sorted(lowest)
    assert valid_groups(kept, removed, group)


def test_groups_that_keep_too_much_are_invalid(valid_groups):
    kept = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1], [1, 0, 1, 0, 0, 1, 0, 1]]).bool()
    assert valid_groups(kept, 2, 4)
    assert not valid_groups(kept, 3, 4)
    assert not valid_groups(torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]]).bool(), 2, 4)  # right in total, not by group
    assert valid_groups(torch.tensor([[1, 0, 0, 0]]).bool(), 2, 4)  # more may be zero
