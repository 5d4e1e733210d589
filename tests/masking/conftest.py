"""A tiny model with half of some weights removed, and how the fine-tuning tests train and check it."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from structprune.masking import Masks
from structprune.masking.masks import pack_bits

ROLES = ("q_proj", "v_proj", "attn_out", "up_proj", "ff_out")


def packed_masks(keep: dict[str, torch.Tensor]) -> Masks:
    """Masks from a bool tensor (O, C) per weight, true where it stays."""
    shapes = {name: (value.shape[0], value.shape[1]) for name, value in keep.items()}
    return Masks({name: pack_bits(value) for name, value in keep.items()}, shapes)


@pytest.fixture(scope="session")
def pack_masks():
    """`pack_masks({name: keep})` -> `Masks`."""
    return packed_masks


@pytest.fixture(scope="session")
def valid_groups():
    """`valid_groups(keep, removed, group)`: whether every group of a mask (O, C) keeps `group - removed` or less."""

    def valid(keep: torch.Tensor, removed: int, group: int) -> bool:
        return bool((keep.unflatten(1, (-1, group)).sum(-1) <= group - removed).all())

    return valid


@dataclass
class Masked:
    """A model of three LLaDA blocks, five masked weights in each."""

    model: nn.Module
    masks: Masks

    @staticmethod
    def batch(seed: int) -> dict:
        ids = torch.randint(0, 2047, (2, 12), generator=torch.Generator().manual_seed(seed))  # (B, T)
        return {"input_ids": ids, "labels": ids}

    @classmethod
    def train(cls, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
        torch.manual_seed(0)
        for seed in range(steps):
            optimizer.zero_grad()
            model(**cls.batch(seed)).loss.backward()
            optimizer.step()

    @classmethod
    @torch.no_grad()
    def logits(cls, model: nn.Module) -> torch.Tensor:
        return model(cls.batch(9)["input_ids"]).logits  # (B, T, V)

    def moved(self, model: nn.Module) -> bool:
        """Whether a removed weight is anything but 0, in any copy that the model has of it."""
        return any(
            bool((weight.detach()[~self.masks.kept(name)] != 0).any())
            for name, weights in self.masks.find(model).items()
            for _, weight in weights
        )

    def changed(self, model: nn.Module, before: dict) -> float:
        """The smallest share, over the masked tensors, of kept weights that differ from `before`."""
        return min(
            (model.get_parameter(name) != before[name])[self.masks.kept(name)].float().mean().item()
            for name in self.masks.packed
        )


@pytest.fixture
def masked(tiny_model) -> Masked:
    model = tiny_model()
    generator = torch.Generator().manual_seed(0)
    keep = {
        name: torch.rand(value.shape, generator=generator) > 0.5
        for name, value in model.state_dict().items()
        if ".blocks." in name and name.split(".")[-2] in ROLES
    }
    masks = packed_masks(keep)
    masks.apply(model)
    return Masked(model, masks)
