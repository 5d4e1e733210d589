"""The values of a config.json: every key that is used has a type and bounds, checked once before anything is built."""

from pathlib import Path
from typing import Any

from structprune.errors import UserError, shown
from structprune.models.family import Family

LIMITS = {  # role of a key -> smallest and largest whole number
    "hidden": (1, 1 << 20),
    "depth": (1, 1024),
    "vocabulary": (1, 1 << 24),
    "positions": (1, 1 << 31),
    "query_heads": (1, 1 << 16),
    "kv_heads": (1, 1 << 16),
    "channels": (1, 1 << 24),
    "experts": (1, 1 << 16),
    "shared": (0, 1 << 24),
}
WHOLE = {"vocab_size": (1, 1 << 24), "head_dim": (2, 1 << 16), "mask_token_id": (0, (1 << 24) - 1)}
NUMBERS = {
    "rope_theta": (1.0, 1e12), "rms_norm_eps": (1e-20, 1.0), "initializer_range": (0.0, 10.0),
    "dlm_loss_weight": (1e-6, 1e6), "ar_loss_weight": (0.0, 1e6),
}  # fmt: skip
FLAGS = (
    "include_bias", "include_qkv_bias", "attention_output_bias", "mlp_output_bias", "tie_word_embeddings",
    "right_shift_logits",
)  # fmt: skip
ROPE_KEYS = ("rope_parameters", "rope_scaling", "rotary_scaling")
ROPE = {  # type of scaled rotary positions -> its numbers and their bounds
    "llama3": {
        "factor": (1.0, 1e6), "low_freq_factor": (1e-6, 1e6), "high_freq_factor": (1e-6, 1e6),
        "original_max_position_embeddings": (1.0, 1e9),
    },
    "yarn": {
        "factor": (1e-6, 1e6), "beta_slow": (1e-6, 1e6), "beta_fast": (1e-6, 1e6),
        "original_max_position_embeddings": (1.0, 1e9), "llama_4_scaling_beta": (0.0, 1e3),
    },
}  # fmt: skip
ROPE_ORDER = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}  # the lower first
USED = (*WHOLE, *NUMBERS, *FLAGS)


def check_values(values: dict, family: Family, where: Path | str) -> None:
    """Check the keys of a config.json that structprune uses.

    Raises:
        UserError: a required key is missing, or a value has another type or lies out of bounds.
    """
    for key in family.required:
        if type(values.get(key)) is not int or values[key] < 1:
            reason = f"config.json has no positive integer '{key}', which {family.name} needs"
            raise UserError(f"{where}: {reason}: add it" + ", or give it with --block-size" * (key == "block_size"))
    roles = {**family.width_keys, **family.keys}
    for key, (low, high) in ({key: LIMITS[role] for role, key in roles.items()} | WHOLE).items():
        if values.get(key) is not None:
            check_whole(key, values[key], low, high, where)
    for key, bounds in NUMBERS.items():
        if values.get(key) is not None:
            _check_number(key, values[key], bounds, where)
    for key in FLAGS:
        if values.get(key) is not None and not isinstance(values[key], bool):
            raise UserError(f"{where}: {key} = {shown(values[key])} is not true or false: correct it in config.json")
    for key in ROPE_KEYS:
        _check_object(key, values, where)
    _check_object("per_layer_config", values, where)
    rope_theta = (values.get("rope_parameters") or {}).get("rope_theta")
    if rope_theta is not None:
        _check_number("rope_parameters.rope_theta", rope_theta, NUMBERS["rope_theta"], where)
    depth = values[family.keys["depth"]]
    limits = {key: (0, LIMITS[role][1]) for role, key in family.width_keys.items()}  # 0: the block has none
    _check_layers(values.get("per_layer_config") or {}, limits, depth, where)


def check_rope(values: dict, family: Family, where: Path | str) -> dict:
    """How rotary positions are computed, from any key that may say so: `rope_type`, and what it needs.

    transformers 5 keeps in `rope_parameters` what `rope_theta` and `rope_scaling` were; `rotary_scaling` is our own.

    Raises:
        UserError: a type that the family's model class does not compute; numbers that are missing or out of bounds.
    """
    key = next((key for key in ROPE_KEYS if values.get(key)), ROPE_KEYS[0])
    rope = values.get(key) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in family.rope_types:
        needs = " or ".join(map(repr, family.rope_types))
        raise UserError(f"{where}: rope_type = {shown(kind)} is not supported (needs {needs})")
    if kind == "default":
        return rope
    for name, bounds in ROPE[kind].items():
        _check_number(f"{key}.{name}", rope.get(name), bounds, where)
    low, high = ROPE_ORDER[kind]
    if not rope[low] < rope[high]:
        factors = f"{key}.{low} = {rope[low]:g} is not below {high} = {rope[high]:g}"
        raise UserError(f"{where}: {factors}: correct it in config.json")
    if kind == "yarn":
        _check_yarn(key, rope, where)
    return rope


def _check_yarn(key: str, rope: dict, where: Path | str) -> None:
    """Raise UserError unless cosines and sines have the factor 1, by any key, and corrected dimensions are whole."""
    given = rope.get("attention_factor")
    equal = bool(rope.get("mscale")) and rope["mscale"] == rope.get("mscale_all_dim")
    if given != 1 if given is not None else rope["factor"] > 1 and not equal:
        names = ("attention_factor", "mscale", "mscale_all_dim")
        values = [f"{name} = {shown(rope[name])}" for name in names if rope.get(name) is not None]
        factor = f"{key} has {', '.join(values) or 'no mscale'}"
        raise UserError(f"{where}: {factor}: only an attention factor of 1 is supported (mscale = mscale_all_dim)")
    if rope.get("rope_theta") is not None and not rope["rope_theta"] > 1:
        raise UserError(f"{where}: {key}.rope_theta = {rope['rope_theta']:g} is not above 1: correct it in config.json")
    if rope.get("truncate", True) is not True:
        raise UserError(f"{where}: {key}.truncate = {shown(rope['truncate'])} is not supported (needs true)")


def check_whole(key: str, value: Any, low: int, high: int, where: Path | str) -> None:
    """Raise UserError unless a value is a whole number from `low` to `high`; true and 4.0 are none."""
    if type(value) is not int or not low <= value <= high:
        raise UserError(
            f"{where}: {key} = {shown(value)} is not a whole number from {low} to {high}: correct it in config.json"
        )


def _check_number(key: str, value: Any, bounds: tuple[float, float], where: Path | str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not bounds[0] <= value <= bounds[1]:  # NaN is in no bounds
        low, high = bounds
        raise UserError(
            f"{where}: {key} = {shown(value)} is not a number from {low:g} to {high:g}: correct it in config.json"
        )


def _check_object(key: str, values: dict, where: Path | str) -> None:
    if values.get(key) is not None and not isinstance(values[key], dict):
        raise UserError(f"{where}: {key} = {shown(values[key])} is not an object: correct it in config.json")


def _check_layers(layers: dict, limits: dict[str, tuple[int, int]], depth: int, where: Path | str) -> None:
    """Widths of single blocks: names of blocks that exist, and of widths, with numbers of their own."""
    for index, widths in layers.items():
        place = f"per_layer_config.{shown(index)[1:-1]}"
        if not str(index).isascii() or not str(index).isdigit() or int(index) >= depth:
            raise UserError(f"{where}: {place} names none of the {depth} blocks: correct it in config.json")
        if not isinstance(widths, dict):
            raise UserError(f"{where}: {place} = {shown(widths)} is not an object: correct it in config.json")
        for key, value in widths.items():
            if key not in limits:
                raise UserError(f"{where}: {place} has the unknown key {shown(key)}: give {', '.join(limits)}")
            check_whole(f"{place}.{key}", value, *limits[key], where)


def check_heads(values: dict, family: Family, where: Path | str) -> None:
    """Check the sizes of heads, of all blocks, and that not all blocks lack attention, or an MLP.

    Raises:
        UserError: the head size is unknown or odd, or query heads are not a multiple of key/value heads.
    """
    query, kv = family.width_keys["query_heads"], family.width_keys["kv_heads"]
    hidden, heads = values[family.keys["hidden"]], values[query]
    if values.get("head_dim") is None and hidden % heads:
        raise UserError(
            f"{where}: hidden size {hidden} is not a multiple of {heads} heads and head_dim is not given: add it"
        )
    if (size := values.get("head_dim") or hidden // heads) % 2:
        raise UserError(f"{where}: the head size {size} is odd, which rotary positions rule out: correct config.json")
    layers = values.get("per_layer_config") or {}
    whole = values | {kv: heads if values.get(kv) is None else values[kv]}
    for widths in ({}, *layers.values()):
        own = whole | widths
        if own[kv] == 0 or own[query] == 0:
            if own[kv] != own[query]:
                counts = f"{own[query]} heads and {own[kv]} key/value heads"
                raise UserError(f"{where}: a block has {counts}: both must be 0 in a block without attention")
        elif own[query] % own[kv]:
            raise UserError(
                f"{where}: {own[query]} heads are not a multiple of {own[kv]} key/value heads: correct either"
            )
    blocks = {int(index): widths for index, widths in layers.items()}  # "1" and "01" are one block
    for key, name in ((query, "attention"), (family.width_keys["channels"], "an MLP")):
        if all(blocks.get(index, {}).get(key) == 0 for index in range(values[family.keys["depth"]])):
            raise UserError(f"{where}: no block has {name}, by per_layer_config: give a model with it in one at least")


def quantisation(values: dict) -> str | None:
    """How a checkpoint's config.json says that its weights are quantised; None: they are not."""
    settings = values.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) else "quantization_config"
