"""LoRA: a trained change of the transformer's linear layers that has low rank, so it is small to train and to share.

    W' = W + strength · (alpha / rank) · B·A          A (rank, in), B (out, rank); alpha absent: alpha = rank

B starts at zero, so training starts from the base model itself. Ten layers of every block carry a pair (A, B).
`python train.py --data clips/` trains one, and `python lora.py inspect FILE` shows what is in any program's LoRA file.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.lora_files import LoRA, Pair, load, main, parse_entry, save, with_strengths  # noqa: F401  re-exported

TARGETS = (*(f"{name}_attn.{layer}" for name in ("self", "cross") for layer in "qkvo"), "ffn.0", "ffn.2")


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trainable pair: x (…, in) → (…, out).

    It has the parameters of the layer that it replaces, under the same names, so base checkpoints load with
    `strict=False`. The pair is fp32 whatever the base is: steps as small as 1e-5 vanish in bf16.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__(linear.in_features, linear.out_features, device="meta")  # allocates nothing
        self.weight, self.bias, self.alpha = linear.weight, linear.bias, alpha
        # Drawn on the CPU, so that a seed gives the same on any device: U(±1/√in), as in PEFT.
        A = torch.empty(rank, linear.in_features, device="meta" if linear.weight.is_meta else "cpu")
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)).to(linear.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        change = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))  # in → rank → out
        return super().forward(x) + self.alpha / len(self.lora_A) * change


def inject(model: nn.Module, rank: int, alpha: float | None = None, targets: tuple[str, ...] = TARGETS) -> list[Tensor]:
    """Freeze `model`, give every target layer of its blocks a new pair, and return all A and B, which are trainable.

    `alpha` is `rank` unless given, as in the published training, so the pair acts at full strength.
    Raises ValueError for a bad rank, alpha or target, and for a model that already has pairs.
    """
    alpha = float(rank if alpha is None else alpha)
    if rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"got LoRA rank {rank} and alpha {alpha:g}, expected both to be positive; 512 is Pusa's rank")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model already carries a LoRA in training; inject into a model that is freshly loaded")
    pattern = re.compile(rf"blocks\.\d+\.({'|'.join(map(re.escape, targets))})")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and pattern.fullmatch(name)}
    missing = [target for target in targets if not any(name.endswith("." + target) for name in layers)]
    if missing or not layers:
        raise ValueError(f"no linear layers {', '.join(missing)} in the blocks of the model; take them from {TARGETS}")
    model.requires_grad_(False)
    for name, linear in layers.items():
        model.set_submodule(name, LoRALinear(linear, rank, alpha))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def extract(model: nn.Module) -> LoRA:
    """Copy the pairs of an injected model to the CPU, ready for `save` or `merge`."""
    return LoRA({
        name: Pair(*(matrix.detach().to("cpu", copy=True) for matrix in (layer.lora_A, layer.lora_B)), layer.alpha)
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALinear)
    })


@torch.no_grad()
def merge(model: nn.Module, lora: LoRA, strength: float = 1.0) -> None:
    """Add strength · (alpha/rank) · B·A to each weight and strength · diff to each parameter, in place, summed in fp32.

    Raises ValueError, before anything is changed, for a pair or diff that finds no parameter or does not fit it.
    """
    if not math.isfinite(strength):
        raise ValueError(f"got LoRA strength {strength}, expected a finite number such as 1.4")
    lora.check(model)
    for layer, pair in lora.pairs.items():
        weight = model.get_parameter(f"{layer}.weight")
        A, B = (matrix.to(weight.device, torch.float32).flatten(1) for matrix in (pair.A, pair.B))
        weight.copy_(torch.addmm(weight.float().flatten(1), B, A, alpha=strength * pair.scale).view_as(weight))
    for name, diff in lora.diffs.items():
        parameter = model.get_parameter(name)
        parameter.copy_(parameter.float() + strength * diff.to(parameter.device, torch.float32))


if __name__ == "__main__":
    from model import Wan  # only the command knows a network: `inspect --model` compares a file with one

    main(Wan)
