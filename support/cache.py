"""What is computed once and kept in files: latents of clips, embeddings of prompts.

What the frozen VAE and text encoder make of a clip and its caption never changes during training, and a prompt is often
used again. Each result is a safetensors file named by a hash of everything that it depends on: content, size, cut,
weights, type. (Not the code: whoever changes `vae.py` or `text.py` empties the folder.) Files appear whole or not at
all, and equal names mean equal content, so several runs may share a folder.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from support import cli, dataset, media
from wan import checkpoint, text


class Kept(Sequence):
    """Tensors that stay in their files, each read when it is asked for: they may be more than the memory holds.

    places: the file of each, and the row of its tensor that is meant, or None for all of it.
    """

    def __init__(self, places: Iterable[tuple[Path, int | None]]):
        self.places = list(places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        path, row = self.places[index]
        with safe_open(path, "pt") as file:
            return file.get_tensor("tensor") if row is None else file.get_slice("tensor")[row]


def latent_keys(sources: Sequence[dataset.Source], frames: int, fps: float, encoder_name: str) -> list[str]:
    """What names the latents of each clip: its content, size and cut, and the encoder, but not its file name."""
    keys = []
    for source in sources:
        content = hashlib.sha256()
        with open(source.clip.path, "rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
        keys.append(_key(content.hexdigest(), list(source.size), frames, float(fps), encoder_name))
    return keys


def latents(
    sources: Sequence[dataset.Source],
    keys: Sequence[str],
    frames: int,
    fps: float,
    encode: Callable[[Tensor], Tensor],
    folder: Path | str,
) -> tuple[list[Kept | None], list[dataset.Skipped]]:
    """Of each clip the latents of its windows, each (16, F, H, W) in fp32; those not yet in `folder` are encoded.

    `encode` maps one window (1, 3, N, H, W) to (1, 16, F, H, W). A clip that turns out to be damaged or shorter than it
    said gives None, and the reason.
    """
    skipped = []

    def windows(source: dataset.Source) -> Tensor | None:
        try:
            pieces = media.read_windows(source.clip.path, source.size, fps, frames)
            encoded = [encode(piece[None])[0].float().cpu() for piece in pieces]
            if not encoded:
                raise ValueError(f"too short: fewer than {frames} frames at {fps:g} fps")
        except ValueError as error:
            skipped.append(dataset.skipped(source.clip, error))
            return None
        return torch.stack(encoded)

    kept = _keep(sources, keys, windows, folder, "encoding clips")
    return [file and Kept((file[0], row) for row in range(file[1])) for file in kept], skipped


def prompts(model: str, texts: Sequence[str], dtype: torch.dtype, device: str, folder: Path | str) -> Kept:
    """The embedding of each prompt by the model's text encoder, (tokens, text_dim): without the padding, which is zero.

    Only for a prompt that is not in `folder` the encoder is loaded, and it is gone when this returns.
    """
    tokenizer = checkpoint.load_tokenizer(model)
    encoder = functools.cache(lambda: checkpoint.load_text_encoder(model, dtype, device))

    def embed(prompt: str) -> Tensor:
        embedding = text.embed(tokenizer, encoder(), [prompt])[0]
        return embedding[embedding.any(-1)]

    # Another device, or type, gives other bits.
    name = f"{checkpoint.text_fingerprint(model)} {tokenizer.text_len} {dtype} {torch.device(device).type}"
    return embeddings(texts, embed, name, folder)


def embeddings(texts: Sequence[str], embed: Callable[[str], Tensor], encoder_name: str, folder: Path | str) -> Kept:
    """embed(prompt), (T, text_dim), of each prompt, in fp32; `encoder_name` must differ where the weights do."""
    kept = _keep(texts, [_key(prompt, encoder_name) for prompt in texts], embed, folder, "encoding prompts")
    return Kept((path, None) for path, _ in kept)


def fingerprint(model: nn.Module) -> str:
    """A name for a model's weights and config, so that what another model made is never taken for this one's.

    Of large tensors every so many values are hashed: 5.7 billion would take a minute, and training changes them all.
    """
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // 65536)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _keep(
    items: Sequence, keys: Sequence[str], compute: Callable, folder: Path | str, label: str
) -> list[tuple[Path, int] | None]:
    """The file of each item, which its key names, and how many rows it has: compute(item), or None if that is None.

    What is there and whole is not computed again.
    """
    paths = [Path(folder) / f"{key}.safetensors" for key in keys]
    rows = {path: _rows(path) for path in paths}
    missing = {path: item for path, item in zip(paths, items, strict=True) if rows[path] is None}
    progress = cli.Progress(len(missing), label)
    for path, item in missing.items():
        with torch.no_grad():
            tensor = compute(item)
        if tensor is not None:
            with cli.replacing(path) as temporary:
                save_file({"tensor": tensor.float().cpu().contiguous()}, temporary)
            rows[path] = len(tensor)
        progress.step()
    return [None if rows[path] is None else (path, rows[path]) for path in paths]


def _rows(path: Path) -> int | None:
    """How many rows the tensor of a file has; None if it is not there, or broken."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("tensor").get_shape()[0]
    except (OSError, SafetensorError):
        return None
