"""Names and configs against diffusers and transformers, every layout there and back, and one sentence a mistake."""

import hashlib
import inspect
import json
import pickle
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from small import Code, load_pipeline, opened
from transformers import UMT5Config, UMT5EncoderModel

import lora
from model import Wan, WanConfig
from support import cli
from wan import checkpoint
from wan.checkpoint import Preset, save_pipeline
from wan.names import TEXT_NAMES, TRANSFORMER_NAMES, rename, vae_names
from wan.text import T5Config, UMT5Encoder, tokenizer_files, train_tokenizer
from wan.vae import VAEConfig, WanVAE

WAN = WanConfig(
    dim=32,
    ffn_dim=48,
    freq_dim=16,
    in_dim=16,
    out_dim=16,
    num_heads=2,
    num_layers=2,
    text_len=10,
    text_dim=24,
    eps=1e-5,
)
VAE = VAEConfig(
    dim=4,
    dim_mult=(1, 2, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    patch_size=2,
    latents_mean=tuple(i / 20 for i in range(16)),
    latents_std=tuple(1 + i / 20 for i in range(16)),
)
TEXT = T5Config(vocab_size=40, dim=24, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=2, num_buckets=32)
PROMPTS = ["a red square moves left", "a blue circle on green"]


def scramble(module, seed=0, scale=0.2):
    """Random weights without a zero or a one among them, so that a swapped or forgotten tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def parts():
    torch.manual_seed(0)
    vae = scramble(WanVAE(VAE), 2, 0.05)
    vae.decoder.conv1.to(memory_format=torch.channels_last_3d)  # what training may have done for speed
    return {
        "transformer": scramble(Wan(WAN), 1),
        "vae": vae,
        "text_encoder": scramble(UMT5Encoder(TEXT), 3),
        "tokenizer": train_tokenizer(PROMPTS, 40),
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a whole small pipeline, and what was written there. Tests only read it."""
    folder, written = tmp_path_factory.mktemp("small") / "model", parts()
    save_pipeline(folder, written, Preset(shift=3.0))
    (folder / "sampling.json").unlink()  # which other programs do not write
    return SimpleNamespace(folder=folder, **written)


@pytest.fixture
def copied(small, tmp_path):
    return shutil.copytree(small.folder, tmp_path / "copy")


@pytest.fixture
def original(small, tmp_path):
    """The same weights as the authors of Wan2.1 publish theirs: an index with two shards, and two pickled files."""
    folder = tmp_path / "original"
    write_beside(folder, small)
    write_original(folder, small.transformer)
    return folder


def write_original(folder, transformer):
    folder.mkdir(exist_ok=True)
    config = {name: getattr(WAN, name) for name in ("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads")}
    config |= {name: getattr(WAN, name) for name in ("num_layers", "text_len", "text_dim", "eps")}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v", **config}))
    state = {name: tensor.contiguous() for name, tensor in transformer.state_dict().items()}
    shards = [f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    where = {name: shards[i % 2] for i, name in enumerate(state)}
    for shard in shards:
        save_file({name: state[name] for name in state if where[name] == shard}, folder / shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_beside(folder, small):
    """The parts of an original folder that are not the transformer."""
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer_files(small.tokenizer, WAN.text_len).items():
        (tokenizer / name).write_text(content, encoding="utf-8")
    torch.save(small.vae.state_dict(), folder / "Wan2.1_VAE.pth")
    torch.save(small.text_encoder.state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# The other programs' weights in ours.


@pytest.fixture(scope="module")
def transformers_pair(tmp_path_factory):
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, ffn_dim=80, freq_dim=32, text_dim=40
    )
    scramble(theirs)
    folder = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(folder / "transformer")
    x, context = torch.randn(2, 16, 3, 8, 12), torch.randn(2, 7, 40)
    return theirs, opened(folder).transformer(), x, context


@torch.no_grad()
def test_transformer_agrees_with_diffusers_at_one_timestep(transformers_pair):
    theirs, ours, x, context = transformers_pair
    tau = torch.tensor([0.2505, 0.9])
    close(ours(x, tau, context), theirs(x, 1000 * tau, context, return_dict=False)[0])


@torch.no_grad()
def test_transformer_agrees_with_diffusers_at_one_timestep_a_frame(transformers_pair):
    theirs, ours, x, context = transformers_pair
    tau = torch.tensor([[0.0, 0.3335, 1.0], [0.7, 0.1, 0.5]])
    per_token = (1000 * tau).repeat_interleave(4 * 6, dim=1)
    close(ours(x, tau, context), theirs(x, per_token, context, return_dict=False)[0])


@pytest.mark.parametrize(
    ("dim_mult", "temporal", "blocks", "patch"),
    [
        ([1, 2, 4, 4], [False, True, True], 2, 1),
        ([1, 2, 2], [True, True], 1, 2),
        ([1, 1, 2, 3], [True, False, True], 1, 1),
    ],
)
@torch.no_grad()
def test_vae_agrees_with_diffusers(tmp_path, dim_mult, temporal, blocks, patch):
    torch.manual_seed(0)
    channels = 3 * patch**2
    theirs = AutoencoderKLWan(
        base_dim=6,
        dim_mult=dim_mult,
        num_res_blocks=blocks,
        temperal_downsample=temporal,
        latents_mean=[i / 10 for i in range(16)],
        latents_std=[1 + i / 10 for i in range(16)],
        patch_size=None if patch == 1 else patch,
        in_channels=channels,
        out_channels=channels,
    )
    scramble(theirs, scale=0.05).save_pretrained(tmp_path / "vae")
    ours = opened(tmp_path).vae()
    assert ours.config.patch_size == patch and ours.config.num_res_blocks == blocks
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    mean, std = (torch.tensor(v).view(1, 16, 1, 1, 1) for v in (ours.config.latents_mean, ours.config.latents_std))
    latents = ours.encode(video)
    close(latents, (theirs.encode(video).latent_dist.mean - mean) / std)
    decoded = theirs.decode(latents * std + mean).sample
    assert decoded.abs().mean() < 0.99, "the comparison needs pixels that the clamp leaves alone"
    close(ours.decode(latents), decoded)


@torch.no_grad()
def test_text_encoder_agrees_with_transformers(tmp_path):
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=40, num_heads=4, num_layers=3)
    theirs = scramble(UMT5EncoderModel(config))
    theirs.save_pretrained(tmp_path / "text_encoder")
    ours = opened(tmp_path).text_encoder()
    ids = torch.randint(3, 50, (2, 40))
    mask = torch.arange(40) < torch.tensor([[40], [9]])
    close(ours(ids, mask), theirs(ids, mask.long()).last_hidden_state * mask[:, :, None])


def test_token_embedding_may_have_either_of_its_names(copied, small):
    path = copied / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file({name.replace("shared.", "encoder.embed_tokens."): state[name] for name in state}, path)
    equal(opened(copied).text_encoder(), small.text_encoder)


def test_names_are_one_to_one():
    """Two original names with one -Diffusers name would lose a tensor, at the published depths too."""
    published = replace(WAN, num_layers=40), replace(TEXT, num_layers=24), VAEConfig()
    with torch.device("meta"):
        models = [part(config) for part, config in zip((Wan, UMT5Encoder, WanVAE), published, strict=True)]
    tables = TRANSFORMER_NAMES, TEXT_NAMES, vae_names(VAEConfig().num_res_blocks)
    for model, table in zip(models, tables, strict=True):
        names = model.state_dict().keys()
        assert len({rename(name, table) for name in names}) == len(names)
    names = {rename(f"blocks.39.{part}.weight", TRANSFORMER_NAMES) for part in ("self_attn.o", "cross_attn.k", "ffn.0")}
    assert names == {f"blocks.39.{part}.weight" for part in ("attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj")}
    assert rename("decoder.upsamples.7.time_conv.bias", tables[2]) == "decoder.up_blocks.1.upsamplers.0.time_conv.bias"


# Our own, there and back.


def test_pipeline_comes_back_as_it_was_written(small):
    loaded = load_pipeline(small.folder)
    for part in ("transformer", "vae", "text_encoder"):
        equal(getattr(loaded, part), getattr(small, part))
        assert getattr(loaded, part).config == getattr(small, part).config
    ids, mask = loaded.tokenizer(PROMPTS)
    assert ids.shape == (2, WAN.text_len) and mask.sum(1).tolist() == [6, 6]
    assert loaded.preset == Preset()
    assert all(p.requires_grad and p.is_leaf for p in loaded.transformer.parameters()), "training needs them"


def test_types_are_chosen_on_writing_and_on_reading(tmp_path):
    written = parts()
    save_pipeline(tmp_path, written, dtype={"vae": torch.float16, "text_encoder": torch.bfloat16})
    assert opened(tmp_path).vae().conv1.weight.dtype == torch.float32
    assert opened(tmp_path).vae(None).conv1.weight.dtype == torch.float16
    assert opened(tmp_path).text_encoder().norm.weight.dtype == torch.bfloat16
    assert load_pipeline(tmp_path, torch.float32).text_encoder.norm.weight.dtype == torch.float32
    torch.testing.assert_close(opened(tmp_path).vae().conv1.weight, written["vae"].conv1.weight, atol=1e-3, rtol=1e-3)


def test_parts_can_be_written_one_by_one(small, tmp_path):
    save_pipeline(tmp_path, {"vae": small.vae})
    equal(opened(tmp_path).vae(), small.vae)
    with pytest.raises(ValueError, match="has no transformer/config.json"):
        load_pipeline(tmp_path)
    others = ("transformer", "text_encoder", "tokenizer")
    save_pipeline(tmp_path, {part: getattr(small, part) for part in others})
    equal(load_pipeline(tmp_path).vae, small.vae)
    # A tokenizer that was loaded can be written too, with its own length.
    save_pipeline(tmp_path, {"tokenizer": opened(small.folder).tokenizer()})
    written = (tmp_path / "tokenizer" / "tokenizer.json").read_text()
    assert written == (small.folder / "tokenizer" / "tokenizer.json").read_text()
    with pytest.raises(ValueError, match="dtype for"):
        save_pipeline(tmp_path, {}, dtype={"text": torch.float16})


def test_a_loaded_model_can_be_written_over_its_own_files(copied, small):
    transformer = opened(copied).transformer()
    with torch.no_grad():
        transformer.patch_embedding.bias += 1
    save_pipeline(copied, {"transformer": transformer})
    equal(opened(copied).transformer(), transformer)


def test_nothing_but_the_standard_files_is_written(small):
    files = sorted(path.relative_to(small.folder).as_posix() for path in small.folder.rglob("*") if path.is_file())
    assert files == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_loading_a_folder_is_quick(small):
    """What takes a second to import must not be: the hub's client, and the compiler behind drawing without memory."""
    load = f"m = checkpoint.open({str(small.folder)!r}, Wan); m.transformer(), m.vae(), m.text_encoder(), m.tokenizer()"
    script = f"import sys; from model import Wan; from wan import checkpoint; {load}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    slow = {"huggingface_hub", "torch._dynamo", "diffusers", "transformers"}
    assert slow.isdisjoint(run.stdout.split()), slow.intersection(run.stdout.split())


# Our folders in diffusers.


@pytest.fixture(scope="module")
def pipe(small):
    pipe = WanPipeline.from_pretrained(small.folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("steps", [4, 10, 30])
def test_scheduler_of_the_folder_is_ours(pipe, steps):
    pipe.scheduler.set_timesteps(steps)
    u = torch.linspace(1, 0, steps + 1)
    sigma = 3 * u / (1 + 2 * u)
    torch.testing.assert_close(pipe.scheduler.sigmas.float(), sigma, atol=1e-6, rtol=0)
    torch.testing.assert_close(pipe.scheduler.timesteps.float(), 1000 * sigma[:-1], atol=1e-3, rtol=0)


@torch.no_grad()
def test_diffusers_generates_what_we_generate(pipe, small):
    """The same noise and prompt through WanPipeline, and by Euler over our parts."""
    loaded, steps = load_pipeline(small.folder), 10
    noise = torch.randn(1, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    context = loaded.text_encoder(*loaded.tokenizer(PROMPTS[:1]))
    u = torch.linspace(1, 0, steps + 1)
    sigmas, z = 3 * u / (1 + 2 * u), noise.clone()
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        z = z + (then - now) * loaded.transformer(z, now[None], context)
    frames = pipe(
        PROMPTS[0],
        latents=noise,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=1.0,
        max_sequence_length=loaded.tokenizer.text_len,
        output_type="pt",
    ).frames
    ours = loaded.vae.decode(z).transpose(1, 2) / 2 + 0.5
    assert ours.std() > 0.05, "a constant video would agree with anything"
    close(frames, ours)


@torch.no_grad()
def test_transformers_reads_the_text_encoder_of_the_folder(small):
    """Longer than a prompt of the small model, so that the far position buckets count too."""
    theirs = UMT5EncoderModel.from_pretrained(small.folder / "text_encoder")
    ids = torch.randint(3, 40, (1, 200), generator=torch.Generator().manual_seed(0))
    close(small.text_encoder(ids, torch.ones_like(ids)), theirs(ids).last_hidden_state)


def test_configs_say_what_other_programs_ask(small, tmp_path):
    vae = json.loads((small.folder / "vae" / "config.json").read_text())
    assert (vae["scale_factor_spatial"], vae["scale_factor_temporal"], vae["in_channels"]) == (8, 4, 12)
    assert json.loads((small.folder / "transformer" / "config.json").read_text())["text_len"] == WAN.text_len
    save_pipeline(tmp_path, {"transformer": Wan(replace(WAN, text_len=512))})
    assert "text_len" not in json.loads((tmp_path / "transformer" / "config.json").read_text())


# The original layout.


def test_original_folder_holds_the_same_model(original, small):
    loaded = load_pipeline(original)
    for part in ("transformer", "vae", "text_encoder"):
        equal(getattr(loaded, part), getattr(small, part))
    assert loaded.transformer.config == WAN
    assert loaded.text_encoder.config == TEXT
    published = VAEConfig()  # the file has no statistics of the latents: they are constants
    means = {"latents_mean": published.latents_mean, "latents_std": published.latents_std}
    assert loaded.vae.config == replace(VAE, **means)
    assert torch.equal(loaded.tokenizer(PROMPTS)[0], opened(small.folder).tokenizer()(PROMPTS)[0])
    assert loaded.preset == Preset()


@pytest.mark.parametrize(
    "config",
    [VAE, VAEConfig(dim=3), VAEConfig(dim=2, dim_mult=(1, 1, 3, 2), num_res_blocks=3)],
)
def test_original_vae_is_measured_by_its_tensors(tmp_path, config):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"model_state": WanVAE(config).state_dict()}, tmp_path / "Wan2.1_VAE.pth")
    loaded = opened(tmp_path).vae().config
    assert replace(loaded, latents_mean=config.latents_mean, latents_std=config.latents_std) == config


def test_shards_are_found_without_an_index(original, small):
    (original / "diffusion_pytorch_model.safetensors.index.json").unlink()
    equal(opened(original).transformer(), small.transformer)


@pytest.mark.parametrize("with_index", [True, False])
def test_missing_shard_is_named(original, with_index):
    if not with_index:
        (original / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (original / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model-00001-of-00002.safetensors") as error:
        opened(original).transformer()
    shard = "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert f"`hf download Wan-AI/Wan2.1-T2V-1.3B {shard} --local-dir {original.as_posix()}`" in str(error.value)


def test_advice_names_the_model_of_the_same_size(original):
    edit(original / "config.json", num_layers=40)
    (original / "Wan2.1_VAE.pth").unlink()
    advice = "hf download Wan-AI/Wan2.1-T2V-14B Wan2.1_VAE.pth --local-dir"
    with pytest.raises(ValueError, match=f"has no Wan2.1_VAE.pth.*{advice}"):
        opened(original).vae()


# Wan2.2: a transformer for high noise, another for low.


@pytest.fixture(scope="module")
def other():
    """The weights of a second expert."""
    return scramble(Wan(WAN), 11)


def test_original_folder_of_two_experts(small, other, tmp_path):
    write_beside(tmp_path, small)
    write_original(tmp_path / "high_noise_model", small.transformer)
    write_original(tmp_path / "low_noise_model", other)
    loaded = load_pipeline(tmp_path)
    for part in ("transformer", "vae", "text_encoder"):
        equal(getattr(loaded, part), getattr(small, part))
    equal(loaded.transformer_2, other)
    assert loaded.preset == Preset(size=(1280, 720), boundary=0.875, guidance_2=None)
    shard = "diffusion_pytorch_model-00002-of-00002.safetensors"
    (tmp_path / "low_noise_model" / shard).unlink()
    opened(tmp_path).transformer()
    advice = r'hf download Wan-AI/Wan2.2-T2V-A14B --include "low_noise_model/\*" --local-dir'
    with pytest.raises(ValueError, match=f"has no low_noise_model/{shard}.*{advice}"):
        opened(tmp_path).transformer(expert="low")


@torch.no_grad()
def test_diffusers_folder_of_two_experts(pipe, tmp_path):
    """As diffusers writes it, in shards."""
    torch.manual_seed(1)
    second = scramble(WanTransformer3DModel.from_config(pipe.transformer.config), 12)
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    both = WanPipeline(**parts, transformer_2=second, boundary_ratio=0.9)
    both.save_pretrained(tmp_path, max_shard_size="20KB")
    assert list((tmp_path / "transformer_2").glob("*-00002-of-*.safetensors")), "it was to be in shards"
    loaded = load_pipeline(tmp_path)
    x, tau, context = torch.randn(1, 16, 2, 4, 4), torch.tensor([0.3]), torch.randn(1, 10, 24)
    for ours, theirs in ((loaded.transformer, pipe.transformer), (loaded.transformer_2, second)):
        close(ours(x, tau, context), theirs(x, 1000 * tau, context, return_dict=False)[0])
    assert loaded.preset.boundary == 0.9
    ours = loaded.tokenizer(PROMPTS)[0]
    assert torch.equal(ours, opened(Path(pipe.config._name_or_path)).tokenizer()(PROMPTS)[0])


def test_one_transformer_has_no_low_expert(copied, original):
    edit(copied / "model_index.json", transformer_2=[None, None], boundary_ratio=None)  # as diffusers writes Wan2.1
    for folder in (copied, original):
        assert not opened(folder).two_experts and load_pipeline(folder).transformer_2 is None
        with pytest.raises(ValueError, match="has one transformer, expected two"):
            opened(folder).transformer(expert="low")


@torch.no_grad()
def test_two_experts_are_written_as_diffusers_has_them(small, other, tmp_path):
    written = {part: getattr(small, part) for part in ("transformer", "vae", "text_encoder", "tokenizer")}
    save_pipeline(tmp_path, written | {"transformer_2": other}, Preset(shift=3.0, boundary=0.8))
    (tmp_path / "sampling.json").unlink()  # which the others do not know
    loaded, pipe = load_pipeline(tmp_path), WanPipeline.from_pretrained(tmp_path)
    equal(loaded.transformer, small.transformer)
    equal(loaded.transformer_2, other)
    assert loaded.preset.boundary == pipe.config.boundary_ratio == 0.8
    x, tau, context = torch.randn(1, 16, 2, 4, 4), torch.tensor([0.3]), torch.randn(1, 10, 24)
    close(other(x, tau, context), pipe.transformer_2(x, 1000 * tau, context, return_dict=False)[0])


# ComfyUI's single files.


SINGLE = WanConfig(dim=256, ffn_dim=96, freq_dim=32, num_heads=2, num_layers=2, text_dim=24)


@pytest.fixture(scope="module")
def single():
    """The state of a small transformer with heads as long as the published ones', and without the text length."""
    return scramble(Wan(SINGLE), 5, 0.05).state_dict()


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_single_file_is_measured_by_its_tensors(single, tmp_path, prefix):
    path = tmp_path / "anything.safetensors"
    rest = {"first_stage_model.conv1.weight": torch.zeros(2)} if prefix else {}  # some files hold the VAE as well
    save_file({prefix + name: tensor for name, tensor in single.items()} | rest, path)
    loaded = opened(path).transformer()
    assert loaded.config == opened(path).config == SINGLE
    assert all(torch.equal(tensor, single[name]) for name, tensor in loaded.state_dict().items())
    assert opened(path).preset == Preset()


def test_other_parts_are_beside_a_single_file(small, single, tmp_path):
    path = tmp_path / "wan.safetensors"
    save_file(single, path)
    with pytest.raises(ValueError, match="has no Wan2.1_VAE.pth") as error:
        load_pipeline(path)
    command = f"`hf download Wan-AI/Wan2.1-T2V-1.3B Wan2.1_VAE.pth --local-dir {tmp_path.as_posix()}`"
    assert command in str(error.value)
    write_beside(tmp_path, small)
    save_pipeline(tmp_path, {}, Preset(steps=7))
    loaded = load_pipeline(path)
    equal(loaded.vae, small.vae)
    equal(loaded.text_encoder, small.text_encoder)
    assert (loaded.tokenizer.text_len, loaded.preset.steps) == (512, 7)
    shutil.copytree(small.folder, tmp_path / "folder")
    equal(opened(shutil.copy(path, tmp_path / "folder")).vae(), small.vae)


def test_two_experts_as_single_files(small, single, tmp_path):
    """ComfyUI's Wan2.2 is two files; each is put into the folder of its expert, under any name."""
    write_beside(tmp_path, small)
    low = {name: -tensor for name, tensor in single.items()}
    for expert, name, state in (("high", "wan2.2_high.safetensors", fp8(single)), ("low", "b.safetensors", low)):
        (tmp_path / f"{expert}_noise_model").mkdir()
        save_file(state, tmp_path / f"{expert}_noise_model" / name)
    loaded = load_pipeline(tmp_path, torch.float32)
    assert loaded.transformer.config == loaded.transformer_2.config == opened(tmp_path).config == SINGLE
    assert loaded.preset == Preset(size=(1280, 720))
    for name, tensor in single.items():
        assert torch.equal(loaded.transformer_2.state_dict()[name], -tensor)
        assert (loaded.transformer.state_dict()[name] - tensor).norm() < 0.05 * tensor.norm()
    low_file = tmp_path / "low_noise_model" / "b.safetensors"
    save_file(low | patched(36), low_file)
    opened(tmp_path).transformer()
    with pytest.raises(ValueError, match="image-conditioned"):
        opened(tmp_path).transformer(expert="low")
    save_file({"x": torch.zeros(2)}, low_file)
    with pytest.raises(ValueError, match="low_noise_model/b.safetensors are not Wan2.1's"):
        opened(tmp_path).transformer(expert="low")
    shutil.copy(low_file, low_file.with_name("c.safetensors"))  # which of the two is meant?
    with pytest.raises(ValueError, match="has no low_noise_model/config.json"):
        opened(tmp_path).transformer(expert="low")


def fp8(state, kind=torch.float8_e4m3fn, rows=False):
    """A scaled file's tensors: linear weights as fp8 with a scale, each tensor's or each row's, the rest as it is."""
    scaled = {"scaled_fp8": torch.zeros(2, dtype=kind)}
    for name, tensor in state.items():
        if name.startswith("blocks.") and tensor.dim() == 2:
            largest = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().max()
            scale = largest / torch.finfo(kind).max
            scaled[name], scaled[name.replace("weight", "scale_weight")] = (tensor / scale).to(kind), scale
            scaled[name.replace("weight", "scale_input")] = torch.tensor(0.5)
        else:
            scaled[name] = tensor.half()
    return scaled


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_weights_are_multiplied_by_their_scales(single, tmp_path, kind, rows):
    path, stored = tmp_path / "wan.safetensors", fp8(single, kind, rows)
    save_file({"model.diffusion_model." + name: tensor for name, tensor in stored.items()}, path)
    loaded = opened(path).transformer(torch.float32).state_dict()
    for name, tensor in loaded.items():
        scale = stored.get(name.replace("weight", "scale_weight"), torch.tensor(1.0)) if "weight" in name else 1
        assert torch.equal(tensor, stored[name].float() * scale), name
        assert (tensor - single[name]).norm() < (0.05 if kind == torch.float8_e4m3fn else 0.1) * single[name].norm()
    half = opened(path).transformer().state_dict()
    assert all(torch.equal(half[name], loaded[name].bfloat16()) for name in half), "cast once, from fp32"


def test_fp8_without_scales_is_cast(single, tmp_path):
    path = tmp_path / "wan.safetensors"
    stored = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in single.items()}
    save_file(stored, path)
    for dtype in (None, torch.float32):
        loaded = opened(path).transformer(dtype).state_dict()
        assert all(torch.equal(loaded[name], stored[name].to(dtype or torch.bfloat16)) for name in stored)


@pytest.mark.parametrize(
    ("change", "message"),
    [("lost", "has no scale"), ("blocks", "a scale of"), ("beside nothing", "1 are unknown"),
     ("int8", "int8, expected floating")],
)  # fmt: skip
def test_weights_that_are_quantised_otherwise_are_refused(single, tmp_path, change, message):
    """A scale that is not applied gives noise, and no error anywhere else."""
    path, stored, weight = tmp_path / "wan.safetensors", fp8(single), "blocks.1.ffn.2.weight"
    scale = weight.replace("weight", "scale_weight")
    if change == "lost":
        del stored[scale]
    elif change == "blocks":
        stored[scale] = torch.ones(256, 4, 1)
    elif change == "beside nothing":
        stored["head.head.scale_weight"] = torch.ones(())
    else:
        stored |= {weight: stored[weight].to(torch.int8)}
        del stored[scale], stored[weight.replace("weight", "scale_input")]
    save_file(stored, path)
    with pytest.raises(ValueError, match=message):
        opened(path).transformer()


def patched(in_dim, out_dim=16):
    """The tensors that change with the channels."""
    return {
        "patch_embedding.weight": torch.zeros(256, in_dim, 1, 2, 2),
        "head.head.weight": torch.zeros(4 * out_dim, 256),
        "head.head.bias": torch.zeros(4 * out_dim),
    }


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (patched(36), r"an image-conditioned \(I2V\) model of 36"),  # Wan2.2's, with nothing else to tell it by
        ({"img_emb.proj.0.weight": torch.zeros(8)}, "I2V"),
        (patched(48, 48), "a TI2V model of 48"),
        ({"vace_blocks.0.before_proj.weight": torch.zeros(4, 4)}, "a VACE model"),
        (patched(32), "32 input and 16 output channels"),
    ],
)
def test_single_files_of_other_kinds_are_refused(single, tmp_path, changes, found):
    path = tmp_path / "wan2.1-t2v.safetensors"
    save_file(single | changes, path)
    with pytest.raises(ValueError, match=f"{found}.*expected a text-to-video"):
        load_pipeline(path)


def test_files_that_are_no_transformer(small, single, tmp_path):
    for weights in (small.vae.state_dict(), {"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2, 2)}):
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"x.safetensors are not Wan2.1's \(no tensor patch_embedding.weight\)"):
            opened(tmp_path / "x.safetensors").transformer()
    narrow = {"patch_embedding.weight": torch.zeros(192, 16, 1, 2, 2)}
    save_file(single | narrow, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="width 192, expected a multiple of 128"):
        print(opened(tmp_path / "x.safetensors").config)


# The published sizes.


@pytest.mark.parametrize(
    ("sizes", "targets", "billions", "size"),
    [((1536, 8960, 12, 30), 300, 1.42, (832, 480)), ((5120, 13824, 40, 40), 400, 14.3, (1280, 720))],
)
def test_published_models_have_their_sizes(tmp_path, sizes, targets, billions, size):
    """The original config.json says no more than this; diffusers' model of those sizes has the same tensors."""
    dim, ffn_dim, heads, layers = sizes
    config = {"dim": dim, "ffn_dim": ffn_dim, "num_heads": heads, "num_layers": layers, "freq_dim": 256, "in_dim": 16}
    config |= {"_class_name": "WanModel", "model_type": "t2v", "eps": 1e-6, "out_dim": 16, "text_len": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert opened(tmp_path).preset == Preset(size=size, frames=81, fps=16.0, steps=30, shift=5.0, guidance=3.0)
    with torch.device("meta"), checkpoint._Undrawn():
        ours = Wan(opened(tmp_path).config)
        theirs = WanTransformer3DModel(num_attention_heads=heads, attention_head_dim=128, num_layers=1, ffn_dim=ffn_dim)
    expected = {
        name.replace("blocks.0.", f"blocks.{i}."): tensor.shape
        for name, tensor in theirs.state_dict().items()
        for i in range(layers)
    }
    shapes = {rename(name, TRANSFORMER_NAMES): tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == expected
    assert len(ours.blocks) == layers
    assert sum(f"blocks.{i}.{name}.weight" in ours.state_dict() for i in range(99) for name in lora.TARGETS) == targets
    assert round(sum(p.numel() for p in ours.parameters()) / 1e9, 2 if billions < 2 else 1) == billions


# Memory.


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
def test_loading_takes_the_memory_of_one_model(tmp_path):
    """Pages of a mapped file count as well: twice the file, if it stays open while its tensors are copied."""
    path = tmp_path / "wan.safetensors"
    for name, layers in (("small.safetensors", 1), ("wan.safetensors", 6)):
        with torch.device("meta"), checkpoint._Undrawn():
            model = Wan(WanConfig(dim=768, ffn_dim=3072, num_heads=6, num_layers=layers, text_dim=24))
        state = {name: torch.ones(tensor.shape, dtype=torch.bfloat16) for name, tensor in model.state_dict().items()}
        save_file(state, tmp_path / name)
    script = f"""
import re
from model import Wan
from wan import checkpoint
opened = lambda path: checkpoint.open(path, Wan)
opened({str(tmp_path / "small.safetensors")!r}).transformer()  # what torch takes the first time, whatever the size
memory = lambda kind: 1024 * int(re.search(kind + r":\\s*(\\d+)", open("/proc/self/status").read())[1])
before, model = memory("VmRSS"), opened({str(path)!r}).transformer()
print(memory("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 1.1 * path.stat().st_size


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 32}, "I2V"),
        ({"in_channels": 36}, "I2V"),
        ({"in_channels": 48, "out_channels": 48}, "TI2V model of 48"),
        ({"_class_name": "WanVACETransformer3DModel"}, "VACE"),
        ({"_class_name": "WanAnimateTransformer3DModel"}, "WanAnimateTransformer3DModel"),
    ],
)
def test_other_kinds_of_models_are_refused(copied, changes, found):
    edit(copied / "transformer" / "config.json", **changes)
    with pytest.raises(ValueError, match=f"{found}.*expected a text-to-video"):
        opened(copied).transformer()


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"model_type": "i2v", "in_dim": 36}, "I2V"), ({"model_type": "ti2v"}, "TI2V"), ({"model_type": "vace"}, "VACE")],
)
def test_other_kinds_of_original_models_are_refused(original, changes, found):
    edit(original / "config.json", **changes)
    with pytest.raises(ValueError, match=f"{found}.*expected a text-to-video"):
        load_pipeline(original)


def test_wan22_vae_is_refused(copied):
    edit(copied / "vae" / "config.json", is_residual=True)
    with pytest.raises(ValueError, match="not a Wan2.1 VAE"):
        opened(copied).vae()


def test_weights_that_do_not_fit_are_counted(copied):
    path = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["img_emb.proj.0.weight"] = torch.zeros(2)
    state["proj_out.bias"] = torch.zeros(5)
    del state["blocks.1.norm2.weight"], state["blocks.0.scale_shift_table"]
    save_file(state, path)
    with pytest.raises(ValueError) as error:
        opened(copied).transformer()
    for words in (
        "2 are missing (first: blocks.0.scale_shift_table)",
        "1 are unknown (first: img_emb.proj.0.weight)",
        "1 are of another shape (first: proj_out.bias (5,), expected (64,))",
        f"of {len(state) + 1} tensors",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_missing_file_is_named_with_the_command_that_gets_it(copied, name):
    (copied / name).unlink()
    part = rf'--include "{name.split("/")[0]}/\*"'
    with pytest.raises(
        ValueError, match=f"has no {name}.*`hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers {part} --local"
    ):
        load_pipeline(copied)


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_half_a_file_is_one_sentence(copied, part):
    (copied / part).write_bytes((copied / part).read_bytes()[:50])
    with pytest.raises(ValueError, match=f"cannot read .*{part.split('/')[1]}"):
        load_pipeline(copied)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_pickled_code_is_never_run(original, name, zipped):
    content = {"conv1.weight": Code(original / "ran")}
    if zipped:
        torch.save(content, original / name)
    else:
        (original / name).write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=f"cannot read .*{name} .*nothing in it was run"):
        load_pipeline(original)
    assert not (original / "ran").exists()


@pytest.mark.parametrize("content", [{"something": torch.zeros(2)}, [torch.zeros(2)], {"conv1.weight": 3}, {}])
def test_pickles_of_something_else(original, content):
    torch.save(content, original / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match="not Wan2.1's|cannot read .*Wan2.1_VAE.pth"):
        opened(original).vae()


ORIGINAL_FILES = (
    "diffusion_pytorch_model-00001-of-00002.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "config.json",
    "Wan2.1_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "google/umt5-xxl/tokenizer.json",
)


@pytest.mark.parametrize("name", ORIGINAL_FILES)
@pytest.mark.parametrize("damage", ["empty", "cut", "swapped"])
def test_damaged_files_end_in_one_sentence(original, capsys, name, damage):
    """A pointer that git wrote in place of a large file is the kind of thing that gets swapped in."""
    path = original / name
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 5676\n"
    path.write_bytes({"empty": b"", "cut": path.read_bytes()[:-100], "swapped": pointer}[damage])
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: load_pipeline(original))
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and name.split("/")[-1] in printed.err and len(printed.err) < 500


def test_two_files_in_each_others_place(original):
    vae, text = original / "Wan2.1_VAE.pth", original / "models_t5_umt5-xxl-enc-bf16.pth"
    weights = vae.read_bytes()
    vae.write_bytes(text.read_bytes())
    with pytest.raises(ValueError, match=r"Wan2.1_VAE.pth are not Wan2.1's \(no tensor encoder.conv1.weight\)"):
        opened(original).vae()
    text.write_bytes(weights)
    with pytest.raises(ValueError, match=r"bf16.pth are not Wan2.1's \(no tensor token_embedding.weight\)"):
        opened(original).text_encoder()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(copied, value):
    path = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["blocks.1.attn1.to_q.weight"][3, 5] = value
    save_file(state, path)
    with pytest.raises(ValueError, match="blocks.1.attn1.to_q.weight in .* holds NaN or infinity"):
        opened(copied).transformer()


def test_a_type_too_small_for_the_weights(copied):
    path = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["proj_out.bias"][0] = 1e5
    save_file(state, path)
    assert opened(copied).transformer(torch.bfloat16).head.head.bias[0] > 9e4
    with pytest.raises(ValueError, match="proj_out.bias in .* holds NaN or infinity as torch.float16"):
        opened(copied).transformer(torch.float16)


def test_config_of_another_model_is_one_sentence(copied):
    edit(copied / "transformer" / "config.json", ffn_dim=56)
    with pytest.raises(
        ValueError, match=r"6 are of another shape \(first: .*net.0.proj.weight \(48, 32\), expected \(56, 32\)"
    ):
        opened(copied).transformer()


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [None, "text", -1, 10**9, 0.5, [], [[1]], True, float("nan"), {}])
def test_an_impossible_value_of_a_config_is_one_sentence(copied, part, value):
    fields = {"transformer": "num_layers", "vae": "num_res_blocks", "text_encoder": "d_kv"}
    edit(copied / part / "config.json", **{fields[part]: value})
    load = getattr(opened(copied), part)
    if value is None and part != "text_encoder":  # as if it were not there
        with pytest.raises(ValueError, match="not those of its config"):
            load()
        return
    with pytest.raises(ValueError, match="cannot read .*config.json.*expected int|not those of its config"):
        load()


@pytest.mark.parametrize("named", [True, False])
def test_a_trimmed_config_has_the_defaults_of_the_program_that_wrote_it(copied, named):
    """Whoever leaves out sizes gets one model's, those of diffusers and transformers, and not a mixture with ours."""
    for part in ("transformer", "text_encoder"):
        fields = json.loads((copied / part / "config.json").read_text())
        left_out = {"num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers", "num_heads"}
        left_out |= {"d_model", "d_kv", "d_ff", "vocab_size"}
        kept = {name: None if name in left_out else value for name, value in fields.items()}
        kept = kept if named else {name: value for name, value in kept.items() if name not in left_out}
        (copied / part / "config.json").write_text(json.dumps(kept))
    theirs, ours = UMT5Config(), opened(copied).outline()[2].config
    assert (ours.dim, ours.dim_ffn, ours.num_heads) == (theirs.d_model, theirs.d_ff, theirs.num_heads)
    assert (ours.vocab_size, ours.num_layers) == (theirs.vocab_size, theirs.num_layers)
    assert ours.dim_attn == theirs.num_heads * theirs.d_kv
    defaults = {name: p.default for name, p in inspect.signature(WanTransformer3DModel.__init__).parameters.items()}
    ours = opened(copied).config
    assert (ours.num_heads, ours.num_layers) == (defaults["num_attention_heads"], defaults["num_layers"])
    assert ours.ffn_dim == defaults["ffn_dim"] and ours.dim == ours.num_heads * defaults["attention_head_dim"]


def test_a_size_that_no_machine_holds_is_told_with_its_memory(copied):
    edit(copied / "transformer" / "config.json", num_layers=1000, ffn_dim=2**20, attention_head_dim=2**18)
    with pytest.raises(ValueError, match=r"transformer of .* would take \S+ TiB in bf16"):
        opened(copied).transformer()


@pytest.mark.parametrize("where", [None, 3, [1], {"a": 1}])
def test_an_index_of_shards_that_is_none(original, where):
    edit(original / "diffusion_pytorch_model.safetensors.index.json", weight_map=where)
    with pytest.raises(ValueError, match="index.json: expected a weight_map, tensor to file"):
        opened(original).transformer()


def test_a_preset_comes_back_and_what_it_leaves_out_is_published(tmp_path):
    assert opened(tmp_path).preset == Preset(size=(832, 480), frames=81, fps=16.0, steps=30, shift=5.0, guidance=3.0)
    preset = Preset(size=(64, 64), frames=33, noise=0.0, negative_prompt="")
    save_pipeline(tmp_path, {}, preset)
    assert opened(tmp_path).preset == preset
    (tmp_path / "sampling.json").write_text(json.dumps({"steps": 4}))
    assert opened(tmp_path).preset == Preset(steps=4)


def test_a_preset_with_a_misspelt_field_is_one_sentence(tmp_path):
    (tmp_path / "sampling.json").write_text(json.dumps({"step": 4}))
    with pytest.raises(ValueError, match=r"\['step'\], expected only the fields of checkpoint.Preset"):
        print(opened(tmp_path).preset)


# The hub.


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face's server as a download asks for; `folders` are its repositories."""

    folders, asked, tokens = {}, [], set()

    def do_GET(self):
        where = self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")
        repository, what, rest = "/".join(where[:2]), where[2:3], "/".join(where[4:])
        folder = Hub.folders.get(repository)
        if folder is not None:
            Hub.tokens.add(self.headers.get("Authorization"))
        if folder is None:
            self.answer(403 if "gated" in repository else 404, {"X-Error-Code": repository.split("/")[1]})
        elif what == ["tree"]:
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            entries = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]
            self.answer(200, {}, [{"type": "file", "path": p, "size": size, "oid": p} for p, size in entries])
        elif what == ["resolve"]:
            data = (folder / rest).read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "0" * 40}
            if self.command == "GET":
                Hub.asked.append(rest)
            self.answer(200, headers, data)
        else:
            self.answer(200, {}, {"id": repository, "sha": "0" * 40, "siblings": []})

    do_HEAD = do_GET

    def answer(self, status, headers, content=b""):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server of our own in place of Hugging Face's, and an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "folders", {})
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "tokens", set())
    checkpoint._download.cache_clear()
    yield Hub
    checkpoint._download.cache_clear()
    server.shutdown()
    server.server_close()


def test_only_what_is_needed_is_downloaded(copied, small, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for extra in ("transformer/diffusion_pytorch_model.fp16.safetensors", "vae/model.ckpt", "transformer.onnx"):
        (copied / extra).write_bytes(b"another copy")
    hub.folders["someone/model"] = copied
    assert opened("someone/model").config == WAN
    assert (opened("someone/model").preset, opened("someone/model").tokenizer().text_len) == (Preset(), WAN.text_len)
    assert hub.asked and all(name.endswith(".json") for name in hub.asked), "a dry run needs no weights"
    described = len(hub.asked)
    equal(opened("someone/model").vae(), small.vae)
    assert hub.asked[described:] == ["vae/diffusion_pytorch_model.safetensors"]
    loaded = load_pipeline("someone/model")
    equal(loaded.transformer, small.transformer)
    weights = ["text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"]
    assert sorted(hub.asked[described + 1 :]) == weights
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize("name", [checkpoint.SMALL, checkpoint.LARGE, checkpoint.TWO_EXPERTS])
@pytest.mark.parametrize("suffix", ["", "-Diffusers"])
def test_a_published_model_is_rehearsed_without_network(hub, name, suffix):
    """Its sizes ship with the code, and are those that its files say; one that is not published has to be asked for."""
    found = checkpoint.open(name + suffix, Wan, rehearsal=True)
    assert found.two_experts == (name == checkpoint.TWO_EXPERTS) and found.published == name
    assert found.preset == Preset(size=(832, 480) if name == checkpoint.SMALL else (1280, 720))
    transformer, vae, encoder = found.outline()
    assert (vae.config, encoder.config) == (VAEConfig(), T5Config())
    parameters = sum(p.numel() for p in transformer.parameters()) / 1e9
    assert round(parameters, 2) == (1.42 if name == checkpoint.SMALL else 14.29)
    assert hub.asked == []
    with pytest.raises(ValueError, match="there is none, or it is private"):
        checkpoint.open("someone/RepoNotFound", Wan, rehearsal=True)


def test_two_experts_in_shards_are_downloaded(small, other, tmp_path, hub):
    folder = tmp_path / "remote"
    write_beside(folder, small)
    write_original(folder / "high_noise_model", small.transformer)
    write_original(folder / "low_noise_model", other)
    (folder / "assets").mkdir()
    (folder / "assets" / "film.mp4").write_bytes(b"large")
    hub.folders["someone/two"] = folder
    equal(opened("someone/two").transformer(expert="low"), other)
    assert not any(name.startswith("high_noise_model/") and "-of-" in name for name in hub.asked)
    loaded = load_pipeline("someone/two")
    equal(loaded.transformer, small.transformer)
    weights = {path.relative_to(folder).as_posix() for path in folder.rglob("*.[sp]*") if path.suffix != ".json"}
    assert {name for name in hub.asked if not name.endswith(".json")} == weights
    assert len(hub.asked) == len(set(hub.asked)), "nothing comes twice"


def test_what_was_downloaded_serves_offline(copied, small, hub, monkeypatch):
    hub.folders["someone/model"] = copied
    opened("someone/model").vae()
    checkpoint._download.cache_clear()  # as in a new process
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    equal(opened("someone/model").vae(), small.vae)
    assert opened("someone/model").config == WAN
    assert len(hub.asked) == asked
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        opened("someone/model").transformer()
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        opened("someone/never-seen")


@pytest.mark.parametrize(
    ("repository", "cause"),
    [
        (
            "gated/GatedRepo",
            "access is restricted; ask for it at https://huggingface.co/gated/GatedRepo and set HF_TOK",
        ),
        ("someone/RepoNotFound", "there is none, or it is private; check the name"),
        ("someone/lora", "has no config of a Wan transformer"),
    ],
)
def test_why_a_repository_cannot_be_had(hub, tmp_path, repository, cause):
    hub.folders["someone/lora"] = tmp_path / "lora"
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=cause) as error:
        opened(repository)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_no_network_and_no_space(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"someone/model is no folder here.*cannot be reached \(.*check the network"):
        opened("someone/model")

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ValueError, match="No space left on device; when that is mended"):
        opened("someone/model")


def test_an_i2v_repository_is_refused_before_its_weights_arrive(copied, hub):
    edit(copied / "transformer" / "config.json", in_channels=36)
    hub.folders["someone/t2v"] = copied
    with pytest.raises(ValueError, match="I2V"):
        load_pipeline("someone/t2v")
    assert not any(name.endswith(".safetensors") for name in hub.asked)


def test_what_is_neither_on_disk_nor_a_repository(small, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # beside the clone there may be an x
    for wrong in ("nowhere", "/no/such/folder", "a/b/c", "../x", "models/wan.safetensors", "models/wan.gguf"):
        with pytest.raises(ValueError, match="expected a folder, a .safetensors file or a Hugging Face repository"):
            opened(wrong)
    with pytest.raises(ValueError, match="expected a folder"):
        opened(small.folder / "model_index.json")
