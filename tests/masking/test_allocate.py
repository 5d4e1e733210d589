"""Ratios of blocks by outliers and depth, by hand."""

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import MaskingSettings
from structprune.errors import UserError
from structprune.masking.allocate import block_ratios, outlier_share, owl_ratios
from structprune.masking.scores.wanda import wanda_scores
from structprune.models.adapter import READERS, Adapter
from structprune.statistics.norms import one_shot_norms
from structprune.statistics.scan import Scan


@pytest.fixture
def noise() -> Calibration:
    ids = torch.randint(2000, (2, 12), generator=torch.Generator().manual_seed(0))  # (N, T)
    noisy = ids[:, None].clone()  # (N, S, T)
    noisy[..., ::3] = 2047
    return Calibration(ids, noisy, None, {"mask_id": "2047"}, held_out=0)


def scores_of(block, norms) -> list[torch.Tensor]:
    """Wanda scores of a block's projections."""
    pairs = [(role, norms[block.index, name]) for name, roles in READERS.items() for role in roles]
    return [wanda_scores(block[role].weight.detach(), norm) for role, norm in pairs]


def mean(values, sizes=None) -> float:
    sizes = sizes or [1] * len(values)
    return sum(size * value for size, value in zip(sizes, values)) / sum(sizes)


def test_outlier_share_by_hand():
    scores = [torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[6.0, 14.0]])]  # mean 4 over all six
    assert outlier_share(scores, 1.0) == pytest.approx(2 / 6)
    assert outlier_share(scores, 2.0) == pytest.approx(1 / 6)
    assert outlier_share(scores, 1.5) == pytest.approx(1 / 6)  # 6 is not above 6
    assert outlier_share(scores, 3.5) == 0


def test_outliers_of_relative_norms_do_not_depend_on_the_scale_of_the_stream(tiny_model, noise):
    """Embedding and what is added to it times 4: with norms in between the same model, if eps is small."""
    shares: dict[bool, list] = {True: [], False: []}
    for scale in (1, 4):
        model = tiny_model("llada", rms_norm_eps=1e-12)
        adapter = Adapter(model)
        with torch.no_grad():
            model.embedding.weight.mul_(scale)
            for block in adapter.blocks:
                for role in ("attention_output", "down"):
                    block[role].weight.mul_(scale)
        for relative in shares:
            norms = one_shot_norms(Scan(adapter, noise), "masked", relative=relative)
            shares[relative].append([outlier_share(scores_of(block, norms), 2.0) for block in adapter.blocks])
    one, four = shares[True]
    assert one == pytest.approx(four, abs=2e-4) and min(one) > 0  # two of 7680 weights may change sides
    assert max(abs(a - b) for a, b in zip(*shares[False])) > 0.01


def test_owl_by_hand():
    # kept over what is common: 2 · 0.1 · (0, 1, 0.5); mean 0.1
    assert owl_ratios([0.01, 0.05, 0.03], 0.5, 0.1) == pytest.approx([0.6, 0.4, 0.5])
    assert owl_ratios([0.01, 0.05, 0.03], 0.5, -0.1) == pytest.approx([0.4, 0.6, 0.5])
    # 2 · 0.08 · (1, 0, 0, 1/4); mean 0.05
    assert owl_ratios([0.5, 0.1, 0.1, 0.2], 0.7, 0.08) == pytest.approx([0.59, 0.75, 0.75, 0.71])


@pytest.mark.parametrize("spread", [0.08, -0.2, 0.0])
def test_owl_has_its_range_and_mean(spread):
    outliers = torch.rand(9, generator=torch.Generator().manual_seed(0)).tolist()
    ratios = owl_ratios(outliers, 0.5, spread)
    assert max(ratios) - min(ratios) == pytest.approx(2 * abs(spread))
    assert mean(ratios) == pytest.approx(0.5, abs=1e-12)
    order = sorted(range(9), key=outliers.__getitem__, reverse=spread > 0)
    assert [ratios[index] for index in order] == pytest.approx(sorted(ratios))


def test_blocks_that_do_not_differ_get_the_same():
    assert owl_ratios([0.02, 0.02], 0.3, 0.08) == [0.3, 0.3] == owl_ratios([0.02, 0.02], 0.3, -0.08)
    assert owl_ratios([0.7], 0.3, 0.08) == [0.3]


def test_uniform_is_the_ratio_itself():
    assert block_ratios(MaskingSettings(), 0.3, [10, 20, 30], None) == [0.3] * 3


def test_depth_by_hand():
    settings = MaskingSettings(allocation="depth", depth_slope=0.2)
    assert block_ratios(settings, 0.5, [7] * 3, None) == pytest.approx([0.6, 0.5, 0.4])
    settings = MaskingSettings(allocation="depth", depth_slope=-0.4)
    assert block_ratios(settings, 0.5, [7] * 5, None) == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    assert block_ratios(settings, 0.5, [7], None) == [0.5]


@pytest.mark.parametrize("allocation", ["owl", "depth"])
def test_blocks_of_different_sizes_meet_the_ratio_together(allocation):
    settings, sizes = MaskingSettings(allocation=allocation, owl_spread=0.1, depth_slope=0.2), [100, 300, 50]
    ratios = block_ratios(settings, 0.5, sizes, [0.01, 0.05, 0.03])
    assert mean(ratios, sizes) == pytest.approx(0.5, abs=1e-11)
    assert max(ratios) - min(ratios) == pytest.approx(0.2)
    if allocation == "owl":  # (0.6, 0.4, 0.5) would remove 205 of 450
        assert ratios == pytest.approx([0.6 + 20 / 450, 0.4 + 20 / 450, 0.5 + 20 / 450])


def test_a_ratio_is_met_to_the_last_weight_where_blocks_agree():
    outliers = [0.0, 0.1, 0.2, 0.30000000000000004, 0.4]
    assert block_ratios(MaskingSettings(allocation="owl"), 0.25, [1001] * 5, outliers)[2] == 0.25
    level = MaskingSettings(allocation="depth", depth_slope=0.0)
    for ratio in (0.1, 0.3, 0.6, 0.7):
        assert block_ratios(level, ratio, [1000] * 7, None) == [ratio] * 7


@pytest.mark.parametrize(
    "changes, ratio, message",
    [
        (
            {"allocation": "depth", "depth_slope": 0.5},
            0.9,
            r"masking.depth_slope = 0.5 gives block 0 the ratio 1.150 at",
        ),
        (
            {"allocation": "depth", "depth_slope": -0.5},
            0.2,
            r"masking.depth_slope = -0.5 gives block 0 the ratio -0.050",
        ),
        ({"allocation": "depth", "depth_slope": 1.0}, 0.5, r"gives block 0 the ratio 1.000 at 0.5"),
        ({"allocation": "owl", "owl_spread": 0.3}, 0.25, r"masking.owl_spread = 0.3 gives block 1 the ratio -0.05"),
        (
            {"allocation": "owl", "owl_spread": 0.08},
            0.0,
            r"gives block 1 the ratio -0.080 at 0.0: bring it nearer to 0$",
        ),
    ],
)
def test_ratios_outside_nought_and_one_are_refused(changes, ratio, message):
    with pytest.raises(UserError, match=message):
        block_ratios(MaskingSettings(**changes), ratio, [10, 10, 10], [0.1, 0.3, 0.2])


def test_a_block_may_lose_nothing():
    settings = MaskingSettings(allocation="depth", depth_slope=-0.4)
    assert block_ratios(settings, 0.2, [10, 10, 10], None) == pytest.approx([0, 0.2, 0.4])
