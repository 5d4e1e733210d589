"""The first stage of a recovery: block by block, the student learns the dense model's residual stream (docs/methods.md
section 7).

The stream keeps its width in pruning, so that a block's error costs no projection. One block of each model is on the
device at a time; both streams are on the host. Shapes: R noisy windows, b of a pass, T tokens, C features.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from structprune.errors import UserError
from structprune.masking.finetune import keep_zeros
from structprune.masking.masks import Masks
from structprune.models.adapter import Adapter, BlockView
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.placement import streamed
from structprune.models.tensor_files import write_tensors
from structprune.progress import Track
from structprune.recovery.folder import block_path
from structprune.recovery.objectives import stream_error, stream_weights
from structprune.recovery.settings import RecoverConfig
from structprune.recovery.student import learn_all
from structprune.recovery.text import RecoveryText
from structprune.recovery.trainer import in_bfloat16, steps_of
from structprune.recovery.windows import NoisyWindows
from structprune.statistics.hidden import HiddenStates
from structprune.structured.plan import Plan

Streams = tuple[HiddenStates, HiddenStates]  # of the student before a block, of the dense model behind it
HELD_OUT_SEED = 5000  # plus the run's: noise that neither training nor the held-out study draws
REMEDY = "raise blocks.budget_gb, or lower blocks.tokens or data.noise"


def block_steps(config: RecoverConfig) -> int:
    """Optimiser steps of every block."""
    return steps_of(config.blocks.tokens, config)


def block_tokens(config: RecoverConfig) -> int:
    """Tokens that every block learns; 0 without a first stage."""
    return row_counts(config)[0] * config.data.length


def row_counts(config: RecoverConfig) -> tuple[int, int]:
    """Noisy windows that every block learns, and those that it is judged on."""
    return block_steps(config) * config.train.batch, config.data.held_out * config.data.noise


@dataclass(frozen=True, eq=False)
class BlockRows:
    """Noisy windows of the stage, those that are learnt first.

    Attributes:
        ids: (R, S) int64, as the layout has them. weight: (R, S) fp32, of every token's error.
        learnt: how many windows are learnt.
    """

    ids: torch.Tensor
    weight: torch.Tensor
    learnt: int


def block_rows(text: RecoveryText, model: DiffusionLM, config: RecoverConfig) -> BlockRows:
    """The first windows of the training's row, and noisy copies of the held-out ones."""
    mask_id, edges, seed = model.config.mask_token_id, model.edges_visible, config.data.seed
    learnt, judged = map(range, row_counts(config))
    parts = [
        NoisyWindows(text.windows, text.learnt, learnt, mask_id, seed=seed, edges_visible=edges),
        NoisyWindows(
            text.held_out, text.held_out_learnt, judged, mask_id, seed=HELD_OUT_SEED + seed, edges_visible=edges
        ),
    ]
    items = [part[index] for part in parts for index in range(len(part))]
    clean, noisy = (torch.stack([item[key] for item in items]) for key in ("input_ids", "noisy_ids"))  # (R, T) each
    changed = model.layout.spread(noisy != clean, False)  # (R, S)
    return BlockRows(model.layout.rows(noisy, clean), stream_weights(changed, config.blocks.visible), len(learnt))


def remaining_blocks(directory: Path, student: Adapter, dense: Adapter) -> tuple[int, ...]:
    """The dense model's index of every block of a student, by the plan.json beside it where blocks were dropped.

    Args:
        directory: of the student.
    Raises:
        UserError: its blocks cannot be told, or its stream has another width.
    """
    without = "give the dense model that it was pruned from, or leave blocks.tokens and loss.streams out"
    if student.hidden_size != dense.hidden_size:
        sizes = f"{student.hidden_size} features and the teacher's {dense.hidden_size}"
        raise UserError(f"the student's residual stream has {sizes}: {without}")
    depths = len(student.blocks), len(dense.blocks)
    if depths[0] == depths[1]:
        return tuple(range(depths[0]))
    path = directory / "plan.json"
    plan = Plan.load(path) if path.is_file() else Plan(student.family.name, ())
    if (len(plan.remaining), len(plan.blocks)) != depths:
        raise UserError(
            f"the student has {depths[0]} blocks and the teacher {depths[1]}, and no plan.json of such a pruning tells"
            f" which remain: {without}"
        )
    return plan.remaining


def dense_spans(remaining: Sequence[int], depth: int) -> list[range]:
    """The dense blocks whose work each block of the student does: its own, and the dropped ones behind it.

    The first one also stands for what was dropped before it.

    Args:
        remaining: the dense model's index of every block of the student.
        depth: of the dense model.
    """
    starts = [0, *remaining[1:]]
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], depth])]


def stream_ends(remaining: Sequence[int], depth: int) -> list[int]:
    """The dense blocks behind which the stream is that of the student behind each of its blocks but the last.

    Args:
        remaining, depth: as of `dense_spans`.
    """
    return [span.stop - 1 for span in dense_spans(remaining, depth)[:-1]]


class BlockStage:
    """Both models, block by block.

    Args:
        models: student and dense model, each on the device or on the host.
        remaining: the dense model's index of every block of the student.
        device: that computes.
    """

    def __init__(
        self, models: tuple[DiffusionLM, DiffusionLM], remaining: Sequence[int], rows: BlockRows,
        config: RecoverConfig, device: torch.device,
    ):  # fmt: skip
        self._student, self._dense = map(Adapter, models)
        self._spans = dense_spans(remaining, len(self._dense.blocks))
        self._indices, self._rows, self._config, self._device = remaining, rows, config, device
        self._half = in_bfloat16(config.train, device)

    def complete(self, folder: Path, masks: Masks | None, track: Track) -> None:
        """Train the blocks that the folder of a training lacks, and keep each there once it is done.

        Args:
            masks: of a student whose zeros stay.
        """
        finished = load_blocks(folder, self._student)
        if len(finished) == len(self._student.blocks):
            return
        config = self._config
        block_path(folder, 0).parent.mkdir(parents=True, exist_ok=True)
        limits = (config.train.pass_windows, int(config.blocks.budget_gb * 1e9) // 2, False, REMEDY)
        streams = []
        for adapter in (self._student, self._dense):
            here = adapter.device.type == self._device.type
            with torch.no_grad(), streamed(adapter.model, None if here else self._device):
                streams.append(HiddenStates(adapter, self._rows.ids, *limits))
        own, dense = streams
        errors = [each["after"] for each in finished]

        def title() -> str:
            return f"block by block, error {errors[-1]:.4f}" if errors else "block by block"

        for block, span in track(list(zip(self._student.blocks, self._spans)), title):
            for index in span:
                self._advance(dense, self._dense.blocks[index].module, None)
            if block.index >= len(finished):
                figures = {"block": self._indices[block.index]} | self._learn(block, (own, dense), masks)
                state = block.module.state_dict()
                write_tensors(block_path(folder, block.index), state, {"figures": json.dumps(figures)})
                errors.append(figures["after"])
            if span.stop < len(self._dense.blocks):  # else no block reads it
                self._advance(own, block.module, torch.float32)

    def _visiting(self, block: nn.Module, dtype: torch.dtype | None) -> nn.Module:
        """A copy of a block on the device."""
        return copy.deepcopy(block).to(self._device, dtype)

    @torch.no_grad()
    def _advance(self, states: HiddenStates, block: nn.Module, dtype: torch.dtype | None) -> None:
        """Move all rows of a stream past a block.

        Args:
            dtype: that the block's weights are computed with; None: their own.
        """
        visitor = self._visiting(block, dtype)
        for rows in states.slices():
            states.write(rows, self._output(visitor, states, rows, dtype))

    def _output(self, block: nn.Module, states: HiddenStates, rows: slice, dtype: torch.dtype | None) -> torch.Tensor:
        """The stream behind a block that is on the device, (b, T, C)."""
        x = states.read(rows).to(self._device, dtype)  # (b, T, C)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half and dtype is not None):
            return block(x, *states.context)

    def _learn(self, block: BlockView, streams: Streams, masks: Masks | None) -> dict:
        """Train a block in place; returns its held-out error before and after, and which weights it has now."""
        visitor = self._visiting(block.module, torch.float32)
        before = self._held_out(visitor, streams)
        learn_all(visitor)
        zeros = None if masks is None else inside(masks, f"{block.name}.")
        with keep_zeros(visitor, zeros) if zeros is not None and zeros.packed else nullcontext():
            self._steps(visitor, streams)
        state = {name: value.to(block.module.state_dict()[name].dtype) for name, value in visitor.state_dict().items()}
        visitor.load_state_dict(state)  # rounded, so that what is measured is what the student gets
        after = self._held_out(visitor, streams)
        if not after < before:  # also where it is not a number
            return {"before": before, "after": before, "kept": "input"}
        block.module.load_state_dict(state)
        return {"before": before, "after": after, "kept": "trained"}

    @torch.enable_grad()
    def _steps(self, block: nn.Module, streams: Streams) -> None:
        """All optimiser steps of a block.

        A plain loop: what a killed run goes on from is a whole block, so that a Trainer's checkpoints, states and
        evaluations would have to be turned off, once for every block.
        """
        from transformers import get_scheduler

        train, steps = self._config.train, block_steps(self._config)
        matrices, vectors = ([p for p in block.parameters() if (p.dim() > 1) == plural] for plural in (True, False))
        groups = [{"params": matrices, "weight_decay": train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=self._config.blocks.learning_rate)
        schedule = get_scheduler(train.schedule, optimiser, round(train.warmup * steps), steps)
        for start in range(0, steps * train.batch, train.batch):
            for rows in passes(start, start + train.batch, train.pass_windows):
                error = self._error(block, streams, rows).mean()
                (error * train.pass_windows / train.batch).backward()
            nn.utils.clip_grad_norm_(block.parameters(), train.clip)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()

    def _error(self, block: nn.Module, streams: Streams, rows: slice) -> torch.Tensor:
        """The weighted error of every token, (b, T) fp32."""
        own, dense = streams
        output = self._output(block, own, rows, torch.float32)  # (b, T, C)
        target = dense.read(rows).to(self._device)  # (b, T, C)
        return stream_error(output, target) * self._rows.weight[rows].to(self._device)

    @torch.no_grad()
    def _held_out(self, block: nn.Module, streams: Streams) -> float:
        """The weighted mean error over the rows that are not learnt."""
        learnt, count = self._rows.learnt, len(self._rows.ids)
        parts = passes(learnt, count, self._config.train.pass_windows)
        total = sum(float(self._error(block, streams, rows).double().sum()) for rows in parts)
        return total / float(self._rows.weight[learnt:].double().sum())


def passes(start: int, stop: int, windows: int) -> Iterator[slice]:
    """Consecutive slices of at most so many windows."""
    for first in range(start, stop, windows):
        yield slice(first, min(first + windows, stop))


def inside(masks: Masks, prefix: str) -> Masks:
    """The masks of a block's weights, by their names within the block."""
    names = {name: name.removeprefix(prefix) for name in masks.packed if name.startswith(prefix)}
    packed = {short: masks.packed[name] for name, short in names.items()}
    return Masks(packed, {short: masks.shapes[name] for name, short in names.items()})


def finished_blocks(folder: Path) -> int:
    """How many blocks an earlier run has finished."""
    return len(list(block_path(folder, 0).parent.glob("block-*.safetensors")))


def load_blocks(folder: Path, student: Adapter) -> list[dict]:
    """Give the student the blocks that an earlier run finished, the first ones; returns their figures."""
    finished = []
    for block in student.blocks:
        try:
            with safe_open(block_path(folder, block.index), framework="pt") as file:
                figures = json.loads(file.metadata()["figures"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError):  # not there, or damaged
            break
        block.module.load_state_dict(state)
        finished.append(figures)
    return finished
