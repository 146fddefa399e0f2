"""Two processes do what one does: the same losses, figures and files, each with half of the weights.

`torchrun` starts them on the CPU, where they talk by gloo. This file is also what two of them run in one test.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import call, clips_fixture, mistake, model_fixture  # noqa: F401 (fixtures)

import lora
import train
from model import Wan
from support import distributed, resume
from wan import checkpoint

ROOT = Path(__file__).parent.parent
TOGETHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

slow = pytest.mark.slow
needs_torchrun = pytest.mark.skipif(
    os.name == "nt" or not torch.distributed.is_available(), reason="no processes that talk by gloo"
)


def _flags(model, clips, out, *more):
    flags = ["--model", model, "--data", clips, "--out", out, "--device", "cpu", "--dtype", "float32", "--rank", 3]
    return [str(flag) for flag in (*flags, "--batch", 5, "--val-every", 3, "--save-every", 2, "--keep", 9, *more)]


def _start(*flags):
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*TOGETHER, "train.py", *flags], cwd=ROOT, env=ENVIRONMENT, **quiet)


def _together(*flags):
    """Train with two processes; returns what they print."""
    process = _start(*flags)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out


def _metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _assert_alike(folder, other):
    """Losses and figures to 1e-4, and LoRAs but for rounding, which Adam enlarges where gradients are nearly 0."""
    ours, theirs = _metrics(folder), _metrics(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "smooth", "sync", "async", "clean", "copy", "best"}:
            assert a[name] == b[name] or abs(a[name] - b[name]) < 1e-4, (name, a, b)
    ours, theirs = (lora.load(path / "lora.safetensors").pairs for path in (folder, other))
    assert list(ours) == list(theirs)
    for name, (A, B, alpha) in ours.items():
        assert alpha == theirs[name][2]
        for a, b in ((A, theirs[name][0]), (B, theirs[name][1])):
            assert (a - b).norm() < 5e-3 * a.norm(), name


@pytest.fixture(scope="module")
def alone(model, clips, tmp_path_factory):
    """The folder of a run of one process."""
    out = tmp_path_factory.mktemp("alone")
    result = call(train, *_flags(model, clips, out, "--steps", 6, "--lr", "1e-2"))
    assert result.status == 0, result.err
    return out


def _stopped(source, out, step):
    """A folder of a run as it was after a step."""
    shutil.copytree(source, out)
    for path in out.glob("state-*.pt"):
        if int(path.stem.removeprefix("state-")) > step:
            path.unlink()
    (out / "lora.safetensors").unlink()
    return out


@slow
@needs_torchrun
def test_two_processes_make_what_one_makes_and_go_on_from_each_other(model, clips, alone, tmp_path):
    """The batch of 5 is cut in 2 x 2 parts of 2, 1, 1 and 1, of which each must have its weight."""
    both, steps = tmp_path / "both", ["--steps", 6, "--lr", "1e-2"]
    memory = ["--accumulate", 2, "--gradient-checkpointing", "--cache", tmp_path / "cache"]
    out = _together(*_flags(model, clips, both, *steps, *memory))
    made = [str(both / name) for name in ("lora.safetensors", "filmstrip.png", "report.html")]
    assert out.splitlines()[-3:] == made and out.count("filmstrip.png") == 1, "one process speaks"
    assert sorted(path.name for path in both.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert len(list((tmp_path / "cache").iterdir())) == 4 + 5
    _assert_alike(both, alone)
    ours, theirs = (torch.load(folder / "state-000006.pt", weights_only=True) for folder in (both, alone))
    shapes = [{name: tensor.shape for name, tensor in state["model"].items()} for state in (ours, theirs)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 40
    moments, expected = (state["optimizers"]["state"] for state in (ours, theirs))
    assert moments.keys() == expected.keys() == shapes[0].keys()
    for name, parts in expected.items():
        for kind, tensor in parts.items():
            assert type(moments[name][kind]) is torch.Tensor
            assert (moments[name][kind] - tensor).norm() <= 5e-3 * tensor.norm(), "Adam hides a scale, moments do not"

    from_one = _stopped(alone, tmp_path / "from one", 2)
    assert "going on from step 2" in _together(*_flags(model, clips, from_one, *steps, "--resume"))
    _assert_alike(from_one, alone)
    from_two = _stopped(both, tmp_path / "from two", 4)
    result = call(train, *_flags(model, clips, from_two, *steps, "--resume"))
    assert result.status == 0 and "going on from step 4" in result.out, result
    _assert_alike(from_two, alone)


@slow
@needs_torchrun
def test_all_weights_and_a_text_encoder_are_trained_together(model, clips, tmp_path):
    flags = ["--full", "--from-scratch", "--steps", 3, "--lr", "1e-3", "--val-every", 2]
    assert call(train, *_flags(model, clips, tmp_path / "alone", *flags)).status == 0
    _together(*_flags(model, clips, tmp_path / "both", *flags))
    for a, b in zip(_metrics(tmp_path / "alone"), _metrics(tmp_path / "both"), strict=True):
        assert a.keys() == b.keys() and {"loss", "sync"} & a.keys()  # before the first step, there is no loss yet
        for name in a.keys() & {"loss", "sync", "async", "clean", "copy"}:
            assert abs(a[name] - b[name]) < 1e-4, name
    for part in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        ours, theirs = (load_file(tmp_path / name / "model" / f"{part}.safetensors") for name in ("both", "alone"))
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def _wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@slow
@needs_torchrun
def test_ctrl_c_saves_and_a_killed_process_leaves_the_last_save(model, clips, tmp_path):
    out = tmp_path / "out"
    flags = _flags(model, clips, out, "--steps", 40)
    process = _start(*flags)
    _wait_for(out / "state-000002.pt", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    (step,) = map(int, re.findall(r"stopped after step (\d+); go on with the same command and --resume", err))
    assert process.returncode != 0 and 2 <= step < 40
    assert resume.newest_state(out).name == f"state-{step:06d}.pt" and _metrics(out)[-1]["step"] == step

    process = _start(*flags, "--resume")
    saved = step // 2 * 2 + 4
    _wait_for(out / f"state-{saved:06d}.pt", process)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, err = process.communicate(timeout=200)
    assert process.returncode != 0 and "SIGKILL" in err
    assert "train.py: process" in err and "--resume" in err and "[rank" not in err, "a sentence, no traceback"
    assert not (out / "lora.safetensors").exists()

    result = call(train, *flags, "--resume")
    assert result.status == 0 and int(re.search(r"going on from step (\d+)", result.out)[1]) >= saved
    assert call(train, *_flags(model, clips, tmp_path / "alone", "--steps", 40)).status == 0
    _assert_alike(out, tmp_path / "alone")


def _work_together(model, folder):
    """What each of two processes finds, written to a file."""
    opened, config = checkpoint.open(model, Wan), train.TrainConfig(model=model, rank=3)
    generator = torch.Generator().manual_seed(0)
    x, tau = torch.randn(2, 16, 3, 4, 4, generator=generator), torch.rand(2, 3, generator=generator)
    context = torch.randn(2, 32, 16, generator=generator)

    def injected():
        transformer = opened.transformer(torch.bfloat16)
        train.trainable(transformer, config)
        for name, parameter in transformer.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 4
        return transformer

    def gradients(transformer, mine, scale):
        with torch.autocast("cpu", torch.bfloat16):
            velocity = transformer(x[mine], tau[mine], context[mine])
        (velocity.float().square().sum() * scale).backward()
        return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad}

    alone = injected()
    expected = gradients(alone, slice(None), 1)
    with distributed.process_group("cpu") as device:
        rank, size = distributed.rank(), distributed.size()
        found = {
            "sum": distributed.all_reduce(rank + 1, device),
            "broadcast": distributed.broadcast(rank),
            "share": distributed.my_share(list("abcde")),
        }
        transformer = injected() if rank == 0 else opened.outline()[0]
        if rank > 0:
            train.trainable(transformer, config)
        models = torch.nn.ModuleDict({"transformer": transformer})
        train.shard(models, device)
        parameters = dict(transformer.named_parameters())
        found["bytes"] = sum(p.to_local().nbytes for p in parameters.values())
        found["full bytes"] = sum(p.nbytes for p in alone.parameters())
        found["dtypes"] = all(p.dtype == parameters[name].dtype for name, p in alone.named_parameters())
        sharded = gradients(transformer, slice(rank, rank + 1), size)
        found["gradients"] = max(
            ((sharded[name].full_tensor() - gradient).norm() / gradient.norm()).item()
            for name, gradient in expected.items()
        )
        norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        found["norm"] = norm.full_tensor().item()
        found["expected norm"] = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0).item()
        clipped = [gradient.full_tensor().norm() for gradient in sharded.values()]
        found["clipped"] = torch.stack(clipped).norm().item()
        found["shard"] = list(parameters["blocks.0.ffn.0.lora_A"].to_local().shape)
        full = resume.full_models(models, train.outline(opened, config))
        found["full"] = rank == 1 or str(lora.extract(full["transformer"])) == str(lora.extract(alone))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


@slow
@needs_torchrun
def test_each_process_has_half_and_gradients_are_those_of_the_whole(model, tmp_path):
    """With a frozen base in bf16 under pairs in fp32, as published models are trained."""
    command = [*TOGETHER, __file__, str(model), str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["sum"] == second["sum"] == 3 and first["broadcast"] == second["broadcast"] == 0
    assert first["share"] == list("ace") and second["share"] == list("bd")
    assert first["shard"] == [2, 48] and second["shard"] == [1, 48], "a rank of 3"
    for found in (first, second):
        assert found["dtypes"] and found["full"]
        assert found["bytes"] == pytest.approx(found["full bytes"] / 2, rel=0.1)
        assert found["gradients"] < 0.02, "bf16 has 8 bits"
        assert found["norm"] == pytest.approx(found["expected norm"], rel=0.01) and found["norm"] > 2
        assert found["clipped"] == pytest.approx(1, rel=1e-3)
    assert first["bytes"] + second["bytes"] == first["full bytes"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--accumulate 3", ["--accumulate 3", "2 processes", "--batch 5"]),
        ("--full --muon", ["--muon", "2 processes"]),
        ("--compile", ["--compile", "2 processes"]),
    ],
)
def test_what_several_processes_cannot_do_is_refused(flags, words, model, clips, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 2)
    mistake(call(train, *_flags(model, clips, tmp_path / "out", *flags.split())), *words)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is told that it is one of torchrun's."""
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_process_takes_a_gpu_of_its_own_or_the_cpu(second_of_two, kind, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(str(device)))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, device_id, **_: seen.append(backend))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    with distributed.process_group(kind) as device:
        assert device == {"cuda": "cuda:1", "cpu": "cpu"}[kind]
    assert seen == {"cuda": ["cuda:1", "nccl"], "cpu": ["gloo"]}[kind]


def test_a_process_without_a_gpu_of_its_own_is_one_sentence(second_of_two, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="got 2 or more processes on this machine, expected one for each GPU"):
        distributed.process_group("cuda").__enter__()


def test_all_processes_take_equally_many_parts_and_together_everything(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(list(distributed.in_shares(list(range(14)), 2)))
    assert parts == [[[0, 3], [6, 9], [12]], [[1, 4], [7, 10], [13]], [[2, 5], [8, 11], [12]]], "the last has one again"


def test_other_devices_do_not_work_together(second_of_two):
    with pytest.raises(ValueError, match="got --device mps for several processes, expected cuda"):
        distributed.process_group("mps").__enter__()


if __name__ == "__main__":
    _work_together(*sys.argv[1:])
