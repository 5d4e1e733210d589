"""Runs of tokens that evaluation and calibration text share."""

import torch

from structprune.evaluation.overlap import RUN, CalibratedOn

WINDOWS = torch.arange(200).view(2, 100)  # runs may not cross from one window into the next


def test_a_run_in_the_middle_is_found():
    known = CalibratedOn(WINDOWS)
    text = torch.full((60,), 999)
    assert not known.shares(text)
    text[20 : 20 + RUN] = torch.arange(30, 30 + RUN)
    assert known.shares(text)
    text[20 + RUN - 1] = 999  # one token less in a row
    assert not known.shares(text)


def test_windows_are_apart():
    assert not CalibratedOn(WINDOWS).shares(torch.arange(90, 90 + RUN))  # 90..99 | 100..113


def test_short_texts_share_nothing():
    assert not CalibratedOn(WINDOWS).shares(torch.arange(RUN - 1)) and CalibratedOn(WINDOWS).shares(torch.arange(RUN))
    assert not CalibratedOn(torch.arange(10)[None]).shares(torch.arange(100))


def test_order_and_zeros_count():
    """Of ids 0, a hash without an offset would see nothing."""
    known = CalibratedOn(torch.zeros(1, RUN, dtype=torch.long))
    assert known.shares([0] * RUN) and not known.shares([0] * (RUN - 1) + [1])
    assert not CalibratedOn(torch.arange(RUN)[None]).shares(torch.arange(RUN).flip(0))


def test_the_share_of_texts():
    texts = [torch.arange(RUN), torch.full((50,), 7), torch.arange(50, 90), torch.arange(5)]
    assert CalibratedOn(WINDOWS).share(texts) == 0.5
    assert CalibratedOn(WINDOWS).share([]) == 0
