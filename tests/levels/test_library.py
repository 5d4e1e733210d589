"""A library of levels against single refits, stitched plans against cut models, and walks that were interrupted."""

import shutil

import pytest
import torch

from structprune.calibration.batches import Calibration
from structprune.config import ReconstructSettings, StructuredSettings
from structprune.errors import UserError
from structprune.evaluation.fidelity import masked_kl, process_divergence, reference_predictions
from structprune.levels import build
from structprune.levels.build import Recipe, build_library
from structprune.levels.library import Library, counts_of, plain_counts
from structprune.levels.stitch import ReferenceWindows, StitchedModel, consumer_biases
from structprune.models.adapter import Adapter
from structprune.refit.reconstruct import Reconstructor
from structprune.refit.walk import Walk
from structprune.statistics.scan import Limits, Scan
from structprune.structured.plan import identity_plan, make_plan
from structprune.structured.surgery import apply_plan
from structprune.workers import Workers
from tests.tiny_values import DENSE

MASK, LENGTH = 2047, 12
CHANNELS = (0, 8, 24, 48)
CONSUMERS = {"producers": False, "stream": 0}  # a library's readers are those of no cut model
CASES = {
    "consumers": {},
    "everything": {"producers": True, "stream": 1.0, "head": True, "visible": 0.5, "target": "mixed"},
    "constant": {"constant": True},
}


@pytest.fixture
def calibration() -> Calibration:
    """The held-out windows are among those that are fitted, so that refits are gains."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 90, (36, LENGTH), generator=generator)
    noisy = ids[:, None].clone()  # (N, 1, T)
    noisy[torch.rand(noisy.shape, generator=generator) < 0.5] = MASK
    ids, noisy = (torch.cat((each, each[:8])) for each in (ids, noisy))
    return Calibration(ids, noisy, torch.full((44, 1), 0.5), {}, held_out=8)


class Bench:
    """One model with a library around a plan in which every block loses something."""

    def __init__(self, model, calibration, directory, gone=(), **settings):
        self.model, self.calibration, self.adapter = model, calibration, Adapter(model)
        heads = range(4 if self.adapter.family.name == "llada" else 3)  # one more step would take the attention
        self.grids = {
            (index, kind): CHANNELS if kind == "channels" else (0, 1, heads.stop)
            for index in range(3)
            for kind in ("attention", "channels")
        }
        self.counts = {key: grid[1 + (key[0] == 1)] if key[1] == "channels" else 1 for key, grid in self.grids.items()}
        self.counts |= {key: self.grids[key][-1] for key in gone}  # the whole part
        self.reconstruct = ReconstructSettings(damping=(0.05,), **CONSUMERS | settings)
        self.recipe = Recipe(StructuredSettings(), self.reconstruct)
        scan = Scan(self.adapter, calibration, limits=Limits(windows=5))
        self.walk, self.scan = Walk(scan, self.reconstruct), scan
        self.library = Library(directory, {"case": 1}, self.grids, self.counts)
        self.small = self.build()

    def build(self):
        small = apply_plan(self.model, identity_plan(self.adapter), self.reconstruct.adds_bias)
        build_library(self.walk, small, self.library, self.recipe)
        return small

    def plan(self, counts):
        paths = {key: self.library.path(key) for key in self.grids}
        return make_plan(self.adapter, paths, counts, "query_heads")

    def judge(self, budget=2**30):
        check = self.calibration.check
        reference, _ = reference_predictions(self.model, check.input_ids, check.noisy_ids, top=2048)
        limits = Limits(windows=3, budget=budget)
        return ReferenceWindows(check.input_ids, check.noisy_ids, check.mask_probability, reference, limits)

    def stitched(self, budget=2**30):
        constant = self.reconstruct.constant
        biases = consumer_biases(self.adapter)
        return StitchedModel(self.small, self.library, self.counts, biases, self.judge(budget), constant)

    def divergence(self, model) -> float:
        judge = self.judge()
        fidelity = masked_kl(model, judge.input_ids, judge.noisy_ids, judge.reference)
        return process_divergence(fidelity, judge.mask_probability, LENGTH)


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("case", CASES)
def test_the_current_plan_is_what_its_refit_gives(tiny_model, calibration, tmp_path, family, case):
    changes = {"include_bias": True} if (family, case) == ("llada", "consumers") else {}
    bench = Bench(tiny_model(family, **changes), calibration, tmp_path / "levels", **CASES[case])
    plan = bench.plan(bench.counts)
    cut = apply_plan(bench.model, plan, bench.reconstruct.adds_bias)
    Reconstructor(bench.scan, bench.reconstruct).refit(cut, plan.remaining)
    expected = bench.divergence(cut)
    assert bench.divergence(bench.small) == pytest.approx(expected, rel=2e-3)
    assert bench.stitched().loss(bench.counts) == pytest.approx(expected, rel=2e-3)
    assert expected > 1e-3  # something was lost


@pytest.mark.parametrize("gone", [[(2, "attention")], [(0, "channels"), (1, "attention"), (1, "channels")]])
def test_a_current_plan_without_whole_parts(tiny_model, calibration, tmp_path, gone):
    """Behind the last attention that is left, both fit to the positions with a prediction alone."""
    bench = Bench(tiny_model("dream"), calibration, tmp_path / "levels", gone=gone)
    plan = bench.plan(bench.counts)
    cut = apply_plan(bench.model, plan)
    Reconstructor(bench.scan, bench.reconstruct).refit(cut, plan.remaining)
    assert bench.stitched().loss(bench.counts) == pytest.approx(bench.divergence(cut), rel=2e-3)


def test_what_keeps_all_units_is_not_ordered(tiny_model, calibration, tmp_path, monkeypatch):
    """Protected blocks have no grid."""
    bench, original, ordered = Bench(tiny_model(), calibration, tmp_path / "levels"), build.obs.obs_path, []
    monkeypatch.setattr(build.obs, "obs_path", lambda *args: ordered.append(1) or original(*args))
    grids = {key: grid for key, grid in bench.grids.items() if key[0] == 1}
    bench.library = Library(tmp_path / "other", {}, grids, {key: bench.counts[key] for key in grids})
    bench.build()
    assert len(ordered) == 2 and bench.library.path((0, "channels")).removed(2) == [0, 1]


@pytest.mark.parametrize("family", DENSE)
def test_other_plans_are_measured_as_cut_models(tiny_model, calibration, tmp_path, family):
    """Also without an attention or MLP; the model is the current plan's again afterwards."""
    bench = Bench(tiny_model(family), calibration, tmp_path / "levels")
    stitched, whole = bench.stitched(), bench.grids[2, "attention"][-1]
    start = stitched.loss(bench.counts)
    for change in ({(2, "channels"): 24}, {(1, "attention"): whole, (0, "channels"): 0}, {(2, "channels"): 48}):
        counts = bench.counts | change
        plan = bench.plan(counts)
        cut = apply_plan(bench.model, plan)
        for place, index in enumerate(plan.remaining):
            for kind in plan.blocks[index].kinds:
                weight = bench.library.weight((index, kind), counts[index, kind])
                role = "down" if kind == "channels" else "attention_output"
                units = plan.blocks[index].channels if kind == "channels" else plan.blocks[index].query_heads
                width = 1 if kind == "channels" else 8
                columns = [unit * width + column for unit in units for column in range(width)]
                Adapter(cut).blocks[place][role].weight = torch.nn.Parameter(weight[:, columns])
        assert stitched.loss(counts) == pytest.approx(bench.divergence(cut), rel=1e-3)
    assert stitched.loss(bench.counts) == start
    assert bench.stitched(budget=0).loss(bench.counts | {(2, "channels"): 24}) == pytest.approx(
        stitched.loss(bench.counts | {(2, "channels"): 24}), rel=1e-5
    )


def test_a_share_of_the_windows(tiny_model, calibration, tmp_path):
    bench = Bench(tiny_model(), calibration, tmp_path / "levels")
    judge = bench.judge()
    few = [each[:2] for each in (judge.input_ids, judge.noisy_ids, judge.mask_probability)]
    reference, _ = reference_predictions(bench.model, *few[:2], top=2048)
    fidelity = masked_kl(bench.small, *few[:2], reference)
    expected = process_divergence(fidelity, few[2], LENGTH)
    assert bench.stitched().loss(bench.counts, share=0.25) == pytest.approx(expected, rel=1e-4)


def test_levels_are_refits_of_their_own(tiny_model, calibration, tmp_path):
    """Wider levels lose less on the held-out rows, and removed inputs are not read."""
    bench = Bench(tiny_model(), calibration, tmp_path / "levels")
    for key, grid in bench.grids.items():
        errors = bench.library.errors(key)
        assert list(errors) == list(grid) and errors[grid[-1]] == 1.0
        assert errors[grid[0]] < errors[grid[-2]] < 1
        width = 1 if key[1] == "channels" else 8
        for steps in grid:
            weight = bench.library.weight(key, steps).view(32, -1, width)
            gone = bench.library.path(key).removed(steps)
            assert (weight[:, gone] == 0).all() and (weight.abs().sum((0, 2)) > 0).sum() == weight.shape[1] - len(gone)


@pytest.mark.parametrize("case", ["consumers", "everything"])
def test_an_interrupted_walk_goes_on_at_its_block(tiny_model, calibration, tmp_path, monkeypatch, case):
    model = tiny_model("dream")
    whole = Bench(model, calibration, tmp_path / "whole", **CASES[case])
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / "block-002.safetensors").unlink()
    (tmp_path / "part" / "block-001.safetensors").unlink()
    refits, original = [], build.kind_levels

    def watch(place, *rest):
        refits.append(place.dense.index)
        return original(place, *rest)

    monkeypatch.setattr(build, "kind_levels", watch)
    part = Bench(model, calibration, tmp_path / "part", **CASES[case])
    assert refits == [1, 1, 2, 2]
    for name in ("block-001.safetensors", "block-002.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert part.stitched().loss(part.counts) == whole.stitched().loss(whole.counts)


def test_a_library_of_something_else_is_refused(tmp_path):
    layout = ({(0, "channels"): (1, 2)}, {(0, "channels"): 1})
    Library(tmp_path / "levels", {"model": "a"}, *layout)
    again = Library(tmp_path / "levels", {"model": "a"}, {(0, "channels"): (2, 3)}, {(0, "channels"): 3})
    assert (again.grids, again.plan) == layout  # what is there counts
    with pytest.raises(UserError, match="were made with another model: give another directory, or delete it"):
        Library(tmp_path / "levels", {"model": "b"}, *layout)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no library of levels"):
        Library(tmp_path / "other", {}, {}, {})
    for content, reason in (
        ("{", "library.json cannot be read"), ("[]", "library.json cannot be read"),
        ('{"plan": {}}', "library.json lacks its grids or its plan: delete"),
    ):  # fmt: skip
        (tmp_path / "levels" / "library.json").write_text(content)
        with pytest.raises(UserError, match=reason):
            Library(tmp_path / "levels", {}, *layout)


def test_a_broken_block_is_named(tmp_path):
    library = Library(tmp_path / "levels", {}, {}, {})
    (tmp_path / "levels" / "block-000.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"block-000.safetensors cannot be read \(.*\): delete it to make it anew"):
        library.path((0, "channels"))


def test_counts_as_plain_data():
    counts = {(0, "attention"): 2, (11, "channels"): 30}
    assert plain_counts(counts) == {"0 attention": 2, "11 channels": 30} and counts_of(plain_counts(counts)) == counts


@pytest.mark.parametrize("share, rows", [(1.0, 10), (0.5, 5), (0.25, 2), (0.01, 1)])
def test_processes_share_the_first_copies_too(monkeypatch, share, rows):
    """Five windows of two copies, every other one in either process: 0, 2, 4 and 1, 3."""
    noisy = torch.zeros(5, 2, 4)
    monkeypatch.setattr(Workers, "gather", lambda self, own: [6, 4])
    parts = []
    for rank in range(2):
        place = Workers(rank, 2)
        parts.append(ReferenceWindows(noisy[rank::2, 0], noisy[rank::2], noisy[rank::2, :, 0], None, Limits(), place))
    counts = [part.first_rows(share) for part in parts]
    assert {of_all for _, of_all in counts} == {rows} and sum(own for own, _ in counts) == rows
    numbers = [[2 * window + copy for window in range(rank, 5, 2) for copy in range(2)] for rank in range(2)]
    assert [own for own, _ in counts] == [sum(number < rows for number in own) for own in numbers]
    alone = ReferenceWindows(noisy[:, 0], noisy, noisy[:, :, 0], None, Limits())
    assert alone.first_rows(share) == (rows, rows)
