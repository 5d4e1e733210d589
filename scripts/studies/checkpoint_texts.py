"""What a study of a checkpoint runs on: the model, its texts, and windows under noise with the dense predictions."""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from structprune.calibration.build import LONGEST, check_vocabulary
from structprune.calibration.noise import stratified_noise
from structprune.calibration.text import LOCAL, join_texts, read_texts
from structprune.calibration.windows import cut_windows, tokenize_corpus
from structprune.errors import UserError
from structprune.evaluation.fidelity import Fidelity, masked_kl, reference_predictions
from structprune.evaluation.nelbo import maskable_tokens, masked_nelbo, nelbo_of
from structprune.generation.generate import Options, generate
from structprune.generation.samplers import low_confidence
from structprune.models.adapter import Adapter
from structprune.models.fingerprint import fingerprint
from structprune.models.loading import load_config
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.tokenizer import load_tokenizer

BATCH = 16  # windows in a forward pass
OPENINGS, GENERATED = 24, 64  # openings that are continued, and tokens after each


@dataclass(frozen=True)
class Subject:
    """A checkpoint, its calibration text, and the texts it is evaluated on; the key of caches in every process."""

    checkpoint: Path
    text: Path
    texts: tuple[tuple[str, Path], ...]  # (name in tables, file)
    windows: int  # of each evaluation text
    length: int  # tokens in a window, of calibration too
    levels: Path | None = None  # where searches keep their levels, so that one that was killed goes on

    @property
    def keys(self) -> dict:
        """Configuration keys of every variant."""
        return {"calibration.source": str(self.text), "calibration.length": self.length}

    def cut(self, path: Path, model: DiffusionLM, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Windows (N, T) of a text, a noisy copy of each (N, 1, T), and their mask probabilities (N, 1).

        Raises:
            UserError: text that cannot be read, is too short, or has tokens that the model does not embed.
        """
        source, tokenizer = str(path), load_tokenizer(model.source.directory)
        documents = join_texts(read_texts(source, section="evaluation"), source, tokenizer, "evaluation")
        tokens = tokenize_corpus(documents, tokenizer, LONGEST)  # (M,)
        if len(tokens) < self.windows * self.length:
            raise UserError(
                f"the text '{source}' has {len(tokens):,} tokens, too few for {self.windows} windows of {self.length}:"
                " give longer text, or lower --windows or --length"
            )
        check_vocabulary(tokens, Adapter(model).vocabulary, source)
        generator = torch.Generator().manual_seed(1000 + seed)
        ids = cut_windows(tokens, self.windows, self.length, generator)  # (N, T)
        noise = stratified_noise(ids, model.config.mask_token_id, generator, edges_visible=model.edges_visible)
        return ids, *noise


class HeldOutText:
    """Windows of one text under noise that all variants of a seed share, and what the dense model predicts there.

    Args:
        model: the dense one.
        ids, noisy, probability: (N, T), (N, 1, T) and (N, 1), as `Subject.cut` gives them.
    """

    def __init__(self, model: DiffusionLM, ids: torch.Tensor, noisy: torch.Tensor, probability: torch.Tensor):
        self.ids, self.noisy, self.probability = ids, noisy, probability
        self.maskable = maskable_tokens(model, ids.shape[1])
        self._reference, own = reference_predictions(model, ids, noisy, batch=BATCH)
        self._nelbo = self._nelbo_of(own)  # (N,)
        self.dense = {"nelbo": self._nelbo.mean().item(), "accuracy": own.accuracy}

    def compare(self, model: DiffusionLM) -> dict:
        """Loss of NELBO against the dense model per window; over all masked tokens KL to it, nats, and agreement."""
        own = masked_kl(model, self.ids, self.noisy, self._reference, batch=BATCH)
        loss = self._nelbo_of(own) - self._nelbo  # (N,)
        return {"loss": loss.tolist(), "kl": own.mean_kl, "agreement": own.agreement}

    def _nelbo_of(self, own: Fidelity) -> torch.Tensor:
        """(N,) fp64 nats per maskable token: the estimate of `masked_nelbo`, without a pass of its own."""
        return nelbo_of(own.nats, own.masked_tokens, self.probability, self.maskable).nelbo.double()  # (N,)


class Continued:
    """Openings of windows that a dense model continues greedily, and what other models keep of it.

    As `structprune eval --fidelity` measures it (docs/methods.md, "Fidelity to a reference").

    Args:
        model: the dense one.
        ids: (N, T) windows, of which the first are opened.
        seed: of the noise under which generated text is judged.
        openings: n, windows that are opened.
        tokens: G, generated after each, at most what a window has left.
    """

    def __init__(
        self, model: DiffusionLM, ids: torch.Tensor, seed: int, openings: int = OPENINGS, tokens: int = GENERATED
    ):
        self._model, self._seed = model, seed
        self._prompts = ids[:openings, : ids.shape[1] // 4]  # (n, P)
        self._tokens = min(tokens, ids.shape[1] - self._prompts.shape[1])
        self._theirs = self._continue(model)
        self.dense_nelbo = self._judge(self._theirs)

    def compare(self, model: DiffusionLM) -> dict:
        """The share of the dense model's tokens that come out at the same place, and the NELBO of what is generated
        under the dense model, nats per token."""
        ours = self._continue(model)  # (n, P + G)
        opening = self._prompts.shape[1]
        equal = (ours == self._theirs)[:, opening:].double()  # (n, G)
        return {"tokens_kept": equal.mean().item(), "generated_nelbo": self._judge(ours)}

    def _continue(self, model: DiffusionLM) -> torch.Tensor:
        """Openings with what follows, (n, P + G)."""
        settings = low_confidence(model.config, self._tokens, self._tokens)
        return torch.stack(list(generate(model, list(self._prompts), settings, options=Options(batch=BATCH))))

    def _judge(self, ids: torch.Tensor) -> float:
        """NELBO of (n, P + G) under the dense model, given the openings, in nats per generated token."""
        model, opening = self._model, self._prompts.shape[1]
        generator = torch.Generator().manual_seed(self._seed)
        noisy, probability = stratified_noise(ids, model.config.mask_token_id, generator, 4, model.edges_visible)
        noisy[..., :opening] = ids[:, None, :opening]  # (n, S, P + G)
        estimate = masked_nelbo(model, ids, noisy, probability, BATCH)
        share = maskable_tokens(model, ids.shape[1]) / (ids.shape[1] - opening - model.edges_visible)
        return float(estimate.nelbo.mean()) * share


def subject_of(options: argparse.Namespace) -> Subject:
    """What the options name.

    Raises:
        UserError: a checkpoint or a text that is not there, or evaluation texts that are not NAME=FILE.
    """
    load_config(options.checkpoint)
    load_tokenizer(options.checkpoint)
    texts: dict[str, Path] = {}
    for value in options.eval:
        name, mark, file = value.partition("=")
        if not (name and mark and file):
            raise UserError(f"--eval '{value}' is not a name and a file: write --eval NAME=FILE")
        if name in texts:
            raise UserError(f"--eval names '{name}' twice: give every text a name of its own")
        texts[name] = Path(file)
    for option, path in [("--text", options.text), *(("--eval", path) for path in texts.values())]:
        if not path.is_file() or path.suffix.lower() not in LOCAL:
            raise UserError(f"{option}: no text at '{path}': name a {', '.join(LOCAL)} file")
    kept = getattr(options, "levels", None)
    return Subject(options.checkpoint, options.text, tuple(texts.items()), options.windows, options.length, kept)


def facts(subject: Subject, name: str | None, base: dict) -> dict:
    """What decides the results, by content: names of files, and no path of this machine."""
    directory = subject.checkpoint
    return {
        "base": base | {"calibration.source": subject.text.name, "calibration.length": subject.length},
        "checkpoint": {"name": name or directory.resolve().name, "fingerprint": fingerprint(directory)},
        "texts": {each: path.name for each, path in subject.texts},
        "sha256": {path.name: _digest(path) for path in (subject.text, *dict(subject.texts).values())},
    }


def _digest(path: Path) -> str:
    """The first 16 hex digits of a file's hash."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
