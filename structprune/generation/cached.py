"""A block-wise key/value cache for generation (Fast-dLLM, arXiv 2505.22618).

It is approximate: in a bidirectional model all keys and values change with every token, and cached ones do not.

At a block's first step the whole sequence runs, and keys and values outside the block are cached. At its other steps
only the rest runs: with `prefix`, which caches what precedes the block, from the block to the end; with `dual`, which
also caches what follows, the block. Where the model is shifted, the block begins one position earlier, at the position
that predicts its first token.

Where blocks see none behind them (`sealed`), `prefix` is exact: keys and values of a finished block stay as they are.
The first step of a block then runs the finished one before it too, and nothing else.

Shapes: R rows, B cached rows, T tokens, K key/value heads, D head dim, M target positions, C features.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch

from structprune.errors import UserError
from structprune.generation.checks import check_one_of
from structprune.generation.samplers import Generation
from structprune.models.adapter import Adapter
from structprune.models.encode import encode_at
from structprune.models.modeling_structprune import DiffusionLM

CACHES = ("none", "prefix", "dual")


def caches_of(settings: Generation) -> tuple[str, ...]:
    """The caches that a sampler can use, `none` first: without `dual` where nothing behind a block is seen."""
    return CACHES[:-1] if settings.blocks == 1 or settings.sealed else CACHES


def check_cache(cache: str, settings: Generation) -> None:
    """Raise UserError for a cache that is unknown, or would do the same as another."""
    check_one_of("cache", cache, CACHES)
    if cache not in caches_of(settings):
        reason = settings.single_block
        raise UserError(f"cache 'dual' keeps what follows a block, but {reason}: use prefix, which does the same")


class KeyValueCache:
    """Keys and values of one batch during `generate`.

    Args:
        form: `prefix` or `dual`.
        refresh: run the whole sequence again after so many steps in a block; None: at its first step only. With 1 the
            cache is never used, and tokens are those of full recomputation.
        sealed: blocks see none behind them, so that what is finished stays cached over blocks; unless `refresh`.
    """

    def __init__(self, model: DiffusionLM, form: str, refresh: int | None = None, sealed: bool = False):
        self._model, self._form, self._refresh = model, form, refresh
        self._stays = sealed and refresh is None
        self._cores = Adapter(model).cores
        self._layers: list[tuple[torch.Tensor, ...]] = []  # of each: keys before and after, values before and after
        self._block, self._steps = slice(0, 0), 0
        self._rows: list[int] = []  # B names

    def encode(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rows: Sequence[int],
        block: slice,
    ) -> torch.Tensor:
        """As `encode_at`, (R, T) ids and targets -> (M, C).

        Args:
            rows: R names, which tell rows apart when some no longer run at a later step.
            block: positions in [0, T) of the block, which holds all targets; empty at T where the text before it does.
        """
        context = self._model.open_context(ids.shape, ids.device, attention_mask, block.start)
        span = slice(max(0, block.start - self._model.shifted), block.stop if self._form == "dual" else ids.shape[1])
        cached = self._block == block and set(rows) <= set(self._rows) and self._steps != self._refresh
        self._steps = self._steps + 1 if cached else 1
        known = bool(self._layers) and set(rows) <= set(self._rows)
        if cached or (known and self._stays and self._block.stop <= block.start):
            places = [self._rows.index(row) for row in rows]  # R of the B cached rows
            grown = None if cached else block.start  # a finished block joins what is cached
            start, stop = (span.start, span.stop) if cached else (self._block.start, span.stop)
            with self._hooked(lambda layer, args: self._joined(layer, args, places, grown)):
                states = encode_at(self._model, ids, targets, span=slice(start, stop), context=context)  # (M, C)
            if grown is not None:
                self._block, self._rows = block, list(rows)
            return states
        self._block, self._rows, self._layers = block, list(rows), []
        with self._hooked(lambda layer, args: self._store(args, span)):
            return encode_at(self._model, ids, targets, context=context)

    def _store(self, args: tuple, span: slice) -> None:
        """Cache a layer's keys and values outside `span`, (R, K, T, D) each; layers come in order."""
        halves = ((side[:, :, : span.start], side[:, :, span.stop :]) for side in args[1:3])  # (R, K, ., D)
        self._layers.append(tuple(half.clone() for pair in halves for half in pair))

    def _joined(self, layer: int, args: tuple, places: list[int], grown: int | None = None) -> tuple:
        """A layer's attention inputs with cached keys and values around the new ones, (R, K, T, D) each.

        Args:
            grown: cache all before this position from now on.
        """
        query, key, value, *rest = args
        halves = self._layers[layer]  # 4 x (B, K, ., D)
        if places != list(range(len(self._rows))):
            halves = tuple(half[places] for half in halves)  # 4 x (R, K, ., D)
        key = torch.cat((halves[0], key, halves[1]), dim=2)  # (R, K, T, D)
        value = torch.cat((halves[2], value, halves[3]), dim=2)  # (R, K, T, D)
        if grown is not None:
            self._layers[layer] = tuple(side[:, :, part] for side in (key, value) for part in (slice(grown), slice(0)))
        return (query, key, value, *rest)

    def _hooked(self, change: Callable[[int, tuple], tuple | None]) -> ExitStack:
        """While open, `change(layer, args)` gets the arguments of every attention core, and may replace them."""
        hooks = ExitStack()
        for layer, core in enumerate(self._cores):
            hooks.enter_context(core.register_forward_pre_hook(lambda _, args, layer=layer: change(layer, args)))
        return hooks
