"""Forward passes at some positions only, and with as many rows as memory takes.

Shapes: B rows, T tokens, M target positions, C features, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from structprune.errors import UserError
from structprune.models.layers_structprune import AttentionContext
from structprune.models.modeling_structprune import DiffusionLM

CPU_TOKENS, CUDA_TOKENS = 2**10, 2**16  # on a CPU a forward pass is fastest while activations fit its caches


def predicting(model: DiffusionLM, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and positions, (M,) each, whose states predict the tokens at the targets (B, T), row by row.

    The positions are the targets' own, or one before where the model is shifted (Dream, whose first token is predicted
    from its own position).
    """
    row, position = targets.nonzero(as_tuple=True)  # 2 x (M,)
    return row, (position - 1).clamp(min=0) if model.shifted else position


def next_tokens(model: DiffusionLM, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and positions of a pass over pairs whose states predict the targets causally, from the clean text before
    them, row by row; of a model that is causal too.

    Args:
        targets: (B, T) bool; the first token of a row, which nothing predicts, is none.
    Returns:
        2 x (M,).
    """
    predicts = F.pad(targets[:, 1:], (0, 1))  # (B, T)
    row, place = model.layout.rows(torch.zeros_like(predicts), predicts).nonzero(as_tuple=True)
    return row, place


def causal_weight(model: DiffusionLM) -> float:
    """Weight of the causal loss against that of block diffusion in the training of a model that is both."""
    return model.config.ar_loss_weight / (model.config.dlm_loss_weight or 1.0)


def encode_at(
    model: DiffusionLM,
    input_ids: torch.Tensor,
    targets: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    span: slice | None = None,
    context: AttentionContext | None = None,
) -> torch.Tensor:
    """Hidden states that predict the tokens at the target positions, so that the LM head runs nowhere else.

    The last attention computes only keys and values at the other positions, and what follows it nothing.

    Args:
        input_ids: (B, T) int64.
        targets: (B, T) bool.
        attention_mask: (B, T), true at real tokens; None when every token is real.
        span: positions to run, those of the targets among them; keys and values of the others must come from a cache
            (`cached.KeyValueCache`). Default all.
        context: of all T tokens; default the model's own, of sequences.
    Returns:
        (M, C) after the final norm, row by row from left to right.
    """
    span = span or slice(0, input_ids.shape[1])
    row, position = predicting(model, targets)  # 2 x (M,)
    position = position - span.start  # (M,) within the n positions that run
    x = model.embedding(input_ids[:, span])  # (B, n, C)
    context = context or model.context(input_ids.shape, input_ids.device, attention_mask)
    return _finish(model, x, (row, position), context.of(span))


def encode_rows(model: DiffusionLM, rows: torch.Tensor, keep: list[torch.Tensor] | None = None) -> torch.Tensor:
    """Hidden states after the final norm of rows as the model's layout makes them: (b, S) -> (b, S, C).

    Args:
        keep: collects every block's input, (b, S, C) each.
    """
    return model.encode(rows, keep=keep, context=model.layout.context(model, rows.shape, rows.device))


def encode_noisy(
    model: DiffusionLM, noisy_ids: torch.Tensor, input_ids: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """As `encode_at`, of noisy windows beside their clean text as the model's layout has them: 3 x (B, T) -> (M, C)."""
    layout = model.layout
    rows = layout.rows(noisy_ids, input_ids)  # (B, S)
    context = layout.context(model, rows.shape, rows.device)
    return encode_at(model, rows, targets, context=context)  # predictions are of a row's first T tokens


def encode_from(model: DiffusionLM, states: torch.Tensor, start: int, targets: torch.Tensor) -> torch.Tensor:
    """As `encode_at`, from the residual stream of a layout's rows before block `start` on.

    Args:
        states: (B, S, C). targets: (B, T) bool.
    Returns:
        (M, C) after the final norm, row by row from left to right.
    """
    context = model.layout.context(model, states.shape[:2], states.device)
    return _finish(model, states, predicting(model, targets), context, start)


def _finish(
    model: DiffusionLM, x: torch.Tensor, places: tuple, context: AttentionContext, start: int = 0
) -> torch.Tensor:
    """Run blocks `start` and on over (B, n, C), from the last attention on at some places only: (M, C), normed.

    Args:
        places: rows and positions, (M,) each.
    """
    last = max(index for index, block in enumerate(model.blocks) if block.has_attention)
    for block in model.blocks[start:last]:
        x = block(x, *context)  # (B, n, C)
    if start <= last:
        mixed = model.blocks[last].mix(x, *context)[places]  # (M, H*D)
        x = x[places] + model.blocks[last].part("attention_output")(mixed)  # (M, C)
    else:
        x = x[places]  # (M, C)
    for block in model.blocks[max(start, last) :]:
        x = block.add_mlp(x)  # (M, C)
    return model.final_norm(x)


class Batches:
    """How many tokens (rows x length) go into one forward pass; halved whenever memory runs out.

    Args:
        tokens: the number to begin with; results do not depend on it, up to rounding.
        remedy: what the user can do where not even one row fits.
    Raises:
        UserError: not a positive whole number.
    """

    def __init__(self, tokens: int, remedy: str = "use a device with more memory, or leave long texts out"):
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise UserError(f"{tokens!r} tokens cannot be a batch: give a whole number from 1")
        self.tokens, self._remedy = tokens, remedy

    @classmethod
    def automatic(cls, device: torch.device) -> "Batches":
        """The number to begin with on a device; high on CUDA, where memory is the limit."""
        return cls(CPU_TOKENS if device.type == "cpu" else CUDA_TOKENS)

    def rows(self, length: int) -> int:
        """How many rows of `length` tokens go into a forward pass, at least one."""
        return max(1, self.tokens // length)

    def map(self, function: Callable[[slice], torch.Tensor], count: int, length: int) -> torch.Tensor:
        """Call `function` on consecutive slices of `count` rows of `length` tokens, and join its results: (count, ...).

        Slices that do not fit are tried again with half as many rows, and later calls begin with the lower number.

        Raises:
            UserError: not even one row fits.
        """
        results, start = [], 0
        while start < count:
            rows = min(self.rows(length), count - start)
            try:
                results.append(function(slice(start, start + rows)))
            except torch.OutOfMemoryError as error:
                if rows == 1:
                    message = f"one row of {length} tokens does not fit the device's memory: {self._remedy}"
                    raise UserError(message) from error
            else:
                start += rows
                continue
            self.tokens = rows // 2 * length
            torch.cuda.empty_cache()  # outside `except`, whose traceback would keep the tensors alive
        return torch.cat(results)
