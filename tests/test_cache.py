"""cache.py: nothing is computed twice, nothing else is taken for it, and half a file is never read."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import model_fixture  # noqa: F401 (a fixture)

from model import Wan
from support import cache, dataset, media
from wan import checkpoint


def written(path, N=9, seed=0):
    noise = torch.rand(3, N, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    media.write_video(path, noise, 16)
    return path


class CountingVAE(torch.nn.Module):
    """Stands in for the VAE: takes every fourth frame at an eighth of the size, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.scale, self.calls = torch.nn.Parameter(torch.ones(1)), 0

    def encode(self, video):
        self.calls += 1
        return self.scale * video[:, :1, ::4, ::8, ::8].repeat(1, 16, 1, 1, 1)


def test_latents_are_computed_once(tmp_path, capsys):
    vae, folder = CountingVAE(), tmp_path / "cache"
    clips = [dataset.Clip(written(tmp_path / "a.mp4"), "a"), dataset.Clip(written(tmp_path / "b.mp4", 20), "b")]

    def latents(size=(32, 32), frames=9, fps=16, name="tiny", clips=clips):
        sources, cut = [dataset.Source(clip, size, 1) for clip in clips], dataset.Cut(size, frames, fps)
        stored, _ = dataset.latents(sources, cut, vae.encode, name, folder)
        return [torch.stack(list(windows)) for windows in stored]

    first = latents()
    assert vae.calls == 3 and "2/2" in capsys.readouterr().err
    assert [x.shape for x in first] == [(1, 16, 3, 4, 4), (2, 16, 3, 4, 4)] and first[0].dtype == torch.float32
    assert not first[0].requires_grad and not first[1][0].equal(first[1][1])
    again = latents()
    assert vae.calls == 3 and capsys.readouterr().err == ""
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))

    for changed, calls in (
        ({"size": (16, 16)}, 3),
        ({"frames": 5}, 5),
        ({"fps": 8, "frames": 5}, 3),
        ({"name": "o"}, 3),
    ):
        before = vae.calls
        latents(**changed)
        assert vae.calls == before + calls, changed

    before = vae.calls
    (tmp_path / "c.mp4").write_bytes(clips[1].path.read_bytes())
    assert latents(clips=[dataset.Clip(tmp_path / "c.mp4", "renamed")])[0].equal(first[1]) and vae.calls == before
    written(clips[0].path, seed=1)  # the same name, another content
    changed = latents()
    assert vae.calls == before + 1 and not changed[0].equal(first[0]) and changed[1].equal(first[1])

    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    assert all(a.equal(b) for a, b in zip(changed, latents(), strict=True)) and vae.calls == before + 4
    assert all(a.equal(b) for a, b in zip(changed, latents(), strict=True)) and vae.calls == before + 4


def test_a_damaged_clip_gives_its_reason_and_no_latents(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    sources = [dataset.Source(dataset.Clip(tmp_path / "a.mp4", "a"), (32, 32), 1)]
    sources += [dataset.Source(dataset.Clip(written(tmp_path / "b.mp4"), "b"), (32, 32), 1)] * 2
    cut = dataset.Cut((32, 32), 9, 16)
    latents, skipped = dataset.latents(sources, cut, CountingVAE().encode, "tiny", tmp_path / "cache")
    assert latents[0] is None and latents[1][0].equal(latents[2][0])
    assert [(path.name, reason.startswith("cannot be read")) for path, reason in skipped] == [("a.mp4", True)]


def test_an_interrupted_write_is_never_read_and_runs_may_share_a_cache(tmp_path, monkeypatch):
    original = cache.save_file

    def cut(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    def embed(prompt):
        if prompt == "b":  # meanwhile, another run writes the same
            cache.embeddings(["b"], lambda prompt: torch.ones(2, 2), "tiny", tmp_path)
        return torch.ones(2, 2)

    monkeypatch.setattr(cache, "save_file", cut)
    with pytest.raises(KeyboardInterrupt):
        cache.embeddings(["a"], embed, "tiny", tmp_path)
    monkeypatch.setattr(cache, "save_file", original)
    assert list(tmp_path.iterdir()) == []
    assert [x.sum().item() for x in cache.embeddings(["a", "b"], embed, "tiny", tmp_path)] == [4, 4]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_computed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to .*file/cache .*another folder by --cache"):
        cache.embeddings(["a"], lambda prompt: pytest.fail("it was computed"), "tiny", tmp_path / "file" / "cache")


def test_what_is_all_there_needs_no_folder_to_write_to(tmp_path, monkeypatch):
    cache.embeddings(["a"], lambda prompt: torch.ones(2, 2), "tiny", tmp_path)
    monkeypatch.setattr(cache.cli, "try_writing", lambda *a: pytest.fail("nothing is to be written"))
    assert cache.embeddings(["a"], None, "tiny", tmp_path)[0].sum() == 4


def test_embeddings_are_computed_once(tmp_path):
    calls = []

    def embed(prompt):
        calls.append(prompt)
        return torch.full((4, 8), float(len(prompt)), dtype=torch.bfloat16, requires_grad=True)

    prompts = ["a ball", "a red ball", "a ball", ""]
    first = cache.embeddings(prompts, embed, "tiny", tmp_path)
    assert calls == ["a ball", "a red ball", ""]
    assert [x[0, 0].item() for x in first] == [6, 10, 6, 0] and first[0].shape == (4, 8)
    assert cache.embeddings(prompts, embed, "tiny", tmp_path)[1].equal(first[1]) and len(calls) == 3
    cache.embeddings(prompts[:1], embed, "other", tmp_path)
    assert len(calls) == 4
    next(tmp_path.iterdir()).write_bytes(b"")
    cache.embeddings(prompts, embed, "tiny", tmp_path)
    cache.embeddings(prompts[:1], embed, "other", tmp_path)
    assert len(calls) == 5


def test_stored_tensors_are_read_one_at_a_time_and_leave_no_file_open(tmp_path):
    stored = cache.embeddings(
        [str(n) for n in range(50)], lambda prompt: torch.full((3, 2), float(prompt)), "", tmp_path
    )
    assert [x[0, 0].item() for x in stored] == list(range(50)) and len(stored) == 50
    maps = Path("/proc/self/maps")
    tensors = [stored[n] for n in range(50)]
    assert not maps.exists() or sum(str(tmp_path) in line for line in maps.read_text().splitlines()) <= len(tensors)
    del tensors
    assert not maps.exists() or str(tmp_path) not in maps.read_text()


def test_prompts_load_the_encoder_only_for_what_is_new_and_without_padding(model, tmp_path, monkeypatch):
    loaded, load = [], checkpoint.Opened.text_encoder
    monkeypatch.setattr(checkpoint.Opened, "text_encoder", lambda *a: loaded.append(a) or load(*a))

    def prompts(*texts, model=model, dtype=torch.float32):
        encode = checkpoint.open(model, Wan).encode_prompts(texts, dtype, "cpu", tmp_path / "cache")
        return encode(list(texts))

    first = prompts("a red circle", "a red circle moving left")
    opened = checkpoint.open(model, Wan)
    tokenizer, encoder = opened.tokenizer(), load(opened, torch.float32)
    with torch.no_grad():
        whole = tokenizer.embed(encoder, ["a red circle moving left"])
    lengths = [embedding.any(-1).sum().item() for embedding in first]
    assert lengths[0] < lengths[1] < tokenizer.text_len
    assert sorted(len(load_file(path)["tensor"]) for path in (tmp_path / "cache").iterdir()) == lengths
    assert torch.equal(first[1:], whole)
    assert len(loaded) == 1
    moved = shutil.copytree(model, tmp_path / "elsewhere")
    assert torch.equal(prompts("a red circle", model=moved)[0], first[0]) and len(loaded) == 1
    prompts("a blue circle")
    assert len(loaded) == 2
    prompts("a red circle", dtype=torch.bfloat16)
    assert len(loaded) == 3
    weights = moved / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights)
    assert not torch.equal(prompts("a red circle", model=moved)[0], first[0]) and len(loaded) == 4
