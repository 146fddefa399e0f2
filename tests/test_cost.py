"""What a run costs: bytes that are really there, and operations that add up."""

import dataclasses
from functools import partial

import pytest
import torch
from small import amounts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lora
import train
from model import Wan, WanConfig
from support import cli, cost, report
from wan.text import T5Config, UMT5Encoder
from wan.vae import VAEConfig, WanVAE

CONFIG = WanConfig(48, 96, 32, num_heads=2, num_layers=3, text_len=32, text_dim=16)
SHAPE = (2, 16, 7, 8, 8)
# The paper's: Wan2.1-T2V-14B, latents of 81 frames at 832x480, rank 512.
PAPER_MODEL = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
PAPER_SHAPE, PAPER_RANK = (16, 21, 60, 104), 512


def _outline(config, rank, recomputed=False):
    """A transformer without memory, made ready for training: a LoRA of a rank, or (None) all weights."""
    with torch.device("meta"):
        transformer = Wan(config)
    if rank:
        lora.inject(transformer, rank)
    if recomputed:
        transformer.recompute_blocks()
    return transformer


def _measured(full, dtype, again):
    """The bytes of a real step: frozen weights, trained ones, gradients, optimizer, saved activations."""
    stored = None if full else dtype
    transformer = Wan(CONFIG).to(stored)
    trained = train.trainable(transformer, train.TrainConfig(full=full, rank=4))
    if again:
        transformer.recompute_blocks()
    x, tau, context = torch.randn(SHAPE), torch.rand(2, 7), torch.randn(2, 32, 16)

    def forward():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return transformer(x, tau, context)

    saved = cost.saved_bytes(forward, transformer)
    optimizer = torch.optim.AdamW(trained)
    forward().sum().backward()
    optimizer.step()
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    state = [t for entry in optimizer.state.values() for t in entry.values()]
    frozen = [p for p in transformer.parameters() if not p.requires_grad]
    return size(frozen), size(trained), size(p.grad for p in trained), size(state), saved


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_model_is_what_a_real_step_takes(full, dtype):
    """Counted tensors exactly; activations exactly too, and with checkpointing those of one block come on top."""
    trainable = partial(train.trainable, config=train.TrainConfig(full=full, rank=4))
    stored = torch.float32 if full else dtype
    model, thrifty = cost.memory(Wan, CONFIG, trainable, Wan.recompute_blocks, SHAPE, stored, dtype, 1)
    *exact, saved = _measured(full, dtype, again=False)
    assert [model.weights, model.trained, model.gradients, model.optimizer] == exact
    assert model.activations == saved and model.gathered == 0

    *exact, outside = _measured(full, dtype, again=True)
    assert [thrifty.weights, thrifty.trained, thrifty.gradients, thrifty.optimizer] == exact
    assert outside < thrifty.activations < outside + saved / CONFIG.num_layers
    assert torch.get_default_dtype() == torch.float32


def test_the_papers_run_fits_its_gpus_and_its_price():
    """Rank 512 on 14B with one clip of 81 frames at 832x480 on each of 8 GPUs of 80 GB, which cost $500."""
    trainable = partial(lora.inject, rank=PAPER_RANK)
    run = ((1, *PAPER_SHAPE), torch.bfloat16, torch.bfloat16, report.PAPER_GPUS)
    plain, needed = cost.memory(Wan, PAPER_MODEL, trainable, Wan.recompute_blocks, *run)
    assert 14.2e9 * 2 < needed.weights * 8 < 14.4e9 * 2 and 2.4e9 * 4 < needed.trained * 8 < 2.5e9 * 4
    assert needed.gradients == needed.trained and needed.total < 60 * 2**30
    assert plain.activations > 300 * 2**30, "without gradient checkpointing it could not"

    window = cost.window_flops(_outline(PAPER_MODEL, PAPER_RANK, recomputed=True), PAPER_SHAPE)
    assert report.PAPER_FLOPS == pytest.approx(900 * 8 * window, rel=0.01)
    hours = report.PAPER_FLOPS / report.PAPER_SPEED / 3600
    assert 50 < hours < 250, "GPU hours, at some $2 to $5 each"


@pytest.mark.parametrize("rank", [None, 4])
def test_operations_are_those_that_pytorch_counts(rank):
    shape = (16, 7, 16, 16)
    transformer = Wan(CONFIG)
    if rank:
        lora.inject(transformer, rank)
    # The counter does not know the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        transformer(torch.randn(1, *shape), torch.rand(1, 7), torch.randn(1, 32, 16)).sum().backward()
    assert cost.window_flops(_outline(CONFIG, rank), shape) == pytest.approx(counter.get_total_flops(), rel=0.15)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("rank", [None, 32])
def test_operations_are_those_of_the_formula(rank, recomputed):
    """Of the blocks: backward, a product's input costs as much as the product, its weights as much if they are trained.

    With checkpointing, all products of the blocks are computed once more.
    """
    config, shape = WanConfig(num_layers=4), (16, 21, 60, 104)
    L, T, D, D_ffn = cost.tokens(shape), config.text_len, config.dim, config.ffn_dim
    base, attention = 2 * (L * (6 * D * D + 2 * D * D_ffn) + T * 2 * D * D), 4 * L * (L + T) * D
    pairs = 2 * (rank or 0) * (L * (12 * D + 2 * (D + D_ffn)) + T * 4 * D)
    by_hand = base * ((2 if rank else 3) + recomputed) + (attention + pairs) * (3 + recomputed)
    counted = cost.window_flops(_outline(config, rank, recomputed), shape)
    assert counted == pytest.approx(config.num_layers * by_hand, rel=0.01)


def test_counting_draws_nothing_at_random():
    """Training counts at its first step, and must go on as if it had not."""
    before = torch.random.get_rng_state()
    cost.window_flops(_outline(CONFIG, 4, recomputed=True), SHAPE[1:])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_sampling_takes(monkeypatch):
    monkeypatch.setattr(cost, "_speed", lambda dtype, device: 1e9)
    video = 3 * 4 * 17 * 64 * 64  # of 5 latent frames, in fp32
    monkeypatch.setattr(WanVAE, "decoding_bytes", lambda self, F, height, width: 2**30 - video if F == 5 else 0)
    config = dataclasses.replace(CONFIG, dim=768, ffn_dim=3072, num_layers=8)
    with torch.device("meta"):
        parts = Wan(config), WanVAE(VAEConfig(dim=8)), UMT5Encoder(T5Config(50, 512, 512, 1024, 4, 2))
    weights, vae, encoder = (sum(p.numel() for p in part.parameters()) for part in parts)

    def said(stays):
        passes, *stages, time = cost.sampling(
            parts, (64, 64), 3, 5, 10, torch.bfloat16, "cpu", stays
        ).splitlines()
        return passes, [[amount / 2**30 for amount in amounts(line)] for line in stages], time

    passes, (whole, offloaded), time = said(False)
    assert passes == f"10 passes of {weights / 1e6:.1f} M parameters over 48 tokens"
    assert whole[0] == pytest.approx(2 * encoder / 2**30, abs=0.005) and offloaded[0] == 0
    assert whole[1] - offloaded[1] == pytest.approx(2 * weights / 2**30 * 6 / 8, rel=0.1), "two of eight blocks"
    assert whole[2] == offloaded[2] == pytest.approx(1 + 4 * vae / 2**30, abs=0.005)
    forward = cost.window_flops(_outline(config, None), (16, 3, 8, 8)) / 3  # a third of a training step
    assert time.startswith(f"time: about {cli.duration(2 * 10 * forward / 1e9)} of denoising")
    _, (whole, _), _ = said(True)
    assert whole[2] == pytest.approx(1 + (4 * vae + 2 * weights) / 2**30, abs=0.005)
