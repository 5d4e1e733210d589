"""Export classes: which code can load a pruned model, and the config.json of each class.

`official`: the family's own modeling code (only MLP channels or whole blocks removed, one width, no added bias);
`uniform`: engines that support an explicit head dimension (one width everywhere, no added bias); `free`: the modeling
files written beside the weights.
"""

from dataclasses import astuple
from pathlib import Path

from transformers import PretrainedConfig

from structprune.config import Config
from structprune.errors import UserError
from structprune.models.adapter import block_widths, set_depth
from structprune.models.families import Family, family_of

CODE_FILES = tuple(
    f"{name}_structprune.py" for name in ("configuration", "layers", "sampling", "generation", "modeling")
)
CLASSES = ("official", "uniform", "free")  # strictest first


def obstacles(config, source_values: dict | None) -> dict[str, str]:
    """Why a model is not in a class: class -> the first reason. Classes that allow the model are absent.

    Args:
        config: of the pruned model.
        source_values: contents of the dense checkpoint's config.json.
    """
    family = family_of(config)
    depth = getattr(config, family.keys["depth"])
    widths = [block_widths(config, family, index) for index in range(depth)]
    if any(0 in astuple(block) for block in widths):
        return dict.fromkeys(
            CLASSES[:2], "some blocks lack attention or MLP (remove both, so that the whole block goes)"
        )
    if len(set(widths)) > 1:
        return dict.fromkeys(CLASSES[:2], "its blocks differ in width (use allocation uniform, protect no block)")
    if config.attention_output_bias or config.mlp_output_bias:
        reason = "the refit added biases (set reconstruct.constant false and mode least-squares)"
        return dict.fromkeys(CLASSES[:2], reason)
    if not source_values or source_values.get("model_type") not in family.model_types:
        return {"official": "the dense checkpoint was not in its family's official layout"}
    heads = source_values[family.width_keys["query_heads"]]
    kv_heads = source_values.get(family.width_keys["kv_heads"]) or heads
    if widths and (widths[0].query_heads, widths[0].kv_heads) != (heads, kv_heads):
        return {"official": "heads were removed (set structured.split to 0)"}
    return {}


def export_class(config, source_values: dict | None) -> str:
    """The strictest class that allows a model."""
    reasons = obstacles(config, source_values)
    return next(name for name in CLASSES if name not in reasons)


def check_export(config, source_values: dict | None, compat: str) -> None:
    """Raise UserError, with the reason, if a model is not in the class `compat`."""
    if reason := obstacles(config, source_values).get(compat):
        other = export_class(config, source_values)
        raise UserError(f"export.compat = {compat} is not possible: {reason}; or export as {other}")


def check_export_request(config: Config) -> None:
    """Raise UserError if a run's own choices rule out its export class, before the run starts."""
    compat, structured, refit = config.export.compat, config.structured, config.reconstruct
    if compat == "free" or structured.ratio == 0:
        return
    reason = ""
    if structured.allocation != "uniform" or structured.protect_first or structured.protect_last:
        reason = "blocks would differ in width (set structured.allocation to uniform, protect no block)"
    elif refit.adds_bias:
        reason = "the refit would add biases (set reconstruct.constant false and mode least-squares)"
    elif compat == "official" and structured.split != 0:
        reason = "heads would be removed (set structured.split to 0)"
    if reason:
        raise UserError(f"export.compat = {compat} is not possible: {reason}; or export as free")


def auto_map(family: Family) -> dict[str, dict[str, str]]:
    """The entry `auto_map`, which leads transformers' auto classes to the files written beside the weights.

    Empty where none of the files defines the family's classes (`Family.code`). Without `AutoModelForMaskedLM` where the
    logits at position i predict token i + 1.
    """
    files = {Path(name).stem for name in CODE_FILES} | {path.stem for path in family.code}
    classes = (family.config_class, family.model_class)
    places = [each.__module__.rpartition(".")[2] for each in classes]
    if not files.issuperset(places):
        return {}
    config, model = (f"{place}.{each.__name__}" for place, each in zip(places, classes))
    models = ["AutoModel", "AutoModelForCausalLM"]
    if not family.model_class.shifted:  # a fill-mask pipeline reads the logits at the mask itself
        models.append("AutoModelForMaskedLM")
    return {"auto_map": {"AutoConfig": config, **dict.fromkeys(models, model)}}


def config_values(config, source_values: dict | None, compat: str, dtype: str) -> dict:
    """Contents of the config.json to write.

    Args:
        compat: the class asked for; `official` keeps the family's own file and changes depth and MLP width only, and
            a `tie_word_embeddings` that the model does not have.
        dtype: of the written weights.
    """
    family = family_of(config)
    if compat == "official":
        depth, channels = getattr(config, family.keys["depth"]), family.width_keys["channels"]
        values = (source_values or {}) | {channels: block_widths(config, family, 0).channels}
        values = set_depth(values, family, depth)
        # the weights that are written are not quantised, whatever the source's loader was to do with them
        stale: tuple[str, ...] = ("dtype", "quantization_config", "per_layer_config")
        stale += () if auto_map(family) else ("auto_map",)
        own = {"mask_token_id": config.mask_token_id, "rope_theta": config.rope_theta}  # the source may lack them
        if "tie_word_embeddings" in values:  # LLaDA's own code reads weight_tying only, whatever this says
            own["tie_word_embeddings"] = False
        rows = family.keys["vocabulary"]
        if getattr(config, rows) != (values.get(rows) or values["vocab_size"]):  # resized after loading
            own |= {rows: getattr(config, rows), "vocab_size": config.vocab_size}
    else:
        defaults = PretrainedConfig().to_dict().items()
        values = {key: value for key, value in config.to_dict().items() if (key, value) not in defaults}
        stale = ("dtype", "_name_or_path", "transformers_version")
        own = {"architectures": [family.model_class.__name__], "model_type": family.config_class.model_type}
    values = {key: value for key, value in values.items() if key not in stale}
    # torch_dtype is the name that transformers 4 and 5 both read
    return values | own | {"torch_dtype": dtype} | auto_map(family)
