"""Broken configurations, plans, calibrations and task files: one line for each."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

Content = str | bytes | Callable[[Path], object]
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
YAML: dict[str, tuple[Content, str]] = {
    "bomb": (BOMB, "its aliases expand to more than"),
    "itself": ("structured: &a [*a]\n", "its aliases expand to more than"),
    "nested": ("[" * 1500, "cannot be read as YAML"),
    "cut": ("structured: {ratio: 0.3", "cannot be read as YAML"),
    "date": ("structured: {ratio: 2020-99-99}\n", "cannot be read as YAML"),
    "tag": ("structured: !!python/object/apply:os.system [ls]\n", "cannot be read as YAML"),
    "not utf-8": (b"\xff\xfe", "cannot be read as YAML"),
    "list": ("[1, 2]\n", "is not a mapping of sections"),
    "number": ("7\n", "is not a mapping of sections"),
    "false": ("false\n", "is not a mapping of sections"),
    "key": ("structurd: {ratio: 0.3}\n", "unknown config section 'structurd'"),
    "number for a key": ("1: 2\n", "1"),
    "text for a section": ("model: x\n", "model = 'x'"),
    "true for a number": ("model: {mask_id: true}\n", "model.mask_id = True"),
    "pipe": (os.mkfifo, "is a pipe or device, not a file"),
    "directory": (Path.mkdir, "is a directory, not a file"),
    "large": ("# \n" * 400_000, "has 1,200,000 bytes"),
}


@pytest.mark.parametrize("verb", ["prune", "masks", "inspect", "eval"])
@pytest.mark.parametrize("name", YAML)
def test_a_broken_configuration(put, refused, name, verb):
    content, said = YAML[name]
    assert said in refused(verb, "--config", put("a.yaml", content))


def plan(**changes) -> str:
    block = {"query_heads": [0, 1], "kv_heads": [0, 1], "channels": [0, 1, 2]} | changes
    return json.dumps({"format": 1, "family": "llada", "notes": {}, "blocks": [block] * 3})


PLANS: dict[str, tuple[Content, str]] = {
    "empty": ("{}", "is not a structprune plan"),
    "list": ("[]", "holds [], not an object"),
    "cut": ('{"format": 1', "is not valid JSON"),
    "format": (json.dumps({"format": 9, "blocks": []}), "is not a structprune plan of format 1"),
    "blocks": (json.dumps({"format": 1, "family": "llada", "blocks": {"a": 1}}), "is not a structprune plan"),
    "few blocks": (json.dumps({"format": 1, "family": "llada", "blocks": []}), "the plan has 0 blocks"),
    "family": (json.dumps({"format": 1, "family": ["x"], "blocks": []}), "the plan is for family"),
    "text": (plan(channels=["0"]), "has no list of integers 'channels'"),
    "fractions": (plan(channels=[0.0]), "has no list of integers 'channels'"),
    "true": (plan(channels=[True]), "has no list of integers 'channels'"),
    "beyond": (plan(channels=[0, 48]), "names 48, but the model has 48"),
    "far beyond": (plan(channels=[10**30]), "but the model has 48"),
    "negative": (plan(channels=[-1]), "names -1"),
    "repeats": (plan(channels=[0, 0]), "is not sorted and free of repeats"),
    "no MLP": (plan(channels=[]), "the plan leaves no block with an MLP"),
    "no attention": (plan(query_heads=[], kv_heads=[]), "the plan leaves no block with attention"),
    "half of its heads": (plan(kv_heads=[]), "block 0 keeps query heads but no KV heads: empty both lists"),
    "null for nothing": (plan(channels=None), "has no list of integers 'channels'"),
    "lone head": (plan(query_heads=[0, 3]), "its KV head 3 goes"),
    "nested": ('{"format": 1, "a": ' + "[" * 10**5 + "]" * 10**5 + "}", "is nested too deeply"),
    "notes": (json.dumps({"format": 1, "family": "llada", "notes": [1], "blocks": []}), "the plan has 0 blocks"),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_broken_plan(put, refused, name):
    content, said = PLANS[name]
    assert said in refused("prune", "--plan", put("plan.json", content))


def calibration(metadata: dict[str, str] | None = None, **changes) -> Callable[[Path], object]:
    """A calibration of 4 windows of 16 tokens at 2 levels, tensors replaced (None: left out)."""

    def write(path: Path) -> None:
        ids = torch.arange(64).view(4, 16)
        noisy = ids[:, None].repeat(1, 2, 1)
        noisy[..., ::2] = 2047
        tensors = {"input_ids": ids, "noisy_ids": noisy, "mask_probability": torch.full((4, 2), 0.5)} | changes
        present = {name: value.contiguous() for name, value in tensors.items() if value is not None}
        save_file(present, path, metadata={"mask_id": "2047", "held_out": "1"} | (metadata or {}))

    return write


LONG = torch.zeros(4, 65, dtype=torch.long)
CALIBRATIONS: dict[str, tuple[Content, str]] = {
    "junk": (os.urandom(500), "cannot be read as safetensors"),
    "empty": (b"", "cannot be read as safetensors"),
    "directory": (Path.mkdir, "no calibration file at"),
    "pipe": (os.mkfifo, "no calibration file at"),
    "without ids": (calibration(input_ids=None), "has no tensor 'input_ids'"),
    "without noise": (calibration(noisy_ids=None), "has no tensor 'noisy_ids'"),
    "fractions": (calibration(input_ids=torch.rand(4, 16)), "input_ids is float32, not int64"),
    "flat": (calibration(input_ids=torch.arange(64)), "input_ids has shape (64,)"),
    "other windows": (calibration(noisy_ids=torch.zeros(3, 2, 16).long()), "noisy_ids has shape (3, 2, 16)"),
    "no windows": (calibration(input_ids=torch.zeros(0, 16).long()), "with all of them positive"),
    "negative": (calibration(input_ids=-torch.ones(4, 16).long()), "input_ids holds the negative token id -1"),
    "foreign ids": (
        calibration(input_ids=torch.full((4, 16), 5000), noisy_ids=torch.full((4, 2, 16), 2047)),
        "has token id 5000",
    ),
    "foreign noise": (calibration(noisy_ids=torch.full((4, 2, 16), 9)), "where only mask id 2047 may"),
    "probability": (calibration(mask_probability=torch.zeros(4, 2)), "mask_probability holds 0.0"),
    "probability nan": (calibration(mask_probability=torch.full((4, 2), float("nan"))), "mask_probability holds nan"),
    "mask id": (calibration({"mask_id": "7"}), "where only mask id 7 may"),
    "mask id huge": (calibration({"mask_id": str(10**20)}), "not an integer of 64 bits"),
    "mask id text": (calibration({"mask_id": "x"}), "metadata 'mask_id' is 'x'"),
    "held out": (calibration({"held_out": "9"}), "has 4 windows, of which 9 cannot be held out"),
    "held out negative": (calibration({"held_out": "-1"}), "of which -1 cannot be held out"),
    "all held out": (calibration({"held_out": "4"}), "leaves none to fit on"),
    "none held out": (calibration({"held_out": "0"}), "holds out no window"),
    "longer than the model": (
        calibration(input_ids=LONG, noisy_ids=torch.full((4, 2, 65), 2047)),
        "windows of 65 tokens exceed the model's 64 positions",
    ),
}


@pytest.mark.parametrize("method", ["structured", "unstructured", "nm"])
@pytest.mark.parametrize("name", CALIBRATIONS)
def test_a_broken_calibration(put, name, method, run_refused):
    content, said = CALIBRATIONS[name]
    path = put("a.safetensors", content)
    assert said in run_refused("prune", "MODEL", "--out", "OUT", "--calibration", path, "--method", method)


def piqa(**changes) -> str:
    return json.dumps({"goal": "a", "sol1": "b", "sol2": "c", "label": 0} | changes) + "\n"


TASKS: dict[str, tuple[Content, str]] = {
    "empty": ("", "is empty"),
    "cut": ('{"goal": ', "line 1"),
    "list": ("[1]\n", "line 1"),
    "label": (piqa(label=2), "line 1"),
    "label as text": (piqa(label="0"), "line 1"),
    "answer a number": (piqa(sol1=1), "line 1"),
    "answer empty": (piqa(sol2=""), "sol2"),
    "not utf-8": (b"\xff\xfe\n", "UTF-8"),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_broken_task(put, name, run_refused):
    content, said = TASKS[name]
    path = put("piqa.jsonl", content)
    assert said in run_refused("eval", "MODEL", "--out", "OUT", "--tasks", f"piqa:{path}")
