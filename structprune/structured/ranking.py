"""From a score's name to removal paths: collect the statistic that the score needs, then let it rank the units."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from structprune.config import StructuredSettings
from structprune.errors import UserError
from structprune.models.adapter import CONSUMER, BlockView, UnitKey
from structprune.models.journal import NOWHERE, Journal
from structprune.models.placement import give_back_memory
from structprune.statistics.activations import Moments, add_gram, mirror, relative_weight
from structprune.statistics.gradients import gradient_sums
from structprune.statistics.hidden import HiddenStates
from structprune.statistics.moments import consumer_moments
from structprune.statistics.overflow import overflow, place
from structprune.statistics.pass_parts import MASS
from structprune.statistics.rows import Rows, observe_own, scan_rows, whole_mass
from structprune.statistics.scan import Scan
from structprune.structured.paths import RemovalPath, path_of, path_tensors
from structprune.structured.scores.table import SCORES
from structprune.structured.units import Tensors, Units, all_units, block_tensors, coupled_slices

Rank = Callable[[Units, Any], RemovalPath]  # the units of one block and kind, and their statistic -> their path
Paths = dict[UnitKey, RemovalPath]
Grams = dict[str, torch.Tensor]  # kind -> (C, C)
MEASURED = {"weights": "squared weights", "moments": "activations", "grams": "activations", "gradients": "gradients"}


def rank_units(scan: Scan, settings: StructuredSettings, arm: str | None, journal: Journal = NOWHERE) -> Paths:
    """Removal paths of every block and kind by the score in `settings`, on the arm of `scores.table.resolve_arm`.

    Args:
        journal: of these scores; what it has is not measured again.
    Raises:
        UserError: a score of gradients, and a calibration without mask probabilities; a block whose numbers are not
            finite or cannot be factored.
    """
    score = SCORES[settings.score]

    def rank(units: Units, statistic: Any) -> RemovalPath:
        try:
            path = score.path(units, statistic, settings)
        except torch.linalg.LinAlgError as error:
            raise _failure(scan, settings, units, statistic) from error
        # the last step may cost infinity, so that no allocation empties a block
        if path.cost.isnan().any() or not path.cost[:-1].isfinite().all():
            raise _failure(scan, settings, units, statistic)
        if path.rank is not None and not path.rank.isfinite().all():
            raise _failure(scan, settings, units, statistic)
        return path

    if score.needs == "weights":
        return _rank_weights(scan, settings, rank)
    assert arm is not None, f"score {settings.score} reads activations"
    if score.needs == "grams":  # block by block
        return _rank_grams(scan, (settings, arm), rank, journal)
    return _journaled(scan, journal, lambda watched: COLLECTORS[score.needs](watched, settings, arm, rank))


def _journaled(scan: Scan, journal: Journal, collect: Callable[[Scan], Paths]) -> Paths:
    """The paths that a journal has, else those of `collect`; the attention mass is observed in either case."""
    if kept := journal.read("paths"):
        observe_own(scan, kept.tensors.get(MASS))
        return _paths_of(kept.tensors)
    masses: list[torch.Tensor] = []
    paths = collect(replace(scan, observe=masses.append))
    mass = whole_mass(masses, scan.workers)
    journal.keep("paths", _tensors_of(paths) | mass)
    observe_own(scan, mass.get(MASS))
    return paths


def _tensors_of(paths: Paths) -> dict[str, torch.Tensor]:
    parts = [path_tensors(path, f"{index} {kind}") for (index, kind), path in paths.items()]
    return {name: tensor for part in parts for name, tensor in part.items()}


def _paths_of(tensors: dict[str, torch.Tensor]) -> Paths:
    names = [name.removesuffix(".steps") for name in tensors if name.endswith(".steps")]
    keys = {name: (int(name.split()[0]), name.split()[1]) for name in names}
    return {keys[name]: path_of(tensors, name) for name in sorted(names, key=keys.__getitem__)}


def _failure(scan: Scan, settings: StructuredSettings, units: Units, statistic: Any) -> UserError:
    """Why the units of one block and kind cannot be ranked."""
    score, where = SCORES[settings.score], place(*units.key)
    parts = statistic if isinstance(statistic, list) else [statistic]
    tensors = [part.squared_norm if isinstance(part, Moments) else part for part in parts]
    if score.needs == "weights":
        tensors = [tensor.float().square() for tensor in tensors]
    if not all(tensor.isfinite().all() for tensor in tensors):
        dtype = torch.float32 if score.needs == "weights" else units.weight.dtype
        return overflow(where, MEASURED[score.needs], dtype, scan.adapter.model)
    if "damping" in score.options:
        damping = f"structured.damping = {settings.damping:g}"
        return UserError(f"{where}: its Gram matrix cannot be factored with {damping}: raise it")
    return UserError(f"{where}: score '{settings.score}' is not a finite number: choose another structured.score")


def _rank_weights(scan: Scan, settings: StructuredSettings, rank: Rank) -> Paths:
    """The statistic is the units' coupled slices, (U, n_i) each."""
    paths = {}
    for block in scan.track(scan.adapter.blocks, f"{settings.score} scores"):
        for units in all_units([block], settings.gqa):
            with torch.no_grad():
                paths[units.key] = rank(units, coupled_slices(units, block_tensors(block)))
        give_back_memory()
    return paths


def _rank_moments(scan: Scan, settings: StructuredSettings, arm: str, rank: Rank) -> Paths:
    """The statistic is the `Moments` of the consumer's input features."""
    measured = consumer_moments(scan, arm)
    every = all_units(scan.adapter.blocks, settings.gqa)
    paths = {}
    for units in every:
        paths[units.key] = rank(units, measured[units.block.index, CONSUMER[units.kind]])
        give_back_memory()
    return paths


@torch.inference_mode()
def _rank_grams(scan: Scan, given: tuple[StructuredSettings, str], rank: Rank, journal: Journal) -> Paths:
    """The statistic is the consumer's Gram matrix (C, C), the weighted mean of x xᵀ over rows; one block at a time.

    Args:
        given: settings and arm.
    """
    settings, arm = given
    rows, limits = scan_rows(scan, arm), scan.limits
    names = {block.index: f"block-{block.index:03d}" for block in scan.adapter.blocks}
    parts = {index: journal.read(name) for index, name in names.items()}
    if all(parts.values()):
        return {key: path for part in parts.values() if part for key, path in _paths_of(part.tensors).items()}
    states = HiddenStates(scan.adapter, rows.ids, scan.sequences(rows.copies), limits.budget, limits.overlap)
    paths: Paths = {}
    group: list[tuple[BlockView, Grams]] = []
    for block in scan.track(scan.adapter.blocks, f"{settings.score} scores ({arm})"):
        if kept := parts[block.index]:
            paths |= _paths_of(kept.tensors)
            _advance(block, states)
        else:
            grams = _advance_with_grams(block, states, rows, settings.relative is not False, scan)
            group.append((block, grams if scan.workers.mine(len(group)) else {}))
        if group and (len(group) == scan.workers.count or block is scan.adapter.blocks[-1]):
            # each process ranks a block of its own; its Gram matrices are the only ones it still has
            ranked = scan.workers.share(partial(_rank_blocks, settings, rank), group)
            for (each, _), own in zip(group, ranked):
                journal.keep(names[each.index], own)
                paths |= _paths_of(own)
            group = []
    return paths


def _rank_blocks(
    settings: StructuredSettings, rank: Rank, group: list[tuple[BlockView, Grams]]
) -> list[dict[str, torch.Tensor]]:
    """The paths of some blocks, as tensors on CPU; Gram matrices are freed as soon as they are used."""
    ranked = []
    for block, grams in group:
        paths = {units.key: rank(units, grams.pop(units.kind)) for units in all_units([block], settings.gqa)}
        ranked.append({name: tensor.cpu() for name, tensor in _tensors_of(paths).items()})
        give_back_memory()
    return ranked


def _advance(block: BlockView, states: HiddenStates) -> None:
    """Run one block over all rows, in the steps of `_advance_with_grams`, so that the rows are the same bit for bit."""
    for part in states.slices():
        x = states.read(part)  # (b, T, C)
        for kind in block.kinds:
            x = x + block[CONSUMER[kind]](block.consumed(kind, x, states.sight))  # (b, T, C)
        states.write(part, x)


def _advance_with_grams(block: BlockView, states: HiddenStates, rows: Rows, relative: bool, scan: Scan) -> Grams:
    """Run one block over all rows; by kind, the mean of x̃ x̃ᵀ over the rows of all processes, (C, C)."""
    device = scan.adapter.device
    sizes = {kind: block[CONSUMER[kind]].in_features for kind in block.kinds}
    grams = {kind: torch.zeros(size, size, device=device) for kind, size in sizes.items()}  # (C, C)
    totals = {kind: torch.zeros((), dtype=torch.float64, device=device) for kind in block.kinds}  # Σ ω², on the device
    for part in states.slices():
        x, omega = states.read(part), rows.part(part, device)  # (b, T, C), (b, T)
        for kind in block.kinds:
            read = block.consumed(kind, x, states.sight)  # (b, T, .)
            weight = relative_weight(x, omega) if relative else omega  # (b, T)
            add_gram(grams[kind], read, weight)
            totals[kind] += x.shape[0] * x.shape[1] if weight is None else weight.double().pow(2).sum()
            x = x + block[CONSUMER[kind]](read)  # (b, T, C)
        states.write(part, x)
    scan.workers.add_up(*grams.values(), *totals.values())
    return {kind: mirror(gram).div_(totals[kind]) for kind, gram in grams.items()}


def _rank_gradients(scan: Scan, settings: StructuredSettings, arm: str, rank: Rank) -> Paths:
    """The statistic is the units' coupled slices of gradient times weight, (U, n_i) each."""
    if scan.calibration.mask_probability is None:
        raise UserError(
            f"score '{settings.score}' needs mask probabilities, which the replayed calibration file does not have"
        )
    rows = scan_rows(scan, arm)
    tensors = {block.index: block_tensors(block) for block in scan.adapter.blocks}
    flat = [(index, key, value) for index, part in tensors.items() for key, value in part.items()]
    sums = gradient_sums(scan, rows, [value for *_, value in flat], f"gradients ({arm})")
    products: dict[int, Tensors] = {index: {} for index in tensors}
    for (index, key, value), total in zip(flat, sums):
        products[index][key] = total.mul_(value.detach())
    every = all_units(scan.adapter.blocks, settings.gqa)
    return {units.key: rank(units, coupled_slices(units, products[units.block.index])) for units in every}


COLLECTORS = {"moments": _rank_moments, "gradients": _rank_gradients}
