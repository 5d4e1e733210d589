"""Weights of the rows that refits of one dense model read, fitted and held-out ones.

Shapes: R sequences of T tokens, R1 of them fitted and R2 held out, b of a batch.
"""

from dataclasses import replace

import torch

from structprune.config import ReconstructSettings
from structprune.models.adapter import UnitKey
from structprune.models.transfer import send
from structprune.refit.importance import Importance, importance, predicted_at
from structprune.statistics.rows import arm_rows, predicted_weights, scan_rows
from structprune.statistics.scan import Scan


class WeightedRows:
    """The rows of a refit and what each position weighs; weights are squared in the sums.

    Args:
        scan: of the dense model; its calibration's held-out windows are weighted by their masked tokens alone.
    """

    def __init__(self, scan: Scan, settings: ReconstructSettings):
        fit = replace(scan, calibration=scan.calibration.fit)
        mask_id, shifted = scan.adapter.mask_id, scan.adapter.model.shifted
        rows = scan_rows(fit, settings.arm)
        held_out = arm_rows(scan.calibration.check, "masked", scan.sink, None, mask_id, scan.layout)
        self.ids = torch.cat((rows.ids, held_out.ids))  # (R, T)
        self.fitted = len(rows.ids)  # R1
        weight = torch.ones(rows.ids.shape) if rows.weight is None else rows.weight  # (R1, T)
        predicting, checked = (predicted_at(mask, shifted) for mask in (rows.masked, held_out.masked))
        causal = predicted_weights(torch.zeros(len(rows.ids[0])), scan).bool()  # (S,), which predict too
        self._importance: Importance = {}
        visible, only = torch.ones(()), torch.ones(())  # rows of clean text are all alike
        if any(scan.workers.gather(bool(rows.masked.any()))):  # a process may have no masked token of its own
            visible, only = torch.where(rows.masked | predicting | causal, 1.0, settings.visible), predicting | causal
            self._importance = importance(fit, rows, settings.weighting)
        # whether only positions with a prediction are read -> (R, T)
        self._weights = {
            False: torch.cat((weight * visible, predicted_weights(held_out.masked, scan))),
            True: torch.cat((weight * only, predicted_weights(checked, scan))),
        }

    def weight(self, part: slice, predicting: bool, device: torch.device, key: UnitKey | None = None) -> torch.Tensor:
        """Weights ω (b, T) of some sequences; 0 outside the positions with a prediction where only those are read.

        Args:
            part: of R, all fitted or all held out.
            key: the consumer whose rows these are; None for the LM head.
        """
        weight = self._weights[predicting][part]  # (b, T)
        factors = self._importance.get(key, self._importance.get(None))
        if factors is not None and part.start < self.fitted:
            weight = weight * factors[part].sqrt()  # (b, T)
        return send(weight, device)
