"""Tensors in files: their names and shapes first, each one read when it is asked for; and code in a file never runs."""

import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor


class Stored(NamedTuple):
    """A tensor in a file; `read()` returns it."""

    shape: tuple[int, ...]
    fp8: bool
    read: Callable[[], Tensor]


def stored(paths: Iterable[Path]) -> dict[str, Stored]:
    """What safetensors files and pickles hold, by name. ValueError for one that cannot be read."""
    found = {}
    for path in paths:
        with _reading(path):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        header = file.get_slice(name)
                        is_fp8 = header.get_dtype().startswith("F8")
                        found[name] = Stored(tuple(header.get_shape()), is_fp8, partial(_read, path, name))
            else:
                tensors = unpickle(path, "model_state")
                if tensors is None:
                    raise ValueError("it is not a flat dict of tensors")
                for name, tensor in tensors.items():
                    is_fp8 = tensor.is_floating_point() and tensor.itemsize == 1
                    found[name] = Stored(tuple(tensor.shape), is_fp8, tensor.detach)
    return found


def unpickle(path: Path, entry: str | None = None) -> dict[str, Tensor] | None:
    """The dict of names to dense tensors that is in a pickle, or in this entry of it; None if anything else is.

    Damaged bytes raise whatever the unpickler raises; more than plain values raises UnpicklingError.
    """
    # Mapped, so that what is cast or moved to a GPU is never all in memory twice.
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(content, dict):
        content = content.get(entry, content)
    tensors_alone = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
        and not (value.is_quantized or value.is_nested or value.is_meta)
        for name, value in content.items()
    )  # fmt: skip
    return content if tensors_alone else None


def single_file(path: Path) -> dict[str, Stored]:
    """A single file's transformer, by original names; fp8 weights are scaled when read. ValueError for a bad scale."""
    found = stored([path])
    prefixes = ("model.diffusion_model.", "diffusion_model.")
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in found)), "")
    found = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    marked = found.pop("scaled_fp8", None) is not None
    for name, tensor in list(found.items()):
        if not tensor.fp8 or len(tensor.shape) != 2:
            continue
        found.pop(name.removesuffix("weight") + "scale_input", None)  # for products in fp8, which nobody does here
        scale = found.pop(name.removesuffix("weight") + "scale_weight", None)
        if scale and scale.shape in ((), (1,), (1, 1), (tensor.shape[0], 1)):
            found[name] = tensor._replace(read=partial(_scaled, tensor, scale))
        elif scale or marked:
            got = f"a scale of {scale.shape}" if scale else "no scale"
            expected = "expected one a tensor or row; use another copy of the model"
            raise ValueError(f"{path} has {got} for {name}, {expected}")
    return found


def _scaled(weight: Stored, scale: Stored) -> Tensor:
    return weight.read().float() * scale.read().float()


def _read(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file, which is opened anew: while it is open, all that was read stays resident."""
    with _reading(path), safe_open(path, framework="pt") as file:
        return file.get_tensor(name).clone()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # over damaged bytes, readers stumble in every way there is
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds more than tensors: nothing in it was run"
        raise ValueError(f"cannot read {path} ({reason}); download or write it again") from error
