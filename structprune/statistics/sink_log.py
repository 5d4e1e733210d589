"""The effect of a run's sink policy, from the attention mass that its weights were computed from."""

import torch

from structprune.calibration.batches import Calibration
from structprune.config import SinkSettings
from structprune.models.layers_structprune import Layout
from structprune.statistics.policies import policy_report
from structprune.statistics.sinks import sink_phi
from structprune.workers import ALONE, Workers


class SinkLog:
    """Keeps the mass that `observe` receives, on its device: 4 bytes for each token of N windows x L levels."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []

    def observe(self, mass: torch.Tensor) -> None:
        """Keep the mass (..., S) of further sequences, in the order of windows and levels."""
        self._parts.append(mass.flatten(0, -2))  # (r, S); copied to the host once, without a device sync per pass

    @property
    def parts(self) -> list[torch.Tensor]:
        """What was observed, (r, S) each."""
        return list(self._parts)

    def report(
        self, calibration: Calibration, sink: SinkSettings, mask_id: int, layout: Layout, workers: Workers = ALONE
    ) -> dict | None:
        """`policies.policy_report` of the observed windows, as plain data; None without any.

        Levels are the copies of each window in the order of their mask probability, with the `mask_share` of each: its
        share of mask tokens. Where windows were dealt different noise levels, a mean over windows mixes neighbours.
        Windows that were observed twice (by an allocation and a score) count once. Clean text that runs beside noisy
        windows counts as further windows, without mask tokens.

        Args:
            calibration: all the windows that were observed, by all processes.
            layout: of the rows. workers: of which each observed its share.
        """
        if not self._parts:
            return None
        noisy, p = calibration.noisy_ids, calibration.mask_probability  # (N, L, T), (N, L)
        mass = torch.cat([part.cpu() for part in self._parts])  # (r, S)
        own = workers.span(noisy.shape[0])
        mass = workers.rows(mass[: (own.stop - own.start) * noisy.shape[1]]).view(*noisy.shape[:2], -1)  # (N, L, S)
        phi, masked = sink_phi(mass, sink), layout.spread(noisy == mask_id, False)  # (N, L, S) each
        if p is not None:
            order = p.argsort(dim=1, stable=True)[..., None].expand(phi.shape)  # (N, L, S)
            phi, masked = phi.gather(1, order), masked.gather(1, order)  # (N, L, S) each
        shares = layout.windows(masked)[0].double().mean((0, 2)).tolist()  # (L,)
        phi, masked = (torch.cat(layout.windows(each)) for each in (phi, masked))  # (N x S / T, L, T) each
        return policy_report(phi, masked, sink.policy) | {"windows": len(noisy), "mask_share": shares}


class WidestReport:
    """Of several reports of one run, the last of those that cover most windows; None before any."""

    def __init__(self) -> None:
        self.report: dict | None = None

    def note(self, report: dict | None) -> None:
        """Take a report, unless an earlier one covers more windows."""
        if report is not None and report["windows"] >= (self.report or report)["windows"]:
            self.report = report
