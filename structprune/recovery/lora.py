"""Low-rank updates by PEFT: put on the block projections, and merged into plain weights again.

Paper: LoRA arXiv 2106.09685.
"""

from typing import Any

import torch

from structprune.models.adapter import Adapter
from structprune.models.experts_structprune import role_and_part
from structprune.models.modeling_structprune import DiffusionLM
from structprune.models.quiet import quiet_transformers
from structprune.recovery.settings import TrainSettings


def add_adapters(student: DiffusionLM, settings: TrainSettings, seed: int) -> Any:
    """PEFT's wrapper of a student, whose projections get updates in place; only these are trained.

    Args:
        seed: of the first factors; the second ones begin at zero, so that the model is unchanged.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    # whole names: LLaDA calls the head as it calls a projection
    places = [(block, role) for block in Adapter(student).blocks for role in block.names]
    chosen = {id(block[role]) for block, role in places if role_and_part(role)[0] in settings.targets}
    names = [name for name, module in student.named_modules() if id(module) in chosen]
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=names)  # type: ignore[arg-type]
    with quiet_transformers():
        return get_peft_model(student, config)  # type: ignore[arg-type]


def merge(model: Any, student: DiffusionLM) -> None:
    """Merge updates into the student's own weights, in place."""
    with quiet_transformers():
        model.merge_and_unload()
    student.requires_grad_(False)
