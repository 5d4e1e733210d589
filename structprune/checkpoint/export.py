"""Export classes: which code can load a pruned model, and the config.json of each class.

`official`: the family's own modeling code (only MLP channels or whole blocks removed, one width, no added bias);
`uniform`: the family's own keys and an explicit head dimension, for engines that read it (one width everywhere, no
added bias); `free`: the modeling files written beside the weights.
"""

from pathlib import Path

from transformers import PretrainedConfig

from structprune.config import Config
from structprune.errors import UserError
from structprune.models.adapter import Widths, block_widths, set_depth
from structprune.models.configuration_structprune import LayoutConfig, published_values
from structprune.models.families import FAMILIES, Family, family_of

CODE_FILES = tuple(
    f"{name}_structprune.py" for name in ("configuration", "rotary", "layers", "sampling", "generation", "modeling")
)
OUTDATED = ("dtype", "quantization_config", "per_layer_config")  # of a source's config.json
STALE = (*OUTDATED, "_name_or_path", "transformers_version", "auto_map")  # of a config
RUN = ("attn_implementation", "_attn_implementation")  # how a model runs; the files beside it have no flex attention
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
    if any(0 in (block.query_heads, block.channels) for block in widths):
        return dict.fromkeys(
            CLASSES[:2], "some blocks lack attention or MLP (remove both, so that the whole block goes)"
        )
    if reason := _width_obstacle(config, widths):
        return dict.fromkeys(CLASSES[:2], reason)
    if config.attention_output_bias or config.mlp_output_bias:
        reason = "the refit added biases (set reconstruct.constant false and mode least-squares)"
        return dict.fromkeys(CLASSES[:2], reason)
    removed = _head_obstacle(config, family, source_values) if widths else None
    return {"official": removed} if removed else {}


def _width_obstacle(config, widths: list[Widths]) -> str | None:
    """Why the family's own keys cannot say how wide the blocks are."""
    if isinstance(config, LayoutConfig):
        return config.layout_obstacle()
    return "its blocks differ in width" if len(set(widths)) > 1 else None


def _head_obstacle(config, family: Family, source_values: dict | None) -> str | None:
    """Why the family's own code cannot have a model's attention; None too where it reads `head_dim`.

    A source of that layout that structprune did not write is taken to be loaded by that code as it is.
    """
    heads, hidden = block_widths(config, family, 0).query_heads, getattr(config, family.keys["hidden"])
    values = source_values or {}
    published = values.get("model_type") in family.model_types and not _leads_to_ours(values)
    uncut = heads * config.head_dim == hidden or (published and values[family.width_keys["query_heads"]] == heads)
    if uncut or getattr(config, "reads_head_dim", False):
        return None
    features = f"{heads} heads of {config.head_dim} are not the hidden size {hidden}"
    return f"heads were removed: {features} (set structured.split to 0)"


def _code_names(values: dict | None) -> set[str]:
    """The files that `auto_map` in a config.json's values names."""
    entries = (values or {}).get("auto_map")
    targets = entries.values() if isinstance(entries, dict) else ()
    return {f"{target.rpartition('.')[0]}.py" for target in targets if isinstance(target, str)}


def _leads_to_ours(values: dict | None) -> bool:
    return bool(_code_names(values) & code_files())


def code_files() -> set[str]:
    """Names of all files that are written beside weights, of any family."""
    return {*CODE_FILES, *(path.name for family in FAMILIES for path in family.code)}


def export_class(config, source_values: dict | None) -> str:
    """The strictest class that allows a model."""
    reasons = obstacles(config, source_values)
    return next(name for name in CLASSES if name not in reasons)


def check_export(config, source_values: dict | None, compat: str, option: str = "export.compat = ") -> None:
    """Raise UserError, with the reason, if a model is not in the class `compat`, which `option` asked for."""
    if reason := obstacles(config, source_values).get(compat):
        other = export_class(config, source_values)
        raise UserError(f"{option}{compat} is not possible: {reason}; or export as {other}")


def check_export_request(config: Config, reads_head_dim: bool = False) -> None:
    """Raise UserError if a run's own choices rule out its export class, before the run starts.

    What the model's shapes rule out is `runs.export_widths`' to find.

    Args:
        reads_head_dim: the family's own code takes the head size from the config, so that heads can be removed.
    """
    compat, structured, refit = config.export.compat, config.structured, config.reconstruct
    if compat == "free" or structured.ratio == 0:
        return
    reason, other = "", "free"
    if structured.allocation != "uniform" or structured.protect_first or structured.protect_last:
        reason = "blocks would differ in width (set structured.allocation to uniform, protect no block)"
    elif refit.adds_bias:
        reason = "the refit would add biases (set reconstruct.constant false and mode least-squares)"
    elif compat == "official" and structured.split != 0 and not reads_head_dim:
        reason, other = "heads would be removed (set structured.split to 0)", "uniform"
    if reason:
        raise UserError(f"export.compat = {compat} is not possible: {reason}; or export as {other}")


def auto_map(family: Family, shifted: bool | None = None, own_layout: bool = False) -> dict[str, dict[str, str]]:
    """The entry `auto_map`, which leads transformers' auto classes to the files written beside the weights.

    Empty where none of the files defines the family's classes (`Family.code`).

    Args:
        shifted: whether the logits at position i predict token i + 1, so that `AutoModelForMaskedLM` is left out;
            default as in the family.
        own_layout: the weights are in the family's own layout.
    """
    files = {Path(name).stem for name in CODE_FILES} | {path.stem for path in family.code}
    classes = (family.config_class, (family.layout_class if own_layout else None) or family.model_class)
    places = [each.__module__.rpartition(".")[2] for each in classes]
    if not files.issuperset(places):
        return {}
    config, model = (f"{place}.{each.__name__}" for place, each in zip(places, classes))
    models = ["AutoModel", "AutoModelForCausalLM"]
    shifted = family.model_class.shifted if shifted is None else shifted
    if not shifted:  # a fill-mask pipeline reads the logits at the mask itself
        models.append("AutoModelForMaskedLM")
    return {"auto_map": {"AutoConfig": config, **dict.fromkeys(models, model)}}


def own_code(directory: Path | None, values: dict | None) -> list[Path]:
    """The Python files beside a checkpoint whose `auto_map` names them as its classes; none where they are ours.

    They are for copying, and are not run.

    Args:
        values: contents of its config.json.
    """
    names = _code_names(values)
    if directory is None or not names or _leads_to_ours(values):
        return []
    if not all((directory / name).is_file() for name in names):  # they are in another repository, or gone
        return []
    return sorted(path for path in directory.glob("*.py") if path.is_file() and path.name not in code_files())


def config_values(config, source_values: dict | None, compat: str, dtype: str, keeps_code: bool = False) -> dict:
    """Contents of the config.json to write.

    Args:
        source_values: contents of the source's config.json.
        compat: the class asked for. `official` and `uniform` are in the family's own layout: of a source in that
            layout all keys stay, beside depth, widths and a `tie_word_embeddings` that the model does not have.
        dtype: of the written weights.
        keeps_code: the source's `auto_map` stays, since its files are copied.
    """
    family = family_of(config)
    if compat == "free":
        defaults = PretrainedConfig().to_dict().items()
        values = {key: value for key, value in config.to_dict().items() if (key, value) not in defaults}
        stale = ("dtype", "_name_or_path", "transformers_version", "published")
        own = {"architectures": [family.model_class.__name__], "model_type": family.config_class.model_type}
        # true by default in transformers 4 only
        tie = {"tie_word_embeddings": True} if config.tie_word_embeddings else {}
        values = {key: value for key, value in values.items() if key not in stale} | own | tie
    else:
        values = _published_values(config, family, source_values)
    # torch_dtype is the name that transformers 4 and 5 both read
    classes = {"auto_map": (source_values or {})["auto_map"]} if keeps_code else _classes(config, family, compat)
    return values | {"torch_dtype": dtype} | classes


def _classes(config, family: Family, compat: str) -> dict[str, dict[str, str]]:
    return auto_map(family, family.model_class.is_shifted(config), compat != "free")


def _published_values(config, family: Family, source_values: dict | None) -> dict:
    """The config in the family's own layout, with the source's keys if it was in that layout."""
    query, kv = (family.width_keys[role] for role in ("query_heads", "kv_heads"))
    values = published_values(config, getattr(config, query), getattr(config, family.keys["hidden"]))
    if not source_values or source_values.get("model_type") not in family.model_types:
        # keys that this implementation takes for granted, and the family's own code does not
        fixed = {key: allowed[0] for key, allowed in family.supported.items() if allowed != (None,)}
        kind = {"architectures": [family.architecture], "model_type": family.model_types[0]}
        return {key: value for key, value in (fixed | values | kind).items() if key not in STALE}
    before = source_values | {kv: source_values.get(kv) or source_values[query]}
    keys = (*family.width_keys.values(), "head_dim", *getattr(config, "layout_keys", ()))
    changes = {key: values[key] for key in keys if key in values and before.get(key) != values[key]}
    whole = set_depth(source_values | changes, family, getattr(config, family.keys["depth"]))
    # the weights that are written are not quantised, whatever the source's loader was to do with them
    stale = (*OUTDATED, *RUN) if auto_map(family) else (*OUTDATED, *RUN, "auto_map")
    own = {"mask_token_id": config.mask_token_id, "rope_theta": config.rope_theta}  # the source may lack them
    if "tie_word_embeddings" in whole:  # LLaDA's own code reads weight_tying only, whatever this says
        own["tie_word_embeddings"] = config.tie_word_embeddings
    rows = family.keys["vocabulary"]
    if getattr(config, rows) != (whole.get(rows) or whole["vocab_size"]):  # resized after loading
        own |= {rows: getattr(config, rows), "vocab_size": config.vocab_size}
    return {key: value for key, value in whole.items() if key not in stale} | own
