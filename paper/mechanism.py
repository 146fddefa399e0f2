"""Mechanism: what the LoRA changes in the network, and what it does there.

The paper says that the adaptation changes the base little and in the right place: it adds temporal dynamics and keeps
the prior of the base, whereas Wan-I2V, trained for one task with all its weights, changes everything. Three looks:

1. How much each layer changes, ||W' - W|| / ||W||: the LoRA and the I2V finetune, after as many steps of training.
2. Where attention goes: the share of a frame's attention (mean over heads, blocks, tokens) that each frame gets, when
   all frames are at τ = 0.9 and when the first one is clean; the base and Pusa.
3. What a frame takes from its neighbours: the middle frame is pure noise, all others are at one τ, and the network
   predicts it in one step. What it knows is 1 less its error as a share of the error of knowing nothing (the variance
   of the latents): 0 if it takes nothing from the prompt or the neighbours.

How to read it: a base model has never seen unequal τ, and being told them confuses it. So it is asked a second time,
told τ = 1 for all frames; what Pusa knows beyond both is what the LoRA has taught.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora
from model import Wan, rotate
from paper import i2v
from paper.lab import BUDGETS, Lab, Row, every, sheet
from paper.vector import Told
from support import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Of a frame between clean ones the base knows {:.0f} %, with the LoRA {:.0f} %"
NOISY, TAUS = 0.9, (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
NETWORKS, FIRST = ("base", "Pusa"), {"noisy": NOISY, "clean": 0.0}
TAKERS = *NETWORKS, "base, told one τ for all"
FINETUNE, CHANGED = "relative change of each layer, I2V finetune", "relative change of each layer, LoRA"


def measure(lab: Lab) -> None:
    layers = targets(lab.judge.transformer())
    lab.figure(CHANGED, lambda seed: lora_changes(layers, lab.lora(f"steps-{BUDGETS[-1]}"), 1.0))
    finetune = lab.work / "i2v" / f"{i2v.BUDGETS[-1]}.safetensors"
    if finetune.exists():
        lab.figure(FINETUNE, lambda seed: changes(layers, load_file(finetune, str(lab.device))))
    else:
        print(f"mechanism: no I2V finetune at {finetune}; run `python -m paper efficiency`, and this again")
    for network, first in ((n, f) for n in NETWORKS for f in FIRST):
        lab.figure(attention_name(network, first), partial(attention, lab, network, FIRST[first]))
    for network, tau in ((n, t) for n in TAKERS for t in lab.few(TAUS)):
        lab.figure(known_name(network, tau), partial(known, lab, network, tau))


def attention_name(network: str, first: str) -> str:
    return f"attention of each frame to each frame, {network}, first frame {first}"


def known_name(network: str, tau: float) -> str:
    return f"known of the middle frame, {network}, neighbours at {tau:g}"


def targets(transformer: Wan) -> dict[str, Tensor]:
    """The weights that a LoRA changes, by the names of their layers, block by block."""
    names = (f"blocks.{i}.{layer}" for i in range(len(transformer.blocks)) for layer in lora.TARGETS)
    return {name: transformer.get_submodule(name).weight.float() for name in names}


def lora_changes(layers: dict[str, Tensor], file: Path, strength: float) -> Tensor:
    """||strength · B A|| / ||W|| of every layer."""
    pairs = lora.load(file).pairs
    return torch.tensor([strength * pairs[name].norm().item() / W.norm().item() for name, W in layers.items()])


def changes(layers: dict[str, Tensor], weights: dict[str, Tensor]) -> Tensor:
    """||W' - W|| / ||W|| of every layer; weights: a state dict with the W'."""
    return torch.stack([(weights[f"{name}.weight"].float() - W).norm() / W.norm() for name, W in layers.items()])


def network_of(lab: Lab, name: str, seed: int) -> Wan:
    return lab.network("base" if name == "base" else f"seed-{seed}")


def attention(lab: Lab, name: str, first: float, seed: int) -> Tensor:
    """The share of its attention that each frame gives to each frame, (F·F,), with the first frame at its own τ."""
    network, maps, tau = network_of(lab, name, seed), [], torch.full(lab.latents.shape[2:3], NOISY)
    tau[0] = first

    def look(layer: nn.Module, inputs: tuple[Tensor, tuple[Tensor, Tensor]]) -> None:
        maps.append(frame_attention(layer, *inputs, len(tau)))

    handles = [block.self_attn.register_forward_pre_hook(look) for block in network.blocks]
    with torch.compiler.set_stance("force_eager"):  # compiled blocks call no hooks
        lab.velocity(network, tau, seed)
    for handle in handles:
        handle.remove()
    return torch.stack(maps).mean(0).flatten().cpu()


def frame_attention(layer: nn.Module, x: Tensor, rope: tuple[Tensor, Tensor], frames: int) -> Tensor:
    """Attention from each frame to each frame, (F, F), whose rows add up to 1: the mean over clips, heads and tokens.

    layer: a `model.SelfAttention`, whose inputs are x (B, F·S, D) and rope; its weights are computed here once more,
    as the layer itself never has them: they stay inside PyTorch's fused kernel.
    """
    q = rotate(layer.heads(layer.norm_q(layer.q(x))), rope).float()
    k = rotate(layer.heads(layer.norm_k(layer.k(x))), rope).float()
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, F·S, F·S)
    weights = weights.unflatten(-1, (frames, -1)).sum(-1).unflatten(-2, (frames, -1)).mean(-2)  # (B, heads, F, F)
    return weights.mean((0, 1))


def known(lab: Lab, name: str, neighbours: float, seed: int) -> Tensor:
    """What a network knows of a middle frame that is pure noise: 1 less its error as a share of the variance, (B,)."""
    tau, middle = torch.full(lab.latents.shape[2:3], neighbours), lab.latents.shape[2] // 2
    tau[middle] = 1  # there the prediction of x0 is x1 - v, so both are off by the same
    network = network_of(lab, name.partition(",")[0], seed)
    network = Told(network, list(range(len(tau))), highest=True) if name not in NETWORKS else network
    predicted, right = (v[:, :, middle] for v in lab.velocity(network, tau, seed))
    return 1 - ((predicted - right).square().mean((1, 2, 3)) / lab.latents[:, :, middle].var()).cpu()


def by_layer(lab: Lab, name: str) -> Tensor:
    """The mean over the seeds of a figure that has a value for each layer or cell, not for each scene."""
    return torch.tensor(lab.values(name)).mean(0)


def to_the_first(lab: Lab, network: str, first: str) -> Tensor:
    """The share of the attention of all later frames that the first frame gets, in percent, for each seed."""
    maps = torch.tensor(lab.values(attention_name(network, first)))
    return 100 * maps.unflatten(1, (round(maps.shape[1] ** 0.5), -1))[:, 1:, 0].mean(1)


def rows(lab: Lab) -> list[Row]:
    clean, among = ({network: known_name(network, tau) for network in TAKERS} for tau in (0.0, 1.0))
    shares = {(n, f): to_the_first(lab, n, f) for n in NETWORKS for f in FIRST}
    change, pusa = by_layer(lab, CHANGED), shares["Pusa", "clean"]
    more = (pusa > 1.1 * torch.maximum(shares["base", "clean"], shares["Pusa", "noisy"])).tolist()
    taught = (lab.below(clean[name], clean["Pusa"], median=False) for name in TAKERS if name != "Pusa")
    kept = lab.below(among["base"], among["Pusa"], median=False, factor=1 / 0.95)
    found = [
        Row("the LoRA teaches a frame to take what clean neighbours show", "temporal dynamics injected",
            "known of a frame of noise between clean ones: "
            + ", ".join(f"{n} {percent(lab, name)}" for n, name in clean.items()), every(taught),
            " → ".join(percent(lab, clean[n]) for n in NETWORKS)),
        Row("the prior is kept: among pure noise, Pusa knows what the base knows, to 5 %", "prior kept",
            "known of a frame among pure noise: " + ", ".join(f"{n} {percent(lab, among[n])}" for n in NETWORKS), kept),
        Row("by the LoRA, later frames attend to the first one a tenth more when it is clean", "in the right place",
            "; ".join(f"{n}: {shares[n, 'noisy'].mean():.1f} % → {shares[n, 'clean'].mean():.1f} %" for n in NETWORKS),
            all(more) if all(more) == any(more) else None),
    ]  # fmt: skip
    if FINETUNE in lab.figures:
        finetune = by_layer(lab, FINETUNE)
        less = (change < finetune).double().mean().item()
        found.append(Row("the LoRA changes most layers less than a finetune of all weights", "little",
            f"{less:.0%} of the layers less; median layer: LoRA {100 * change.median():.1f} %, finetune "
            f"{100 * finetune.median():.1f} %; most: LoRA {most_changed(change)}, finetune {most_changed(finetune)}",
            less > 0.5))  # fmt: skip
    else:
        found.append(Row("the LoRA changes little", "little", f"median layer: {100 * change.median():.1f} %", None))
    return found


def most_changed(change: Tensor) -> str:
    """The two kinds of layers that change most, by the mean over the blocks."""
    means = change.view(-1, len(lora.TARGETS)).mean(0)
    return " and ".join(f"{lora.TARGETS[i]} {100 * means[i]:.0f} %" for i in means.topk(2).indices)


def percent(lab: Lab, name: str) -> str:
    return f"{100 * lab.middle(name, median=False):.0f} ± {100 * lab.spread(name, median=False):.0f} %"


def draw(lab: Lab, path: Path) -> None:
    changed = {"LoRA": CHANGED} | ({"I2V finetune": FINETUNE} if FINETUNE in lab.figures else {})
    grids = {name: 100 * by_layer(lab, figure).view(-1, len(lora.TARGETS)).T for name, figure in changed.items()}
    most = max(grid.max().item() for grid in grids.values())
    title = TITLE.format(*(100 * lab.middle(known_name(name, 0.0), median=False) for name in NETWORKS))
    with sheet(path, title, 7) as drawn:
        upper, lower = drawn.subfigures(2, 1)
        for axes, (name, grid) in zip(upper.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
            heat_map(axes, grid, most, f"1. change of each layer by the {name}, %")
            axes.set_xlabel("block")
            axes.set_yticks(range(len(grid)), [target.replace("_attn", "") for target in lora.TARGETS])
        left, right = lower.subfigures(1, 2, width_ratios=(1, 1.1))
        left.suptitle("2. attention of each frame (row) to each", fontsize=9)
        cases = [(network, first) for network in NETWORKS for first in FIRST]
        for axes, (network, first) in zip(left.subplots(2, 2).flat, cases, strict=True):
            cells = by_layer(lab, attention_name(network, first))
            axes.imshow(cells.view(round(len(cells) ** 0.5), -1), cmap="Blues", vmin=0, vmax=0.5)
            share = to_the_first(lab, network, first).mean()
            axes.set_title(f"{network}, first {first}: {share:.1f} % on it", fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
        axes = right.subplots()
        for network, colour in zip(TAKERS, (*plots.COLOURS[1::-1], plots.GREY), strict=True):
            names = [known_name(network, tau) for tau in lab.few(TAUS)]
            means, spreads = ([100 * of(name, median=False) for name in names] for of in (lab.middle, lab.spread))
            axes.errorbar(lab.few(TAUS), means, spreads, color=colour, label=network)
        axes.set(title="3. known of a frame that is noise, %", xlabel="τ of its neighbours")
        axes.title.set_size(9)
        axes.grid(axis="y")
        axes.legend()


def heat_map(axes: "Axes", grid: Tensor, most: float, title: str) -> None:
    """A grid of numbers (rows, columns) up to `most`, each written into its cell."""
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    for (row, column), value in np.ndenumerate(grid.numpy()):
        number, colour = f"{value:.{0 if most > 10 else 1}f}", "white" if value > most / 2 else "#333333"
        axes.text(column, row, number, ha="center", va="center", color=colour)
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(grid.shape[1]))
