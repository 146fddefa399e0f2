"""Training: it learns, changes only what it should, stops and goes on to the bit, and says what is wrong."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small import FRAMES, call, clips_fixture, count, mistake, model_fixture, write_clips  # noqa: F401 (fixtures)

import checkpoint
import data
import lora
import sample
import train
from text import UMT5Encoder
from train import Dataset, TrainConfig
from vae import WanVAE


def _train(model, clips, out, *arguments):
    flags = ["--model", model, "--data", clips, "--out", out, "--dtype", "float32"]
    return call(train, *flags, "--rank", 2, "--batch", 2, "--steps", 6, *arguments)


@pytest.fixture
def run(model, clips, tmp_path):
    """Run the command on the miniature model for a few steps in fp32, to the folder out."""
    return lambda *arguments, out="out": _train(model, clips, tmp_path / out, *arguments)


@pytest.fixture
def loaded(monkeypatch):
    """The transformers and text encoders that commands load, in order."""
    seen = SimpleNamespace(transformers=[], encoders=[])
    for name, models in (("load_transformer", seen.transformers), ("load_text_encoder", seen.encoders)):
        original = getattr(checkpoint, name)

        def load(*arguments, original=original, models=models):
            models.append(original(*arguments))
            return models[-1]

        monkeypatch.setattr(checkpoint, name, load)
    return seen


def _metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# It learns.


def test_one_clip_is_learned(run, tmp_path):
    write_clips(tmp_path / "one", 1)
    flags = ["--data", tmp_path / "one", "--full", "--lr", "5e-3", "--batch", 4]
    assert run(*flags, "--steps", 1, out="start").status == 0
    result = run(*flags, "--steps", 60, "--val-every", 30)
    assert result.status == 0, result.err
    start, middle, end = *_metrics(tmp_path / "start"), *_metrics(tmp_path / "out")
    assert (start["step"], middle["step"], end["step"]) == (1, 30, 60)
    for kind in ("sync", "async", "clean"):
        assert end[kind] < 0.5 * start[kind] and end[kind] < middle[kind], (kind, start, middle, end)
    assert end["loss"] < middle["loss"]


def test_a_lora_learns(run, tmp_path):
    assert run("--steps", 1, out="start").status == 0
    assert run("--steps", 30, "--lr", "1e-2", "--rank", 8).status == 0
    (start,), (end,) = _metrics(tmp_path / "start"), _metrics(tmp_path / "out")
    for kind in ("sync", "async", "clean"):
        assert end[kind] < 0.9 * start[kind], (kind, start, end)


# What is trained and what is written.


def test_a_lora_leaves_the_model_as_it_was_and_trains_ten_layers_of_each_block(run, loaded, model, tmp_path):
    result = run("--rank", 3, "--alpha", 6)
    assert result.status == 0, result.err
    trained, fresh = loaded.transformers[0], checkpoint.load_transformer(model, torch.float32)
    pairs = {f"blocks.{i}.{target}.lora_{matrix}" for i in range(2) for target in lora.TARGETS for matrix in "AB"}
    assert {name for name, p in trained.named_parameters() if p.requires_grad} == pairs
    assert not any(p.requires_grad for p in loaded.encoders[0].parameters())
    after = trained.state_dict()
    assert after.keys() == fresh.state_dict().keys() | pairs
    assert all(torch.equal(after[name], tensor) for name, tensor in fresh.state_dict().items())

    path = tmp_path / "out" / "lora.safetensors"
    assert result.out.split() == [str(path), str(tmp_path / "out" / "filmstrip.png")]
    written = lora.load(path)
    assert len(written) == 20
    for name, (A, B, alpha) in written.items():
        assert A.shape[0] == 3 and alpha == 6
        assert torch.equal(A, after[f"{name}.lora_A"]) and torch.equal(B, after[f"{name}.lora_B"])
        assert B.abs().max() > 0, "every pair has been trained"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert {name: metadata[name] for name in ("rank", "alpha", "base", "steps")} == {
        "rank": "3", "alpha": "6", "base": str(model), "steps": "6",
    }  # fmt: skip


def test_the_lora_merges_into_what_was_trained(run, loaded, model, tmp_path):
    assert run("--lr", "1e-2").status == 0
    merged = checkpoint.load_transformer(model, torch.float32)
    before = merged.blocks[0].ffn[0].weight.clone()
    lora.merge(merged, lora.load(tmp_path / "out" / "lora.safetensors"))
    assert (merged.blocks[0].ffn[0].weight - before).abs().max() > 1e-3
    x, tau, context = torch.randn(1, 16, 3, 4, 4), torch.rand(1, 3), torch.randn(1, 32, 16)
    torch.testing.assert_close(merged(x, tau, context), loaded.transformers[0](x, tau, context), atol=1e-4, rtol=1e-4)


def test_what_is_written_beside_the_lora(run, tmp_path):
    assert run("--val-every", 2, "--sample-every", 4, "--save-every", 2).status == 0
    out = tmp_path / "out"
    names = ["filmstrip.png", "lora.safetensors", "metrics.jsonl", "settings.json", "state.pt", "step-000004.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [line["step"] for line in _metrics(out)] == [2, 4, 6]
    assert set(_metrics(out)[0]) == {"step", "loss", "sync", "async", "clean"}
    assert TrainConfig(**json.loads((out / "settings.json").read_text())).rank == 2
    for name in ("filmstrip.png", "step-000004.png"):
        assert data.read_image(out / name).std() > 0.1
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == 6 and len(state["trained"]) == 40


def test_full_from_scratch_writes_a_model_that_sample_runs(run, loaded, model, tmp_path):
    """Text-to-video pretraining: the encoder is trained too, and only what was random before is another."""
    result = run("--full", "--from-scratch", "--p-async", 0, "--steps", 3, "--lr", "1e-2", "--drop-caption", 0)
    assert result.status == 0, result.err
    made = tmp_path / "out" / "model"
    assert result.out.split()[0] == str(made)
    for name, load, kept in (
        ("transformer", checkpoint.load_transformer, False),
        ("encoder", checkpoint.load_text_encoder, False),
        ("vae", checkpoint.load_vae, True),
    ):
        before, after = load(model).state_dict(), load(made).state_dict()
        assert before.keys() == after.keys()
        same = [name for name in before if torch.equal(before[name], after[name])]
        assert (len(same) == len(before)) == kept, name
    assert all(torch.equal(p, q) for p, q in zip(loaded.transformers[0].parameters(), _params(made), strict=True))
    assert checkpoint.load_preset(made) == checkpoint.load_preset(model)
    flags = ["--model", made, "--task", "t2v", "--prompt", "a red circle", "--out", tmp_path / "a.mp4"]
    sampled = call(sample, *flags, "--dtype", "float32")
    assert sampled.status == 0, sampled.err
    assert data.read_video(tmp_path / "a.mp4").shape[1] == FRAMES


def _params(folder):
    return checkpoint.load_transformer(folder).parameters()


def test_full_trains_every_weight_of_the_transformer_and_nothing_else(run, loaded, model):
    assert run("--full", "--lr", "1e-2").status == 0
    trained, encoder = loaded.transformers[0], loaded.encoders[0]
    fresh = checkpoint.load_transformer(model).state_dict()
    unchanged = [name for name, tensor in trained.state_dict().items() if torch.equal(tensor, fresh[name])]
    assert unchanged == []
    kept = checkpoint.load_text_encoder(model).state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in encoder.state_dict().items())


def test_bfloat16_trains_pairs_that_stay_fp32(run, loaded, model, tmp_path):
    result = run("--dtype", "bfloat16", "--steps", 2)
    assert result.status == 0, result.err
    A, B, _ = lora.load(tmp_path / "out" / "lora.safetensors")["blocks.0.ffn.0"]
    assert A.dtype == B.dtype == torch.float32 and B.abs().max() > 0
    assert A.bfloat16().float().ne(A).any(), "steps finer than bf16"


# Stopping and going on.


def _made(folder):
    """All that is in a run's LoRA. Not its bytes: safetensors writes metadata in any order."""
    with safe_open(folder / "lora.safetensors", "pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}, file.metadata()


@pytest.fixture(scope="module")
def whole(model, clips, tmp_path_factory):
    """What an uninterrupted run makes."""
    out = tmp_path_factory.mktemp("whole")
    assert _train(model, clips, out).status == 0
    return _made(out)


def _stop(monkeypatch, name, when, error):
    """Let a function of train.py raise the error at its call number `when`, counted from 0."""
    original, calls = getattr(train, name), []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == when + 1:
            raise error
        return original(*arguments)

    monkeypatch.setattr(train, name, stopping)


@pytest.mark.parametrize(("name", "when", "step"), [("step_loss", 0, 0), ("step_loss", 3, 3), ("validate", 1, 4)])
def test_a_stopped_run_goes_on_to_the_bit(name, when, step, run, whole, tmp_path, monkeypatch):
    """Ctrl-C may come within a step or, long as it takes, within a validation, after the step was taken."""
    with monkeypatch.context() as patch:
        _stop(patch, name, when, KeyboardInterrupt())
        stopped = run("--val-every", 2)
    sentence = stopped.err.splitlines()[-1]
    assert stopped.status == 130 and "stopped" in sentence and f"step {step};" in sentence and "--resume" in sentence
    assert not (tmp_path / "out" / "lora.safetensors").exists()
    result = run("--val-every", 2, "--resume")
    assert result.status == 0 and f"going on from step {step}" in result.out, result
    assert _made(tmp_path / "out") == whole


def test_a_killed_run_goes_on_from_its_last_save(run, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _stop(patch, "step_loss", 5, RuntimeError("power cut"))
        with pytest.raises(RuntimeError, match="power cut"):
            run("--save-every", 2)
    result = run("--save-every", 2, "--resume")
    assert result.status == 0 and "going on from step 4" in result.out
    assert _made(tmp_path / "out") == whole


def test_a_run_from_scratch_goes_on_to_the_bit(run, tmp_path, monkeypatch):
    flags = ["--full", "--from-scratch", "--steps", 4]
    assert run(*flags, out="whole").status == 0
    with monkeypatch.context() as patch:
        _stop(patch, "step_loss", 2, KeyboardInterrupt())
        assert run(*flags).status == 130
    assert run(*flags, "--resume").status == 0
    for part in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        whole, resumed = (load_file(tmp_path / out / "model" / f"{part}.safetensors") for out in ("whole", "out"))
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_seed_repeats_a_run_and_another_does_not(run, whole, tmp_path):
    torch.manual_seed(99)  # what the process drew before must not matter
    assert run().status == 0 and run("--seed", 1, out="other").status == 0
    assert _made(tmp_path / "out") == whole
    assert _made(tmp_path / "other") != whole


# Data.


def test_clips_and_captions_are_encoded_once(run, model, tmp_path, monkeypatch):
    counts = {"vae": 0, "text": 0}
    count(monkeypatch, counts, WanVAE, "encode", "vae")
    count(monkeypatch, counts, UMT5Encoder, "forward", "text")
    folder = write_clips(tmp_path / "clips", 3)
    assert run("--data", folder, "--steps", 1).status == 0
    assert counts == {"vae": 3, "text": 4}, "three captions and the empty one"
    assert run("--data", folder, "--steps", 1, out="second").status == 0
    assert counts == {"vae": 3, "text": 4}
    assert run("--data", folder, "--steps", 1, "--frames", 9, out="shorter").status == 0
    assert counts == {"vae": 6, "text": 4}, "other frames are other latents"
    assert sorted(path.suffix for path in folder.iterdir() if path.is_file()) == 3 * [".mp4"] + 3 * [".txt"]


def _numbered(count, validation=()):
    """A dataset whose clip i is a constant i, called "i"; and what it was asked to embed."""
    asked = []

    def context(prompts):
        asked.append(prompts)
        return torch.zeros(len(prompts), 2, 3)

    training = [i for i in range(count) if i not in validation]
    latents = [torch.full((16, 3, 2, 2), float(i)) for i in range(count)]
    return Dataset(latents, [str(i) for i in range(count)], context, list(validation), training), asked


def _network(x, tau, context):
    return torch.zeros_like(x)


def test_an_epoch_shows_every_training_clip_once():
    clips, asked = _numbered(10, validation=(2, 5))
    config = TrainConfig(batch=3, drop_caption=0.0)
    for step in range(16):
        train.step_loss(_network, clips, config, step, "cpu")
    shown = [int(prompt) for prompts in asked for prompt in prompts]
    epochs = [shown[i : i + 8] for i in range(0, 48, 8)]
    assert all(sorted(epoch) == clips.training for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6, "each in an order of its own"

    asked.clear()
    train.step_loss(_network, clips, config, 7, "cpu")
    assert asked == [[str(i) for i in shown[21:24]]], "a step's clips follow from its number alone"


def test_a_caption_goes_with_its_clip_and_is_dropped_as_often_as_asked():
    clips, asked = _numbered(8)
    seen = []

    def network(x, tau, context):
        seen.append((x, tau))
        return torch.zeros_like(x)

    for step in range(60):
        train.step_loss(network, clips, TrainConfig(batch=8, drop_caption=0.25), step, "cpu")
    prompts = [prompt for prompts in asked for prompt in prompts]
    assert 0.2 < prompts.count("") / len(prompts) < 0.3
    for (x, tau), names in zip(seen, asked, strict=True):
        for clip, levels, name in zip(x, tau, names, strict=True):
            if name:  # x = (1 - τ)·i + τ·noise; the noise of a whole frame is nearly 0 on average
                expected = (1 - levels) * int(name)
                assert (clip.mean((0, 2, 3)) - expected).abs().max() < 0.8


def test_a_step_draws_its_noise_by_ptss():
    clips, _ = _numbered(8)
    taus = {}
    for p_async in (0.0, 1.0):
        seen = []

        def network(x, tau, context, seen=seen):
            seen.append(tau)
            return torch.zeros_like(x)

        for step in range(20):
            train.step_loss(network, clips, TrainConfig(p_async=p_async), step, "cpu")
        taus[p_async] = torch.cat(seen)
    assert (taus[0.0] == taus[0.0][:, :1]).all() and len(taus[0.0][:, 0].unique()) == 160
    assert len(taus[1.0].unique()) == 480
    shifted = []
    train.step_loss(lambda x, tau, c: shifted.append(tau) or x, clips, TrainConfig(shift=5.0), 0, "cpu")
    plain = taus[1.0][:8]
    torch.testing.assert_close(shifted[0], 5 * plain / (1 + 4 * plain))


def test_one_clip_in_ten_is_kept_for_validation(model, tmp_path):
    folder = tmp_path / "clips"
    for i in range(20):
        data.save_image(folder / f"{i:02d}.png", torch.full((3, 32, 32), i / 10 - 1))
        (folder / f"{i:02d}.txt").write_text(f"number {i}")
    encoder = checkpoint.load_text_encoder(model)
    config = TrainConfig(data=str(folder), model=str(model), frames=1)
    clips = train.prepare(config, encoder, "cpu", torch.float32)
    assert len(clips.validation) == 2 and len(clips.training) == 18
    assert sorted(clips.validation + clips.training) == list(range(20))
    assert clips.prompts == [f"number {i}" for i in range(20)] and clips.latents[0].shape == (16, 1, 4, 4)
    ids, mask = checkpoint.load_tokenizer(model)(["number 3", ""])
    torch.testing.assert_close(clips.context(["number 3", ""]), encoder(ids, mask))


# Figures.


def test_validation_depends_on_the_weights_alone(run, tmp_path):
    """Steps that change nothing must not change a figure: only then can figures of two steps be compared."""
    assert run("--lr", "1e-30", "--val-every", 1, "--steps", 3).status == 0
    first, *others = _metrics(tmp_path / "out")
    for line in others:
        assert all(line[kind] == first[kind] for kind in ("sync", "async", "clean"))
        assert line["loss"] != first["loss"]


def test_validation_knows_a_perfect_network_and_an_idle_one():
    clips, _ = _numbered(12, validation=(0, 1, 2, 3))
    idle = train.validate(_network, clips, "cpu", torch.float32)
    assert set(idle) == {"sync", "async", "clean"}
    assert idle["sync"] == idle["async"] == idle["clean"] > 3, "x1 - x0 of constants 0 to 3"

    seen = []

    def perfect(x, tau, context):
        seen.append(tau)
        tau = tau[:, None, :, None, None]
        x0 = torch.arange(4.0)[:, None, None, None, None]
        return torch.where(tau > 0, (x - x0) / tau, torch.nan)

    figures = train.validate(perfect, clips, "cpu", torch.float32)
    assert figures["sync"] < 1e-6 and figures["async"] < 1e-6
    together, apart, one_clean = seen
    assert together.shape == apart.shape == one_clean.shape == (4, 3)
    assert (together == together[:, :1]).all() and len(apart.unique()) == 12
    assert (one_clean[:, 0] == 0).all() and torch.equal(one_clean[:, 1:], together[:, 1:])


@pytest.mark.parametrize("steps", [1, 5, 300, 6000])
def test_rate_warms_up_and_comes_down(steps):
    rates = [train.rate(step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in rates)
    top = rates.index(max(rates))
    assert rates[top] > 0.97 and top <= min(100, steps // 10 + 1)
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert train.rate(steps, steps) == pytest.approx(0, abs=1e-9)
    if steps == 6000:
        assert rates[0] == 0.01 and rates[3000] == pytest.approx(0.5)


def test_fingerprint_tells_weights_apart(model):
    vae = checkpoint.load_vae(model)
    before = train.fingerprint(vae)
    assert train.fingerprint(checkpoint.load_vae(model)) == before
    with torch.no_grad():
        vae.decoder.conv1.bias[3] += 1e-6
    assert train.fingerprint(vae) != before


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rank 0", ["got --rank 0", "at least 1"]),
        ("--alpha 0", ["alpha 0", "positive"]),
        ("--steps 0", ["got --steps 0", "at least 1"]),
        ("--batch -2", ["got --batch -2", "at least 1"]),
        ("--lr 0", ["got --lr 0", "between 0 and 1"]),
        ("--lr 5", ["got --lr 5", "between 0 and 1"]),
        ("--lr nan", ["got --lr nan"]),
        ("--p-async 2", ["got --p-async 2", "[0, 1]"]),
        ("--drop-caption -0.1", ["got --drop-caption -0.1", "[0, 1]"]),
        ("--shift 0", ["got shift 0", "above 0"]),
        ("--from-scratch", ["--from-scratch without --full", "add --full"]),
        ("--resume", ["got --resume", "state.pt", "without --resume"]),
        ("--frames 26", ["got 26 frames", "4k+1"]),
        ("--frames 0", ["got 0 frames", "4k+1"]),
        ("--frames 37", ["00000.mp4", "33 frames", "37"]),
        ("--size 30x32", ["got size 30x32", "multiples of 16"]),
        ("--device nonsense", ["got --device nonsense"]),
        ("--model none", ["got none as a model"]),
        ("--data none", ["none is not a folder"]),
        ("--data EMPTY", ["holds no clips"]),
        ("--data SILENT", ["1 of 3 clips", "00001.txt"]),
        ("--data BROKEN", ["00000.mp4", "cannot be read as a video"]),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_run(flags, words, run, tmp_path):
    if "EMPTY" in flags:
        (tmp_path / "EMPTY").mkdir()
    if "SILENT" in flags:
        (write_clips(tmp_path / "SILENT", 3) / "00001.txt").unlink()
    if "BROKEN" in flags:
        (write_clips(tmp_path / "BROKEN", 1) / "00000.mp4").write_text("no video")
    for name in ("EMPTY", "SILENT", "BROKEN"):
        flags = flags.replace(name, str(tmp_path / name))
    mistake(run(*flags.split()), *words)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def short(model, clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("short")
    assert _train(model, clips, out, "--steps", 2).status == 0
    return out


@pytest.fixture
def finished(short, tmp_path):
    """The bytes of the files of a finished run, which is now in the folder out."""
    shutil.copytree(short, tmp_path / "out")
    return {path.name: path.read_bytes() for path in short.iterdir()}


def test_a_run_is_not_replaced(run, finished, tmp_path):
    mistake(run("--steps", 2), str(tmp_path / "out"), "holds a run", "--resume")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == finished


@pytest.mark.parametrize("flags", ["--rank 4", "--rank 1", "--full", "--full --from-scratch"])
def test_a_run_of_other_weights_does_not_go_on(flags, run, finished, tmp_path):
    result = run("--resume", "--steps", 3, *flags.split())
    mistake(result, "--resume")
    assert (tmp_path / "out" / "lora.safetensors").read_bytes() == finished["lora.safetensors"]


def test_a_damaged_state_is_named(run, finished, tmp_path):
    path = tmp_path / "out" / "state.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    mistake(run("--resume", "--steps", 3), "state.pt")


def test_a_loss_that_is_no_number_stops_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "step_loss", lambda *arguments: torch.tensor(float("nan"), requires_grad=True))
    result = run()
    assert result.status == 2 and "the loss is nan at step 0" in result.err.splitlines()[-1], result
    assert "--lr" in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out" / "lora.safetensors").exists()
