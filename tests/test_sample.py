"""Sampling: every task from the command line to its files, what a condition may see, long videos, and the mistakes."""

import dataclasses
import itertools
import json
import re
import shutil
import threading
import weakref
from functools import partial
from pathlib import Path
from unittest import mock

import av
import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from small import FRAMES, Code, call, clips_fixture, count, mistake, model_fixture, random_lora, scene_video  # noqa: F401

import flow
import lora
import sample
import tasks
import train
from model import Wan
from sample import SampleConfig
from support import cost, dataset, media, plots, records
from toy import world
from wan import checkpoint
from wan.text import UMT5Encoder

NAMES = tuple(tasks.TASKS)


@pytest.fixture(autouse=True)
def examples(clips, monkeypatch):
    """The clips that a task takes when it is given none."""
    monkeypatch.setattr(records, "EXAMPLES", clips)
    monkeypatch.setattr(records, "EXAMPLE_CLIPS", ("00000.mp4", "00001.mp4"))
    monkeypatch.setattr(records, "EXAMPLE_STRETCHES", {})


@pytest.fixture
def run(model, tmp_path):
    """Run the command on the miniature model, in fp32 unless told otherwise, to a.mp4."""

    def run(*arguments, out="a.mp4"):
        flags = ["--model", model, "--dtype", "float32", "--out", tmp_path / "out" / out]
        return call(sample, *flags, *arguments)

    return run


@pytest.fixture
def made(tmp_path):
    """Names of what is in the folder of outputs."""

    def names():
        return sorted(path.name for path in (tmp_path / "out").glob("*"))

    return names


def _open(model):
    return checkpoint.open(model, Wan)


def _laid_out(**settings):
    """A config as `prepare` settles it, and its job."""
    config, opened = sample.prepare(SampleConfig(**settings))
    return config, sample.lay_out(config, opened.preset.frames)


def _settings(path):
    return json.loads(path.read_text(encoding="utf-8"))["settings"]


def _latents(model, task, clip=None, **changes):
    """What `generate` makes of a config; with a clip (1, 3, N, 32, 32) in place of every file."""
    config, opened = sample.prepare(SampleConfig(task=task, model=str(model), dtype="float32", **changes))
    job = sample.lay_out(config, opened.preset.frames)
    plan = job.plans[0]
    inputs = sample.read_inputs(config, plan) if clip is None else [tasks.cut(slot, clip) for slot in plan.slots]
    (latents,) = sample.generate(sample.Experts(config, opened, [config.prompt]), job, inputs, [config.seed])
    return latents


# Every task.


@pytest.mark.parametrize("task", NAMES)
def test_a_task_makes_its_files_and_repeats_to_the_bit(task, run, made, tmp_path):
    result = run("--task", task, "--seed", 3)
    assert result.status == 0, result.err
    assert made() == ["a.json", "a.mp4", "a.png"]
    out = tmp_path / "out"
    assert result.out.split() == [str(out / name) for name in ("a.mp4", "a.png", "a.json")]
    video = media.read_video(out / "a.mp4")
    whole = {"extend": world.FRAMES + FRAMES - 13, "prepend": world.FRAMES + FRAMES - 17, "retake": world.FRAMES}
    assert video.shape == (3, whole.get(task, FRAMES), 32, 32)
    assert video.std() > 0.05
    assert media.read_image(out / "a.png").shape[2] > 200

    repeated = call(sample, "--from-json", out / "a.json", "--out", out / "b.mp4")
    assert repeated.status == 0, repeated.err
    for suffix in (".mp4", ".png"):
        assert (out / f"a{suffix}").read_bytes() == (out / f"b{suffix}").read_bytes(), suffix
    assert _settings(out / "b.json") == _settings(out / "a.json") | {"out": str(out / "b.mp4")}


def test_another_seed_is_another_video(run, tmp_path):
    for name, seed in (("a.mp4", 3), ("b.mp4", 4)):
        assert run("--task", "i2v", "--seed", seed, out=name).status == 0
    a, b = (media.read_video(tmp_path / "out" / name) for name in ("a.mp4", "b.mp4"))
    assert (a - b)[:, 1:].abs().max() > 0.1


def test_a_task_takes_files_of_the_user(run, clips, tmp_path):
    media.save_image(tmp_path / "a b.png", scene_video(0)[:, 0])
    a, b = tmp_path / "a b.png", f"{clips / '00001.mp4'}@20"
    video = clips / "00002.mp4"
    for number, arguments in enumerate(
        [
            ("i2v", "--image", a),
            ("start-end", "--image", a, b),
            ("keyframes", "--image", b, a, b, "--at", "3,0,6", "--noise", "0,0.2,0.3"),
            ("extend", "--video", video, "--noise", "0,0.5"),
            ("transition", "--video", video, clips / "00000.mp4"),
            ("stream", "--video", video),
            ("restyle", "--video", video, "--strength", 0.4),
        ]
    ):
        result = run("--task", *arguments, "--prompt", "a red circle", out=f"{number}.mp4")
        assert result.status == 0, result.err
        settings = _settings(tmp_path / "out" / f"{number}.json")
        assert settings["prompt"] == "a red circle"
        assert settings["image"] + settings["video"] == [
            str(argument) for argument in arguments if argument in (a, b, video, clips / "00000.mp4")
        ]


def test_the_prompt_is_the_caption_beside_the_clip_unless_given(run, clips, tmp_path):
    for name, flags, prompt in (
        ("a", ["--video", clips / "00002.mp4"], (clips / "00002.txt").read_text().strip()),
        ("b", ["--video", clips / "00002.mp4", "--prompt", ""], ""),
        ("c", [], (clips / "00000.txt").read_text().strip()),
    ):
        assert run("--task", "extend", *flags, out=f"{name}.mp4").status == 0
        assert _settings(tmp_path / "out" / f"{name}.json")["prompt"] == prompt


def test_what_is_left_open_is_written_down(run, model, tmp_path):
    """The JSON file names every value, so that it repeats the run on another machine, or after the presets changed."""
    assert run("--task", "extend").status == 0
    settings = _settings(tmp_path / "out" / "a.json")
    open_still = {name for name, value in settings.items() if value is None}
    unused = {"seconds", "at", "between", "from_json", "preset", "prompts", "boundary", "guidance_2", "sweep", "tau"}
    assert open_still == unused
    assert settings["lora"] == [f"{(model / 'lora.safetensors').as_posix()}:1"]
    chosen = ("size", "frames", "steps", "shift", "guidance", "noise", "fps")
    assert [settings[name] for name in chosen] == ["32x32", FRAMES, 3, 3.0, 2.0, "0", 16.0]


def test_a_gif_another_size_a_length_in_seconds_and_the_type_of_the_machine(model, tmp_path):
    out = tmp_path / "a.gif"
    flags = ["--size", "48x32", "--seconds", "0.9", "--fps", "10", "--steps", "2", "--guidance", "1"]
    result = call(sample, "--model", model, "--task", "i2v", "--out", out, *flags)
    assert result.status == 0, result.err
    assert media.read_video(out).shape == (3, 9, 32, 48)
    assert _settings(out.with_suffix(".json"))["dtype"] in ("float32", "bfloat16")


def test_without_out_a_free_number_is_taken(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in ("001", "002"):
        result = call(sample, "--model", model, "--task", "t2v", "--dtype", "float32", "--frames", 5)
        assert result.status == 0 and f"t2v-{number}.mp4" in result.out, result
    assert len(list((tmp_path / "outputs").iterdir())) == 6


def test_dry_run_prints_the_tau_table_and_writes_nothing(run, made):
    result = run("--task", "extend", "--dry-run", "--noise", "0,0.3,0.4,0.5")
    assert result.status == 0, result.err
    plan = tasks.plan("extend", 7, noise=(0, 0.3, 0.4, 0.5))
    assert plots.table(tasks.tau_schedule(plan.m, 3, 3.0, plan.d)) in result.out
    assert "transformer 0." not in result.out and small.amounts(result.out), "a small model's memory is in MiB"
    assert "time: about" in result.out and "6 passes" in result.out
    assert made() == []


def test_dry_run_asks_whether_the_lora_is_there_and_fits(run, tmp_path, made):
    mistake(run("--task", "t2v", "--dry-run", "--lora", tmp_path / "no.safetensors"), "no LoRA file at")
    pair = lora.Pair(torch.ones(2, 9), torch.ones(9, 2))
    lora.save(tmp_path / "wide.safetensors", lora.LoRA({"blocks.0.ffn.0": pair}))
    result = run("--task", "t2v", "--dry-run", "--lora", tmp_path / "wide.safetensors")
    mistake(result, "pair blocks.0.ffn.0 has A (2, 9)", "use a LoRA made for a model of this size")
    assert made() == []


def test_dry_run_reads_what_is_given(run, clips, made):
    mistake(run("--task", "extend", "--dry-run", "--video", f"{clips / '00000.mp4'}@0-3"), "a clip of 4 frames")
    assert made() == []


def test_dry_run_shows_every_window(run):
    result = run("--task", "extend", "--dry-run", "--frames", 61)  # 16 latents: 7 + 3 + 3 + 3
    assert result.out.count("step |") == 4


def test_dry_run_counts_the_transformer_where_a_window_begins_from_decoded_frames(run):
    def vae(*frames):
        return small.amounts(re.search(r"VAE .*", run("--task", "extend", "--dry-run", *frames).out)[0])[0] / 2**30

    with mock.patch.object(cost, "_count", lambda module: 2**30 if isinstance(module, Wan) else 0):
        assert vae() < 1 and vae("--frames", 61) > 4


def test_plot_shows_at_most_eight_of_the_steps(run, monkeypatch):
    rows = []
    picture = media.Image.new("RGB", (9, 9))
    monkeypatch.setattr(media, "filmstrip", lambda videos, *_, **__: rows.append(videos) or picture)
    assert run("--task", "t2v", "--plot", "--steps", 15).status == 0
    assert [title for title, _ in rows[1]] == [f"after step {k}" for k in (1, 3, 5, 7, 9, 11, 13, 15)]


def test_two_runs_at_once_do_not_take_one_number(model, monkeypatch, tmp_path):
    """One begins while the other is at work; neither has written a video yet."""
    monkeypatch.chdir(tmp_path)
    generate, results = sample.generate, []
    flags = ["--model", model, "--task", "t2v", "--prompt", "a red circle", "--steps", 1, "--frames", 5]

    def crowded(*arguments):
        monkeypatch.setattr(sample, "generate", generate)
        results.append(call(sample, *flags))
        return generate(*arguments)

    monkeypatch.setattr(sample, "generate", crowded)
    results.append(call(sample, *flags))
    assert [result.status for result in results] == [0, 0], results
    assert "t2v-002.mp4" in results[0].out and "t2v-001.mp4" in results[1].out


def test_many_runs_at_once_claim_as_many_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, names, start = SampleConfig("t2v"), [], threading.Barrier(8)

    def claim():
        start.wait()
        with records.claimed(config) as files:
            names.append(files["video"])
            start.wait()

    threads = [threading.Thread(target=claim) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert sorted(names) == [Path(f"outputs/t2v-{n:03d}.mp4") for n in range(1, 9)]


def test_a_second_run_to_one_file_is_told(run, made, monkeypatch, tmp_path):
    generate = sample.generate

    def crowded(*arguments):
        monkeypatch.setattr(sample, "generate", generate)
        mistake(run("--task", "t2v"), "a.json exists", "another --out")
        return generate(*arguments)

    monkeypatch.setattr(sample, "generate", crowded)
    assert run("--task", "t2v").status == 0 and made() == ["a.json", "a.mp4", "a.png"]


def test_what_cannot_be_written_is_told_before_all_the_work(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "generate", None)
    (tmp_path / "out").write_text("a file")
    mistake(run("--task", "t2v"), str(tmp_path / "out"), "cannot write", "--out")
    (tmp_path / "out").unlink()
    (tmp_path / "out" / "a.mp4").mkdir(parents=True)
    mistake(run("--task", "t2v"), "a.mp4", "another --out")


def test_plot_writes_both_pictures(run, made, tmp_path):
    assert run("--task", "start-end", "--plot").status == 0
    assert made() == ["a-denoising.png", "a-tau.png", "a.json", "a.mp4", "a.png"]
    for name in ("a-denoising.png", "a-tau.png"):
        assert media.read_image(tmp_path / "out" / name).std() > 0.1


def test_mark_borders_what_was_given_and_what_was_generated(run, tmp_path):
    """Of the video alone: the filmstrip has its own borders."""
    for out, flags in (("a.mp4", []), ("b.mp4", ["--mark"]), ("c.gif", ["--mark"])):
        assert run("--task", "extend", *flags, out=out).status == 0
    plain, *marked = (media.read_video(tmp_path / "out" / name) for name in ("a.mp4", "b.mp4", "c.gif"))
    assert (tmp_path / "out" / "a.png").read_bytes() == (tmp_path / "out" / "b.png").read_bytes()
    for video in marked:
        assert video.shape == (3, plain.shape[1], 36, 36)
        assert (video[:, :33, 2:-2, 2:-2] - plain[:, :33]).abs().mean() < 0.1  # noise, as after that, is not well kept
        for n, colour in ((0, media.GIVEN), (32, media.GIVEN), (33, media.GENERATED), (-1, media.GENERATED)):
            border = torch.cat([video[:, n, 0], video[:, n, :, -1]], dim=1).mean(1)
            assert torch.allclose(border, torch.tensor(colour) / 127.5 - 1, atol=0.12), (n, border)


# The network's work.


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """How often the transformer, its prompt keys and the text encoder were run; no prompt is known yet."""
    monkeypatch.setenv("NANOPUSA_CACHE", str(tmp_path / "cache"))
    counts = {"forward": 0, "prompt_keys": 0, "encoder": 0}
    count(monkeypatch, counts, Wan, "forward", "forward")
    count(monkeypatch, counts, Wan, "prompt_keys", "prompt_keys")
    count(monkeypatch, counts, UMT5Encoder, "forward", "encoder")
    return counts


def test_guidance_runs_the_transformer_twice_a_step_and_encodes_prompts_once(run, calls):
    assert run("--task", "t2v", "--steps", 5).status == 0
    assert calls == {"forward": 10, "prompt_keys": 2, "encoder": 2}


def test_guidance_1_runs_the_transformer_once_a_step(run, calls):
    assert run("--task", "t2v", "--steps", 5, "--guidance", 1).status == 0
    assert calls == {"forward": 5, "prompt_keys": 1, "encoder": 2}


def test_a_long_video_encodes_its_prompts_once(run, calls):
    assert run("--task", "extend", "--frames", 37).status == 0
    assert calls == {"forward": 2 * 3 * 2, "prompt_keys": 2, "encoder": 2}


def test_keys_are_kept_of_no_more_prompts_than_are_in_use(model, calls):
    """Of 14B's, a prompt has as many as 400 MB."""
    config, opened = sample.prepare(SampleConfig("t2v", str(model), steps=1, dtype="float32"))
    experts = sample.Experts(config, opened, ["a red circle", "a blue square"])
    x1 = torch.zeros(2, 16, 7, 4, 4)
    experts.walk(experts.prompts, x1, x1, torch.tensor([[1.0] * 7, [0.0] * 7]))
    assert calls["prompt_keys"] == 3 and experts.keys.keys() == {"a blue square", config.negative_prompt}
    experts.clear()
    assert not experts.keys


@torch.no_grad()
def test_guidance_is_linear_in_the_scale(model):
    opened = _open(model)
    transformer = opened.transformer(torch.float32)
    generator = torch.Generator().manual_seed(0)
    z, tau = torch.randn(2, 16, 3, 4, 4, generator=generator), torch.rand(2, 3, generator=generator)
    embed = partial(opened.tokenizer().embed, opened.text_encoder(torch.float32))
    prompts, negative = embed(["a red circle", "a blue square"]), embed(["a white triangle"] * 2)

    def velocity(scale):
        return sample.guided_velocity(transformer, prompts, negative, scale)(z, tau)

    plain, away = velocity(1), velocity(0)
    assert (plain - away).abs().max() > 1e-3
    torch.testing.assert_close(velocity(3), away + 3 * (plain - away))
    alone = sample.guided_velocity(transformer, prompts[1:], negative[1:], 3)(z[1:], tau[1:])
    torch.testing.assert_close(velocity(3)[1:], alone)
    torch.testing.assert_close(plain, transformer(z, tau, prompts))
    keys = sample.guided_velocity(transformer, *map(transformer.prompt_keys, (prompts, negative)), 3)
    assert torch.equal(keys(z, tau), velocity(3))


# What a condition sees, and what becomes of it.


@torch.no_grad()
def test_history_guidance_leads_away_from_the_video_without_its_conditions():
    """v = v(c, h) + (w_c - 1) [v(c, h) - v(∅, h)] + (w_h - 1) [v(c, h) - v(c, ∅)], and equal weights share a run."""
    calls = []

    class Network:
        def prompt_keys(self, context):
            return context

        def __call__(self, z, tau, keys):
            calls.append(None)
            return z * (1 + tau[:, None, :, None, None]) + keys.mean()

    z, x1 = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    tau, c, away = torch.tensor([[0.2, 0.9, 0.9]]).expand(2, -1), torch.ones(2, 4, 8), torch.zeros(2, 4, 8)
    free, free_tau = torch.cat([x1[:, :, :1], z[:, :, 1:]], 2), torch.tensor([[1.0, 0.9, 0.9]]).expand(2, -1)
    network = Network()
    v, unprompted, unconditioned = network(z, tau, c), network(z, tau, away), network(free, free_tau, c)
    neither = network(free, free_tau, away)
    for weights, expected in (
        ((1, 1), v), ((3, 1), unprompted + 3 * (v - unprompted)), ((1, 2), v + (v - unconditioned)),
        ((3, 2), unprompted + 3 * (v - unprompted) + (v - unconditioned)), ((3, 3), neither + 3 * (v - neither)),
    ):  # fmt: skip
        calls.clear()
        led = sample.guided_velocity(network, c, away, *weights, torch.tensor([0.2, 1, 1]), x1)(z, tau)
        torch.testing.assert_close(led, expected)
        assert len(calls) == sample.passes_a_step(*weights)
    for nothing_given in (None, torch.ones(3), torch.full((3,), 0.7)):  # `restyle` has a clip, but no frame is ahead
        led = sample.guided_velocity(network, c, away, 3, 3, nothing_given, x1)(z, tau)
        torch.testing.assert_close(led, unprompted + 3 * (v - unprompted))


@pytest.mark.parametrize("context_noise, told", [(0, 0.2), (0.1, 0.2), (0.5, 0.4), (1, 0.8)])
@pytest.mark.parametrize("guidance, history", [(1, 1), (3, 1), (3, 2), (3, 3)])
def test_context_noise_is_told_to_the_network_and_not_added(context_noise, told, guidance, history):
    """The conditions' level is at least a share of the highest, but where history guidance has freed them."""
    heard = []

    class Network:
        def prompt_keys(self, context):
            return context

        def __call__(self, z, tau, keys):
            heard.append((tau[0].tolist(), torch.equal(z, given)))
            return z

    given, x1, c = torch.randn(1, 16, 3, 4, 4), torch.randn(1, 16, 3, 4, 4), torch.ones(1, 4, 8)
    tau, m = torch.tensor([[0.2, 0.8, 0.1]]), torch.tensor([0.25, 1, 1])  # the last one is free, and nearly done
    sample.guided_velocity(Network(), c, c, guidance, history, m, x1, context_noise)(given, tau)
    with_conditions = [pytest.approx(levels) for levels, kept in heard if kept]
    assert with_conditions == [[told, 0.8, 0.1]] * (2 if guidance != 1 and history != guidance else 1)
    assert all(levels == pytest.approx([1, 0.8, 0.1]) for levels, kept in heard if not kept)


def test_context_noise_changes_a_video_and_is_told(run, tmp_path):
    files = [tmp_path / f"{name}.mp4" for name in ("none", "half")]
    told = [run("--task", "i2v", "--context-noise", c, "--out", f).err for c, f in zip((0, 0.5), files, strict=True)]
    assert "context noise" not in told[0] and "context noise 0.5" in told[1]
    assert files[0].read_bytes() != files[1].read_bytes()
    mistake(run("--context-noise", 1.5), "--context-noise 1.5", "[0, 1]")


@pytest.mark.parametrize(
    ("task", "hidden"),
    [("complete", slice(5, 16)), ("extend", slice(0, 12)), ("prepend", slice(17, 25)), ("stream", slice(0, 12))],
)
def test_frames_that_a_task_hides_change_nothing(task, hidden, model, clips):
    """`complete` keeps 2 latents at each end: 5 frames, and 8 with the one before them."""
    video = scene_video(0, FRAMES)[None]
    flags = {"video": (str(clips / "00000.mp4"),)}
    first = _latents(model, task, video, **flags)
    other = video.clone()
    other[:, :, hidden] = torch.rand_like(other[:, :, hidden]) * 2 - 1
    assert torch.equal(_latents(model, task, other, **flags), first)
    edges = {hidden.start - 1, hidden.stop} & set(range(FRAMES))
    for edge in edges:
        other = video.clone()
        other[:, :, edge] *= -1
        assert not torch.equal(_latents(model, task, other, **flags), first), f"frame {edge} is given"


@pytest.mark.parametrize(("task", "heads", "tails"), [("extend", 0, 1), ("transition", 1, 1), ("restyle", 1, 0)])
def test_of_a_video_only_what_is_needed_is_kept(task, heads, tails, model):
    config, job = _laid_out(task=task, model=str(model), frames=17)
    plan = job.plans[0]
    inputs = sample.read_inputs(config, plan)
    assert [sum(slot.source == end for slot in plan.slots) for end in ("head", "tail")] == [heads, tails]
    for slot, pixels in zip(plan.slots, inputs, strict=True):
        assert pixels.shape[2] == slot.frames < world.FRAMES and pixels.untyped_storage().nbytes() == pixels.nbytes


@torch.no_grad()
@pytest.mark.parametrize("task", ["i2v", "start-end", "extend", "prepend", "complete", "transition", "keyframes"])
def test_clean_conditions_are_kept_to_the_bit(task, model):
    config, job = _laid_out(task=task, model=str(model), dtype="float32")
    vae, inputs = _open(model).vae(), sample.read_inputs(config, job.plans[0])
    latents = _latents(model, task)
    x0 = sample.conditions(vae, job.plans[0], inputs, latents)
    given = [position for slot in job.plans[0].slots for position in slot.positions]
    assert given and torch.equal(latents[:, :, given], x0[:, :, given])
    free = [i for i in range(7) if i not in given]
    assert (x0[:, :, free] == 0).all() and (latents[:, :, free].std() > 0.1)


def test_noise_lets_a_condition_change(model):
    clean, noisy = (_latents(model, "i2v", noise=noise) for noise in ("0", "0.5"))
    change = (clean - noisy)[:, :, 0].abs().max()
    assert 0 < change
    assert change < (_latents(model, "i2v", noise="1") - clean)[:, :, 0].abs().max(), "1 leaves nothing of it"


@pytest.fixture
def windows(monkeypatch):
    """The state that each window starts from and the one it ends with."""
    walked, euler = [], flow.euler

    def spy(velocity, z, taus, on_step=None):
        end = euler(velocity, z, taus, on_step)
        walked.append((z, end))
        return end

    monkeypatch.setattr(flow, "euler", spy)
    return walked


@torch.no_grad()
@pytest.mark.parametrize("frames", [33, 49])  # F = 9, of which one latent too many is made, and 13: three windows
@pytest.mark.parametrize(("task", "clip"), [("extend", True), ("stream", True), ("stream", False)])
def test_a_long_video_goes_on_from_the_latents_before(task, clip, frames, model, clips, windows):
    flags = {"video": (str(clips / "00001.mp4"),)} if clip else {"prompt": "a red circle"}
    latents = _latents(model, task, frames=frames, **flags)
    F = tasks.latent_frames(frames)
    assert latents.shape == (1, 16, F, 4, 4) and latents.isfinite().all()
    made = windows[0][1]
    assert len(windows) == 1 + -(-(F - 7) // 3)
    vae = _open(model).vae()
    if clip:
        config, job = _laid_out(task=task, model=str(model), frames=frames, **flags)
        plan = job.plans[0]
        x0 = sample.conditions(vae, plan, sample.read_inputs(config, plan), made)
        assert torch.equal(latents[:, :, :4], x0[:, :, :4]), "the first window keeps what it is given"
    for start, end in windows[1:]:
        # The newer half as it is; the older half anew, as a window begins with the latent of a lone frame.
        pixels = vae.decode(made[:, :, -7:])[:, :, -13:]
        assert torch.equal(start[:, :, 2:4], made[:, :, -2:]) and torch.equal(end[:, :, :4], start[:, :, :4])
        torch.testing.assert_close(start[:, :, :2], vae.encode(pixels[:, :, :5]))
        assert not torch.equal(end[:, :, 4:], windows[0][1][:, :, 4:]), "each window has its own noise"
        made = torch.cat([made, end[:, :, 4:]], dim=2)
    assert torch.equal(latents, made[:, :, :F])


@torch.no_grad()
@pytest.mark.parametrize("frames", [33, 37, 41])  # F = 9, 10, 11 of windows that add 2
def test_a_long_prepend_keeps_the_clip_at_the_end(frames, model, clips, windows):
    flags = {"video": (str(clips / "00001.mp4"),)}
    latents = _latents(model, "prepend", frames=frames, **flags)
    F = tasks.latent_frames(frames)
    assert latents.shape == (1, 16, F, 4, 4)
    config, job = _laid_out(task="prepend", model=str(model), frames=frames, **flags)
    inputs = sample.read_inputs(config, job.plans[0])
    x0 = sample.conditions(_open(model).vae(), job.plans[0], inputs, windows[0][1])
    assert torch.equal(latents[:, :, -4:], x0[:, :, -4:])
    for (_, later), (start, end) in zip(windows, windows[1:], strict=False):
        # The first latent of a window is a lone frame: only the four after it may stand in the middle of a video.
        assert torch.equal(end[:, :, -4:], later[:, :, 1:5]) and torch.equal(end[:, :, -4:], start[:, :, -4:])
    assert torch.equal(latents[:, :, :1], windows[-1][1][:, :, :1]), "the video begins with a lone frame"
    assert job.given == [False] * (frames - 16) + [True] * 16


def test_a_window_goes_on_from_as_much_as_the_first_was_given(model, clips):
    flags = {"video": (str(clips / "00001.mp4"),), "noise": "0,0.3", "frames": 45}  # 12 latents: 7 and 5 more
    _, job = _laid_out(task="extend", model=str(model), **flags)
    expected = torch.tensor([0, 0.3, 1, 1, 1, 1, 1])
    assert len(job.plans) == 2 and all(torch.equal(plan.m, expected) for plan in job.plans)
    assert _latents(model, "extend", **flags).shape[2] == 12


def test_given_frames_of_the_tasks(model):
    def given(task, **changes):
        _, job = _laid_out(task=task, model=str(model), **changes)
        return [n for n, mark in enumerate(job.given) if mark]

    assert given("t2v") == []
    assert given("i2v") == [0]
    assert given("start-end") == [0, 21, 22, 23, 24]
    assert given("extend", frames=37) == list(range(13))
    assert given("complete") == [*range(5), *range(17, 25)]
    assert given("keyframes") == [0, 9, 10, 11, 12, 21, 22, 23, 24]


# Shapes, whole clips, stretches of clips.


def _size(run, tmp_path, *flags, out="s.mp4"):
    result = run("--task", *flags, "--overwrite", "--steps", 1, out=out)
    assert result.status == 0, result.err
    return _settings(tmp_path / "out" / Path(out).with_suffix(".json"))["size"], result.err


def test_a_video_has_the_shape_of_what_is_given_first(run, tmp_path, clips):
    """At the model's number of pixels, as in training: 30x60 goes into 32x48 where the model has 32x32."""
    portrait, wide = tmp_path / "portrait.png", tmp_path / "wide.mp4"
    media.save_image(portrait, torch.rand(3, 60, 30) * 2 - 1)
    media.write_video(wide, torch.rand(3, 33, 32, 64) * 2 - 1, 16)
    square = f"{clips / '00000.mp4'}@0"
    assert _size(run, tmp_path, "i2v", "--image", portrait)[0] == "32x48"
    assert media.read_video(tmp_path / "out" / "s.mp4").shape[2:] == (48, 32)
    assert _size(run, tmp_path, "extend", "--video", wide)[0] == "48x32"
    assert _size(run, tmp_path, "i2v", "--image", portrait, "--size", "32x32") == ("32x32", mock.ANY)
    assert _size(run, tmp_path, "t2v")[0] == "32x32"
    size, err = _size(run, tmp_path, "start-end", "--image", portrait, square)
    assert size == "32x48" and f"{square} is cropped to the shape of {portrait}, 32x48" in err
    assert "cropped" not in _size(run, tmp_path, "start-end", "--image", square, square)[1]
    assert call(sample, "--from-json", tmp_path / "out" / "s.json", "--out", tmp_path / "again.mp4").status == 0
    assert (tmp_path / "again.mp4").read_bytes() == (tmp_path / "out" / "s.mp4").read_bytes()


def _psnr(a, b):
    return (10 * torch.log10(4 / (a - b).pow(2).mean())).item()


def _made(run, tmp_path, *flags, out="w.mp4"):
    result = run(*flags, "--steps", 1, "--overwrite", out=out)
    assert result.status == 0, result.err
    record = json.loads((tmp_path / "out" / out).with_suffix(".json").read_text())
    return media.read_video(tmp_path / "out" / out), record["given"]


@pytest.mark.parametrize("frames", [25, 37])
def test_extend_and_prepend_show_the_whole_clip(frames, run, clips, tmp_path):
    """A clip of another size and rate is brought to the size and the rate of what is made."""
    path = tmp_path / "other.mp4"
    media.write_video(path, media.resize_crop(world.render(world_scene(), 60), (48, 48)), 24)
    clip = media.read_video(path, (32, 32), 16)
    n = clip.shape[1]
    flags = ["--video", path, "--frames", frames, "--prompt", ""]
    new, given = _made(run, tmp_path, "--task", "extend", *flags, "--only-new")
    assert new.shape[1] == frames and given == [[0, 12]]
    video, given = _made(run, tmp_path, "--task", "extend", *flags)
    assert video.shape == (3, n + frames - 13, 32, 32) and given == [[0, n - 1]]
    assert _psnr(video[:, :n], clip) > 30 and _psnr(video[:, n:], new[:, 13:]) > 30
    assert _psnr(clip[:, -13:], new[:, :13]) < 25, "of the window, what was given is not shown: it was decoded"

    new, given = _made(run, tmp_path, "--task", "prepend", *flags, "--only-new")
    assert new.shape[1] == frames and given == [[frames - 16, frames - 1]]
    video, given = _made(run, tmp_path, "--task", "prepend", *flags)
    assert video.shape == (3, frames - 17 + n, 32, 32) and given == [[frames - 17, frames - 18 + n]]
    assert _psnr(video[:, frames - 17 :], clip) > 30 and _psnr(video[:, : frames - 17], new[:, : frames - 17]) > 30


def world_scene():
    return next(iter(world.scenes(1, seed=7)))


def test_noisy_conditions_are_shown_as_they_became(run, clips, tmp_path):
    clip = media.read_video(clips / "00001.mp4")
    flags = ["--task", "extend", "--video", clips / "00001.mp4", "--noise", "0,0,0.4,0.5"]
    new, _ = _made(run, tmp_path, *flags, "--only-new")
    video, given = _made(run, tmp_path, *flags)
    assert video.shape[1] == 45 and given == [[0, 32]]
    assert _psnr(video[:, :25], clip[:, :25]) > 30, "up to the clean ones, and with them: frames 0 to 4 of the window"
    assert _psnr(video[:, 25:], new[:, 5:]) > 30


def test_a_long_clip_is_never_all_in_memory(run, clips, tmp_path, monkeypatch):
    path, alive, most = tmp_path / "long.mp4", weakref.WeakSet(), []
    media.write_video(path, torch.zeros(3, 300, 32, 32), 16)
    convert = media._Video.convert

    class Frame:
        pass

    def counted(self, frame, size):
        image, token = convert(self, frame, size), Frame()
        image.token = token
        alive.add(token)
        most.append(len(alive))
        return image

    monkeypatch.setattr(media._Video, "convert", counted)
    assert run("--task", "extend", "--video", path, "--steps", 1).status == 0
    assert len(most) > 300 and max(most) < 60
    assert media.read_video(tmp_path / "out" / "a.mp4").shape[1] == 312 and max(most) > 300, "as here"


def _with_tone(path, frames=33, fps=16, start=1.0):
    """A clip of grey frames whose sound is silence and then, from `start` seconds on, a tone."""
    with av.open(str(path), "w") as container:
        video, sound = container.add_stream("libx264", rate=fps), container.add_stream("aac", rate=48000, layout="mono")
        video.width = video.height = 32
        for k in range(frames):
            pixels = np.full((32, 32, 3), 4 * k, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        time = np.arange(round(48000 * frames / fps)) / 48000
        tone = (np.sin(2 * np.pi * 440 * time) * (time >= start)).astype(np.float32)
        fifo = av.AudioFifo()
        frame = av.AudioFrame.from_ndarray(tone[None] / 2, format="fltp", layout="mono")
        frame.sample_rate = 48000
        fifo.write(frame)
        while piece := fifo.read(1024, partial=True):
            container.mux(sound.encode(piece))
        container.mux(sound.encode())
    return path


def _tone(path):
    """When the sound of a clip begins to be heard, and when it ends; None without a sound."""
    with av.open(str(path)) as container:
        if not container.streams.audio:
            return None
        pieces = [(frame.time, frame.to_ndarray()[0], frame.sample_rate) for frame in container.decode(audio=0)]
    loud = [(time, np.flatnonzero(abs(wave) > 0.1) / rate) for time, wave, rate in pieces if abs(wave).max() > 0.1]
    return loud[0][0] + loud[0][1][0], loud[-1][0] + loud[-1][1][-1]


def test_the_sound_of_the_clip_stays_at_its_time(run, tmp_path):
    path = _with_tone(tmp_path / "tone.mp4")
    for flags, before in (
        (["extend"], 0),
        (["prepend"], 8 / 16),
        (["retake", "--between", "0.5,1"], 0),
        (["extend", "--video", f"{path}@8-32"], -8 / 16),
    ):
        assert run("--task", *flags[:1], "--video", path, *flags[1:], "--prompt", "", "--overwrite").status == 0
        begin, end = _tone(tmp_path / "out" / "a.mp4")
        assert begin == pytest.approx(1 + before, abs=0.05) and end == pytest.approx(33 / 16 + before, abs=0.07), flags
        first = (tmp_path / "out" / "a.mp4").read_bytes()
    assert run("--task", *flags[:1], *flags[1:], "--prompt", "", "--overwrite").status == 0
    assert (tmp_path / "out" / "a.mp4").read_bytes() == first, "equal input gives equal bytes"
    assert run("--task", "extend", "--video", path, "--only-new", out="b.mp4").status == 0
    assert run("--task", "extend", "--video", path, out="c.gif").status == 0
    assert _tone(tmp_path / "out" / "b.mp4") is None and _tone(tmp_path / "out" / "c.gif") is None


def test_a_retake_makes_a_stretch_again_and_keeps_the_rest(run, model, clips, tmp_path):
    path = tmp_path / "long.mp4"
    media.write_video(path, world.render(world_scene(), 80), 16)
    clip = media.read_video(path, (32, 32))
    flags = ["--task", "retake", "--video", path, "--between", "2,3", "--strength", 0.9, "--prompt", ""]
    video, given = _made(run, tmp_path, *flags)
    assert video.shape == clip.shape and given == [[0, 31], [48, 79]]
    outside = [*range(32), *range(48, 80)]
    assert _psnr(video[:, outside], clip[:, outside]) > 30 and _psnr(video[:, 32:48], clip[:, 32:48]) < 25
    new, _ = _made(run, tmp_path, *flags, "--only-new")
    assert new.shape[1] == FRAMES, "the window has the stretch in its middle: frames 27 to 51 of the clip"
    assert _psnr(video[:, 32:48], new[:, 5:21]) > 30

    config, job = _laid_out(task="retake", model=str(model), video=(str(path),), between="2,3", strength=0.9)
    assert job.plans[0].m.tolist() == pytest.approx([0, 0, 0.9, 0.9, 0.9, 0.9, 0])
    (pixels,) = sample.read_inputs(config, job.plans[0])
    torch.testing.assert_close(pixels[0], clip[:, 27:52])
    config, job = _laid_out(task="retake", model=str(model), video=(str(path),), between="0,0.5")
    assert job.around.start == 0 and job.plans[0].m[:3].min() > 0 and (job.plans[0].m[3:] == 0).all()
    short = tmp_path / "short.mp4"
    media.write_video(short, scene_video(0, 15), 16)
    config, job = _laid_out(task="retake", model=str(model), video=(str(short),), between="0.2,0.5")
    assert config.frames == 13 and job.around.frames == 15, "no more than the clip has, unless --frames asks for more"


def test_clips_and_images_are_keyframes_together(model, clips):
    a, b = str(clips / "00001.mp4"), str(clips / "00002.mp4")
    flags = {"image": (f"{a}@30",), "video": (f"{a}@4-8", f"{b}@10-18"), "at": "6,0,3"}
    config, job = _laid_out(task="keyframes", model=str(model), dtype="float32", **flags)
    assert [slot.positions for slot in job.plans[0].slots] == [(6,), (0, 1), (3, 4)]
    first, second = media.read_video(a), media.read_video(b)
    inputs = sample.read_inputs(config, job.plans[0])
    assert torch.equal(inputs[1][0], first[:, 4:9]) and torch.equal(inputs[2][0], second[:, 10:19])
    latents = _latents(model, "keyframes", **flags)
    x0 = sample.conditions(_open(model).vae(), job.plans[0], inputs, latents)
    assert torch.equal(latents[:, :, [0, 1, 3, 4, 6]], x0[:, :, [0, 1, 3, 4, 6]])


@torch.no_grad()
def test_an_end_image_is_a_group_or_alone(model, clips):
    flags = {"image": (f"{clips / '00001.mp4'}@0", f"{clips / '00001.mp4'}@32")}
    vae, image = _open(model).vae(), media.read_image(flags["image"][1])[None, :, None]
    alone, group = vae.encode(image), vae.encode(image.expand(-1, -1, 5, -1, -1))[:, :, 1:]
    assert (alone - group).abs().max() > 1e-3
    for how, expected in ((None, group), ("group", group), ("lone", alone)):
        latents = _latents(model, "start-end", **flags, **({"end_latent": how} if how else {}))
        torch.testing.assert_close(latents[:, :, -1:], expected)
    assert torch.equal(_latents(model, "i2v", image=flags["image"][:1], end_latent="lone"),
                       _latents(model, "i2v", image=flags["image"][:1]))  # fmt: skip


# LoRAs.


def test_strength_0_is_the_model_alone(model):
    alone = _latents(model, "t2v", no_lora=True)
    assert torch.equal(_latents(model, "t2v", lora=(f"{model / 'lora.safetensors'}:0",)), alone)
    own = _latents(model, "t2v")
    assert (own - alone).abs().max() > 1e-2, "the LoRA of the folder is merged unless told otherwise"
    assert torch.equal(_latents(model, "t2v", lora=(str(model / "lora.safetensors"),)), own), "at the preset's strength"


def test_loras_add_up(model, tmp_path):
    base = _open(model).transformer()
    one, other = random_lora(base, seed=2), random_lora(base, seed=3)
    paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for path, pairs in zip(paths, (one, other), strict=True):
        lora.save(path, pairs)
    flags = {"lora": (f"{paths[0]}:0.5", f"{paths[1]}:-0.25"), "model": str(model), "dtype": "float32"}
    merged = sample.Experts(*sample.prepare(SampleConfig(task="t2v", **flags)), []).load("high")
    for name, (A, B, _) in one.pairs.items():
        expected = base.get_submodule(name).weight + 0.5 * B @ A - 0.25 * other.pairs[name].B @ other.pairs[name].A
        torch.testing.assert_close(merged.get_submodule(name).weight, expected)

    twice = _latents(model, "t2v", lora=(f"{paths[0]}:0.5", f"{paths[0]}:0.5"))
    torch.testing.assert_close(twice, _latents(model, "t2v", lora=(f"{paths[0]}:1",)), atol=1e-3, rtol=1e-3)
    assert (twice - _latents(model, "t2v", lora=(f"{paths[0]}:0.5",))).abs().max() > 1e-2


def test_a_colon_may_be_part_of_a_path(model, tmp_path):
    folder = tmp_path / "c:d"
    folder.mkdir()
    shutil.copy(model / "lora.safetensors", folder / "a.safetensors")
    own = _latents(model, "t2v")
    assert torch.equal(_latents(model, "t2v", lora=(str(folder / "a.safetensors"),)), own)
    assert torch.equal(_latents(model, "t2v", lora=(f"{folder / 'a.safetensors'}:1.0",)), own)


def test_several_loras_in_one_run(run, model, tmp_path):
    lora.save(tmp_path / "one.safetensors", random_lora(_open(model).transformer(), seed=2))
    one, own = f"{tmp_path / 'one.safetensors'}:0.5", str(model / "lora.safetensors")
    for name, loras in (("a", ["--lora", one, "--lora", own]), ("b", ["--lora", one, own]), ("c", ["--lora", one])):
        assert run("--task", "t2v", *loras, out=f"{name}.mp4").status == 0
    a, b, c = ((tmp_path / "out" / f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b != c
    assert _settings(tmp_path / "out" / "a.json")["lora"] == [one, f"{own}:1"]


@pytest.fixture
def pusa(model, tmp_path):
    """A LoRA for the miniature model, as Pusa's authors would publish it."""
    pairs, path = random_lora(_open(model).transformer(), seed=2, rank=512).pairs, tmp_path / "pusa.pt"
    torch.save({f"{name}.lora_{p}.default.weight": getattr(pairs[name], p) for name in pairs for p in "AB"}, path)
    return path


def test_a_lora_without_a_strength_gets_the_usual_one(run, model, two, pusa, tmp_path):
    """Its own for the model's, what Pusa publishes for Pusa's files, and 1 for others, whatever the preset."""
    folder = shutil.copytree(two, tmp_path / "own")
    checkpoint.save_pipeline(folder, {}, dataclasses.replace(_open(two).preset, strength=1.7))
    other = tmp_path / "other.safetensors"
    lora.save(other, random_lora(_open(model).transformer(), seed=3))
    names = [str(folder / "lora.safetensors"), f"high={pusa}", f"low={pusa}", str(pusa), str(other), f"{other}:0.3"]
    expected = [f"{name}:{x}" for name, x in zip(names, (1.7, 1.5, 1.4, 1.4, 1), strict=False)] + names[-1:]
    for preset in ([], ["--preset", "lightx2v"], ["--preset", "wan", "--steps", "2"]):
        result = run("--task", "t2v", "--model", folder, "--frames", 5, "--lora", *names, *preset, "--overwrite")
        assert result.status == 0, result.err
        assert _settings(tmp_path / "out" / "a.json")["lora"] == expected
        assert f"LoRA {', '.join(expected)}" in result.err, "it is told"
    assert run("--task", "t2v", "--model", folder, "--frames", 5, out="b.mp4").status == 0
    assert _settings(tmp_path / "out" / "b.json")["lora"] == expected[:1]


def test_a_lora_that_is_not_there_is_told_by_a_dry_run(run):
    mistake(run("--task", "t2v", "--lora", "none.pt:1.4", "--dry-run"), "no LoRA file at none.pt")


# Memory: what is loaded when, and kept.


@pytest.fixture
def alive(monkeypatch):
    """For each part that is loaded: its name and which of those before it were still there."""
    parts, loads = {}, []

    def note(name):
        loads.append((name, {other for other, part in parts.items() if part() is not None}))

    def watch(owner, method, name=None):
        original = getattr(owner, method)

        def watched(*arguments, **settings):
            what = name or arguments[3]  # of two experts, which
            note(what)
            part = original(*arguments, **settings)
            parts[what] = weakref.ref(part or arguments[0])  # what is built returns nothing
            return part

        monkeypatch.setattr(owner, method, watched)

    watch(checkpoint.Opened, "vae", "vae")
    watch(checkpoint.Opened, "transformer")
    watch(UMT5Encoder, "__init__", "text_encoder")
    decode = sample.decode
    monkeypatch.setattr(sample, "decode", lambda *arguments: note("decode") or decode(*arguments))
    return loads


def test_only_the_part_whose_turn_it_is_is_in_memory(run, calls, alive):
    assert run("--task", "i2v").status == 0
    assert alive == [
        ("vae", set()),
        ("text_encoder", {"vae"}),
        ("high", {"vae"}),
        ("decode", {"vae"}),
    ]


def test_a_prompt_is_encoded_once_ever(run, calls, alive, model, tmp_path):
    def encoded(*flags, of=model):
        before = len([name for name, _ in alive if name == "text_encoder"]), calls["encoder"]
        assert run("--task", "t2v", "--steps", 1, "--model", of, "--overwrite", *flags).status == 0
        return len([name for name, _ in alive if name == "text_encoder"]) - before[0], calls["encoder"] - before[1]

    assert encoded() == (1, 2)
    first = (tmp_path / "out" / "a.mp4").read_bytes()
    assert encoded() == (0, 0) and (tmp_path / "out" / "a.mp4").read_bytes() == first, "the same bits as the first time"
    assert encoded("--prompt", "a red circle") == (1, 1), "a new prompt, but the negative one is known"
    assert encoded("--dtype", "bfloat16") == (1, 2)
    other = shutil.copytree(model, tmp_path / "other")
    assert encoded(of=other) == (0, 0), "the same encoder, elsewhere"
    path = other / "text_encoder" / "model.safetensors"
    state = load_file(path)
    path.unlink()
    save_file({name: tensor * 2 for name, tensor in state.items()}, path)
    assert encoded(of=other) == (1, 2), "another encoder"
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 7 and all(load_file(file)["tensor"].shape[0] < 32 for file in files), "without the padding"


def test_offload_gives_the_same_video(run, tmp_path):
    for name, flags in (("a.mp4", []), ("b.mp4", ["--offload"])):
        assert run("--task", "i2v", *flags, out=name).status == 0
    assert (tmp_path / "out" / "a.mp4").read_bytes() == (tmp_path / "out" / "b.mp4").read_bytes()
    assert _settings(tmp_path / "out" / "b.json")["offload"]


def test_offload_leaves_the_blocks_to_the_cpu(model):
    config, opened = sample.prepare(sample.SampleConfig(task="t2v", model=str(model), offload=True))
    experts = sample.Experts(config, opened, [])
    experts.config = dataclasses.replace(config, device="meta")
    for name, parameter in experts.load("high").named_parameters():
        assert parameter.device.type == ("cpu" if name.startswith("blocks.") else "meta"), name


def test_compile_compiles_every_block(run, monkeypatch, tmp_path):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(type(f.__self__).__name__) or f)
    assert run("--task", "t2v", "--compile", "--steps", 1).status == 0
    assert compiled == ["Block", "Block"]


def test_dry_run_tells_the_memory_of_each_stage_from_configs_alone(run, made, model, tmp_path):
    """Weights would not be as many as the configs say: they are not there at all."""
    large = tmp_path / "large"
    shutil.copytree(model, large, ignore=shutil.ignore_patterns("*.safetensors"))
    for part, sizes in (("transformer", {"num_layers": 50}), ("text_encoder", {"d_ff": 320000})):
        path = large / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | sizes))
    result = run("--task", "t2v", "--dry-run", "--model", large)
    assert result.status == 0, result.err
    wan, vae, encoder = (sum(p.numel() for p in part.parameters()) for part in _open(large).outline())

    def gibibytes(result):
        lines = [line for line in result.out.splitlines() if "text encoder" in line]
        return [[amount / 2**30 for amount in small.amounts(line)] for line in lines]

    figures = gibibytes(result)  # the second line is with --offload
    assert figures[0][0] == pytest.approx(4 * encoder / 2**30, abs=0.01) and figures[1][0] == 0
    assert figures[0][1] > 4 * wan / 2**30 > figures[1][1], "two of 50 blocks"
    wide = gibibytes(run("--task", "t2v", "--dry-run", "--model", large, "--size", "832x480", "--frames", 81))
    decoding = _open(large).outline()[1].decoding_bytes(21, 480, 832) + 3 * 4 * 81 * 480 * 832
    assert wide[0][2] == wide[1][2] == pytest.approx((4 * vae + decoding) / 2**30, abs=0.01) and wide[0][2] > 1
    assert made() == []


# Two experts.


def write_original(folder, model, shards=1):
    """A transformer as the authors of Wan publish theirs."""
    wan = _open(model).transformer()
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(wan.config)))
    state, stem = wan.state_dict(), "diffusion_pytorch_model"
    for i in range(shards):
        name = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else f"{stem}.safetensors"
        save_file({name: state[name] for name in sorted(state)[i::shards]}, folder / name)


def write_beside(folder, model):
    """The other parts, in pickled files."""
    torch.save(_open(model).vae().state_dict(), folder / checkpoint.VAE_FILE)
    torch.save(_open(model).text_encoder().state_dict(), folder / checkpoint.TEXT_FILE)
    shutil.copytree(model / "tokenizer", folder / "google" / "umt5-xxl")


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """The model with a second transformer for low noise, whose velocity is the first one's times -1."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("two") / "model")
    shutil.copytree(folder / "transformer", folder / "transformer_2")
    path = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    path.unlink()
    save_file({name: -tensor if name.startswith("proj_out") else tensor for name, tensor in state.items()}, path)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer_2"] = index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": 0.875}))
    return folder


@pytest.fixture
def walked(monkeypatch):
    """Of each part of a walk, the steps that it takes."""
    steps, euler = [], flow.euler

    def spy(velocity, z, taus, on_step=None):
        steps.append(len(taus) - 1)
        return euler(velocity, z, taus, on_step)

    monkeypatch.setattr(flow, "euler", spy)
    return steps


@pytest.mark.parametrize(
    "flags, steps",
    [
        (["--steps", 30, "--shift", 5], [13, 17]),
        (["--steps", 4, "--shift", 5], [2, 2]),
        (["--steps", 4, "--shift", 5, "--boundary", 0.9375], [2, 2]),
        (["--steps", 4, "--shift", 5, "--boundary", 0.94], [1, 3]),
        (["--steps", 4, "--boundary", 0], [4]),
        (["--steps", 4, "--task", "i2v", "--noise", "0.3", "--shift", 5], [2, 2]),
        (["--steps", 4, "--task", "restyle", "--strength", 0.7, "--shift", 5], [4]),  # no frame is ever above 0.7
        (["--steps", 4, "--task", "stream", "--shift", 5], [2, 2]),  # here all frames go together
    ],
)
def test_the_low_noise_expert_takes_the_steps_below_the_boundary(flags, steps, run, two, walked):
    result = run(
        "--task", "t2v", "--model", two, "--frames", 5 if "stream" not in flags else 25, "--guidance", 1, *flags
    )
    assert result.status == 0, result.err
    assert walked == steps


def test_each_expert_takes_its_own_guidance_and_loras(run, two, model, calls, tmp_path):
    lora.save(tmp_path / "one.safetensors", random_lora(_open(model).transformer(), seed=2))
    one, own = tmp_path / "one.safetensors", model / "lora.safetensors"
    flags = ["--task", "t2v", "--model", two, "--steps", 4, "--shift", 5, "--boundary", 0.9, "--guidance-2", 1]
    assert run(*flags, "--lora", f"high={one}:0.5", f"low={own}", f"{one}:0.25").status == 0
    assert calls["forward"] == 2 * 2 + 2
    settings = _settings(tmp_path / "out" / "a.json")
    assert settings["lora"] == [f"high={one}:0.5", f"low={own}:1", f"{one}:0.25"]
    assert (settings["guidance"], settings["guidance_2"], settings["boundary"]) == (2.0, 1.0, 0.9)

    config, opened = sample.prepare(SampleConfig(model=str(two), dtype="float32", lora=tuple(settings["lora"])))
    change, other = (lora.load(path).pairs["blocks.0.ffn.0"] for path in (one, own))
    base = _open(model).transformer().blocks[0].ffn[0].weight
    experts = sample.Experts(config, opened, [])
    high, low = (experts.load(name).blocks[0].ffn[0].weight for name in ("high", "low"))
    torch.testing.assert_close(high, base + 0.75 * change[1] @ change[0])
    torch.testing.assert_close(low, base + 0.25 * change[1] @ change[0] + other[1] @ other[0])


def test_guidance_is_history_guidance_too_where_the_model_has_one_weight_for_both(model, run, tmp_path):
    folder = shutil.copytree(model, tmp_path / "guided")

    def guidances(**flags):
        config, _ = sample.prepare(SampleConfig(task="t2v", model=str(folder), **flags))
        return config.guidance, config.history_guidance

    preset = dataclasses.replace(_open(model).preset, guidance=3.0)
    for own, changed in ((1.0, (5, 1)), (3.0, (5, 5))):
        checkpoint.save_pipeline(folder, {}, dataclasses.replace(preset, history_guidance=own))
        assert guidances() == (3, own) and guidances(guidance=5.0) == changed
        assert guidances(guidance=5.0, history_guidance=2.0) == (5, 2) and guidances(history_guidance=2.0) == (3, 2)
    flags = ["--task", "extend", "--model", folder, "--frames", 21, "--steps", 1, "--sweep", "guidance=1,2"]
    assert run(*flags).status == 0
    found = {_settings(path)["history_guidance"] for path in (tmp_path / "out").rglob("*.json")}
    assert found == {None, 1, 2}, "each cell is settled by itself, and the sheet's record leaves it to them"
    record = tmp_path / "out" / "a-guidance=2.json"
    assert _settings(record)["history_guidance"] == 2
    for flags, expected in ((("--guidance", 1), "guidance 1, LoRA"), (("--preset", "lightx2v"), "guidance 1, LoRA"),
                            (("--guidance", 4), "guidance 4, history guidance 4,")):  # fmt: skip
        assert expected in call(sample, "--from-json", record, *flags, "--dry-run").out, "neither is that of the record"
    checkpoint.save_pipeline(folder, {}, dataclasses.replace(preset, guidance=1.0, history_guidance=1.0))
    assert guidances(guidance=5.0) == (5, 1), "a model without guidance shares none"


def test_guidance_of_the_experts_comes_from_the_preset_or_is_one_for_both(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "guided")
    preset = dataclasses.replace(_open(folder).preset, guidance=4.0, guidance_2=3.0, boundary=0.5)
    checkpoint.save_pipeline(folder, {}, preset)

    def guidances(**flags):
        config, _ = sample.prepare(SampleConfig(task="t2v", model=str(folder), **flags))
        return config.guidance, config.guidance_2, config.boundary

    assert guidances() == (4, 3, 0.5)
    assert guidances(guidance=2.0) == (2, 2, 0.5)
    assert guidances(guidance_2=2.0, boundary=0.9) == (4, 2, 0.9)
    assert guidances(preset="lightx2v") == (1, 1, 0.5)
    again, opened = sample.prepare(SampleConfig(task="t2v", model=str(folder)))
    assert sample.resolve(again, opened) == again


def test_experts_are_in_memory_one_at_a_time(run, two, alive, calls):
    assert run("--task", "extend", "--model", two, "--steps", 4, "--shift", 5, "--frames", 37, "--offload").status == 0
    experts = [(name, others) for name, others in alive if name in ("high", "low", "decode")]
    assert [name for name, _ in experts] == ["high", "low", "high", "low", "decode"]
    assert all(others == {"vae"} for _, others in experts)


def test_a_run_of_two_experts_repeats_to_the_bit(run, two, tmp_path):
    assert run("--task", "i2v", "--model", two, "--steps", 4, "--shift", 5).status == 0
    assert call(sample, "--from-json", tmp_path / "out" / "a.json", "--out", tmp_path / "out" / "b.mp4").status == 0
    assert (tmp_path / "out" / "a.mp4").read_bytes() == (tmp_path / "out" / "b.mp4").read_bytes()


def test_a_folder_as_the_authors_publish_wan_2_2(run, model, tmp_path, walked):
    """Two folders of transformers, and pickled files with neither config nor preset."""
    folder = tmp_path / "original"
    for expert in ("high", "low"):
        write_original(folder / f"{expert}_noise_model", model)
    write_beside(folder, model)
    flags = ["--task", "i2v", "--model", folder, "--size", "32x32", "--frames", 9, "--lora"]
    flags += [f"{expert}={model / 'lora.safetensors'}:{strength}" for expert, strength in (("high", 1.5), ("low", 1.4))]
    result = run(*flags, "--preset", "lightx2v")
    assert result.status == 0, result.err
    assert walked == [2, 2]
    assert "text encoder 21.16 GiB" in run(*flags, "--dry-run").out  # that of umT5-XXL in fp32: nothing says otherwise


# A clip of each line of a file.


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle moving left\n\n a blue   square\na red circle moving left\n", encoding="utf-8")
    return path


@pytest.fixture
def each(run, prompts, tmp_path):
    """Run the command on the prompts, to the folder out/clips."""
    return lambda *flags, out="clips": run("--task", "t2v", "--prompts", prompts, "--guidance", 1, *flags, out=out)


def _clips(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_line_becomes_a_clip_to_train_on(each, run, model, alive, calls, tmp_path):
    result = each("--seed", 7)
    assert result.status == 0 and result.out == f"{tmp_path / 'out' / 'clips'}\n", result
    folder = tmp_path / "out" / "clips"
    names = [f"0000{n}.{kind}" for n in range(3) for kind in ("mp4", "txt")]
    assert sorted(_clips(folder)) == [*names, "settings.json"]
    captions = ["a red circle moving left", "a blue square", "a red circle moving left"]
    assert [clip.caption for clip in dataset.find_clips(folder)] == captions
    loaded = [("vae", set()), ("text_encoder", {"vae"}), ("high", {"vae"})]
    assert alive == loaded + 3 * [("decode", {"vae", "high"})]
    assert calls["forward"] == 3 * 3 and "9/9" in result.err
    assert "3 of 3 clips" in call(train, "--data", folder, "--model", model, "--dry-run").out

    for n, caption in enumerate(captions):
        seed = 7 * 1_000_003 + n
        flags = ["--task", "t2v", "--prompt", caption, "--seed", seed, "--no-lora", "--guidance", 1]
        assert run(*flags, out=f"{n}.mp4").status == 0
        assert (tmp_path / "out" / f"{n}.mp4").read_bytes() == (folder / f"0000{n}.mp4").read_bytes()
    assert (folder / "00000.mp4").read_bytes() != (folder / "00002.mp4").read_bytes(), "one prompt, two seeds"


def test_a_lora_is_used_for_clips_where_one_is_named(each, model, tmp_path):
    assert each("--lora", model / "lora.safetensors").status == 0 and each(out="base").status == 0
    one, other = (tmp_path / "out" / name / "00000.mp4" for name in ("clips", "base"))
    assert one.read_bytes() != other.read_bytes()
    again = call(sample, "--from-json", other.with_name("settings.json"), "--out", tmp_path / "again")
    assert again.status == 0, again.err
    for suffix in (".mp4", ".txt"):
        assert other.with_suffix(suffix).read_bytes() == (tmp_path / "again" / f"00000{suffix}").read_bytes()


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("writer", ["write_video", "write_clip"])
def test_clips_that_were_stopped_are_gone_on_with(experts, writer, each, two, calls, tmp_path, monkeypatch):
    flags = ["--steps", 4, "--shift", 5, "--model", two] if experts == 2 else []
    assert each(*flags, out="whole").status == 0
    with monkeypatch.context() as patch:
        written = []
        original = getattr(media, writer)

        def write(*arguments):
            original(*arguments)
            written.append(arguments)
            if len(written) == 2:
                raise KeyboardInterrupt

        patch.setattr(media, writer, write)
        stopped = each(*flags)
    assert stopped.status == 130 and "stopped at 1 of 3 clips; the same command goes on" in stopped.err
    folder = tmp_path / "out" / "clips"
    assert (folder / "00001.mp4").exists() and (folder / "00001.txt").exists() == (writer == "write_clip")
    before = calls["forward"]
    result = each(*flags)
    assert result.status == 0, result.err
    left = 1 if writer == "write_clip" else 2
    assert calls["forward"] - before == left * (4 if experts == 2 else 3)
    whole, made = _clips(tmp_path / "out" / "whole"), _clips(folder)
    assert {name: made[name] for name in made if name != "settings.json"} == {
        name: whole[name] for name in whole if name != "settings.json"
    }
    before = calls["forward"]
    assert each(*flags).out == result.out and calls["forward"] == before, "all is there"


def test_two_experts_take_turns_at_groups_of_clips(each, two, alive, monkeypatch):
    monkeypatch.setattr(sample, "TURN", 2)
    assert each("--model", two, "--steps", 4, "--shift", 5).status == 0
    experts = [(name, others) for name, others in alive if name in ("high", "low", "decode")]
    assert [name for name, _ in experts] == ["high", "low", "decode", "decode", "high", "low", "decode"]
    assert all(others == ({"vae", "low"} if name == "decode" else {"vae"}) for name, others in experts)


def test_a_folder_of_clips_is_kept_to_its_prompts_and_settings(each, prompts, tmp_path):
    assert each("--steps", 1, "--seed", 5).status == 0
    folder = tmp_path / "out" / "clips"
    before = _clips(folder)
    mistake(each("--steps", 2, "--seed", 5), "got 2 as --steps", "began with 1", "another --out")
    mistake(each("--steps", 1), "got 0 as --seed", "began with 5")
    prompts.write_text("a blue square\n")
    mistake(each("--steps", 1, "--seed", 5), "00000.txt", "caption of another clip", "another --out")
    assert _clips(folder) == before
    prompts.rename(tmp_path / "moved.txt")
    (tmp_path / "moved.txt").write_text("a red circle moving left\na blue square\na red circle moving left\nanother\n")
    assert each("--steps", 1, "--seed", 5, "--prompts", tmp_path / "moved.txt", "--offload").status == 0
    assert {name: content for name, content in _clips(folder).items() if name in before and name[0] == "0"} == {
        name: content for name, content in before.items() if name[0] == "0"
    }
    assert (folder / "00003.txt").read_text() == "another\n"


def test_a_dry_run_counts_all_clips(each, made):
    result = each("--dry-run")
    assert result.status == 0 and "9 passes" in result.out and made() == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--prompts none.txt", ["none.txt", "a prompt in each line"]),
        ("--prompts EMPTY", ["empty.txt", "a prompt in each line"]),
        ("--prompts CLIP", ["00000.mp4", "expected a text file"]),
        ("--task i2v", ["--prompts with another task than t2v"]),
        ("--prompt red", ["--prompts", "--prompt,", "none of them"]),
        ("--overwrite", ["--prompts", "--overwrite", "another --out"]),
        ("--plot", ["--prompts", "--plot", "none of them"]),
        ("--mark", ["--prompts", "--mark", "none of them"]),
        ("--image CLIP@0", ["got 1 images for t2v"]),
        ("--out OUT/a.mp4", ["a.mp4 as --out of --prompts", "expected a folder"]),
        ("--out EMPTY", ["empty.txt as --out of --prompts", "expected a folder"]),
        ("--out FULL", ["full, which holds other files", "a new folder"]),
        ("--lora none.safetensors", ["no LoRA file at none.safetensors"]),
        ("--lora EMPTY", ["empty.txt"]),
    ],
)
def test_a_mistake_with_prompts_is_one_sentence(flags, words, each, made, clips, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.mp4").write_bytes(b"mine")
    places = {
        "CLIP": clips / "00000.mp4",
        "EMPTY": tmp_path / "empty.txt",
        "OUT": tmp_path / "out",
        "FULL": tmp_path / "full",
    }
    for name, path in places.items():
        flags = flags.replace(name, str(path))
    mistake(each(*flags.split()), *words)
    assert made() == [] and len(list((tmp_path / "full").iterdir())) == 1


# A sweep.


def _sweep_files(*cells):
    suffixes = (".json", ".mp4", ".png")
    return sorted([*(f"a-{cell}{suffix}" for cell in cells for suffix in suffixes), "a.json", "a.png"])


def test_a_sweep_makes_what_single_runs_make_but_loads_once(run, model, made, calls, alive, tmp_path):
    own, out = model / "lora.safetensors", tmp_path / "out"
    flags = ["--task", "i2v", "--frames", 9, "--steps", 2]
    result = run(*flags, "--sweep", "noise=0,0.30", "lora=1.7,1")
    assert result.status == 0 and "8/8" in result.err and result.out.endswith("a.png\n"), result
    cells = {f"noise={m}-lora={s}": (m, s) for m in ("0", "0.3") for s in ("1", "1.7")}
    assert made() == _sweep_files(*cells) and len(result.out.splitlines()) == len(made())
    loads = [name for name, _ in alive if name != "decode"]
    assert loads == ["vae", "text_encoder", "high", "high"] and alive.count(("decode", {"vae", "high"})) == 4
    assert calls == {"forward": 4 * 2 * 2, "prompt_keys": 2 * 2, "encoder": 2}

    for name, (m, strength) in cells.items():
        assert run(*flags, "--noise", m, "--lora", f"{own.as_posix()}:{strength}", out="b.mp4").status == 0
        again = call(sample, "--from-json", out / f"a-{name}.json", "--out", out / "c.mp4")
        assert again.status == 0, again.err
        for suffix in (".mp4", ".png"):
            bytes = (out / f"a-{name}{suffix}").read_bytes()
            assert bytes == (out / f"b{suffix}").read_bytes() == (out / f"c{suffix}").read_bytes()
        assert _settings(out / f"a-{name}.json") == _settings(out / "b.json") | {"out": str(out / f"a-{name}.mp4")}
        [path.unlink() for path in (*out.glob("b.*"), *out.glob("c.*"))]

    sheet, record = (out / "a.png").read_bytes(), _settings(out / "a.json")
    again = call(sample, "--from-json", out / "a.json", "--out", out / "d.mp4")
    assert again.status == 0, again.err
    assert (out / "d.png").read_bytes() == sheet and _settings(out / "d.json") == record | {"out": str(out / "d.mp4")}


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize(
    "axes",
    [{"steps": (1, 2), "seed": (3, 4)}, {"guidance": (1, 2), "history-guidance": (2,)}, {"shift": (1, 5)}],
    ids=" ".join,
)
def test_whatever_is_swept_gives_what_its_flag_gives(axes, experts, run, model, two, tmp_path):
    flags = ["--task", "extend", "--frames", 21, "--steps", 2, "--only-new"]
    flags += ["--model", two, "--guidance-2", 3] if experts == 2 else []
    sweep = [f"{name}={','.join(map(str, values))}" for name, values in axes.items()]
    assert run(*flags, "--sweep", *sweep).status == 0
    for values in itertools.product(*axes.values()):
        own = [flag for name, value in zip(axes, values, strict=True) for flag in (f"--{name}", value)]
        cell = tmp_path / "out" / "-".join(["a", *map("{}={}".format, axes, values)])
        assert run(*flags, *own, "--overwrite", out="b.mp4").status == 0
        assert (tmp_path / "out" / "b.mp4").read_bytes() == Path(f"{cell}.mp4").read_bytes()
        assert _settings(tmp_path / "out" / "b.json") | {"out": f"{cell}.mp4"} == _settings(Path(f"{cell}.json"))


def test_the_sheet_is_labelled_and_shows_what_was_made(run, monkeypatch, tmp_path):
    sheets, videos, filmstrip = [], [], media.filmstrip

    def drawn(rows, marks=(), *how, **others):
        if not marks:
            sheets.append((rows, *how[2:]))
        return filmstrip(rows, marks, *how, **others)

    monkeypatch.setattr(media, "filmstrip", drawn)
    monkeypatch.setattr(media, "write_video", lambda path, frames, *_: videos.append(torch.stack(list(frames), 1)))
    assert run("--task", "i2v", "--frames", 9, "--steps", 1, "--sweep", "lora=1.7,1", "seed=0,1,2").status == 0
    rows, numbers, heads = sheets[-1]
    assert [title for title, _ in rows] == ["lora=1.7", "lora=1"] and heads == ["seed=0", "seed=1", "seed=2"]
    assert numbers == [1, 5, 8] * 3, "the first frame is given, and the same in all"
    for (_, row), own in zip(rows, (videos[3:], videos[:3]), strict=True):  # those of 1 were made first
        assert torch.equal(row, torch.cat([video[:, [1, 5, 8]] for video in own], 1))
    assert len(sheets) == 6 and sheets[0][0][0][1].min() == 1, "of what is not made yet the place is white"
    assert media.read_image(tmp_path / "out" / "a.png").shape[2] > 9 * 100

    assert run("--task", "extend", "--frames", 21, "--steps", 1, "--sweep", "seed=0,1", out="b.mp4").status == 0
    rows, numbers, heads = sheets[-1]
    assert [title for title, _ in rows] == ["seed=0", "seed=1"] and not heads
    assert numbers == [33, 37, 40], "frames of the whole clip, of which 33 were there"
    assert torch.equal(rows[1][1], videos[-1][:, numbers])


def test_a_sweep_that_is_stopped_leaves_the_cells_that_are_done(run, made, monkeypatch):
    generate, calls = sample.generate, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(sample, "generate", stopped)
    flags = ["--task", "t2v", "--frames", 5, "--steps", 1, "--sweep", "seed=1,2,3"]
    stop = 1
    assert run(*flags).status == 130 and made() == []
    stop = 4
    assert run(*flags).status == 130 and made() == _sweep_files("seed=1", "seed=2")


def test_a_sweep_changes_the_loras_that_have_no_strength(run, model, tmp_path):
    own = (model / "lora.safetensors").as_posix()
    flags = ["--task", "t2v", "--frames", 5, "--steps", 1, "--lora", f"{own}:0.5", own]
    assert run(*flags, "--sweep", "lora=1.25,-1").status == 0
    for strength in ("1.25", "-1"):
        settings = _settings(tmp_path / "out" / f"a-lora={strength}.json")
        assert settings["lora"] == [f"{own}:0.5", f"{own}:{strength}"]


def test_a_dry_run_of_a_sweep_tells_each_cell(run, made):
    result = run("--task", "i2v", "--dry-run", "--sweep", "steps=2,4", "guidance=1,3")
    assert result.status == 0 and made() == []
    for steps, guidance, passes in ((2, 1, 2), (2, 3, 4), (4, 1, 4), (4, 3, 8)):
        assert f"steps={steps}\n\nguidance={guidance}\n\nsettings: " in result.out
        assert len(re.findall(rf"\b{passes} passes", result.out)) == [2, 4, 4, 8].count(passes)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--sweep strength=0.5,1", ["--sweep strength=0.5,1", "one or two of noise, lora", "noise=0,0.2"]),
        ("--sweep noise", ["--sweep noise", "numbers with commas"]),
        ("--sweep noise=0,a", ["--sweep noise 0,a", "numbers with commas"]),
        ("--sweep seed=1.5", ["--sweep seed 1.5", "numbers with commas"]),
        ("--sweep noise=0 lora=1 seed=1", ["noise=0 lora=1 seed=1", "one or two of"]),
        ("--sweep seed=0 seed=1", ["seed=0 seed=1", "one or two of"]),
        ("--sweep shift=1,1.0", ["shift=1,1.0", "numbers, once"]),
        ("--sweep lora=1,nan", ["lora=1,nan", "finite numbers"]),
        ("--sweep noise=0,1.5", ["noise 1.5", "[0, 1]"]),
        ("--sweep guidance=1,-1", ["--guidance -1", "0 or more"]),
        ("--sweep history-guidance=-1", ["--history-guidance -1", "0 or more"]),
        ("--sweep steps=4,0", ["--steps 0", "at least 1"]),
        ("--sweep shift=3,0", ["shift 0", "above 0"]),
        ("--sweep seed=1,99999999999999999999", ["--seed 9999", "64 bits"]),
        ("--sweep lora=1,2 --no-lora", ["--sweep lora", "a LoRA without a strength", "--lora PATH"]),
        ("--sweep lora=1,2 --lora MODEL/lora.safetensors:1", ["--sweep lora", "a LoRA without a strength"]),
        ("--task t2v --sweep noise=0,0.2", ["got noise for t2v", "expected none"]),
        ("--sweep noise=0,0.2 --tau a.txt", ["--sweep noise=0,0.2 with --tau", "the table"]),
        ("--sweep seed=0 --plot", ["--sweep seed=0 with --prompts or --plot", "neither"]),
        ("--task t2v --sweep seed=0 --prompts none.txt", ["--sweep seed=0 with --prompts or --plot", "neither"]),
    ],
)
def test_a_mistake_in_a_sweep_is_told_before_all_the_work(flags, words, run, made, model, monkeypatch):
    monkeypatch.setattr(sample, "Experts", None)
    mistake(run("--task", "i2v", *flags.replace("MODEL", str(model)).split()), *words)
    assert made() == []


def test_a_sweep_replaces_nothing(run, made, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a-seed=2.json").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(sample, "Experts", None)
        mistake(run("--task", "t2v", "--sweep", "seed=1,2"), "a-seed=2.json exists", "--overwrite")
    assert made() == ["a-seed=2.json"]
    flags = ["--task", "t2v", "--frames", 5, "--steps", 1, "--overwrite", "--sweep", "seed=1,2"]
    assert run(*flags).status == 0 and made() == _sweep_files("seed=1", "seed=2")
    assert _settings(tmp_path / "out" / "a-seed=2.json")["seed"] == 2


# Presets.


def test_lightx2v_is_four_steps_without_guidance(run, model, tmp_path, calls):
    own = model / "lora.safetensors"
    assert run("--task", "t2v", "--preset", "lightx2v", "--lora", own, f"{own}:1.4").status == 0
    settings = _settings(tmp_path / "out" / "a.json")
    assert [settings[name] for name in ("steps", "shift", "guidance")] == [4, 5.0, 1.0]
    assert settings["lora"] == [f"{own}:1", f"{own}:1.4"]
    assert calls["forward"] == 4
    _, job = _laid_out(task="t2v", model=str(model), preset="lightx2v")
    torch.testing.assert_close(job.taus[0][:, 0], torch.tensor([1, 0.9375, 5 / 6, 0.625, 0]), rtol=0, atol=1e-7)


def _as_published(folder, model, layers, experts=()):
    """A folder of descriptions in the layout of a published model, from which `--dry-run` tells all."""
    for home in experts or ("",):
        (folder / home).mkdir(parents=True)
        config = dataclasses.asdict(_open(model).config) | {"num_layers": layers}
        (folder / home / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("layers", "experts", "own", "pusa"),
    [
        (30, (), (50, 8, 6, None), (30, 5, 3, None)),
        (40, (), (50, 5, 5, None), (30, 5, 3, None)),
        (40, ("high_noise_model", "low_noise_model"), (40, 12, 4, 3), (30, 5, 3, 3)),
    ],
)
def test_wans_own_settings_are_a_preset(layers, experts, own, pusa, model, tmp_path):
    folder = _as_published(tmp_path / "wan", model, layers, experts)
    for preset, expected in (("wan", own), (None, pusa)):
        config, _ = sample.prepare(SampleConfig("t2v", str(folder), preset=preset))
        assert (config.steps, config.shift, config.guidance, config.guidance_2) == expected
        assert (config.frames, config.fps, config.boundary) == (81, 16, 0.875 if experts else None)


def test_tasks_of_two_experts_have_noise_of_their_own(model, tmp_path):
    def noise(experts, task, **flags):
        folder = tmp_path / f"{len(experts)}"
        folder = folder if folder.exists() else _as_published(folder, model, 40, experts)
        config, job = _laid_out(task=task, model=str(folder), size="64x64", **flags)
        return [round(m, 3) for m in job.plans[0].m.tolist() if m < 1]

    both = ("high_noise_model", "low_noise_model")
    assert noise(both, "extend", frames=33) == [0.2, 0.4, 0.4, 0.4] and noise(both, "start-end") == [0.2, 0.5]
    assert noise((), "extend", frames=33) == [0, 0.3, 0.4, 0.5] and noise((), "start-end") == [0.2, 0.4]
    assert noise(both, "i2v") == [0.2] and noise(both, "extend", noise="0") == [0] * 4


def test_a_negative_prompt_is_read_from_a_file(run, tmp_path):
    (tmp_path / "no.txt").write_text(" a blue\n  square\n", encoding="utf-8")
    assert run("--task", "t2v", "--negative-prompt", f"@{tmp_path / 'no.txt'}").status == 0
    assert _settings(tmp_path / "out" / "a.json")["negative_prompt"] == "a blue square"
    mistake(run("--task", "t2v", "--negative-prompt", "@none.txt", out="b.mp4"), "none.txt", "expected a text file")


def test_what_is_given_wins_over_a_preset(run, tmp_path):
    flags = ["--task", "t2v", "--preset", "lightx2v", "--steps", 2, "--guidance", 1.5, "--shift", 3]
    assert run(*flags).status == 0
    settings = _settings(tmp_path / "out" / "a.json")
    assert [settings[name] for name in ("steps", "shift", "guidance")] == [2, 3.0, 1.5]


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--task t2v --frames 26", ["got 26 frames", "4k+1", "25 and 29"]),
        ("--task t2v --frames 0", ["got 0 frames", "4k+1"]),
        ("--task t2v --frames 9 --seconds 2", ["--seconds", "one of the two"]),
        ("--task t2v --seconds -1", ["--seconds", "above 0"]),
        ("--task extend --frames 13", ["got 4 latent frames for extend", "--frames 17"]),
        ("--task t2v --fps 0", ["got --fps 0", "above 0"]),
        ("--task t2v --fps inf", ["--fps inf", "above 0"]),
        ("--task t2v --fps nan", ["--fps nan", "above 0"]),
        ("--task t2v --seconds inf", ["--seconds", "above 0"]),
        ("--task t2v --size 33x32", ["got size 33x32", "multiples of 16"]),
        ("--task t2v --size large", ["got size 'large'", "WIDTHxHEIGHT"]),
        ("--task t2v --steps 0", ["got --steps 0", "at least 1"]),
        ("--task stream --steps -3", ["got --steps -3", "at least 1"]),
        ("--task t2v --guidance -1", ["got --guidance -1", "0 or more"]),
        ("--task t2v --guidance nan", ["got --guidance nan", "0 or more"]),
        ("--task t2v --shift 0", ["got shift 0", "above 0"]),
        ("--task t2v --shift inf", ["got shift inf", "above 0"]),
        ("--task t2v --shift nan", ["got shift nan", "above 0"]),
        ("--task restyle --strength 1.5", ["1.5", "[0, 1]"]),
        ("--task i2v --noise 1.2", ["got noise 1.2", "[0, 1]"]),
        ("--task i2v --noise -0.1", ["got noise -0.1", "[0, 1]"]),
        ("--task i2v --noise nan", ["got noise nan", "[0, 1]"]),
        ("--task start-end --noise 0,0.1,0.2", ["got 3 noise values", "2 condition latents"]),
        ("--task i2v --noise a", ["got --noise a", "numbers with commas"]),
        ("--task t2v --noise 0.2", ["got noise for t2v", "expected none"]),
        ("--task keyframes --image CLIP@0 CLIP@1 --at 0,7", ["got positions [0, 7]", "0 to 6"]),
        ("--task keyframes --image CLIP@0 CLIP@1 --at=-1,2", ["got positions [-1, 2]", "0 to 6"]),
        ("--task keyframes --image CLIP@0 CLIP@1 --at 2,2", ["[2, 2]", "only once"]),
        ("--task keyframes --image CLIP@0 CLIP@1 --at 0", ["got 1 positions", "one for each image"]),
        ("--task keyframes --image CLIP@0 CLIP@1", ["got 0 positions", "one for each image"]),
        ("--task keyframes --image CLIP@0 --at 0.5", ["got --at 0.5", "numbers with commas"]),
        ("--task t2v --at 3", ["got positions for t2v", "expected none"]),
        ("--task i2v --image CLIP@0 CLIP@1", ["got 2 images for i2v", "expected 1"]),
        ("--task extend --video CLIP CLIP", ["got 2 videos for extend", "expected 1"]),
        ("--task i2v --video CLIP", ["i2v", "expected"]),
        ("--task t2v --video CLIP", ["got 1 videos for t2v", "expected 0"]),
        ("--task i2v --image CLIP@33", ["00000.mp4 has frames 0 to 32", "and not 33"]),
        ("--task i2v --image none.png", ["none.png", "no such file"]),
        ("--task i2v --image TEXT", ["text.mp4 cannot be read as an image"]),
        ("--task extend --video none.mp4", ["none.mp4", "cannot be read"]),
        ("--task extend --video TEXT", ["text.mp4", "cannot be read as a video"]),
        ("--task extend --video SHORT", ["got a clip of 9 frames", "at least 13"]),
        ("--task t2v --lora none.safetensors", ["no LoRA file at none.safetensors"]),
        ("--task t2v --lora none.safetensors --no-lora", ["--lora and --no-lora", "one of the two"]),
        ("--task t2v --lora MODEL/lora.safetensors:nan", ["strength nan"]),
        ("--task t2v --lora TEXT:1", ["text.mp4", ".safetensors"]),
        ("--task t2v --boundary 0.9", ["--boundary", "one transformer", "leave"]),
        ("--task t2v --guidance-2 3", ["--guidance-2", "one transformer", "leave"]),
        ("--task t2v --lora high=MODEL/lora.safetensors", ["LoRA for high", "one transformer", "leave"]),
        ("--task t2v --model TWO --boundary 1.5", ["got --boundary 1.5", "[0, 1]"]),
        ("--task t2v --model TWO --guidance-2 -1", ["got --guidance-2 -1", "0 or more"]),
        ("--task t2v --model TWO --lora low=none.safetensors", ["no LoRA file at none.safetensors"]),
        ("--task t2v --device nonsense", ["got --device nonsense"]),
        ("--task retake --video CLIP", ["got no --between", "within the clip's 2.062 s", "3,6"]),
        ("--task retake --video CLIP --between 1", ["--between 1", "two times"]),
        ("--task retake --video CLIP --between 1,0.5", ["--between 1,0.5", "two times"]),
        ("--task retake --video CLIP --between 1,inf", ["--between 1,inf", "two times"]),
        ("--task retake --video CLIP --between 1,9", ["--between 1,9", "2.062 s"]),
        ("--task retake --video CLIP --between 0,2", ["--between 0,2", "1 to 24 frames", "--frames"]),
        ("--task retake --video CLIP --between 0,1 --strength 2", ["2", "[0, 1]"]),
        ("--task retake --video CLIP --between 0,1 --frames 37", ["a clip of 33 frames", "at least 37"]),
        ("--task retake --video CLIP --between 0,a", ["got --between 0,a", "numbers with commas"]),
        ("--task extend --video CLIP --between 0,1", ["got --between for extend", "--task retake"]),
        ("--task i2v --image CLIP@0 --only-new", ["got --only-new for i2v", "extend", "prepend", "retake"]),
        ("--task keyframes --video CLIP --at 0", ["a whole clip for keyframes", "a.mp4@0-12"]),
        ("--task keyframes --video CLIP@0-9 --at 0", ["got 10 frames", "4k+1"]),
        ("--task keyframes --video CLIP@9-0 --at 0", ["frames 9 to 0", "the first before the last"]),
        ("--task keyframes --video CLIP@30-34 --at 0", ["a clip of 3 frames", "at least 5"]),
        ("--task keyframes --video CLIP@40-44 --at 0", ["00000.mp4@40-44 ends before those frames"]),
        ("--task t2v --out OUT/a.avi", ["a.avi", ".mp4 or .gif"]),
        ("--task t2v --model none", ["got none as a model", "expected a folder"]),
        ("--task t2v --model OTHER", ["as a model, a folder without any of", "model_index.json", "Wan-AI"]),
        ("--task t2v --tau TABLE --steps 3", ["--tau and --steps", "one of the two"]),
        ("--task t2v --tau TABLE --shift 3", ["--tau and --shift", "one of the two"]),
        ("--task t2v --context-noise 2", ["got --context-noise 2", "[0, 1]", "0.5"]),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(flags, words, run, made, model, two, clips, tmp_path):
    places = {"CLIP": clips / "00000.mp4", "MODEL": model, "TWO": two, "OUT": tmp_path / "out", "TABLE": "table.csv"}
    if "OTHER" in flags:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "metrics.jsonl").touch()
        places["OTHER"] = tmp_path / "other"
    if "TEXT" in flags:
        (tmp_path / "text.mp4").write_text("no video at all")
        places["TEXT"] = tmp_path / "text.mp4"
    if "SHORT" in flags:
        media.write_video(tmp_path / "short.mp4", scene_video(0, 9), 16)
        places["SHORT"] = tmp_path / "short.mp4"
    for name, path in places.items():
        flags = flags.replace(name, str(path))
    mistake(run(*flags.split()), *words)
    assert made() == []


def test_positions_without_images_are_not_dropped(run, made):
    """The images of the project come with positions of their own: those of the user must not be lost without a word."""
    result = run("--task", "keyframes", "--at", "0,99,3")
    mistake(result, "99")
    assert made() == []


def test_a_lora_that_does_not_match_tells_how_much_did(run, made, model, tmp_path):
    pairs = random_lora(_open(model).transformer(), seed=1).pairs
    A, B, _ = pairs["blocks.0.ffn.0"]
    lora.save(tmp_path / "deep.safetensors", lora.LoRA({**pairs, "blocks.2.ffn.0": lora.Pair(A.clone(), B.clone())}))
    mistake(run("--task", "t2v", "--lora", tmp_path / "deep.safetensors"), "20 of 21", "blocks.2.ffn.0", "nothing was")
    save_file({"text_model.q.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    mistake(run("--task", "t2v", "--lora", tmp_path / "other.safetensors"), "0 of 1", "text_model.q.weight")
    wide = {name: lora.Pair(A.repeat(1, 2), B) for name, (A, B, _) in pairs.items()}
    lora.save(tmp_path / "wide.safetensors", lora.LoRA(wide))
    mistake(run("--task", "t2v", "--lora", tmp_path / "wide.safetensors"), "(rank, 48)")
    assert made() == []


@pytest.fixture
def broken(model, tmp_path):
    return shutil.copytree(model, tmp_path / "broken")


def test_an_image_to_video_model_is_refused(run, made, broken):
    path = broken / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 36}))
    mistake(run("--task", "i2v", "--model", broken), "image-conditioned (I2V) model of 36", "expected a text-to-video")
    assert made() == []


@pytest.mark.parametrize(
    "missing",
    [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_missing_file_of_the_model_is_named(missing, run, made, broken):
    (broken / missing).unlink()
    mistake(run("--task", "t2v", "--model", broken), missing)
    assert made() == []


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    write_original(folder, model, shards=2)
    write_beside(folder, model)
    return folder


def _swap(*names):
    def swap(folder):
        first, second = (folder / name for name in names)
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)

    return swap


def _weights(name, change):
    def rewrite(folder):
        path = folder / name
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path)
        path.unlink()
        (save_file if path.suffix == ".safetensors" else torch.save)(change(state), path)

    return rewrite


def _bytes(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _code(name):
    return lambda folder: torch.save({"conv1.weight": Code(folder / "ran")}, folder / name)


SHARD, VAE, TEXT = "diffusion_pytorch_model-00002-of-00002.safetensors", "Wan2.1_VAE.pth", checkpoint.TEXT_FILE
TOKENIZER, WEIGHT, NAN = "google/umt5-xxl/tokenizer.json", "blocks.1.ffn.2.bias", float("nan")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        *((_bytes(name, lambda content: content[:-100]), [f"cannot read DIR/{name}"]) for name in (SHARD, VAE, TEXT)),
        *((_bytes(name, lambda content: b""), [f"cannot read DIR/{name}"]) for name in (SHARD, VAE, TEXT, TOKENIZER)),
        *((lambda folder, n=name: (folder / n).unlink(), [f"no {name}"]) for name in (SHARD, VAE, TEXT, TOKENIZER)),
        (_bytes("config.json", lambda content: content[:9]), ["cannot read DIR/config.json as JSON"]),
        (_swap(VAE, TEXT), [VAE, "no tensor encoder.conv1.weight", "hf download"]),
        (_swap(SHARD, VAE), [f"cannot read DIR/{VAE}"]),
        (_swap("config.json", TOKENIZER), [TOKENIZER, "expected a Hugging Face tokenizer.json"]),
        (_weights(SHARD, lambda state: {**state, WEIGHT: torch.zeros(3, 5)}), [f"{WEIGHT} (3, 5), expected (48,)"]),
        (_weights(SHARD, lambda state: {**state, WEIGHT: state[WEIGHT] * NAN}), [f"{WEIGHT} in", "NaN"]),
        (_weights(VAE, lambda state: {**state, "conv2.bias": state["conv2.bias"] * NAN}), ["conv2.bias in", "NaN"]),
        *((_code(name), [name, "nothing in it was run"]) for name in (VAE, TEXT)),
    ],
)
def test_a_damaged_model_is_one_sentence(damage, words, run, made, original, tmp_path):
    folder = shutil.copytree(original, tmp_path / "damaged")
    damage(folder)
    result = run("--task", "t2v", "--model", folder, "--size", "32x32", "--frames", 5, "--steps", 1)
    mistake(result, *(word.replace("DIR", str(folder)) for word in words))
    assert made() == [] and not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_lora_or_single_file_is_one_sentence(name, content, run, made, tmp_path):
    (tmp_path / name).write_bytes(content)
    mistake(run("--task", "t2v", "--lora", tmp_path / name), name)
    mistake(run("--task", "t2v", "--model", tmp_path / name), name)
    assert made() == []


def test_a_lora_that_is_a_program_is_not_run(run, made, tmp_path):
    torch.save({"blocks.0.ffn.0.lora_A.weight": Code(tmp_path / "ran")}, tmp_path / "a.pt")
    mistake(run("--task", "t2v", "--lora", tmp_path / "a.pt"), "a.pt")
    assert made() == [] and not (tmp_path / "ran").exists()


def test_a_damaged_preset_is_named(run, made, broken):
    for content, words in (
        ("{", "JSON"),
        ('{"step": 4}', "expected only the fields"),
        ('{"steps": "ten"}', 'has steps "ten", expected int;'),
        ('{"steps": 4.5}', "has steps 4.5, expected"),
        ('{"size": [64]}', "has size [64], expected tuple[int, int];"),
        ('{"guidance": true}', "has guidance true, expected"),
    ):
        (broken / "sampling.json").write_text(content)
        mistake(run("--task", "t2v", "--model", broken), "sampling.json", words)
    assert made() == []


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "a.json"])
def test_what_exists_is_kept_unless_told_otherwise(name, run, made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_bytes(b"mine")
    mistake(run("--task", "t2v"), name, "--overwrite")
    assert made() == [name] and (out / name).read_bytes() == b"mine"
    assert run("--task", "t2v", "--overwrite").status == 0
    assert made() == ["a.json", "a.mp4", "a.png"] and (out / name).read_bytes() != b"mine"


def test_what_is_replaced_stays_whole_when_the_run_fails(run, made, tmp_path):
    assert run("--task", "t2v").status == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    mistake(run("--task", "t2v", "--overwrite", "--lora", "none.safetensors"), "none.safetensors")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


# Runs from a record.


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"settings": 3}',
        '{"settings": []}',
        '{"settings": {}}',
        '{"settings": {"nonsense": 1}}',
        '{"settings": {"task": "t2v"}}',
    ],
)
def test_a_record_that_is_none_is_refused(text, made, tmp_path):
    (tmp_path / "a.json").write_text(text)
    result = call(sample, "--from-json", tmp_path / "a.json", "--out", tmp_path / "out" / "a.mp4")
    mistake(result, "a.json")
    assert made() == []


def test_a_record_that_is_not_there_is_refused(tmp_path):
    mistake(call(sample, "--from-json", tmp_path / "none.json", "--out", tmp_path / "a.mp4"), "none.json")


def test_a_record_of_a_device_that_is_not_here_is_refused(run, made, tmp_path):
    assert run("--task", "t2v").status == 0
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    record["settings"]["device"] = "cuda:77"
    (tmp_path / "b.json").write_text(json.dumps(record))
    mistake(call(sample, "--from-json", tmp_path / "b.json", "--out", tmp_path / "out" / "b.mp4"), "cuda:77")
    assert made() == ["a.json", "a.mp4", "a.png"]


def test_a_repeated_run_does_not_replace_the_first(run, made, tmp_path):
    assert run("--task", "t2v").status == 0
    before = (tmp_path / "out" / "a.mp4").read_bytes()
    json_file = tmp_path / "out" / "a.json"
    mistake(call(sample, "--from-json", json_file, "--out", tmp_path / "out" / "a.mp4"), "--overwrite")
    result = call(sample, "--from-json", json_file, "--out", tmp_path / "out" / "a.mp4", "--overwrite")
    assert result.status == 0 and (tmp_path / "out" / "a.mp4").read_bytes() == before
    assert not _settings(json_file)["overwrite"]


def test_a_dry_run_of_a_record_stays_one(run, made, tmp_path):
    assert run("--task", "t2v").status == 0
    flags = ["--from-json", tmp_path / "out" / "a.json", "--out", tmp_path / "out" / "b.mp4", "--dry-run"]
    result = call(sample, *flags)
    assert result.status == 0 and "step |" in result.out
    assert made() == ["a.json", "a.mp4", "a.png"]


def test_flags_beside_a_record_win_and_are_told(run, model, tmp_path):
    assert run("--task", "extend", "--seed", 3, "--preset", "lightx2v", "--seconds", 1.5).status == 0
    record = tmp_path / "out" / "a.json"

    def again(*flags):
        result = call(sample, "--from-json", record, "--out", tmp_path / "out" / "b.mp4", "--overwrite", *flags)
        assert result.status == 0, result.err
        return _settings(tmp_path / "out" / "b.json"), result.err

    first = _settings(record) | {"out": str(tmp_path / "out" / "b.mp4")}
    settings, err = again("--seed", 0, "--guidance", 1.5)  # 0 is the default, and wins nevertheless
    assert settings == first | {"seed": 0, "guidance": 1.5}
    assert f"settings: those of {record}, except for --seed, --guidance" in err
    settings, err = again()
    assert settings == first and "except" not in err
    own = str(model / "lora.safetensors")
    assert again("--seconds", 1)[0] == first | {"frames": 17}
    assert again("--no-lora")[0] == first | {"lora": [], "no_lora": True}
    assert again("--lora", own, f"{own}:0.5")[0] == first | {"lora": [f"{own}:1", f"{own}:0.5"]}
    assert again("--preset", "wan", "--steps", 2)[0] == first | {"preset": "wan", "steps": 2, "shift": 8, "guidance": 6}
    assert again("--task", "restyle")[0] == first | {"task": "restyle", "noise": None}
    mistake(call(sample, "--from-json", record, "--guidance", -1), "got --guidance -1")


def test_words_that_the_model_does_not_know_are_listed_once(run):
    result = run("--task", "t2v", "--prompt", "a Cat, a red cat and a beach moving left", "--negative-prompt", "a dog")
    assert result.status == 0 and "cat, beach are unknown to this model" in result.err.splitlines()
    assert "unknown" not in run("--task", "t2v", "--prompt", "a red circle", out="b.mp4").err


def test_the_default_model_and_its_examples_lie_beside_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "EXAMPLES", Path("clips"))
    monkeypatch.setattr(checkpoint, "_download", None)
    result = call(sample, "--task", "i2v", "--dry-run", "--dtype", "float32")
    assert result.status == 0, result.err
    config, opened = sample.prepare(SampleConfig("extend"))
    assert Path(config.video[0]).is_file() and Path(config.lora[0].rpartition(":")[0]).is_file() and config.prompt


def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(run, made, tmp_path):
    """No file may grow beyond 4 kB, as if the disk had no more room."""
    resource = pytest.importorskip("resource")
    assert run("--task", "extend").status == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
        results = [run("--task", "extend", "--seed", 1, *flags, out=out) for out, flags in (
            ("a.mp4", ["--overwrite"]), ("b.mp4", []), ("c.gif", []),
        )]  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for result, name in zip(results, ("a.mp4", "b.mp4", "c.gif"), strict=True):
        mistake(result, f"cannot write {tmp_path / 'out' / name}, as the disk is full", "make room")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_resolving_again_changes_nothing(model):
    config, opened = sample.prepare(SampleConfig(task="start-end", model=str(model)))
    again = sample.resolve(dataclasses.replace(config, lora=config.lora or None), opened)
    assert again == config
