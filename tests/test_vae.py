"""vae.py: the published ones' numbers; chunks equal the whole, and tiles come near it; the past alone is seen."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small import opened

from toy import world
from wan.vae import MEMORY, VAEConfig, WanVAE

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "vae.safetensors"
CLOSE = 1e-5  # relative


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture
def vae(golden):
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
    vae = WanVAE(VAEConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in config.items()}))
    vae.load_state_dict({name[4:]: tensor for name, tensor in golden.items() if name.startswith("vae.")})
    return vae.requires_grad_(False)


def _small(**changes):
    """A VAE of random weights; its attention, which starts as the identity, takes part."""
    vae = WanVAE(VAEConfig(**{"dim": 4, "num_res_blocks": 1, **changes})).requires_grad_(False)
    for part in (vae.encoder, vae.decoder):
        torch.nn.init.normal_(part.middle[1].proj.weight, std=0.3)
    return vae


def _video(frames, height=16, width=24, B=1):
    return torch.rand(B, 3, frames, height, width) * 2 - 1


def _statistics(vae):
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


def _error(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


# The published numbers


@pytest.mark.parametrize("chunk", [None, 1])
def test_encode_matches_the_published_code(vae, golden, chunk):
    latents = vae.encode(golden["video"], chunk)
    assert latents.shape == (1, 16, 3, 4, 5)
    assert _error(latents, golden["latents"]) < CLOSE


@pytest.mark.parametrize("chunk", [None, 1])
def test_an_image_is_a_video_of_one_frame(vae, golden, chunk):
    latent = vae.encode(golden["video"][:, :, :1], chunk)
    assert _error(latent, golden["image_latent"]) < CLOSE
    assert _error(golden["latents"][:, :, :1], golden["image_latent"]) < CLOSE
    assert vae.decode(latent, chunk).shape == (1, 3, 1, 32, 40)


def test_decode_matches_the_published_code(vae, golden):
    mean, std = _statistics(vae)
    assert _error(vae.pixels(golden["latents"] * std + mean), golden["decoded"]) < CLOSE
    assert golden["decoded"].abs().max() > 2  # so that the clamp below has something to do
    for chunk in (None, 1):
        assert _error(vae.decode(golden["latents"], chunk), golden["decoded"].clamp(-1, 1)) < CLOSE


def test_names_and_shapes_are_the_published_ones(vae, golden):
    published = {name[4:]: tensor.shape for name, tensor in golden.items() if name.startswith("vae.")}
    assert {name: parameter.shape for name, parameter in vae.named_parameters()} == published
    assert list(vae.buffers()) == []


def test_defaults_are_wan_2_1():
    with torch.device("meta"):
        vae = WanVAE(VAEConfig())
    assert sum(parameter.numel() for parameter in vae.parameters()) == 126_892_531


def test_latents_are_normalised_moments(vae, golden):
    moments, log_variance = vae.moments(golden["video"])
    assert moments.shape == log_variance.shape == (1, 16, 3, 4, 5)
    mean, std = _statistics(vae)
    assert _error(vae.encode(golden["video"]) * std + mean, moments) < 1e-5


# Chunks


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"temporal_downsample": (True, True, False)},
        # Pixels folded 2x2, and one level fewer: still 8x8 pixels a latent.
        {"patch_size": 2, "dim_mult": (1, 2, 2), "temporal_downsample": (True, True)},
    ],
)
def test_chunks_equal_the_whole(shape):
    vae = _small(**shape)
    video = _video(25)  # 7 latent frames: chunks of 2 and of 3 leave a remainder
    latents = vae.encode(video)
    assert latents.shape == (1, 16, 7, 2, 3)
    pixels = vae.decode(latents)
    assert pixels.shape == video.shape
    for chunk in (1, 2, 3, 7, 8):
        assert _error(vae.encode(video, chunk), latents) < 1e-5
        assert _error(vae.decode(latents, chunk), pixels) < 1e-5


def test_a_chunked_pass_leaves_nothing_behind(vae, golden):
    first = vae.encode(golden["video"], chunk=1)
    vae.encode(torch.randn_like(golden["video"]), chunk=2)
    assert torch.equal(vae.encode(golden["video"], chunk=1), first)


def test_chunks_remember_the_past_only_in_small_copies(vae):
    for run, chunk in ((vae.moments, _video(9)), (vae.pixels, torch.randn(1, 16, 3, 2, 3))):
        past = {}
        run(chunk, past)
        kept = [tensor for tensor in past.values() if isinstance(tensor, torch.Tensor)]
        assert len(kept) > 10 and all(t.shape[2] <= 2 and t.untyped_storage().nbytes() == t.nbytes for t in kept)


# Tiles


@torch.no_grad()
def _local(vae):
    """The same VAE without attention and without a look at what is outside of a latent's 8x8 pixels."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.Conv2d) and module.kernel_size[-1] == 3:
            # Halving looks at pixels 0, 1 and 2, of which 2 is the neighbour's; the others look to both sides.
            outside = [2] if module.stride[-1] == 2 else [0, 2]
            module.weight[..., outside, :] = module.weight[..., :, outside] = 0
            module.weight.mul_(3)  # the few that are left must do, or all would be grey
    for part in (vae.encoder, vae.decoder):
        part.middle[1].proj.weight.zero_()
    return vae


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("tile, size", [(32, (72, 40)), (64, (120, 16)), (48, (88, 56))])
def test_tiles_equal_the_whole_where_nothing_looks_beyond_them(chunk, tile, size):
    vae = _local(_small(dim_mult=(1, 1, 1, 1)))
    video = _video(5, *size)
    latents = vae.encode(video)
    assert _error(vae.encode(video, chunk, tile), latents) < 1e-5
    latents = torch.randn_like(latents) * 10
    pixels = vae.decode(latents)
    assert latents.flatten(3).std(-1).mean() > 1e-2 and pixels.flatten(3).std(-1).mean() > 1e-2, "not all grey"
    assert _error(vae.decode(latents, chunk, tile), pixels) < 1e-5


@pytest.mark.parametrize("tile", [32, 64])
def test_no_tile_is_larger_than_asked(tile):
    vae = _small()
    seen = []
    for part in (vae.encoder, vae.decoder):
        part.conv1.register_forward_pre_hook(lambda module, x: seen.append((module, *x[0].shape[-2:])))
    vae.encode(_video(1, 40, 136), tile=tile)
    vae.decode(torch.randn(1, 16, 1, 5, 17), tile=tile)
    pixels, latents = ([size for module, *size in seen if module is part.conv1] for part in (vae.encoder, vae.decoder))
    assert len(pixels) == len(latents) > 2
    assert [[8 * side for side in size] for size in latents] == pixels
    assert max(side for size in pixels for side in size) <= tile


def test_a_tile_as_large_as_the_frame_changes_nothing(vae, golden):
    latents = vae.encode(golden["video"])
    assert torch.equal(vae.encode(golden["video"], tile=40), latents)
    assert torch.equal(vae.decode(latents, tile=40), vae.decode(latents))


def test_tiles_show_no_seam():
    """Random weights see further than trained ones, so tiles differ from the whole: but nowhere all of a sudden."""
    vae = _small()
    latents = torch.randn(1, 16, 1, 4, 16)
    whole = vae.decode(latents)

    def sharpest(video):
        step = (video - whole).diff(dim=-1).abs().mean((0, 1, 2, 3))  # from one column of pixels to the next
        return (step.max() / step.mean()).item()

    halves = torch.cat([vae.decode(latents[..., :8]), vae.decode(latents[..., 8:])], dim=-1)
    assert sharpest(vae.decode(latents, tile=64)) < 2.5 < 3.5 < sharpest(halves)


@torch.no_grad()
def test_tiles_of_the_embedded_vae_cost_less_than_a_decibel():
    vae = opened("checkpoints/tiny").vae()
    clips = [world.render(scene, 1) for scene in world.scenes(4, seed=1)]
    video = torch.cat([torch.cat(clips[:2], dim=-1), torch.cat(clips[2:], dim=-1)], dim=-2)[None]  # 128x128

    def decibels(result):
        square = (result - video).square()
        return [10 * math.log10(4 / part.mean().item()) for part in (square, square[..., 40:88], square[..., 40:88, :])]

    whole = decibels(vae.decode(vae.encode(video)))
    tiled = decibels(vae.decode(vae.encode(video, 1, 64), 1, 64))
    assert all(b > a - 1 for a, b in zip(whole, tiled, strict=True)), (whole, tiled)


def test_a_video_is_taken_whole_while_memory_suffices_then_by_chunks_then_by_tiles():
    with torch.device("meta"):
        vae = WanVAE(VAEConfig())
    assert vae.pieces(1, 9, 64, 64) == (None, None)
    assert vae.pieces(1, 21, 480, 832) == (1, None)
    assert vae.pieces(1, 21, 720, 1280) == (1, 512)
    for size in ((21, 720, 1280), (1, 4096, 4096), (200, 480, 832), (9, 64, 64)):
        assert vae.decoding_bytes(*size) <= MEMORY


@pytest.mark.parametrize("tile", [None, 32])
def test_memory_decides_what_is_not_asked_for(tile, monkeypatch):
    vae = _small()
    monkeypatch.setattr(WanVAE, "pieces", lambda *size: (1, tile))
    for run, x in ((vae.encode, _video(9, 64, 40)), (vae.decode, torch.randn(1, 16, 3, 8, 5))):
        parts = []
        hook = (vae.encoder if run == vae.encode else vae.decoder).register_forward_pre_hook(
            lambda _, inputs, parts=parts: parts.append(inputs[0].shape)
        )
        decided = run(x)
        taken = parts.copy()
        assert torch.equal(decided, run(x, 1, tile)) and parts == 2 * taken and len(taken) > 2
        hook.remove()


MEASURE = """
import sys, torch
from wan.vae import MEMORY, VAEConfig, WanVAE

def peak():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

F, H, W = map(int, sys.argv[1:4])
vae, asked = WanVAE(VAEConfig()), tuple(map(int, sys.argv[4:]))
with torch.no_grad():
    vae.decode(torch.randn(1, 16, 1, 4, 4))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = peak()
    video = vae.decode(torch.randn(1, 16, F, H, W), *asked)
print(peak() - before - 4 * video.numel())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of memory")
@pytest.mark.parametrize("size, chunk", [((1, 32, 32), ()), ((3, 16, 16), ()), ((3, 16, 16), (1,))])
def test_decoding_takes_the_memory_that_is_told(size, chunk):
    run = [sys.executable, "-c", MEASURE, *map(str, size + chunk)]
    # Each tensor by a mapping of its own, so that what is measured is tensors and not the allocator's leftovers.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    measured = int(output)
    with torch.device("meta"):
        told = WanVAE(VAEConfig())._bytes(1, 2 if chunk else size[0], 8 * size[1], 8 * size[2])
    assert 0.4 * told < measured < told


def test_tiles_that_are_too_small_are_refused(vae):
    with pytest.raises(ValueError, match="got tiles of 24 pixels, expected at least 32"):
        vae.decode(torch.zeros(1, 16, 1, 9, 9), tile=24)


# Causality


@pytest.mark.parametrize("chunk", [None, 2])
def test_latents_do_not_see_later_frames(vae, chunk):
    video = _video(13)
    latents = vae.encode(video, chunk)
    for frame, latent in ((1, 1), (5, 2), (8, 2), (12, 3)):
        changed = video.clone()
        changed[:, :, frame] = -changed[:, :, frame]
        moved = (vae.encode(changed, chunk) != latents).flatten(3).any(dim=(0, 1, 3))
        assert moved.tolist() == [False] * latent + [True] * (4 - latent)
    assert _error(vae.encode(video[:, :, :5], chunk), latents[:, :, :2]) < 1e-5


@pytest.mark.parametrize("chunk", [None, 2])
def test_pixels_do_not_see_later_latents(vae, chunk):
    latents = torch.randn(1, 16, 4, 2, 3) * 0.1
    video = vae.decode(latents, chunk)
    for latent, frame in ((1, 1), (2, 5), (3, 9)):
        changed = latents.clone()
        changed[:, :, latent] = -changed[:, :, latent]
        same = (vae.decode(changed, chunk) == video).flatten(3).all(dim=(0, 1, 3))
        assert same[:frame].all() and not same[frame : frame + 4].any()


# Sizes, number formats and mistakes


def test_a_batch_is_its_samples(vae):
    video = _video(5, B=2)
    latents = vae.encode(video)
    pixels = vae.decode(latents)
    for i in range(2):
        assert _error(vae.encode(video[i : i + 1]), latents[i : i + 1]) < 1e-5
        assert _error(vae.decode(latents[i : i + 1]), pixels[i : i + 1]) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": 5},
        {"dim": 3, "dim_mult": (1, 1, 2, 3), "num_res_blocks": 2},
        {"dim": 6, "dim_mult": (3, 2, 1, 1)},
        {"dim": 5, "dim_mult": (1, 2, 3), "temporal_downsample": (True, True), "patch_size": 2},
        {"z_dim": 7, "latents_mean": (0.5,) * 7, "latents_std": (2.0,) * 7},
    ],
)
def test_other_sizes(changes):
    vae = _small(**changes)
    video = _video(5)
    latents = vae.encode(video)
    assert latents.shape == (1, vae.config.z_dim, 2, 2, 3)
    pixels = vae.decode(latents)
    assert pixels.shape == video.shape and pixels.isfinite().all() and pixels.std() > 0
    assert _error(vae.decode(vae.encode(video, 1), 1), pixels) < 1e-4


@pytest.mark.parametrize("count", [1, 3])
def test_residual_blocks_are_as_many_as_asked(count):
    vae = _small(num_res_blocks=count)
    assert len(vae.encoder.downsamples) == 4 * count + 3  # on four levels, and three steps between them
    assert len(vae.decoder.upsamples) == 4 * (count + 1) + 3


def test_patches_fold_pixels_into_channels():
    vae = _small(patch_size=2, dim_mult=(1, 2, 2), temporal_downsample=(True, True))
    assert vae.encoder.conv1.weight.shape[1] == vae.decoder.head[2].weight.shape[0] == 12
    seen = []
    vae.encoder.conv1.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    video = _video(1)
    vae.encode(video)
    # Channel (colour, column, row), as in the published fold.
    for colour, column, row in ((0, 0, 0), (0, 1, 0), (1, 0, 1), (2, 1, 1)):
        channel = colour * 4 + column * 2 + row
        assert torch.equal(seen[0][:, channel], video[:, colour, :, row::2, column::2])
    vae.decoder.head[2].weight.zero_()
    vae.decoder.head[2].bias.copy_(torch.arange(12) / 12)
    pixels = vae.decode(torch.zeros(1, 16, 1, 2, 3))
    assert pixels[0, :, 0, 1::2, 0::2].flatten(1).unique(dim=1)[:, 0].tolist() == pytest.approx(
        [1 / 12, 5 / 12, 9 / 12]
    )


def test_bf16_weights(vae, golden):
    vae.bfloat16()
    latents = vae.encode(golden["video"])  # fp32 in
    assert latents.dtype == torch.bfloat16
    assert 0 < _error(latents, golden["latents"]) < 0.05
    pixels = vae.decode(golden["latents"])
    assert pixels.dtype == torch.bfloat16 and pixels.abs().max() <= 1
    assert 0 < _error(pixels, golden["decoded"].clamp(-1, 1)) < 0.05
    assert vae.decode(golden["latents"], chunk=2).dtype == torch.bfloat16


def test_fp32_weights_take_bf16(vae, golden):
    assert vae.encode(golden["video"].bfloat16()).dtype == torch.float32
    assert vae.decode(golden["latents"].bfloat16()).dtype == torch.float32


def test_training_reaches_every_parameter():
    vae = _small().requires_grad_(True)
    video = _video(5)
    mean, log_variance = vae.moments(video)
    (vae.pixels(mean + (0.5 * log_variance).exp()) - video).square().mean().backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or p.grad.eq(0).all()] == []


@pytest.mark.parametrize("frames, advice", [(2, 1), (4, 5), (8, 9), (16, 17), (15, 13)])
def test_a_number_of_frames_that_does_not_fit_is_refused(vae, frames, advice):
    with pytest.raises(ValueError, match=rf"a video of {frames} frames .* expected 4k\+1 frames, such as {advice}$"):
        vae.encode(torch.zeros(1, 3, frames, 16, 16))


@pytest.mark.parametrize("height, width", [(12, 16), (16, 4), (17, 16)])
def test_a_size_that_does_not_fit_is_refused(vae, height, width):
    with pytest.raises(ValueError, match=f"{width}x{height} pixels .* multiples of 8"):
        vae.encode(torch.zeros(1, 3, 1, height, width))
