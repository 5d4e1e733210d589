"""The model card of a pruned checkpoint, from its report."""

import re
from pathlib import Path

import yaml

from structprune.models.families import family_named
from structprune.report.tables import change, mask_choice, millions, plus_minus, shown_arm

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- structprune
- pruned
- diffusion-language-model
{base}{license}---

# {source}, {percent} of its block projections removed

A smaller *dense* masked diffusion language model: attention heads and MLP channels were removed from `{source}` with
structprune {version}, and what is left {refitted}.

| | dense | pruned | change |
|---|---|---|---|
{rows}

NELBO is the masked-diffusion bound in nats per token on {windows} held-out windows of {length} tokens of the
calibration text; the change is a paired difference with its standard error. The same windows chose between split,
damping and refit, so it is a little optimistic. No benchmark was run.

Made with: {choice}, refit {refit}; calibration on
`{text}` ({count} windows of {length} tokens{states}, seed {seed}).
Export class: `{export}`. Every figure is in report.json, what was kept in plan.json, and calibration.safetensors
replays the run.

## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# before transformers 4.56, `dtype` is called `torch_dtype`
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

The code beside the weights is structprune's own two modeling files. `model(input_ids).logits` are those of the family's
published model: {alignment}.

## Train it back

Called with `labels`, the model masks the input itself and returns the masked-diffusion loss, so that `transformers`'
Trainer and PEFT work as they are. Pruning costs quality; a short training run wins much of it back.
"""


MASK_TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- structprune
- sparse
- diffusion-language-model
{base}{license}---

# {source} with {percent} of its projections' weights at zero

The checkpoint `{source}` with single weights set to zero by structprune {version}; layout, configuration, tokenizer and
code are those of the original, so whatever loads the original loads this.

**The file is no smaller and no faster as it is.** Zeros pay where a kernel skips them (2:4 on NVIDIA GPUs) or where a
file is compressed; for a smaller dense model, remove heads and channels instead (`structprune prune --method
structured`).

Made with: {choice}; {refit}; {text}.{nelbo}
Sparsity per tensor and every other figure is in report.json; masks.safetensors has one bit per weight (1: kept).

## Train it back

```python
from structprune.masking import Masks, keep_zeros

masks = Masks.load("PATH/masks.safetensors")
with keep_zeros(model, masks):  # PEFT: mask_adapters and merge_adapters
    trainer.train()
```
"""


def mask_card(report: dict) -> str:
    """README.md of a checkpoint with masked weights.

    Args:
        report: of `structprune.runs.mask.mask`.
    """
    source, nelbo, calibration = report["source"], report["held_out_nelbo"], report["calibration"]
    reconstruct = report["config"]["reconstruct"]
    loss = ""
    if nelbo:
        gap = plus_minus(nelbo["loss"])
        note = "; the same windows chose the refit's damping, so it is a little optimistic"
        loss = (
            f"\nNELBO on {nelbo['windows']} held-out windows of that text, nats per token: {nelbo['dense']:.4f} before,"
            f" {nelbo['masked']:.4f} after ({gap}, paired), with the weights as they were in memory"
            f"{note if reconstruct['enabled'] else ''}.\n"
        )
    text = "no calibration text was looked at"
    if calibration:
        text = (
            f"calibration on `{_text(calibration.get('source', 'given windows'))}` ({calibration['windows']} windows of"
            f" {calibration['length']} tokens, held-out ones included{_states(calibration)})"
        )
    values = {
        "source": source,
        "base": _base(source),
        "license": _license(report["license"]),
        "percent": f"{100 * report['sparsity']['total']:.1f} %",
        "version": report["versions"]["structprune"],
        "choice": mask_choice(report),
        "refit": _mask_refit(reconstruct, nelbo),
        "text": text,
        "nelbo": loss,
    }
    return MASK_TEMPLATE.format(**values)


def _mask_refit(reconstruct: dict, nelbo: dict | None) -> str:
    if nelbo is None or not reconstruct["enabled"]:  # a refit always has held-out windows
        return "no refit"
    refit = f"refit of the kept weights to {reconstruct['target']} targets"
    return refit if nelbo["kept"] == "refit" else f"{refit} left out, no gain on held-out text"


def _base(source: str) -> str:
    return f"base_model: {source}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""


def _license(values: dict, beside: bool = True) -> str:
    """Lines of front matter; a link to a file is left out unless the source's files lie `beside` the card."""
    if not beside and not str(values.get("license_link", "")).startswith(("https://", "http://")):
        values = {key: value for key, value in values.items() if key != "license_link"}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000) if values else ""


def model_card(report: dict) -> str:
    """README.md of a pruned checkpoint, as the Hub shows it.

    Args:
        report: of `structprune.runs.prune.Pruner.prune`.
    """
    config, nelbo, calibration = report["config"], report["held_out_nelbo"], report["calibration"]
    source, shifted = report["source"], family_named(report["family"]).model_class.shifted
    values = {
        "source": source,
        "base": _base(source),
        "license": _license(report["license"], beside=False),
        "percent": f"{100 * report['ratio']:.1f} %",
        "version": report["versions"]["structprune"],
        "refitted": _refitted(nelbo),
        "rows": "\n".join(_rows(report)),
        "windows": nelbo["windows"],
        "length": calibration["length"],
        "count": calibration["windows"] - nelbo["windows"],
        "choice": _choice(report) if report["choice"] else "a plan that was given",
        "refit": f"to {config['reconstruct']['target']} targets" if config["reconstruct"]["enabled"] else "off",
        "text": _text(calibration.get("source", "given windows")),
        "states": _states(calibration),
        "seed": calibration.get("seed", "unknown"),
        "export": report["export_class"],
        "alignment": f"position i predicts token {'i + 1' if shifted else 'i'}",
    }
    return TEMPLATE.format(**values)


def _text(source: str) -> str:
    """A calibration source for readers elsewhere: a file's name without its directory."""
    return Path(source).name if Path(source).suffix in (".txt", ".jsonl", ".parquet") else source


def _refitted(nelbo: dict) -> str:
    if nelbo["refit"] is None:
        return "was not refitted"
    if nelbo["kept"] == "refit":
        return "was refitted in closed form (better than plain removal on held-out text)"
    return "is as it was (a refit in closed form was no better on held-out text)"


def _states(calibration: dict) -> str:
    """Note on windows that the model continued itself (reverse trajectory)."""
    if calibration.get("trajectory") != "reverse":
        return ""
    return f", those to fit on continued by the model itself after {calibration['prompt_tokens']}"


def _choice(report: dict) -> str:
    structured = report["config"]["structured"]
    arm = f"on arm `{shown_arm(report)}`" if report["arm"] else "of the weights"
    parts = f"allocation `{structured['allocation']}`, split `{structured['split']}`"
    return f"score `{structured['score']}` {arm}, {parts}"


def _rows(report: dict) -> list[str]:
    rows = []
    for title, key in (("parameters", "parameters"), ("block projections", "block_parameters"), ("MACs", "macs")):
        before, after = report[key]["before"], report[key]["after"]
        rows.append(f"| {title} | {millions(before)} | {millions(after)} | {change(before, after)} |")
    nelbo = report["held_out_nelbo"]
    loss = nelbo["loss"]
    pruned = nelbo["dense"] + loss["mean"]
    error = plus_minus(loss)
    return [*rows, f"| NELBO, nats/token | {nelbo['dense']:.4f} | {pruned:.4f} | {error} |"]
