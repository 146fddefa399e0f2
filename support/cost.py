"""What a run costs: the arithmetic and the memory of training and of sampling, before either is begun.

    python train.py --data clips/ --dry-run
    python sample.py --task extend --dry-run

Both are counted from the sizes of the models alone, without their weights.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import model as wan
from model import Wan, WanConfig

# The paper's training (arXiv 2507.16116 and its published scripts): about 900 optimizer steps with one clip of 81
# frames of 832x480 on each of 8 GPUs of 80 GB, rank 512, gradient checkpointing, on Wan2.1-T2V-14B.
PAPER_MODEL = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
PAPER_SHAPE, PAPER_RANK, PAPER_WINDOWS, PAPER_GPUS = (16, 21, 60, 104), 512, 900 * 8, 8
PAPER_SPEED = 312e12 * 0.4  # FLOP/s of a GPU: an A100's peak in bf16, of which good trainers keep up two fifths


# Arithmetic


def tokens(shape: Sequence[int]) -> int:
    """Tokens of latents (…, F, H, W)."""
    F, H, W = shape[-3:]
    return F * (H // 2) * (W // 2)


def window_flops(config: WanConfig, shape: Sequence[int], rank: int | None, recomputed: bool = False) -> float:
    """Floating-point operations to train on one window with latents of `shape` (C, F, H, W).

    A product of (n, k) and (k, m) matrices counts 2nkm; only the blocks are counted, which is nearly all. Backward, the
    gradient of a product's input costs as much as the product, that of its weights as much again; a base under a LoRA
    of `rank` is spared the latter (None: all weights are trained). Attention multiplies two inputs. With gradient
    checkpointing (`recomputed`), every product of the blocks is done once more.
    """
    L, T, D, D_ffn = tokens(shape), config.text_len, config.dim, config.ffn_dim
    base, attention = _block_flops(config, shape)
    pairs = 2 * (rank or 0) * (L * (12 * D + 2 * (D + D_ffn)) + T * 4 * D)
    extra = 1 if recomputed else 0
    per_block = base * ((3 if rank is None else 2) + extra) + (attention + pairs) * (3 + extra)
    return float(config.num_layers * per_block)


def _block_flops(config: WanConfig, shape: Sequence[int]) -> tuple[int, int]:
    """Operations of one block's forward pass: of its linear layers, and of attention."""
    L, T, D, D_ffn = tokens(shape), config.text_len, config.dim, config.ffn_dim
    # Six layers see the video's tokens, two the text's: the keys and values of cross-attention.
    return 2 * (L * (6 * D * D + 2 * D * D_ffn) + T * 2 * D * D), 4 * L * (L + T) * D


# Memory of training


class Memory(NamedTuple):
    """Bytes on each GPU while training."""

    weights: float  # that are not trained
    trained: float
    gradients: float
    optimizer: float  # AdamW's two moments of all that is trained, and its step count for each tensor
    gathered: float  # on several GPUs, two blocks put together from their shards: one at work, one on its way
    activations: float  # kept for the backward pass

    @property
    def total(self) -> float:
        return sum(self)


class _Sizes(NamedTuple):
    """Bytes and tensors of a model, all of which grow linearly with its layers."""

    weights: int
    trained: int
    tensors: int
    saved: int
    saved_recomputed: int


def memory(
    config: WanConfig,
    trainable: Callable[[Wan], list[nn.Parameter]],
    recompute: Callable[[Wan], None] | None,
    shape: Sequence[int],
    stored: torch.dtype,
    dtype: torch.dtype,
    gpus: int = 1,
) -> Memory:
    """What training takes on each GPU, found by running the model, one and two layers of it, without real memory.

    trainable(model) makes ready what is trained and returns it; recompute(model) turns gradient checkpointing on, None
    leaves it off. shape (B, C, F, H, W) is what one GPU sees at a time; weights are `stored` in one dtype and compute
    in the other. Weights, gradients and optimizer are shared out over the GPUs (FSDP), activations are each GPU's own.
    Left out: the CUDA context, and the temporaries of one operation, a few percent each; a text encoder in training.
    """
    one, two = (_sizes(config, n, trainable, recompute, shape, stored, dtype) for n in (1, 2))
    block = _Sizes(*(b - a for a, b in zip(one, two, strict=True)))
    whole = _Sizes(*(a + (config.num_layers - 1) * b for a, b in zip(one, block, strict=True)))
    # With checkpointing, a block's own activations exist for one block at a time.
    activations = whole.saved if recompute is None else whole.saved_recomputed + block.saved
    gathered = 2 * (block.weights + block.trained) if gpus > 1 else 0
    shared = (whole.weights, whole.trained, whole.trained, 2 * whole.trained + 4 * whole.tensors)
    return Memory(*(size / gpus for size in shared), gathered, activations)


def _sizes(config: WanConfig, layers: int, trainable, recompute, shape, stored, dtype) -> _Sizes:
    usual = torch.get_default_dtype()
    wan.rope_tables.cache_clear()  # tables without memory and real ones must not meet
    try:
        with FakeTensorMode():
            torch.set_default_dtype(stored)
            transformer = Wan(dataclasses.replace(config, num_layers=layers))
            torch.set_default_dtype(usual)
            trained = trainable(transformer)
            x, tau = torch.zeros(shape), torch.zeros(shape[0], shape[2])
            context = torch.zeros(shape[0], config.text_len, config.text_dim)

            def forward() -> Tensor:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    return transformer(x, tau, context)

            saved = saved_bytes(forward, transformer)
            if recompute is not None:
                recompute(transformer)
            recomputed = saved if recompute is None else saved_bytes(forward, transformer)
    finally:
        torch.set_default_dtype(usual)
        wan.rope_tables.cache_clear()
    ours = sum(p.numel() * p.element_size() for p in trained)
    every = sum(p.numel() * p.element_size() for p in transformer.parameters())
    return _Sizes(every - ours, ours, len(trained), saved, recomputed)


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for its backward pass, the model's own parameters left out."""
    own = [parameter.untyped_storage() for parameter in model.parameters()]
    parameters, kept = {id(storage) for storage in own}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in parameters:
            kept[id(storage)] = storage  # several views of one storage count once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


# Sampling


def sampling(
    parts: tuple[nn.Module, nn.Module, nn.Module],
    shape: Sequence[int],
    passes: int,
    decoding: float,
    dtype: torch.dtype,
    device: str,
    stays: bool = False,
) -> str:
    """Memory and time of a run, in words, from the sizes of the parts and a quarter of a second of matrix products.

    parts: transformer, VAE and text encoder, which need no memory of their own; shape (F, H, W) of the latents in one
    of the `passes` through the transformer; decoding: bytes that the VAE takes beside its weights; stays: whether the
    transformer is still there meanwhile.
    """
    transformer, vae, encoder = map(_count, parts)
    config, blocks, size = parts[0].config, parts[0].blocks, dtype.itemsize
    prompts = 2 * 2 * config.num_layers * config.text_len * config.dim * size  # keys and values, with and without
    around = 4 * vae + prompts + tokens(shape) * (8 * config.dim + config.ffn_dim) * size
    visiting = transformer - _count(blocks) + 2 * _count(blocks[0])

    def stages(encoder: float, weights: float) -> str:
        last = 4 * vae + decoding + weights * stays
        named = {"text encoder": encoder, "transformer": weights + around, "VAE": last}
        return ", ".join(f"{name} {count / 2**30:.2f} GiB" for name, count in named.items())

    flops, speed = passes * config.num_layers * sum(_block_flops(config, shape)), _speed(dtype, device)
    return (
        f"{passes} passes of {transformer / 1e6:.1f} M parameters over {tokens(shape)} tokens\n"
        f"memory, one after another: {stages(size * encoder, size * transformer)}\n"
        f"with --offload, on the device: {stages(0, size * visiting)}\n"
        f"time: about {2 * flops / speed:.0f} s of denoising at half of this machine's {speed / 1e9:.0f} GFLOP/s"
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _speed(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of this machine in matrix products."""
    n = 512 if device == "cpu" else 8192  # a small product would measure how fast a GPU is told what to do
    a = torch.ones(n, n, dtype=dtype, device=device)
    a @ a
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < 0.25:
        (a @ a)[0, 0].item()
        done += 1
    return done * 2 * n**3 / (time.perf_counter() - start)
