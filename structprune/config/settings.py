"""One validated configuration per run: a YAML file plus `--set section.key=value` overrides; no unknown keys."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from structprune.config.names import Arm, or_registered
from structprune.config.refit import ReconstructSettings
from structprune.config.sections import Section, Sections

SinkPolicy = Literal["all", "unstable", "none"]
MOST_STEPS = 100_000
DEFAULT_ARM: Arm = "masked+sink"  # of scores; refits default to masked, because sink weights showed no gain there
StructuredScore = Annotated[
    Literal["magnitude", "wanda", "fluctuation", "taylor", "obs"], or_registered("structured.score")
]
MaskScoreName = Annotated[
    Literal["magnitude", "wanda", "sink-wanda", "ria", "sparsegpt", "sink-sparsegpt"], or_registered("masking.score")
]


class ModelSettings(Section):
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights in memory. Default: float32 on CPU, the checkpoint's own on an accelerator."""
    device: str | None = None
    """Where the model computes, such as cpu or cuda:0. Default: cuda if there is one."""
    mask_id: int | None = None
    """The mask token's id, if neither config.json nor the tokenizer names one."""
    block_size: int | None = Field(None, ge=1)
    """Tokens of a block, of a block diffusion checkpoint whose config.json does not say so (dllm's A2D: 32). Default:
    config.json's; without one A2D has full attention, and LLaDA2 blocks of 32."""
    allow_pickle: bool = False
    """Also read .bin shards (weights only)."""

    @property
    def reading(self) -> dict[str, Any]:
        """How a checkpoint's files are read, as arguments of `structprune.models.loading.load_model`."""
        return self.model_dump(exclude={"dtype", "device"})


class CalibrationSettings(Section):
    source: str = "wikitext2"
    """wikitext2, c4, a Hub dataset id, a .txt, .jsonl or .parquet file, or a calibration.safetensors to replay."""
    subset: str | None = None
    """The Hub dataset's configuration name."""
    split: str = "train"
    """Split of a Hub dataset."""
    column: str | None = None
    """Text column of a dataset, .jsonl or .parquet. Default: `messages` if there is one, else `text`."""
    windows: int = Field(128, ge=1)
    """Windows for scores and refit."""
    held_out: int = Field(16, ge=0)
    """Further windows, disjoint from those, for choosing damping and split and for the final check. Masks without a
    refit need none (0: no check)."""
    length: int = Field(2048, ge=2)
    """Tokens in a window. Default: fewer than 2048 where the model has fewer positions."""
    steps: int = Field(50, ge=1, le=MOST_STEPS)
    """N, denoising steps of the forward process. With `interval` it gives the noise levels."""
    interval: int = Field(5, ge=1)
    """Every interval-th step is a noise level: S = steps // interval. Dream draws S levels at random instead."""
    copies: int | None = Field(None, ge=1)
    """Noisy copies of a window, at most S, with levels dealt out evenly over windows: fewer copies leave time for more
    windows. Default: S, every window at every level."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Random seed of the windows, their noise and the noise of the held-out check."""
    causal: float | None = Field(None, ge=0)
    """Weight of rows that a model reads causally against those of block diffusion, in scores, refits and gradients;
    of a model that is both (Nemotron-Labs-Diffusion). Default: that of the two losses in config.json, published 1."""
    batch: int = Field(1, ge=1)
    """Windows per forward pass, each with all its noisy copies. For methods unstructured and nm: sequences per pass."""

    @property
    def levels(self) -> int:
        """S, the noise levels of `steps` and `interval`; 0 where these leave none."""
        return self.steps // self.interval

    @property
    def noisy_copies(self) -> int:
        """Noisy copies of a window."""
        return self.levels if self.copies is None else self.copies

    @property
    def replays(self) -> bool:
        """Whether the source is a saved calibration, which has its own windows and noise."""
        return Path(self.source).suffix.lower() == ".safetensors"


class SinkSettings(Section):
    policy: SinkPolicy = "all"
    """Which sinks lose weight on an arm with +sink. all: every sink. unstable: sinks that come and go over the levels
    of a window (omega = 1 - phi min(1, 4 Var phi); needs 2 copies). none: no sink, as without +sink."""
    trajectory: Literal["forward", "reverse"] = "forward"
    """Where noisy copies come from. forward: random noise at each level. reverse: states of the model's own generation
    after the first quarter of each window. Held-out windows always have random noise."""
    mask: Literal["soft", "hard"] = "soft"
    """soft: phi = sigmoid(alpha (mass - threshold)). hard: phi is 0 up to the threshold and 1 above it."""
    alpha: float = Field(5.0, gt=0)
    """Steepness of the soft mask."""
    kappa: float = Field(2.0, ge=0)
    """The threshold is the mean attention mass over positions plus this many standard deviations."""
    scale_free: bool = False
    """Divide the mass by its mean first, so that phi does not get steeper with more heads and layers."""


class StructuredSettings(Section):
    ratio: float = Field(0.5, allow_inf_nan=True)  # `check_ratio` says what is wrong with one
    """Share to remove of the parameters of q, k, v, output, gate, up and down projections, protected blocks aside."""
    score: StructuredScore = "obs"
    """How units are ranked; one file each in structprune/structured/scores."""
    arm: Arm | None = None
    """Activations that the score reads. Default: masked+sink; magnitude reads none."""
    allocation: Literal["uniform", "global", "depth"] = "global"
    """How removal is spread over blocks. global: rank heads over all blocks, and channels over all blocks. uniform: the
    same widths in every block, which other engines can load. depth: the ratio falls linearly with depth."""
    depth_slope: float = Field(0.2, ge=-1, le=1)
    """For `depth`: ratio of the first block minus ratio of the last."""
    split: Literal["equal", "by-cost", "measured", "joint"] | int = "measured"
    """Heads against channels. measured: compared on held-out text. equal: the same ratio for both. by-cost: what the
    score predicts to cost least. joint: one global ranking of both. A number: attention steps to remove, per block
    (uniform, depth) or over all blocks (global)."""
    split_candidates: int = Field(8, ge=2)
    """For `measured`: about this many head counts are refitted and compared before the search narrows."""
    split_windows: int = Field(32, ge=1)
    """For `measured`: most windows that a candidate is refitted on."""
    gqa: Literal["query_heads", "kv_groups"] = "query_heads"
    """Attention unit with grouped queries: one query head of every KV group, or one KV head with its query heads."""
    experts: int = Field(0, ge=0)
    """Of mixtures of experts: so many whole experts go from every block, those that add least to the stream. Channels
    and heads make up the rest of the ratio; one channel goes from every expert of a block at a time. A multiple of the
    groups that a token chooses among, where there are some (LLaDA2)."""
    shared: int = Field(0, ge=0)
    """Of shared experts, which all tokens go through (LLaDA2): so many channels go from every block, those of least
    cost. They lose none otherwise."""
    protect_first: int = Field(0, ge=0)
    """This many first blocks stay whole and do not count in the ratio."""
    protect_last: int = Field(0, ge=0)
    """This many last blocks stay whole and do not count in the ratio."""
    round_to: Literal["auto"] | int = "auto"
    """Remaining MLP widths are multiples of this. auto: 128, less where the MLP is narrower than 16 times that."""
    damping: float = Field(0.01, gt=0)
    """For `obs`: lambda, relative to the mean diagonal of the Gram matrix."""
    rounds: int = Field(64, ge=1)
    """For `obs`: channels are removed in this many rounds and re-scored after each."""
    relative: bool | None = None
    """For `obs`: weight every row by 1 / RMS of its residual stream, as the next norm does. Default: true."""


class MaskingSettings(Section):
    """Which weights become zero, for the methods `unstructured` and `nm`."""

    ratio: float | None = Field(None, ge=0, lt=1)
    """Share of the weights to remove from every projection. Default: 0.5, with `nm` N / M."""
    nm: str = "2:4"
    """For method nm, N:M: of every M neighbouring inputs of an output, N weights become zero."""
    score: MaskScoreName = "sparsegpt"
    """How weights are ranked; one file each in structprune/masking/scores. sink-NAME: the same on an arm with +sink."""
    arm: Arm | None = None
    """Activations that the score reads. Default: masked, for sink-NAME masked+sink; magnitude reads none."""
    norms: Literal["joint", "summed"] = "joint"
    """For wanda and ria: the norm of an input over all rows, or the sum of its norms over sequences (as published)."""
    order: Literal["sequential", "one-shot"] = "sequential"
    """sequential: measure a block on the output of the masked blocks before it. one-shot: on the dense model."""
    allocation: Literal["uniform", "owl", "depth"] = "uniform"
    """uniform: the same ratio in every block. owl: more in blocks with fewer outliers (arXiv 2310.05175). depth: the
    ratio falls linearly with depth."""
    owl_threshold: float = Field(5.0, gt=0)
    """For `owl`: an outlier's |W| x norm exceeds this many times the block's mean."""
    owl_spread: float = Field(0.08, ge=-1, le=1)
    """For `owl`: block ratios differ by at most twice this. Negative: remove more in blocks with more outliers."""
    depth_slope: float = Field(0.2, ge=-1, le=1)
    """For `depth`: ratio of the first block minus ratio of the last."""
    damping: float = Field(0.01, ge=0)
    """For sparsegpt: lambda, relative to the mean diagonal of the Gram matrix; raised until that can be factored."""
    column_block: int = Field(128, ge=1)
    """For sparsegpt: columns whose mask is chosen together."""
    relative: bool = False
    """Weight every row by 1 / RMS of the residual stream that the projection adds to. Off, as in the papers. The refit
    has its own, reconstruct.relative."""

    @field_validator("nm", mode="before")
    @classmethod
    def _two_numbers(cls, value: Any) -> Any:
        """YAML reads an unquoted 2:4 as minutes and seconds."""
        if isinstance(value, int) and value >= 60:
            value = f"{value // 60}:{value % 60}"
        if not re.fullmatch(r"\d+:\d+", str(value)):
            raise PydanticCustomError("pattern", "Input should be N:M, such as 2:4")
        return value


class SearchSettings(Section):
    """Widths of every block chosen by what they do to the model's predictions, for method structured."""

    enabled: bool = False
    """Search for better widths, from the plan that `structured` gives, at its size. The better of both is saved. With
    `export.compat` uniform or official: for whole blocks to drop, so that the others, alike, stay wider."""
    method: Literal["both", "knapsack", "evolution"] = "both"
    """knapsack: measure the loss of replacing one level at a time, and combine levels so that the sum is least.
    evolution: measure random shifts of width between blocks and kinds. both: evolution starts from the knapsack's."""
    budget: Literal["parameters", "macs", "latency"] = "parameters"
    """What stays as the plan of `structured` leaves it: parameters, or MACs of a forward pass over `calibration.length`
    tokens, of which a head takes more the longer the text. latency: at most `target_ms` by times that are measured on
    the run's device, which decide `structured.ratio` too."""
    target_ms: float | None = Field(None, gt=0)
    """For budget `latency`: most milliseconds of a forward pass of the pruned model, as --target-latency sets it."""
    latency_batch: int = Field(1, ge=1)
    """For budget `latency`: sequences in that forward pass."""
    latency_length: int | None = Field(None, ge=1)
    """For budget `latency`: tokens in each of them. Default: the length of the calibration windows."""
    rounds: int = Field(2, ge=1)
    """Libraries of refitted levels, each around the best plan so far, with levels half as far apart."""
    levels: int = Field(2, ge=1)
    """Levels of each block's heads and channels on both sides of the plan's."""
    spread: float = Field(0.25, gt=0, le=1)
    """Share of a block's units between its width in the plan and its farthest level, in the first round."""
    whole: bool = True
    """The whole attention or MLP of a block may go too. Needed where only whole blocks can be searched for."""
    sequences: int = Field(32, ge=1)
    """At most so many noisy sequences, equally many of each held-out window, on which plans are compared."""
    generations: int = Field(8, ge=1)
    """Generations of evolution in a round."""
    offspring: int = Field(16, ge=1)
    """Plans that a generation compares, on a quarter of the sequences; a quarter of them is compared on all."""


class ExportSettings(Section):
    compat: Literal["official", "uniform", "free"] = "free"
    """Who can load the result. official: the family's own code. uniform: engines that need one width everywhere. free:
    the model files written beside the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the written weights. Default: the checkpoint's own."""
    max_shard_size: str = Field("5GB", pattern=r"^[1-9]\d*[KMGT]B$")
    """Largest file of weights, such as 5GB or 500MB."""


class MemorySettings(Section):
    budget_gb: float = Field(8.0, gt=0)
    """Beyond this, hidden states go to temporary files and held activations are computed again."""
    host_gb: float | None = Field(None, gt=0)
    """Most host memory. The run then chooses what is held, streamed, read from disk, put into files or computed again,
    by the peak that `inspect` predicts; `offload` and `budget_gb`, where they are set, stay as they are."""
    device_gb: float | None = Field(None, gt=0)
    """Most memory of an accelerator, in the same way."""
    rehearsal: bool | None = None
    """Before the long work, let one block go through every stage, on a few windows. Default: for weights of 1 GB and
    more."""
    offload: bool | Literal["disk"] = False
    """true: keep the weights in host memory; each layer's are on the accelerator only while it computes. disk: leave
    them in their files, on a CPU too; changed ones are in temporary files."""
    overlap: bool = False
    """On an accelerator, copy hidden states and offloaded weights through pinned memory while others are computed:
    faster, with more memory. Off until a GPU has shown it right: its copies on CUDA streams never ran on one yet (stage
    `overlap` of scripts/gpu/gpu_report.py checks that weights stay bit-equal)."""

    @field_validator("offload", mode="before")
    @classmethod
    def _a_place(cls, value: Any) -> Any:
        """One message, not one for each of the types that it may have."""
        if str(value) != "disk" and str(value).lower() not in ("true", "false"):
            raise PydanticCustomError("place", "Input should be true, false or disk")
        return value


class Config(Sections):
    """Every choice of a pruning run, by section."""

    scalars: ClassVar[tuple[str, ...]] = ("method",)

    method: Literal["structured", "unstructured", "nm"] = "structured"
    """structured: remove heads and channels. unstructured, nm: set single weights to zero (section `masking`)."""
    model: ModelSettings = ModelSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    sink: SinkSettings = SinkSettings()
    structured: StructuredSettings = StructuredSettings()
    masking: MaskingSettings = MaskingSettings()
    reconstruct: ReconstructSettings = ReconstructSettings()
    search: SearchSettings = SearchSettings()
    export: ExportSettings = ExportSettings()
    memory: MemorySettings = MemorySettings()

    @model_validator(mode="before")
    @classmethod
    def _masks_refit_alone(cls, values: Any) -> Any:
        """Under a mask, what compares with the dense model's hidden states is off: no width changes there."""
        given = values.get("reconstruct", {}) if isinstance(values, dict) else None
        if isinstance(given, dict) and values.get("method", "structured") != "structured":
            return values | {"reconstruct": {"producers": False, "stream": 0.0} | given}
        return values

    @property
    def drops_blocks(self) -> bool:
        """Whether a search drops whole blocks: where the export class wants equal ones."""
        return self.search.enabled and self.export.compat != "free"
