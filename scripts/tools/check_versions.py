"""Prove that pruned checkpoints reload without structprune, under several releases of transformers.

    python -m scripts.tools.check_versions [--versions 4.49.0,5.17.0,latest] [--work DIR] [--official-code DIR]

Prunes tiny random checkpoints with the installed structprune, then loads them through AutoModel and its relatives, in
one virtual environment per release that holds only torch (constraints.txt), transformers, numpy and safetensors. With
`--work` the environments are kept and reused. With `--official-code` the exports of class `official` are also loaded,
under 4.49, by the family's own modeling code (modeling_llada.py or modeling_dream.py and what they import, from the
model's Hub repository) instead of the files that structprune writes.

Exit code 1 if any logits differ: at all for the same torch build, by more than 1e-5 in the family's own code.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from safetensors.torch import save_file

from structprune import Plan, apply_plan, load_model, load_tokenizer, save_pruned
from structprune.assets import model_directory
from structprune.config import ExportSettings
from structprune.models.families import DREAM, LLADA
from structprune.structured.plan import BlockPlan

HERE = Path(__file__).parent
OFFICIAL_CODE_RELEASE = "4.49.0"  # the family's modeling code does not run on transformers 5
OWN_CODE_TOLERANCE = 1e-5
TEXT = "A model that fills in what is missing: it's 3.14 times <|mdm_mask|>\n\n  quicker, naïve or not."
MASK_ID = 2047  # of the embedded tokenizer, which the tiny checkpoints use
COMMON = {
    "vocab_size": 2048, "mask_token_id": MASK_ID, "pad_token_id": 2046, "torch_dtype": "float32", "rope_theta": 10000.0,
}  # fmt: skip
LLADA_VALUES = COMMON | {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 64, "n_heads": 4, "n_kv_heads": 4,
    "n_layers": 3, "mlp_hidden_size": 96, "embedding_size": 2048, "max_sequence_length": 64, "rms_norm_eps": 1e-5,
    "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False,
    "rope_full_precision": True, "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False,
    "weight_tying": False, "attention_layer_norm": False, "block_group_size": 1, "init_device": "cpu",
    "use_cache": False, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0,
    "flash_attention": False, "input_emb_norm": False, "multi_query_attention": None, "scale_logits": False,
    "mlp_ratio": 4, "init_fn": "normal", "layer_norm_with_affine": True, "init_std": 0.02,
    "init_cutoff_factor": None, "alibi_bias_max": 8.0, "attention_layer_norm_with_affine": True, "precision": None,
    "eos_token_id": 2046,
}  # fmt: skip
UNREAD_TIE = {"tie_word_embeddings": True}  # LLaDA's code reads weight_tying instead: its head is separate
DREAM_VALUES = COMMON | {
    "model_type": "Dream", "architectures": ["DreamModel"], "hidden_size": 72, "num_attention_heads": 6,
    "num_key_value_heads": 2, "num_hidden_layers": 3, "intermediate_size": 96, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6, "rope_scaling": None, "tie_word_embeddings": False, "hidden_act": "silu", "use_cache": False,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 3, "attention_dropout": 0.0,
    "bos_token_id": 2046, "eos_token_id": 2046,
}  # fmt: skip


def block(queries, kv_heads, channels: int) -> BlockPlan:
    """Keep these heads and every other one of the first 2 * `channels` MLP channels (or all 96)."""
    indices = tuple(range(96)) if channels == 96 else tuple(range(0, 96, 2))[:channels]
    return BlockPlan(tuple(queries), tuple(kv_heads), indices)


ALL = (range(4), range(4))
DREAM_ALL = (range(6), range(2))
# name -> config.json, plan of each block, biases on the consumers, export class
CASES = {
    "llada-free": (
        LLADA_VALUES, [block((0, 2, 3), (0, 2, 3), 40), block(*ALL, 96), block((1,), (1,), 17)], True, "free",
    ),
    "llada-kept": (LLADA_VALUES | UNREAD_TIE, [block(*ALL, 96)] * 3, False, "free"),
    "llada-gaps": (
        LLADA_VALUES, [block((), (), 40), block(*ALL, 0), block((1, 2), (1, 2), 96)], True, "free",
    ),
    "llada-depth": (LLADA_VALUES | UNREAD_TIE, [block(*ALL, 32), block((), (), 0), block(*ALL, 32)], False, "official"),
    "llada-uniform": (LLADA_VALUES, [block((0, 3), (0, 3), 48)] * 3, False, "uniform"),
    "llada-official": (LLADA_VALUES | UNREAD_TIE, [block(*ALL, 32)] * 3, False, "official"),
    "mmada-free": (
        LLADA_VALUES | {"model_type": "mmada", "architectures": ["MMadaModelLM"]},
        [block((0, 2), (0, 2), 24), block((1,), (1,), 48), block(*ALL, 8)], False, "free",
    ),
    "dream-free": (
        DREAM_VALUES, [block((0, 2, 3, 4), (0, 1), 24), block(range(3, 6), (1,), 40), block((1, 5), (0, 1), 96)],
        True, "free",
    ),
    "dream-gaps": (DREAM_VALUES, [block(*DREAM_ALL, 0), block((), (), 0), block((), (), 96)], False, "free"),
    "dream-depth": (DREAM_VALUES, [block((), (), 0), block(*DREAM_ALL, 40), block(*DREAM_ALL, 40)], False, "official"),
    "dream-uniform": (DREAM_VALUES, [block((0, 1, 4, 5), (0, 1), 48)] * 3, False, "uniform"),
    "dream-official": (DREAM_VALUES, [block(*DREAM_ALL, 40)] * 3, False, "official"),
}  # fmt: skip


def write_dense(directory: Path, values: dict) -> None:
    """A tiny random checkpoint in the family's official layout, with the embedded tokenizer."""
    family = DREAM if values["model_type"] == "Dream" else LLADA
    other = ("model_type", "architectures", "torch_dtype", "rope_scaling", "tie_word_embeddings")
    own = {key: value for key, value in values.items() if key not in other}
    torch.manual_seed(0)
    model = family.model_class(family.config_class(**own))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and family.embedding != name:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)  # (O, C): larger than at initialisation
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.1)  # (O,)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(values))
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory, byte_pair=family is DREAM)


def write_tokenizer(directory: Path, byte_pair: bool) -> None:
    """The embedded tokenizer, as Dream's repository has its own (`byte_pair`: vocabulary and merges), or as LLaDA's."""
    settings = json.loads((model_directory() / "tokenizer_config.json").read_text(encoding="utf-8"))
    whole = json.loads((model_directory() / "tokenizer.json").read_text(encoding="utf-8"))
    if byte_pair:
        (directory / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]), encoding="utf-8")
        merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in whole["model"]["merges"])])
        (directory / "merges.txt").write_text(merges + "\n", encoding="utf-8")
        added = {token.pop("id"): token for token in whole["added_tokens"]}
        settings |= {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": added}
        settings["auto_map"] = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
    else:
        shutil.copyfile(model_directory() / "tokenizer.json", directory / "tokenizer.json")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def make_cases(work: Path) -> list[dict]:
    """Pruned directories, with the logits of their models and the ids of their tokenizers."""
    cases = []
    for name, (values, blocks, biases, compat) in CASES.items():
        write_dense(work / "dense" / name, values)
        dense = load_model(work / "dense" / name)
        family = "dream" if values["model_type"] == "Dream" else "llada"
        model = apply_plan(dense, Plan(family, tuple(blocks)), output_bias=biases)
        if biases:
            for key, parameter in model.named_parameters():
                if key.endswith(("attn_out.bias", "ff_out.bias", "o_proj.bias", "down_proj.bias")):
                    parameter.data.normal_(std=0.1)  # (C,)
        shards = "100KB" if name == "llada-free" else "5GB"
        directory = save_pruned(model, work / "pruned" / name, ExportSettings(compat=compat, max_shard_size=shards))
        ids = torch.randint(0, MASK_ID, (2, 24), generator=torch.Generator().manual_seed(1))  # (B, T)
        ids[:, 5:15] = MASK_ID
        with torch.no_grad():
            logits = model(ids).logits  # (B, T, V)
        expected = work / f"{name}.expected.safetensors"
        save_file({"input_ids": ids, "logits": logits}, expected)
        case = {"name": name, "directory": str(directory), "expected": str(expected), "export": compat, "text": TEXT}
        cases.append(case | {"text_ids": load_tokenizer(work / "dense" / name)(TEXT)["input_ids"]})
    return cases


def environment(envs: Path, release: str) -> Path:
    """The Python of an environment with that release of transformers ("latest": the newest), created if missing."""
    folder = envs / f"transformers-{release}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = folder / "ready"
    if ready.exists() and release != "latest":
        return python
    if not python.exists():
        venv.create(folder, with_pip=True)
    package = "transformers" if release == "latest" else f"transformers=={release}"
    constraints = HERE.parents[1] / "constraints.txt"
    install = [str(python), "-m", "pip", "install", "-qq", "--upgrade", "-c", str(constraints)]
    subprocess.run([*install, "torch", package, "numpy<3", "safetensors"], check=True)
    ready.touch()
    return python


def run_check(python: Path, cases: list[dict], work: Path, code: Path | None = None) -> dict:
    """The result of reload_check.py: {versions, cases: {name: {check: difference} or {"error": text}}}."""
    listing = work / "cases.json"
    listing.write_text(json.dumps(cases))
    command = [str(python), "-I", str(HERE / "reload_check.py"), str(listing)]
    with tempfile.TemporaryDirectory(
        dir=work
    ) as home:  # for modules copied by trust_remote_code, which may be stale elsewhere
        surroundings = {**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1"}
        command += ["--official-code", str(code)] if code else []
        process = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    if process.returncode:
        return {"versions": {}, "cases": {case["name"]: {"error": process.stderr.strip()[-400:]} for case in cases}}
    return json.loads(process.stdout.splitlines()[-1])


def show(title: str, results: dict, tolerance: float, console: Console) -> bool:
    """Print one environment's table; returns whether all cases are within `tolerance`."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    table = Table(title=f"{title} ({versions or 'did not run'})")
    for name in ("checkpoint", "largest logit differences", ""):
        table.add_column(name)
    good = True
    for name, result in results["cases"].items():
        fine = "error" not in result and all(value <= tolerance for value in result.values())
        cells = [f"{key} {value:.1e}" if isinstance(value, float) else escape(value) for key, value in result.items()]
        table.add_row(name, ", ".join(cells), "ok" if fine else "[red]FAILED[/red]")
        good &= fine
    console.print(table)
    return good


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "4.49.0,5.17.0,latest"
    parser.add_argument("--versions", default=default, help="releases of transformers (default %(default)s)")
    parser.add_argument(
        "--work", type=Path, help="directory to keep and reuse the environments in (default: a temporary one)"
    )
    parser.add_argument("--official-code", type=Path, metavar="DIR", help="the family's own modeling files")
    return parser.parse_args()


def main() -> int:
    arguments, console = parse_arguments(), Console(width=None if sys.stdout.isatty() else 160)
    torch.set_num_threads(1)
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        cases, envs = make_cases(work), arguments.work or work / "envs"
        for release in arguments.versions.split(","):
            results = run_check(environment(envs, release), cases, work)
            same = results["versions"].get("torch", torch.__version__) == torch.__version__
            good &= show(f"transformers {release}", results, 0.0 if same else OWN_CODE_TOLERANCE, console)
        if arguments.official_code:
            types = {"modeling_llada.py": "llada", "modeling_dream.py": "dream"}
            paths = arguments.official_code.glob("modeling_*.py")
            names = [f"{types[path.name]}-official" for path in paths if path.name in types]
            official = [case for case in cases if case["name"] in names]
            python = environment(envs, OFFICIAL_CODE_RELEASE)
            results = run_check(python, official, work, arguments.official_code.resolve())
            good &= bool(official) and show("the family's own code", results, OWN_CODE_TOLERANCE, console)
    console.print("every reload agrees" if good else "[red]a reload differs[/red]")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
