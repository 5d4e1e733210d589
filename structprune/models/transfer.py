"""Copies between host and accelerator for which neither waits."""

import torch


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small host tensor on a device. An accelerator that is busy is not waited for: from pageable memory CUDA would
    first finish all that it has been given."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    try:
        tensor = tensor.pin_memory()  # torch keeps the pinned copy until the transfer is done
    except RuntimeError:  # no more memory can be pinned
        return tensor.to(device)
    return tensor.to(device, non_blocking=True)
