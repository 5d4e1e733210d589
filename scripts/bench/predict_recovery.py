"""Memory and time of recoveries in configs/recover at true size, as dry runs predict them, from shapes alone.

python -m scripts.bench.predict_recovery [--ratio 0.5] [--out scripts/results/recovery_plan.json]
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from rich.table import Table

from scripts.bench.measure_inspect import SHAPES
from scripts.tools.script_line import OneLineParser, one_line, result_file, show_result, write_result
from structprune.bench.recovery_cost import recovery_cost
from structprune.bench.recovery_memory import recovery_memory
from structprune.config import Config, ModelSettings
from structprune.errors import UserError
from structprune.models.adapter import Adapter
from structprune.recovery.checks import with_causal
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.trainer import steps_of
from structprune.runs.expected import expected_model
from structprune.runs.ghost import read_ghost
from structprune.runs.resolve import resolve_structured

HOME = Path(__file__).parents[2]
CONFIGS = HOME / "configs" / "recover"
FILES = {
    "LLaDA-8B": "llada.yaml",
    "Dream-7B": "dream.yaml",
    "A2D-Qwen3-0.6B": "a2d.yaml",
    "SDAR-1.7B-Chat": "sdar.yaml",
    "Nemotron-Labs-Diffusion-3B": "nemotron-labs.yaml",
    "LLaDA-MoE-7B-A1B": "llada-moe.yaml",
    "LLaDA2.0-mini": "llada2-mini.yaml",
}


def predict(values: dict, file: str, ratio: float) -> dict:
    """Parameters, tokens, bytes and operations of a recovery whose models are in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        dense = read_ghost(folder, ModelSettings()).model
    pruning = Config.load(overrides={"structured.ratio": ratio, "model.device": "cpu"})
    student = Adapter(expected_model(dense, resolve_structured(pruning, dense, dry_run=True)))
    teacher, config = Adapter(dense), with_causal(RecoverConfig.load(str(CONFIGS / file)), dense)
    return {
        "config": file,
        "parameters": {"dense": dense.num_parameters(), "pruned": student.model.num_parameters()},
        "tokens": steps_of(config.train.tokens, config) * config.train.batch * config.data.length,
        "memory": recovery_memory(student, teacher, config, (torch.bfloat16, torch.bfloat16)),
        "cost": recovery_cost(student, teacher, config),
    }


def table_of(result: dict) -> Table:
    """A row per model."""
    table = Table(title=f"recoveries of configs/recover, pruned at {result['ratio']}: predicted, from shapes alone")
    for name in ("shape", "tokens", "peak, GB", "operations", f"hours at {result['rate']:.0e}/s"):
        table.add_column(name, justify="left" if name == "shape" else "right")
    for name, row in result["shapes"].items():
        cost = row["cost"]
        hours = f"{sum(cost['seconds'].values()) / 3600:.1f}"
        cells = (f"{row['memory']['peak'] / 1e9:.0f}", f"{sum(cost['operations'].values()):.1e}", hours)
        table.add_row(name, f"{row['tokens'] / 1e6:.0f} M", *cells)
    return table


def run(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.5, help="removed by the pruning (default %(default)s)")
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/recovery_plan.json"))
    options = parser.parse_args(arguments)
    if not 0 < options.ratio < 1:
        raise UserError(f"--ratio {options.ratio}: give a number between 0 and 1")
    shapes = {name: predict(SHAPES[name], file, options.ratio) for name, file in FILES.items()}
    rate = next(iter(shapes.values()))["cost"]["rate"]
    result = {"ratio": options.ratio, "rate": rate, "shapes": shapes}
    write_result(options.out, result)
    show_result(table_of(result), out=options.out, width=110)


def main(arguments: list[str] | None = None) -> int:
    return one_line("predict_recovery", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
