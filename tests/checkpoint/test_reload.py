"""A pruned directory in a fresh process that cannot import structprune: the same logits, bit for bit.

Those of mixtures up to rounding: where small experts lie in memory changes the last bit on some processors.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from structprune import Plan, apply_plan, load_model, save_pruned
from structprune.assets import text_file
from structprune.checkpoint.export import code_files
from structprune.config import ExportSettings
from structprune.generation.generate import generate
from structprune.generation.samplers import generation_settings
from structprune.models.adapter import Adapter
from structprune.recovery.settings import RecoverConfig
from structprune.runs.recover import recover
from structprune.structured.plan import BlockPlan

pytestmark = pytest.mark.slow

READER = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "structprune":
            raise ModuleNotFoundError("structprune is not installed here")
sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
try:
    import structprune
    raise SystemExit("structprune could be imported")
except ModuleNotFoundError:
    pass
results = {}
for name, (directory, options) in json.loads(sys.argv[1]).items():
    ids = load_file(f"{directory}.ids.safetensors")["ids"]
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    for auto in (AutoModel, AutoModelForCausalLM):
        model, info = auto.from_pretrained(directory, trust_remote_code=True, dtype="auto", output_loading_info=True)
        assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
        with torch.no_grad():
            results[f"{name} {auto.__name__}"] = model(ids).logits
        assert not model.training and type(config).__name__ == type(model.config).__name__
    if hasattr(model, "diffusion_generate"):
        options |= {"attention_mask": "full", "return_dict_in_generate": True}
        results[f"{name} text"] = model.diffusion_generate(ids, **options).sequences
    else:
        results[f"{name} text"] = model.generate(ids, **options)
    torch.manual_seed(0)
    results[f"{name} loss"] = model(ids, labels=ids).loss.detach()
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    results[f"{name} tokens"] = torch.tensor(tokenizer("fill in <|mdm_mask|>")["input_ids"])
save_file(results, sys.argv[2])
"""
L, D = range(4), range(6)
DREAM_TEXT = {"max_new_tokens": 8, "steps": 4, "alg": "entropy"}
TEXTS = {"dream": DREAM_TEXT, "llada2": {"gen_length": 8, "steps": 8, "threshold": 0.9}}
LLADA_TEXT = {"gen_length": 8, "block_length": 4, "steps": 8, "threshold": 0.9}
MIXTURES = ("llada-moe", "llada2")
# name -> family, what each block keeps (query heads, KV heads, channels; of mixtures those of each expert, experts, and
# channels of the shared one), biases, class, dtype
CASES = {
    "llada_free": ("llada", [((0, 2, 3), (0, 2, 3), 11), (L, L, 48), ((1,), (1,), 30)], True, "free", "float32"),
    "llada_uniform": ("llada", [((0, 3), (0, 3), 24)] * 3, False, "uniform", "float32"),
    "llada_official": ("llada", [(L, L, 16)] * 3, False, "official", "float32"),
    "llada_gaps": ("llada", [((), (), 11), (L, L, 0), ((1,), (1,), 30)], True, "free", "float32"),
    "llada_depth": ("llada", [(L, L, 16), ((), (), 0), (L, L, 16)], False, "official", "float32"),
    "dream_gaps": ("dream", [(D, range(2), 0), ((), (), 0), ((), (), 48)], False, "free", "bfloat16"),
    "dream_depth": ("dream", [((0, 3), (0, 1), 16), ((0, 3), (0, 1), 16), ((), (), 0)], False, "uniform", "float32"),
    "mmada_free": ("mmada", [((2,), (2,), 8), (L, L, 16), (L, L, 48)], False, "free", "float32"),
    "dream_free": (
        "dream", [((0, 2, 3, 5), (0, 1), 7), ((3, 4, 5), (1,), 48), ((2, 4), (0, 1), 20)], True, "free", "float32",
    ),
    "dream_official": ("dream", [(D, range(2), 40)] * 3, False, "official", "float32"),
    "dream_bf16": (
        "dream", [((0, 1, 3, 4), (0, 1), 16), (D, range(2), 48), (D, range(2), 16)], False, "free", "bfloat16",
    ),
    "a2d_llama_free": ("a2d-llama", [((0, 3), (0, 3), 7), ((2,), (2,), 48), (L, L, 20)], True, "free", "float32"),
    "a2d_qwen2_free": (
        "a2d-qwen2", [((0, 2, 3, 5), (0, 1), 7), ((3, 4, 5), (1,), 48), ((), (), 20)], True, "free", "float32",
    ),
    "moe_free": (
        "llada-moe", [((1, 3), (1, 3), 5, (0, 2, 5)), ((), (), 16, (1, 4)), (L, L, 0, ())], False, "free", "float32",
    ),
    "moe_official": ("llada-moe", [(L, L, 12, (1, 2, 3, 5))] * 3, False, "official", "float32"),
    "llada2_free": (
        "llada2", [((0, 1), (0,), 9), ((0, 3), (0, 1), 7, (0, 1, 3, 4, 6, 7), 3), (L, range(2), 16, (2, 3, 4, 5))],
        False, "free", "float32",
    ),
    "llada2_official": (
        "llada2", [((0, 2), (0, 1), 9), *[((0, 2), (0, 1), 7, (0, 1, 3, 4, 6, 7), 7)] * 2], False, "official",
        "float32",
    ),
}  # fmt: skip
RECOVERED = {"llada_recovered": "llada_uniform", "llada2_recovered": "llada2_official"}  # trained from what was cut
FAMILY = {name: case[0] for name, case in CASES.items()}
FAMILY |= {name: FAMILY[source] for name, source in RECOVERED.items()}


def block_of(queries, kv_heads, count: int, experts=None, shared: int = 0) -> BlockPlan:
    """Keep the last channels, of each expert where there are any."""
    if experts is None:
        return BlockPlan(tuple(queries), tuple(kv_heads), tuple(range(48 - count, 48)))
    channels = tuple(16 * expert + channel for expert in experts for channel in range(16 - count, 16))
    return BlockPlan(tuple(queries), tuple(kv_heads), channels, experts, tuple(range(16 - shared, 16)))


def train(small, dense, out) -> None:
    """Low-rank updates, merged into the weights."""
    keys = {
        "data.source": str(text_file("calibration.txt")), "data.length": 16, "data.held_out": 6, "data.noise": 2,
        "train.method": "lora", "train.rank": 4, "train.batch": 8, "train.pass_windows": 4, "train.tokens": 16 * 8 * 8,
        "train.learning_rate": 2e-3, "train.evaluations": 2, "model.device": "cpu",
    }  # fmt: skip
    assert recover(str(small), str(dense), out, RecoverConfig.load(overrides=keys)).report["kept"] == "trained"


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory, shared_checkpoint):
    """name -> (the model in memory, its ids); and what one fresh process read of all of them."""
    root = tmp_path_factory.mktemp("reload")
    made, places, sources = {}, {}, {}
    ids = torch.randint(0, 2048, (2, 14), generator=torch.Generator().manual_seed(4))  # (B, T)
    for name, (family, kept, biases, compat, dtype) in CASES.items():
        sources[name] = shared_checkpoint(family)
        dense = load_model(sources[name], dtype=dtype)
        blocks = tuple(block_of(*each) for each in kept)
        model = apply_plan(dense, Plan(Adapter(dense).family.name, blocks), biases)
        if biases:
            for key, parameter in model.named_parameters():
                if key.endswith(("attn_out.bias", "ff_out.bias", "o_proj.bias", "down_proj.bias")):
                    parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))  # (C,)
        shards = "100KB" if name.endswith("free") else "5GB"
        save_pruned(model, root / name, ExportSettings(compat=compat, dtype=dtype, max_shard_size=shards))
        made[name] = (model, ids)
    for name, source in RECOVERED.items():
        train(root / source, sources[source], root / name)
        made[name] = (load_model(root / name), ids)
    for name in made:
        save_file({"ids": ids}, root / f"{name}.ids.safetensors")
        places[name] = (str(root / name), TEXTS.get(FAMILY[name], LLADA_TEXT))
    environment = {**os.environ, "HF_HOME": str(root / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", READER, json.dumps(places), str(root / "results.safetensors")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return made, load_file(root / "results.safetensors"), root


def assert_same(family: str, one: torch.Tensor, two: torch.Tensor) -> None:
    assert one.dtype == two.dtype
    assert (one - two).abs().max() <= 1e-5 if family in MIXTURES else torch.equal(one, two)


@pytest.mark.parametrize("name", FAMILY)
def test_logits_are_bitwise_those_of_the_model_in_memory(reloaded, name):
    made, results, _ = reloaded
    model, ids = made[name]
    with torch.no_grad():
        logits = model(ids).logits  # (B, T, V)
    assert logits.abs().max() > 0.1 and (name in RECOVERED or logits.dtype == getattr(torch, CASES[name][4]))
    for auto in ("AutoModel", "AutoModelForCausalLM"):
        assert_same(FAMILY[name], results[f"{name} {auto}"], logits)


@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_tokenizer_too(reloaded, name):
    made, results, _ = reloaded
    model, ids = made[name]
    torch.manual_seed(0)
    assert_same(FAMILY[name], results[f"{name} loss"], model(ids, labels=ids).loss.detach())
    assert results[f"{name} tokens"][-1] == 2047


@pytest.mark.parametrize("name", FAMILY)
def test_text_is_that_of_the_package(reloaded, name):
    made, results, _ = reloaded
    model, ids = made[name]
    options = {"gen_length" if key == "max_new_tokens" else key: value
               for key, value in TEXTS.get(FAMILY[name], LLADA_TEXT).items()}  # fmt: skip
    assert torch.equal(results[f"{name} text"], generate(model, ids, generation_settings(model.config, options)))


def test_a_recovered_model_is_another_than_the_one_it_was(reloaded):
    for name, source in RECOVERED.items():
        (before, ids), (after, _) = (reloaded[0][each] for each in (source, name))
        with torch.no_grad():
            assert (before(ids).logits - after(ids).logits).abs().max() > 1e-3


def test_shards_were_really_several(reloaded):
    assert len(list((reloaded[2] / "llada_free").glob("*.safetensors"))) > 2
    assert len(list((reloaded[2] / "llada_uniform").glob("*.safetensors"))) == 1


def test_code_files_stand_alone():
    """No import beyond Python's own, torch, transformers and each other, also where transformers only scans for it."""
    from pathlib import Path

    from structprune.models import modeling_structprune

    for name in sorted(code_files()):
        lines = Path(modeling_structprune.__file__).with_name(name).read_text().splitlines()
        imports = [line.split()[1] for line in lines if line.lstrip().startswith(("import ", "from "))]
        beside = tuple(f".{file.removesuffix('.py')}" for file in code_files())
        allowed = {"torch", "transformers"} | sys.stdlib_module_names
        assert imports
        assert all(module.startswith(beside) or module.split(".")[0] in allowed for module in imports), imports
