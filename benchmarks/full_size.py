"""Full size: Wan2.1-T2V-1.3B with random weights, from its files to an mp4, with time and peak memory of each stage.

What a stage takes does not depend on the values of the weights, so this can be measured without the published ones.

    python benchmarks/full_size.py --folder /tmp/wan-1.3B     writes 15 GB there once, then samples two steps

Memory is the process's peak, which Linux counts and which is reset before each stage; elsewhere it is not shown.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import flow
import sample
from model import Wan, WanConfig
from support import cli
from wan import checkpoint, text
from wan.text import T5Config, UMT5Encoder
from wan.vae import VAEConfig, WanVAE

TRANSFORMER = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
PROMPT = "a cat walks along a beach"
STAGES = {  # in the order of a run
    "encode the prompts": (checkpoint.Opened, "encode_prompts"),
    "encode the image": (sample, "conditions"),
    "load the transformer": (checkpoint.Opened, "transformer"),
    "denoise": (flow, "euler"),
    "decode": (sample, "decode"),
}


@dataclass(frozen=True)
class BenchmarkConfig:
    folder: str = cli.option("runs/wan-1.3B", "folder of the model, written if it is not there")
    image: str = cli.option("clips/00000.mp4@0", "first image")
    frames: int = cli.option(5, "pixel frames")
    size: str = cli.option("832x480", "pixels as WxH")
    steps: int = cli.option(2, "sampling steps")
    offload: bool = cli.option(False, "as of sample.py")


def write_model(folder: Path) -> None:
    """Write a folder as the authors of Wan publish them, with random numbers in place of weights."""
    with torch.device("meta"):
        transformer, encoder = Wan(TRANSFORMER), UMT5Encoder(T5Config())
    noise = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def weights(model: nn.Module) -> dict[str, Tensor]:
        def values(name: str, like: Tensor) -> Tensor:
            if "norm" in name:
                return torch.ones(like.shape, dtype=torch.bfloat16)
            return noise.repeat(like.numel() // len(noise) + 1)[: like.numel()].view(like.shape).clone()

        return {name: values(name, like) for name, like in model.state_dict().items()}

    def write(name: str, save: Callable[[Path], None]) -> None:
        if not (folder / name).exists():
            print(f"writing {folder / name}")
            with cli.replacing(folder / name) as path:
                save(path)

    facts = {"_class_name": "WanModel", "model_type": "t2v", "text_len": 512, "in_dim": 16, "out_dim": 16, "eps": 1e-6}
    sizes = {name: getattr(TRANSFORMER, name) for name in ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers")}
    write("google/umt5-xxl/tokenizer.json", lambda path: text.train_tokenizer([PROMPT]).save(str(path)))
    write(checkpoint.VAE_FILE, lambda path: torch.save(WanVAE(VAEConfig()).state_dict(), path))
    write(checkpoint.TEXT_FILE, lambda path: torch.save(weights(encoder), path))
    write("diffusion_pytorch_model.safetensors", lambda path: save_file(weights(transformer), path))
    write("config.json", lambda path: path.write_text(json.dumps({**facts, **sizes}), encoding="utf-8"))


def measured(label: str, stage: Callable, rows: list[str]) -> Callable:
    """The same function, each call of which adds a row to `rows`: label, time and peak memory."""

    def call(*arguments: object, **named: object) -> object:
        _reset_peak()
        start = time.monotonic()
        result = stage(*arguments, **named)
        rows.append(f"{label:22}{time.monotonic() - start:8.1f} s {_peak():>12}")
        return result

    return call


def _reset_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> str:
    if sys.platform != "linux":
        return ""
    status = Path("/proc/self/status").read_text()
    kilobytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return f"{kilobytes / 2**20:.2f} GiB"


def main() -> None:
    config = cli.parse(BenchmarkConfig, __doc__)
    folder = Path(config.folder)
    write_model(folder)
    rows: list[str] = []
    for label, (module, name) in STAGES.items():
        setattr(module, name, measured(label, getattr(module, name), rows))
    run = sample.SampleConfig(
        task="i2v", model=str(folder), image=(config.image,), prompt=PROMPT, frames=config.frames, size=config.size,
        steps=config.steps, offload=config.offload, out=str(folder / "sample.mp4"), overwrite=True,
    )  # fmt: skip
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as fresh:  # embeddings of an earlier run would spare the text encoder
        os.environ["NANOPUSA_CACHE"] = fresh
        sample.sample(run)
    dtype = cli.pick_dtype(run.dtype, cli.pick_device(run.device))
    print(f"{torch.get_num_threads()} threads, {dtype}; files of the folder:")
    for path in sorted(folder.rglob("*")):
        if path.stat().st_size > 2**24:
            print(f"  {path.name:42}{path.stat().st_size / 2**30:8.2f} GiB")
    print("\n".join(rows))
    print(f"{'together':22}{time.monotonic() - start:8.1f} s")


if __name__ == "__main__":
    cli.run(main)
