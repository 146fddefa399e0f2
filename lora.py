"""LoRA: a trained change of the transformer's linear layers that has low rank, so it is small to train and to share.

    W' = W + strength · (alpha / rank) · B·A          A (rank, in), B (out, rank); alpha absent: alpha = rank

B starts at zero, so training starts from the base model itself. Ten layers of every block carry a pair (A, B).
`python train.py --data clips/` trains one. A LoRA in memory is a plain dict, `{module name: (A, B, alpha or None)}`.
"""

import math
import pickle
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cli import replacing

LoRA = dict[str, tuple[Tensor, Tensor, float | None]]

TARGETS = (
    *(f"{attention}.{layer}" for attention in ("self_attn", "cross_attn") for layer in "qkvo"),
    *("ffn.0", "ffn.2"),
)


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trainable pair: x (…, in) → (…, out).

    It takes over the parameters of the layer that it replaces under the same names, so base checkpoints still load
    (with `strict=False`, as `lora_A` and `lora_B` are not in them). The pair is fp32 whatever the base is: steps as
    small as 1e-5 vanish in bf16.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        # On "meta" nothing is allocated: both parameters are replaced by the given layer's on the next line.
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.alpha, self.strength = alpha, 1.0
        like = {"device": linear.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # U(±1/√in), as in PEFT

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A.to(x.dtype))  # (…, rank)
        change = F.linear(low, self.lora_B.to(low.dtype))  # (…, out)
        return super().forward(x) + self.strength * self.alpha / len(self.lora_A) * change


def inject(
    model: nn.Module, rank: int, alpha: float | None = None, targets: tuple[str, ...] = TARGETS
) -> list[nn.Parameter]:
    """Freeze `model`, give every target layer of its blocks a new pair, and return those: all that is trainable.

    `alpha` is `rank` unless given, as in the published training, so the pair acts at full strength.
    Raises ValueError for a rank or alpha that is not positive, for targets that are not linear layers of the blocks,
    and for a model that already has pairs.
    """
    alpha = float(rank if alpha is None else alpha)
    if rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"got LoRA rank {rank} and alpha {alpha:g}, expected both to be positive; 512 is Pusa's rank")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model already carries a LoRA in training; inject into a model that is freshly loaded")
    layers = {}
    for name, linear in _linears(model).items():
        match = re.fullmatch(r"blocks\.\d+\.(.+)", name)
        if match and match[1] in targets:
            layers[name] = linear
    missing = [target for target in targets if not any(name.endswith("." + target) for name in layers)]
    if missing or not layers:
        raise ValueError(f"no linear layers {', '.join(missing)} in the blocks of the model; take them from {TARGETS}")

    model.requires_grad_(False)
    for name, linear in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(linear, rank, alpha))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def extract(model: nn.Module) -> LoRA:
    """Copy the pairs of an injected model to the CPU, ready for `save` or `merge`."""
    return {
        name: (module.lora_A.detach().to("cpu", copy=True), module.lora_B.detach().to("cpu", copy=True), module.alpha)
        for name, module in model.named_modules()
        if isinstance(module, LoRALinear)
    }


@torch.no_grad()
def merge(model: nn.Module, lora: LoRA, strength: float = 1.0, keep: bool = False) -> dict[str, Tensor] | None:
    """Add `strength · (alpha/rank if alpha is given else 1) · B·A` to the weights, in place, summed in fp32.

    The rank is `len(A)`, layer by layer. With `keep`, returns the weights as they were, {parameter name: tensor}, for
    `unmerge`: subtracting B·A again would leave a rounding error each time. They take as much memory as the layers.
    Raises ValueError, before anything is changed, if a pair finds no linear layer or does not fit it.
    """
    linears = _linears(model)
    unmatched = [name for name in lora if name not in linears]
    if unmatched or not lora:
        first = f"; first unmatched {unmatched[0]}" if unmatched else ""
        raise ValueError(
            f"LoRA matched {len(lora) - len(unmatched)} of {len(lora)} pairs{first}; "
            "nothing was merged: use a LoRA made for this model"
        )
    if not math.isfinite(strength):
        raise ValueError(f"got LoRA strength {strength}, expected a finite number such as 1.4")
    for name, (A, B, _) in lora.items():
        out_features, in_features = linears[name].weight.shape
        if A.ndim != 2 or B.shape != (out_features, len(A)) or A.shape[1] != in_features:
            raise ValueError(
                f"LoRA pair {name} has A {tuple(A.shape)} and B {tuple(B.shape)}, expected (rank, {in_features}) and "
                f"({out_features}, rank); nothing was merged: use a LoRA made for a model of this size"
            )

    originals = {}
    for name, (A, B, alpha) in lora.items():
        weight = linears[name].weight
        if keep:
            originals[f"{name}.weight"] = weight.detach().clone()
        scale = strength * (1.0 if alpha is None else alpha / len(A))
        A, B = A.to(weight.device, torch.float32), B.to(weight.device, torch.float32)
        weight.copy_(torch.addmm(weight.float(), B, A, alpha=scale))
    return originals if keep else None


@torch.no_grad()
def unmerge(model: nn.Module, originals: dict[str, Tensor]) -> None:
    """Put back, to the bit, the weights that `merge(…, keep=True)` returned; of several merges, the last one first."""
    parameters = dict(model.named_parameters())
    unmatched = [name for name in originals if name not in parameters]
    if unmatched:
        raise ValueError(f"the model has no {unmatched[0]} to put back; unmerge the model that was merged into")
    for name, original in originals.items():
        parameters[name].copy_(original)


def load(path: Path | str) -> LoRA:
    """Read a LoRA of any of the layouts in use for Wan from `.safetensors`, or from `.pt`/`.pth`/`.bin` without code.

    Known: `lora_A`/`lora_B` with or without an adapter's name (Pusa: `.default`), `lora_down`/`lora_up`, a number
    `.alpha` for each layer, a prefix of ComfyUI, diffusers or PEFT, and diffusers' names of the layers.
    Raises ValueError for a file that cannot be read, for any key that is not understood and for incomplete pairs:
    a LoRA that is applied in part looks like one that was trained badly.
    """
    tensors = _read(Path(path))
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or (match["part"] is None and tensor.numel() != 1):
            unknown.append(key)
            continue
        part = _PARTS[match["part"]]
        pair = parts.setdefault(_canonical(match["name"]), {})
        if part in pair:
            raise ValueError(f"{path} has more than one {part} for a layer, such as {key}; expected one LoRA in a file")
        pair[part] = tensor
    if unknown or not tensors:
        first = f"; first unknown {unknown[0]}" if unknown else ""
        raise ValueError(
            f"{path}: understood {len(tensors) - len(unknown)} of {len(tensors)} keys{first}; "
            "expected nothing but pairs lora_A/lora_B or lora_down/lora_up, and alphas"
        )
    incomplete = [name for name, pair in parts.items() if not {"A", "B"} <= pair.keys()]
    if incomplete:
        raise ValueError(
            f"{path}: {len(incomplete)} of {len(parts)} layers lack A or B; first incomplete {incomplete[0]}; "
            "fetch the file again, or ask where it came from"
        )
    return {
        name: (pair["A"], pair["B"], pair["alpha"].item() if "alpha" in pair else None) for name, pair in parts.items()
    }


def save(path: Path | str, lora: LoRA, base: str = "", metadata: dict[str, str] | None = None) -> None:
    """Write a LoRA as safetensors with the names that ComfyUI, diffusers and `load` all read.

    An alpha is written only where it differs from the rank: those three scale by alpha/rank where there is one and
    by 1 where there is none. The file's metadata repeats rank, alpha and `base` for people; nothing depends on it.
    """
    if not lora:
        raise ValueError(f"no LoRA pairs to write to {path}; expected the result of extract or load")
    tensors = {}
    for name, (A, B, alpha) in lora.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = A.detach().contiguous()
        tensors[f"diffusion_model.{name}.lora_B.weight"] = B.detach().contiguous()
        if alpha is not None and alpha != len(A):
            tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(alpha))
    ranks = sorted({len(A) for A, _, _ in lora.values()})
    alphas = sorted({float(len(A) if alpha is None else alpha) for A, _, alpha in lora.values()})
    facts = {"rank": ",".join(map(str, ranks)), "alpha": ",".join(f"{alpha:g}" for alpha in alphas), "base": base}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {**(metadata or {}), "format": "pt", **facts})


_KEY = re.compile(
    r"(?:(?:base_model\.model|diffusion_model|transformer)\.)*(?P<name>.+?)\."
    r"(?:(?P<part>lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.weight|alpha)"
)
_PARTS = {"lora_A": "A", "lora_down": "A", "lora_B": "B", "lora_up": "B", None: "alpha"}
_DIFFUSERS_NAMES = {
    **{"attn1": "self_attn", "attn2": "cross_attn", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"},
    **{"ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"},
}


def _canonical(name: str) -> str:
    """The name of a layer in the original Wan2.1 checkpoints."""
    for theirs, ours in _DIFFUSERS_NAMES.items():
        name = re.sub(rf"(?<=\.){re.escape(theirs)}(?=\.|$)", ours, name)
    return name


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"no LoRA file at {path}; give the path of a .safetensors or .pt file")
    if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"got the LoRA file {path}, expected its name to end in .safetensors, .pt, .pth or .bin")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or holds more than plain tensors, which could run code on loading, so it was not "
            "loaded; get the LoRA as .safetensors"
        ) from error
    except Exception as error:  # over damaged bytes the unpickler stumbles in every way there is
        raise ValueError(f"{path} cannot be read ({error}); it may be incomplete: fetch it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} is not a flat dict of tensors; get the LoRA as .safetensors")
    return tensors
