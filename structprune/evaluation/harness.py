"""structprune's models in lm-evaluation-harness, registered there as `structprune` (needs the extra `eval`).

lm-eval 0.4.13 has no hook for models of other packages, so this module replaces its command line, as the published
evaluations do:

    python -m structprune.evaluation.harness --model structprune --model_args pretrained=DIR,cfg_scale=0.5 --tasks piqa

(or `accelerate launch -m structprune.evaluation.harness ...` on several GPUs),

and takes all of lm_eval's options (--apply_chat_template, --limit, --include_path, ...). From Python, import it before
`lm_eval.simple_evaluate`.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import register_model

from structprune.errors import UserError, nearest
from structprune.evaluation.choices import Item, MonteCarlo, Scored, check_items, longest_first, score_items
from structprune.evaluation.documents import Opening
from structprune.evaluation.openings import check_openings, generate_texts
from structprune.evaluation.requests import group_choices, in_request_order, to_item, to_opening
from structprune.evaluation.texts import Texts, chat_warning, model_names
from structprune.generation.samplers import sampler_options
from structprune.models.encode import Batches
from structprune.models.families import family_of
from structprune.models.loading import load_model
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import compute_device, pick_device
from structprune.workers import Workers, join, leave

LOG = logging.getLogger(__name__)
PART = 256  # items that are scored together: the nats of all their tokens are in memory until they are done
DEFAULT_DEVICE = "cuda:0"  # lm_eval's command line passes this by default, with or without a GPU
LOADING = ("dtype", "mask_id", "block_size", "allow_pickle")  # arguments of `load_model`


@register_model("structprune")
class StructpruneLM(LM):
    """A LLaDA, MMaDA, Dream or A2D checkpoint, official or pruned, as a model of lm-eval.

    Started by `accelerate launch` or torchrun, each process has its share of the documents and its own GPU. lm-eval is
    told of one process: where it divides the documents itself, a process without a document ends the run, and random
    examples are others than in one process. So every process has all documents, and this class divides them.

    Args:
        pretrained: a directory, a Hub id, or a model from `structprune.load_model`.
        batch_size: rows of the model's full length in a forward pass (more rows where they are shorter), and prompts
            that are generated together; "auto": what suits the device, and 8.
        device: default CUDA where there is one (for several processes, each its own).
        max_batch_size: lm-eval passes it; only its default is supported.
        options: `dtype`, `mask_id`, `block_size` and `allow_pickle` of `load_model`; fields of `MonteCarlo` (samples,
            cfg_scale, seed, adaptive, ...); options of the family's sampler (gen_length, steps, alg, ...), which
            outrank the task's. cfg_scale is for both.
    Raises:
        UserError: anything wrong with the checkpoint (it must have a tokenizer), or an unknown option.
    """

    def __init__(
        self,
        pretrained: str | DiffusionLM,
        batch_size: int | str = "auto",
        device: str | None = None,
        max_batch_size: None = None,
        **options: Any,
    ):
        super().__init__()
        if max_batch_size is not None:
            raise UserError(f"max_batch_size = {max_batch_size} is not used: give batch_size, or auto")
        self.workers = worker = join()
        _leave_results_to_one(worker)
        loading = {name: options.pop(name) for name in LOADING if name in options}
        if isinstance(pretrained, str):
            name = worker.device if device in (None, DEFAULT_DEVICE) else device
            pretrained = load_model(pretrained, device=pick_device(name), **loading)
        self.model = pretrained
        family = family_of(self.model.config)
        self.texts = Texts.open(self.model.source.directory, family.text_edges)
        self.settings, self.sampler = split_options(self.model.config, options)
        self._device, longest = compute_device(self.model), getattr(self.model.config, family.keys["positions"])
        automatic = batch_size == "auto"
        self.batch = Batches.automatic(self._device) if automatic else Batches(int(batch_size) * longest)
        self.prompts = 8 if automatic else int(batch_size)
        self._advise(chat=False)

    def loglikelihood(self, requests: Sequence) -> list[tuple[float, bool]]:
        """Monte Carlo estimates in nats; the answers of one document are one item.

        The flag of greedy decoding is always false. As in the published evaluations it is not computed: no published
        metric reads it, and it would take as many forward passes as an answer has tokens. Metrics that do read it
        (exact_match of multiple choice, acc of LAMBADA) are 0 and meaningless.
        """
        groups = group_choices(requests)
        items = [to_item(group.document, self.texts) for group in groups]
        check_items(self.model.config, items, self.settings)  # all of them, before any is scored
        order = [items[index] for index in longest_first(items)]
        scored = {each.key: each for each in self.workers.share(self._score, order)}
        outcomes = [scored[item.key].log_likelihoods for item in items]
        return [(value, False) for value in in_request_order(groups, outcomes)]

    def _score(self, items: Sequence[Item]) -> list[Scored]:
        """PART items at a time."""
        parts = [items[start : start + PART] for start in range(0, len(items), PART)]
        return [each for part in parts for each in score_items(self.model, part, self.settings, self.batch)]

    def loglikelihood_rolling(self, requests: Sequence) -> list[float]:
        """Raise UserError: it is not supported."""
        raise UserError(
            "loglikelihood_rolling needs a left-to-right model: a masked diffusion model only bounds a text's "
            "likelihood, which `structprune eval --text FILE` reports (NELBO)"
        )

    def generate_until(self, requests: Sequence) -> list[str]:
        """Texts after the prompts, up to EOS or a stop string, by LLaDA's block-wise or Dream's sampler."""
        openings = list(map(to_opening, requests))
        check_openings(self.model.config, openings, self.texts, self.sampler)  # all, before any is answered
        return self.workers.share(self._generate, openings)

    def _generate(self, openings: Sequence[Opening]) -> list[str]:
        return generate_texts(self.model, openings, self.texts, self.sampler, self.settings.seed, self.prompts)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's prompt; later prompts have no BOS besides the template's."""
        if not self.texts.chat:
            self.texts = Texts.of(self.texts.tokenizer, family_of(self.model.config).text_edges, chat=True)
            self._advise(chat=True)
        return self.texts.render(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that lm-eval reports; only the tokenizer's own can be applied."""
        if isinstance(chat_template, str):
            raise UserError(
                f"the chat template '{chat_template}' cannot be chosen: give none, the tokenizer's default is used"
            )
        return (self.texts.tokenizer.chat_template or "") if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return self.texts.tokenizer.name_or_path.replace("/", "__")

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take lm-eval's cache of answers (--use_cache), with what any process has cached.

        A process that finds all its answers there asks for none, and the others would wait for it.
        """
        super().set_cache_hook(cache_hook)
        if self.workers.count > 1 and cache_hook.dbdict is not None:
            for cached in self.workers.gather(dict(cache_hook.dbdict)):
                cache_hook.dbdict.update(cached)

    def _advise(self, chat: bool) -> None:
        names = model_names(self.model.source.name, self.model.source.directory)
        if warning := chat_warning(names, bool(self.texts.tokenizer.chat_template), chat):
            LOG.warning("%s", warning.replace("--chat", "--apply_chat_template"))


def _leave_results_to_one(worker: Workers) -> None:
    """Where lm-eval is told of one process, the one of LOCAL_RANK 0 writes the results: one of all, not of a machine.

    lm-eval names the caches of answers by it too.
    """
    if worker.count > 1:
        os.environ["LOCAL_RANK"] = str(worker.rank)


def split_options(config: Any, options: Mapping[str, Any]) -> tuple[MonteCarlo, dict[str, Any]]:
    """Keyword arguments as settings of likelihoods, and as options of the sampler of a model's family.

    Raises:
        UserError: a name that belongs to neither.
    """
    scoring = [field.name for field in fields(MonteCarlo)]
    sampler = sampler_options(config)
    for name in options:
        if name not in (*scoring, *sampler):
            known = [*LOADING, *scoring, *(name for name in sampler if name not in scoring)]
            raise UserError(f"unknown model argument '{name}'{nearest(name, known)}: {', '.join(known)}")
    settings = MonteCarlo(**{name: value for name, value in options.items() if name in scoring})
    return settings, {name: value for name, value in options.items() if name in sampler}


def main() -> int:
    """lm-eval's command line; a user's error is one line and exit code 2."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
