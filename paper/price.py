"""The paper: $500 for Pusa's training on 8 GPUs of 80 GB, where Wan-I2V's took $100,000 or more.

Measured: the operations of the paper's run, 900 steps of 8 clips of 81 frames at 832x480 with rank 512 on Wan 14B and
gradient checkpointing, as PyTorch counts them for our transformer without memory for its weights. From these the hours
on GPUs that run at 40 % of their peak, and their price in a list of prices. Beside it what our own LoRA took here.

Read: we do not know which GPUs were rented, nor at what price, so the count can only show whether $500 is enough. It
leaves out encoding the clips, validation, and runs that failed. Nothing can be counted for Wan-I2V, whose training is
not published: $100,000 stays the paper's word. Our seconds are those of a machine that other processes used too.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import train
from model import Wan, WanConfig
from paper.lab import STEPS as LORA_STEPS
from paper.lab import Lab, Row, page
from support import cost, plots, report

TITLE = "The paper's $500 is {} for its training, by our count of its operations"
CLAIMED, WAN_I2V = 500.0, 100_000.0  # $
STEPS, RANK, LATENTS = 900, 512, (16, 21, 60, 104)
MODEL = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
# FLOP/s, at 40 % of the peak in bf16 that NVIDIA states, and $ an hour for each GPU of a machine of eight with 80 GB
# (Lambda's list, lambda.ai/instances, on 20 September 2026, as it was copied to github.com/api-evangelist/lambda-labs).
GPUS = {"A100": (report.PAPER_SPEED, 2.79), "H100": (0.4 * 989e12, 3.99)}
RUNS = ("seed-1", "seed-2", "steps-1600")  # of the usual rank, the last one until it is as long as the others


@cache
def paper_flops() -> float:
    """Operations of the paper's run: forward, forward again for checkpointing, and backward, without VAE and umT5."""
    one, two = map(_window, (1, 2))  # all is linear in the layers, and forty take a minute to count
    return float(STEPS * report.PAPER_GPUS * (one + (MODEL.num_layers - 1) * (two - one)))


def _window(layers: int) -> int:
    """Operations to train on one clip with so many layers."""
    with torch.device("meta"):
        transformer = Wan(replace(MODEL, num_layers=layers))
    train.trainable(transformer, train.TrainConfig(rank=RANK))
    transformer.recompute_blocks()
    return cost.window_flops(transformer, LATENTS)


def dollars(flops: float, gpu: str) -> float:
    """The price of so many operations on GPUs of a kind, by the hour."""
    speed, price = GPUS[gpu]
    return flops / speed / 3600 * price


def spent(lab: Lab, seed: int) -> dict:
    """The metrics of one of our LoRA's runs after the usual steps, with its seconds and operations so far."""
    lines = (lab.lora(RUNS[seed]).parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[:LORA_STEPS][-1])  # a line a step


def measure(lab: Lab) -> None:
    """No sampling."""

    def one(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    lab.figure("the paper's run, EFLOP", lambda seed: one(paper_flops() / 1e18))
    lab.figure("our LoRA, TFLOP", lambda seed: one(spent(lab, seed)["flops"] / 1e12))
    lab.figure("our LoRA, s", lambda seed: one(spent(lab, seed)["seconds"]))


def enough(lab: Lab) -> bool:
    """Whether the operations of the paper's run can be had for its price on some of the GPUs."""
    flops = lab.middle("the paper's run, EFLOP") * 1e18
    return min(dollars(flops, gpu) for gpu in GPUS) <= CLAIMED


def prices(lab: Lab) -> dict[str, float]:
    """$ of each run, by what it is called in the figure."""
    flops = lab.middle("the paper's run, EFLOP") * 1e18
    counted = {f"Pusa, our count on 8 {gpu}s": dollars(flops, gpu) for gpu in GPUS}
    return {"Wan-I2V, as the paper says": WAN_I2V, "Pusa, as the paper says": CLAIMED, **counted}


def draw(lab: Lab, path: Path) -> None:
    """A bar for each run, on a logarithmic scale."""
    bars = prices(lab)
    with page(path, TITLE.format("enough" if enough(lab) else "too little"), height=3) as (axes,):
        colours = [plots.GREY if "says" in name else plots.COLOURS[0] for name in bars]
        drawn = axes.barh([*bars], [*bars.values()], color=colours)
        axes.bar_label(drawn, [f"${v:,.0f}" for v in bars.values()], padding=4)
        axes.set(xscale="log", xlabel="price, $", xlim=(min(bars.values()) / 3, 10 * WAN_I2V))
        axes.invert_yaxis()


def rows(lab: Lab) -> list[Row]:
    """The paper's price by our count, Wan-I2V's by the paper, and what ours took."""
    flops = lab.middle("the paper's run, EFLOP") * 1e18
    told = [
        f"${dollars(flops, gpu):.0f} for {flops / GPUS[gpu][0] / 3600:.0f} hours of one {gpu}, and ${CLAIMED:.0f} if "
        f"it runs at {0.4 * dollars(flops, gpu) / CLAIMED:.0%} of its peak instead of 40%" for gpu in GPUS
    ]  # fmt: skip
    ours = f"our LoRA of rank 32: {lab.told('our LoRA, TFLOP', 'TFLOP')}, {lab.told('our LoRA, s', 's')}"
    return [
        Row("the paper's price is enough for Pusa's training", f"${CLAIMED:.0f}",
            "; ".join([f"{flops:.3g} FLOP", *told, ours]), enough(lab),
            "by our count " + " or ".join(f"${dollars(flops, gpu):.0f} on {gpu}s" for gpu in GPUS)),
        Row("Wan-I2V's training costs far more", f"at least ${WAN_I2V:,.0f}", "not published, so not counted", None),
    ]  # fmt: skip
