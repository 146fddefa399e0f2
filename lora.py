"""LoRA: a trained change of the transformer's linear layers that has low rank, so it is small to train and to share.

    W' = W + strength · (alpha / rank) · B·A          A (rank, in), B (out, rank); alpha absent: alpha = rank

B starts at zero, so training starts from the base model itself. Ten layers of every block carry a pair (A, B).
`python train.py --data clips/` trains one. In memory a LoRA is a plain dict, `{layer: (A, B, alpha or None)}`; files of
others may also change whole parameters, such as biases and norms: `{parameter: what is added to it}`.

    python lora.py inspect lora.safetensors
    python lora.py convert lora.safetensors lora_for_diffusers.safetensors --to peft
"""

import heapq
import json
import math
import pickle
import re
import textwrap
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import Wan, WanConfig
from support import cli
from wan.names import TRANSFORMER_NAMES, rename

Pair = tuple[Tensor, Tensor, float | None]  # A, B, and alpha
LoRA = dict[str, Pair | Tensor]

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
        self.alpha = alpha
        device = linear.weight.device
        A = torch.empty(rank, linear.in_features, device="meta" if device.type == "meta" else "cpu")
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # U(±1/√in), as in PEFT; a seed gives the same on any device
        self.lora_A = nn.Parameter(A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A.to(x.dtype))  # (…, rank)
        change = F.linear(low, self.lora_B.to(low.dtype))  # (…, out)
        return super().forward(x) + self.alpha / len(self.lora_A) * change


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
    for name, module in model.named_modules():
        match = re.fullmatch(r"blocks\.\d+\.(.+)", name)
        if match and match[1] in targets and isinstance(module, nn.Linear):
            layers[name] = module
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

    The rank is `len(A)`, layer by layer. The change of a whole parameter is added times `strength`. With `keep`,
    returns the parameters as they were, {name: tensor}, for `unmerge`: subtracting a change again would leave a
    rounding error each time. They take as much memory as the layers.
    Raises ValueError, before anything is changed, if a pair or a change finds no parameter or does not fit it.
    """
    if not math.isfinite(strength):
        raise ValueError(f"got LoRA strength {strength}, expected a finite number such as 1.4")
    parameters, originals = _match(model, lora), {}
    for name, change in lora.items():
        parameter = parameters[name]
        if keep:
            originals.setdefault(_parameter_name(name, change), parameter.detach().clone())
        if isinstance(change, Tensor):
            total = parameter.float() + strength * change.to(parameter.device, torch.float32)
        else:
            A, B = (matrix.to(parameter.device, torch.float32).flatten(1) for matrix in change[:2])
            total = torch.addmm(parameter.float().flatten(1), B, A, alpha=strength * _scale(change))
        parameter.copy_(total.view_as(parameter))
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


def _scale(pair: Pair) -> float:
    A, _, alpha = pair
    return 1.0 if alpha is None else alpha / len(A)


def _parameter_name(name: str, change: Pair | Tensor) -> str:
    return name if isinstance(change, Tensor) else f"{name}.weight"


def _match(model: nn.Module, lora: LoRA) -> dict[str, nn.Parameter]:
    """The parameter that each entry of a LoRA changes; ValueError unless all are found and fit."""
    parameters = dict(model.named_parameters())
    matched = {}
    for name, change in lora.items():
        parameter = parameters.get(_parameter_name(name, change))
        if parameter is not None and (isinstance(change, Tensor) or parameter.ndim > 1):
            matched[name] = parameter
    unmatched = [name for name in lora if name not in matched]
    if unmatched or not lora:
        first = f"; first unmatched {unmatched[0]}" if unmatched else ""
        raise ValueError(
            f"LoRA matched {len(matched)} of {len(lora)} layers and parameters{first}; "
            "nothing was merged: use a LoRA made for this model"
        )
    for name, change in lora.items():
        shape = tuple(matched[name].shape)
        if isinstance(change, Tensor):
            got, expected, fits = f"change of {name} is {tuple(change.shape)}", f"{shape}", change.shape == shape
        else:
            A, B, _ = change
            rows, columns = shape[0], math.prod(shape[1:])  # of a convolution, the kernel counts among the inputs
            got = f"pair {name} has A {tuple(A.shape)} and B {tuple(B.shape)}"
            expected = f"(rank, {columns}) and ({rows}, rank)"
            fits = min(A.ndim, B.ndim) > 1
            fits = fits and A.flatten(1).shape[1] == columns and B.flatten(1).shape == (rows, len(A))
        if not fits:
            raise ValueError(
                f"LoRA {got}, expected {expected}; nothing was merged: use a LoRA made for a model of this size"
            )
    return matched


# Files. Programs differ in how they spell a layer's name and in what they call its tensors.

_PREFIX = r"(?:(?:base_model\.model|model|diffusion_model|transformer|pipe\.dit)\.)*(?:lora_unet_+)?"
_PARTS = {
    "lora_A.weight": "A", "lora_down.weight": "A", "lora_B.weight": "B", "lora_up.weight": "B", "alpha": "alpha",
    "lora_B.bias": "B's bias", "lora_up.bias": "B's bias",
    "diff": "whole", "diff_b": "bias", "diff_m": "whole",  # what is added to a weight, a bias, a modulation
}  # fmt: skip
_KEY = re.compile(rf"{_PREFIX}(?P<name>.+?)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_ADAPTER = re.compile(r"(?<=\.lora_[AB])\.\w+(?=\.(weight|bias)$)")  # as in `.lora_A.default.weight`

# Who writes a file: the first of these that is in one of its keys.
_WRITERS = {
    "lora_unet__": "Fun-LoRA (VideoX-Fun)",
    "lora_unet_": "musubi-tuner",
    ".attn1.": "diffusers or PEFT",
    ".default.": "the official Pusa trainer, or DiffSynth",
    ".lora_down.": "LightX2V, or extracted by ComfyUI",
    "diffusion_model.": "ComfyUI, diffusion-pipe or nanoPusa",
    "": "PEFT",
}
# What `save` can write: the keys of A and B.
LAYOUTS = {
    "comfy": "diffusion_model.{}.lora_{}.weight",
    "peft": "transformer.{}.lora_{}.weight",
    "original": "{}.lora_{}.default.weight",
}


def load(path: Path | str) -> LoRA:
    """Read a LoRA of any of the layouts in use for Wan from `.safetensors`, or from `.pt`/`.pth`/`.bin` without code.

    Known are the layers' names of Wan, diffusers and kohya (`lora_unet_`) with or without a prefix, `lora_A`/`lora_B`
    with or without an adapter's name (Pusa: `.default`), `lora_down`/`lora_up`, biases of B, `.alpha` or the alpha of
    PEFT's settings, and the changes of whole parameters `.diff`, `.diff_b` and `.diff_m`.
    Raises ValueError for a file that cannot be read, for any key that is not understood and for incomplete pairs:
    a LoRA that is applied in part looks like one that was trained badly.
    """
    return _understand(Path(path), _read(Path(path)))


def save(
    path: Path | str, lora: LoRA, base: str = "", metadata: dict[str, str] | None = None, to: str = "comfy"
) -> None:
    """Write a LoRA as safetensors; equal input gives equal bytes.

    The layout "comfy" is the one that ComfyUI, diffusers and `load` all read. It has an alpha only where that differs
    from the rank: those three scale by alpha/rank where there is one and by 1 where there is none. "peft" (diffusers'
    own) and "original" (the official Pusa's) have none, so B is scaled instead; the first holds changes of biases, the
    second none of whole parameters. The metadata repeats rank, alpha and `base` for people; nothing depends on it.
    """
    if not lora:
        raise ValueError(f"no LoRA pairs to write to {path}; expected the result of extract or load")
    if to != "comfy":
        lora = {name: change if isinstance(change, Tensor) else _without_alpha(change) for name, change in lora.items()}
    pairs = [change for change in lora.values() if not isinstance(change, Tensor)]
    alphas = {float(len(A) if alpha is None else alpha) for A, _, alpha in pairs}
    facts = {
        "format": "pt",
        "rank": ",".join(map(str, sorted({len(A) for A, _, _ in pairs}))),
        "alpha": ",".join(f"{alpha:g}" for alpha in sorted(alphas)),
        **({"base": base} if base else {}),
    }
    tensors = {key: tensor.detach().contiguous() for key, tensor in _spell(lora, to).items()}
    with cli.replacing(path) as temporary:
        save_file(tensors, temporary, {**(metadata or {}), **facts})
        with open(temporary, "r+b") as file:  # safetensors leaves the order of the metadata to chance
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def convert(source: Path | str, path: Path | str, to: str, overwrite: bool = False) -> None:
    """Write the LoRA of a file in another layout of `LAYOUTS`, with the metadata that it has."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"got {path} to write to, expected a name that ends in .safetensors")
    if Path(path).exists() and not overwrite:
        raise ValueError(f"{path} exists; give another name, or --overwrite")
    lora, metadata = load(source), _metadata(Path(source))
    metadata.pop(_DIFFUSERS_SETTINGS, None)  # its alpha is in the pairs now
    save(path, lora, metadata=metadata, to=to)


def inspect(path: Path | str, model: str | None = None) -> None:
    """Print what a LoRA file holds and, given a model, whether it fits: ValueError if not."""
    from wan.checkpoint import load_config  # here, as nothing else of LoRA needs models on disk

    path = Path(path)
    tensors = _read(path)
    lora = _understand(path, tensors)
    pairs = [change for change in lora.values() if not isinstance(change, Tensor)]
    parts = [tensor for change in lora.values() for tensor in (change[:2] if isinstance(change, tuple) else [change])]
    alphas = {"as the rank" if alpha is None else f"{alpha:g}" for _, _, alpha in pairs}
    rows = {
        "written by": next(writer for mark, writer in _WRITERS.items() if any(mark in key for key in tensors)),
        "changes": f"{len(pairs)} layers by a pair, {len(lora) - len(pairs)} whole parameters",
        "rank": ", ".join(map(str, sorted({len(A) for A, _, _ in pairs}))),
        "alpha": ", ".join(sorted(alphas)),
        "parameters": f"{sum(part.numel() for part in parts):,}",
        "stored as": ", ".join(sorted({str(part.dtype).removeprefix("torch.") for part in parts})),
    }
    if model:
        with torch.device("meta"):
            outline = Wan(load_config(model))
        rows["matched"] = f"{len(_match(outline, lora))} of {len(lora)} in {model}"
    norms = {name: _norm(change) for name, change in lora.items()}
    strongest = heapq.nlargest(5, norms, norms.get)
    rows["strongest"] = ", ".join(f"{name} ({norms[name]:.4g})" for name in strongest)
    for name, value in {**rows, **{f"[{key}]": value for key, value in sorted(_metadata(path).items())}}.items():
        print(f"{name:11} {textwrap.shorten(value, 300)}")


def _understand(path: Path, tensors: dict[str, Tensor]) -> LoRA:
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_ADAPTER.sub("", key))
        modulation = ".modulation" if match and match["part"] == "diff_m" else ""
        layer = _canonical(match["name"] + modulation) if match else None
        if layer is None or (match["part"] == "alpha" and tensor.numel() != 1):
            unknown.append(key)
            continue
        part = _PARTS[match["part"]]
        parts = layers.setdefault(layer, {})
        if part in parts:
            raise ValueError(f"{path} has more than one {part} for a layer, such as {key}; expected one LoRA in a file")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{path} has numbers in {key} that are not finite; fetch the file again, or train anew")
        parts[part] = tensor
    if unknown or not tensors:
        first = f"; first unknown {unknown[0]}" if unknown else ""
        raise ValueError(
            f"{path}: understood {len(tensors) - len(unknown)} of {len(tensors)} keys{first}; "
            "expected a LoRA for a text-to-video Wan: pairs lora_A/lora_B or lora_down/lora_up, alphas, .diff, .diff_b"
        )

    lora: LoRA = {}
    incomplete = []
    peft_alpha = _peft_alpha(path)
    for layer, parts in layers.items():
        if {"A", "B"} <= parts.keys():
            lora[layer] = (parts["A"], parts["B"], parts["alpha"].item() if "alpha" in parts else peft_alpha)
        elif parts.keys() & {"A", "B", "alpha", "B's bias"}:
            incomplete.append(layer)
            continue
        if "whole" in parts:
            lora[layer if layer.endswith("modulation") else f"{layer}.weight"] = parts["whole"]
        if "bias" in parts:
            lora[f"{layer}.bias"] = parts["bias"]
        if "B's bias" in parts:
            lora[f"{layer}.bias"] = lora.get(f"{layer}.bias", 0) + _scale(lora[layer]) * parts["B's bias"]
    if incomplete:
        raise ValueError(
            f"{path}: {len(incomplete)} of {len(layers)} layers lack A or B; first incomplete {incomplete[0]}; "
            "fetch the file again, or ask where it came from"
        )
    return lora


def _canonical(spelling: str) -> str | None:
    """The original name of a layer in any spelling, or None: `blocks_3_ffn_0` is `blocks.3.ffn.0`."""
    block = re.match(r"blocks[._](\d+)", spelling)
    first = re.sub(r"^(blocks[._])\d+", r"\g<1>0", spelling)
    name = _spellings().get(first)
    return name and (name.replace("blocks.0.", f"blocks.{block[1]}.") if block else name)


@lru_cache(maxsize=1)
def _spellings() -> dict[str, str]:
    """The layers of Wan outside the blocks and in the first of them, {spelling: name}. A modulation counts as one."""
    with torch.random.fork_rng(devices=[]):
        smallest = Wan(WanConfig(dim=2, ffn_dim=1, freq_dim=2, num_heads=1, num_layers=1, text_dim=1))
    spellings = {}
    for name in smallest.state_dict():
        if not name.endswith(".bias"):
            for spelling in (name, rename(name, TRANSFORMER_NAMES)):
                dotted = spelling.removesuffix(".weight")
                spellings[dotted] = spellings[dotted.replace(".", "_")] = name.removesuffix(".weight")
    return spellings


def _spell(lora: LoRA, to: str) -> dict[str, Tensor]:
    """The tensors of a file in one of the `LAYOUTS`; only "comfy" has a place for an alpha."""
    if to not in LAYOUTS:
        raise ValueError(f"got the LoRA layout {to}, expected one of {', '.join(LAYOUTS)}")
    pairs = {layer: change for layer, change in lora.items() if not isinstance(change, Tensor)}
    biases = {f"{layer}.bias" for layer in pairs}
    changed = [name for name in lora if name not in pairs]
    lost = [name for name in changed if to == "original" or (to == "peft" and name not in biases)]
    if lost:
        raise ValueError(
            f"{len(lost)} changes of whole parameters, such as {lost[0]}, have no place in the layout {to}; use comfy"
        )
    tensors = {}
    for layer, (A, B, alpha) in pairs.items():
        key = rename(f"{layer}.weight", TRANSFORMER_NAMES).removesuffix(".weight") if to == "peft" else layer
        tensors[LAYOUTS[to].format(key, "A")] = A
        tensors[LAYOUTS[to].format(key, "B")] = B
        if alpha is not None and alpha != len(A):
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(alpha))
        if to == "peft" and changed:  # PEFT has a bias for each B or for none
            tensors[f"transformer.{key}.lora_B.bias"] = lora.get(f"{layer}.bias", torch.zeros(len(B), dtype=B.dtype))
    if to == "comfy":
        for name in changed:
            layer, _, kind = name.rpartition(".")
            key = {"weight": f"{layer}.diff", "bias": f"{layer}.diff_b"}.get(kind, f"{name}.diff")
            tensors[f"diffusion_model.{key}"] = lora[name]
    return tensors


def _without_alpha(pair: Pair) -> Pair:
    A, B, _ = pair
    return A, (_scale(pair) * B.float()).to(B.dtype), None


def _norm(change: Pair | Tensor) -> float:
    """The Frobenius norm of what a change adds at strength 1: ‖B·A‖² is the sum of BᵀB ⊙ AAᵀ, (rank, rank)."""
    if isinstance(change, Tensor):
        return change.float().norm().item()
    A, B = (matrix.float().flatten(1) for matrix in change[:2])
    return abs(_scale(change)) * ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt().item()


_DIFFUSERS_SETTINGS = "lora_adapter_metadata"


def _peft_alpha(path: Path) -> float | None:
    """The alpha of PEFT, which is not among its tensors: PEFT writes a file beside them, diffusers an entry in them."""
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.is_file():
        settings = json.loads(beside.read_text(encoding="utf-8"))
    else:
        packed = json.loads(_metadata(path).get(_DIFFUSERS_SETTINGS, "{}"))
        settings = {name.removeprefix("transformer."): value for name, value in packed.items()}
    if settings.get("use_rslora") or settings.get("alpha_pattern"):
        raise ValueError(f"{path} has PEFT's use_rslora or alpha_pattern, expected one lora_alpha; merge it with PEFT")
    return settings.get("lora_alpha")


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


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


@dataclass(frozen=True)
class LoRAConfig:
    command: str = cli.option(None, "what to do", positional=True, choices=("inspect", "convert"))
    source: str = cli.option(None, "the LoRA file to read", positional=True, metavar="IN")
    path: str | None = cli.option(None, "the file to write, of convert", positional=True, metavar="OUT", nargs="?")
    to: str = cli.option("comfy", "layout to write: ComfyUI's, PEFT's or the official Pusa's", choices=tuple(LAYOUTS))
    overwrite: bool = cli.option(False, "replace OUT if it exists")
    model: str | None = cli.option(None, "a model that IN should fit, for inspect: a folder or a Hugging Face id")


def main() -> None:
    config = cli.parse(LoRAConfig, "Inspect a LoRA file, or convert it to another layout.")
    if config.command == "inspect":
        inspect(config.source, config.model)
    elif config.path is None:
        raise ValueError("got convert IN, expected convert IN OUT; name the file to write")
    else:
        convert(config.source, config.path, config.to, config.overwrite)


if __name__ == "__main__":
    cli.run(main)
