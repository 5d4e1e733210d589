"""Load packed checkpoints and plain ones through transformers and compare them; run by check_packed.py.

Standalone on purpose: it runs where structprune is not installed, with any version of transformers.

    python packed_check.py CASES.json
"""

import importlib.metadata
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer


def load(auto, directory):
    """A model in the dtype that is stored."""
    key = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"
    return auto.from_pretrained(directory, trust_remote_code=True, **{key: "auto"}).eval()


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def compare(plain, other) -> dict:
    """How many tensors differ in name, dtype, shape or a bit, and the largest difference of logits."""
    one, two = plain.state_dict(), other.state_dict()
    same = {
        name
        for name in one.keys() & two.keys()
        if one[name].dtype == two[name].dtype and one[name].shape == two[name].shape and not two[name].is_meta
        if torch.equal(bits(one[name]), bits(two[name]))
    }
    ids = torch.arange(28)[None] % 90  # (1, T)
    with torch.no_grad():
        difference = (plain(ids).logits.float() - other(ids).logits.float()).abs().max().item()
    return {"tensors_that_differ": len((one.keys() | two.keys()) - same), "logits": difference}


def check_case(case: dict, scratch: Path) -> dict:
    """One packed directory, through both auto classes, and saved again; or what its code says where it refuses.

    Configuration and tokenizer load in either case.
    """
    config = AutoConfig.from_pretrained(case["packed"], trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(case["packed"], trust_remote_code=False)
    assert tokenizer.mask_token_id == config.mask_token_id, "the tokenizer's mask token is not the model's"
    plain = load(AutoModelForCausalLM, case["plain"])
    try:
        packed = load(AutoModelForCausalLM, case["packed"])
    except ImportError as error:
        return {"refused": str(error)}
    result = compare(plain, packed)
    through = compare(plain, load(AutoModel, case["packed"]))
    result = {key: max(result[key], through[key]) for key in result}
    packed.save_pretrained(scratch / case["name"])
    try:
        saved = compare(plain, load(AutoModelForCausalLM, scratch / case["name"]))
        again = "the same" if saved == {"tensors_that_differ": 0, "logits": 0.0} else "other weights"
    except Exception as error:
        again = f"not read ({type(error).__name__})"
    return result | {"saved_again": again}


def main() -> None:
    assert importlib.util.find_spec("structprune") is None, "structprune is installed here, so this would prove nothing"
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in json.loads(Path(sys.argv[1]).read_text()):
            try:
                results[case["name"]] = check_case(case, Path(scratch))
            except Exception as error:  # one broken case must not hide the others
                results[case["name"]] = {"error": f"{type(error).__name__}: {error}"}
    names = ("transformers", "compressed-tensors", "torch")
    versions = {name: importlib.metadata.version(name) for name in names}
    print(json.dumps({"versions": versions, "cases": results}))


if __name__ == "__main__":
    main()
