"""Tables of docs/after-pruning.md, from results made by hand."""

from scripts.readme.readme_after import exports, gguf, packed, quantised

MACHINE = {"processor": "P", "cores": 2, "threads": 1, "torch": "2.13.0+cpu", "cuda_device": None}


def test_llama_cpp_beside_torch():
    row = {
        "checkpoint": "small", "family": "llada", "class": "uniform", "dtype": "q8_0", "bytes": 3_900_000,
        "largest_difference": 1.349, "largest_logit": 45.8, "agreement": 0.986, "equal_tokens": 0.125,
        "tokens_equal": True,
    }  # fmt: skip
    settings = {"llama-cpp-python": "0.3.36", "written": 32}
    text = gguf({"rows": [row], "settings": settings, "machine": MACHINE})
    assert "| small (llada, uniform) | `q8_0` | 3.9 MB | 1.3 of 46 | 98.6% | 12% |" in text
    assert "llama-cpp-python 0.3.36" in text and "32 masked tokens" in text and "the same tokens." in text
    assert "the same tokens." not in gguf(
        {"rows": [row | {"tokens_equal": False}], "settings": settings, "machine": MACHINE}
    )


def test_packed_masks():
    case = {"case": "small-2of4", "plain_bytes": 9_640_000, "written_bytes": 6_340_000, "layout": "sparse-24-bitmask"}
    old, new = ({"transformers": name, "compressed-tensors": other} for name, other in (("4.5", "0.1"), ("5.2", "0.2")))
    read = {"tensors_that_differ": 0, "logits": 0.0, "saved_again": "the same"}
    free = case | {"layout": "sparse-bitmask", "case": "small-half", "versions": old} | read
    rows = [case | read | {"versions": old}, free, *(each | {"versions": new, "refused": "x"} for each in (case, case))]
    rows.append(case | {"layout": "sparse-bitmask", "versions": new, "tensors_that_differ": 1, "logits": 0.0})
    text = packed({"rows": rows})
    assert "| 4.5 | 0.1 | equal | equal | the same |" in text and "| 5.2 | 0.2 | refused | wrong | - |" in text
    assert "went from 9.64 to 6.34 MB (small-2of4), 9.64 to 6.34 MB (small-half)." in text


def test_quantised_models():
    rows = [
        {"checkpoint": "dense", "form": "bf16", "bytes": 9_640_000, "reload_difference": 0.0,
         "loss": {"mean": 0.0005, "standard_error": 0.0007}},
        {"checkpoint": "pruned-at-0_5", "form": "nf4", "refused": "shape"},
    ]  # fmt: skip
    versions = {"torchao": "0.18.0", "bitsandbytes": None, "transformers": "5.24.0"}
    settings = {"windows": 96, "length": 128, "versions": versions}
    text = quantised({"rows": rows, "settings": settings, "machine": MACHINE})
    assert "| dense | bf16 | 9.64 MB | +0.0005 ± 0.0007 | 0 |" in text
    assert "| pruned at 0.5 | nf4 | - | refused: shape | - |" in text
    assert "torchao 0.18.0, transformers 5.24.0; loss" in text


def test_exports_of_every_class():
    differences = {"structprune": 0.0, "exported": 0.0, "elsewhere": 1e-7}
    row = {"case": "dream-uniform", "class": "uniform", "layout_kept": True, "differences": differences,
           "gguf": "llama.cpp reads ...", "changed_by_training": 0.42}  # fmt: skip
    text = exports({"rows": [row, row | {"gguf": "written", "layout_kept": False}], "settings": {"steps": 2}})
    assert "| dream, uniform | `uniform` | the same | 0 | 0 | 1e-07 | no |" in text
    assert "| another | 0 | 0 | 1e-07 | written |" in text and "2 steps (which moves logits by 0.42 at least)" in text
