"""Logits a slice at a time."""

from structprune.models import logits
from structprune.models.logits import logit_slices


def test_logits_are_cut_to_a_limit(monkeypatch):
    monkeypatch.setattr(logits, "LOGIT_BYTES", 4 * 10 * 3 + 8)
    cut = lambda *args: [(each.start, each.stop) for each in logit_slices(*args)]  # noqa: E731
    assert cut(7, 10) == [(0, 3), (3, 6), (6, 7)]
    assert cut(3, 10, 2) == [(0, 1), (1, 2), (2, 3)]
    assert cut(2, 1000) == [(0, 1), (1, 2)]  # one at least
    assert cut(0, 10) == []
