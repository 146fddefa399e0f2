"""Tensors that are computed once and stored in files: latents of clips, embeddings of prompts.

A file's name is a hash of all that its tensor depends on: content, size, cut, weights, type. (Not on the code: whoever
changes `wan/vae.py` or `wan/text.py` empties the folder.) Files appear whole or not at all, so runs may share a folder.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from support import cli


@dataclass(frozen=True)
class StoredTensors(Sequence):
    """Tensors that are read from their files one at a time: together they may be more than the memory holds."""

    places: list[tuple[Path, int | None]]  # the file of each, and its row of the tensor there, or None for all rows

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        path, row = self.places[index]
        with safe_open(path, "pt") as file:
            return file.get_tensor("tensor") if row is None else file.get_slice("tensor")[row]


def embeddings(
    texts: Sequence[str], embed: Callable[[str], Tensor], encoder_name: str, folder: Path | str
) -> StoredTensors:
    """embed(text), (T, text_dim) in fp32, for each text; `encoder_name` must differ where the weights do."""
    files = compute_missing(texts, [key(text, encoder_name) for text in texts], embed, folder, "encoding prompts")
    return StoredTensors([(path, None) for path, _ in files])


@torch.no_grad()
def compute_missing(
    items: Sequence, keys: Sequence[str], compute: Callable[..., Tensor | None], folder: Path | str, label: str
) -> list[tuple[Path, int] | None]:
    """For each item the file of compute(item) in fp32, and how many rows it has; None where compute gives None.

    An item's key names its file. A file that can be read is not computed again. ValueError if nothing can be written.
    """
    paths = [Path(folder) / f"{name}.safetensors" for name in keys]
    rows = {}
    for path in paths:
        with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:  # not there, or broken
            rows[path] = file.get_slice("tensor").get_shape()[0]
    missing = {path: item for path, item in zip(paths, items, strict=True) if path not in rows}
    if missing:
        cli.try_writing(folder, "--cache, or for sampling $NANOPUSA_CACHE")
    progress = cli.Progress(len(missing), label)
    for path, item in missing.items():
        tensor = compute(item)
        if tensor is not None:
            with cli.replacing(path) as temporary:
                save_file({"tensor": tensor.float().cpu().contiguous()}, temporary)
            rows[path] = len(tensor)
        progress.step()
    return [(path, rows[path]) if path in rows else None for path in paths]


def key(*parts: str | float | tuple[int, ...]) -> str:
    """The name of what depends on all of these parts, and on nothing else."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
