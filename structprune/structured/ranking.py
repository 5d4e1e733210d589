"""From a score's name to removal paths: collect the statistic that the score needs, then let it rank the units."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from structprune.config import StructuredSettings
from structprune.errors import UserError
from structprune.models.adapter import CONSUMER, EXPERTS, Adapter, BlockView, UnitKey
from structprune.models.experts_structprune import MLP_ROLES, SHARED, role_and_part, role_of
from structprune.models.finite import all_finite
from structprune.models.journal import NOWHERE, Journal
from structprune.models.placement import give_back_memory
from structprune.statistics.activations import Moments, add_gram, empty_sum, mirror, relative_weight
from structprune.statistics.experts import expert_shares
from structprune.statistics.gradients import gradient_sums
from structprune.statistics.hidden import HiddenStates
from structprune.statistics.inputs import block_output, inputs_after_attention
from structprune.statistics.moments import consumer_moments
from structprune.statistics.overflow import overflow, place
from structprune.statistics.pass_parts import MASS
from structprune.statistics.rows import Rows, observe_own, scan_rows, whole_mass
from structprune.statistics.scan import Scan
from structprune.structured.paths import RemovalPath, even_path, path_of, path_tensors
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
        paths = _rank_weights(scan, settings, rank)
    else:
        assert arm is not None, f"score {settings.score} reads activations"
        if score.needs == "grams":  # block by block
            paths = _rank_grams(scan, (settings, arm), rank, journal)
        else:
            collect = COLLECTORS[score.needs]
            paths = _journaled(scan, journal, lambda watched: collect(watched, settings, arm, rank))
    paths = joined(paths, scan.adapter)
    return paths | expert_paths(scan, arm, journal.within("experts", "shares")) if settings.experts else paths


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
    if not all(map(all_finite, tensors)):
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
        own = measured[units.block.index, units.consumer]
        paths[units.key] = rank(units, even_moments(own) if own.weight == 0 else own)
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
            del grams  # others' would stay until the next block's are there
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
        paths = {units.key: rank(units, grams.pop(units.key[1])) for units in all_units([block], settings.gqa)}
        ranked.append({name: tensor.cpu() for name, tensor in _tensors_of(paths).items()})
        give_back_memory()
    return ranked


def _advance(block: BlockView, states: HiddenStates) -> None:
    """Run one block over all rows, in the steps of `_advance_with_grams`, so that the rows are the same bit for bit."""
    for part in states.slices():
        x = states.read(part)  # (b, T, C)
        for kind in block.kinds:
            x = x + block[CONSUMER[kind]](block.consumed(kind, x, states.context))  # (b, T, C)
        states.write(part, block.mixture.add_mlp(x) if block.mixture else x)


def _advance_with_grams(block: BlockView, states: HiddenStates, rows: Rows, relative: bool, scan: Scan) -> Grams:
    """Run one block over all rows; by kind, the mean of x̃ x̃ᵀ over the rows of all processes, (C, C)."""
    device = scan.adapter.device
    sizes = {
        role_of(kind, part): block[role_of(CONSUMER[kind], part)].in_features
        for kind, part in [(kind, "") for kind in block.kinds] + [("channels", part) for part in block.module.parts]
    }
    grams = {kind: empty_sum(size, size, device) for kind, size in sizes.items()}  # (C, C)
    totals = {kind: torch.zeros((), dtype=torch.float64, device=device) for kind in sizes}  # Σ ω², on the device
    for part in states.slices():
        x, omega = states.read(part), rows.part(part, device)  # (b, T, C), (b, T)
        for kind in block.kinds:
            read = block.consumed(kind, x, states.context)  # (b, T, .)
            weight = relative_weight(x, omega) if relative else omega  # (b, T)
            add_gram(grams[kind], read, weight)
            totals[kind] += x.shape[0] * x.shape[1] if weight is None else weight.double().pow(2).sum()
            x = x + block[CONSUMER[kind]](read)  # (b, T, C)
        if block.mixture:
            weight = relative_weight(x, omega) if relative else omega  # (b, T)
            x = _add_expert_grams(block, x, weight, grams, totals)
        states.write(part, x)
    scan.workers.add_up(*grams.values(), *totals.values())
    # of experts that see no token; of others it is not asked, which would be a device sync
    empty = {kind for kind, total in totals.items() if role_and_part(kind)[1] and total == 0}
    for kind, gram in grams.items():  # one by one: a copy of all in fp32 would add to the peak of memory
        grams[kind] = torch.eye(len(gram), device=device) if kind in empty else mirror(gram).div_(totals[kind]).float()
    return grams


def _add_expert_grams(
    block: BlockView, x: torch.Tensor, weight: torch.Tensor | None, grams: Grams, totals: Grams
) -> torch.Tensor:
    """The stream (b, T, C) after a mixture; what its down projections read is added to the sums, in place."""
    inputs = inputs_after_attention(block, x)
    for part in block.module.parts:
        name, kind = role_of("activated", part), role_of("channels", part)
        read = inputs.read[name]  # (m, M) of an expert, (b, T, M) of what all tokens go through
        omega = inputs.weight(name, weight, relative=False)  # (m,) or (b, T)
        add_gram(grams[kind], read, omega)
        totals[kind] += read.shape[:-1].numel() if omega is None else omega.double().pow(2).sum()
    return block_output(block, inputs)


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


def expert_paths(scan: Scan, arm: str | None, journal: Journal) -> Paths:
    """Whole experts, those first that add least to the stream; without activations those of least weight."""
    if arm is None:
        blocks = [block for block in scan.adapter.blocks if block.mixture]
        shares = {block.index: torch.tensor([_power(block, part) for part in block.expert_parts]) for block in blocks}
    elif kept := journal.read("shares"):
        shares = {int(index): value for index, value in kept.tensors.items()}
    else:
        shares = expert_shares(scan, arm)
        journal.keep("shares", {str(index): value for index, value in shares.items()})
    routers = {block.index: block.mixture.router for block in scan.adapter.blocks if block.mixture}
    return {(index, EXPERTS): even_path(share, routers[index].groups) for index, share in shares.items()}  # (E,)


def _power(block: BlockView, part: str) -> float:
    """The squared norm of an expert's weights."""
    return sum(block[role_of(role, part)].weight.double().pow(2).sum().item() for role in MLP_ROLES)


def even_moments(moments: Moments) -> Moments:
    """Moments under which a score goes by the weights alone, for an expert that sees no token."""
    one = torch.ones_like(moments.mean)  # (C,)
    return Moments(one[0], torch.zeros_like(one), one)


def joined(paths: Paths, adapter: Adapter) -> Paths:
    """One path for the channels of all experts of a block: a step takes the next channel of each.

    Channels of expert e of M each are numbered from e M on. Costs are added, ranks averaged. Those of what all tokens
    go through have a path of their own, under the kind `SHARED`.
    """
    result = {key: path for key, path in paths.items() if not role_and_part(key[1])[1]}
    for block in adapter.blocks:
        if (common := (block.index, role_of("channels", SHARED))) in paths:
            result[block.index, SHARED] = paths[common]
        own = [paths[key] for part in block.expert_parts if (key := (block.index, role_of("channels", part))) in paths]
        if own:
            size = block.widths.channels
            steps = zip(*(path.steps for path in own))
            numbered = tuple(tuple(e * size + unit for e, (unit,) in enumerate(step)) for step in steps)
            ranks = [path.rank for path in own if path.rank is not None]
            cost = torch.stack([path.cost for path in own]).sum(0)  # (M,)
            result[block.index, "channels"] = RemovalPath(numbered, cost, torch.stack(ranks).mean(0) if ranks else None)
    return result


COLLECTORS = {"moments": _rank_moments, "gradients": _rank_gradients}
