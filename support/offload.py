"""Offloading: sample with a transformer that is larger than the GPU's memory.

The weights of the blocks stay in the CPU's memory. Hooks copy each block to the device just before it runs. On CUDA a
copy stream prefetches the next block meanwhile, so the device holds the weights of two blocks and rarely waits.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn


def offload(transformer: nn.Module, device: torch.device | str) -> nn.Module:
    """Keep the weights of `transformer.blocks` in the CPU's memory, all others on `device`; for sampling only.

    Returns the transformer, whose results are the same to the bit.
    """
    device, blocks, stream = torch.device(device), transformer.blocks, None
    for child in transformer.children():
        child.to("cpu" if child is blocks else device)
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        for parameter in blocks.parameters():  # only pinned memory is copied while the device computes
            parameter.data = parameter.data.pin_memory()
    _hook(list(blocks), device, stream)
    _hook([getattr(b.cross_attn, n) for b in blocks for n in ("k", "norm_k", "v")], device, stream)  # for prompt_keys
    return transformer


def _hook(modules: list[nn.Module], device: torch.device, stream: torch.cuda.Stream | None) -> None:
    """Have each of the modules, which run in this order, on the device while it runs."""
    on_cpu, prefetched = {}, {}  # weights by module; empty between runs, so no circle of references forms

    def fetch(module: nn.Module) -> list[Tensor]:
        if stream is None:
            return [parameter.data.to(device, copy=True) for parameter in module.parameters()]
        stream.wait_stream(torch.cuda.current_stream(device))  # the module before last may still use this memory
        with torch.cuda.stream(stream):
            return [parameter.data.to(device, non_blocking=True) for parameter in module.parameters()]

    def enter(module: nn.Module, _, following: nn.Module | None) -> None:
        on_cpu.setdefault(module, [parameter.data for parameter in module.parameters()])
        _set(module, prefetched.pop(module, None) or fetch(module))
        if stream:
            torch.cuda.current_stream(device).wait_stream(stream)
        if following:
            prefetched[following] = fetch(following)

    def leave(module: nn.Module, _, __) -> None:
        _set(module, on_cpu.pop(module))

    for module, following in pairwise([*modules, None]):
        module.register_forward_pre_hook(partial(enter, following=following))
        module.register_forward_hook(leave)


def _set(module: nn.Module, weights: list[Tensor]) -> None:
    for parameter, weight in zip(module.parameters(), weights, strict=True):
        parameter.data = weight
