"""Every choice of an evaluation."""

from dataclasses import fields
from typing import Any

from pydantic import Field

from structprune.config import ModelSettings
from structprune.config.sections import Section, Sections
from structprune.evaluation.choices import MonteCarlo
from structprune.evaluation.perturb import Sampling
from structprune.evaluation.presets import Likelihood


class EvaluationSettings(Section):
    source: str | None = None
    """Text whose NELBO is measured: a .txt, .jsonl or .parquet file, wikitext2, c4, or a Hub dataset id."""
    subset: str | None = None
    """The Hub dataset's configuration name."""
    split: str | None = None
    """Split of a Hub dataset; default test (c4: validation)."""
    column: str | None = None
    """Text column; default `messages` where there is one, else `text`."""
    windows: int = Field(default=128, ge=1)
    """The most windows of the text."""
    length: int | None = Field(default=None, ge=4)
    """Tokens in a window; default 512, or the checkpoints' positions where they have fewer."""
    noise: int = Field(default=8, ge=1, le=10_000)
    """Noisy copies of a window."""
    fidelity: bool = False
    """Compare predictions and generated text with the first checkpoint's, or with those of the run in --against."""
    fidelity_top: int = Field(default=256, ge=1, le=100_000)
    """Likeliest tokens kept of a reference's prediction, 8 bytes each; all others count as one."""
    fidelity_prompts: int = Field(default=32, ge=0, le=100_000)
    """Openings of windows that every checkpoint continues greedily; 0: none."""
    fidelity_opening: int | None = Field(default=None, ge=1)
    """Tokens of an opening; default 32, or half a window where that is less."""
    fidelity_tokens: int | None = Field(default=None, ge=2)
    """Tokens generated after an opening; default 64, or what the positions leave where that is less."""
    fidelity_steps: int | None = Field(default=None, ge=1)
    """Denoising steps of a continuation; default one for each token."""
    tasks: tuple[str, ...] = ()
    """piqa:FILE, gsm8k:FILE[:TRAIN], tasks of lm-eval, or files such as configs/eval/piqa.yaml."""
    limit: int | None = Field(default=None, ge=1)
    """The most documents of a task (of a group: of each member)."""
    shots: int | None = Field(default=None, ge=0)
    """Solved examples before every question; default the published number."""
    chat: bool = False
    """Prompts go through the tokenizer's chat template."""
    samples: int | None = Field(default=None, ge=1, le=1_000_000)
    """Monte Carlo samples of an answer; default the published number (128; mmlu 1)."""
    block: int | None = Field(default=None, ge=1)
    """Samples that share a draw of LLaDA's k; default 8."""
    cfg_scale: float | None = Field(default=None, ge=0)
    """Scale of classifier-free guidance of answers (of generation: generation.cfg_scale); default as published."""
    sampling: Sampling = "stratified"
    """stratified: noise levels spread evenly; published: drawn independently. The same mean, less variance."""
    adaptive: bool = False
    """Stop drawing samples of a question once its choice is decided."""
    confidence: float = Field(default=0.99, gt=0, lt=1)
    """For `adaptive`: the probability that all samples would make the same choice."""
    skip_empty: bool = False
    """Dream as in the sink-aware release: leave samples without a mask out of the mean, which biases it."""
    generation: dict[str, Any] = {}
    """Options of the family's sampler (gen_length, steps, ...), over the published ones."""
    fewshot_seed: int = Field(default=1234, ge=0, lt=2**62)
    """Seed of lm-eval's choice of solved examples; default its own."""
    include: str | None = None
    """A folder of further lm-eval tasks."""
    seed: int = Field(default=0, ge=0, lt=2**62)
    """Seed of windows, noise, samples and bootstrap."""
    batch: int | None = Field(default=None, ge=1)
    """Tokens in a forward pass to begin with; default suits the device. Halved whenever memory runs out."""
    prompts: int = Field(default=8, ge=1)
    """Prompts that are generated from together."""

    def monte_carlo(self, preset: Likelihood | None) -> MonteCarlo:
        """How answers are scored: by the values set here, else the published ones, else defaults.

        Raises:
            UserError: values that contradict each other.
        """
        values = {field.name: getattr(self, field.name) for field in fields(MonteCarlo)}
        values |= {name: value for name, value in (preset or Likelihood()) if values[name] is None}
        return MonteCarlo(**values | {"block": min(values["block"], values["samples"])})


class EvaluationConfig(Sections):
    """An evaluation's choices, by section."""

    model: ModelSettings = ModelSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
