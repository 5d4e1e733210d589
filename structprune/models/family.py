"""What the package has to know about a model family: one row of the table in `families`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PretrainedConfig

from structprune.models.blockwise_structprune import PairTraining
from structprune.models.modeling_structprune import DiffusionLM

Schedule = Literal["levels", "uniform"]
ROLES = ("query", "key", "value", "attention_output", "gate", "up", "down")


@dataclass(frozen=True)
class GgufLoader:
    """What llama.cpp's loader of a family expects.

    Attributes:
        name: its `general.architecture`.
        compat: the most general export class that it reads.
        interleaved: rotary pairs are neighbours, so that rows of q and k move.
    """

    name: str
    compat: str
    interleaved: bool


@dataclass(frozen=True)
class Family:
    """One family's names, and the names of its behaviours.

    Behaviours that a model class knows (`shifted`, `edges_visible`) are asked of `model_class`.

    Attributes:
        model_types: `model_type` values of official checkpoints that load into this family; the first is written.
        architecture: the class name in `architectures` of official checkpoints, by which engines know the family.
        config_class: needs `head_dim`, `mask_token_id`, `rope_theta`, `attention_output_bias` and `mlp_output_bias`
            beside the keys below, and a `model_type` of its own, under which pruned checkpoints are written.
        model_class: its blocks are `layers_structprune.Block`s, whose `roles` name every part (`ROLES` are the linears,
            "core" the attention).
        blocks: name of the module list of blocks; embedding: name of the embedding's weight.
        width_keys: `query_heads`, `kv_heads`, `channels` -> config key, which is also the `per_layer_config` key.
        keys: other roles (`hidden`, `depth`, `vocabulary`, `positions`) -> config key.
        required: config keys that an official config.json must have.
        schedule: how calibration draws noise levels (docs/methods.md section 2): "levels" or "uniform".
        sampler: how text is generated, a key of `generation.samplers.SAMPLERS`.
        likelihood: how answers are scored, a key of `evaluation.perturb.FORMS`.
        text_edges: special tokens around scored text, a key of `evaluation.texts.EDGES`.
        published: the key of its settings in the presets of evaluation tasks; None: there are none.
        supported: config key -> the values that the model class computes. Any other value is refused, because the
            checkpoint would load and be silently wrong.
        rope_types: `rope_type` values that the model class computes: "default", "llama3", "yarn".
        ignored: keys of an official config.json that say nothing about the model.
        gguf: llama.cpp's loader; None: there is none.
        joined: linears that are one, row below row, in official files: its path in a block there -> their roles.
        layout_class: what reads these files without structprune, where `joined` names any; else `model_class` does.
        code: further files that define the classes, copied next to the weights beside `CODE_FILES`. Where
            they are not named, only `structprune.load_model` loads what is written, and `AutoModel` does not.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    config_class: type[PretrainedConfig]
    model_class: type[DiffusionLM]
    blocks: str
    embedding: str
    width_keys: Mapping[str, str]
    keys: Mapping[str, str]
    required: tuple[str, ...]
    schedule: Schedule
    sampler: str
    likelihood: str
    text_edges: str = "none"
    published: str | None = None
    supported: Mapping[str, tuple] = field(default_factory=lambda: {"rope_scaling": (None,)})
    rope_types: tuple[str, ...] = ("default",)
    ignored: tuple[str, ...] = ()
    gguf: GgufLoader | None = None
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layout_class: type[DiffusionLM] | None = None
    code: tuple[Path, ...] = ()

    @property
    def in_blocks(self) -> bool:
        """Whether its models are block diffusion LMs, which `block_size` of the config belongs to.

        A model may read a sequence in blocks or in one piece; it is trained, and generates, block by block.
        """
        return issubclass(self.model_class, PairTraining)
