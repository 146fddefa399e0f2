"""The embedded model: small, whole, the same in diffusers as here, and trained to what the README says of it."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from small import call, load_pipeline

import flow
import lora
import sample
from model import Wan
from sample import SampleConfig
from support import media
from toy import grow, judge, world
from train import TrainConfig
from wan import checkpoint

MODEL = Path("checkpoints/tiny")
LORA = MODEL / "lora.safetensors"
PROMPT = "a large red circle moving left slowly on a grey background"
SCENES = list(world.scenes(4, seed=11, unseen=True, pairs=0.0))
PAIRS = list(world.scenes(12, seed=12, unseen=True, pairs=1.0))


@pytest.fixture(scope="module")
def pipe():
    pipe = WanPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pusa():
    """The model with its LoRA merged, fp32."""
    pipeline = load_pipeline(MODEL, torch.float32)
    lora.merge(pipeline.transformer, lora.load(LORA), pipeline.preset.strength)
    return pipeline


@pytest.fixture(scope="module")
def judged():
    """The model with its LoRA, as it is judged, and the scenes that it is judged on."""
    bench = judge.Judge(checkpoint.open(MODEL, Wan), SCENES)
    return bench, bench.transformer(LORA)


@pytest.fixture(scope="module")
def truth():
    return torch.stack([world.render(scene) for scene in SCENES])


# What is in the folder.


def test_it_is_small_and_nothing_in_it_is_code():
    files = [path for path in MODEL.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}


def test_it_is_what_grow_makes():
    opened = checkpoint.open(MODEL, Wan)
    assert opened.config == grow.TRANSFORMER
    encoder = opened.text_encoder().config
    assert encoder == dataclasses.replace(grow.ENCODER, vocab_size=encoder.vocab_size)
    assert opened.preset == grow.PRESET
    vae = opened.vae().config
    measured = {"latents_mean": vae.latents_mean, "latents_std": vae.latents_std}
    assert vae == dataclasses.replace(grow.VAE, **measured)
    assert all(0.1 < std < 10 for std in vae.latents_std)


def test_it_knows_every_word_of_the_world():
    tokenizer = checkpoint.open(MODEL, Wan).tokenizer()
    ids, mask = tokenizer([scene.caption for scene in world.scenes(200, seed=3, unseen=True, pairs=0.5)])
    assert not (ids == tokenizer.tokenizer.token_to_id("<unk>")).any()
    assert (mask.sum(1) < grow.TRANSFORMER.text_len).all(), "no caption is cut"


# The same in diffusers.


@torch.no_grad()
def test_diffusers_makes_the_same_video(pipe):
    config, opened = sample.prepare(
        SampleConfig(
            task="t2v", prompt=PROMPT, negative_prompt="a small blue square", steps=4, guidance=3.0, frames=17,
            model=str(MODEL), no_lora=True, dtype="float32", device="cpu", seed=5,
        )
    )  # fmt: skip
    experts, job = sample.Experts(config, opened, [config.prompt]), sample.lay_out(config, opened.preset.frames)
    (latents,) = sample.generate(experts, job, (), [config.seed])
    video = experts.vae.decode(latents)
    x1 = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(5))
    frames = pipe(
        prompt=config.prompt, negative_prompt=config.negative_prompt, guidance_scale=3.0, num_inference_steps=4,
        height=64, width=64, num_frames=17, latents=x1, max_sequence_length=grow.TRANSFORMER.text_len, output_type="np",
    ).frames  # fmt: skip
    theirs = torch.from_numpy(frames).permute(0, 4, 1, 2, 3)  # (1, N, H, W, 3) → (1, 3, N, H, W)
    assert video.std() > 0.1
    assert ((video + 1) / 2 - theirs).abs().max() < 1e-3


@torch.no_grad()
def test_diffusers_reads_the_lora_as_we_do(pipe, pusa):
    x, timestep = torch.randn(2, 16, 3, 8, 8), torch.tensor([900.0, 250.5])
    context = pusa.text_encoder(*pusa.tokenizer([PROMPT, ""]))

    def theirs():
        return pipe.transformer(x, timestep, context, return_dict=False)[0]

    base = theirs()
    pipe.load_lora_weights(MODEL, weight_name=LORA.name, adapter_name="pusa")
    try:
        pipe.set_adapters("pusa", pusa.preset.strength)
        adapted = theirs()
    finally:
        pipe.unload_lora_weights()
    ours = pusa.transformer(x, timestep / 1000, context)
    error = (ours - adapted).abs().max()
    assert error < 1e-3 * adapted.abs().max() and error < 0.01 * (adapted - base).abs().max()


# How good it is, loosely: `python -m toy.judge` measures it.


def test_prompts_are_followed(judged):
    bench, pusa = judged
    assert judge.as_prompted(SCENES, world.measure(bench.videos(pusa, "t2v"))).sum() >= len(SCENES) - 1


def test_two_shapes_get_their_own_words_more_often_than_by_chance():
    bench = judge.Judge(checkpoint.open(MODEL, Wan), PAIRS)
    videos = bench.videos(bench.transformer(LORA), "t2v")
    # Eight as measured; a model that mixes the words up has one.
    assert judge.as_prompted(PAIRS, world.measure(videos)).sum() >= 6


@pytest.mark.parametrize(("name", "given"), [("i2v", 1), ("extend", 13)])
def test_given_frames_are_kept_and_the_rest_follows_from_them(name, given, judged, truth):
    bench, pusa = judged
    videos = bench.videos(pusa, name)
    assert (judge.psnr(videos[:, :, :given], truth[:, :, :given]) > 28).all()
    readings = world.measure(videos)
    assert judge.held_to_the_end(SCENES, readings).sum() >= len(SCENES) - 1
    if name == "extend":
        assert judge.centroid_errors(SCENES, readings, judge.DETERMINED[name]).median() <= 3


def test_conditions_are_those_that_a_user_has():
    """What the judge gives to each task is the true clip at the conditions' places, and nothing of the rest."""
    bench = judge.Judge(checkpoint.open(MODEL, Wan), SCENES[:1])
    bench.decode = lambda latents: latents
    still = lambda z, tau, keys: torch.full_like(z, torch.nan)  # noqa: E731  what is not given becomes NaN
    for name in judge.DETERMINED:
        still.prompt_keys = lambda context: None
        latents = bench.videos(still, name)
        given = [position for slot in bench.plan(name).slots for position in slot.positions]
        assert torch.equal(~latents.isnan().all((0, 1, 3, 4)), torch.isin(torch.arange(9), torch.tensor(given))), name


@torch.no_grad()
def test_the_table_has_a_mean_and_a_spread_over_the_seeds(monkeypatch):
    scenes, opened, asked = [SCENES[0], PAIRS[0], SCENES[1], PAIRS[1]], checkpoint.open(MODEL, Wan), []
    judges = [judge.Judge(opened, scenes, part=part) for part in (slice(2), slice(2, 4))]

    def figures(bench, network, seed, **settings):
        asked.append((seed, settings.get("history_guidance"), settings.get("context_noise")))
        yield "what", "px", torch.tensor([[1.0 + seed], [10.0 + 4 * seed]])

    monkeypatch.setattr(judge, "figures", figures)
    lines = judge.evaluate(judges, LORA).splitlines()
    assert asked == [(0, 1, 0), (1, 1, 0), (0, 1, 0), (1, 1, 0), (0, None, None), (1, None, None)]
    assert lines[-1] == "| what | px |" + " 1.5 ± 0.5 / 12.0 ± 2.0 |" * 3
    vae, truth = judges[0].vae, torch.stack([world.render(scene) for scene in scenes])
    assert f"| {judge.psnr(vae.decode(vae.encode(truth)), truth).mean():.1f} |" in lines[2]


def test_the_table_needs_no_gradients(monkeypatch):
    """Those of so many clips take more memory than there is."""
    bench, needed = judge.Judge(checkpoint.open(MODEL, Wan), [SCENES[0], PAIRS[0]]), []
    monkeypatch.setattr(judge, "figures", lambda *_, **__: iter(()))
    monkeypatch.setattr(judge, "psnr", lambda a, b: needed.append(a.requires_grad) or torch.zeros(len(a)))
    judge.evaluate([bench], LORA)
    assert needed == [False]


def test_a_clip_is_judged_by_its_own_scene():
    truth = torch.stack([world.render(scene) for scene in SCENES + PAIRS])
    readings, frames = world.measure(truth), range(33)
    assert judge.as_prompted(SCENES + PAIRS, readings).all() and judge.held_to_the_end(SCENES + PAIRS, readings).all()
    assert judge.centroid_errors(SCENES + PAIRS, readings, frames).max() < 1
    others = SCENES[1:] + SCENES[:1]
    assert not judge.as_prompted(others, readings).any()
    assert judge.centroid_errors(others, readings, frames).median() > 3
    gone = world.measure(torch.zeros(1, 3, 33, 64, 64))
    assert judge.centroid_errors(SCENES[:1], gone, frames).eq(64).all()


@torch.no_grad()
def test_the_lora_has_learned_a_noise_level_for_every_frame(pusa, truth):
    """On unseen clips the loss at a τ for each frame falls by a quarter or more; at one τ for all it hardly rises."""
    base = load_pipeline(MODEL, torch.float32)
    x0 = base.vae.encode(truth)
    generator = torch.Generator().manual_seed(0)
    x1 = torch.randn(x0.shape, generator=generator)
    context = base.text_encoder(*base.tokenizer([scene.caption for scene in SCENES]))
    losses = {}
    for p_async in (1.0, 0.0):
        tau = flow.sample_tau(*x0.shape[:3:2], p_async, generator=generator)
        x = flow.interpolate(x0, x1, tau)
        for name, model in (("base", base.transformer), ("LoRA", pusa.transformer)):
            losses[name, p_async] = flow.fafm_loss(model(x, tau, context), x0, x1, tau).item()
    assert losses["LoRA", 1.0] < 0.75 * losses["base", 1.0], losses
    assert losses["LoRA", 0.0] < 1.15 * losses["base", 0.0], losses


def test_it_is_what_sample_py_runs_without_flags(tmp_path):
    result = call(sample, "--out", tmp_path / "a.mp4")
    assert result.status == 0, result.err
    assert media.read_video(tmp_path / "a.mp4").shape == (3, world.FRAMES, world.SIDE, world.SIDE)


def test_a_stage_with_a_result_is_skipped_and_one_that_was_stopped_goes_on(tmp_path, monkeypatch):
    begun, config = [], TrainConfig(out=str(tmp_path))
    monkeypatch.setattr(grow, "train", lambda config, data: begun.append(config.resume))
    grow.train_or_resume(config, None, tmp_path / "result")
    (tmp_path / "settings.json").touch()
    grow.train_or_resume(config, None, tmp_path / "result")
    (tmp_path / "result").touch()
    grow.train_or_resume(config, None, tmp_path / "result")
    assert begun == [False, True]


@pytest.mark.slow
def test_one_command_grows_a_model_from_nothing_and_does_nothing_twice(tmp_path):
    out, flags = tmp_path / "out", ["--clips", 20, "--vae-steps", 2, "--base-steps", 2, "--lora-steps", 2]
    grown = call(grow, *flags, "--work", tmp_path / "work", "--out", out)
    assert grown.status == 0, grown.err
    opened = checkpoint.open(out, Wan)
    change = lora.load(out / "lora.safetensors")
    lora.merge(opened.transformer(), change, opened.preset.strength)
    assert {matrix.dtype for A, B, _ in change.pairs.values() for matrix in (A, B)} == {torch.bfloat16}
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = call(grow, *flags, "--work", tmp_path / "work", "--out", out)
    assert again.status == 0 and "training" not in again.err + again.out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
