"""Wan: the text-to-video diffusion transformer of Wan2.1, with a noise level for every latent frame.

Latents are cut into patches. Each block has self-attention over all tokens of the video, cross-attention to the prompt,
and a feed-forward layer. Self-attention, feed-forward and the head are modulated by the τ of each frame (`vta.py`).
The network predicts the velocity from data to noise, `x1 - x0`. Parameter names are those of the published checkpoints.

    velocity = Wan(config)(x, tau, context)
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vta

PromptKeys = list[tuple[Tensor, Tensor]]  # for each block, the keys and values of the prompt, (B, heads, T, D/heads)


@dataclass(frozen=True)
class WanConfig:
    """Sizes of a Wan transformer under the names of its `config.json`; the defaults are those of Wan2.1-T2V-1.3B."""

    dim: int = 1536
    ffn_dim: int = 8960
    freq_dim: int = 256
    in_dim: int = 16
    out_dim: int = 16
    num_heads: int = 12
    num_layers: int = 30
    text_len: int = 512  # tokens that a prompt is padded to; part of the model, which attends to the padding too
    text_dim: int = 4096
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    model_type: str = "t2v"


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over all heads together, in fp32 whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm that takes any dtype and gives fp32, for the modulation that follows it."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class SelfAttention(nn.Module):
    """Attention of every token of the video to every other, with 3D rotary positions."""

    def __init__(self, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)

    def heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b l (h d) -> b h l d", h=self.num_heads)  # (B, L, D) → (B, heads, L, D/heads)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.o(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))  # (B, L, D)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:  # (B, L, D) → (B, L, D)
        q = rotate(self.heads(self.norm_q(self.q(x))), rope)
        k = rotate(self.heads(self.norm_k(self.k(x))), rope)
        return self.attend(q, k, self.heads(self.v(x)))


class CrossAttention(SelfAttention):
    """Attention of every token of the video to the prompt; the same layers, no positions."""

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a prompt (B, T, D), computed once a prompt: they depend on neither video nor noise."""
        return self.heads(self.norm_k(self.k(context))), self.heads(self.v(context))

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:  # (B, L, D) → (B, L, D)
        return self.attend(self.heads(self.norm_q(self.q(x))), *keys)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward; the first and the last know the noise levels."""

    def __init__(self, config: WanConfig):
        super().__init__()
        dim, ffn_dim, eps = config.dim, config.ffn_dim, config.eps
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, config.num_heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, config.num_heads, eps)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, embedding: Tensor, rope: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, F, S, D), embedding (B, F, 6, D) → (B, F, S, D)."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vta.split(self.modulation, embedding)  # each (B, F, 1, D)
        shape, dtype = x.shape, keys[0].dtype

        y = vta.modulate(self.norm1(x), shift_1, scale_1).to(dtype)
        y = self.self_attn(y.flatten(1, 2), rope).view(shape)  # over all frames' tokens, (B, F·S, D)
        x = (x + gate_1 * y).to(dtype)

        x = x + self.cross_attn(self.norm3(x).to(dtype).flatten(1, 2), keys).view(shape)

        y = self.ffn(vta.modulate(self.norm2(x), shift_2, scale_2).to(dtype))
        return (x + gate_2 * y).to(dtype)


class Head(nn.Module):
    """The output layer, which knows the noise levels too: tokens become patches of velocity."""

    def __init__(self, config: WanConfig):
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.patch_size[1] * config.patch_size[2] * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, F, S, D), embedding (B, F, 1, D) → patches (B, F, S, p·q·C)."""
        shift, scale = vta.split(self.modulation, embedding)
        return self.head(vta.modulate(self.norm(x), shift, scale).to(x.dtype))


class Wan(nn.Module):
    config_class = WanConfig

    def __init__(self, config: WanConfig):
        super().__init__()
        if config.dim % config.num_heads or (config.dim // config.num_heads) % 2:
            raise ValueError(f"got dim {config.dim} and {config.num_heads} heads, expected an even share for each head")
        if config.patch_size[0] != 1:
            raise ValueError(f"got patch_size {config.patch_size}, expected 1 in time: a noise level a latent frame")
        self.config = config
        dim, text_dim, freq_dim = config.dim, config.text_dim, config.freq_dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.rope = lru_cache(maxsize=8)(rope_tables)  # one cache a model, one pair of tables a grid

    def init_weights(self) -> "Wan":
        """What training from scratch starts from: the output layer at zero, so the first guess is zero velocity."""
        for layer in (*(module for module in self.modules() if isinstance(module, nn.Linear)), self.patch_embedding):
            nn.init.xavier_uniform_(layer.weight.flatten(1))
            nn.init.zeros_(layer.bias)
        for linear in (self.text_embedding[0], self.text_embedding[2], self.time_embedding[0], self.time_embedding[2]):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        return self

    def prompt_keys(self, context: Tensor) -> PromptKeys:
        """Every block's keys and values of a prompt (B, T, text_dim), which `forward` takes in place of `context`."""
        if context.dim() != 3 or context.shape[-1] != self.config.text_dim:
            raise ValueError(f"got a context of {tuple(context.shape)}, expected (B, T, {self.config.text_dim})")
        embedded = self.text_embedding(context.to(self.patch_embedding.weight.dtype))
        return [block.cross_attn.keys(embedded) for block in self.blocks]

    def compile_blocks(self) -> None:
        """Compile the blocks: once for all, as they are alike; before gradient checkpointing, FSDP and offloading."""
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)

    def recompute_blocks(self) -> None:
        """Gradient checkpointing: store only each block's input, and compute the block again in the backward pass."""
        for block in self.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)

    def forward(self, x: Tensor, tau: Tensor, context: Tensor | PromptKeys) -> Tensor:
        """The velocity (B, C, F, H, W) of noisy latents x of the same shape; H and W are multiples of the patch.

        tau: the noise levels in [0, 1], (B, F), or (B,) for one level a video.
        context: the prompt's embeddings (B, T, text_dim), or `prompt_keys` of them.
        """
        B, C, frames, H, W = x.shape
        in_dim, (_, p, q) = self.config.in_dim, self.config.patch_size
        if C != in_dim or H % p or W % q:
            raise ValueError(f"got latents of {C} channels, {W}x{H}, expected {in_dim} channels, multiples of {q}x{p}")
        keys = self.prompt_keys(context) if isinstance(context, Tensor) else context

        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # time is fp32; meta has no autocast
            t = vta.timestep_embedding(vta.frame_levels(tau, B, frames), self.config.freq_dim)  # (B, F, freq_dim)
            t = _linear(self.time_embedding[2], F.silu(_linear(self.time_embedding[0], t)))  # (B, F, D)
            six = _linear(self.time_projection[1], F.silu(t)).unflatten(-1, (6, -1))  # (B, F, 6, D)

        h = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))  # (B, D, F, H/p, W/q)
        rope = self.rope(tuple(h.shape[2:]), self.config.dim // self.config.num_heads, x.device)
        h = rearrange(h, "b d f h w -> b f (h w) d")  # (B, F, S, D)
        for block, block_keys in zip(self.blocks, keys, strict=True):
            h = block(h, six, rope, block_keys)  # (B, F, S, D)
        h = self.head(h, t[:, :, None])  # (B, F, S, p·q·C)
        return rearrange(h, "b f (h w) (p q c) -> b c f (h p) (w q)", h=H // p, p=p, q=q).to(x.dtype)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in fp32, whatever its weights are stored in."""
    return F.linear(x, layer.weight.float(), layer.bias.float())


def rope_tables(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of each token in a grid (F, rows, columns): (F·S, head_dim/2), fp32.

    A third of the channel pairs (rounded down) turns with the row, a third with the column, the rest with the frame.
    """
    third = head_dim // 2 // 3
    pairs = (head_dim // 2 - 2 * third, third, third)
    with torch.inference_mode(False):  # a later training may use the same tables
        positions = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
        frequencies = [10000.0 ** (-torch.arange(n, dtype=torch.float64) / n) for n in pairs]
        angle = torch.cat([p.reshape(-1, 1) * f for p, f in zip(positions, frequencies, strict=True)], dim=-1)
        return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbouring channels of x (B, heads, L, D/heads) by its token's angles, in fp32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
