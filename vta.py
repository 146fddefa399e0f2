"""Vectorized timestep adaptation: the one change that Pusa makes to the network, and it adds no parameter.

A text-to-video transformer embeds one timestep t for a whole video and modulates every token of it alike. Here τ has
one level for each latent frame: the same embedding is computed F times, and the shift, scale and gate that come of it
are applied frame by frame. They stay `(B, F, 1, D)` and are broadcast over the S tokens of `(B, F, S, D)`; copied to
tokens, a block's six would take 4 GB at 14B, 480p, 81 frames. With τ equal on all frames this is the base model, to
the bit. Timesteps and modulation are fp32 whatever the network computes in: bf16 would tell apart only 294 of the 1000
timesteps of a schedule with shift 5. From "PUSA V1.0", arXiv 2507.16116, section 4.2; first in FVDM, arXiv 2410.03160.
"""

import torch
from torch import Tensor


def frame_levels(tau: Tensor, B: int, F: int) -> Tensor:
    """τ of every frame, (B, F) in fp32, from τ (B, F) or one level a sample (B,). ValueError for another shape."""
    if tau.shape not in ((B,), (B, F)):
        raise ValueError(f"got tau of shape {tuple(tau.shape)}, expected ({B},) or ({B}, {F}): one a sample or a frame")
    tau = tau.float()
    return tau[:, None].expand(B, F) if tau.dim() == 1 else tau


def timestep_embedding(tau: Tensor, dim: int) -> Tensor:
    """Sinusoids of the timestep 1000 τ: τ (B, F) → (B, F, dim), cosines first, fp32.

    Timesteps are not rounded. Angles are in double precision, as published, except on Apple's GPUs, which lack it.
    """
    half = dim // 2
    precise = torch.float32 if tau.device.type == "mps" else torch.float64
    frequency = 10000.0 ** (-torch.arange(half, dtype=precise, device=tau.device) / half)
    angle = 1000.0 * tau.to(precise)[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def split(modulation: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
    """Add a layer's own modulation (1, n, D) to each frame's embedding (B, F, n, D) → n tensors (B, F, 1, D), fp32."""
    return (modulation.float()[:, None] + embedding).split(1, dim=2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift the tokens of each frame: x (B, F, S, D), shift and scale (B, F, 1, D) → (B, F, S, D), fp32."""
    return torch.addcmul(shift, x, 1 + scale)
