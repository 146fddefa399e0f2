"""Malformed input of every kind: each gives the ordinary result or one sentence, within seconds.

    python -m pytest tests/fuzz.py -m slow        # some 2,000 inputs from fixed seeds

Every test makes inputs from valid files of the miniature model by one change, and hands them to what a user would call.
"""

import contextlib
import dataclasses
import io
import json
import random
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import clips_fixture, model_fixture, opened, write_clips  # noqa: F401

import lora
import sample
import train
from model import Wan
from support import cli, dataset, media
from wan import lora_files

pytestmark = pytest.mark.slow
COMMAND = SimpleNamespace(__file__=lora.__file__, main=partial(lora_files.command, Wan))  # what lora.py runs
SECONDS = 20  # the longest that one input may take: loading says within seconds that a model is absurd
ODD = [
    None, True, False, 0, 1, -1, 3, 7, 2**31, 2**63, 10**9, 10**20, -(10**9), 0.5, -0.0, 1e-308, 1e308, float("nan"),
    float("inf"), "", "text", "12", "\x00", "é" * 300, [], [1], [1, 2, 2], [None], [[1]], [10**9] * 3, {}, {"a": 1},
]  # fmt: skip
odd = st.one_of(
    st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=20),
    st.recursive(st.none() | st.booleans() | st.integers(), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)  # fmt: skip


def tries(count: int):
    """Run a test on `count` inputs, the same ones each time."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


class TooSlow(BaseException):
    """No command may catch it."""


def _alarm(number, frame):
    raise TooSlow(f"took more than {SECONDS} seconds")


def outcome(command) -> int:
    """The status of a command, 0 or 2; a traceback, a hang or more than one sentence fails the test."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    before = signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(command)
    except SystemExit as end:
        status = end.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert status in (0, 2), (status, err.getvalue())
    if status:
        *before, sentence, last = err.getvalue().split("\n")
        assert not last and "Traceback" not in err.getvalue() and 0 < len(sentence) < 1000, err.getvalue()
    return status


def command(module, *arguments) -> int:
    """The status of a command line, as its file runs it."""
    argv, sys.argv = sys.argv, [module.__file__, *map(str, arguments)]
    try:
        return outcome(module.main)
    finally:
        sys.argv = argv


def load_everything(folder) -> None:
    model = opened(folder)
    print(model.config, model.preset)
    for part in (model.transformer, model.vae, model.text_encoder, model.tokenizer, model.outline):
        part()


def original_folder(model: Path, folder: Path) -> Path:
    """The miniature model as the authors of Wan publish theirs."""
    parts = opened(model)
    folder.mkdir()
    config = dataclasses.asdict(parts.config) | {"_class_name": "WanModel"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(parts.transformer().state_dict(), folder / "diffusion_pytorch_model.safetensors")
    torch.save(parts.vae().state_dict(), folder / "Wan2.1_VAE.pth")
    torch.save(parts.text_encoder().state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    shutil.copy(model / "tokenizer" / "tokenizer.json", folder / "google" / "umt5-xxl")
    return folder


@pytest.fixture(scope="module", params=["diffusers", "original"])
def folder(request, model, tmp_path_factory) -> Path:
    """A copy of the miniature model whose files a test may change, if it puts them back."""
    place = tmp_path_factory.mktemp("fuzz")
    return shutil.copytree(model, place / "m") if request.param == "diffusers" else original_folder(model, place / "m")


@contextlib.contextmanager
def changed(path: Path, content: bytes | None):
    """A file with other content, or gone, for a while."""
    before = path.read_bytes()
    try:
        path.unlink() if content is None else path.write_bytes(content)
        yield
    finally:
        path.write_bytes(before)


def edited(data, content):
    """JSON with one value, at any depth, replaced, removed, or added."""
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)) and node[key]:
                walk(node[key])

    content = json.loads(json.dumps(content))
    if data.draw(st.integers(0, 9)) == 0:
        return data.draw(odd)
    walk(content)
    if not places:
        return data.draw(odd)
    node, key = places[data.draw(st.integers(0, min(len(places), 400) - 1))]
    if data.draw(st.integers(0, 5)) == 0:
        del node[key]
    else:
        node[key] = data.draw(odd)
    return content


@tries(250)
@given(data=st.data())
def test_json_of_a_model(folder, data):
    paths = sorted(path for path in folder.rglob("*.json"))
    path = paths[data.draw(st.integers(0, len(paths) - 1))]
    content = json.loads(path.read_text(encoding="utf-8"))
    with changed(path, json.dumps(edited(data, content)).encode("utf-8", "surrogatepass")):
        outcome(lambda: load_everything(folder))


def damaged(data, content: bytes) -> bytes:
    """A file cut off, with some bytes changed, or with a stretch of it gone."""
    draw = random.Random(data.draw(st.integers(0, 2**32)))
    kind, content = draw.randrange(4), bytearray(content)
    if kind == 0:
        return bytes(content[: draw.randrange(len(content) + 1)])
    if kind == 1:
        start = draw.randrange(len(content))
        del content[start : start + draw.randrange(1, 1000)]
        return bytes(content)
    for _ in range(draw.choice((1, 3, 30))):
        where = draw.randrange(min(len(content), 2000) if kind == 2 else len(content))
        content[where] = draw.randrange(256)
    return bytes(content)


@tries(100)
@given(data=st.data())
def test_damaged_weights(folder, data):
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".pth"))
    path = paths[data.draw(st.integers(0, len(paths) - 1))]
    with changed(path, damaged(data, path.read_bytes())):
        outcome(lambda: load_everything(folder))


DTYPES = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.int64, torch.complex64]
VALUES = [float("nan"), float("inf"), 1e30, 0.0]


def other_tensor(data, tensor):
    """A tensor with another type, shape or content."""
    kind = data.draw(st.integers(0, 3))
    if kind == 0:
        return tensor.to(data.draw(st.sampled_from(DTYPES)))
    if kind == 1:
        return torch.zeros(data.draw(st.lists(st.integers(0, 5), max_size=5)))
    if kind == 2:
        return torch.full_like(tensor, data.draw(st.sampled_from(VALUES)))
    return tensor.flatten()


@tries(100)
@given(data=st.data())
def test_other_tensors(folder, data):
    paths = sorted(path for path in folder.rglob("*.safetensors") if path.name != "lora.safetensors")
    path = paths[data.draw(st.integers(0, len(paths) - 1))]
    tensors = load_file(path)
    name = sorted(tensors)[data.draw(st.integers(0, len(tensors) - 1))]
    tensor = tensors.pop(name)
    kind = data.draw(st.integers(0, 3))
    if kind < 2:
        tensors[name] = other_tensor(data, tensor)
    elif kind == 2:
        tensors[data.draw(st.text(min_size=1, max_size=30).filter(lambda text: text != "__metadata__"))] = tensor
    with changed(path, None):
        with contextlib.suppress(Exception):  # names that safetensors does not write
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        outcome(lambda: load_everything(folder))


KEYS = ["blocks.0.ffn.0.lora_A.weight", "diffusion_model.blocks.0.ffn.0.diff", "a", "", 3, None, (1,), b"x"]


def odd_tensor(kind: int):
    return [
        lambda: torch.randn(2, 3).to_sparse(), lambda: torch.empty(2, 3, device="meta"), lambda: [torch.ones(2)],
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), lambda: "text", lambda: {"a": 1},
        lambda: torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8), lambda: torch.tensor(float("nan")),
        lambda: torch.tensor("1" == "1"), lambda: torch.zeros(0), lambda: torch.ones(2, 3, dtype=torch.complex64),
        lambda: torch.tensor(1e38, dtype=torch.float64) * 1e200, lambda: 1.0,
    ][kind]()  # fmt: skip


@tries(200)
@given(data=st.data())
def test_lora_files(model, tmp_path, data):
    tensors = load_file(model / "lora.safetensors")
    metadata = data.draw(
        st.dictionaries(st.sampled_from(["lora_adapter_metadata", "rank", "alpha"]), st.text(max_size=20))
    )
    if data.draw(st.booleans()):
        metadata["lora_adapter_metadata"] = json.dumps(edited(data, {"transformer.lora_alpha": 4, "transformer.r": 2}))
    names = sorted(tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        name = names[data.draw(st.integers(0, len(names) - 1))]
        kind = data.draw(st.integers(0, 4))
        if kind == 0:
            tensors.pop(name, None)
        elif kind == 1:
            tensors[name] = other_tensor(data, load_file(model / "lora.safetensors")[name])
        elif kind == 2:
            tensors[name.rpartition(".lora_")[0] + ".alpha"] = data.draw(
                st.sampled_from([torch.tensor(4.0), torch.tensor(float("nan")), torch.zeros(0), torch.ones(3)])
            )
        elif kind == 3:
            tensors[data.draw(st.sampled_from(KEYS))] = odd_tensor(data.draw(st.integers(0, 12)))
    path = tmp_path / data.draw(st.sampled_from(["a.safetensors", "a.pt", "adapter_model.safetensors"]))
    try:
        if path.suffix == ".pt":
            torch.save(data.draw(st.sampled_from([tensors, tensors, tensors, list(tensors), 3, {}])), path)
        else:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    except Exception:  # what cannot be written cannot be given
        path.write_bytes(damaged(data, (model / "lora.safetensors").read_bytes()))
    (tmp_path / "adapter_config.json").write_text(json.dumps(edited(data, {"lora_alpha": 4, "r": 2})))
    transformer = opened(model).transformer()
    outcome(lambda: lora.merge(transformer, lora.load(path), 1.0))
    command(COMMAND, "inspect", path, "--model", model)


@pytest.fixture(scope="module")
def media_files(tmp_path_factory) -> list[Path]:
    folder = write_clips(tmp_path_factory.mktemp("media"), 1)
    media.write_video(folder / "b.gif", torch.rand(3, 5, 32, 32) * 2 - 1, 8)
    media.save_image(folder / "c.png", torch.rand(3, 32, 32) * 2 - 1)
    from PIL import Image

    Image.open(folder / "c.png").save(folder / "d.jpg")
    Image.open(folder / "c.png").save(folder / "e.webp")
    return [path for path in sorted(folder.iterdir()) if path.suffix != ".txt"]


@tries(300)
@given(data=st.data())
def test_damaged_media(media_files, tmp_path, data):
    source = media_files[data.draw(st.integers(0, len(media_files) - 1))]
    path = tmp_path / source.name
    path.write_bytes(damaged(data, source.read_bytes()))

    def read() -> None:
        media.probe(path, 16)
        media.read_video(path, (32, 32), 16, last=9)
        media.read_image(f"{path}@2" if path.suffix in media.VIDEO_SUFFIXES else path)

    outcome(read)


@tries(150)
@given(data=st.data())
def test_lists_of_clips(clips, tmp_path, data):
    for name in ("metadata.jsonl", "metadata.csv", "videos.txt", "prompts.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    shutil.copy(clips / "00000.mp4", tmp_path)
    name = data.draw(st.sampled_from(["metadata.jsonl", "metadata.csv", "videos.txt"]))
    names = st.one_of(st.sampled_from(["00000.mp4", "/", "", ".", "..", "\x00", "a" * 5000, "train"]), st.text())
    rows = [{"file_name": data.draw(names | odd), "text": data.draw(odd)} for _ in range(3)]
    content = "\n".join(json.dumps(row) for row in rows)
    content = content.replace('"text": 1', '"text": ' + data.draw(st.sampled_from(["1", "9" * 5000, "[" * 5000])))
    if name == "metadata.csv":
        content = "file_name,text\n" + "\n".join(f'{row["file_name"]},"{row["text"]}"' for row in rows)
        content += "\na.mp4," + "x" * data.draw(st.sampled_from([3, 200_000]))
    (tmp_path / name).write_bytes(damaged(data, content.encode("utf-8", "surrogatepass")))
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    outcome(lambda: dataset.survey(dataset.find_clips(tmp_path), dataset.Cut((32, 32), 9, 16)))


@pytest.fixture(scope="module")
def record(model, tmp_path_factory) -> dict:
    """What a run wrote beside its video."""
    out = tmp_path_factory.mktemp("record") / "a.mp4"
    clip = write_clips(out.parent / "clips", 1) / "00000.mp4"
    assert command(sample, "--model", model, "--task", "extend", "--video", clip, "--prompt", "a", "--out", out) == 0
    return json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


@tries(200)
@given(data=st.data())
def test_records_of_a_run(record, tmp_path, data):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(edited(data, record)))
    command(sample, "--from-json", path, "--dry-run")


def numbers():
    return st.one_of(
        st.sampled_from(["0", "1", "-1", "1e18", "1e-5", "1e-308", "1" + 20 * "0", "nan", "inf", "-inf", "2147483648"]),
        st.integers(-5, 100).map(str), st.floats().map(str),
    )  # fmt: skip


def flags(config_class, without: set[str]):
    """Any flags of a command with any values that are at all like theirs."""
    named = [field for field in dataclasses.fields(config_class) if field.name not in without]

    def one(field):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            return st.just([flag])
        words = numbers() | st.sampled_from(["", "a", "0,1,x", "32x32", "1x1", "32x", "cpu", "meta", "\udcff", "a:b:c"])
        return words.map(lambda word: [f"{flag}={word}"])

    return st.lists(st.one_of(*map(one, named)), min_size=1, max_size=3).map(lambda lists: sum(lists, []))


@tries(150)
@given(flags=flags(sample.SampleConfig, {"dry_run", "model", "from_json", "out", "prompts"}))
def test_flags_of_sampling(model, clips, flags):
    inputs = ["--task", "extend", "--video", clips / "00000.mp4"]
    command(sample, "--model", model, *inputs, *flags, "--dry-run")


@tries(100)
@given(flags=flags(train.TrainConfig, {"dry_run", "model", "data", "out", "cache", "resume"}))
def test_flags_of_training(model, clips, flags):
    command(train, "--model", model, "--data", clips, *flags, "--dry-run")


@tries(60)
@given(data=st.data())
def test_presets_in_training(model, clips, data):
    path = model / "sampling.json"
    preset = edited(data, json.loads(path.read_text(encoding="utf-8")))
    with changed(path, json.dumps(preset).encode("utf-8", "surrogatepass")):
        command(train, "--model", model, "--data", clips, "--dry-run")


@tries(30)
@given(data=st.data())
def test_states_of_a_training(trained, tmp_path, data):
    shutil.rmtree(tmp_path / "out", ignore_errors=True)  # of the input before
    out = shutil.copytree(trained, tmp_path / "out")
    (path,) = out.glob("state-*.pt")
    if data.draw(st.booleans()):
        path.write_bytes(damaged(data, path.read_bytes()))
    else:
        state = torch.load(path, weights_only=True)
        state = data.draw(st.sampled_from([{}, [], 3, None, {**state, "figures": 3}, {**state, "settings": []}]))
        torch.save(state, path)
    settings = json.loads((out / "settings.json").read_text())
    command(train, "--model", settings["model"], "--data", settings["data"], "--steps", 2, "--batch", 2, "--frames", 9,
            "--out", out, "--resume", "--val-every", 0)  # fmt: skip


@pytest.fixture(scope="module")
def trained(model, clips, tmp_path_factory) -> Path:
    """The folder of a training that was stopped after a step."""
    out = tmp_path_factory.mktemp("trained") / "out"
    common = ["--model", model, "--data", clips, "--batch", 2, "--frames", 9, "--out", out, "--val-every", 0]
    assert command(train, *common, "--steps", 2, "--save-every", 1, "--keep", 2) == 0
    (out / "state-000002.pt").unlink()
    (out / "lora.safetensors").unlink()
    return out
