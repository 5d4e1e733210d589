"""The token rows that a calibration arm feeds to the model, and their weights (docs/methods.md section 2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.adapter import Adapter
from structprune.models.layers_structprune import Layout
from structprune.models.transfer import send
from structprune.statistics.capture import MassMeter
from structprune.statistics.pass_parts import MASS, PassParts, rows_digest
from structprune.statistics.scan import Scan
from structprune.statistics.sinks import keep_weights
from structprune.workers import Workers


@dataclass(frozen=True)
class Rows:
    """Rows of one arm, S tokens each as the model's layout has them; the copies of one window are neighbours."""

    ids: torch.Tensor  # (R, S) int64
    weight: torch.Tensor | None  # (R, S) fp32 ω, or None where every row has weight 1
    masked: torch.Tensor  # (R, S) bool, tokens that are masked in `ids`
    copies: int  # sequences per window

    def part(self, rows: slice, device: torch.device) -> torch.Tensor | None:
        """The weights of some sequences on a device, (b, T)."""
        return None if self.weight is None else send(self.weight[rows], device)


def needs_sinks(arm: str | None, sink: SinkSettings) -> bool:
    """Whether an arm weights its rows by sinks."""
    return arm is not None and arm.endswith("+sink") and sink.policy != "none"


def arm_ids(calibration: Calibration, arm: str, layout: Layout) -> torch.Tensor:
    """Rows of an arm, (N, R, S): the clean windows once, or all their noisy copies, beside the text if it must."""
    clean = calibration.input_ids[:, None]  # (N, 1, T)
    return layout.rows(clean if arm.startswith("clean") else calibration.noisy_ids, clean)


def arm_weights(mass: torch.Tensor, arm: str, sink: SinkSettings) -> torch.Tensor:
    """Row weights of a sink arm from the mass (N, S, T): per level, or for clean rows their mean over it (N, 1, T)."""
    weights = keep_weights(mass, sink)  # (N, S, T)
    return weights.mean(1, keepdim=True) if arm.startswith("clean") else weights


def both_uses(rows: Rows, scan: Scan) -> Rows:
    """Rows whose tokens that are read causally weigh as the scan says."""
    return replace(rows, weight=use_weights(rows.weight, rows.ids.shape, scan))


def use_weights(weight: torch.Tensor | None, shape: torch.Size, scan: Scan) -> torch.Tensor | None:
    """Row weights times the root of `scan.causal` at tokens that are read causally, because they are squared in sums.

    Args:
        weight: (..., S), or None where every row has weight 1; so is what is returned. shape: of the rows' ids.
    """
    if not scan.layout.causal or scan.causal == 1:
        return weight
    factor = scan.layout.spread(torch.ones(scan.calibration.length), scan.causal**0.5)  # (S,)
    return factor.expand(shape) if weight is None else weight * factor.to(weight.device)


def predicted_weights(masked: torch.Tensor, scan: Scan) -> torch.Tensor:
    """1 at masked tokens, the root of `scan.causal` at tokens read causally, which all predict, else 0: (R, S) fp32."""
    causal = scan.layout.spread(torch.zeros(scan.calibration.length), scan.causal**0.5 * scan.layout.causal)
    return masked + causal  # (R, S)


def arm_rows(
    calibration: Calibration, arm: str, sink: SinkSettings, mass: torch.Tensor | None, mask_id: int, layout: Layout
) -> Rows:
    """The rows of an arm; the sink arms need the attention mass (N, L, S) on the noisy copies."""
    ids = arm_ids(calibration, arm, layout)  # (N, R, S)
    weight = None
    if needs_sinks(arm, sink):
        assert mass is not None, f"arm {arm} needs the attention mass"
        weight = arm_weights(mass, arm, sink).flatten(0, 1)  # (N*R, S)
    noisy = layout.windows(ids)[0]  # (N, R, T)
    masked = layout.spread((noisy == mask_id) & (calibration.input_ids[:, None] != mask_id), False)  # (N, R, S)
    return Rows(ids.flatten(0, 1), weight, masked.flatten(0, 1), ids.shape[1])


def scan_rows(scan: Scan, arm: str) -> Rows:
    """The rows of an arm; a sink arm measures its attention mass in a pass of its own first."""
    mass = measure_mass(scan) if needs_sinks(arm, scan.sink) else None
    rows = arm_rows(scan.calibration, arm, scan.sink, mass, scan.adapter.mask_id, scan.layout)
    return both_uses(rows, scan)


@torch.inference_mode()
def mass_of(adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    """Attention mass of some sequences over all layers and heads, (b, T) -> (b, T) fp32 on the model's device.

    The pass stops after the last attention.
    """
    last = adapter.attending[-1]
    x = adapter.model.embedding(send(ids, adapter.device))  # (b, T, C)
    context = adapter.context(ids.shape)
    with MassMeter().on(adapter.cores) as meter:
        for block in adapter.blocks[: last.index]:
            x = block.module(x, *context)  # (b, T, C)
        last.module.mix(x, *context)
    return meter.take()


def measure_mass(scan: Scan) -> torch.Tensor:
    """Attention mass on every noisy copy: (N, L, S) fp32 on CPU; what the journal has of these copies, it takes."""
    copies, batch = arm_ids(scan.calibration, "masked", scan.layout), scan.sequences()  # (N, L, S)
    noisy = copies.flatten(0, 1)  # (N*L, S)
    name = f"mass-{rows_digest(scan.workers, noisy)}"
    if kept := scan.journal.read(name):
        return observe_own(scan, kept.tensors[MASS]).view(copies.shape)
    starts, masses = range(0, len(noisy), batch), list[torch.Tensor]()
    parts = PassParts(replace(scan, observe=masses.append), "mass", noisy, batch)
    done, _ = parts.restore()
    for number, start in enumerate(scan.track(starts[done:], "attention mass"), done + 1):
        parts.observe(mass_of(scan.adapter, noisy[start : start + batch]))
        if number < len(starts):
            parts.keep(number, dict)
    # one copy to the host at the end: a copy per batch would stall the device after every pass
    mass = torch.cat([part.to(masses[-1].device) for part in masses]).cpu()  # (N*L, S)
    scan.journal.keep(name, whole_mass([mass], scan.workers))
    scan.observe(mass)
    return mass.view(copies.shape)


def kept_rows(
    scan: Scan, rows: Rows, name: str, measure: Callable[[], Sequence[torch.Tensor]]
) -> Sequence[torch.Tensor]:
    """What `measure` gives for each of these rows, (R, T) each on CPU; what the journal has of these ids, it gives.

    Args:
        name: of the measurement, and of all that decides it beside the ids.
    """
    name = f"{name}-{rows_digest(scan.workers, rows.ids)}"
    if kept := scan.journal.read(name):
        windows = scan.workers.span(len(kept.tensors["0"]) // rows.copies)
        own = slice(windows.start * rows.copies, windows.stop * rows.copies)
        return [kept.tensors[str(place)][own] for place in range(len(kept.tensors))]
    values = measure()
    whole = {str(place): scan.workers.rows(value) for place, value in enumerate(values)}  # (all R, T) each
    scan.journal.keep(name, whole)
    return values


def whole_mass(own: list[torch.Tensor], workers: Workers) -> dict[str, torch.Tensor]:
    """The attention mass of all processes' windows, to be kept: `MASS` -> (R, T) on CPU; empty without any.

    Args:
        own: this process's mass, (..., T) each, in the order of its windows.
    """
    if not own:
        return {}
    return {MASS: workers.rows(torch.cat([part.flatten(0, -2).cpu() for part in own])).cpu()}


def observe_own(scan: Scan, mass: torch.Tensor | None) -> torch.Tensor:
    """Let the scan's observer see what was kept of this process's windows, and return it: (r, T) of all (R, T).

    Args:
        mass: as `whole_mass` gave it; None: none was measured.
    """
    if mass is None:
        return torch.empty(0)
    copies = scan.calibration.levels
    windows = scan.workers.span(len(mass) // copies)
    own = mass[windows.start * copies : windows.stop * copies]  # (r, T)
    scan.observe(own)
    return own
