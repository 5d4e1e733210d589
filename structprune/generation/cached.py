"""A block-wise key/value cache for generation (Fast-dLLM, arXiv 2505.22618): approximate, because a bidirectional
model's keys and values change wherever a token does, and those that are kept stay as they were.

At a block's first step the whole sequence runs, and keys and values outside the block are kept; at its other steps the
rest runs alone. `prefix` keeps those of what precedes the block and runs from the block to the end; `dual` keeps those
of what follows as well and runs the block. Where the model is shifted, the block begins one position earlier, at the
one that predicts its first token.

Shapes: R rows, B rows kept, T tokens, K key/value heads, D head dim, M wanted positions, C features.
"""

from contextlib import contextmanager
from typing import Iterator, Sequence

import torch

from structprune.errors import UserError, nearest
from structprune.generation.samplers import Generation
from structprune.models.encode import encode_at
from structprune.models.modeling_structprune import DiffusionLM

CACHES = ("none", "prefix", "dual")


def check_cache(cache: str, settings: Generation) -> None:
    """Whether a generation can have this cache.

    Raises:
        UserError: unknown, or it would be another one under a different name.
    """
    if cache not in CACHES:
        raise UserError(f"unknown cache '{cache}'{nearest(cache, list(CACHES))}: choose one of {', '.join(CACHES)}")
    if cache == "dual" and settings.blocks == 1:
        reason = settings.single_block
        raise UserError(f"cache 'dual' keeps what follows a block, but {reason}: use prefix, which does the same")


class KeyValueCache:
    """Keys and values of one batch on its way through `generate`.

    Args:
        form: `prefix` or `dual`.
        refresh: run the whole sequence again after so many steps in a block; None: at its first step only. With 1 the
            cache is never used, and tokens are those of full recomputation.
    """

    def __init__(self, model: DiffusionLM, form: str, refresh: int | None = None):
        self._model, self._form, self._refresh = model, form, refresh
        self._cores = [block.part("core") for block in model.blocks]
        self._kept: list[tuple[torch.Tensor, ...]] = []  # per layer: keys before, after, values before, after
        self._block, self._rows, self._steps = slice(0, 0), [], 0

    def encode(
        self,
        ids: torch.Tensor,
        wanted: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rows: Sequence[int],
        block: slice,
    ) -> torch.Tensor:
        """As `encode_at`, (R, T) ids and wanted positions -> (M, C).

        Args:
            rows: R names of the rows, by which they are found again at the next step, when some may be gone.
            block: positions in [0, T) of the block; all wanted ones are in it.
        """
        span = slice(max(0, block.start - self._model.shifted), block.stop if self._form == "dual" else ids.shape[1])
        known = self._block == block and set(rows) <= set(self._rows) and self._steps != self._refresh
        self._steps = self._steps + 1 if known else 1
        if known:
            found = [self._rows.index(row) for row in rows]  # R of the B kept
            with self._hooked(lambda layer, args: self._joined(layer, args, found)):
                return encode_at(self._model, ids, wanted, attention_mask, span)
        self._block, self._rows, self._kept = block, list(rows), []
        with self._hooked(lambda layer, args: self._keep(args, span)):
            return encode_at(self._model, ids, wanted, attention_mask)

    def _keep(self, args: tuple, span: slice) -> None:
        """Keep what is outside `span` of a layer's keys and values, (R, K, T, D) each; layers come in order."""
        halves = ((side[:, :, : span.start], side[:, :, span.stop :]) for side in args[1:3])  # (R, K, ., D)
        self._kept.append(tuple(half.clone() for pair in halves for half in pair))

    def _joined(self, layer: int, args: tuple, found: list[int]) -> tuple:
        """A layer's attention inputs with what is kept around the new keys and values, (R, K, T, D) each."""
        query, key, value, *rest = args
        kept = self._kept[layer]
        if found != list(range(len(self._rows))):
            kept = tuple(half[found] for half in kept)  # (R, K, ., D)
        key = torch.cat((kept[0], key, kept[1]), dim=2)  # (R, K, T, D)
        value = torch.cat((kept[2], value, kept[3]), dim=2)  # (R, K, T, D)
        return (query, key, value, *rest)

    @contextmanager
    def _hooked(self, change) -> Iterator[None]:
        """While open, `change(layer, args)` sees what every attention core gets, and may replace it."""
        handles = [
            core.register_forward_pre_hook(lambda _, args, layer=layer: change(layer, args))
            for layer, core in enumerate(self._cores)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
