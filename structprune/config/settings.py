"""One validated configuration per run: a YAML file plus `--set section.key=value` overrides; no unknown keys."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from structprune.config.names import or_registered
from structprune.config.sections import Section, Sections

Arm = Literal["clean", "masked", "masked+sink", "clean+sink"]
ARMS: tuple[Arm, ...] = get_args(Arm)
SinkPolicy = Literal["all", "unstable", "none"]
DEFAULT_ARM: Arm = "masked+sink"  # of scores; refits default to masked, because sink weights showed no gain there
StructuredScore = Annotated[
    Literal["magnitude", "wanda", "fluctuation", "taylor", "obs"], or_registered("structured.score")
]
MaskScore = Annotated[
    Literal["magnitude", "wanda", "sink-wanda", "ria", "sparsegpt", "sink-sparsegpt"], or_registered("masking.score")
]


class ModelSettings(Section):
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Weights in memory; default float32 on CPU, the checkpoint's own on an accelerator."""
    device: str | None = None
    """Where the model computes, such as cpu or cuda:0; default cuda where there is one."""
    mask_id: int | None = None
    """The mask token's id, where neither config.json nor the tokenizer has it."""
    allow_pickle: bool = False
    """Also read .bin shards (weights only)."""


class CalibrationSettings(Section):
    source: str = "wikitext2"
    """wikitext2, c4, a Hub dataset id, a .txt, .jsonl or .parquet file, or a calibration.safetensors to replay."""
    subset: str | None = None
    """The Hub dataset's configuration name."""
    split: str = "train"
    """Of a Hub dataset."""
    column: str | None = None
    """Text column of a dataset, .jsonl or .parquet; default `messages` where there is one, else `text`."""
    windows: int = Field(128, ge=1)
    """Windows that scores and refit are computed on."""
    held_out: int = Field(16, ge=0)
    """Further windows, disjoint from those, that choose damping and split and make the final check. Masks without a
    refit can do without (0: no check)."""
    length: int = Field(2048, ge=2)
    """Tokens in a window."""
    steps: int = Field(50, ge=1)
    """N: denoising steps of the forward process (LLaDA); with `interval` also the number of levels of Dream."""
    interval: int = Field(5, ge=1)
    """Every interval-th step is a noise level: S = steps // interval."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Draws the windows, their noise and the noise of the held-out check."""
    batch: int = Field(1, ge=1)
    """Windows in a forward pass, times S noise levels (methods unstructured and nm: sequences, noisy or clean)."""

    @property
    def replays(self) -> bool:
        """Whether the source is a saved calibration, which has its own windows and noise."""
        return Path(self.source).suffix.lower() == ".safetensors"


class SinkSettings(Section):
    policy: SinkPolicy = "all"
    """On an arm with +sink: all sink rows lose weight; unstable: those of positions that are not a sink throughout the
    levels (omega = 1 - phi min(1, 4 Var phi), over the S >= 2 levels of a window); none: none, as without +sink."""
    trajectory: Literal["forward", "reverse"] = "forward"
    """Where noisy copies come from: noise at each level, or the model's own generation after the first quarter of each
    window (structprune/calibration/trajectories.py); held-out windows have noise either way."""
    mask: Literal["soft", "hard"] = "soft"
    """soft: phi = sigmoid(alpha (mass - threshold)); hard: phi is 0 up to the threshold, 1 above, for every policy (all
    then keeps or drops a row)."""
    alpha: float = Field(5.0, gt=0)
    """Steepness of the soft mask."""
    kappa: float = Field(2.0, ge=0)
    """The threshold is the mean of the mass over positions plus so many standard deviations."""
    scale_free: bool = False
    """Divide the mass by its mean first, so that phi does not harden with heads x layers."""


class StructuredSettings(Section):
    ratio: float = Field(0.5, allow_inf_nan=True)  # `check_ratio` says what is wrong with one
    """Removed share of the parameters of q, k, v, output, gate, up and down projections of unprotected blocks."""
    score: StructuredScore = "obs"
    """How units are ranked; one file each in structprune/structured/scores."""
    arm: Arm | None = None
    """Activations the score sees; default masked+sink (none for magnitude)."""
    allocation: Literal["uniform", "global", "depth"] = "global"
    """uniform: every block the same widths (what stock engines load); global: heads, and channels, ranked over all
    blocks; depth: the ratio falls linearly with depth."""
    depth_slope: float = Field(0.2, ge=-1, le=1)
    """For `depth`: ratio of the first block minus ratio of the last."""
    split: Literal["equal", "by-cost", "measured", "joint"] | int = "measured"
    """Heads against channels. A number: attention steps removed, per block (uniform, depth) or over all blocks
    (global); joint: both compete in one global ranking."""
    split_candidates: int = Field(8, ge=2)
    """For `measured`: about as many head counts are refitted and compared before the best is refined."""
    split_windows: int = Field(32, ge=1)
    """For `measured`: candidates are refitted on at most this many windows."""
    gqa: Literal["query_heads", "kv_groups"] = "query_heads"
    """Attention unit where K < H: one query head of every KV group, or a KV head with its query heads."""
    protect_first: int = Field(0, ge=0)
    """So many first (`protect_last`: last) blocks stay whole, and do not count in the ratio."""
    protect_last: int = Field(0, ge=0)
    round_to: Literal["auto"] | int = "auto"
    """Kept MLP widths are multiples of this; auto: 128, less where the MLP is narrower than 16 such steps."""
    damping: float = Field(0.01, gt=0)
    """For `obs`: lambda relative to the mean diagonal of the Gram matrix."""
    rounds: int = Field(64, ge=1)
    """For `obs`: channels go in this many rounds, re-scored after each."""
    relative: bool | None = None
    """For `obs` (default true): a row counts in proportion to 1 / RMS of its residual stream, as the next norm does."""


class MaskingSettings(Section):
    """Which weights become zero, for the methods `unstructured` and `nm`."""

    ratio: float | None = Field(None, ge=0, lt=1)
    """Removed share of the weights of every projection; default 0.5, with `nm` N / M."""
    nm: str = "2:4"
    """For method nm, N:M: of every M neighbouring inputs of an output, N weights go (and M - N stay)."""
    score: MaskScore = "sparsegpt"
    """What a weight is worth; one file each in structprune/masking. sink-: the same on an arm with +sink."""
    arm: Arm | None = None
    """Activations the score sees; default masked, masked+sink for sink-wanda and sink-sparsegpt, none for magnitude."""
    norms: Literal["joint", "summed"] = "joint"
    """For wanda and ria: the norm of an input over all rows, or the sum of its norms over sequences (as published)."""
    order: Literal["sequential", "one-shot"] = "sequential"
    """sequential: a block is measured on what the masked blocks before it hand on; one-shot: on the dense model."""
    allocation: Literal["uniform", "owl", "depth"] = "uniform"
    """uniform: every block the same ratio; owl: more where fewer outliers are (arXiv 2310.05175); depth: linear."""
    owl_threshold: float = Field(5.0, gt=0)
    """For `owl`: an outlier's |W| x norm exceeds so many times the block's mean."""
    owl_spread: float = Field(0.08, ge=-1, le=1)
    """For `owl`: block ratios differ by at most twice this; negative: more is removed where more outliers are."""
    depth_slope: float = Field(0.2, ge=-1, le=1)
    """For `depth`: ratio of the first block minus ratio of the last."""
    damping: float = Field(0.01, ge=0)
    """For sparsegpt: lambda relative to the mean diagonal of the Gram matrix; raised where it cannot be factored."""
    column_block: int = Field(128, ge=1)
    """For sparsegpt: columns whose mask is chosen at once."""
    relative: bool = False
    """Rows count in proportion to 1 / RMS of the residual stream that the projection writes to. Off, as in the papers;
    the refit has its own, reconstruct.relative."""

    @field_validator("nm", mode="before")
    @classmethod
    def _two_numbers(cls, value: Any) -> Any:
        """Where it is not quoted, YAML takes 2:4 for minutes and seconds."""
        if isinstance(value, int) and value >= 60:
            value = f"{value // 60}:{value % 60}"
        if not re.fullmatch(r"\d+:\d+", str(value)):
            raise PydanticCustomError("pattern", "Input should be N:M, such as 2:4")
        return value


class ReconstructSettings(Section):
    enabled: bool = True
    """Refit what is left; false: plain removal."""
    target: Literal["dense", "layer"] = "dense"
    """Outputs aimed at: the dense model's, or the dense layer's on what the pruned model hands to it."""
    arm: Arm = "masked"
    """Activations the refit sees."""
    relative: bool = True
    """As `structured.relative`, for the rows of the refit."""
    constant: bool = False
    """Append a constant feature, which gives the pruned layer a bias."""
    mode: Literal["least-squares", "bias"] = "least-squares"
    """bias: only the removed units' mean output is added (FLAP's compensation)."""
    damping: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3), min_length=1
    )
    """The lambdas to choose from per layer, relative to the mean diagonal; infinity is always among them."""

    @property
    def adds_bias(self) -> bool:
        """Whether pruned layers get a bias."""
        return self.enabled and (self.constant or self.mode == "bias")


class ExportSettings(Section):
    compat: Literal["official", "uniform", "free"] = "free"
    """Who can load it: the family's own code (official), engines with one width everywhere (uniform), ours (free)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the written weights; default the checkpoint's own."""
    max_shard_size: str = Field("5GB", pattern=r"^[1-9]\d*[KMGT]B$")


class MemorySettings(Section):
    budget_gb: float = Field(8.0, gt=0)
    """Above this, hidden states are kept in files and held activations are recomputed instead."""
    offload: bool = False
    """Weights stay in host memory; each layer's are on the accelerator only while it computes."""
    overlap: bool = False
    """On an accelerator copy hidden states and offloaded weights, through pinned memory, while others are computed
    with: faster, with more memory. Off until a GPU has shown it right: its copies on CUDA streams never ran on one yet
    (stage `overlap` of scripts/gpu/gpu_report.py checks that weights stay bit-equal)."""


class Config(Sections):
    """Every choice of a pruning run, by section."""

    scalars: ClassVar[tuple[str, ...]] = ("method",)

    method: Literal["structured", "unstructured", "nm"] = "structured"
    """structured: heads and channels are removed; unstructured, nm: single weights become zero (`masking`)."""
    model: ModelSettings = ModelSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    sink: SinkSettings = SinkSettings()
    structured: StructuredSettings = StructuredSettings()
    masking: MaskingSettings = MaskingSettings()
    reconstruct: ReconstructSettings = ReconstructSettings()
    export: ExportSettings = ExportSettings()
    memory: MemorySettings = MemorySettings()
