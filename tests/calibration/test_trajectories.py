"""Reverse trajectories: noisy copies are states of the model's own generation, kept and replayed as they are."""

import pytest
import torch

from structprune import Config, UserError, load_model
from structprune.calibration import trajectories
from structprune.calibration.batches import Calibration
from structprune.calibration.build import calibrate
from structprune.calibration.trajectories import (
    Generating,
    check_calibration,
    check_trajectory,
    prompt_length,
    reverse_calibration,
    reverse_states,
    state_steps,
    trajectory_of,
)
from structprune.generation.generate import generate
from structprune.generation.samplers import low_confidence
from structprune.models.adapter import Adapter
from structprune.models.journal import Journal
from structprune.progress import untracked
from structprune.runs.mask import MaskRun
from structprune.runs.pruner import Pruner
from structprune.runs.resolve import resolve_masking
from structprune.workers import ALONE
from tests.crowd import crowd

T, P = 32, 8
SMALL = {"calibration.windows": 3, "calibration.held_out": 2, "calibration.length": T, "calibration.interval": 10}
REVERSE = {"sink.trajectory": "reverse"}


@pytest.fixture(scope="module", params=["llada", "dream", "sdar"])
def model(request, shared_checkpoint):
    return load_model(shared_checkpoint(request.param))


@pytest.fixture
def config(text_path):
    """`config(**changes)` of a small run on local text."""
    return lambda **changes: Config.load(overrides=SMALL | {"calibration.source": str(text_path)} | changes)


def make(model, config, track=untracked, calibration=None) -> Calibration:
    """What a run of the configuration reads."""
    if config.method == "structured":
        return Pruner(model, config, calibration, track).calibration
    return MaskRun(model, resolve_masking(config, model), calibration, track).calibration


def test_states_stand_at_the_times_of_the_forward_levels():
    # 50 steps at intervals of 10, enough tokens: 10, 20, 30, 40, 50 steps are left
    assert state_steps(50, 10, 50) == [40, 30, 20, 10, 0]
    # of 24 steps 4.8, 9.6, 14.4, 19.2 and 24 are left, rounded up
    assert state_steps(50, 10, 24) == [19, 14, 9, 4, 0]
    assert state_steps(50, 10, 60) == [48, 36, 24, 12, 0]  # blocks of a block diffusion model have a step each
    assert state_steps(50, 20, 2) == [1, 0] and state_steps(50, 50, 10) == [0]
    for steps in range(1, 13):
        for interval in range(1, steps + 1):
            for count in range(steps // interval, 30):
                result = state_steps(steps, interval, count)
                assert len(set(result)) == steps // interval and result == sorted(result, reverse=True)
                assert result[-1] >= 0 and result[0] < count


def test_a_quarter_is_prompt():
    assert [prompt_length(length) for length in (2, 4, 8, 9, 4096)] == [1, 1, 2, 2, 1024]


def test_copies_are_states_of_one_generation(model, config):
    made = make(model, config(**REVERSE))
    mask, fit = model.config.mask_token_id, made.fit
    assert fit.noisy_ids.shape == (3, 5, T) and trajectory_of(made) == "reverse"
    hidden = fit.noisy_ids == mask  # (N, S, T)
    assert not hidden[..., :P].any()  # the prompt is never masked
    assert (hidden[:, :-1] <= hidden[:, 1:]).all()  # what is revealed at a level stays so at every later step
    counts = hidden.sum(-1)  # (N, S)
    assert (counts[:, 1:] > counts[:, :-1]).all() and (counts[:, -1] == T - P).all()
    # what is revealed is what the final text has there
    assert torch.equal(
        torch.where(hidden, fit.input_ids[:, None], fit.noisy_ids), fit.input_ids[:, None].expand(3, 5, T)
    )
    forward = calibrate(model, config())
    assert torch.equal(fit.input_ids[:, :P], forward.fit.input_ids[:, :P])
    assert not torch.equal(fit.input_ids, forward.fit.input_ids)


@pytest.mark.slow
def test_copies_are_the_models_own(model, config):
    """A window's final text is what the sampler generates, and every reveal is the model's surest prediction."""
    fit = make(model, config(**REVERSE)).fit
    settings = low_confidence(model.config, T - P, 24)
    assert torch.equal(generate(model, fit.input_ids[:, :P], settings), fit.input_ids)
    mask, adapter = model.config.mask_token_id, Adapter(model)
    indices = torch.arange(24).expand(3, -1)  # (N, 24)
    final, states = reverse_states(model, fit.input_ids[:, :P], settings, indices)  # (N, 24, T)
    assert torch.equal(final, fit.input_ids)
    for before, after in zip(states.unbind(1), [*states.unbind(1)[1:], final]):  # (N, T) each
        with torch.no_grad():
            logits = adapter.model(before).logits  # (N, T, V)
        if model.shifted:
            logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)  # (N, T, V)
        sure, token = logits.softmax(-1).max(-1)  # (N, T) each
        hidden = before == mask
        revealed = hidden & (after != mask)  # (N, T)
        assert torch.equal(after[revealed], token[revealed])
        if settings.aligned:  # the surest of the block that is being filled
            places = (torch.arange(T) // settings.block_tokens).masked_fill(~hidden, T)  # (N, T)
            hidden &= places == places.amin(1, keepdim=True)
        for row in range(len(before)):
            if revealed[row].any() and (hidden & ~revealed)[row].any():
                assert sure[row, revealed[row]].min() >= sure[row, (hidden & ~revealed)[row]].max() - 1e-6


def test_windows_need_not_be_a_number_of_blocks(shared_checkpoint, config):
    """Blocks of 4 tokens: 7 of a prompt, of which 3 begin the first of 7 blocks."""
    sdar = load_model(shared_checkpoint("sdar"))
    made = make(sdar, config(**REVERSE, **{"calibration.length": 30}))
    masked = (made.fit.noisy_ids == sdar.config.mask_token_id).sum(-1)  # (N, S)
    assert made.metadata["generation_steps"] == "28" and (masked[:, -1] == 23).all() and (masked.diff(dim=1) > 0).all()
    assert not (made.fit.input_ids == sdar.config.mask_token_id).any()


def test_dealt_copies_are_the_states_at_the_dealt_levels(model, config):
    """Those that a run with all levels has for the same windows, each level in as many windows as any other."""
    few = make(model, config(**REVERSE, **{"calibration.windows": 5, "calibration.copies": 2}))
    every = make(model, config(**REVERSE, **{"calibration.windows": 5})).fit
    assert few.fit.noisy_ids.shape == (5, 2, T) and few.metadata["copies"] == "2"
    assert torch.equal(few.fit.input_ids, every.input_ids)
    equal = (few.fit.noisy_ids[:, :, None] == every.noisy_ids[:, None]).all(-1)  # (N, 2, 5)
    assert (equal.sum(-1) == 1).all()
    levels = equal.long().argmax(-1)  # (N, 2)
    assert levels.flatten().bincount().tolist() == [2, 2, 2, 2, 2] and (levels.diff(dim=1) >= 2).all()
    assert torch.equal(few.fit.mask_probability, every.mask_probability.gather(1, levels))
    forward = calibrate(model, config(**{"calibration.windows": 5, "calibration.copies": 2}))
    assert torch.equal(few.check.noisy_ids, forward.check.noisy_ids) and few.check.levels == 2
    if model.config.model_type == "llada":  # Dream's forward times are no levels
        times = (forward.fit.mask_probability - 1e-3) / 0.999  # (N, 2)
        assert torch.equal((times * 5).round().long() - 1, levels)


def test_the_mask_probability_is_the_masked_share_of_what_is_generated(model, config):
    fit = make(model, config(**REVERSE)).fit
    masked = (fit.noisy_ids == model.config.mask_token_id).sum(-1)  # (N, S)
    assert torch.allclose(fit.mask_probability, masked / (T - P))
    assert (fit.mask_probability[:, -1] == 1).all() and (fit.mask_probability > 0).all()


def test_held_out_windows_are_those_of_the_forward_trajectory(model, config):
    reverse, forward = make(model, config(**REVERSE)).check, make(model, config()).check
    assert torch.equal(reverse.input_ids, forward.input_ids) and torch.equal(reverse.noisy_ids, forward.noisy_ids)
    assert torch.equal(reverse.mask_probability, forward.mask_probability)


def test_forward_is_what_it_was(model, config):
    made, before = make(model, config()), calibrate(model, config())
    assert torch.equal(made.noisy_ids, before.noisy_ids) and torch.equal(made.input_ids, before.input_ids)
    assert made.metadata == before.metadata and trajectory_of(made) == "forward"


@pytest.mark.slow
def test_the_seed_alone_decides(model, config):
    titles = []

    def track(items, title):
        titles.append((title, len(items)))
        return items

    one = make(model, config(**REVERSE), track)
    again = make(model, config(**REVERSE, **{"calibration.batch": 2}))
    other = make(model, config(**REVERSE, **{"calibration.seed": 1}))
    assert torch.equal(one.noisy_ids, again.noisy_ids) and torch.equal(one.input_ids, again.input_ids)
    assert not torch.equal(one.noisy_ids, other.noisy_ids)
    assert titles == [("reverse trajectories", 24)]  # 5 sequences fit a batch of one window with its copies


@pytest.mark.slow
def test_the_batch_counts_as_the_method_does(model, config):
    counts = []
    for method in ("structured", "unstructured"):
        track = lambda items, title: counts.append(len(items)) or items  # noqa: E731
        make(model, config(**REVERSE, method=method, **{"calibration.batch": 2}), track)
    assert counts == [24, 24, 24]  # two windows with 5 copies each hold the 3; single sequences need two batches


@pytest.mark.parametrize("count", [1, 2])
def test_generations_are_kept_batch_by_batch(model, config, tmp_path, monkeypatch, count):
    """A process of two has a window more, and the last pass none for one of them."""
    settings = config(**REVERSE, **{"calibration.windows": 5}).calibration
    forward = calibrate(model, config(**{"calibration.windows": 5}))
    expected = reverse_calibration(model, forward, settings, Generating(2))
    made, states = [], trajectories.reverse_states

    def counted(model, prompts, **named):
        made.append(len(prompts))
        return states(model, prompts, **named)

    monkeypatch.setattr(trajectories, "reverse_states", counted)

    def run(workers=ALONE):
        how = Generating(2, workers=workers, journal=Journal(tmp_path, workers=workers))
        return reverse_calibration(model, forward, settings, how)

    for result in crowd(count, run) if count > 1 else [run()]:
        assert torch.equal(result.noisy_ids, expected.noisy_ids) and torch.equal(result.input_ids, expected.input_ids)
    assert sorted(made) == [1, 2, 2]
    made.clear()
    (tmp_path / "whole.safetensors").unlink()
    (last,) = tmp_path.glob(f"{'3-of-3' if count == 1 else '2-of-2'}*")
    last.unlink()
    for result in crowd(count, run) if count > 1 else [run()]:  # as after a kill in the last pass
        assert torch.equal(result.noisy_ids, expected.noisy_ids)
    assert made == [1]
    assert torch.equal(run().noisy_ids, expected.noisy_ids) and made == [1]  # one process takes the whole of two


def test_an_interrupted_generation_is_still_to_be_made(model, config, monkeypatch):
    pruner, make_states = Pruner(model, config(**REVERSE)), trajectories.reverse_states

    def end(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(trajectories, "reverse_states", end)
    with pytest.raises(KeyboardInterrupt):
        pruner.generate()
    monkeypatch.setattr(trajectories, "reverse_states", make_states)
    assert pruner.generates and trajectory_of(pruner.calibration) == "reverse" and not pruner.generates


def test_a_saved_one_is_replayed(model, config, tmp_path):
    made, path = make(model, config(**REVERSE)), tmp_path / "saved.safetensors"
    made.save(path)
    replayed = make(model, Config.load(overrides={"calibration.source": str(path)}))
    for name in ("input_ids", "noisy_ids", "mask_probability"):
        assert torch.equal(getattr(replayed, name), getattr(made, name))
    assert trajectory_of(replayed) == "reverse" and replayed.held_out == 2
    assert replayed.metadata["prompt_tokens"] == str(P) and replayed.metadata["generation_steps"] == "24"
    check_calibration(replayed, Config.load(overrides=REVERSE))
    with pytest.raises(UserError, match="sink.trajectory = forward has no effect: .* was made with reverse"):
        check_calibration(replayed, Config.load(overrides={"sink.trajectory": "forward"}))
    with pytest.raises(UserError, match="sink.trajectory = reverse has no effect: .* was made with forward"):
        make(model, config(**REVERSE), calibration=calibrate(model, config()))


UNSTABLE = {"sink.policy": "unstable"}
REFUSED = {
    "compares the noise levels of a window, of which calibration.interval = 50 leaves 1:": UNSTABLE
    | {"calibration.interval": 50},
    "calibration.interval = 26 leaves 1: use calibration.interval at most half of calibration.steps": UNSTABLE
    | {"calibration.interval": 26},
    "calibration.copies = 1 leaves 1: raise it, or use sink.policy = all$": UNSTABLE | {"calibration.copies": 1},
    "calibration.length = 8 leaves 6 tokens to generate, which have no 10 different": REVERSE
    | {"calibration.length": 8},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_met_is_refused(message):
    with pytest.raises(UserError, match=message):
        check_trajectory(Config.load(overrides=REFUSED[message]))


def test_two_copies_have_levels_to_compare():
    check_trajectory(Config.load(overrides=UNSTABLE | {"calibration.copies": 2}))


def test_one_level_of_a_calibration_that_is_there_is_refused():
    ids = torch.arange(64).view(2, 32)
    one = Calibration(ids, ids[:, None].clone(), None, {}, held_out=1)
    with pytest.raises(UserError, match="of which the calibration has 1: use one made with calibration.interval"):
        check_calibration(one, Config.load(overrides=UNSTABLE))
    check_calibration(one, Config())


def test_a_prompt_with_a_mask_token_is_refused(model):
    prompts = torch.full((1, 4), model.config.mask_token_id)
    with pytest.raises(UserError, match="prompt 0 holds the mask token"):
        reverse_states(model, prompts, low_confidence(model.config, 4, 2), torch.tensor([[0]]))


def test_windows_for_both_uses_are_asked_for():
    ids = torch.arange(64).view(2, 32)
    none, every = (Calibration(ids, ids[:, None].clone(), None, {}, held_out=count) for count in (0, 2))
    with pytest.raises(UserError, match="^all 2 windows of the calibration are held out: leave some to fit on$"):
        check_calibration(every, Config())
    masks = {"method": "unstructured", "masking.score": "wanda"}
    with pytest.raises(UserError, match="holds out no window .*: make one that does$"):
        check_calibration(none, Config())
    with pytest.raises(UserError, match="make one that does, or set reconstruct.enabled = false$"):
        check_calibration(none, Config.load(overrides=masks))
    check_calibration(none, Config.load(overrides=masks | {"reconstruct.enabled": False}))
