"""Denormal numbers count as 0 while a training runs, and only then."""

import pytest
import torch

from structprune.models.denormals import TINY, flushed_denormals, flushing

CAN = torch.set_flush_denormal(True)
torch.set_flush_denormal(False)


@pytest.mark.skipif(not CAN, reason="this CPU cannot flush denormal numbers")
def test_products_of_denormals_are_zero_only_while_it_is_open():
    tiny = torch.full((4,), TINY)  # (4,)
    assert (tiny * 1.0).tolist() == tiny.tolist() and not flushing()
    with flushed_denormals():
        assert (tiny * 1.0).tolist() == [0, 0, 0, 0] and flushing()
        with flushed_denormals():
            pass
        assert flushing()  # the outer one is still open
    assert (tiny * 1.0).tolist() == tiny.tolist()


@pytest.mark.skipif(not CAN, reason="this CPU cannot flush denormal numbers")
def test_an_error_closes_it():
    with pytest.raises(KeyError), flushed_denormals():
        raise KeyError
    assert not flushing()
