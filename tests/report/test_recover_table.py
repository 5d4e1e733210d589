"""What is said of a recovery beside its table."""

import pytest

from structprune.report.recover_table import no_gain


def change(**means):
    """What changed, by loss, each with a standard error of 0.002."""
    return {name: {"mean": mean, "standard_error": 0.002} for name, mean in means.items()}


def said(kept, changes, **loss):
    """The lines of a recovery whose divergence decides."""
    weights = {"kl": 1.0, "cross_entropy": 0.0, "causal": None} | loss
    return no_gain({"kept": kept, "change": changes, "config": {"loss": weights}}, "of the input")


FELL = change(kl=-0.1, nelbo=-0.2)


def test_a_line_says_where_the_weights_are_not_those_learnt_last():
    assert said("trained", FELL) == []
    [line] = no_gain({"kept": "input", "change": change(kl=0.1, nelbo=0.2)}, "that were pruned")
    assert line.endswith("the weights written are those that were pruned.")
    [line] = said("blocks", FELL)
    assert line.startswith("No gain of the second stage") and line.endswith("are those of the first.")


@pytest.mark.parametrize("kept, first", [("trained", 0), ("blocks", 1)])
def test_a_line_says_which_loss_rose_while_what_decides_fell(kept, first):
    lines = said(kept, change(kl=-0.1, nelbo=0.0123))
    assert lines[first:] == [
        "The NELBO of the held-out text rose by 0.0123 ± 0.0020 nats per token: raise loss.cross_entropy to weigh it"
        " more."
    ]
    for chance in (0.00004, 0.0039):  # less than two standard errors
        assert said(kept, change(kl=-0.1, nelbo=chance))[first:] == []


def test_losses_of_a_model_that_is_causal_too_are_named():
    rose = change(kl=0.1, nelbo=-0.5, causal_kl=0.2, causal_ce=0.3)
    lines = said("trained", rose, causal=0.5)
    assert [line.split(" rose ")[0] for line in lines] == [
        f"{name} of the held-out text"
        for name in ("The divergence from the teacher", "The divergence at next tokens", "The loss of next tokens")
    ]
    keys = [line.split("raise ")[1].split()[0] for line in lines]
    assert keys == ["loss.kl", "loss.causal", "loss.cross_entropy"]  # of a product, the key that holds it down
