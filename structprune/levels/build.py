"""Making a library of levels: one walk along the model, on the prefix of the plan that the search starts from.

Every level of a block is refitted on the prefix that the current plan leaves before it, with its own refits. So the
library is exact for that plan: stitched from its levels, it is the model that a refit of the plan gives. For another
plan it is the better the nearer that is. Expected mixtures of levels (Týr-the-Pruner, arXiv 2503.09657) gave plans that
lost more on the embedded model.
Shapes: O outputs, C input channels of the dense consumer, K remaining ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from structprune.config import ReconstructSettings, StructuredSettings
from structprune.errors import UserError
from structprune.levels.library import KindLevels, Level, Library
from structprune.models.adapter import CONSUMER, BlockView
from structprune.models.journal import unwatched
from structprune.models.modeling_structprune import DiffusionLM
from structprune.refit.products import UNCHANGED, Products, output_error
from structprune.refit.reconstruct import augmented, refit_head, refit_producers, set_weight
from structprune.refit.solve import choose
from structprune.refit.walk import Place, Walk, has_constant
from structprune.statistics import overflow
from structprune.structured.allocate import Counts
from structprune.structured.paths import RemovalPath, static_path
from structprune.structured.ranking import Paths
from structprune.structured.scores import obs
from structprune.structured.sizes import block_size
from structprune.structured.surgery import expand
from structprune.structured.units import Units
from structprune.workers import ALONE, Workers


@dataclass(frozen=True)
class Recipe:
    """What the levels of a library are made with.

    Attributes:
        paths: the order in which units go; None: optimal brain surgeon, on the pruned prefix and the refitted weight.
    """

    structured: StructuredSettings
    reconstruct: ReconstructSettings
    paths: Paths | None = None


@dataclass(frozen=True, eq=False)
class Problem:
    """What the refits of one consumer at all its levels are solved from, at full width."""

    dense: torch.Tensor  # (O, C [+ 1]) fp64 weight
    fit: Products
    check: Products  # over held-out rows


@torch.no_grad()
def build_library(
    walk: Walk,
    small: DiffusionLM,
    library: Library,
    recipe: Recipe,
    counts: Counts | None = None,
    watch: Callable[[], None] = unwatched,
) -> None:
    """Refit every block at every level of its grid, and leave `small` with the levels of a plan.

    The LM head is refitted for that plan too, where asked. Blocks that the library has are taken from it, so that an
    interrupted walk goes on at the block it was at. A block or kind without a grid keeps all units. Of several
    processes, which read one directory, the first writes.

    Args:
        small: the dense model with consumers (and readers) of its own: an uncut copy, which is changed.
        counts: a plan of levels of a library that has all blocks. None: the plan that the library is made around.
        watch: called after every block that is written; what it raises ends the walk.
    """
    grids, counts = library.grids, library.plan if counts is None else counts
    parts: dict[str, KindLevels] = {}
    constant = has_constant(recipe.reconstruct)
    run = None
    there = walk.workers.from_first(lambda: {block.index for block in walk.dense.blocks if library.has(block.index)})
    for place in walk.places(small, title="levels", last=last_attending(walk.dense.attending, counts, recipe)):
        assert isinstance(place, Place), "searches of mixtures are refused"
        run = place.run
        index, kind = key = place.dense.index, place.kind
        steps = counts.get(key, 0)
        if index in there:
            for role, weight in library.readers(key).items():
                set_weight(place.readers[role], weight, constant=False)
            set_level(place.consumer, library.weight(key, steps), place.dense[CONSUMER[kind]].bias, constant)
            continue
        parts[kind] = kind_levels(place, grids.get(key, (0,)), steps, recipe)
        set_level(place.consumer, parts[kind].levels[steps].weight, place.dense[CONSUMER[kind]].bias, constant)
        if kind == place.dense.kinds[-1]:
            walk.workers.first(partial(library.write, index, parts))
            parts = {}
            watch()
    if recipe.reconstruct.head and run is not None:
        refit_head(walk, run, small)


def last_attending(blocks: list[BlockView], counts: Counts, recipe: Recipe) -> int:
    """The index of the last block whose attention the current plan leaves."""
    whole = {block.index: block_size(block, recipe.structured.gqa).steps["attention"] for block in blocks}
    return max(index for index, steps in whole.items() if counts.get((index, "attention"), 0) < steps)


def set_level(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None, constant: bool) -> None:
    """Give a consumer the weights of a level, (O, C [+ 1]); one that removes all units also takes its bias away.

    Args:
        bias: (O,) the dense consumer's. constant: whether the last column is the bias instead.
    """
    set_weight(linear, weight, constant)
    if not constant and bias is not None:
        linear.bias = nn.Parameter(bias if weight.any() else torch.zeros_like(bias), requires_grad=False)


def kind_levels(place: Place, steps: tuple[int, ...], current: int, recipe: Recipe) -> KindLevels:
    """The levels of one block and kind; its readers in the small model are refitted on the way, where asked.

    Several processes, whose products are the same, share the solves of levels.

    Args:
        current: the steps of the current plan, at which all dampings are tried; other levels try those next to its.
    """
    settings, linear = recipe.reconstruct, place.consumer
    readers = {}
    if settings.producers and not place.first:
        refit_producers(place)
        readers = {role: reader.weight for role, reader in place.readers.items()}
    fit, check = place.products()
    problem = Problem(augmented(linear, has_constant(settings)).to(fit.gram.device), fit, check)
    path = removal_path(place, problem, recipe, ordered=steps != (0,))
    levels = {current: level(place, path, problem, current, settings, place.walk.workers)}
    near = replace_dampings(settings, levels[current].damping)
    others = [count for count in steps if count != current]

    def solve(counts: Sequence[int]) -> list[Level]:
        made = (level(place, path, problem, count, near) for count in counts)
        return [replace(each, weight=each.weight.cpu()) for each in made]  # only written

    levels |= dict(zip(others, place.walk.workers.share(solve, others), strict=True))
    return KindLevels(path, dict(sorted(levels.items())), readers)


def removal_path(place: Place, problem: Problem, recipe: Recipe, ordered: bool = True) -> RemovalPath:
    """The order in which units go: that of the recipe, or by optimal brain surgeon from the refit at full width.

    Args:
        ordered: false where no unit goes, so that any order will do.
    """
    if recipe.paths is not None:
        return recipe.paths[place.dense.index, place.kind]
    units = Units.of(place.dense, place.kind, recipe.structured.gqa)
    if not ordered:
        return static_path(torch.zeros(units.count), units.groups)
    features, fit = place.consumer.in_features, problem.fit
    choice = choose(recipe.reconstruct, problem.dense, fit, problem.check, features, place.walk.workers)
    weight = choice[0][:, :features]  # (O, C)
    gram = fit.gram[:features, :features] / place.walk.fit_tokens  # (C, C)
    rounds = recipe.structured.rounds if place.kind == "channels" else None
    try:
        return obs.obs_path(weight, gram, units.groups, recipe.structured.damping, rounds)
    except torch.linalg.LinAlgError as error:
        where = overflow.place(place.dense.index, place.kind)
        raise UserError(f"{where}: its Gram matrix cannot be factored: raise structured.damping") from error


def level(
    place: Place,
    path: RemovalPath,
    problem: Problem,
    steps: int,
    settings: ReconstructSettings,
    workers: Workers = ALONE,
) -> Level:
    """The consumer refitted after some removal steps, from the products at full width.

    Args:
        workers: who solve this level together.
    """
    dense, fit, check = problem.dense, problem.fit, problem.check
    features, like = place.consumer.in_features, place.consumer.weight
    removed = set(path.removed(steps))
    count = sum(len(step) for step in path.steps)
    remaining = tuple(unit for unit in range(count) if unit not in removed)
    if not remaining:
        return Level(torch.zeros_like(dense, dtype=like.dtype, device=like.device), UNCHANGED, 1.0)
    columns = expand(remaining, features // count)  # (K,)
    columns = torch.cat((columns, torch.arange(features, dense.shape[1]))).to(fit.gram.device)  # (K [+ 1],)
    weight, power = dense[:, columns], check.power  # (O, K [+ 1])
    fit, check = at_columns(fit, columns), at_columns(check, columns)
    weight, damping, _ = choose(settings, weight, fit, check, len(remaining) * features // count, workers)
    error = (output_error(weight, check.target, check.gram) + power) / power if power > 0 else 1.0
    whole = dense.new_zeros(dense.shape).index_copy_(1, columns, weight)  # (O, C [+ 1])
    return Level(whole.to(like.device, like.dtype), damping, error)


def at_columns(products: Products, columns: torch.Tensor) -> Products:
    """The products of some input columns only."""
    gram = products.gram[columns][:, columns]  # (K, K)
    return replace(products, gram=gram, target=products.target[:, columns])  # (O, K)


def replace_dampings(settings: ReconstructSettings, chosen: float) -> ReconstructSettings:
    """The settings with the damping chosen and its neighbours only; all where none was."""
    dampings = sorted(settings.damping)
    if chosen not in dampings:
        return settings
    place = dampings.index(chosen)
    return settings.model_copy(update={"damping": tuple(dampings[max(0, place - 1) : place + 2])})
