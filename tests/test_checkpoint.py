"""Names and configs against diffusers and transformers, both layouts there and back, and one sentence a mistake."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

import checkpoint
from checkpoint import (
    TEXT_NAMES,
    TRANSFORMER_NAMES,
    Preset,
    load_pipeline,
    load_preset,
    load_text_encoder,
    load_tokenizer,
    load_transformer,
    load_vae,
    rename,
    save_pipeline,
    save_preset,
    vae_names,
)
from model import Wan, WanConfig
from text import T5Config, UMT5Encoder, train_tokenizer, write_tokenizer
from vae import VAEConfig, WanVAE

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
    save_pipeline(folder, **written, shift=3.0)
    return SimpleNamespace(folder=folder, **written)


@pytest.fixture
def copied(small, tmp_path):
    return shutil.copytree(small.folder, tmp_path / "copy")


@pytest.fixture
def original(small, tmp_path):
    """The same weights as the authors of Wan2.1 publish theirs: an index with two shards, and two pickled files."""
    folder = tmp_path / "original"
    write_tokenizer(folder / "google" / "umt5-xxl", small.tokenizer, WAN.text_len)
    config = {name: getattr(WAN, name) for name in ("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads")}
    config |= {name: getattr(WAN, name) for name in ("num_layers", "text_len", "text_dim", "eps")}
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v", **config}))
    state = {name: tensor.contiguous() for name, tensor in small.transformer.state_dict().items()}
    shards = [f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    where = {name: shards[i % 2] for i, name in enumerate(state)}
    for shard in shards:
        save_file({name: state[name] for name in state if where[name] == shard}, folder / shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    torch.save(small.vae.state_dict(), folder / "Wan2.1_VAE.pth")
    torch.save(small.text_encoder.state_dict(), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


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
    return theirs, load_transformer(folder), x, context


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
    ours = load_vae(tmp_path)
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
    ours = load_text_encoder(tmp_path)
    ids = torch.randint(3, 50, (2, 40))
    mask = torch.arange(40) < torch.tensor([[40], [9]])
    close(ours(ids, mask), theirs(ids, mask.long()).last_hidden_state * mask[:, :, None])


def test_token_embedding_may_have_either_of_its_names(copied, small):
    path = copied / "text_encoder" / "model.safetensors"
    state = load_file(path)
    save_file({name.replace("shared.", "encoder.embed_tokens."): state[name] for name in state}, path)
    equal(load_text_encoder(copied), small.text_encoder)


def test_names_are_one_to_one():
    """Two original names with one -Diffusers name would lose a tensor, at the published depths too."""
    published = replace(WAN, num_layers=40), replace(TEXT, num_layers=24), VAEConfig()
    with torch.device("meta"):
        models = [part(config) for part, config in zip((Wan, UMT5Encoder, WanVAE), published, strict=True)]
    tables = TRANSFORMER_NAMES, TEXT_NAMES, vae_names(VAEConfig())
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
    assert (loaded.preset, loaded.name, loaded.path) == (Preset(), "model", small.folder)
    assert all(p.requires_grad and p.is_leaf for p in loaded.transformer.parameters()), "training needs them"


def test_types_are_chosen_on_writing_and_on_reading(tmp_path):
    written = parts()
    save_pipeline(tmp_path, **written, dtype={"vae": torch.float16, "text_encoder": torch.bfloat16})
    assert load_vae(tmp_path).conv1.weight.dtype == torch.float32
    assert load_vae(tmp_path, None).conv1.weight.dtype == torch.float16
    assert load_text_encoder(tmp_path).norm.weight.dtype == torch.bfloat16
    assert load_pipeline(tmp_path, torch.float32).text_encoder.norm.weight.dtype == torch.float32
    torch.testing.assert_close(load_vae(tmp_path).conv1.weight, written["vae"].conv1.weight, atol=1e-3, rtol=1e-3)


def test_parts_can_be_written_one_by_one(small, tmp_path):
    save_pipeline(tmp_path, vae=small.vae)
    equal(load_vae(tmp_path), small.vae)
    with pytest.raises(ValueError, match="has no transformer/config.json"):
        load_pipeline(tmp_path)
    save_pipeline(tmp_path, transformer=small.transformer, text_encoder=small.text_encoder, tokenizer=small.tokenizer)
    equal(load_pipeline(tmp_path).vae, small.vae)
    # A tokenizer that was loaded can be written too, with its own length.
    save_pipeline(tmp_path, tokenizer=load_tokenizer(small.folder))
    written = (tmp_path / "tokenizer" / "tokenizer.json").read_text()
    assert written == (small.folder / "tokenizer" / "tokenizer.json").read_text()
    with pytest.raises(ValueError, match="dtype for"):
        save_pipeline(tmp_path, dtype={"text": torch.float16})


def test_a_loaded_model_can_be_written_over_its_own_files(copied, small):
    transformer = load_transformer(copied)
    with torch.no_grad():
        transformer.patch_embedding.bias += 1
    save_pipeline(copied, transformer=transformer)
    equal(load_transformer(copied), transformer)


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
    script = f"import sys, checkpoint; checkpoint.load_pipeline({str(small.folder)!r}); print(*sys.modules)"
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
    save_pipeline(tmp_path, transformer=Wan(replace(WAN, text_len=512)))
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
    assert torch.equal(loaded.tokenizer(PROMPTS)[0], load_tokenizer(small.folder)(PROMPTS)[0])
    assert loaded.preset == Preset()


@pytest.mark.parametrize(
    "config",
    [VAE, VAEConfig(dim=3), VAEConfig(dim=2, dim_mult=(1, 1, 3, 2), num_res_blocks=3)],
)
def test_original_vae_is_measured_by_its_tensors(tmp_path, config):
    (tmp_path / "config.json").write_text("{}")
    torch.save({"model_state": WanVAE(config).state_dict()}, tmp_path / "Wan2.1_VAE.pth")
    loaded = load_vae(tmp_path).config
    assert replace(loaded, latents_mean=config.latents_mean, latents_std=config.latents_std) == config


def test_shards_are_found_without_an_index(original, small):
    (original / "diffusion_pytorch_model.safetensors.index.json").unlink()
    equal(load_transformer(original), small.transformer)


@pytest.mark.parametrize("with_index", [True, False])
def test_missing_shard_is_named(original, with_index):
    if not with_index:
        (original / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (original / "diffusion_pytorch_model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="has no diffusion_pytorch_model-00001-of-00002.safetensors") as error:
        load_transformer(original)
    assert f"hf download Wan-AI/Wan2.1-T2V-1.3B --local-dir {original.as_posix()}" in str(error.value)


def test_advice_names_the_model_of_the_same_size(original):
    edit(original / "config.json", num_layers=40)
    (original / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(ValueError, match="has no Wan2.1_VAE.pth.*hf download Wan-AI/Wan2.1-T2V-14B --local-dir"):
        load_vae(original)


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
        load_transformer(copied)


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"model_type": "i2v", "in_dim": 36}, "I2V"), ({"model_type": "ti2v"}, "TI2V"), ({"model_type": "vace"}, "VACE")],
)
def test_other_kinds_of_original_models_are_refused(original, changes, found):
    edit(original / "config.json", **changes)
    with pytest.raises(ValueError, match=f"{found}.*expected a text-to-video"):
        load_pipeline(original)


def test_a_model_of_two_transformers_is_refused(copied, original):
    edit(copied / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875)
    with pytest.raises(ValueError, match="a Wan2.2 model of two transformers"):
        load_pipeline(copied)
    edit(copied / "model_index.json", transformer_2=[None, None], boundary_ratio=None)
    load_transformer(copied)
    (original / "config.json").unlink()
    (original / "high_noise_model").mkdir()
    with pytest.raises(ValueError, match="a Wan2.2 model of two transformers"):
        load_transformer(original)


def test_wan22_vae_is_refused(copied):
    edit(copied / "vae" / "config.json", is_residual=True)
    with pytest.raises(ValueError, match="not a Wan2.1 VAE"):
        load_vae(copied)


def test_weights_that_do_not_fit_are_counted(copied):
    path = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["img_emb.proj.0.weight"] = torch.zeros(2)
    state["proj_out.bias"] = torch.zeros(5)
    del state["blocks.1.norm2.weight"], state["blocks.0.scale_shift_table"]
    save_file(state, path)
    with pytest.raises(ValueError) as error:
        load_transformer(copied)
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
    with pytest.raises(ValueError, match=f"has no {name}.*hf download Wan-AI/Wan2.1-T2V-1.3B-Diffusers --local-dir"):
        load_pipeline(copied)


@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_half_a_file_is_one_sentence(copied, part):
    (copied / part).write_bytes((copied / part).read_bytes()[:50])
    with pytest.raises(ValueError, match=f"cannot read .*{part.split('/')[1]}"):
        load_pipeline(copied)


def test_pickled_code_is_never_run(original):
    torch.save({"conv1.weight": SimpleNamespace()}, original / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match="cannot read .*Wan2.1_VAE.pth"):
        load_vae(original)
    torch.save({"something": torch.zeros(2)}, original / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match="not Wan2.1's"):
        load_vae(original)


def test_config_of_another_model_is_one_sentence(copied):
    edit(copied / "transformer" / "config.json", ffn_dim=56)
    with pytest.raises(
        ValueError, match=r"6 are of another shape \(first: .*net.0.proj.bias \(48,\), expected \(56,\)"
    ):
        load_transformer(copied)


def test_a_preset_comes_back_and_what_it_leaves_out_is_published(tmp_path):
    assert load_preset(tmp_path) == Preset(size=(832, 480), frames=81, fps=16.0, steps=30, shift=5.0, guidance=3.0)
    preset = Preset(size=(64, 64), frames=33, noise=0.0, negative_prompt="")
    save_preset(tmp_path, preset)
    assert load_preset(tmp_path) == preset
    (tmp_path / "sampling.json").write_text(json.dumps({"steps": 4}))
    assert load_preset(tmp_path) == Preset(steps=4)


def test_a_preset_with_a_misspelt_field_is_one_sentence(tmp_path):
    (tmp_path / "sampling.json").write_text(json.dumps({"step": 4}))
    with pytest.raises(ValueError, match=r"\['step'\], expected only the fields of checkpoint.Preset"):
        load_preset(tmp_path)


# The hub.


def test_a_repository_is_downloaded_in_two_steps(small, monkeypatch):
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append(allow_patterns)
        return str(small.folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    loaded = load_pipeline("someone/a-model")
    equal(loaded.transformer, small.transformer)
    assert loaded.name == "someone/a-model"
    assert asked[0] == ["*.json"] and "transformer/*.safetensors" in asked[1] and len(asked) == 2
    assert not any("transformer_2" in pattern or pattern == "*" for pattern in asked[1])


def test_an_i2v_repository_is_refused_before_its_weights_arrive(copied, monkeypatch):
    edit(copied / "transformer" / "config.json", in_channels=36)
    asked = []
    fake = SimpleNamespace(snapshot_download=lambda repository, allow_patterns: asked.append(1) or str(copied))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    with pytest.raises(ValueError, match="I2V"):
        load_pipeline("someone/a-model")
    assert len(asked) == 1


def test_what_is_neither_folder_nor_repository(small, monkeypatch):
    for wrong in ("nowhere", "/no/such/folder", "a/b/c", "../x", small.folder / "model_index.json"):
        with pytest.raises(ValueError, match="expected a folder or a Hugging Face repository"):
            checkpoint.find_model(wrong)

    def offline(repository, allow_patterns):
        raise ConnectionError("no network\nat all")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=offline))
    with pytest.raises(ValueError, match="someone/a-model is no folder here.*ConnectionError"):
        checkpoint.find_model("someone/a-model")
