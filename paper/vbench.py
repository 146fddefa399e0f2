"""VBench-I2V, the paper's own score, for real weights: make the benchmark's videos, then put its scores in a table.

The paper says: a total of 87.32 against Wan-I2V's 86.86, in 10 steps with a clean first frame, as is the default here.
DIR is the folder `vbench2_beta_i2v` of https://github.com/Vchitect/VBench once its `download_data.sh` has run: it holds
`vbench2_i2v_full_info.json` and the images, as data/crop/RATIO/IMAGE_NAME.

    python -m paper.vbench DIR --model Wan-AI/Wan2.1-T2V-14B --lora pusa.safetensors:1.4
    python -m paper.vbench --scores runs/vbench/7-4/scores/*_eval_results.json

Videos become runs/vbench/RATIO/videos/PROMPT-INDEX.mp4, five of each prompt; those that exist stay. Machines may share
the folder: each claims a prompt's videos before it makes them.
"""

import json
import math
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import sample
from model import Wan
from paper import score
from support import cli, media, records
from wan import checkpoint

RATIOS = {"1-1": 1.0, "8-5": 8 / 5, "7-4": 7 / 4, "16-9": 16 / 9}
STALE = 3600  # seconds; claims are touched at every step, so one that was not for so long has been left behind


@dataclass(frozen=True)
class Config:
    folder: str | None = cli.option(None, "DIR, VBench's folder vbench2_beta_i2v", nargs="?", positional=True)
    scores: tuple[str, ...] = cli.option((), "make no videos: print the table of what VBench wrote", nargs="+")
    model: str = cli.option("checkpoints/tiny", "folder or Hugging Face repository of a Wan text-to-video model")
    lora: tuple[str, ...] | None = cli.option(None, "as in sample.py", nargs="+", action="extend")
    out: str = cli.option("runs/vbench", "folder for the videos, which machines may share")
    ratio: str | None = cli.option(None, "shape of all (default: the nearest to the model's)", choices=tuple(RATIOS))
    samples: int = cli.option(5, "videos of each prompt", (1, 5, "1 to 5"))
    frames: int | None = cli.option(None, "pixel frames N = 4k+1 (default: the model's)")
    steps: int = cli.option(10, "sampling steps K")
    guidance: float | None = cli.option(None, "guidance (default: the model's)")
    noise: str = cli.option("0", "noise multiplier of the image in [0, 1]")
    seed: int = cli.option(0, "seed of the noise", cli.SEED)
    device: str | None = cli.option(None, "device (default: a GPU if there is one)")
    offload: bool = cli.option(False, "keep the weights in the CPU's memory, on the device one block at a time")


class Video(NamedTuple):
    path: Path
    prompt: str
    image: Path
    seed: int  # with which `sample.py --seed` makes it alone


def shape(ratio: str | None, size: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """A ratio and a size (W, H): the ratio nearest to a model's size, or the size of about its area in a ratio."""
    if ratio is None:
        return min(RATIOS, key=lambda name: abs(math.log(RATIOS[name] * size[1] / size[0]))), size
    height = math.sqrt(math.prod(size) / RATIOS[ratio])
    return ratio, (16 * max(1, round(height * RATIOS[ratio] / 16)), 16 * max(1, round(height / 16)))


def suite(folder: Path, ratio: str, out: Path, samples: int, seed: int) -> list[list[Video]]:
    """The videos of each prompt of VBench's `folder`. ValueError if the list or an image is missing."""
    try:
        entries = json.loads((folder / "vbench2_i2v_full_info.json").read_text(encoding="utf-8"))
        entries = [(entry["prompt_en"], folder / "data" / "crop" / ratio / entry["image_name"]) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"got {folder} ({error!r}), expected the folder vbench2_beta_i2v of VBench") from None
    lacks = [image for _, image in entries if not image.is_file()] if entries else ["a prompt"]
    cli.expect(not lacks, f"{folder} without {lacks and lacks[0]}", "all that VBench's download_data.sh leaves there")
    return [
        [Video(out / f"{prompt}-{i}.mp4", prompt, image, cli.nth_seed(seed, 5 * n + i)) for i in range(samples)]
        for n, (prompt, image) in enumerate(entries)
    ]


def claim(path: Path) -> bool:
    """Make the file of a claim; False if somebody else has."""
    with suppress(FileNotFoundError):  # two may take over one claim at once, and make the same video twice: no harm
        if time.time() - path.stat().st_mtime > STALE:
            path.unlink()
    with suppress(FileExistsError):
        path.touch(exist_ok=False)
        return True
    return False


def make(config: Config) -> str:
    """Make the videos that are neither there nor claimed → the command with which VBench scores them."""
    opened, folder = checkpoint.open(config.model, Wan), Path(config.folder)
    ratio, size = shape(config.ratio, opened.preset.size)
    out = Path(config.out) / ratio
    prompts = suite(folder, ratio, out / "videos", config.samples, config.seed)
    settings = sample.resolve(
        sample.SampleConfig(
            task="i2v", model=config.model, lora=config.lora, image=(str(prompts[0][0].image),), prompt="",
            noise=config.noise, frames=config.frames, size="{}x{}".format(*size), steps=config.steps,
            guidance=config.guidance, seed=config.seed, device=config.device, offload=config.offload,
        ), opened,
    )  # fmt: skip
    job, record = sample.lay_out(settings, opened.preset.frames), out / "settings.json"
    shared = replace(settings, image=(), device=None, offload=False)  # what is one for all videos, on every machine
    begun = records.read(record, sample.SampleConfig) if record.exists() else shared
    other = [name for name, value in vars(begun).items() if value != getattr(shared, name)]
    cli.expect(not other, f"another {', '.join(other)} than that of the videos in {out}", "the same, or another --out")
    missing = [[video for video in videos if not video.path.exists()] for videos in prompts]
    if any(missing):
        experts = sample.Experts(settings, opened, [videos[0].prompt for videos in missing if videos])
        experts.load("high")  # a model or LoRA that cannot be read leaves nothing behind
        (out / "claims").mkdir(parents=True, exist_ok=True)
        records.write(record, shared)
        bar = cli.Progress(sum(map(len, missing)) * (len(job.taus[0]) - 1), "denoising")
        for videos in filter(None, missing):
            make_videos(experts, job, videos, out / "claims", bar)
        if left := sum(not video.path.exists() for videos in missing for video in videos):
            print(f"videos claimed by other runs: {left}; run this again in an hour at most", file=sys.stderr)
    command = ["python", "evaluate_i2v.py", "--videos_path", str(out.resolve() / "videos"), "--ratio", ratio]
    command += ["--output_path", str(out.resolve() / "scores"), "--dimension", *score.DIMENSIONS]
    return f"cd {shlex.quote(str(folder.resolve().parent))} && {shlex.join(command)}"


def make_videos(experts: sample.Experts, job: sample.Job, videos: list[Video], claims: Path, bar: cli.Progress) -> None:
    """Make those videos of a prompt that nobody else makes or has made by now."""
    mine: dict[Path, Video] = {}

    def on_step(*step: object) -> None:
        for path in mine:
            path.touch()
        bar.step()

    try:
        for video in videos:
            if claim(path := claims / video.path.stem):
                mine[path] = video
        ours = [video for video in mine.values() if not video.path.exists()]
        bar.total -= (len(videos) - len(ours)) * (len(job.taus[0]) - 1)
        if ours:
            experts.prompts = [video.prompt for video in ours]
            inputs = sample.read_inputs(replace(experts.config, image=(str(ours[0].image),)), job.plans[0])
            made = sample.generate(experts, job, inputs, [video.seed for video in ours], on_step)
            for video, latents in zip(ours, made, strict=True):
                media.write_video(video.path, sample.decode(experts.vae, latents), experts.config.fps)
    finally:
        for path in mine:
            path.unlink(missing_ok=True)


def main() -> None:
    config = cli.parse(Config, __doc__)
    cli.expect(bool(config.folder) != bool(config.scores), "both or neither of DIR and --scores", "one of them")
    print(score.table(score.read(config.scores)) if config.scores else make(config))


if __name__ == "__main__":
    cli.run(main)
