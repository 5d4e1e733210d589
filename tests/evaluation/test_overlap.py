"""Runs of tokens that evaluation and calibration text share."""

import torch

from structprune.evaluation.overlap import RUN, SPAN, CalibratedOn, KnownText, marks

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


def test_marks_of_a_training_find_every_passage_of_31_tokens_and_some_shorter_ones():
    windows = torch.randint(1000, (4, 512), generator=torch.Generator().manual_seed(0))
    known = KnownText(marks(windows))
    assert 0.18 < len(known._known) / (4 * (512 - RUN + 1)) < 0.26  # 2 of SPAN + 1 = 9
    passage = RUN + SPAN - 1
    assert all(known.shares(windows[2, start : start + passage]) for start in range(512 - passage + 1))
    shorter = [known.shares(windows[2, start : start + RUN]) for start in range(512 - RUN + 1)]
    assert 0.18 < sum(shorter) / len(shorter) < 0.26
    others = torch.randint(1000, (4, 512), generator=torch.Generator().manual_seed(1))
    assert not any(known.shares(row) for row in others)


def test_marks_of_short_windows_are_all_their_runs():
    windows = torch.arange(60).view(2, 30)
    assert (marks(windows) == CalibratedOn(windows)._known).all() and len(marks(windows)) == 2 * (30 - RUN + 1)
    assert len(marks(torch.arange(20)[None])) == 0


def test_what_was_not_learnt_leaves_no_mark():
    windows, learnt = torch.arange(200).view(2, 100), torch.zeros(2, 100, dtype=torch.bool)
    learnt[1, 40:80] = True
    known = KnownText(marks(windows, learnt))
    assert not known.shares(windows[0]) and not known.shares(windows[1, :63]) and known.shares(windows[1, 40:80])
