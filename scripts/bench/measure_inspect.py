"""Time and peak memory of `structprune inspect` on configurations of public models, each in its own process.

python -m scripts.bench.measure_inspect --out scripts/results/inspect.json
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.table import Table

from scripts.tools.script_line import OneLineParser, one_line, result_file, show_result, write_result
from structprune.bench.machine import describe_machine
from structprune.errors import UserError

CONFIGS = Path(__file__).parents[2] / "tests" / "published"  # config.json of public checkpoints
SHAPES = {
    name: json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    for name in (
        "LLaDA-8B", "Dream-7B", "A2D-Qwen3-0.6B", "SDAR-1.7B-Chat", "Nemotron-Labs-Diffusion-3B", "LLaDA-MoE-7B-A1B",
        "LLaDA2.0-mini",
    )
}  # fmt: skip
SHAPES["LLaDA2.0-mini"]["mask_token_id"] = 156895  # which a user gives with --mask-id

PUBLISHED = ("calibration.windows=128", "calibration.length=4096")  # published volume, with the default of 10 levels
SCORES = ("obs", "taylor")  # the default, and the one that needs the most memory

# runs the command line, then prints its own peak memory and seconds of cores, which other work does not change
PROGRAM = """
import sys, time
from structprune.bench.memory import peak_memory_bytes
from structprune.cli.main import main
code = main(sys.argv[1:])
print(peak_memory_bytes()["host"], time.process_time(), file=sys.stderr)
sys.exit(code)
"""


def measure(values: dict, ratio: float) -> dict:
    """Seconds of cores, peak resident bytes and results of one `inspect` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        result, peak, seconds = run_inspect(folder, ratio)
        volume = ("model.device=cuda", *PUBLISHED)
        memory = {score: run_inspect(folder, ratio, f"structured.score={score}", *volume)[0]["memory"]
                  for score in SCORES}  # fmt: skip
    sizes = {key: result[key] for key in ("parameters", "block_parameters", "macs", "bytes", "tokens", "memory")}
    device_peaks = {score: parts["peak device"] for score, parts in memory.items()}
    row = {"core_seconds": seconds, "peak_memory_bytes": peak, "ratio": ratio, **sizes}
    return row | {"predicted_device_peak_bytes": device_peaks}


def run_inspect(folder: str, ratio: float, *keys: str) -> tuple[dict, int, float]:
    """The results of one `inspect` in its own process, its peak resident bytes, and its seconds of cores."""
    command = [sys.executable, "-c", PROGRAM, "inspect", folder, "--ratio", str(ratio), "--json"]
    command += [f"--set={key}" for key in keys]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, seconds = process.stderr.strip().splitlines()[-1].split()
    return json.loads(process.stdout), int(peak), float(seconds)


def run(arguments: list[str] | None) -> None:
    parser = OneLineParser(__doc__)
    parser.add_argument("--out", type=result_file, default=Path("scripts/results/inspect.json"))
    parser.add_argument("--ratio", type=float, default=0.5)
    options = parser.parse_args(arguments)
    if not 0 < options.ratio < 1:
        raise UserError(f"--ratio {options.ratio}: give a number between 0 and 1")
    result = {name: measure(values, options.ratio) for name, values in SHAPES.items()}
    write_result(options.out, {"machine": describe_machine(), "shapes": result})
    table = Table(title=f"structprune inspect --ratio {options.ratio}, from config.json alone")
    scores = (f"predicted on a GPU, GB ({score})" for score in SCORES)
    for name in ("shape", "seconds of a core", "peak memory, MB", "parameters", "pruned", *scores):
        table.add_column(name, justify="right")
    for name, row in result.items():
        counts = [f"{row['parameters'][side] / 1e9:.3f} B" for side in ("before", "after")]
        predicted = [f"{peak / 1e9:.0f}" for peak in row["predicted_device_peak_bytes"].values()]
        table.add_row(name, f"{row['core_seconds']:.1f}", f"{row['peak_memory_bytes'] / 1e6:.0f}", *counts, *predicted)
    show_result(table, out=options.out)


def main(arguments: list[str] | None = None) -> int:
    return one_line("measure_inspect", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
