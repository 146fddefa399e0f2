"""Wan's causal 3D VAE: a video in 8x8-pixel, 4-frame blocks, each frame of latents looking only at the past.

The first pixel frame becomes the first latent frame alone, and every further group of four pixel frames becomes one
more, so `N = 4(F-1) + 1`. Every convolution in time is padded on the side of the past only. That makes two passes
equal: the whole sequence at once (`past=None`, convolutions pad with zeros), and chunk by chunk, where `past` remembers
the last frames that each convolution saw. Tiles of a large frame overlap and are blended: close to the whole, not equal
to it, as a tile does not see what lies around it. Parameter names are those of the published `Wan2.1_VAE.pth`.

    latents = vae.encode(video)                     # (B, 3, N, 8H, 8W) in [-1, 1] -> (B, 16, F, H, W)
    video = vae.decode(latents, chunk=4)            # the same numbers, in less memory
    video = vae.decode(latents, chunk=1, tile=512)  # nearly the same, in the same memory whatever the frame

With neither, the whole video is taken at once if `MEMORY` suffices, else chunks, else chunks of tiles.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Mean and standard deviation of each channel of the published VAE's latents (constants of the Wan2.1 code).
WAN_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

MEMORY = 12 * 2**30  # bytes that encoding or decoding may take beside weights and video, unless asked otherwise
TILE = 512  # pixels a side, for frames that are too large for `MEMORY`


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a Wan VAE; the defaults are Wan2.1's. A frame shrinks by `patch_size * 2**(len(dim_mult) - 1)` = 8."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 1  # 2: pixels are first folded 2x2 into channels, which saves the level that costs most
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD

    def __post_init__(self):
        levels, channels = len(self.dim_mult), {len(self.latents_mean), len(self.latents_std)}
        if len(self.temporal_downsample) != levels - 1 or channels != {self.z_dim}:
            got = f"got {levels} levels, temporal_downsample {self.temporal_downsample} and statistics of {channels}"
            raise ValueError(f"{got} channels in the VAE's config, expected one less, and of {self.z_dim} channels")


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that sees the present and the past: frames t-2, t-1, t for a kernel of 3."""

    def __init__(self, dim_in: int, dim_out: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__(dim_in, dim_out, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, past: dict | None = None) -> Tensor:
        frames = self.kernel_size[0] - 1
        if frames and past is None:
            x = F.pad(x, (0, 0, 0, 0, frames, 0))
        elif frames:
            before = past.get(self)
            x = torch.cat([x.new_zeros(*x.shape[:2], frames, *x.shape[3:]) if before is None else before, x], dim=2)
            past[self] = x[:, :, -frames:].clone()  # a view would keep the whole chunk alive
        return super().forward(x)


class RMSNorm(nn.Module):
    """Root-mean-square norm over channels; gamma is (D, 1, 1, 1) for video, (D, 1, 1) for frames."""

    def __init__(self, dim: int, trailing: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * trailing))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.movedim(1, -1), (x.shape[1],), self.gamma.flatten().to(x.dtype), 1e-12).movedim(-1, 1)


class Causal(nn.Sequential):
    """Layers one after another; those that look back in time are given `past`."""

    def forward(self, x: Tensor, past: dict | None = None) -> Tensor:
        for layer in self:
            look_back = isinstance(layer, Causal | CausalConv3d | ResidualBlock | Downsample | Upsample)
            x = layer(x, past) if look_back else layer(x)
        return x


class ResidualBlock(nn.Module):
    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        # Index 5 is the dropout of the published code: it has no weights, but it gives the convolution number 6.
        self.residual = Causal(
            RMSNorm(dim_in, 3), nn.SiLU(), CausalConv3d(dim_in, dim_out),
            RMSNorm(dim_out, 3), nn.SiLU(), nn.Identity(), CausalConv3d(dim_out, dim_out),
        )  # fmt: skip
        self.shortcut = CausalConv3d(dim_in, dim_out, (1, 1, 1)) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, past: dict | None) -> Tensor:
        return self.shortcut(x) + self.residual(x, past)


class AttentionBlock(nn.Module):
    """One head of self-attention over the pixels of each frame; it starts as the identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def attend(self, frames: Tensor) -> Tensor:  # (n, c, h, w)
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (three c) h w -> three n 1 (h w) c", three=3)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(out, "n 1 (h w) c -> n c h w", h=frames.shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        return x + _each_frame(self.attend, x)


class Downsample(nn.Module):
    """Halve height and width; in time, the first frame stays alone and every further pair becomes one."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: dict | None) -> Tensor:
        x = _each_frame(self.resample, x)
        if self.time_conv is None:
            return x
        before = past.get(self) if past else None
        if past is not None:
            past[self] = x[:, :, -1:].clone()
        if before is not None:
            return self.time_conv(torch.cat([before, x], dim=2))
        # A window of 3 with stride 2 that starts at frame 0 ends at frames 2, 4, ...: only frame 0 is left over.
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Double height and width and halve the channels; in time, every frame but the very first becomes two."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim // 2, 3, padding=1))  # nearest
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: dict | None) -> Tensor:
        if self.time_conv is not None:
            first = not past or self not in past
            if past is not None:
                past[self] = True
            alone, x = (x[:, :, :1], x[:, :, 1:]) if first else (x[:, :, :0], x)
            if x.shape[2]:
                x = rearrange(self.time_conv(x, past), "b (two c) t h w -> b c (t two) h w", two=2)
            x = torch.cat([alone, x], dim=2)
        return _each_frame(self.resample, x)


class WanVAE(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config, c, z = config, 3 * config.patch_size**2, config.z_dim
        dims = [config.dim * multiple for multiple in (1, *config.dim_mult)]
        self.encoder = Causal(OrderedDict(
            conv1=CausalConv3d(c, dims[0]),
            downsamples=_levels(dims, config.num_res_blocks, Downsample, config.temporal_downsample),
            middle=_middle(dims[-1]),
            head=_head(dims[-1], 2 * z),
        ))  # fmt: skip
        self.conv1, self.conv2 = CausalConv3d(2 * z, 2 * z, (1, 1, 1)), CausalConv3d(z, z, (1, 1, 1))
        dims = [dims[-1], *dims[:0:-1]]
        self.decoder = Causal(OrderedDict(
            conv1=CausalConv3d(z, dims[0]),
            middle=_middle(dims[0]),
            upsamples=_levels(dims, config.num_res_blocks + 1, Upsample, config.temporal_downsample[::-1]),
            head=_head(dims[-1], c),
        ))  # fmt: skip

    def encode(self, video: Tensor, chunk: int | None = None, tile: int | None = None) -> Tensor:
        """A video (B, 3, N, 8H, 8W) in [-1, 1], N = 4(F-1) + 1 → the posterior's mean, normalised, (B, 16, F, H, W).

        chunk: latent frames at a time; None is the whole sequence at once. tile: greatest width and height of a part in
        pixels, 32 or more; None is the whole frame. If neither is given, `pieces` decides.
        """
        N, height, width = video.shape[2:]
        if N % 4 != 1:
            raise ValueError(f"a video of {N} frames cannot be encoded: expected 4k+1 frames, such as {N // 4 * 4 + 1}")
        if height % 8 or width % 8:
            raise ValueError(f"a video of {width}x{height} pixels cannot be encoded: both must be multiples of 8")
        if chunk is None and tile is None:
            chunk, tile = self.pieces(len(video), (N + 3) // 4, height, width)
        size = 4 * chunk if chunk else 3 + N
        mean, std = self._statistics()

        def run(part: Tensor) -> Tensor:
            part, past = part.to(mean.dtype), {} if chunk else None
            # The first chunk is short of three frames: its first latent stands for one frame.
            chunks = [part[:, :, max(0, start) : start + size] for start in range(-3, N, size)]
            return (torch.cat([self.moments(pixels, past)[0] for pixels in chunks], dim=2) - mean) / std

        return _tiled(run, video, tile, 8, 1)

    def decode(self, latents: Tensor, chunk: int | None = None, tile: int | None = None) -> Tensor:
        """Normalised latents (B, 16, F, H, W) → a video (B, 3, N, 8H, 8W) in [-1, 1]; the rest as in `encode`."""
        B, _, frames, H, W = latents.shape
        if chunk is None and tile is None:
            chunk, tile = self.pieces(B, frames, 8 * H, 8 * W)
        mean, std = self._statistics()

        def run(part: Tensor) -> Tensor:
            chunks, past = (part.to(mean.dtype) * std + mean).split(chunk or frames, dim=2), {} if chunk else None
            return torch.cat([self.pixels(z, past) for z in chunks], dim=2).clamp(-1, 1)

        return _tiled(run, latents, tile, 1, 8)

    def pieces(self, B: int, F: int, height: int, width: int) -> tuple[int | None, int | None]:
        """`chunk` and `tile` for (B, 3, 4(F-1)+1, height, width) pixels: None while `MEMORY` suffices for the whole.

        By the size alone, not by the memory that is free, so that a run gives the same bits wherever it is repeated.
        """
        if self._bytes(B, F, height, width) <= MEMORY:
            return None, None
        return 1, None if self._bytes(B, 2, height, width) <= MEMORY else TILE

    def decoding_bytes(self, F: int, height: int, width: int) -> int:
        """About what decoding a video of F latent frames takes beside weights and video; encoding takes less."""
        chunk, tile = self.pieces(1, F, height, width)
        height, width = (min(side, tile or side) for side in (height, width))
        return self._bytes(1, 2 if chunk else F, height, width)  # a chunk, and what is remembered of the one before

    def _bytes(self, B: int, F: int, height: int, width: int) -> int:
        """Twelve tensors of the widest level, where each pixel, or folded patch, has `dim` channels: as measured."""
        pixels = B * (4 * F - 3) * height * width // self.config.patch_size**2
        return 12 * self.config.dim * pixels * self.conv1.weight.dtype.itemsize

    def moments(self, video: Tensor, past: dict | None = None) -> tuple[Tensor, Tensor]:
        """A video (B, 3, N, 8H, 8W) → its posterior's mean and log-variance (B, 16, F, H, W), before normalisation."""
        p = self.config.patch_size
        folded = rearrange(video, "b c t (h p) (w q) -> b (c q p) t h w", p=p, q=p)
        return self.conv1(self.encoder(folded, past)).chunk(2, dim=1)

    def pixels(self, z: Tensor, past: dict | None = None) -> Tensor:
        """Latents (B, 16, F, H, W) before normalisation → (B, 3, N, 8H, 8W) without the clamp, as training needs it."""
        p = self.config.patch_size
        return rearrange(self.decoder(self.conv2(z), past), "b (c q p) t h w -> b c t (h p) (w q)", p=p, q=p)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' channels, each (C, 1, 1, 1), like the weights."""
        statistics = torch.tensor([self.config.latents_mean, self.config.latents_std]).to(self.conv1.weight)
        return tuple(rearrange(statistics, "two c -> two c 1 1 1"))


def _tiled(run: Callable[[Tensor], Tensor], x: Tensor, tile: int | None, scale_in: int, scale_out: int) -> Tensor:
    """run(x) put together from parts of the frame, each at most `tile` pixels wide and high; None is the whole frame.

    A latent is `scale_in` elements of x wide, and `scale_out` of run(x). Neighbours overlap by a quarter of a tile, and
    over that width one fades into the other linearly.
    """
    if tile is None:
        return run(x)
    if tile < 32:
        raise ValueError(f"got tiles of {tile} pixels, expected at least 32: a quarter of a tile is blended")
    rows, columns = (_spans(length // scale_in, tile // 8) for length in x.shape[-2:])
    if len(rows) == len(columns) == 1:
        return run(x)
    height, width = rows[-1][1] * scale_out, columns[-1][1] * scale_out
    total, weight = None, torch.zeros(height, width, device=x.device)
    for (top, bottom), (left, right) in product(rows, columns):
        part = run(x[..., top * scale_in : bottom * scale_in, left * scale_in : right * scale_in])
        if total is None:
            total = torch.zeros(*part.shape[:-2], height, width, device=x.device)
        down, across = (_fade(length, tile // 32 * scale_out).to(x.device) for length in part.shape[-2:])
        fade = down[:, None] * across
        place = (..., slice(top * scale_out, bottom * scale_out), slice(left * scale_out, right * scale_out))
        total[place] += part * fade
        weight[place] += fade
    return total.div_(weight).to(part.dtype)


def _spans(length: int, tile: int) -> list[tuple[int, int]]:
    """(first, last + 1) of the fewest tiles that cover `length` latents, of one size and evenly spaced."""
    overlap = tile // 4
    count = max(1, -(-(length - overlap) // (tile - overlap)))
    size = -(-(length + (count - 1) * overlap) // count)
    starts = [i * (length - size) // max(1, count - 1) for i in range(count)]
    return [(start, start + size) for start in starts]


def _fade(length: int, fade: int) -> Tensor:
    """The weight of each row of a tile: 1 inside, falling linearly over the outer `fade` of both ends."""
    inwards = torch.arange(length) + 0.5
    return (torch.minimum(inwards, length - inwards) / fade).clamp(max=1)


def _levels(dims: list[int], count: int, step: type[nn.Module], temporal: tuple[bool, ...]) -> Causal:
    """`count` residual blocks of each level's width, and a step to the next level's size in between."""
    layers = []
    for level, (dim_in, dim_out) in enumerate(pairwise(dims)):
        if level and step is Upsample:
            dim_in //= 2
        layers += [ResidualBlock(dim_out if i else dim_in, dim_out) for i in range(count)]
        if level < len(dims) - 2:
            layers.append(step(dim_out, temporal[level]))
    return Causal(*layers)


def _middle(dim: int) -> Causal:
    return Causal(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def _head(dim_in: int, dim_out: int) -> Causal:
    return Causal(RMSNorm(dim_in, 3), nn.SiLU(), CausalConv3d(dim_in, dim_out))


def _each_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    frames = layer(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])
