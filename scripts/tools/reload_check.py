"""Load pruned checkpoints through transformers' auto classes and compare logits; run by check_versions.py.

Standalone on purpose: it runs where structprune is not installed, with any version of transformers.

    python reload_check.py CASES.json [--official-code DIR]
"""

import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

TOLERANCE = 1e-5  # of attention by other kernels
FAMILY_CODE = {  # configuration file, its class, modeling file, its class
    "llada": ("configuration_llada", "LLaDAConfig", "modeling_llada", "LLaDAModelLM"),
    "Dream": ("configuration_dream", "DreamConfig", "modeling_dream", "DreamModel"),
}


def load(auto, directory, **options):
    """Load a model in fp32, and check the keys that from_pretrained reports."""
    key = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
    options |= {"trust_remote_code": True, "output_loading_info": True, key: torch.float32}
    model, info = auto.from_pretrained(directory, **options)
    keys = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if keys:
        raise AssertionError(f"keys of {directory} do not match the model: {keys[:3]}")
    return model.eval()


def difference(model, expected, **inputs) -> float:
    """Largest absolute difference of logits; (B, T, V) each."""
    with torch.no_grad():
        return (model(expected["input_ids"], **inputs).logits - expected["logits"]).abs().max().item()


def trains(model, expected) -> None:
    """Check that the loss with `labels` has finite gradients, and the same ones with gradient checkpointing.

    Raises:
        AssertionError: it does not.
    """
    ids = expected["input_ids"]  # (B, T)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad.clone())  # (V, C)
    assert torch.isfinite(grads[0]).all() and grads[0].abs().max() > 0, "no gradient from the masked-diffusion loss"
    assert torch.allclose(grads[0], grads[1], atol=1e-6), "gradient checkpointing changed the gradients"
    model.gradient_checkpointing_disable()
    model.eval()


def fills_masks(directory, expected) -> dict:
    """Load as a fill-mask pipeline does, where the logits at a position predict its own token; else it is refused.

    Raises:
        AssertionError: it is not refused.
    """
    if not load(AutoModel, directory).shifted:
        return {"AutoModelForMaskedLM": difference(load(AutoModelForMaskedLM, directory), expected)}
    try:
        load(AutoModelForMaskedLM, directory)
    except ValueError:
        return {}
    raise AssertionError("AutoModelForMaskedLM took a model whose logits are shifted")


def saves_again(model, case: dict, expected, folder: Path) -> float:
    """Difference of logits after this transformers' save_pretrained and a reload; the layout is as it was.

    Raises:
        AssertionError: config.json changed in another key than versions and the classes beside the weights.
    """
    model.save_pretrained(folder)
    before, after = (json.loads((Path(each) / "config.json").read_text()) for each in (case["directory"], folder))
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    # of the run, or a default that is written out
    changed -= {"transformers_version", "dtype", "torch_dtype", "auto_map", "use_cache", "_name_or_path"}
    changed -= {"initializer_range", "tie_word_embeddings"} - set(before)
    if case.get("export") == "free":  # only what differs from our classes' defaults is written
        changed &= {"model_type", "architectures", "head_dim", "per_layer_config"}
    assert not changed, f"save_pretrained changed {sorted(changed)} in config.json"
    return difference(load(AutoModelForCausalLM, folder), expected)


def masks_as_without(length: int, size) -> list:
    """4-D attention masks that show what a model sees without one; `size` of its blocks, None without."""
    if size is None:
        return [torch.ones(1, 1, length, length, dtype=torch.bool), torch.zeros(1, 1, 1, length)]
    block = torch.arange(length) // size  # (T,)
    return [(block[:, None] >= block)[None, None]]  # (1, 1, T, T)


def attends(directory, expected) -> dict:
    """Differences with the attention implementations that there are, and with masks and positions that change nothing.

    Raises:
        AssertionError: eager attention gives other logits, or one that there is not is taken.
    """
    model = load(AutoModel, directory, attn_implementation="sdpa")
    length = expected["input_ids"].shape[1]  # T
    results = {
        "sdpa": difference(model, expected),
        "position_ids": difference(model, expected, position_ids=torch.arange(length)[None]),
    }
    # a model that is causal too sees all of a sequence that it is given alone
    size = None if model.layout.causal else getattr(model.config, "block_size", None)
    for mask in masks_as_without(length, size):
        assert difference(model, expected, attention_mask=mask) < TOLERANCE, "what is seen without a mask gave others"
    eager = difference(load(AutoModel, directory, attn_implementation="eager"), expected)
    assert 0 < eager < TOLERANCE, f"eager attention is {eager} off, where rounding differs"
    for name in ("flash_attention_2", "flex_attention"):
        try:
            load(AutoModel, directory, attn_implementation=name)
        except (ValueError, ImportError) as error:
            assert "\n" not in str(error), f"{name} is refused in several lines"
        else:
            raise AssertionError(f"{name} was taken")
    return results


def grows(directory, expected, folder: Path) -> float:
    """Difference of logits after new tokens, a training step with them, save_pretrained and a reload."""
    model, ids = load(AutoModelForCausalLM, directory), expected["input_ids"].clone()  # (B, T)
    rows = model.get_input_embeddings().weight.shape[0]  # V
    torch.manual_seed(0)
    model.resize_token_embeddings(rows + 5, pad_to_multiple_of=16)
    ids[:, 1:5] = torch.arange(rows, rows + 4)
    model.train()
    model(ids, labels=ids.flip(1), mask_probability=torch.full(ids.shape, 0.5)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval()
    with torch.no_grad():
        grown = {"input_ids": ids, "logits": model(ids).logits}  # (B, T), (B, T, V + 16)
    assert grown["logits"].shape[-1] == rows + 16, "the head did not grow with the embedding"
    model.save_pretrained(folder)
    return difference(load(AutoModelForCausalLM, folder), grown)


def writes(model, case: dict) -> None:
    """Check that the sampler beside the weights gives the expected tokens.

    Raises:
        AssertionError: it does not.
    """
    texts = load_file(case["texts"])
    sampler = model.diffusion_generate if hasattr(model, "diffusion_generate") else model.generate
    for each in case["options"]:
        options = {key: value for key, value in each.items() if key != "name"}
        prompt, mask = texts[f"{each['name']}/prompt"], texts.get(f"{each['name']}/attention_mask")
        output = sampler(prompt, mask, **options)  # (B, P + G)
        assert torch.equal(output, texts[f"{each['name']}/output"]), f"other tokens in {each['name']}: {options}"


def check_case(case: dict, scratch: Path) -> dict:
    """Load one pruned directory through every auto class."""
    expected, directory = load_file(case["expected"]), case["directory"]
    results = {auto.__name__: difference(load(auto, directory), expected) for auto in (AutoModel, AutoModelForCausalLM)}
    results |= fills_masks(directory, expected) | attends(directory, expected)
    model = load(AutoModelForCausalLM, directory)
    writes(model, case)
    results["save_pretrained"] = saves_again(model, case, expected, scratch / case["name"])
    results["resized"] = grows(directory, expected, scratch / f"{case['name']}-grown")
    trains(model, expected)
    if "text" not in case:  # a checkpoint without a tokenizer
        return results
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)  # a tokenizer needs none of our code
    assert tokenizer.mask_token_id == model.config.mask_token_id, "the tokenizer's mask token is not the model's"
    assert tokenizer(case["text"])["input_ids"] == case["text_ids"], "the tokenizer gives other ids"
    return results


def check_official(case: dict, code: Path, scratch: Path) -> dict:
    """Load an `official` export with the family's own modeling code, placed beside the weights as its authors do."""
    expected, directory = load_file(case["expected"]), scratch / ("official_" + case["name"].replace("-", "_"))
    shutil.copytree(case["directory"], directory)
    values = json.loads((directory / "config.json").read_text())
    configuration, config_class, modeling, model_class = FAMILY_CODE[values["model_type"]]
    for path in code.glob("*.py"):
        shutil.copyfile(path, directory / path.name)
    target = f"{modeling}.{model_class}"
    own = {"AutoConfig": f"{configuration}.{config_class}", "AutoModel": target, "AutoModelForCausalLM": target}
    (directory / "config.json").write_text(json.dumps(values | {"auto_map": own}))
    model = load(AutoModel, directory)
    assert type(model).__name__ == model_class, f"{type(model).__name__} was loaded, not the family's own class"
    return {f"own code: {model_class}": difference(model, expected)}


def main() -> None:
    assert importlib.util.find_spec("structprune") is None, "structprune is installed here, so this would prove nothing"
    torch.set_num_threads(1)
    cases = json.loads(Path(sys.argv[1]).read_text())
    code = Path(sys.argv[3]) if sys.argv[2:3] == ["--official-code"] else None
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases:
            try:
                if code is None:
                    results[case["name"]] = check_case(case, Path(scratch))
                else:
                    results[case["name"]] = check_official(case, code, Path(scratch))
            except Exception as error:  # one broken case must not hide the others
                results[case["name"]] = {"error": f"{type(error).__name__}: {error}"}
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions, "cases": results}))


if __name__ == "__main__":
    main()
