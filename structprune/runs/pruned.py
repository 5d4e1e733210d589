"""Results of a structured run: the pruned model with its files, and a plan that was tried."""

from dataclasses import dataclass
from pathlib import Path

from structprune.calibration.batches import Calibration
from structprune.checkpoint.card import model_card
from structprune.checkpoint.output import Content
from structprune.checkpoint.report import run_report, structured_report
from structprune.checkpoint.save import save_pruned
from structprune.config import ExportSettings
from structprune.models.modeling_structprune import DiffusionLM
from structprune.refit.products import LayerFit
from structprune.runs.run import Run
from structprune.structured.plan import Plan
from structprune.structured.request import StructuredRequest


@dataclass(frozen=True)
class Pruned:
    """The result of a run: the smaller model, in eval mode, which shares its uncut tensors with the dense one; the plan
    and calibration behind it; and every figure of the run as plain data."""

    model: DiffusionLM
    plan: Plan
    calibration: Calibration
    report: dict

    def save(self, directory: str | Path, overwrite: bool = False) -> Path:
        """Write model, tokenizer, plan.json, calibration.safetensors, report.json and model card, whole or not at all.

        Raises:
            UserError: as `structprune.checkpoint.save.save_pruned`.
        """
        export = ExportSettings(**self.report["config"]["export"])
        files: dict[str, Content] = {
            "plan.json": self.plan.to_json(),
            "calibration.safetensors": self.calibration.save,
            "report.json": self.report,
            "README.md": model_card(self.report),
        }
        return save_pruned(self.model, directory, export, files=files, overwrite=overwrite)


@dataclass(frozen=True)
class Candidate:
    """A plan, the model that it gives, and how that compares with the dense one on the held-out windows."""

    plan: Plan
    model: DiffusionLM
    fits: list[LayerFit]
    check: dict

    @property
    def loss(self) -> float:
        """Of NELBO against the dense model, in nats per token."""
        return self.check["loss"]["mean"]


def pruned_report(run: Run, request: StructuredRequest, result: Candidate) -> dict:
    """What a run did and what it left of the model, as plain data."""
    model, config, length = run.model, request.config, run.calibration.length
    report = run_report(model, config, run.calibration, run.seconds, run.device)
    report |= structured_report(model, result.model, config, length, result.plan.remaining)
    return report | {"held_out_nelbo": result.check, "refit": [fit.plain() for fit in result.fits]}
