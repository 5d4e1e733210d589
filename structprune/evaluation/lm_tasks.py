"""lm-eval's tasks as documents with per-item metrics from lm-eval's own code (needs the extra `eval`).

Uses lm-eval 0.4.13's `TaskManager`, `Task.build_all_requests`, filters and `Task.process_results`.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Real
from pathlib import Path
from typing import Any

from structprune.errors import UserError, nearest
from structprune.evaluation.documents import Choices, Document, TaskOptions
from structprune.evaluation.requests import document_key, group_choices, in_request_order, to_opening
from structprune.evaluation.texts import Texts
from structprune.files import first_line

REMEDY = "install lm-eval (pip install 'structprune[eval]'), or name a local file, such as piqa:FILE.jsonl"
OUTPUT_TYPES = ("multiple_choice", "generate_until")  # of the tasks that can be evaluated


@dataclass(frozen=True)
class LmTask:
    """One task of lm-eval: its task object `source`, and its requests by document key."""

    name: str
    documents: tuple[Document, ...]
    source: Any = field(repr=False)
    requests: dict[str, list] = field(repr=False)

    def grade(self, document: Document, outcome: Any) -> dict[str, float]:
        """lm-eval's metrics of one document, called `metric,filter` where the task has several filters.

        Metrics that are not one number per document (F1 over a corpus, Brier score) are left out. The flag of greedy
        decoding, which of multiple choice only exact_match reads, is false.
        """
        requests = self.requests[document.key]
        responses: list[Any] = [outcome]
        if isinstance(document, Choices):
            responses = [(value, False) for value in in_request_order(group_choices(requests), [outcome])]
        for request, response in zip(requests, responses, strict=True):
            request.resps, request.filtered_resps = [response], {}
        for ensemble in self.source._filters:
            ensemble.apply(requests)
        filters = list(requests[0].filtered_resps)
        metrics = {}
        for name in filters:
            values = self.source.process_results(requests[0].doc, [r.filtered_resps[name] for r in requests])
            for metric, value in values.items():
                if isinstance(value, Real):
                    metrics[metric if len(filters) == 1 else f"{metric},{name}"] = float(value)
        return metrics


def load_tasks(name: str, texts: Texts, options: TaskOptions) -> list[LmTask]:
    """A task of lm-eval, or the members of a group or tag; errors as `tasks.open_task`."""
    try:
        manager = _manager(options.include)
    except ModuleNotFoundError as error:
        raise UserError(f"the task '{name}' is lm-eval's, and {error.name} is not installed: {REMEDY}") from error
    if name not in manager.all_tasks and not Path(name).is_file():
        raise UserError(f"unknown task '{name}'{nearest(name, manager.all_tasks)}: lm-eval ls tasks lists them")
    try:
        members = manager.load([name])["tasks"]
    except (OSError, ValueError, RuntimeError) as error:  # `datasets` cannot get the data
        reason = f"the data of task '{name}' cannot be read ({first_line(error)})"
        raise UserError(f"{reason}: go online once, or use a file") from error
    return [_build(member, texts, options) for member in members.values()]


@lru_cache
def _manager(include: str | Path | None):
    """lm-eval's index of tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _build(source: Any, texts: Texts, options: TaskOptions) -> LmTask:
    name = source.task_name
    _check(source, name)
    own, shots = source.get_config("num_fewshot"), options.shots
    if own == 0 and shots:
        raise UserError(f"the task '{name}' is fixed at 0 examples by lm-eval: set evaluation.shots=0, not {shots}")
    source.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
    source.set_fewshot_seed(seed=options.seed)
    source.build_all_requests(
        limit=options.limit,
        apply_chat_template=texts.chat,
        chat_template=texts.render if texts.chat else None,
    )
    requests: defaultdict[str, list] = defaultdict(list)
    for request in source.instances:
        requests[document_key(request)].append(request)
    documents = [_document(members, name) for members in requests.values()]
    return LmTask(name, tuple(documents), source, requests)


def _check(source: Any, name: str) -> None:
    """Refuse tasks that cannot be evaluated."""
    output = source.OUTPUT_TYPE
    if output not in OUTPUT_TYPES:
        raise UserError(f"the task '{name}' is of type {output}: only {' and '.join(OUTPUT_TYPES)} can be evaluated")
    if getattr(source, "UNSAFE_CODE", False):
        remedy = "use python -m structprune.evaluation.harness with --confirm_run_unsafe_code"
        raise UserError(f"the task '{name}' runs generated code: {remedy}")
    if getattr(source, "MULTIMODAL", False):
        raise UserError(f"the task '{name}' has images or sound, and the models read text only: leave it out")
    if (repeats := source.get_config("repeats") or 1) != 1:
        raise UserError(f"the task '{name}' needs {repeats} answers to a question, and one is generated: leave it out")


def _document(requests: list, name: str) -> Document:
    requests.sort(key=lambda request: request.idx)
    if requests[0].request_type == "generate_until":
        return to_opening(requests[0])
    groups = group_choices(requests)
    if len(groups) > 1:
        raise UserError(
            f"the task '{name}' also scores answers without a question (acc_mutual_info), which is not supported:"
            " leave it out"
        )
    return groups[0].document
