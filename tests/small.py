"""A miniature model with random weights, a few clips of the toy world, and how the tests run a command.

Nothing here is good at anything: the tests that use it ask what a command does, not how its videos look.
"""

import contextlib
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import lora
from model import Wan, WanConfig
from support import cli, media
from toy import world
from wan import checkpoint, text
from wan.vae import VAEConfig, WanVAE

SIZE, FRAMES = (32, 32), 25  # F = 7: room for 4 latents of a clip and more than one to make
PRESET = checkpoint.Preset(
    size=SIZE, frames=FRAMES, fps=16.0, steps=3, shift=3.0, guidance=2.0, noise=0.0, strength=1.0, negative_prompt=""
)
SCENES = list(world.scenes(4, seed=5))


class Result(NamedTuple):
    status: int
    out: str
    err: str


def call(module, *arguments) -> Result:
    """Run a command in this process, as its file does when it is called with these arguments."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv = [module.__file__, *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run(module.main)
        except SystemExit as end:
            status = end.code
    return Result(status, out.getvalue(), err.getvalue())


def mistake(result: Result, *words: str, told: str = "") -> None:
    """Assert that a run ended with status 2 and one sentence on stderr, which has all of the words.

    told: what it printed begins with this; nothing else may be printed.
    """
    *before, sentence, last = result.err.split("\n")
    assert result.status == 2 and not last and bool(told) == bool(result.out) and result.out.startswith(told), result
    others = [line for line in before if "left" not in line and not line.startswith("settings: ")]
    assert "Traceback" not in result.err and not others, "more than progress, settings and a sentence"
    assert ".py: " in sentence and len(sentence) < 500, sentence
    for word in words:
        assert word in sentence, f"{word!r} is not in: {sentence}"


def amounts(text: str) -> list[float]:
    """The amounts of memory that a text names, in bytes."""
    return [float(n) * 2 ** (30 if unit == "G" else 20) for n, unit in re.findall(r"([0-9.]+) ([GM])iB", text)]


def scene_video(index: int, frames: int = world.FRAMES) -> torch.Tensor:
    """One of the clips, (3, frames, 32, 32)."""
    return media.resize_crop(world.render(SCENES[index], frames), SIZE)


def write_clips(folder: Path, count: int = len(SCENES)) -> Path:
    for index in range(count):
        media.write_video(folder / f"{index:05d}.mp4", scene_video(index), world.FPS)
        (folder / f"{index:05d}.txt").write_text(SCENES[index].caption + "\n", encoding="utf-8")
    return folder


def random_lora(transformer: Wan, seed: int, rank: int = 2) -> lora.LoRA:
    """A LoRA of every target layer, strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for i in range(len(transformer.blocks)):
        for name in (f"blocks.{i}.{target}" for target in lora.TARGETS):
            out_features, in_features = transformer.get_submodule(name).weight.shape
            A, B = (torch.randn(n, generator=generator) for n in ((rank, in_features), (out_features, rank)))
            pairs[name] = lora.Pair(A / in_features**0.5, B / 4)
    return lora.LoRA(pairs)


def opened(path) -> checkpoint.Opened:
    return checkpoint.open(path, Wan)


def load_pipeline(path, dtype: torch.dtype | None = None) -> SimpleNamespace:
    """All parts of a model, and its preset."""
    model = opened(path)
    model.fetch()
    return SimpleNamespace(
        transformer=model.transformer(dtype),
        transformer_2=model.transformer(dtype, expert="low") if model.two_experts else None,
        vae=model.vae(), text_encoder=model.text_encoder(dtype), tokenizer=model.tokenizer(), preset=model.preset,
    )  # fmt: skip


@torch.no_grad()
def write_model(folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = text.train_tokenizer(scene.caption for scene in world.scenes(200, seed=1))
        transformer = Wan(WanConfig(48, 96, 32, num_heads=2, num_layers=2, text_len=32, text_dim=16))
        config = VAEConfig(
            dim=8, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, True), patch_size=2,
            latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16,
        )  # fmt: skip
        vae = WanVAE(config)
        encoder = text.UMT5Encoder(text.T5Config(tokenizer.get_vocab_size(), 16, 16, 32, num_heads=2, num_layers=1))
        # Of the layers' own small scale, pixels and velocities would hardly differ from one input to another.
        transformer.head.head.weight.mul_(3)
        vae.conv1.weight[:16].mul_(8)
        vae.decoder.head[2].weight.mul_(2)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": encoder, "tokenizer": tokenizer}
    checkpoint.save_pipeline(folder, parts, PRESET)
    lora.save(folder / "lora.safetensors", random_lora(transformer, seed=1), base="small")
    return folder


# A fixture is called otherwise than its function, so that a test's argument does not hide what the test file imports.


@pytest.fixture(scope="module", name="model")
def model_fixture(tmp_path_factory) -> Path:
    """The model's folder, with a LoRA in it. Tests only read it."""
    return write_model(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="module", name="clips")
def clips_fixture(tmp_path_factory) -> Path:
    """A folder of four captioned clips of 33 frames. Tests only read it."""
    return write_clips(tmp_path_factory.mktemp("clips"))


class Code:
    """What runs when it is unpickled: it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def count(monkeypatch, counts: dict[str, int], owner, method: str, name: str) -> None:
    """Count under `name` how often a method is called, which goes on as before."""
    original = getattr(owner, method)

    def counted(*arguments):
        counts[name] += 1
        return original(*arguments)

    monkeypatch.setattr(owner, method, counted)
