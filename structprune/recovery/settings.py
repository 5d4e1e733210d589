"""Every choice of a recovery."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from structprune.config import ModelSettings
from structprune.config.sections import Section, Sections

Role = Literal["query", "key", "value", "attention_output", "gate", "up", "down"]
ROLES: tuple[Role, ...] = get_args(Role)


class DataSettings(Section):
    source: str = "wikitext2"
    """wikitext2, c4, a Hub dataset id, or a .txt, .jsonl or .parquet file."""
    subset: str | None = None
    """The Hub dataset's configuration name."""
    split: str = "train"
    """Split of a Hub dataset."""
    column: str | None = None
    """Text column of a dataset, .jsonl or .parquet. Default: `messages` if there is one, else `text`."""
    answers_only: bool = True
    """Of conversations, mask and learn the assistant's turns only. false: they are text like any other."""
    length: int = Field(512, ge=4)
    """Tokens in a window. Default: fewer than 512 where the models have fewer positions."""
    held_out: int = Field(64, ge=2)
    """Windows that are not learnt, on which the model is judged before, during and after."""
    noise: int = Field(4, ge=1, le=1000)
    """Noisy copies of a held-out window."""
    seed: int = Field(0, ge=0, lt=2**62)
    """Random seed of windows, their order, noise and new weights."""


class TeacherSettings(Section):
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the dense model's weights in memory, and of its computation. Default: float32 on CPU, the checkpoint's
    own on an accelerator."""
    int8: bool = False
    """Hold the dense model's block projections as 8-bit integers with a scale per output row."""
    offload: bool = False
    """Keep the dense model in host memory; each layer is on the accelerator only while it computes."""
    cache: str | None = None
    """Directory for the dense model's predictions, written once: later trainings on the same text need no dense passes.
    Default: none, it predicts on the way."""
    top: int = Field(64, ge=1, le=100_000)
    """For a cache: likeliest tokens kept of a prediction, 8 bytes each; all others count as one."""


class LossSettings(Section):
    kl: float = Field(1.0, ge=0)
    """Weight of the divergence from the dense model's predictions."""
    cross_entropy: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the text itself."""
    streams: float = Field(0.0, ge=0)
    """Weight of the error of the residual streams behind all blocks but the last, in the second stage: of the first
    stage's error, the mean over tokens and blocks."""
    causal: float | None = Field(None, ge=0)
    """Weight of the same losses at the next token of the text without noise, of a model that is causal too
    (Nemotron-Labs-Diffusion). Default: that of the two losses in config.json, published 1."""
    temperature: float = Field(1.0, gt=0)
    """Of both models' predictions in the divergence."""
    weighting: Literal["uniform", "nelbo"] = "uniform"
    """Of masked tokens. uniform: alike. nelbo: by 1 / p, as the bound has it."""
    least_rate: float = Field(0.05, gt=0, le=1)
    """For weighting nelbo: mask probabilities below it count as this."""
    teacher_share: float = Field(1.0, ge=0, le=1)
    """The dense model's share of the target at the start; the student's own predictions are the rest, and it grows to 1
    over training."""
    noisy_share: float = Field(0.0, ge=0, le=1)
    """How much of that share is lost where all is masked, less and less over training."""

    def goal(self, figures: Mapping[str, float]) -> float:
        """The held-out figure that decides what is best: what is learnt, in nats per token."""
        result = self.kl * figures["kl"] + self.cross_entropy * figures["nelbo"]
        if not self.causal:
            return result
        return result + self.causal * (self.kl * figures["causal_kl"] + self.cross_entropy * figures["causal_ce"])


class BlockSettings(Section):
    tokens: int = Field(0, ge=0)
    """Tokens that every block learns in a first stage, block by block, repeats counted; 0: no such stage."""
    learning_rate: float = Field(1e-4, gt=0)
    """Its peak, in that stage."""
    visible: float = Field(1.0, ge=0, le=1)
    """Weight of the error at visible tokens, where masked ones have 1."""
    offload: bool = False
    """Keep both models in host memory in that stage; one block of each is on the accelerator."""
    budget_gb: float = Field(8.0, gt=0)
    """Host memory for both models' residual streams; what exceeds it is in temporary files."""


class TrainSettings(Section):
    method: Literal["lora", "full"] = "lora"
    """lora: low-rank updates of the block projections, merged at the end. full: all weights."""
    rank: int = Field(32, ge=1)
    """For lora: its rank."""
    alpha: float = Field(64.0, gt=0)
    """For lora: updates are scaled by alpha / rank."""
    targets: tuple[Role, ...] = Field(ROLES, min_length=1)
    """For lora: the projections that it updates."""
    tokens: int = Field(1_000_000, ge=0)
    """Tokens to learn from, repeats counted; 0: only block by block (`blocks.tokens`)."""
    learning_rate: float = Field(5e-4, gt=0)
    """Its peak."""
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    """How it falls."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which it rises."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of a step's gradient."""
    batch: int = Field(16, ge=1)
    """Windows in an optimiser step, over all processes."""
    pass_windows: int = Field(4, ge=1)
    """Windows in a forward pass of one process; a step of more windows takes several passes."""
    checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Of the computation. Default: bfloat16 on an accelerator that has it, else float32."""
    evaluations: int = Field(10, ge=1)
    """How often the held-out text is measured during training; each time is also where a killed run goes on."""
    patience: int | None = Field(None, ge=1)
    """Stop after so many evaluations without a gain. Default: never."""
    report_to: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Loggers of transformers, such as tensorboard or wandb. TensorBoard's and CodeCarbon's files stay in
    OUT.runs."""

    @field_validator("targets", "report_to", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        """A single text stands for a list of it."""
        return (value,) if isinstance(value, str) else value


class RecoverConfig(Sections):
    """Every choice of a recovery, by section."""

    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    teacher: TeacherSettings = TeacherSettings()
    loss: LossSettings = LossSettings()
    blocks: BlockSettings = BlockSettings()
    train: TrainSettings = TrainSettings()
