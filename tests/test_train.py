"""Training: it learns, changes only what it should, stops and goes on to the bit, and says what is wrong."""

import dataclasses
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from small import FRAMES, call, clips_fixture, count, mistake, model_fixture, write_clips  # noqa: F401 (fixtures)

import lora
import sample
import train
from model import Wan
from support import cache, dataset, media, resume
from support.dataset import Dataset
from train import TrainConfig
from wan import checkpoint, lora_files
from wan.text import UMT5Encoder
from wan.vae import WanVAE


def _train(model, clips, out, *arguments):
    flags = ["--model", model, "--data", clips, "--out", out, "--dtype", "float32", "--val-every", 0]
    return call(train, *flags, "--rank", 2, "--batch", 2, "--steps", 6, *arguments)


@pytest.fixture
def run(model, clips, tmp_path):
    """Run the command on the miniature model for a few steps in fp32, to the folder out."""
    return lambda *arguments, out="out": _train(model, clips, tmp_path / out, *arguments)


@pytest.fixture
def loaded(monkeypatch):
    """The transformers and text encoders that commands load, in order."""
    seen = SimpleNamespace(transformers=[], encoders=[])
    for name, models in (("transformer", seen.transformers), ("text_encoder", seen.encoders)):
        original = getattr(checkpoint.Opened, name)

        def load(*arguments, original=original, models=models, **named):
            models.append(original(*arguments, **named))
            return models[-1]

        monkeypatch.setattr(checkpoint.Opened, name, load)
    return seen


def _open(model):
    return checkpoint.open(model, Wan)


def _metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _validations(folder):
    return [line for line in _metrics(folder) if "sync" in line]


# It learns.


def test_one_clip_is_learned(run, tmp_path):
    write_clips(tmp_path / "one", 1)
    flags = ["--data", tmp_path / "one", "--full", "--lr", "5e-3", "--batch", 4]
    result = run(*flags, "--steps", 60, "--val-every", 30)
    assert result.status == 0, result.err
    start, middle, end = _validations(tmp_path / "out")
    assert (start["step"], middle["step"], end["step"]) == (0, 30, 60)
    for kind in ("sync", "async", "clean"):
        assert end[kind] < 0.5 * start[kind] and end[kind] < middle[kind], (kind, start, middle, end)
    assert end["smooth"] < middle["smooth"]


def test_a_lora_learns(run, tmp_path):
    assert run("--steps", 30, "--lr", "1e-2", "--rank", 8, "--val-every", 30).status == 0
    start, end = _validations(tmp_path / "out")
    for kind in ("sync", "async", "clean", "copy"):
        assert end[kind] < 0.9 * start[kind], (kind, start, end)


@pytest.mark.slow
def test_levels_of_ones_own_teach_another_thing_than_one_for_all(tmp_path):
    """What the README's two trainings show, on the embedded model, in fewer steps."""
    root, last = Path(__file__).parent.parent, {}
    flags = ["--model", root / "checkpoints/tiny", "--data", root / "clips", "--cache", tmp_path / "cache"]
    for p_async in (0, 1):
        out = tmp_path / str(p_async)
        more = ["--p-async", p_async, "--out", out, "--steps", 30, "--val-every", 30]
        assert call(train, *flags, *more, "--device", "cpu").status == 0
        before, last[p_async] = _validations(out)
    assert last[1]["async"] < 0.95 * last[0]["async"] and last[0]["sync"] < last[1]["sync"]
    assert before["copy"] < 0.3, "far from 1, although the base takes little from the clean frame"


# What is trained and what is written.


def test_a_lora_leaves_the_model_as_it_was_and_trains_ten_layers_of_each_block(run, loaded, model, tmp_path):
    result = run("--rank", 3, "--alpha", 6)
    assert result.status == 0, result.err
    trained, fresh = loaded.transformers[0], _open(model).transformer(torch.float32)
    pairs = {f"blocks.{i}.{target}.lora_{matrix}" for i in range(2) for target in lora.TARGETS for matrix in "AB"}
    assert {name for name, p in trained.named_parameters() if p.requires_grad} == pairs
    after = trained.state_dict()
    assert after.keys() == fresh.state_dict().keys() | pairs
    assert all(torch.equal(after[name], tensor) for name, tensor in fresh.state_dict().items())

    path = tmp_path / "out" / "lora.safetensors"
    made = [str(tmp_path / "out" / name) for name in (path.name, "filmstrip.png", "report.html")]
    assert result.out.splitlines()[-3:] == made
    written = lora.load(path)
    assert len(written) == 20
    for name, (A, B, alpha) in written.pairs.items():
        assert A.shape[0] == 3 and alpha == 6
        assert torch.equal(A, after[f"{name}.lora_A"]) and torch.equal(B, after[f"{name}.lora_B"])
        assert B.abs().max() > 0, "every pair has been trained"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    digest = json.loads((path.parent / "facts.json").read_text())["dataset"]
    assert {name: metadata[name] for name in ("rank", "alpha", "base", "steps", "dataset")} == {
        "rank": "3", "alpha": "6", "base": str(model), "steps": "6", "dataset": digest,
    }  # fmt: skip
    assert len(digest) == 16


def test_the_lora_merges_into_what_was_trained(run, loaded, model, tmp_path):
    assert run("--lr", "1e-2").status == 0
    merged = _open(model).transformer(torch.float32)
    before = merged.blocks[0].ffn[0].weight.clone()
    lora.merge(merged, lora.load(tmp_path / "out" / "lora.safetensors"))
    assert (merged.blocks[0].ffn[0].weight - before).abs().max() > 1e-3
    x, tau, context = torch.randn(1, 16, 3, 4, 4), torch.rand(1, 3), torch.randn(1, 32, 16)
    torch.testing.assert_close(merged(x, tau, context), loaded.transformers[0](x, tau, context), atol=1e-4, rtol=1e-4)


def test_what_is_written_beside_the_lora(run, tmp_path):
    assert run("--val-every", 2, "--sample-every", 4, "--save-every", 2).status == 0
    out = tmp_path / "out"
    names = ["best.safetensors", "facts.json", "filmstrip.png", "lora.safetensors", "metrics.jsonl", "report.html"]
    names += ["settings.json", "state-000004.pt", "state-000006.pt", "step-000004.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [line["step"] for line in _metrics(out)] == [0, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in _validations(out)] == [0, 2, 4, 6]
    figures, kinds = {"step", "seconds", "flops", "best"}, {"sync", "async", "clean", "copy"}
    before, first, second, *_, last = _metrics(out)
    assert set(before) == figures | kinds, "nothing was trained yet, but it is measured"
    figures |= {"loss", "smooth", "lr", "samples/s", "tokens/s"}
    assert set(first) == figures and set(second) == figures | kinds
    assert last["flops"] == pytest.approx(6 * first["flops"])
    assert TrainConfig(**json.loads((out / "settings.json").read_text())).rank == 2
    for name in ("filmstrip.png", "step-000004.png"):
        assert media.read_image(out / name).std() > 0.1
    state = torch.load(out / "state-000006.pt", weights_only=True)
    assert state["figures"]["step"] == 6 and len(state["model"]) == 40


def _losses(*losses):
    return dict.fromkeys(("sync", "async", "clean"), torch.tensor(losses))


def test_the_last_states_are_kept_and_the_lora_that_is_better_by_more_than_the_spread(run, tmp_path, monkeypatch):
    scores = iter([
        _losses(9.0, 1.0), _losses(math.nan, 1.0), _losses(8.0, 0.5), _losses(8.5, 0.5),
        _losses(6.9, 1.4),  # better on average, by less than the triples differ
        _losses(7.4, 0.4),
    ])  # fmt: skip
    monkeypatch.setattr(train, "validate", lambda *a: next(scores))
    assert run("--steps", 5, "--val-every", 1, "--save-every", 1, "--keep", 3).status == 0
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("state-*")) == [f"state-00000{n}.pt" for n in (3, 4, 5)]
    assert [line["best"] for line in _validations(out)] == [0, 0, 2, 2, 2, 5]
    with safe_open(out / "best.safetensors", "pt") as file:
        assert file.metadata()["steps"] == "5"


def test_no_lora_is_the_best_if_none_beats_no_lora_at_all(run, tmp_path, monkeypatch):
    scores = iter([_losses(1.0, 2.0), _losses(1.1, 2.1), _losses(1.2, 2.1)])
    monkeypatch.setattr(train, "validate", lambda *a: next(scores))
    result = run("--steps", 2, "--val-every", 1)
    assert result.status == 0 and not (tmp_path / "out" / "best.safetensors").exists()
    told = [line for line in result.err.splitlines() if line.startswith("step ")]
    assert told == [
        "step 0: sync 1.5000, async 1.5000, clean 1.5000",
        "step 1: sync 1.6000, async 1.6000, clean 1.6000; best: step 0",
        "step 2: sync 1.6500, async 1.6500, clean 1.6500; best: step 0",
    ]


def test_blocks_are_compiled_inside_of_what_is_recomputed(run, monkeypatch):
    """The other way round the compiler gives up, and says nothing."""
    compiled, before = [], []
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(f) or f)
    monkeypatch.setattr(Wan, "recompute_blocks", lambda transformer: before.append([*compiled]))
    assert run("--steps", 1, "--compile", "--gradient-checkpointing").status == 0
    assert len(compiled) == 2 and before[0] == compiled


def test_tensorboard_gets_every_figure_where_it_is_installed(run, tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == str(tmp_path / "out" / "tensorboard") and purge_step == 1

        def add_scalar(self, name, value, step):
            seen.append((name, value, step))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    assert run("--steps", 2).status == 0
    lines = _metrics(tmp_path / "out")
    expected = {(name, line[name], line["step"]) for line in lines for name in line if name != "step"}
    assert seen.pop() == "closed" and len(seen) == len(expected) and set(seen) == expected


def test_full_from_scratch_writes_a_model_that_sample_runs(run, loaded, model, tmp_path):
    """Text-to-video pretraining: the encoder is trained too, and only what was random before is another."""
    result = run("--full", "--from-scratch", "--p-async", 0, "--steps", 3, "--lr", "1e-2", "--drop-caption", 0)
    assert result.status == 0, result.err
    made = tmp_path / "out" / "model"
    assert result.out.splitlines()[-3] == str(made)
    for name, load, kept in (
        ("transformer", checkpoint.Opened.transformer, False),
        ("encoder", checkpoint.Opened.text_encoder, False),
        ("vae", checkpoint.Opened.vae, True),
    ):
        before, after = load(_open(model)).state_dict(), load(_open(made)).state_dict()
        assert before.keys() == after.keys()
        same = [name for name in before if torch.equal(before[name], after[name])]
        assert (len(same) == len(before)) == kept, name
    assert all(torch.equal(p, q) for p, q in zip(loaded.transformers[0].parameters(), _params(made), strict=True))
    assert _open(made).preset == _open(model).preset
    flags = ["--model", made, "--task", "t2v", "--prompt", "a red circle", "--out", tmp_path / "a.mp4"]
    sampled = call(sample, *flags, "--dtype", "float32")
    assert sampled.status == 0, sampled.err
    assert media.read_video(tmp_path / "a.mp4").shape[1] == FRAMES


def _params(folder):
    return _open(folder).transformer().parameters()


def test_full_trains_every_weight_of_the_transformer_and_nothing_else(run, loaded, model, tmp_path):
    assert run("--full", "--lr", "1e-2").status == 0
    trained, encoder = loaded.transformers[0], _open(tmp_path / "out" / "model").text_encoder()
    fresh = _open(model).transformer().state_dict()
    unchanged = [name for name, tensor in trained.state_dict().items() if torch.equal(tensor, fresh[name])]
    assert unchanged == []
    kept = _open(model).text_encoder().state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in encoder.state_dict().items())


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(model):
    transformer, encoder = _open(model).transformer(), _open(model).text_encoder().requires_grad_()
    config = TrainConfig(full=True, muon=True)
    train.trainable(transformer, config)
    adamw, muon = train.make_optimizers(config, [transformer, encoder])
    names = {id(parameter): name for name, parameter in transformer.named_parameters()}
    names |= {id(parameter): f"text.{name}" for name, parameter in encoder.named_parameters()}
    taken = [names[id(parameter)] for parameter in muon.param_groups[0]["params"]]
    of_text = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
    matrices = [f"blocks.{i}.{target}.weight" for i in range(2) for target in lora.TARGETS]
    matrices += [f"text.blocks.{i}.{target}.weight" for i in range(len(encoder.blocks)) for target in of_text]
    assert sorted(taken) == sorted(matrices)
    others = [names[id(parameter)] for parameter in adamw.param_groups[0]["params"]]
    assert sorted(taken + others) == sorted(names.values())
    (alone,) = train.make_optimizers(TrainConfig(full=True), [transformer])
    assert len(alone.param_groups[0]["params"]) == len(list(transformer.parameters()))


def test_bfloat16_trains_pairs_that_stay_fp32(run, loaded, model, tmp_path):
    result = run("--dtype", "bfloat16", "--steps", 2)
    assert result.status == 0, result.err
    A, B, _ = lora.load(tmp_path / "out" / "lora.safetensors").pairs["blocks.0.ffn.0"]
    assert A.dtype == B.dtype == torch.float32 and B.abs().max() > 0
    assert A.bfloat16().float().ne(A).any(), "steps finer than bf16"


# Stopping and going on.


def _made(folder):
    return (folder / "lora.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(model, clips, tmp_path_factory):
    """What an uninterrupted run makes."""
    out = tmp_path_factory.mktemp("whole")
    assert _train(model, clips, out).status == 0
    return _made(out)


def _at(monkeypatch, name, when, action):
    """Let a function of train.py do something more at its call number `when`, counted from 0."""
    original, calls = getattr(train, name), []

    def acting(*arguments):
        calls.append(arguments)
        if len(calls) == when + 1:
            action()
        return original(*arguments)

    monkeypatch.setattr(train, name, acting)


def _cut():
    raise RuntimeError("power cut")


@pytest.mark.parametrize(("name", "when", "step"), [("step_loss", 0, 1), ("step_loss", 3, 4), ("validate", 2, 4)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_bit(number, name, when, step, run, whole, tmp_path, monkeypatch):
    """Ctrl-C, or a scheduler's signal, may come within a step or a validation; what has begun is finished and saved."""
    before = signal.getsignal(signal.SIGINT)  # which a shell may have set to be ignored
    with monkeypatch.context() as patch:
        _at(patch, name, when, lambda: signal.raise_signal(number))
        stopped = run("--val-every", 2)
    sentence = stopped.err.splitlines()[-1]
    assert stopped.status == 130 and "stopped" in sentence and f"step {step};" in sentence and "--resume" in sentence
    assert not (tmp_path / "out" / "lora.safetensors").exists()
    result = run("--val-every", 2, "--resume")
    assert result.status == 0 and f"going on from step {step}" in result.out, result
    assert _made(tmp_path / "out") == whole
    assert [line["step"] for line in _metrics(tmp_path / "out")] == [0, 1, 2, 3, 4, 5, 6]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(run, tmp_path, monkeypatch):
    def twice():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    _at(monkeypatch, "step_loss", 3, twice)
    stopped = run("--save-every", 2)
    assert stopped.status == 130 and "last save" in stopped.err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").glob("state-*")] == ["state-000002.pt"]


@pytest.mark.parametrize(("when", "step"), [(1, None), (5, 4)])
def test_a_killed_run_goes_on_from_its_last_save_or_begins_again(when, step, run, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _at(patch, "step_loss", when, _cut)
        with pytest.raises(RuntimeError, match="power cut"):
            run("--save-every", 2, "--val-every", 3)
    with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # the line that it was writing
    (tmp_path / "out" / ".state-000006.1.tmp.pt").write_bytes(b"half a file")
    result = run("--save-every", 2, "--val-every", 3, "--resume")
    assert result.status == 0 and (f"going on from step {step}" in result.out) == (step is not None)
    assert _made(tmp_path / "out") == whole
    assert [line["step"] for line in _metrics(tmp_path / "out")] == [0, 1, 2, 3, 4, 5, 6]
    assert not list((tmp_path / "out").glob(".*"))


class _Killed(BaseException):
    pass


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(run, model, clips, tmp_path, monkeypatch):
    """Killed before or in the middle of whatever it does to the disk, or before a step, and begun again each time."""
    flags = ["--save-every", 1, "--val-every", 2, "--keep", 1]
    draw, left = random.Random(0), [0]

    def deadly(owner, name, midway=None):
        original = getattr(owner, name)

        def call(*arguments, **named):
            left[0] -= 1
            if left[0] == 0:
                if midway:
                    midway(*arguments)
                raise _Killed
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, call)

    assert run(*flags, out="whole").status == 0
    deadly(os, "replace")
    deadly(torch, "save", lambda state, path: path.write_bytes(b"half a state"))
    deadly(train, "step_loss")
    deadly(resume.Run, "log", lambda run, *a: (run.out / "metrics.jsonl").open("a").write('{"step": 9'))
    deadly(pathlib.Path, "unlink")
    kills = begun = 0
    while kills < 20:
        left[0] = draw.randint(1, 25)
        resumed = ["--resume"] if (tmp_path / "out" / "settings.json").exists() else []
        try:
            assert run(*flags, *resumed).status == 0
            assert _made(tmp_path / "out") == _made(tmp_path / "whole")
            shutil.rmtree(tmp_path / "out")
            begun += 1
        except _Killed:
            kills += 1
    left[0] = 0
    assert run(*flags, *(["--resume"] if (tmp_path / "out" / "settings.json").exists() else [])).status == 0
    for name in ("lora.safetensors", "best.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert begun >= 1 and [line["step"] for line in _metrics(tmp_path / "out")] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_sigkill(run, model, clips, tmp_path):
    """A process of its own, killed for real: while it trains, while it writes a state, and again."""
    flags = ["--save-every", 1, "--steps", 30]
    assert run(*flags, out="whole").status == 0
    out = tmp_path / "out"
    common = ["--model", model, "--data", clips, "--out", out, "--dtype", "float32", "--rank", 2, "--batch", 2, *flags]
    command = [sys.executable, "train.py", "--device", "cpu", *map(str, common)]
    moments = (
        lambda: len(list(out.glob("state-*.pt"))) == 2,
        lambda: any(".state" in path.name for path in out.glob(".*.tmp*")),
        lambda: any(out.glob(".*.tmp*")),
    )
    ends = []
    for moment in moments:
        resumed = ["--resume"] if (out / "settings.json").exists() else []
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command + resumed, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
        while process.poll() is None and not moment():
            time.sleep(0.0005)
        process.kill()
        ends.append(process.wait())
    assert ends[0] == -signal.SIGKILL
    assert run(*flags, "--resume").status == 0
    assert _made(out) == _made(tmp_path / "whole")


def test_a_run_from_scratch_goes_on_to_the_bit(run, tmp_path, monkeypatch):
    flags = ["--full", "--from-scratch", "--muon", "--steps", 4]
    assert run(*flags, out="whole").status == 0
    with monkeypatch.context() as patch:
        _at(patch, "step_loss", 1, lambda: signal.raise_signal(signal.SIGINT))
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


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_any_seed_of_64_bits_trains(run, seed):
    assert run(f"--seed={seed}", "--steps", 1).status == 0


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
    assert counts == {"vae": 3 + 3 * 3, "text": 4}, "other frames are other latents, in three windows of each clip"
    assert sorted(path.suffix for path in folder.iterdir() if path.is_file()) == 3 * [".mp4"] + 3 * [".txt"]


def _numbered(count, validation=()):
    """A dataset whose clip i is a constant i, called "i"; and what it was asked to embed."""
    asked = []

    def context(prompts):
        asked.append(prompts)
        return torch.zeros(len(prompts), 2, 3)

    training = [i for i in range(count) if i not in validation]
    latents = [torch.full((16, 3, 2, 2), float(i)) for i in range(count)]
    return Dataset(latents, [str(i) for i in range(count)], context, list(validation), [training]), asked


def _step_loss(network, clips, config, step, part=0):
    return train.step_loss(network, train.draw(clips, config, step, part), clips.context, config.weighting, "cpu")


def _network(x, tau, context):
    return torch.zeros_like(x)


def test_an_epoch_shows_every_training_clip_once():
    clips, asked = _numbered(10, validation=(2, 5))
    config = TrainConfig(batch=3, drop_caption=0.0)
    for step in range(16):
        _step_loss(_network, clips, config, step)
    shown = [int(prompt) for prompts in asked for prompt in prompts]
    epochs = [shown[i : i + 8] for i in range(0, 48, 8)]
    assert all(sorted(epoch) == clips.training[0] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6, "each in an order of its own"

    asked.clear()
    _step_loss(_network, clips, config, 7)
    assert asked == [[str(i) for i in shown[21:24]]], "a step's clips follow from its number alone"


def test_a_caption_goes_with_its_clip_and_is_dropped_as_often_as_asked():
    clips, asked = _numbered(8)
    seen = []

    def network(x, tau, context):
        seen.append((x, tau))
        return torch.zeros_like(x)

    for step in range(60):
        _step_loss(network, clips, TrainConfig(batch=8, drop_caption=0.25), step)
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
            _step_loss(network, clips, TrainConfig(p_async=p_async), step)
        taus[p_async] = torch.cat(seen)
    assert (taus[0.0] == taus[0.0][:, :1]).all() and len(taus[0.0][:, 0].unique()) == 160
    assert len(taus[1.0].unique()) == 480
    shifted = []
    _step_loss(lambda x, tau, c: shifted.append(tau) or x, clips, TrainConfig(shift=5.0), 0)
    plain = taus[1.0][:8]
    torch.testing.assert_close(shifted[0], 5 * plain / (1 + 4 * plain))


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """The model with a second expert."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("two") / "model")
    one, low = _open(model).transformer(), _open(model).transformer()
    low.init_weights()
    preset = dataclasses.replace(_open(model).preset, boundary=0.8)
    checkpoint.save_pipeline(folder, {"transformer": one, "transformer_2": low}, preset)
    return folder


@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_is_trained_at_all_noise_levels_and_walks_its_own(expert, run, two, loaded, tmp_path, monkeypatch):
    """Its conditions are clean when it samples, so it must have seen clean frames in training."""
    trained, others, validated, original, validate = [], [], [], Wan.forward, train.validate

    def forward(self, x, tau, context):
        if tau.device.type != "meta":  # where operations are counted
            (trained if torch.is_grad_enabled() else others).append(tau)
        return original(self, x, tau, context)

    def validating(*arguments):
        figures = validate(*arguments)
        validated.extend(others)
        others.clear()
        return figures

    monkeypatch.setattr(Wan, "forward", forward)
    monkeypatch.setattr(train, "validate", validating)
    result = run("--model", two, "--expert", expert, "--steps", 3, "--val-every", 1, "--shift", 5)
    assert result.status == 0, result.err
    for levels in (torch.cat(trained), torch.cat(validated)):
        assert levels.min() < 0.3 and levels.max() > 0.9, "on both sides of the boundary"
    assert len(torch.cat(trained).unique()) == 3 * 2 * 7
    low, high = (0.8, 1) if expert == "high" else (0, 0.8)
    levels = torch.cat([tau.flatten() for tau in others])  # of the filmstrip, which has clean frames as conditions
    assert ((levels == 0) | (levels >= low) & (levels <= high)).all() and levels.max() > low
    fresh = _open(two).transformer(torch.float32, expert=expert).state_dict()
    assert all(torch.equal(loaded.transformers[0].state_dict()[name], tensor) for name, tensor in fresh.items())
    with safe_open(tmp_path / "out" / "lora.safetensors", "pt") as file:
        assert file.metadata()["expert"] == expert
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["expert"], settings["boundary"]) == (expert, 0.8)


def test_all_weights_of_an_expert_are_written_beside_the_other(run, two, tmp_path):
    assert run("--model", two, "--expert", "low", "--full", "--steps", 1, "--lr", "1e-2").status == 0
    made = tmp_path / "out" / "model"
    for expert, same in (("high", True), ("low", False)):
        before, after = (_open(folder).transformer(expert=expert).state_dict() for folder in (two, made))
        assert all(torch.equal(before[name], after[name]) for name in before) == same, expert
    assert _open(made).preset.boundary == 0.8
    assert run("--model", two, "--expert", "low", "--boundary", 0.7, "--full", "--steps", 1, out="other").status == 0
    assert _open(tmp_path / "other" / "model").preset.boundary == 0.7, "where it was trained"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model TWO", ["two experts", "high or low"]),
        ("--expert low", ["got --expert low", "expected none", "one transformer"]),
        ("--boundary 0.9", ["--boundary without --expert"]),
        ("--model TWO --expert low --boundary 1", ["got --boundary 1", "between 0 and 1"]),
        ("--model TWO --expert low --full --from-scratch", ["--from-scratch with --expert"]),
    ],
)
def test_experts_are_chosen_where_there_are_two(flags, words, run, two, tmp_path):
    mistake(run(*flags.replace("TWO", str(two)).split()), *words)
    assert not (tmp_path / "out").exists()


def _pictures(folder, count):
    """A folder of so many small pictures of one colour each, with captions."""
    for i in range(count):
        media.save_image(folder / f"{i:03d}.png", torch.full((3, 16, 16), 2 * i / count - 1))
        (folder / f"{i:03d}.txt").write_text(f"number {i}")
    return folder


@pytest.mark.parametrize(("count", "apart"), [(79, 0), (80, 8)])
def test_clips_are_kept_for_validation_where_eight_can_be(count, apart, model, tmp_path, capsys):
    folder = _pictures(tmp_path / "clips", count)
    config = TrainConfig(data=str(folder), model=str(model), frames=1, size="16x16", device="cpu", dtype="float32")
    clips = train.encoded_clips(_open(model), train.checked(config, _open(model)), None)
    (training,) = clips.training
    assert len(training) == count - apart and len(clips.validation) == (apart or 16)
    assert set(clips.validation).isdisjoint(training) == bool(apart), "else they are some of those trained on"
    assert sorted({*clips.validation, *training}) == list(range(count))
    said = "8 clips, set apart" if apart else "16 of the clips that are trained on"
    assert f"validation on {said}" in capsys.readouterr().out
    assert clips.prompts == [f"number {i}" for i in range(count)] and clips.latents[0].shape == (16, 1, 2, 2)
    ids, mask = _open(model).tokenizer()(["number 3", ""])
    torch.testing.assert_close(clips.context(["number 3", ""]), _open(model).text_encoder()(ids, mask))


def _mixed(folder):
    """Two long clips of the toy world, a wide one, and three that cannot be used."""
    write_clips(folder, 2)
    media.write_video(folder / "wide.mp4", torch.rand(3, 20, 48, 96) * 2 - 1, 16)
    media.write_video(folder / "short.mp4", torch.zeros(3, 5, 32, 32), 16)
    (folder / "broken.mp4").write_text("no video")
    for name in ("wide", "short", "broken"):
        (folder / f"{name}.txt").write_text(name)
    media.write_video(folder / "silent.mp4", torch.zeros(3, 33, 32, 32), 16)
    return folder


def test_clips_of_any_kind_are_trained_on_and_the_others_named(run, tmp_path):
    folder = _mixed(tmp_path / "mixed")
    result = run("--data", folder, "--frames", 9, "--batch", 3, "--cache", tmp_path / "cache")
    assert result.status == 0, result.err
    listing = result.out.splitlines()[:4]
    assert listing[0] == "clips left out: 3" and listing[1].startswith("  broken.mp4: cannot be read as a video")
    assert listing[2] == "  short.mp4: too short: 5 frames at 16 fps, expected 9; --frames 5 takes it"
    assert listing[3].startswith("  silent.mp4: no caption: write one in silent.txt")
    assert result.out.splitlines()[4:8] == [
        "3 of 6 clips, 8 windows of 9 frames at 16 fps; frames at the ends of clips that fill no window: 14",
        "  32x32: 6 windows", "  48x32: 2 windows",
        "validation on 3 of the clips that are trained on, as fewer than 80 can spare none",
    ]  # fmt: skip
    assert result.out.splitlines()[8:12] == listing, "at the end again"
    facts = json.loads((tmp_path / "out" / "facts.json").read_text())
    assert (facts["windows"], facts["buckets"]) == (3 + 3 + 2, 2) and len(facts["skipped"]) == 3
    assert not (folder / ".cache").exists() and len(list((tmp_path / "cache").iterdir())) == 3 + 4
    mistake(run("--data", folder, "--frames", 9, "--strict", out="strict"), "3 of 6 clips", "broken.mp4", "--strict")
    cropped = run("--data", folder, "--frames", 9, "--no-buckets", "--steps", 1, out="cropped")
    assert cropped.status == 0
    assert json.loads((tmp_path / "cropped" / "facts.json").read_text())["buckets"] == 1


def test_a_clip_damaged_within_is_left_out_when_it_is_encoded(run, tmp_path):
    folder = write_clips(tmp_path / "damaged", 3)
    path = folder / "00001.mp4"
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + (len(content) - content.index(b"mdat")) // 3
    content[start:] = bytes(len(content) - start)
    path.write_bytes(content)
    result = run("--data", folder, "--steps", 1)
    assert result.status == 0, result
    assert result.out.count("  00001.mp4: ") == 2
    assert json.loads((tmp_path / "out" / "facts.json").read_text())["windows"] == 2


def test_a_batch_is_of_one_shape_and_parts_of_it_are_the_whole():
    clips, _ = _numbered(9)
    for i in range(6, 9):
        clips.latents[i] = torch.full((16, 3, 2, 4), float(i))
    clips = clips._replace(training=dataset.by_shape([x.shape for x in clips.latents], range(9)))
    shapes = []

    def network(x, tau, context):
        shapes.append(tuple(x.shape))
        return 0.1 * x

    for step in range(18):
        whole = _step_loss(network, clips, TrainConfig(batch=5), step)
        config = TrainConfig(batch=5, accumulate=3)
        parts = [_step_loss(network, clips, config, step, part) for part in range(3)]
        torch.testing.assert_close(sum(parts), whole)
        assert [shape[0] for shape in shapes[-3:]] == [2, 2, 1]
    wide = sum(shape[-1] == 4 for shape in shapes[::4])
    assert wide == 6, "a third of the windows is wide, so a third of the steps is"


@pytest.mark.parametrize("flags", [("--accumulate", 2), ("--gradient-checkpointing",)])
def test_saving_memory_changes_nothing_but_rounding(flags, run, whole, tmp_path):
    assert run(*flags, "--batch", 2).status == 0
    made = lora.load(tmp_path / "out" / "lora.safetensors").pairs
    (tmp_path / "whole.safetensors").write_bytes(whole)
    # Adam divides gradients by their size, so where they are nearly 0, rounding shows.
    for name, (A, B, _) in lora.load(tmp_path / "whole.safetensors").pairs.items():
        for a, b in ((A, made[name][0]), (B, made[name][1])):
            assert (a - b).norm() < 1e-3 * a.norm()


def test_gradients_of_parts_and_of_recomputed_blocks_are_those_of_the_whole(model):
    clips, _ = _numbered(4)
    clips = clips._replace(context=lambda prompts: torch.ones(len(prompts), 32, 16))
    gradients = []
    for parts, again in ((1, False), (4, False), (1, True)):
        transformer = _open(model).transformer(torch.float32)
        torch.manual_seed(0)
        trained = train.trainable(transformer, TrainConfig(full=True))
        if again:
            transformer.recompute_blocks()
        config = TrainConfig(batch=4, accumulate=parts)
        for part in range(parts):
            _step_loss(transformer, clips, config, 0, part).backward()
        gradients.append([p.grad for p in trained])
    for whole, split, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-4)
        assert torch.equal(recomputed, whole)


def test_a_dry_run_says_what_a_run_would_see_and_need(run, model, tmp_path):
    folder = _mixed(tmp_path / "mixed")
    result = run("--data", folder, "--frames", 9, "--dry-run")
    assert result.status == 0 and not (tmp_path / "out").exists() and not (folder / ".cache").exists()
    assert result.out.startswith("clips left out: 3\n")
    assert result.out.count("3 of 6 clips, 8 windows of 9 frames at 16 fps; frames at the ends of clips") == 1
    assert "  32x32: 6 windows\n" in result.out and "  48x32: 2 windows\n" in result.out
    pairs = sum(p.numel() for p in lora.inject(_open(model).transformer(), 2))
    assert f"{pairs / 1e6:.2f} M trainable parameters" in result.out
    columns = [line.split() for line in result.out.splitlines()[-7:]]
    assert [row[0] for row in columns] == [
        "weights", "trained", "gradients", "optimizer", "gathered", "activations", "together"
    ]  # fmt: skip
    assert all(float(row[1]) > 0 for row in columns if row[0] != "gathered")
    assert float(columns[-1][3]) < float(columns[-1][1]), "together, with gradient checkpointing and without"


# Figures.


def test_a_large_model_is_trained_at_the_papers_rate_unless_another_is_given(model):
    small = _open(model)
    large = SimpleNamespace(config=dataclasses.replace(small.config, dim=1536), preset=small.preset, two_experts=False)
    rates = [train.checked(TrainConfig(lr=lr), opened).lr for opened in (small, large) for lr in (None, 3e-4)]
    assert rates == [1e-3, 3e-4, 1e-5, 3e-4]


def test_validation_depends_on_the_weights_alone(run, tmp_path):
    """Steps that change nothing must not change a figure: only then can figures of two steps be compared."""
    assert run("--lr", "1e-30", "--val-every", 1, "--steps", 3).status == 0
    before, *others = _metrics(tmp_path / "out")
    for line in others:
        assert all(line[kind] == before[kind] for kind in ("sync", "async", "clean", "copy"))
    assert len({line["loss"] for line in others}) == 3


def test_validation_takes_windows_of_several_shapes():
    clips, _ = _numbered(4, validation=(0, 1, 2, 3))
    clips.latents[1] = torch.full((16, 3, 2, 6), 1.0)
    shapes = []

    def network(x, tau, context):
        shapes.append((len(x), x.shape[-1]))
        return torch.zeros_like(x)

    losses = train.validate(network, clips, "cpu", torch.float32, 32)
    assert shapes == [(32, 2)] * 6 + [(32, 6)] * 2, "64 triples of each of 4 kinds, a quarter of them wide"
    assert losses["sync"].mean() == pytest.approx(1 + (0 + 1 + 4 + 9) / 4, rel=0.1)


@pytest.mark.parametrize(("count", "triples"), [(1, 64), (3, 66), (16, 64)])
def test_validation_asks_at_least_64_questions_however_few_the_clips(count, triples):
    clips, asked = _numbered(count, validation=range(count))
    seen = []

    def network(x, tau, context):
        seen.append((x, tau))
        return torch.zeros_like(x)

    losses = train.validate(network, clips, "cpu", torch.float32, 500)
    assert all(len(of_kind) == triples for of_kind in losses.values())
    asked_once = {(x.sum().item(), tau.sum().item()) for xs, taus in seen for x, tau in zip(xs, taus, strict=True)}
    assert len(asked_once) == 4 * triples
    sync = seen[0][1][:triples, 0]
    for i in range(count):  # every clip is asked at levels over all of [0, 1]
        levels = sync[[t for t, name in enumerate(asked[0][:triples]) if int(name) == i]]
        assert levels.min() < 0.5 and levels.max() > 0.5 and len(levels) == triples // count


def test_validation_knows_a_perfect_network_and_an_idle_one():
    clips, _ = _numbered(12, validation=(0, 1, 2, 3))
    idle = train.validate(_network, clips, "cpu", torch.float32)
    assert set(idle) == {"sync", "async", "clean", "copy"}
    assert torch.equal(idle["sync"], idle["async"]) and torch.equal(idle["sync"], idle["clean"])
    assert idle["sync"].mean() > 3, "x1 - x0 of constants 0 to 3"
    parts = train.validate(_network, clips, "cpu", torch.float32, 3)
    assert all(torch.allclose(parts[kind], idle[kind]) for kind in idle)

    taus, shown = [], []
    clips = clips._replace(context=lambda prompts: shown.append(torch.tensor([float(name) for name in prompts])))

    def perfect(x, tau, context):
        taus.append(tau)
        tau = tau[:, None, :, None, None]
        return torch.where(tau > 0, (x - shown[-1][:, None, None, None, None]) / tau, torch.nan)

    losses = train.validate(perfect, clips, "cpu", torch.float32)
    assert all(losses[kind].max() < 1e-6 for kind in ("sync", "async", "copy"))
    together, apart, one_clean, copied = torch.cat(taus).view(4, 64, 3)
    assert (copied[:, 0] == 0).all() and (copied[:, 1:] == 1).all()
    assert (together == together[:, :1]).all() and len(apart.unique()) == 3 * 64
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


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--rank 0", ["got --rank 0", "at least 1"]),
        ("--alpha 0", ["alpha 0", "above 0"]),
        ("--steps 0", ["got --steps 0", "at least 1"]),
        ("--batch -2", ["got --batch -2", "at least 1"]),
        ("--gpus 8", ["got --gpus 8 without --dry-run", "torchrun"]),
        ("--lr 0", ["got --lr 0", "between 0 and 1"]),
        ("--lr 5", ["got --lr 5", "between 0 and 1"]),
        ("--lr nan", ["got --lr nan"]),
        ("--p-async 2", ["got --p-async 2", "[0, 1]"]),
        ("--drop-caption -0.1", ["got --drop-caption -0.1", "[0, 1]"]),
        ("--shift 0", ["got --shift 0", "above 0"]),
        ("--from-scratch", ["--from-scratch without --full", "expected both"]),
        ("--muon", ["--muon without --full", "expected both"]),
        ("--two-levels --p-async 0", ["--two-levels with --p-async 0", "expected one"]),
        ("--resume", ["got --resume", "no run in", "without --resume"]),
        ("--accumulate 3", ["--accumulate 3", "--batch 2"]),
        ("--gpus 3 --dry-run", ["--accumulate 1 on 3 GPUs", "--batch 2"]),
        ("--keep 0", ["got --keep 0", "at least 1"]),
        ("--seed 18446744073709551616", ["got --seed 18446744073709551616", "64 bits"]),
        ("--frames 26", ["got 26 frames", "4k+1"]),
        ("--frames 0", ["got 0 frames", "4k+1"]),
        ("--frames 37", ["4 of them like 00000.mp4", "33 frames", "37", "--frames 33 takes it"]),
        ("--size 30x32", ["got size 30x32", "multiples of 16"]),
        ("--device nonsense", ["got --device nonsense"]),
        ("--device meta", ["got --device meta", "a device that computes"]),
        ("--model none", ["got none as a model"]),
        ("--data none", ["none is not a folder"]),
        ("--data EMPTY", ["holds no clips"]),
        ("--data SILENT --strict", ["1 of 3 clips", "00001.mp4 (no caption", "00001.txt"]),
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


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"fps": 0}, ["fps 0", "expected 0.001 to 1e+06"]),
        ({"steps": 10**12}, ["steps 1000000000000", "expected 1 to 1e+09"]),
        ({"shift": -3.0}, ["shift -3.0", "expected 1e-09"]),
        ({"size": [30, 32]}, ["got size 30x32", "multiples of 16"]),
        ({"frames": 26}, ["got 26 frames", "4k+1"]),
    ],
)
def test_a_models_preset_is_checked(entry, words, run, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "model")
    preset = json.loads((other / "sampling.json").read_text())
    (other / "sampling.json").write_text(json.dumps(preset | entry))
    mistake(run("--model", other), *words)
    assert not (tmp_path / "out").exists()


def test_a_second_run_into_the_same_folder_is_refused(run, tmp_path, monkeypatch):
    seconds = []
    _at(monkeypatch, "step_loss", 0, lambda: seconds.append(run()))
    assert run("--steps", 1).status == 0
    mistake(*seconds, "another run is writing to", "choose another --out")


def test_a_run_without_out_gets_a_folder_of_its_own_and_goes_on_without_it(model, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", model, "--data", clips, "--dtype", "float32", "--rank", 2, "--batch", 2, "--val-every", 0]
    for number, more in (("001", ["--steps", 1]), ("002", ["--steps", 1]), ("002", ["--steps", 2, "--resume"])):
        result = call(train, *flags, *more)
        assert result.status == 0 and str(Path("runs", f"pusa-{number}", "lora.safetensors")) in result.out, result
    assert [len(_metrics(tmp_path / "runs" / name)) for name in ("pusa-001", "pusa-002")] == [1, 2]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(run, clips, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(WanVAE, "encode", lambda *a: pytest.fail("it was computed"))
    mistake(run(out="file/out"), "cannot write to", "choose another folder by --out")
    result = run("--cache", tmp_path / "file" / "cache")
    mistake(result, "cannot write to", "choose another folder by --cache", told="4 of 4 clips")
    assert not (tmp_path / "out").exists()


def _on_a_full_disk(monkeypatch, owner, name, error, when):
    """Let a writer fail at its call number `when`, counted from 0, as it does when the disk is full."""
    original, calls = getattr(owner, name), []

    def write(content, path, *more):
        calls.append(path)
        if len(calls) != when + 1:
            return original(content, path, *more)
        Path(path).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(owner, name, write)


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("owner", "name", "error", "when", "file"),
    [
        (torch, "save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), 1, "state-000004"),
        (lora_files, "save_file", SafetensorError(FULL), 0, "best.safetensors"),
        (lora_files, "save_file", SafetensorError(FULL), 3, "lora.safetensors"),
        (cache, "save_file", SafetensorError(FULL), 2, "cache"),
    ],
)
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(
    owner, name, error, when, file, run, whole, tmp_path, monkeypatch
):
    flags = ["--save-every", 2, "--val-every", 2, "--cache", tmp_path / "cache"]
    lower = iter(range(0, -99, -1))  # at every validation
    monkeypatch.setattr(train, "validate", lambda *a: _losses(*[float(next(lower))] * 2))
    with monkeypatch.context() as patch:
        _on_a_full_disk(patch, owner, name, error, when)
        result = run(*flags)
    sentence = result.err.splitlines()[-1]
    assert result.status == 2 and "Traceback" not in result.err, result
    assert "cannot write" in sentence and file in sentence and "as the disk is full; make room" in sentence
    states = list((tmp_path / "out").glob("state-*"))
    assert not [path for path in (tmp_path / "out").glob(".*")], "what is half written is gone"
    assert all(torch.load(path, weights_only=True)["figures"]["step"] for path in states), "what was there is whole"
    again = run(*flags, *(["--resume"] if (tmp_path / "out").exists() else []))
    assert again.status == 0 and _made(tmp_path / "out") == whole, again


def test_memory_that_the_cpu_lacks_is_one_sentence(run, monkeypatch):
    for error in (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: ..."), MemoryError()):

        def fail(*arguments, error=error):
            raise error

        monkeypatch.setattr(train, "step_loss", fail)
        mistake(run(out=type(error).__name__), "not enough memory", "--gradient-checkpointing", told="4 of 4 clips")


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


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_result_without_its_states_is_not_replaced(resume, run, finished, tmp_path):
    for path in (tmp_path / "out").glob("state-*"):
        path.unlink()
        del finished[path.name]
    mistake(run("--steps", 2, *resume), "lora.safetensors is there", "another --out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == finished


@pytest.mark.parametrize(
    "flags", ["--rank 4", "--full", "--seed 1", "--lr 1e-4", "--steps 1", "--batch 3", "--p-async 0", "--size 48x32"]
)
def test_a_run_does_not_go_on_as_another(flags, run, finished, tmp_path):
    mistake(run("--resume", "--steps", 2, *flags.split()), "got --resume", flags.split()[0], "settings.json")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == finished


def test_a_finished_run_goes_on_with_more_steps(run, finished, tmp_path):
    result = run("--resume", "--steps", 5)
    assert result.status == 0 and "going on from step 2" in result.out, result
    figures = _metrics(tmp_path / "out")
    assert [line["step"] for line in figures] == [1, 2, 3, 4, 5]
    assert figures[2]["lr"] == pytest.approx(1e-3 * train.rate(2, 5)) and figures[2]["lr"] > figures[1]["lr"]
    assert (tmp_path / "out" / "lora.safetensors").read_bytes() != finished["lora.safetensors"]
    again = run("--resume", "--steps", 5)
    assert again.status == 0 and "going on from step 5" in again.out, again


def test_a_run_does_not_go_on_with_other_clips_but_with_the_same_elsewhere(run, finished, clips, tmp_path):
    other = write_clips(tmp_path / "other")
    moved = ["--resume", "--steps", 2, "--data", other]
    assert run(*moved, "--save-every", 1).status == 0
    assert _made(tmp_path / "out") == finished["lora.safetensors"]
    (other / "00001.txt").write_text("another caption")
    mistake(run(*moved), "got --resume", "the clips changed", told="4 of 4 clips")


def test_a_run_does_not_go_on_over_another_base(run, finished, model, tmp_path, monkeypatch):
    original = checkpoint.Opened.transformer

    def retrained(*arguments):
        transformer = original(*arguments)
        with torch.no_grad():
            transformer.head.head.weight *= 1.01
        return transformer

    monkeypatch.setattr(checkpoint.Opened, "transformer", retrained)
    mistake(run("--resume", "--steps", 2), "got --resume", "the base model changed", told="4 of 4 clips")


def test_a_damaged_state_is_named(run, finished, tmp_path):
    path = tmp_path / "out" / "state-000002.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    mistake(run("--resume", "--steps", 2), "state-000002.pt", "delete it")


def test_a_state_with_one_wrong_byte_is_named(run, finished, tmp_path):
    path = tmp_path / "out" / "state-000002.pt"
    path.write_bytes(path.read_bytes().replace(b"lora_A", b"lora_Z", 1))  # in the name of a layer, which still is one
    mistake(run("--resume", "--steps", 2), "state-000002.pt", "delete it")


def test_a_loss_that_is_no_number_stops_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "step_loss", lambda *arguments: torch.tensor(float("nan"), requires_grad=True))
    result = run()
    assert result.status == 2 and "the loss is nan at step 0" in result.err.splitlines()[-1], result
    assert "--lr" in result.err and "Traceback" not in result.err
    assert not (tmp_path / "out" / "lora.safetensors").exists()
