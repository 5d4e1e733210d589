"""Passes over windows that are stopped after any of their parts go on to the same sums, and repeat no part."""

from dataclasses import replace

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.errors import Interrupted
from structprune.models.adapter import Adapter
from structprune.models.journal import Journal
from structprune.statistics.moments import as_tensors, consumer_moments
from structprune.statistics.norms import one_shot_norms
from structprune.statistics.rows import measure_mass
from structprune.statistics.scan import Limits, Scan
from tests.crowd import crowd

MASK, WINDOWS = 2047, 5
SINK = SinkSettings(alpha=0.7, kappa=0.5)


def moments_of(arm):
    return lambda scan: as_tensors(consumer_moments(scan, arm))


def norms_of(arm, **more):
    return lambda scan: {str(key): norm for key, norm in one_shot_norms(scan, arm, **more).items()}


PASSES = {
    "moments": (moments_of("masked"), 1), "moments, sinks": (moments_of("masked+sink"), 1),
    "moments, clean sinks": (moments_of("clean+sink"), 2), "norms": (norms_of("masked", summed=True), 2),
    "norms, sinks": (norms_of("masked+sink", relative=True), 2), "mass": (lambda scan: {"mass": measure_mass(scan)}, 2),
}  # fmt: skip


@pytest.fixture
def calibration() -> Calibration:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 90, (WINDOWS, 12), generator=generator)
    noisy = ids[:, None].repeat(1, 2, 1)  # (N, S, T)
    noisy[torch.rand(noisy.shape, generator=generator) < 0.5] = MASK
    return Calibration(ids, noisy, torch.full((WINDOWS, 2), 0.5), {}, held_out=0)


@pytest.fixture
def scan(tiny_model, calibration):
    """`scan(journal, masses, **more)`: one window in a pass; observed attention mass goes to the list `masses`."""
    adapters = [Adapter(tiny_model()) for _ in range(2)]  # equal ones, a model for each process

    def make(journal, masses=None, **more):
        adapter = adapters[more["workers"].rank if "workers" in more else 0]
        observe = (masses if masses is not None else []).append
        own = calibration if "workers" not in more else calibration.share(more["workers"])
        return Scan(adapter, own, SINK, Limits(windows=1), observe=observe, journal=journal, **more)

    return make


class Ending(Journal):
    """A journal that ends a run after its first part."""

    def keep(self, *given, **named):
        super().keep(*given, **named)
        raise Interrupted("stopped")


def flat(masses):
    return torch.cat([mass.flatten(0, -2) for mass in masses]) if masses else torch.empty(0)


@pytest.mark.parametrize("measure, passes", PASSES.values(), ids=PASSES)
def test_a_pass_stopped_after_every_part_is_the_undisturbed_one(scan, tmp_path, measure, passes):
    undisturbed, titles = [], []
    expected = measure(scan(Journal(), undisturbed))
    result, stops = None, 0
    while result is None:
        masses = []
        track = lambda items, title: titles.append(len(items)) or items  # noqa: E731
        try:
            result = measure(scan(Ending(tmp_path), masses, track=track))
        except Interrupted:
            stops += 1
    assert WINDOWS <= stops <= 10 + 10 and result.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in result.items())
    assert torch.equal(flat(masses), flat(undisturbed))  # each once, in order
    assert titles[:WINDOWS] == [5, 4, 3, 2, 1] or titles[:3] == [10, 9, 8]  # batches left: of windows, or of sequences


@pytest.mark.parametrize("measure, passes", PASSES.values(), ids=PASSES)
def test_parts_of_other_batches_are_not_taken(scan, tmp_path, measure, passes):
    """As many batches of other rows: 5 windows by 4 and by 3, or 10 sequences by 8 and by 6."""
    few, more = (Limits(windows=size, batch=2 * size) for size in (3, 4))
    with pytest.raises(Interrupted):
        measure(replace(scan(Ending(tmp_path)), limits=more))
    expected = measure(replace(scan(Journal()), limits=few))
    result = measure(replace(scan(Journal(tmp_path)), limits=few))
    assert all(torch.equal(value, expected[key]) for key, value in result.items())


@pytest.mark.parametrize("measure", [PASSES["moments, sinks"][0], PASSES["norms, sinks"][0]])
def test_parts_of_two_processes_are_their_own(scan, tmp_path, measure):
    """One has a window more; the parts of two are no parts of one."""

    def run(directory):
        def work(workers):
            masses = []
            sums = measure(scan(Journal(directory, workers=workers), masses, workers=workers))
            return sums, flat(masses)

        return crowd(2, work)

    undisturbed, first = run(None), run(tmp_path)
    (kept,) = (path for path in tmp_path.glob("*.safetensors"))
    assert kept.name.endswith(("-by-2-2-3.safetensors", "-by-1-4-6.safetensors"))
    for results in (first, run(tmp_path)):
        for (sums, mass), (expected, observed) in zip(results, undisturbed):
            assert all(torch.equal(value, expected[key]) for key, value in sums.items())
            assert torch.equal(mass, observed)
    alone = measure(scan(Journal(tmp_path)))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert all(torch.allclose(value, undisturbed[0][0][key], rtol=1e-4, atol=1e-6) for key, value in alone.items())
