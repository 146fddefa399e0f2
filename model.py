"""Wan: the text-to-video diffusion transformer of Wan2.1, with a noise level for every latent frame.

Latents are cut into patches; each block lets all tokens of the video attend to each other, then to the prompt, and
then passes each through a feed-forward layer. `vta.py` tells each sub-layer the noise level of the frame it works on.
The network predicts the velocity from data to noise, `x1 - x0`. Parameter names are those of the published
checkpoints, and scalar and vector τ, training and sampling all take the one `forward` below. Blocks that do not fit
on the device together can visit it one after another: `offload`.

    velocity = Wan(config)(x, tau, context)
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    @classmethod
    def from_json(cls, path: Path | str) -> "WanConfig":
        """Read an original `config.json`; what it leaves out has the default."""
        known = {field.name for field in fields(cls)}
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in entries.items() if k in known})


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
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps=eps)
        self.norm_k = RMSNorm(dim, eps=eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, heads, L, D/heads)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        q = rotate(self.heads(self.norm_q(self.q(x))), rope)
        k = rotate(self.heads(self.norm_k(self.k(x))), rope)
        out = F.scaled_dot_product_attention(q, k, self.heads(self.v(x)))
        return self.o(out.transpose(1, 2).flatten(2))


class CrossAttention(SelfAttention):
    """Attention of every token of the video to the prompt; the same weights, no positions."""

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a prompt (B, T, D): they depend on neither video nor noise, so once a prompt is enough."""
        return self.heads(self.norm_k(self.k(context))), self.heads(self.v(context))

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor]) -> Tensor:
        out = F.scaled_dot_product_attention(self.heads(self.norm_q(self.q(x))), *keys)
        return self.o(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, config.num_heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, config.num_heads, eps)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(self, x: Tensor, embedding: Tensor, rope: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, F, S, D), embedding (B, F, 6, D) → (B, F, S, D)."""
        six = vta.split(self.modulation, embedding)
        attend, feed = vta.Modulation(*six[:3]), vta.Modulation(*six[3:])
        shape, dtype = x.shape, keys[0].dtype

        y = vta.modulate(self.norm1(x), attend.shift, attend.scale)
        y = self.self_attn(y.to(dtype).flatten(1, 2), rope).view(shape)  # all frames' tokens in one row: (B, F*S, D)
        x = (x + attend.gate * y).to(dtype)

        x = x + self.cross_attn(self.norm3(x).to(dtype).flatten(1, 2), keys).view(shape)

        y = self.ffn(vta.modulate(self.norm2(x), feed.shift, feed.scale).to(dtype))
        return (x + feed.gate * y).to(dtype)


class Head(nn.Module):
    def __init__(self, config: WanConfig):
        super().__init__()
        pixels = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, pixels * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, F, S, D), embedding (B, F, 1, D) → patches (B, F, S, p·q·r·C)."""
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
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.visited: torch.device | None = None  # where blocks go for their turn, after `offload`
        self.courier: torch.cuda.Stream | None = None  # copies them while others compute

    def init_weights(self) -> "Wan":
        """What training from scratch starts from: the output layer at zero, so the first guess is zero velocity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.patch_embedding.bias)
        for linear in (self.text_embedding[0], self.text_embedding[2], self.time_embedding[0], self.time_embedding[2]):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)
        return self

    def prompt_keys(self, context: Tensor) -> PromptKeys:
        """Every block's keys and values of a prompt, (B, T, text_dim); `forward` takes them in place of `context`."""
        if context.dim() != 3 or context.shape[-1] != self.config.text_dim:
            raise ValueError(f"got a context of {tuple(context.shape)}, expected (B, T, {self.config.text_dim})")
        embedded = self.text_embedding(context.to(self.patch_embedding.weight.dtype))
        return [block.cross_attn.keys(embedded) for block in self._in_turn()]

    def offload(self, device: torch.device | str) -> "Wan":
        """Keep the blocks in the CPU's memory, and all that is around them on `device`; for sampling only.

        From now on each block is copied to the device for its turn, while the one before it computes: there are never
        more than two. Results are the same to the bit.
        """
        self.visited = torch.device(device)
        for child in self.children():
            child.to("cpu" if child is self.blocks else device)
        if self.visited.type == "cuda":
            self.courier = torch.cuda.Stream(device)
            for parameter in self.blocks.parameters():  # only pinned memory is copied while the device computes
                parameter.data = parameter.data.pin_memory()
        return self

    def compile_blocks(self) -> None:
        """Compile the blocks: they are alike, so one is compiled, much sooner than the whole would be.

        What keeps memory low, or has the blocks visit a device, goes around a compiled block, and comes after this.
        """
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)

    def _in_turn(self) -> Iterator[Block]:
        """The blocks, each of them on the device when it is its turn."""
        if self.visited is None:
            yield from self.blocks
            return
        arriving = self._fetch(self.blocks[0])
        for i, block in enumerate(self.blocks):
            if self.courier:
                torch.cuda.current_stream(self.visited).wait_stream(self.courier)
            here = arriving  # which lets go of the copy of the block before
            arriving = self._fetch(self.blocks[i + 1]) if i + 1 < len(self.blocks) else []
            at_home = [parameter.data for parameter in block.parameters()]
            _set(block, here)
            yield block
            _set(block, at_home)

    def _fetch(self, block: Block) -> list[Tensor]:
        """Copies of a block's parameters, on their way to the device."""
        if self.courier is None:
            return [parameter.data.to(self.visited, copy=True) for parameter in block.parameters()]
        # They may get the memory of the block before last, which must have been computed first. The block in between is
        # called after this, and computes while these are copied.
        self.courier.wait_stream(torch.cuda.current_stream(self.visited))
        with torch.cuda.stream(self.courier):
            return [parameter.data.to(self.visited, non_blocking=True) for parameter in block.parameters()]

    def forward(self, x: Tensor, tau: Tensor, context: Tensor | PromptKeys) -> Tensor:
        """The velocity of noisy latents.

        Args:
            x: (B, C, F, H, W), where H and W are multiples of the patch.
            tau: (B, F), or (B,) for one level a video, in [0, 1].
            context: the prompt's embeddings (B, T, text_dim), or `prompt_keys` of them.
        Returns: like x.
        """
        B, C, frames, H, W = x.shape
        _, ph, pw = self.config.patch_size
        if C != self.config.in_dim or H % ph or W % pw:
            raise ValueError(
                f"got latents of {C} channels, {W}x{H}, expected {self.config.in_dim} channels, multiples of {pw}x{ph}"
            )
        keys = self.prompt_keys(context) if isinstance(context, Tensor) else context

        with torch.autocast(x.device.type, enabled=False):  # time stays fp32, whatever the rest computes in
            t = vta.timestep_embedding(vta.frame_levels(tau, B, frames), self.config.freq_dim)  # (B, F, freq_dim)
            t = _linear(self.time_embedding[2], F.silu(_linear(self.time_embedding[0], t)))  # (B, F, D)
            six = _linear(self.time_projection[1], F.silu(t)).unflatten(-1, (6, -1))  # (B, F, 6, D)

        h = self.patch_embedding(x.to(self.patch_embedding.weight.dtype))  # (B, D, F, H/2, W/2)
        grid = h.shape[2:]
        h = h.flatten(3).permute(0, 2, 3, 1)  # (B, F, S, D)
        rope = rope_tables(tuple(grid), self.config.dim // self.config.num_heads, x.device)
        for block, block_keys in zip(self._in_turn(), keys, strict=True):
            h = block(h, six, rope, block_keys)
        h = self.head(h, t[:, :, None])  # (B, F, S, ph*pw*C)

        h = h.unflatten(2, tuple(grid[1:])).unflatten(-1, (ph, pw, -1))  # (B, F, H/2, W/2, ph, pw, C)
        return h.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, -1, frames, H, W).to(x.dtype)


def _set(block: Block, values: Iterable[Tensor]) -> None:
    for parameter, value in zip(block.parameters(), values, strict=True):
        parameter.data = value


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in fp32, whatever its weights are stored in."""
    return F.linear(x, layer.weight.float(), layer.bias.float())


@lru_cache(maxsize=8)
def rope_tables(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's rotary angles, each (F·S, head_dim/2), fp32.

    Of the head_dim/2 pairs, a third each (rounded down) turns with the row and the column, the rest with the frame.
    """
    third = head_dim // 2 // 3
    angles = []
    with torch.inference_mode(False):  # the tables are kept, and a later training may use them
        for axis, pairs in enumerate((head_dim // 2 - 2 * third, third, third)):
            frequency = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
            position = torch.arange(grid[axis], dtype=torch.float64)
            shape = [1, 1, 1, pairs]
            shape[axis] = grid[axis]
            angles.append((position[:, None] * frequency).view(shape).expand(*grid, pairs))
        angle = torch.cat(angles, dim=-1).flatten(0, 2)
        return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair of neighbouring channels of x (B, heads, L, D/heads) by its token's angles, in fp32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
