"""LoRA files. Programs differ in how they spell a layer's name and in what they call its tensors.

In memory a LoRA has pairs of matrices by the original names of their layers, and diffs of whole parameters, such as
biases and norms.

    python lora.py inspect lora.safetensors
    python lora.py convert lora.safetensors lora_for_diffusers.safetensors --to peft
"""

import json
import math
import pickle
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support import cli
from wan import files
from wan.names import TRANSFORMER_NAMES, layer_name, rename


class Pair(NamedTuple):
    """`scale · B·A` is added to a layer's weight. A convolution's kernel counts among its inputs."""

    A: Tensor  # (rank, in)
    B: Tensor  # (out, rank)
    alpha: float | None = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / len(self.A)

    def norm(self) -> Tensor:
        """The Frobenius norm of scale · B·A: ‖B·A‖² is the sum of BᵀB ⊙ AAᵀ, (rank, rank)."""
        A, B = (matrix.float().flatten(1) for matrix in (self.A, self.B))
        return abs(self.scale) * ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()


@dataclass
class LoRA:
    pairs: dict[str, Pair] = field(default_factory=dict)  # of layers, such as `blocks.0.ffn.2`
    diffs: dict[str, Tensor] = field(default_factory=dict)  # what is added to parameters, such as `blocks.0.norm3.bias`

    def __len__(self) -> int:
        return len(self.pairs) + len(self.diffs)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError unless each pair and diff finds its parameter in `model`, and fits it."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        unmatched = [layer for layer in self.pairs if len(shapes.get(f"{layer}.weight", ())) < 2]
        unmatched += [name for name in self.diffs if name not in shapes]
        if unmatched or not self:
            got = f"LoRA matched {len(self) - len(unmatched)} of {len(self)} layers and parameters"
            got += f"; first unmatched {unmatched[0]}" if unmatched else ""
            raise ValueError(f"{got}; nothing was merged: use a LoRA made for this model")
        misfits = []
        for layer, (A, B, _) in self.pairs.items():
            rows, columns = shapes[f"{layer}.weight"][0], math.prod(shapes[f"{layer}.weight"][1:])
            flat = [matrix.flatten(1).shape for matrix in (A, B) if matrix.ndim > 1]
            if flat != [(*A.shape[:1], columns), (rows, *A.shape[:1])]:
                got = f"pair {layer} has A {tuple(A.shape)} and B {tuple(B.shape)}"
                misfits.append(f"{got}, expected (rank, {columns}) and ({rows}, rank)")
        for name, diff in self.diffs.items():
            if diff.shape != shapes[name]:
                misfits.append(f"change of {name} is {tuple(diff.shape)}, expected {shapes[name]}")
        if misfits:
            raise ValueError(f"LoRA {misfits[0]}; nothing was merged: use a LoRA made for a model of this size")


_PREFIX = r"(?:(?:base_model\.model|model|diffusion_model|transformer|pipe\.dit)\.)*(?:lora_unet_+)?"
_PARTS = {
    "lora_A.weight": "A", "lora_down.weight": "A", "lora_B.weight": "B", "lora_up.weight": "B", "alpha": "alpha",
    "lora_B.bias": "B's bias", "lora_up.bias": "B's bias",
    "diff": "diff", "diff_b": "bias", "diff_m": "diff",  # what is added to a weight, a bias, a modulation
}  # fmt: skip
_KEY = re.compile(rf"{_PREFIX}(?P<name>.+?)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_ADAPTER = re.compile(r"(?<=\.lora_[AB])\.\w+(?=\.(weight|bias)$)")  # as in `.lora_A.default.weight`
_DIFFUSERS_SETTINGS = "lora_adapter_metadata"  # in the metadata of its files

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

    Layers may have the names of Wan, diffusers or kohya (`lora_unet_`). ValueError for a file that cannot be read, for
    a key that is not understood and for incomplete pairs: a LoRA applied in part looks like one that was trained badly.
    """
    return _read(Path(path))[0]


def save(
    path: Path | str, lora: LoRA, base: str = "", metadata: dict[str, str] | None = None, to: str = "comfy"
) -> None:
    """Write a LoRA as safetensors; equal input gives equal bytes.

    to: ComfyUI, diffusers and `load` all read "comfy", which stores an alpha where it differs from the rank. "peft"
    (diffusers' own) and "original" (the official Pusa's) store none, so B is scaled instead; "peft" holds diffs of
    biases only, "original" none: ValueError for others. `load` needs nothing of the metadata.
    """
    if not lora:
        raise ValueError(f"no LoRA pairs to write to {path}; expected the result of extract or load")
    tensors, pairs = _tensors(lora, to), lora.pairs.values()
    alphas = {float(len(A) if alpha is None or to != "comfy" else alpha) for A, _, alpha in pairs}
    rank = ",".join(map(str, sorted({len(A) for A, _, _ in pairs})))
    facts = {"format": "pt", "rank": rank, "alpha": ",".join(f"{alpha:g}" for alpha in sorted(alphas))}
    facts |= {"base": base} if base else {}
    with cli.replacing(path) as temporary:
        save_file(tensors, temporary, {**(metadata or {}), **facts})
        with open(temporary, "r+b") as file:  # safetensors leaves the order of the metadata to chance
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def parse_entry(entry: str) -> tuple[str, str, float | None]:
    """The expert ("" for both), path and strength of [high=|low=]PATH[:STRENGTH]; the path may have colons (`C:`)."""
    expert, rest = re.fullmatch(r"(?:(high|low)=)?(.*)", entry, re.DOTALL).groups(default="")
    path, colon, number = rest.rpartition(":")
    try:
        return (expert, path, float(number)) if colon else (expert, rest, None)
    except ValueError:
        return expert, rest, None


# The keys of the files that Pusa's authors publish: ten layers in each block, of rank 512, without alpha.
_PUSA = re.compile(
    r"(?:diffusion_model\.)?blocks\.(\d+)\.(?:(?:self|cross)_attn\.[qkvo]|ffn\.[02])\.lora_([AB])(?:\.default)?\.weight"
)


def usual_strength(path: Path | str, expert: str = "") -> float:
    """The strength to merge a LoRA at if the user names none: 1, but for Pusa's published files 1.4.

    expert: which of Wan2.2's two it is for; Pusa's is merged into the high-noise one at 1.5. Pusa's files are known by
    what is in them. A file that says its rank in the metadata, as ours do, is of somebody else.
    """
    stored, metadata = files.stored([existing(path)]), {}
    if Path(path).suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    known = {name: _PUSA.fullmatch(name) for name in stored}
    if not all(known.values()) or "rank" in metadata:
        return 1.0
    ranks = {stored[name].shape[:2][key[2] == "B" :][:1] for name, key in known.items()}  # A (rank, in), B (out, rank)
    whole = len(stored) == 2 * 10 * len({key[1] for key in known.values()}) > 0
    return 1.0 if not whole or ranks != {(512,)} else 1.5 if expert == "high" else 1.4


def with_strengths(entries: Sequence[str], own: Path, strength: float, swept: float | None = None) -> tuple[str, ...]:
    """[high=|low=]PATH:STRENGTH of each LoRA, of which some have no strength yet: `own` gets this, others the usual.

    own: the file of the model's folder. swept: what all of those get instead; ValueError if there are none.
    """
    found = []
    for entry in entries:
        expert, path, stated = parse_entry(entry)
        is_own = existing(path) and own.exists() and own.samefile(path)
        if stated is None:
            usual = strength if is_own else usual_strength(path, expert)
            entry = f"{entry}:{usual if swept is None else swept:.15g}"
        found.append(entry)
    cli.expect(swept is None or found != list(entries), "--sweep lora", "a LoRA without a strength, as in --lora PATH")
    return tuple(found)


def existing(path: Path | str) -> Path:
    """The path of a LoRA file. ValueError if there is none."""
    if not Path(path).is_file():
        raise ValueError(f"no LoRA file at {path}; give the path of a .safetensors or .pt file")
    return Path(path)


def convert(source: Path | str, path: Path | str, to: str, overwrite: bool = False) -> None:
    """Write the LoRA of a file in another layout of `LAYOUTS`, with its metadata. ValueError if `path` will not do."""
    cli.expect(Path(path).suffix == ".safetensors", f"{path} to write to", "a name that ends in .safetensors")
    if Path(path).exists() and not overwrite:
        raise ValueError(f"{path} exists; give another name, or --overwrite")
    lora, _, metadata = _read(Path(source))
    metadata.pop(_DIFFUSERS_SETTINGS, None)  # its alpha is in the pairs now
    save(path, lora, metadata=metadata, to=to)
    print(f"{path}: {len(lora.pairs)} pairs and {len(lora.diffs)} whole parameters, named as for {to}")


def inspect(path: Path | str, model: str | None, network: type[nn.Module]) -> None:
    """Print what a LoRA file holds and, given a model, whether it fits: ValueError if not."""
    lora, keys, metadata = _read(Path(path))
    pairs = lora.pairs.values()
    parts = [*(matrix for pair in pairs for matrix in pair[:2]), *lora.diffs.values()]
    norms = {name: pair.norm() for name, pair in lora.pairs.items()}
    norms |= {name: diff.float().norm() for name, diff in lora.diffs.items()}
    rows = {
        "written by": next(writer for mark, writer in _WRITERS.items() if any(mark in key for key in keys)),
        "changes": f"{len(pairs)} layers by a pair, {len(lora.diffs)} whole parameters",
        "rank": ", ".join(map(str, sorted({len(A) for A, _, _ in pairs}))),
        "alpha": ", ".join(sorted({"as the rank" if alpha is None else f"{alpha:g}" for _, _, alpha in pairs})),
        "parameters": f"{sum(part.numel() for part in parts):,}",
        "stored as": ", ".join(sorted({str(part.dtype).removeprefix("torch.") for part in parts})),
    }
    if model:
        from wan import checkpoint  # here, as nothing else about LoRA files needs a model

        with torch.device("meta"):
            lora.check(network(checkpoint.open(model, network).config))
        rows["matched"] = f"{len(lora)} of {len(lora)} in {model}"
    strongest = sorted(norms, key=norms.get, reverse=True)[:5]
    rows["strongest"] = ", ".join(f"{name} ({norms[name]:.4g})" for name in strongest)
    rows |= {f"[{key}]": value for key, value in sorted(metadata.items())}
    for name, value in rows.items():
        print(f"{name:11} {textwrap.shorten(value, 300)}")


def _read(path: Path) -> tuple[LoRA, list[str], dict[str, str]]:
    """The LoRA in a file, the keys of its tensors there, and its metadata if it is safetensors."""
    if existing(path).suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise ValueError(f"got the LoRA file {path}, expected its name to end in .safetensors, .pt, .pth or .bin")
    metadata = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
        else:
            tensors = files.unpickle(path)
    except pickle.UnpicklingError as error:
        got = f"{path} is damaged or holds more than plain tensors, which could run code on loading"
        raise ValueError(f"{got}, so it was not loaded; get the LoRA as .safetensors") from error
    except Exception as error:  # over damaged bytes, readers stumble in every way there is
        raise ValueError(f"{path} cannot be read ({error}); it may be incomplete: fetch it again") from error
    if tensors is None:
        raise ValueError(f"{path} is not a flat dict of tensors; get the LoRA as .safetensors")
    return _parse(path, tensors, metadata), list(tensors), metadata


def _parse(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> LoRA:
    """The LoRA that the tensors of a file are; ValueError unless every key is understood."""
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS.values()}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_ADAPTER.sub("", key))
        part = match and _PARTS[match["part"]]
        layer = match and layer_name(match["name"] + (".modulation" if match["part"] == "diff_m" else ""))
        if not layer or (part == "alpha" and tensor.numel() != 1):
            unknown.append(key)
        elif layer in parts[part]:
            raise ValueError(f"{path} has more than one {part} for a layer, such as {key}; expected one LoRA in a file")
        elif part in ("A", "B") and tensor.ndim < 2:
            got = f"{key} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{path} has {got}, expected a matrix; fetch the file again, or ask where it came from")
        elif not tensor.float().isfinite().all():
            raise ValueError(f"{path} has numbers in {key} that are not finite; fetch the file again, or train anew")
        else:
            parts[part][layer] = tensor
    if unknown or not tensors:
        got = f"{path}: understood {len(tensors) - len(unknown)} of {len(tensors)} keys"
        got += f"; first unknown {unknown[0]}" if unknown else ""
        expected = "pairs lora_A/lora_B or lora_down/lora_up, alphas, .diff, .diff_b"
        raise ValueError(f"{got}; expected a LoRA for a text-to-video Wan: {expected}")

    A, B, alphas, biases_of_B = (parts[part] for part in ("A", "B", "alpha", "B's bias"))
    if incomplete := [layer for layer in {**A, **B, **alphas, **biases_of_B} if layer not in A or layer not in B]:
        got = f"{path}: {len(incomplete)} of {len(set().union(*parts.values()))} layers lack A or B"
        raise ValueError(f"{got}; first incomplete {incomplete[0]}; fetch the file again, or ask where it came from")
    peft_alpha = _peft_alpha(path, metadata)
    pairs = {layer: Pair(A[layer], B[layer], alphas[layer].item() if layer in alphas else peft_alpha) for layer in A}
    diffs = {
        layer if layer.endswith("modulation") else f"{layer}.weight": diff for layer, diff in parts["diff"].items()
    }
    diffs |= {f"{layer}.bias": diff for layer, diff in parts["bias"].items()}
    for layer, bias in biases_of_B.items():
        diffs[f"{layer}.bias"] = diffs.get(f"{layer}.bias", 0) + pairs[layer].scale * bias
    return LoRA(pairs, diffs)


def _peft_alpha(path: Path, metadata: dict[str, str]) -> float | None:
    """PEFT's alpha, which is no tensor: PEFT writes it to a file beside them, diffusers into the metadata."""
    beside = path.with_name("adapter_config.json")
    is_peft = path.stem == "adapter_model" and beside.is_file()
    packed = beside.read_text(encoding="utf-8") if is_peft else metadata.get(_DIFFUSERS_SETTINGS, "{}")
    try:
        settings = {name.removeprefix("transformer."): value for name, value in json.loads(packed).items()}
        cli.expect(cli.fits(settings.get("lora_alpha"), float | None), "another lora_alpha", "a number or none")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{path} has settings of PEFT that cannot be read ({error}); write it again") from None
    if settings.get("use_rslora") or settings.get("alpha_pattern"):
        raise ValueError(f"{path} has PEFT's use_rslora or alpha_pattern, expected one lora_alpha; merge it with PEFT")
    return settings.get("lora_alpha")


def _tensors(lora: LoRA, to: str) -> dict[str, Tensor]:
    """The tensors of a file in one of the `LAYOUTS`. ValueError for a LoRA that the layout cannot hold."""
    cli.expect(to in LAYOUTS, f"the LoRA layout {to}", f"one of {', '.join(LAYOUTS)}")
    biases = {f"{layer}.bias" for layer in lora.pairs}
    if lost := [name for name in lora.diffs if to == "original" or (to == "peft" and name not in biases)]:
        got = f"{len(lost)} changes of whole parameters, such as {lost[0]}"
        raise ValueError(f"{got}, have no place in the layout {to}; use comfy")
    tensors = {}
    for layer, (A, B, alpha) in lora.pairs.items():
        name = rename(layer, TRANSFORMER_NAMES) if to == "peft" else layer
        if to != "comfy":
            B = (lora.pairs[layer].scale * B.float()).to(B.dtype)
        elif alpha not in (None, len(A)):
            tensors[f"diffusion_model.{layer}.alpha"] = torch.tensor(float(alpha))
        tensors[LAYOUTS[to].format(name, "A")], tensors[LAYOUTS[to].format(name, "B")] = A, B
        if to == "peft" and lora.diffs:  # PEFT has a bias for each B or for none
            bias = lora.diffs.get(f"{layer}.bias", torch.zeros(len(B), dtype=B.dtype))
            tensors[f"transformer.{name}.lora_B.bias"] = bias
    for name, diff in lora.diffs.items() if to == "comfy" else ():
        layer, _, kind = name.rpartition(".")
        part = {"weight": f"{layer}.diff", "bias": f"{layer}.diff_b"}.get(kind, f"{name}.diff")
        tensors[f"diffusion_model.{part}"] = diff
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}


@dataclass(frozen=True)
class LoRAConfig:
    command: str = cli.option(None, "what to do", positional=True, choices=("inspect", "convert"))
    source: str = cli.option(None, "the LoRA file to read", positional=True, metavar="IN")
    path: str | None = cli.option(None, "the file to write, of convert", positional=True, metavar="OUT", nargs="?")
    to: str = cli.option("comfy", "layout to write: ComfyUI's, PEFT's or the official Pusa's", choices=tuple(LAYOUTS))
    overwrite: bool = cli.option(False, "replace OUT if it exists")
    model: str | None = cli.option(None, "a model that IN should fit, for inspect: a folder or a Hugging Face id")


def command(network: type[nn.Module]) -> None:
    """What `python lora.py` does. network: the transformer's class, `model.Wan`, to compare a file with a model."""
    config = cli.parse(LoRAConfig, "Inspect a LoRA file, or convert it to another layout.")
    if config.command == "inspect":
        inspect(config.source, config.model, network)
    elif config.path is None:
        raise ValueError("got convert IN, expected convert IN OUT; name the file to write")
    else:
        convert(config.source, config.path, config.to, config.overwrite)


def main(network: type[nn.Module]) -> None:
    cli.run(partial(command, network))
