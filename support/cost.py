"""What a run costs: the arithmetic and the memory of training and of sampling, before either is begun.

    python train.py --data clips/ --dry-run
    python sample.py --task extend --dry-run

Both are found by running the transformer without memory for its weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from support import cli


def tokens(shape: Sequence[int]) -> int:
    """Tokens of latents (…, F, H, W)."""
    F, H, W = shape[-3:]
    return F * (H // 2) * (W // 2)


def window_flops(transformer: nn.Module, shape: Sequence[int]) -> int:
    """Floating-point operations to train on one window with latents of `shape` (C, F, H, W).

    transformer: on "meta", made ready for training. PyTorch counts one forward and backward pass of it, where a product
    of (n, k) and (k, m) matrices is 2nkm. This may take seconds if there are many layers, so count each shape once.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # there attention is plain products too
        _forward(transformer, (1, *shape)).sum().backward()
    return counter.get_total_flops()


def _forward(transformer: nn.Module, shape: Sequence[int]) -> Tensor:
    """The velocity of latents of zeros, (B, C, F, H, W)."""
    B, config = shape[0], transformer.config
    return transformer(torch.zeros(shape), torch.zeros(B), torch.zeros(B, config.text_len, config.text_dim))


class Memory(NamedTuple):
    """Bytes on each GPU while training."""

    weights: float  # frozen
    trained: float  # weights
    gradients: float
    optimizer: float  # AdamW's two moments of all that is trained, and its step count for each tensor
    gathered: float  # on several GPUs, two blocks put together from their shards: one at work, one on its way
    activations: float  # saved for the backward pass

    @property
    def total(self) -> float:
        return sum(self)


def memory(
    network: type[nn.Module], config: Any, trainable: Callable[[nn.Module], list[nn.Parameter]],
    recompute: Callable[[nn.Module], None], shape: Sequence[int], stored: torch.dtype, dtype: torch.dtype, gpus: int,
) -> tuple[Memory, Memory]:  # fmt: skip
    """What training takes on each GPU, which sees latents of `shape` (B, C, F, H, W) at a time: plain, and recomputed.

    Runs one and two layers of `network`, as all that is measured is linear in the layers. trainable(transformer) makes
    it ready and returns what is trained; recompute(transformer) turns on gradient checkpointing. Weights are held in
    `stored` and compute in `dtype`; with gradients and optimizer they are sharded over the GPUs (FSDP). Left out:
    the CUDA context, temporaries of one operation (a few percent each), and a text encoder in training.
    """

    def measure(layers: int) -> Tensor:
        with FakeTensorMode():  # tensors as of a CPU, because "meta" has no autocast
            transformer = network(replace(config, num_layers=layers))
            for parameter in transformer.parameters():
                parameter.data = parameter.to(stored)
            trained = trainable(transformer)
            autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
            forward = autocast(partial(_forward, transformer, shape))
            plain = saved_bytes(forward, transformer)
            recompute(transformer)
            recomputed = saved_bytes(forward, transformer)
        frozen = sum(p.nbytes for p in transformer.parameters() if not p.requires_grad)
        sizes = [frozen, sum(p.nbytes for p in trained), len(trained), plain, recomputed]
        return torch.tensor(sizes, dtype=torch.float64)

    one, two = measure(1), measure(2)
    frozen, trained, tensors, plain, recomputed = (one + (config.num_layers - 1) * (two - one)).tolist()
    block_frozen, block_trained, _, block_saved, _ = (two - one).tolist()
    sharded = [size / gpus for size in (frozen, trained, trained, 2 * trained + 4 * tensors)]
    gathered = 2 * (block_frozen + block_trained) * (gpus > 1)
    # Recomputed, what is inside a block is there for one block at a time.
    return Memory(*sharded, gathered, plain), Memory(*sharded, gathered, recomputed + block_saved)


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass saves for its backward pass, without the model's own parameters."""
    weights, saved = {parameter.untyped_storage() for parameter in model.parameters()}, set()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.untyped_storage()) or t, lambda t: t):
        forward()
    return sum(storage.nbytes() for storage in saved - weights)  # several views of one storage count once


def training(
    outline: nn.Module, trainable: Callable[[nn.Module], list[nn.Parameter]], recompute: Callable[[nn.Module], None],
    shape: Sequence[int], stored: torch.dtype, dtype: torch.dtype, gpus: int, steps: int, batch: int,
) -> str:  # fmt: skip
    """Parameters, operations and memory of a training, in words.

    outline: the transformer on "meta", made ready for training; batch: windows in each of the `steps`; the others are
    those of `memory`.
    """
    trained = sum(p.numel() for p in outline.parameters() if p.requires_grad)
    plain, thrifty = memory(type(outline), outline.config, trainable, recompute, shape, stored, dtype, gpus)
    rows = zip((*Memory._fields, "together"), (*plain, plain.total), (*thrifty, thrifty.total), strict=True)
    return "\n".join([
        f"{trained / 1e6:.2f} M trainable parameters, {(_count(outline) - trained) / 1e6:.2f} M frozen",
        f"{steps} steps of {batch} windows of up to {tokens(shape)} tokens: "
        f"{steps * batch * window_flops(outline, shape[1:]):.3g} FLOP",
        f"memory of {f'each of {gpus} GPUs' if gpus > 1 else 'the device'}, windows at a time: {shape[0]}",
        "                    plain      with --gradient-checkpointing",
        *(f"  {name:<12}{cli.size(a):>13}{cli.size(b):>13}" for name, a, b in rows),
    ])  # fmt: skip


def sampling(
    parts: tuple[nn.Module, nn.Module, nn.Module], size: tuple[int, int], window: int, F: int, passes: int,
    dtype: torch.dtype, device: str, stays: bool = False,
) -> str:  # fmt: skip
    """Memory and time of a run, in words, from the sizes of the parts and a quarter of a second of matrix products.

    parts: transformer, VAE and text encoder on "meta"; size: width and height in pixels; window: latent frames in each
    of the `passes`, F: in the finished video; stays: whether the transformer stays in memory while the VAE decodes.
    """
    width, height = size
    shape = (window, height // 8, width // 8)
    decoding = parts[1].decoding_bytes(F, height, width) + 3 * 4 * (4 * F - 3) * width * height  # and the video in fp32
    transformer, vae, encoder = map(_count, parts)
    config, blocks, itemsize = parts[0].config, parts[0].blocks, dtype.itemsize
    prompts = 2 * 2 * config.num_layers * config.text_len * config.dim * itemsize  # keys and values, with and without
    around = 4 * vae + prompts + tokens(shape) * (8 * config.dim + config.ffn_dim) * itemsize
    offloaded = transformer - _count(blocks) + 2 * _count(blocks[0])
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        _forward(parts[0], (1, config.in_dim, *shape))
    speed = _speed(dtype, device)
    seconds = 2 * passes * counter.get_total_flops() / speed

    def stages(encoder: float, weights: float) -> str:
        counts = {"text encoder": encoder, "transformer": weights + around, "VAE": 4 * vae + decoding + weights * stays}
        return ", ".join(f"{name} {cli.size(count)}" for name, count in counts.items())

    return (
        f"{passes} passes of {transformer / 1e6:.1f} M parameters over {tokens(shape)} tokens\n"
        f"memory, one after another: {stages(itemsize * encoder, itemsize * transformer)}\n"
        f"with --offload, on the device: {stages(0, itemsize * offloaded)}\n"
        f"time: about {cli.duration(seconds)} of denoising at half of this machine's {speed / 1e9:.0f} GFLOP/s"
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _speed(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of this machine in matrix products."""
    from torch.utils.benchmark import Timer  # here, as only an estimate needs it, and it takes a tenth of a second

    n = 512 if device == "cpu" else 8192  # a small product would measure how fast a GPU is told what to do
    inputs = {"a": torch.ones(n, n, dtype=dtype, device=device)}
    timer = Timer("(a @ a)[0, 0].item()", globals=inputs, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=0.25).mean
