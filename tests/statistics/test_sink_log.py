"""What a policy took: levels in the order of their noise, whatever the order the mass came in."""

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.layers_structprune import Layout
from structprune.statistics.sink_log import SinkLog

MASK = 9
HARD = SinkSettings(mask="hard", kappa=1.0)


def windows(p) -> Calibration:
    ids = torch.arange(4).repeat(2, 1)  # (N, T)
    noisy = ids[:, None].repeat(1, 2, 1)  # (N, S, T)
    noisy[0, 0, 0] = noisy[1, 1, :2] = MASK
    return Calibration(ids, noisy, p, {}, held_out=0)


# window 0 has its sink in the first copy, window 1 in the second
MASS = torch.tensor([[[4.0, 0, 0, 0], [1.0, 1, 1, 1]], [[1.0, 1, 1, 1], [0, 4.0, 0, 0]]])


@pytest.mark.parametrize("parts", [[2, 2], [1, 3], [4]])
def test_levels_are_sorted_by_their_mask_probability(parts):
    log = SinkLog()
    for part in MASS.flatten(0, 1).split(parts):
        log.observe(part)
    effect = log.report(windows(torch.tensor([[0.9, 0.1], [0.1, 0.9]])), HARD, MASK, Layout())["taken"]["all"]
    assert effect["by_level"] == [0.0, 0.25] and effect["by_kind"]["mask"] == pytest.approx(2 / 3)
    plain = log.report(windows(None), HARD, MASK, Layout())
    assert plain["taken"]["all"]["by_level"] == [0.125, 0.125]  # as they are, where no probability is known
    assert plain["mask_share"] == [0.125, 0.25]


def test_one_copy_each_has_no_instability():
    """Windows at different levels: one row each, whose variance over levels is unknown, not 0."""
    log = SinkLog()
    log.observe(MASS[:, 0])
    both = windows(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    one = Calibration(both.input_ids, both.noisy_ids[:, :1], both.mask_probability[:, :1], {}, held_out=0)
    report = log.report(one, HARD, MASK, Layout())
    assert report["instability"] is None and report["survival"] == 1.0 and list(report["taken"]) == ["all"]
    assert report["taken"]["all"]["by_level"] == [0.125] and report["mask_share"] == [0.125]


def test_what_is_seen_again_counts_once():
    log = SinkLog()
    log.observe(MASS)
    once = log.report(windows(None), HARD, MASK, Layout())
    log.observe(torch.rand(MASS.shape))
    assert log.report(windows(None), HARD, MASK, Layout()) == once


def test_nothing_seen():
    assert SinkLog().report(windows(None), HARD, MASK, Layout()) is None
