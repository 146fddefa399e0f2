"""The rivals of a Pusa LoRA: a finetune in Wan-I2V's way, and a way of image-to-video that needs no training.

Wan-I2V sees, beside the noisy latents, a mask (4 channels) and the latents of what is given (16), zero elsewhere: 36
input channels. All weights are trained, and all frames share one noise level. It is `model.Wan` by its config. Two
things are simpler than Wan's: there are no CLIP features, and the frames that are not given are zeros, where Wan has
the latents of grey frames.

    network = finetuned(lab)        trained now if it has not been; stopped, it goes on from the last 500 steps
    lab.error(network, "i2v", seed, taus=one_level(lab))
"""

import dataclasses
import json
import math
import time
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flow
import tasks
import train
from model import PromptKeys, Wan
from paper.lab import BATCH, Lab, alone
from support import cli
from toy import world

BUDGETS = (16, 32, 64, 128, 256, 512, 1024, 1600)  # optimizer steps of its trainings, from 1/100 of all to all
RATES, TRIAL = (3e-4, 1e-3, 3e-3), 128  # learning rates, and the steps after which the best of them is chosen
CHANNELS = 36  # 16 noisy, 4 of the mask, 16 given


def one_level(lab: Lab) -> Tensor:
    """Noise levels (K+1, F) at which no frame is ahead of another, the given ones included."""
    preset = lab.judge.preset
    return tasks.tau_schedule([1.0] * tasks.latent_frames(world.FRAMES), preset.steps, preset.shift)


def condition_channels(x0: Tensor, given: list[int]) -> Tensor:
    """What the network sees of the conditions x0 (B, 16, F, H, W): the mask, then their latents, (B, 20, F, H, W)."""
    y = x0.new_zeros(x0.shape[0], CHANNELS - 16, *x0.shape[2:])
    y[:, :4, given], y[:, 4:, given] = 1, x0[:, :, given]
    return y


class ImageToVideo(nn.Module):
    """A network of 36 input channels that is sampled as one of 16; `Judge.videos` tells it the conditions."""

    def __init__(self, network: Wan):
        super().__init__()
        self.network, self.prompt_keys = network, network.prompt_keys

    def condition(self, x0: Tensor, x1: Tensor, given: list[int]) -> None:
        """Take the conditions of the next clips, x0 (B, 16, F, H, W) at the latent frames `given`."""
        self.conditions = condition_channels(x0, given)

    def forward(self, z: Tensor, tau: Tensor, keys: PromptKeys) -> Tensor:
        return self.network(torch.cat([z, self.conditions], 1), tau, keys)


class Replacement(nn.Module):
    """A text-to-video network whose known frames are put back at every step, noised to its level.

    That is a walk along the path from their noise to them: it is enough to say that their velocity is x1 - x0.
    """

    def __init__(self, network: Wan):
        super().__init__()
        self.network, self.prompt_keys = network, network.prompt_keys

    def condition(self, x0: Tensor, x1: Tensor, given: list[int]) -> None:
        """Take the conditions of the next clips and the noise that they start from, x0 and x1 (B, 16, F, H, W)."""
        self.given, self.velocity = given, (x1 - x0)[:, :, given]

    def forward(self, z: Tensor, tau: Tensor, keys: PromptKeys) -> Tensor:
        v = self.network(z, tau, keys)
        v[:, :, self.given] = self.velocity.to(v.dtype)
        return v


def widened(base: Wan) -> Wan:
    """The base with 20 more input channels, whose weights are zero: at first they change nothing."""
    with base.patch_embedding.weight.device:
        network = Wan(dataclasses.replace(base.config, in_dim=CHANNELS, model_type="i2v"))
    weights = base.state_dict()
    weights["patch_embedding.weight"] = F.pad(weights["patch_embedding.weight"], (0, 0) * 3 + (0, CHANNELS - 16))
    network.load_state_dict(weights)
    return network


def finetuned(lab: Lab, steps: int = BUDGETS[-1]) -> ImageToVideo:
    """The finetune of so many steps, to be sampled."""
    network = widened(lab.opened.transformer(torch.float32, lab.device))
    network.load_state_dict(load_file(weights(lab, steps), device=lab.device))
    if lab.config.compile:
        network.compile_blocks()
    return ImageToVideo(network.to(lab.judge.dtype)).requires_grad_(False)


def weights(lab: Lab, steps: int = BUDGETS[-1]) -> Path:
    """The file of the finetune's weights after a training of so many steps: `model.Wan`'s names, fp32.

    Each budget is a training of its own, as the learning rate comes down at the end. Its first steps are not those of
    a longer one, but all see the same clips, noise and levels, which follow from the step alone.
    """
    file = lab.work / "i2v" / f"{steps}.safetensors"
    with alone(file):
        if not file.exists():
            rate, count = learning_rate(lab), 2 if lab.config.quick else steps
            network, seconds = _trained(lab, count, rate, file.with_suffix(".pt"))
            trained = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
            if not all(tensor.isfinite().all() for tensor in trained.values()):
                raise ValueError(f"the image-to-video finetune of {steps} steps diverged; lower its learning rates")
            facts = {"steps": str(count), "learning rate": f"{rate:g}", "seconds": f"{seconds:.1f}"}
            with cli.replacing(file) as path:
                save_file(trained, path, facts)
            file.with_suffix(".pt").unlink(missing_ok=True)
    return file


def learning_rate(lab: Lab) -> float:
    """The rate whose short training has the lowest loss on clips that are held out; tried once, and kept in a file."""
    file = lab.work / "i2v" / "rates.json"
    with alone(file):
        if not file.exists():
            losses, count = {}, 2 if lab.config.quick else TRIAL
            for rate in RATES:
                state = file.with_name(f"rate-{rate:g}.pt")
                network, _ = _trained(lab, count, rate, state)
                draws = (torch.Generator(lab.device).manual_seed(seed) for seed in range(16))
                with torch.no_grad():
                    loss = sum(_loss(network, *_clips(lab, held_out=True), draw).item() for draw in draws) / 16
                losses[f"{rate:g}"] = loss if math.isfinite(loss) else 1e9
                state.unlink(missing_ok=True)
            cli.write_json(file, losses)
    losses = json.loads(file.read_text(encoding="utf-8"))
    return float(min(losses, key=losses.get))


@lru_cache(maxsize=2)
def _clips(lab: Lab, held_out: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The training clips, on the device: latents (n, 16, F, H, W), captions (n, T, text_dim), and the empty caption."""
    config = train.TrainConfig(data=lab.config.work, model=lab.config.model, device=lab.device, dtype=lab.config.dtype)
    data = lab.training_data(lab.opened, train.checked(config, lab.opened), None)
    rows = data.validation if held_out else data.training[0]
    return data.latents[rows].to(lab.device), data.context([data.prompts[i] for i in rows]), data.context([""])


def _trained(lab: Lab, steps: int, rate: float, state: Path) -> tuple[Wan, float]:
    """A finetune of the base, fp32, and the seconds that its training took."""
    network = widened(lab.opened.transformer(torch.float32, lab.device)).requires_grad_()
    if lab.config.compile:
        network.compile_blocks()
    return network, _train(network, _clips(lab), steps, rate, state, lab.device, lab.config.dtype)


def _train(
    network: Wan, clips: tuple[Tensor, Tensor, Tensor], steps: int, rate: float, state: Path, device: str,
    dtype: str, every: int = 500,
) -> float:  # fmt: skip
    """Train all weights as `train.py --full` does, and return the seconds that it took.

    state: a file that is written every so many steps, from which a training that was stopped goes on.
    """
    (optimizer,) = train.make_optimizers(train.TrainConfig(full=True, lr=rate), [network])
    first, before, dtype = 0, 0.0, cli.pick_dtype(dtype, device)
    if state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
        first, before = saved["step"], saved["seconds"]
    progress, begun = cli.Progress(steps, f"I2V finetune, {steps} steps", first), time.monotonic()
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = rate * train.rate(step, steps)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
            loss = _loss(network, *clips, torch.Generator(device).manual_seed(step))
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.step()
        if (step + 1) % every == 0:
            with cli.replacing(state) as path:
                now = {"step": step + 1, "seconds": before + time.monotonic() - begun}
                torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict(), **now}, path)
    return before + time.monotonic() - begun


def _loss(network: Wan, latents: Tensor, contexts: Tensor, empty: Tensor, draw: torch.Generator) -> Tensor:
    """The loss of a batch drawn on the device: clips given their first frame, one in ten without its caption."""
    rows = torch.randint(len(latents), (BATCH,), generator=draw, device=draw.device)
    dropped = torch.rand(BATCH, 1, 1, generator=draw, device=draw.device) < train.TrainConfig.drop_caption
    x0, context = latents[rows], torch.where(dropped, empty, contexts[rows])
    x1 = torch.randn(x0.shape, generator=draw, device=draw.device)
    tau = flow.sample_tau(BATCH, x0.shape[2], p_async=0.0, generator=draw)
    velocity = network(torch.cat([flow.interpolate(x0, x1, tau), condition_channels(x0, [0])], 1), tau, context)
    return flow.fafm_loss(velocity, x0, x1, tau)
