"""support/offload.py: what an offloaded transformer computes, and where its weights are meanwhile."""

import copy
import gc
import weakref

import pytest
import torch

from model import Wan, WanConfig
from support.offload import offload


def _small(**changes):
    sizes = {"dim": 24, "ffn_dim": 32, "freq_dim": 16, "num_heads": 2, "num_layers": 4, "text_len": 6, "text_dim": 10}
    return Wan(WanConfig(**{**sizes, **changes})).requires_grad_(False)


def _inputs():
    return torch.randn(1, 16, 2, 4, 4), torch.rand(1, 2), torch.randn(1, 6, 10)


def _places(modules):
    return [[parameter.data_ptr() for parameter in module.parameters()] for module in modules]


def test_offloaded_blocks_compute_the_same_to_the_bit():
    wan, inputs = _small(), _inputs()
    velocity, keys = wan(*inputs), wan.prompt_keys(inputs[2])
    assert offload(wan, "cpu") is wan
    for _ in range(2):
        assert torch.equal(wan(*inputs), velocity)
    for ours, theirs in zip(wan.prompt_keys(inputs[2]), keys, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(wan(*inputs[:2], keys), velocity)


def test_an_offloaded_block_leaves_the_cpu_only_for_its_turn():
    wan = offload(_small(), "cpu")
    before = _places(wan.blocks)
    seen = []

    def look(block, _):
        away = [
            [at != place for at, place in zip(now, places, strict=True)]
            for now, places in zip(_places(wan.blocks), before, strict=True)
        ]
        assert all(len(set(parts)) == 1 for parts in away), "a block goes whole"
        seen.append([parts[0] for parts in away])

    for block in wan.blocks:
        block.register_forward_pre_hook(look)
    wan(*_inputs())
    assert seen == [[i == j for j in range(4)] for i in range(4)]
    assert _places(wan.blocks) == before


def test_layers_that_the_prompt_needs_leave_the_cpu_for_their_turn():
    wan = offload(_small(), "cpu")
    layers = [
        layer for block in wan.blocks for layer in (block.cross_attn.k, block.cross_attn.norm_k, block.cross_attn.v)
    ]
    before = _places(wan.blocks), _places(layers)
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda *_: seen.append([a != b for a, b in zip(_places(layers), before[1], strict=True)])
        )
    wan.prompt_keys(_inputs()[2])
    assert seen == [[i == j for j in range(12)] for i in range(12)]
    assert (_places(wan.blocks), _places(layers)) == before


def test_an_offloaded_transformer_is_gone_with_its_last_use():
    """Two experts take turns, and there is memory for one of them."""
    wan = offload(_small(), "cpu")
    wan(*_inputs())
    gc.disable()
    try:
        there = weakref.ref(wan)
        del wan
        assert there() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_holds_two_blocks_of_an_offloaded_model():
    wan = _small(dim=1024, ffn_dim=4096, num_heads=8, num_layers=6)
    inputs = [x.cuda() for x in _inputs()]
    block = sum(parameter.nbytes for parameter in wan.blocks[0].parameters())
    expected = copy.deepcopy(wan).cuda()(*inputs)
    offload(wan, "cuda")
    wan(*inputs)  # after which cuBLAS has its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    velocity = [wan(*inputs) for _ in range(3)][-1]
    assert torch.cuda.max_memory_allocated() - before < 3 * block
    assert torch.equal(velocity, expected)
