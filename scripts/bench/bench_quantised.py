"""Pruned models quantised by torchao and bitsandbytes through transformers: bytes, loss, and whether a reload agrees.

Every checkpoint is loaded as a user loads it, by AutoModelForCausalLM with the code beside the weights; quantised,
saved, loaded again, and judged on the package's held-out text. A library that is not installed, or refuses a model, is
named with its reason.

    pip install torchao bitsandbytes
    python -m scripts.bench.bench_quantised [--out scripts/results/quantised.json]
"""

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from scripts.tools.script_line import OneLineParser, check_counts, one_line, result_file, show_result, write_result
from structprune.assets import model_directory, text_file
from structprune.bench.machine import describe_machine
from structprune.checkpoint.save import save_pruned
from structprune.config import Config, ExportSettings
from structprune.errors import UserError
from structprune.evaluation.compare import paired_difference
from structprune.files import first_line
from structprune.models.loading import load_model
from structprune.runs.demo import HeldOut
from structprune.runs.pruner import Pruner

LENGTH = 128
PRUNE = {
    "structured.ratio": 0.5, "structured.round_to": 64, "calibration.source": str(text_file("calibration.txt")),
    "calibration.length": LENGTH, "calibration.windows": 160, "calibration.copies": 1, "calibration.held_out": 40,
    "model.device": "cpu",
}  # fmt: skip
LIBRARIES = ("torchao", "bitsandbytes")


def _torchao(name: str, **options: Any) -> Any:
    from torchao import quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(quantization, name)(**options))


def _groups(size: int) -> Any:
    from torchao.quantization.granularity import PerGroup

    return _torchao("IntxWeightOnlyConfig", weight_dtype=vars(torch)["int4"], granularity=PerGroup(size))


def _bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


FORMS: dict[str, Callable[[], Any]] = {
    "bf16": lambda: None,
    "torchao int8 weights": lambda: _torchao("Int8WeightOnlyConfig"),
    "torchao int8 weights and activations": lambda: _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4 weights, groups of 32": lambda: _groups(32),
    "bitsandbytes int8": lambda: _bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def load(directory: Path, settings: Any = None) -> Any:
    """A checkpoint as a user loads it, in bf16."""
    from transformers import AutoModelForCausalLM

    options = {} if settings is None else {"quantization_config": settings}
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.bfloat16, **options)


@torch.inference_mode()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits.float()  # (B, T, V)


def measure(directory: Path, form: str, held_out: HeldOut, work: Path) -> dict:
    """One checkpoint in one form: bytes on disk, loss against the dense model, largest difference after a reload."""
    row: dict[str, Any] = {"form": form, "checkpoint": directory.name}
    try:
        model, out = load(directory, FORMS[form]()), work / f"{directory.name}-{list(FORMS).index(form)}"
        model.save_pretrained(out)
        again, ids = load(out), held_out.ids[:4]  # (4, T)
        row["reload_difference"] = (logits(again, ids) - logits(model, ids)).abs().max().item()
        row["bytes"] = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        loss = torch.tensor(held_out.loss(again))  # (N,)
        row["loss"] = paired_difference(loss, torch.zeros_like(loss))
    except (ImportError, RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        row["refused"] = first_line(error)
    return row


def checkpoints(work: Path) -> list[Path]:
    """The embedded model, dense and pruned at 0.5, as directories that AutoModel loads."""
    model = load_model(model_directory(), device="cpu")
    dense = save_pruned(model, work / "dense", ExportSettings(compat="official"))
    return [dense, Pruner(model, Config.load(overrides=PRUNE)).prune().save(work / "pruned-at-0_5")]


def table_of(rows: list[dict]) -> Table:
    table = Table(title="Quantised: size, loss of NELBO against the dense model in fp32, reload")
    for title in ("checkpoint", "form", "MB", "loss", "reload"):
        table.add_column(title, justify="left" if title in ("checkpoint", "form") else "right")
    for row in rows:
        cells = ("-", row["refused"][:60], "-") if "refused" in row else _cells(row)
        table.add_row(row["checkpoint"], row["form"], *cells)
    return table


def _cells(row: dict) -> tuple[str, str, str]:
    loss = f"{row['loss']['mean']:+.4f} ± {row['loss']['standard_error']:.4f}"
    return f"{row['bytes'] / 1e6:.2f}", loss, f"{row['reload_difference']:g}"


def versions() -> dict[str, str | None]:
    """Of the libraries; None where one is not installed."""
    result: dict[str, str | None] = {}
    for name in (*LIBRARIES, "transformers"):
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = None
    return result


def run(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/quantised.json"))
    parser.add_argument("--windows", type=int, default=96, help="held-out windows (default %(default)s)")
    options = parser.parse_args(arguments)
    check_counts(options, {"windows"})
    if not any(versions()[name] for name in LIBRARIES):
        raise UserError("neither torchao nor bitsandbytes is installed: pip install torchao bitsandbytes")
    held_out = HeldOut(load_model(model_directory(), device="cpu"), 1, options.windows, LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(directory, form, held_out, Path(folder))
            for directory in checkpoints(Path(folder))
            for form in FORMS
        ]
    settings = {"windows": options.windows, "length": LENGTH, "versions": versions()}
    result = {"settings": settings, "machine": describe_machine(), "rows": rows}
    write_result(options.out, result)
    show_result(table_of(rows), out=options.out, width=150)


def main(arguments: list[str] | None = None) -> int:
    return one_line("bench_quantised", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
