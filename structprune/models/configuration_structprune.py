"""Configurations of structprune's models, whose blocks may differ in width: LLaDA's and Dream's.

Copied next to every checkpoint structprune writes: imports transformers (4.46 to 4.57 and 5) only.
"""

import importlib.metadata
import re

from transformers import PretrainedConfig
from transformers import __version__ as transformers_version

UNPACKED_BY = {  # layout of packed weights -> the first release of transformers that unpacks it, the next without
    "sparse-24-bitmask": ((4, 51), (4, 58)),
    "sparse-bitmask": ((4, 51), (4, 56)),
}
DROPPED = (0, 15)  # release of compressed-tensors that unpacks neither


class LayoutConfig(PretrainedConfig):
    """Is saved in the layout that it was read in: the family's own, as long as its blocks are alike and add no bias.

    `published` has the `model_type` and `architectures` of that layout; None is structprune's own.
    `packed_layout` is the one of `UNPACKED_BY` that `quantization_config` names; None: the weights are plain.
    `reads_head_dim`: the family's own code takes the head size from the config, so that heads can go in its layout.
    `layout_keys`: of that layout, which say how wide blocks are, beside the keys of widths.
    """

    published = None
    packed_layout = None
    reads_head_dim = False
    layout_keys = ()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, which would warn of another `model_type` in the family's own layout."""
        values, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") not in (None, cls.model_type):
            values = values | {"published": layout_of(values), "model_type": cls.model_type}
        return values, rest

    def _read_layout(self, values: dict):
        """Take the layout out of a config.json's `values`."""
        kind, self.published = values.pop("model_type", None), values.pop("published", None)
        if kind not in (None, self.model_type):
            self.published = layout_of(values | {"model_type": kind})
        if values.get("rope_scaling", self) is None:  # as it is by default; transformers 5 warns of the key
            del values["rope_scaling"]
        values.pop("packed_layout", None)
        # noted here, because transformers 5 replaces quantization_config by an object that no longer says so
        settings = values.get("quantization_config")
        sparsity = settings.get("sparsity_config") if isinstance(settings, dict) else None
        if isinstance(sparsity, dict) and sparsity.get("format") in UNPACKED_BY:
            self.packed_layout = sparsity["format"]

    def _tied(self, values: dict) -> bool:
        """Take `tie_word_embeddings` out of a config.json's `values`: False, unless a subclass has tied heads.

        Raises:
            ValueError: it is true. transformers 4 would drop the head's own weight.
        """
        if values.pop("tie_word_embeddings", False):
            reason = "the output head has a weight of its own, use False"
            raise ValueError(f"tie_word_embeddings=True is not possible: {reason}")
        return False

    def layout_obstacle(self):
        """Why the family's own keys cannot say how wide the blocks are; None: they can."""
        differs = self.to_dict().get("per_layer_config")
        return "its blocks differ in width (use allocation uniform, protect no block)" if differs else None

    def in_own_layout(self, values: dict) -> dict:
        """`values` of this config, without what the family's own code lacks, under the keys that it reads."""
        return values

    def to_diff_dict(self):
        """What is written: in the family's own layout all keys, since its defaults are not these."""
        if self.published and is_publishable(self):
            return published_values(self, self.num_attention_heads, self.hidden_size) | self.published
        absent = ("published", "packed_layout")
        return {key: value for key, value in super().to_diff_dict().items() if key not in absent}


def layout_of(values: dict) -> dict:
    """What names the layout of a config.json's `values`."""
    return {key: values.get(key) for key in ("model_type", "architectures")}


def is_publishable(config) -> bool:
    """Whether a family's own keys can describe a model: its widths, and no biases that the family lacks."""
    biases = config.attention_output_bias or config.mlp_output_bias
    return not biases and config.layout_obstacle() is None


def published_values(config, heads: int, hidden: int) -> dict:
    """A config's values under the names that the family's own code and other engines read.

    `head_dim` is there only where it is not `hidden` shared by `heads`, or where that code reads it.
    """
    biases = ("attention_output_bias", "mlp_output_bias")
    absent = ("published", "packed_layout", *biases, "_name_or_path", *type(config).attribute_map)
    defaults = PretrainedConfig().to_dict().items()
    values = {key: value for key, value in config.to_dict().items() if (key, value) not in defaults}
    values = {key: value for key, value in values.items() if key not in absent}
    if config.head_dim * heads == hidden and not getattr(config, "reads_head_dim", False):
        del values["head_dim"]
    return config.in_own_layout(values) if isinstance(config, LayoutConfig) else values


class StructpruneLLaDAConfig(LayoutConfig):
    """LLaDA's configuration under its own key names, with explicit `head_dim` and optional per-layer widths.

    `per_layer_config` maps a block index to the `n_heads`, `n_kv_heads` and `mlp_hidden_size` that differ there. A
    block with 0 of both kinds of heads has no attention, one with an `mlp_hidden_size` of 0 no MLP.
    """

    model_type = "structprune_llada"
    _auto_class = "AutoConfig"  # save_pretrained then writes this file too, under transformers 4 as well
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(
        self, d_model=4096, n_heads=32, n_kv_heads=None, head_dim=None, n_layers=32, mlp_hidden_size=12288,
        vocab_size=126464, embedding_size=None, max_sequence_length=4096, rope_theta=500000.0, rms_norm_eps=1e-5,
        include_bias=False, include_qkv_bias=False, attention_output_bias=False, mlp_output_bias=False,
        mask_token_id=126336, initializer_range=0.02, **kwargs,
    ):  # fmt: skip
        self.d_model, self.n_heads, self.n_layers = d_model, n_heads, n_layers
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        self.mlp_hidden_size, self.vocab_size = mlp_hidden_size, vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.max_sequence_length, self.rope_theta, self.rms_norm_eps = max_sequence_length, rope_theta, rms_norm_eps
        self.include_bias, self.include_qkv_bias = include_bias, include_qkv_bias
        self.attention_output_bias, self.mlp_output_bias = attention_output_bias, mlp_output_bias
        self.mask_token_id, self.initializer_range = mask_token_id, initializer_range
        self._read_layout(kwargs)
        super().__init__(tie_word_embeddings=self._tied(kwargs), **kwargs)

    def to_dict(self):
        """With the depth under its common name too: transformers 5 asks for it before this class is known.

        Without it a plain `AutoTokenizer.from_pretrained` fails on a checkpoint with per-layer widths.
        """
        return super().to_dict() | {"num_hidden_layers": self.n_layers}


class StructpruneDreamConfig(LayoutConfig):
    """Dream's (Qwen2's) configuration with explicit `head_dim` and optional per-layer widths.

    `per_layer_config` maps a layer index to the `num_attention_heads`, `num_key_value_heads` and
    `intermediate_size` that differ there. A layer with 0 of both kinds of heads has no attention, one with an
    `intermediate_size` of 0 no MLP.
    """

    model_type = "structprune_dream"
    _auto_class = "AutoConfig"
    qkv_bias, qk_norm = True, False  # of the projections to queries, keys and values; of the norms of heads

    def __init__(
        self, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, head_dim=None, max_position_embeddings=131072,
        rope_theta=1000000.0, rms_norm_eps=1e-6, attention_output_bias=False, mlp_output_bias=False,
        mask_token_id=151666, initializer_range=0.02, **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.max_position_embeddings, self.rope_theta = max_position_embeddings, rope_theta
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.attention_output_bias, self.mlp_output_bias = attention_output_bias, mlp_output_bias
        self.mask_token_id = mask_token_id
        self._read_layout(kwargs)
        super().__init__(tie_word_embeddings=self._tied(kwargs), **kwargs)


def check_packed(config) -> None:
    """Raise ImportError where weights are packed and the installed releases do not unpack them.

    Some of those releases would go on with random weights, after a warning.
    """
    layout = getattr(config, "packed_layout", None)
    if layout is None:
        return
    try:
        unpacker = importlib.metadata.version("compressed-tensors")
    except importlib.metadata.PackageNotFoundError:  # transformers asks for it before it reads weights
        unpacker = "none"
    first, end = UNPACKED_BY[layout]
    if not first <= release(transformers_version) < end or release(unpacker) >= DROPPED:
        versions = f"transformers {transformers_version} with compressed-tensors {unpacker}"
        remedy = "pip install transformers==4.55.4 compressed-tensors==0.14.0.1 accelerate"
        raise ImportError(f"weights packed as {layout} are not read by {versions}: {remedy}")


def release(version: str) -> tuple:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def layer_width(config, index: int, key: str) -> int:
    """The value of `key` in block `index`: its `per_layer_config` entry, else the global one."""
    view = getattr(config, "per_layer_config", None)
    if isinstance(view, dict):  # transformers 4: a plain dict keyed by (zero-padded) strings
        override = {int(layer): values for layer, values in view.items()}.get(index, {})
        return override[key] if key in override else getattr(config, key)
    return getattr(config if view is None else view[index], key)
