"""The model card of a pruned checkpoint, from its report."""

import re
from inspect import signature
from pathlib import Path

from huggingface_hub import ModelCardData

from structprune.assets import card_template
from structprune.checkpoint.lineage import in_words, removed_in_all
from structprune.models.families import family_named
from structprune.report.export_lines import UNPACKERS
from structprune.report.tables import change, mask_choice, millions, plus_minus, shown_arm, whole_parts, workload


def model_card(report: dict) -> str:
    """README.md of a pruned checkpoint, from the report of `structprune.runs.pruner.Pruner.prune`."""
    config, nelbo, calibration = report["config"], report["held_out_nelbo"], report["calibration"]
    shifted = report.get("shifted", family_named(report["family"]).model_class.shifted)  # earlier reports do not say
    licence = report["license"]
    if not str(licence.get("license_link", "")).startswith(("https://", "http://")):  # a file that is not copied
        licence = {key: value for key, value in licence.items() if key != "license_link"}
    return card_template("pruned").format(
        **_shared(report, "pruned", licence, report["ratio"]),
        refitted=_refitted(nelbo),
        whole=f"\nRemoved as a whole, by the numbers of its blocks: {whole}." if (whole := whole_parts(report)) else "",
        rows="\n".join(_rows(report)),
        windows=nelbo["windows"],
        length=calibration["length"],
        count=calibration["windows"] - nelbo["windows"],
        choice=_choice(report) if report["choice"] else "a plan that was given",
        refit=_refit(config["reconstruct"]),
        text=_text(calibration),
        states=_states(calibration),
        seed=calibration.get("seed", "unknown"),
        export=report["export_class"],
        generate="" if report.get("own_code") else _example(family_named(report["family"]).model_class),
        code=_code(report.get("own_code")),
        alignment=f"position i predicts token {'i + 1' if shifted else 'i'}",
    )


def _code(own: list[str] | None) -> str:
    """Whose code `auto_map` leads to. Reports of earlier versions do not say: it was structprune's."""
    if not own:
        return "The code beside the weights is structprune's own."
    return f"`auto_map` leads to the family's own code, copied from the source and never run ({', '.join(own)})."


def exported_card(card: str, before: dict, now: dict, compat: str) -> str:
    """A pruned checkpoint's card for the same model in the layout of class `compat`.

    Args:
        before, now: its report's `own_code`, as it was and is.
    """
    written = r"(Export class: `\w+`)(; written as `\w+`)?"
    card = re.sub(written, rf"\1; written as `{compat}`", card, count=1)
    return card.replace(_code(before.get("own_code")), _code(now.get("own_code")))


def packed_card(card: str, layout: str) -> str:
    """A checkpoint's card with a section on packed weights first, after its metadata.

    Args:
        layout: one of `structprune.checkpoint.bitmask.STRUCTURES`.
    """
    section = card_template("packed").format(layout=layout, unpackers=UNPACKERS[layout])
    metadata = re.match(r"---\n.*?^---\n", card, re.DOTALL | re.MULTILINE)
    end = metadata.end() if metadata else 0
    return f"{card[:end]}\n{section}\n{card[end:].lstrip()}"


def _example(model_class: type) -> str:
    """Lines that generate text by the sampler beside the weights; none for a family without one."""
    calls = {
        "generate": "generate(ids, gen_length=64, block_length=32, steps=64)",
        "diffusion_generate": 'diffusion_generate(ids, max_new_tokens=64, steps=64, alg="entropy")',
    }
    for name, call in calls.items():
        if hasattr(model_class, name):
            if "block_length" not in signature(getattr(model_class, name)).parameters:
                call = call.replace("block_length=32, ", "")
            ids = 'tokenizer("A text to continue", return_tensors="pt").input_ids'
            return f"\nids = {ids}\nprint(tokenizer.decode(model.{call}[0]))\n"
    return ""


def mask_card(report: dict) -> str:
    """README.md of a checkpoint with masked weights, from the report of `structprune.runs.mask.mask`."""
    nelbo, calibration, reconstruct = report["held_out_nelbo"], report["calibration"], report["config"]["reconstruct"]
    loss = ""
    if nelbo:
        note = "; the same windows chose the refit's damping, so it is a little optimistic"
        loss = (
            f"\nNELBO on {nelbo['windows']} held-out windows of that text, nats per token: {nelbo['dense']:.4f} before,"
            f" {nelbo['masked']:.4f} after ({plus_minus(nelbo['loss'])}, paired), with the weights as they were in"
            f" memory{note if reconstruct['enabled'] else ''}.\n"
        )
        if causal := nelbo.get("causal"):
            loss += f"\nNats of the next token there: {causal['dense']:.4f} before, {causal['pruned']:.4f} after.\n"
    text = "no calibration text was looked at"
    if calibration:
        text = (
            f"calibration on `{_text(calibration)}` ({calibration['windows']} windows of {calibration['length']}"
            f" tokens, held-out ones included{_states(calibration)})"
        )
    return card_template("masked").format(
        **_shared(report, "sparse", report["license"], report["sparsity"]["total"]),
        choice=mask_choice(report),
        refit=_mask_refit(reconstruct, nelbo),
        text=text,
        nelbo=loss,
    )


def _shared(report: dict, tag: str, licence: dict, share: float) -> dict[str, str]:
    """What both cards say of the source, and the share of its weights that were removed or set to zero."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["structprune", tag, "diffusion-language-model"],
        base_model=_base_model(report),
        **licence,
    )
    return {
        "source": report["source"],
        "before": _before(report, report["source"]),
        "first": "input" if report.get("lineage") else "dense",
        "data": data.to_yaml(),
        "percent": f"{100 * share:.1f} %",
        "version": report["versions"]["structprune"],
    }


def _base_model(report: dict) -> str | None:
    """The nearest of the models that it came from that is on the Hub."""
    names = [report["source"], *(step["source"] for step in reversed(report.get("lineage", [])))]
    return next((name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name)), None)


def _before(report: dict, source: str) -> str:
    """What the input went through, and how much of the first model's weights all prunings removed."""
    if not (steps := report.get("lineage", [])):
        return ""
    text = f"\n`{source}` was {in_words(steps)}."
    if "ratio" in report and any(each["step"] == "pruned" for each in steps):
        text += f" In all, {100 * removed_in_all(steps, report['ratio']):.1f} % of the block projections of"
        text += f" `{steps[0]['source']}` were removed."
    return text


def _refit(reconstruct: dict) -> str:
    """What a structured run refitted to which targets."""
    if not reconstruct["enabled"]:
        return "off"
    notes = [f"dense share {reconstruct['dense_share']:g}"] if reconstruct["target"] == "mixed" else []
    notes += ["q, k, v, gate and up too, to dense ones"] if reconstruct["producers"] else []
    notes += ["LM head"] if reconstruct["head"] else []
    notes += [f"visible tokens weigh {reconstruct['visible']:g}"] if reconstruct["visible"] != 1 else []
    stream = reconstruct.get("stream", 0)  # reports of earlier versions have none, and no weighting
    notes += [f"{100 * stream:g} % of earlier errors made up for"] if stream else []
    weighting = reconstruct.get("weighting", "uniform")
    notes += [f"rows weighted by {weighting}"] if weighting != "uniform" else []
    return f"to {reconstruct['target']} targets" + (f" ({'; '.join(notes)})" if notes else "")


def _mask_refit(reconstruct: dict, nelbo: dict | None) -> str:
    if nelbo is None or not reconstruct["enabled"]:  # a refit always has held-out windows
        return "no refit"
    refit = f"refit of the kept weights to {reconstruct['target']} targets"
    return refit if nelbo["kept"] == "refit" else f"{refit} left out, no gain on held-out text"


def _text(calibration: dict) -> str:
    """The calibration text for readers elsewhere: a file's name without its directory."""
    source = calibration.get("source", "given windows")
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
    if report["search"] and report["search"]["kept"] == "searched":
        parts += ", then a search for whole blocks to drop" if "order" in report["search"] else ", then a search"
    return f"score `{structured['score']}` {arm}, {parts}"


def _rows(report: dict) -> list[str]:
    rows = []
    for title, key in (("parameters", "parameters"), ("block projections", "block_parameters"), ("MACs", "macs")):
        before, after = report[key]["before"], report[key]["after"]
        rows.append(f"| {title} | {millions(before)} | {millions(after)} | {change(before, after)} |")
    if latency := report["latency"]:
        before, after = latency["measured"]["before"], latency["measured"]["after"]
        title = f"ms per forward pass ({workload(latency)}, {latency['table']['identity']['device']})"
        rows.append(f"| {title} | {before:.3f} | {after:.3f} | {change(before, after)} |")
    nelbo = report["held_out_nelbo"]
    dense, loss = nelbo["dense"], nelbo["loss"]
    rows.append(f"| NELBO, nats/token | {dense:.4f} | {dense + loss['mean']:.4f} | {plus_minus(loss)} |")
    if causal := nelbo.get("causal"):
        values = f"{causal['dense']:.4f} | {causal['pruned']:.4f} | {plus_minus(causal['loss'])}"
        rows.append(f"| next token, nats | {values} |")
    return rows
