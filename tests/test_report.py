"""The account of a training: bytes that are really there, operations that add up, and a page that stands alone."""

import json
import re
from functools import partial

import pytest
import torch
from small import call, clips_fixture, mistake, model_fixture  # noqa: F401 (fixtures)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lora
import report
import train
from model import Wan, WanConfig

CONFIG = WanConfig(48, 96, 32, num_heads=2, num_layers=3, text_len=32, text_dim=16)
SHAPE = (2, 16, 7, 8, 8)


def _measured(full, dtype, again):
    """The bytes of a real step: frozen weights, trained ones, gradients, optimizer, saved activations."""
    stored = None if full else dtype
    transformer = Wan(CONFIG).to(stored)
    trained = train.trainable(transformer, train.TrainConfig(full=full, rank=4))
    if again:
        train.recompute_blocks(transformer)
    x, tau, context = torch.randn(SHAPE), torch.rand(2, 7), torch.randn(2, 32, 16)

    def forward():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return transformer(x, tau, context)

    saved = report.saved_bytes(forward, transformer)
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
    model = report.memory(CONFIG, trainable, None, SHAPE, stored, dtype)
    *exact, saved = _measured(full, dtype, again=False)
    assert [model.weights, model.trained, model.gradients, model.optimizer] == exact
    assert model.activations == saved and model.gathered == 0

    thrifty = report.memory(CONFIG, trainable, train.recompute_blocks, SHAPE, stored, dtype)
    *exact, outside = _measured(full, dtype, again=True)
    assert [thrifty.weights, thrifty.trained, thrifty.gradients, thrifty.optimizer] == exact
    assert outside < thrifty.activations < outside + saved / CONFIG.num_layers
    assert torch.get_default_dtype() == torch.float32


def test_the_papers_run_fits_its_gpus_and_its_price():
    """Rank 512 on 14B with one clip of 81 frames at 832x480 on each of 8 GPUs of 80 GB, which cost $500."""
    trainable = partial(lora.inject, rank=512)
    shape = (1, *report.PAPER_SHAPE)
    model = report.PAPER_MODEL
    needed = report.memory(model, trainable, train.recompute_blocks, shape, torch.bfloat16, torch.bfloat16, 8)
    assert 14.2e9 * 2 < needed.weights * 8 < 14.4e9 * 2 and 2.4e9 * 4 < needed.trained * 8 < 2.5e9 * 4
    assert needed.gradients == needed.trained and needed.total < 60 * 2**30
    plain = report.memory(model, trainable, None, shape, torch.bfloat16, torch.bfloat16, 8)
    assert plain.activations > 300 * 2**30, "without gradient checkpointing it could not"

    flops = report.PAPER_WINDOWS * report.window_flops(model, report.PAPER_SHAPE, report.PAPER_RANK, recomputed=True)
    hours = flops / report.PAPER_SPEED / 3600
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
    assert report.window_flops(CONFIG, shape, rank) == pytest.approx(counter.get_total_flops(), rel=0.15)


# The page


def test_a_run_ends_with_a_page_that_stands_alone(model, clips, tmp_path):
    out = tmp_path / "a <run>"
    flags = ["--model", model, "--data", clips, "--out", out, "--rank", 2, "--batch", 2, "--steps", 4]
    assert call(train, *flags, "--sample-every", 2, "--val-every", 2).status == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4 and page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=['\"](?!data:)", page) and "a &lt;run&gt;" in page and "<run>" not in page
    for words in ("sync", "copy", "4 of 4", "the same on the paper", "drop_caption", "8 GPUs of 80 GB", "CPU, threads"):
        assert words in page, words
    again = call(report, out)
    assert again.status == 0 and again.out.strip() == str(out / "report.html")
    assert (out / "report.html").read_text(encoding="utf-8") == page


def test_a_page_of_an_unfinished_run_and_of_none(tmp_path):
    mistake(call(report, tmp_path / "none"), "holds no run", "settings.json")
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 9, "batch": 2}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "flops": 1e9, "seconds": 2.0}\n{"step": 2, "lo')
    assert call(report, tmp_path).status == 0
    assert "1 of 9" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_curve_spans_what_it_shows():
    svg = report.curve("title", {"up": [(0, 0.0), (10, 2.0)], "none": []})
    assert 'd="M60.0 230.0L890.0 30.0"' in svg and ">up<" in svg and ">none<" not in svg
    assert ">0<" in svg and ">2<" in svg and ">10<" in svg
    long = report.curve("", {"a": [(x, float(x % 2)) for x in range(10000)]}, points=100)
    assert long.count("L") == 99
    assert report.curve("", {"a": []}) == ""
    assert "nan" not in report.curve("", {"a": [(1, 3.0)]})
