"""Blocks that do not fit on the device together visit it one after another."""

import torch
from torch import nn


def offload(model: nn.Module, device: torch.device | str) -> None:
    """Keep the blocks of a model in the CPU's memory and all else on `device`; for sampling only."""
    model.offload(device)
