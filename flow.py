"""Flow matching where every frame has a noise level of its own: paths, PTSS, the FAFM loss, and per-frame Euler.

    X_τ  = (1 - τ) ⊙ x0 + τ ⊙ x1                      each frame on its own path
    U    = x1 - x0                                     one constant velocity for all τ
    FAFM : E ‖ v_θ(X_τ, τ) - U ‖²_F                    τ drawn by PTSS
    PTSS : with probability p_async τ_i ~ U(0,1) independently, else one t ~ U(0,1) for all frames
    Euler: z_i ← z_i + (τ_{k+1,i} - τ_{k,i}) · v_θ(z, τ_k)_i

`python train.py` minimises the loss, `python sample.py` takes the steps, `python tasks.py` shows the τ they walk.
From "PUSA V1.0", arXiv 2507.16116. No model is needed here: a velocity is any function of (z, τ).
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (z (B,C,F,H,W), tau (B,F)) → v, shaped like z
OnStep = Callable[[int, Tensor], None] | None  # (k, z) after step k = 0..K-1


def interpolate(x0: Tensor, x1: Tensor, tau: Tensor) -> Tensor:
    """The point X_τ of each frame's path: x0, x1 (B,C,F,H,W); tau (B,F) or (1,F) in [0,1], fp32 → (B,C,F,H,W), fp32."""
    tau = _per_frame(tau, x0)
    return (1 - tau) * x0 + tau * x1


def shifted(u: Tensor | float, shift: float) -> Tensor | float:
    """σ(u) = s·u / (1 + (s-1)·u): a noise level u in [0,1] moved towards 1 by the shift s > 0; s = 1 moves nothing."""
    if not 0 < shift < math.inf:
        raise ValueError(f"got shift {shift}, expected a number above 0, such as Pusa's 5")
    return shift * u / (1 + (shift - 1) * u)


def sample_tau(
    B: int, F: int, p_async: float = 1.0, shift: float = 1.0, generator: Generator | None = None, two: bool = False
) -> Tensor:
    """PTSS, the paper's probabilistic timestep sampling: → tau (B,F) in [0,1), fp32, on the generator's device.

    Each sample of the batch decides alone: with probability p_async each of its frames draws a level, else all share
    one. p_async = 1 is how Pusa is trained, 0 is ordinary text-to-video training. Draws are then `shifted`. With `two`,
    which is not the paper's, each frame takes one of two levels instead, as in most tasks: conditions, and the rest.
    """
    if not 0 <= p_async <= 1:
        raise ValueError(f"got p_async {p_async}, expected a probability in [0, 1]")
    device = generator.device if generator else None
    independent, shared, coin = (torch.rand(B, n, generator=generator, device=device) for n in (F, 1, 1))
    if two:  # a share of the frames, drawn for each sample, is at the second level
        share, other = (torch.rand(B, 1, generator=generator, device=device) for _ in range(2))
        independent = torch.where(independent < share, other, shared)
    return shifted(torch.where(coin < p_async, independent, shared), shift)


def fafm_loss(velocity: Tensor, x0: Tensor, x1: Tensor, tau: Tensor, weighting: str = "none") -> Tensor:
    """Frame-aware flow matching: the mean squared error of a velocity against U = x1 - x0 → scalar, fp32.

    velocity (B,C,F,H,W), as predicted at `interpolate(x0, x1, tau)`; x0, x1 (B,C,F,H,W); tau (B,F).
    weighting: "none" is the paper's loss; "bell" weights each frame by `bell` of its τ.
    """
    if weighting not in ("none", "bell"):
        raise ValueError(f"got weighting {weighting!r}, expected 'none' or 'bell'")
    error = (velocity.float() - (x1.float() - x0.float())).square()
    return (error if weighting == "none" else _per_frame(bell(tau), error) * error).mean()


def bell(tau: Tensor) -> Tensor:
    """The weight of a noise level: 0 at both ends, highest at 1/2, and 1 on average over τ in [0,1]; shaped like tau.

    exp(-2 (τ - 1/2)²) minus its minimum, divided by its mean: the curve of DiffSynth's FlowMatchScheduler.
    """
    least = math.exp(-1 / 2)
    mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(1 / 2)) - least
    return (torch.exp(-2 * (tau.float() - 1 / 2) ** 2) - least) / mean


def sigma_schedule(K: int, shift: float) -> Tensor:
    """The scalar schedule σ_k of K steps, from 1 (noise) to 0 (data), `shifted` on u = linspace(1, 0, K+1) → (K+1,)."""
    if K < 1:
        raise ValueError(f"got {K} steps, expected at least 1: 10 are enough for most videos")
    return shifted(1 - torch.arange(K + 1, dtype=torch.float64) / K, shift).float()  # never rounded to timesteps


def denoise(velocity: Velocity, x0: Tensor, x1: Tensor, taus: Tensor, on_step: OnStep = None) -> Tensor:
    """Start on every frame's path at taus[0], between conditions x0 and noise x1 (B,C,F,H,W), and walk by `euler`.

    A free frame has τ = 1 and starts as pure x1; a condition with m > 0 is mixed with the x1 of the same frame.
    """
    return euler(velocity, interpolate(x0, x1, taus[:1].to(x1.device)), taus, on_step)


def euler(velocity: Velocity, z: Tensor, taus: Tensor, on_step: OnStep = None) -> Tensor:
    """Walk z (B,C,F,H,W), best in fp32, from the noise levels taus[0] to taus[-1], taus (K+1,F) → shaped like z."""
    if taus.dim() != 2 or taus.shape[1] != z.shape[2]:
        raise ValueError(f"got taus {tuple(taus.shape)} for {z.shape[2]} latent frames, expected (K+1, {z.shape[2]})")
    taus = taus.to(z.device)
    for k in range(len(taus) - 1):
        v = velocity(z, taus[k].expand(len(z), -1))
        delta = _per_frame(taus[k + 1 : k + 2] - taus[k : k + 1], z)
        # A frame whose level stands still (a clean condition, a frame that waits or is done) stays to the bit: adding
        # 0·v would turn -0.0 into 0.0 and let a NaN of the network through.
        z = torch.where(delta == 0, z, z + delta * v)
        if on_step is not None:
            on_step(k, z)
    return z


def _per_frame(tau: Tensor, x: Tensor) -> Tensor:
    """tau (B,F) or (1,F) → (B,1,F,1,1), to be broadcast over the frames of x (B,C,F,H,W)."""
    B, _, F, _, _ = x.shape
    if tau.dim() != 2 or tau.shape[0] not in (1, B) or tau.shape[1] != F:
        raise ValueError(f"got tau {tuple(tau.shape)} for x {tuple(x.shape)}, expected ({B}, {F}): one level a frame")
    return tau[:, None, :, None, None]
