"""Time and peak memory of `structprune inspect` on real 8B-size configurations, each in its own process.

python -m scripts.bench.measure_inspect --out scripts/results/inspect.json
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from scripts.tools.script_line import OneLineParser, one_line, result_file, show_result, write_result
from structprune.bench.machine import describe_machine
from structprune.errors import UserError

SHAPES = {
    "LLaDA-8B": {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 4096, "n_heads": 32, "n_kv_heads": 32,
        "n_layers": 32, "mlp_hidden_size": 12288, "vocab_size": 126464, "embedding_size": 126464,
        "max_sequence_length": 4096, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "mask_token_id": 126336,
        "torch_dtype": "bfloat16", "weight_tying": False, "include_bias": False, "include_qkv_bias": False,
    },
    "Dream-7B": {
        "model_type": "Dream", "architectures": ["DreamModel"], "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "mask_token_id": 151666,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    },
}  # fmt: skip

PUBLISHED = ("calibration.windows=128", "calibration.length=4096")  # published volume, with the default of 10 levels
SCORES = ("obs", "taylor")  # the default, and the one that needs the most memory

# runs the command line, then prints its own peak memory
PROGRAM = """
import sys
from structprune.bench.memory import peak_memory_bytes
from structprune.cli.main import main
code = main(sys.argv[1:])
print(peak_memory_bytes()["host"], file=sys.stderr)
sys.exit(code)
"""


def measure(values: dict, ratio: float) -> dict:
    """Seconds, peak resident bytes and results of one `inspect` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values), encoding="utf-8")
        start = time.perf_counter()
        result, peak = run_inspect(folder, ratio)
        seconds = time.perf_counter() - start
        volume = ("model.device=cuda", *PUBLISHED)
        memory = {score: run_inspect(folder, ratio, f"structured.score={score}", *volume)[0]["memory"]
                  for score in SCORES}  # fmt: skip
    sizes = {key: result[key] for key in ("parameters", "block_parameters", "macs", "bytes", "tokens", "memory")}
    device_peaks = {score: parts["peak device"] for score, parts in memory.items()}
    row = {"seconds": seconds, "peak_memory_bytes": peak, "ratio": ratio, **sizes}
    return row | {"predicted_device_peak_bytes": device_peaks}


def run_inspect(folder: str, ratio: float, *keys: str) -> tuple[dict, int]:
    """The results of one `inspect` in its own process, and its peak resident bytes."""
    command = [sys.executable, "-c", PROGRAM, "inspect", folder, "--ratio", str(ratio), "--json"]
    command += [f"--set={key}" for key in keys]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout), int(process.stderr.strip().splitlines()[-1])


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
    for name in ("shape", "seconds", "peak memory, MB", "parameters", "pruned", *scores):
        table.add_column(name, justify="right")
    for name, row in result.items():
        counts = [f"{row['parameters'][side] / 1e9:.3f} B" for side in ("before", "after")]
        predicted = [f"{peak / 1e9:.0f}" for peak in row["predicted_device_peak_bytes"].values()]
        table.add_row(name, f"{row['seconds']:.1f}", f"{row['peak_memory_bytes'] / 1e6:.0f}", *counts, *predicted)
    show_result(table, out=options.out)


def main(arguments: list[str] | None = None) -> int:
    return one_line("measure_inspect", lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
