"""Fixtures tests share: the parity checkpoints, tiny official checkpoints made on the spot, published configs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from structprune.assets import model_directory
from structprune.calibration.batches import Calibration
from structprune.models.adapter import set_depth
from structprune.models.joined import join_state
from structprune.models.layers_structprune import Block
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.official import detect_family
from tests.tiny_values import MASK_ID, VALUES

torch.set_num_threads(1)  # on tensors this small threads only wait for each other
PARITY, PUBLISHED = (Path(__file__).parent / name for name in ("parity", "published"))


def tiny_values(family: str, **changes) -> dict:
    """config.json of a tiny official checkpoint: family `llada`, `mmada`, `dream` or one of A2D, some keys changed."""
    return VALUES[family] | changes


def build_model(values: dict, seed: int = 0, gain: float = 3.0):
    """A random model of those values; weights larger than at initialisation, so that attention is not uniform."""
    family = detect_family(values, "")
    other = ("model_type", "architectures", "torch_dtype", *family.ignored)
    config = family.config_class(**{key: value for key, value in values.items() if key not in other})
    torch.manual_seed(seed)
    model = family.model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif name.endswith(("q_norm.weight", "k_norm.weight", "query_layernorm.weight", "key_layernorm.weight")):
                parameter.normal_(mean=1.0, std=0.3)
            elif parameter.dim() == 2:
                small = ("wte" in name or "embed" in name) and not model.followers  # an embedding that is no head
                parameter.normal_(std=gain * 0.02 if small else parameter.shape[1] ** -0.5)
    return model.eval()


def write_checkpoint(directory: Path, values: dict, seed: int = 0, tokenizer: bool = True) -> Path:
    """An official checkpoint directory with random weights."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    dtype = getattr(torch, values.get("torch_dtype", "float32"))
    model = build_model(values, seed)
    state = {name: torch.cat(parts).to(dtype) for name, parts in join_state(model, model.stored_state()).items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(model_directory() / name, directory / name)
    return directory


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """`tiny_checkpoint(family, seed=0, tokenizer=True, **config changes)` -> an official checkpoint directory."""

    def make(family: str = "llada", seed: int = 0, tokenizer: bool = True, name: str | None = None, **changes) -> Path:
        return write_checkpoint(tmp_path / (name or f"{family}-tiny"), tiny_values(family, **changes), seed, tokenizer)

    return make


@pytest.fixture(scope="session")
def shared_checkpoint(tmp_path_factory):
    """As `tiny_checkpoint`, for fixtures that live longer than a test; a directory of its own at every call."""

    def make(family: str = "llada", **changes) -> Path:
        return write_checkpoint(
            tmp_path_factory.mktemp("checkpoint") / f"{family}-tiny", tiny_values(family, **changes)
        )

    return make


@pytest.fixture
def calibration() -> Calibration:
    """Three windows of 12 tokens at two noise levels, none held out."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 90, (3, 12), generator=generator)  # (N, T)
    p = torch.tensor([[0.3, 0.6], [0.4, 0.7], [0.2, 0.9]])  # (N, S)
    noisy = ids[:, None].repeat(1, 2, 1)  # (N, S, T)
    noisy[torch.rand(noisy.shape, generator=generator) < p[..., None]] = MASK_ID
    return Calibration(ids, noisy, p, {}, held_out=0)


@pytest.fixture
def tiny_model():
    """`tiny_model(family, seed=0, **config changes)` -> a random model in memory (no source directory)."""
    return lambda family="llada", seed=0, **changes: build_model(tiny_values(family, **changes), seed)


@pytest.fixture
def clock(monkeypatch):
    """A clock that models move while the test runs: 1 ms a query head, 0.05 ms an MLP channel, 2 ms a pass."""
    now = [0.0]

    def timed(owner, name, ms):
        original = getattr(owner, name)

        def call(self, *args):
            now[0] += 1e-3 * ms(self)
            return original(self, *args)

        monkeypatch.setattr(owner, name, call)

    timed(
        Block, "add_attention", lambda block: block.has_attention and block.part("query").out_features / block.head_dim
    )
    timed(Block, "add_mlp", lambda block: block.has_mlp and 0.05 * block.part("gate").out_features)
    timed(DiffusionLM, "rotary", lambda model: 2.0)
    return lambda: now[0]


@pytest.fixture
def gaps():
    """`gaps(family)` -> config changes: the first of four blocks has no MLP, the last no attention, the third neither.

    Only the second has both.
    """

    def make(family: str = "llada") -> dict:
        row = detect_family(tiny_values(family), "")
        keys = row.width_keys
        no_attention, no_mlp = {keys["query_heads"]: 0, keys["kv_heads"]: 0}, {keys["channels"]: 0}
        layers = {"0": no_mlp, "2": no_attention | no_mlp, "3": no_attention}
        return set_depth(tiny_values(family), row, 4) | {"per_layer_config": layers}

    return make


@pytest.fixture
def gap_pair(gaps):
    """`gap_pair(family, **config changes)` -> a model with `gaps`, and a whole one that computes the same.

    The whole one has the same weights, and zeros in the consumers of what the other lacks.
    """

    def make(family: str = "llada", **changes):
        values = tiny_values(family, **changes)
        gapped, whole = build_model(values | gaps(family), 5), build_model(values | fourth(family), 6)
        state, consumers = gapped.state_dict(), ("attn_out", "ff_out", "o_proj", "dense", "down_proj")
        with torch.no_grad():
            for name, parameter in whole.named_parameters():
                if name in state:
                    parameter.copy_(state[name])
                elif name.split(".")[-2] in consumers:
                    parameter.zero_()
        return gapped, whole

    def fourth(family: str) -> dict:
        return {key: value for key, value in gaps(family).items() if key != "per_layer_config"}

    return make


@pytest.fixture
def published_config(tmp_path):
    """`published_config(family)` -> a directory that holds only the config.json of a public checkpoint."""

    def make(family: str) -> Path:
        names = {
            "llada": "LLaDA-8B",
            "dream": "Dream-7B",
            "a2d-qwen3": "A2D-Qwen3-0.6B",
            "llada-moe": "LLaDA-MoE-7B-A1B",
            "llada2": "LLaDA2.0-mini",
            "nemotron-labs": "Nemotron-Labs-Diffusion-3B",
            "sdar": "SDAR-1.7B-Chat",
        }
        directory = tmp_path / names[family]
        directory.mkdir()
        shutil.copyfile(PUBLISHED / f"{directory.name}.json", directory / "config.json")
        return directory

    return make


@pytest.fixture(params=["llada", "dream", "a2d-qwen3", "a2d-llama", "a2d-qwen2", "sdar", "llada-moe", "llada2"])
def parity(request) -> Path:
    """Directory of one family's parity fixture."""
    return PARITY / request.param


@pytest.fixture
def text_path(tmp_path) -> Path:
    """Real English text, 60 kB, enough for tiny calibration sets."""
    from structprune.assets import text_file

    path = tmp_path / "text.txt"
    path.write_text(text_file("calibration.txt").read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    return path


@pytest.fixture
def small_run() -> list[str]:
    """key=value of a structured run that takes a moment."""
    return [
        "calibration.windows=3", "calibration.held_out=2", "calibration.length=16", "calibration.interval=25",
        "structured.split_candidates=2", "structured.split_windows=2", "structured.rounds=8",
    ]  # fmt: skip


@pytest.fixture
def prune_command(small_run):
    """`prune_command(checkpoint, out, text, *more)` -> such a run's arguments, but what a replay has no use for."""

    def make(checkpoint, out, text, *more) -> list[str]:
        small = [pair for pair in small_run if "--plan" not in more or not pair.startswith("structured.")]
        if str(text).endswith(".safetensors"):
            small = [pair for pair in small if not pair.startswith("calibration.")]
        sets = [part for pair in small for part in ("--set", pair)]
        return ["prune", str(checkpoint), "--out", str(out), "--calibration", str(text), *sets, *map(str, more)]

    return make


@pytest.fixture
def cpu_accelerator(monkeypatch) -> None:
    """Runs take the CPU for an accelerator: memory.offload streams weights to it, and memory.overlap has an effect."""
    from structprune.models.resources import Resources, resolve_resources

    class CpuAccelerator(Resources):
        accelerator = True

    def resolve(model, memory, dry_run=False):
        plain = resolve_resources(model, memory.model_copy(update={"offload": False}), dry_run)
        return CpuAccelerator(**vars(plain) | {"device": torch.device("cpu"), "offload": memory.offload})

    monkeypatch.setattr("structprune.runs.resolve.resolve_resources", resolve)


@pytest.fixture
def piqa(tmp_path) -> Path:
    """Six items in the layout of PIQA."""
    goals = ["boil an egg", "open a jar", "dry wet shoes", "clean a window", "find a lost key", "carry water home"]
    path = tmp_path / "piqa.jsonl"
    rows = [
        {"goal": f"How to {goal}?", "sol1": f"Use {goal[-3:]} and wait.", "sol2": "Run to the sea.", "label": index % 2}
        for index, goal in enumerate(goals)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def gsm8k(tmp_path) -> Path:
    """One item in the layout of GSM8K."""
    path = tmp_path / "gsm8k.jsonl"
    path.write_text(json.dumps({"question": "2 + 3?", "answer": "It is five.\n#### 5"}) + "\n")
    return path


@pytest.fixture
def eval_settings():
    """`eval_settings(text=None, tasks=(), **changes)` -> quick ones; `evaluation__seed=1` changes evaluation.seed."""
    from structprune.evaluation.settings import EvaluationConfig

    def make(text=None, tasks=(), **changes):
        values = {
            "evaluation.source": None if text is None else str(text),
            "evaluation.tasks": [str(task) for task in tasks],
        }
        if text is not None:
            values |= {"evaluation.windows": 20, "evaluation.length": 32, "evaluation.noise": 2}
        if any(str(task).startswith("piqa") for task in tasks):
            values |= {"evaluation.samples": 8, "evaluation.block": 4}
        return EvaluationConfig.load(
            overrides=values | {key.replace("__", "."): value for key, value in changes.items()}
        )

    return make
