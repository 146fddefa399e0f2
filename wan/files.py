"""What the files of a model hold: tensors, and the sizes of its parts.

Names and shapes of tensors come first; a tensor is read when it is asked for, and code in a file never runs.

Sizes have the names of the fields of `model.WanConfig`, `vae.VAEConfig` and `text.T5Config`; a -Diffusers folder calls
them otherwise. The original layout has no config for VAE and text encoder, and ComfyUI's files have none at all; there,
every size is in the shapes of the tensors.
"""

import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
                        header, read = file.get_slice(name), partial(_read, path, name)
                        found[name] = Stored(tuple(header.get_shape()), header.get_dtype().startswith("F8"), read)
            else:
                tensors = unpickle(path, "model_state")
                if tensors is None:
                    raise ValueError("it is not a flat dict of tensors")
                for name, t in tensors.items():
                    found[name] = Stored(tuple(t.shape), t.is_floating_point() and t.itemsize == 1, t.detach)
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
    prefix = next((m[0] for m in map(re.compile(r"(model\.)?diffusion_model\.").match, found) if m), "")
    found = {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}
    marked = found.pop("scaled_fp8", None) is not None
    for name, tensor in list(found.items()):
        if not tensor.fp8 or len(tensor.shape) != 2:
            continue
        found.pop(name.removesuffix("weight") + "scale_input", None)  # for products in fp8, which nobody does here
        scale = found.pop(name.removesuffix("weight") + "scale_weight", None)
        if scale and scale.shape in ((), (1,), (1, 1), (tensor.shape[0], 1)):
            found[name] = tensor._replace(read=lambda w=tensor, scale=scale: w.read().float() * scale.read().float())
        elif scale or marked:
            got = f"a scale of {scale.shape}" if scale else "no scale"
            expected = "expected one a tensor or row; use another copy of the model"
            raise ValueError(f"{path} has {got} for {name}, {expected}")
    return found


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


# Sizes.

HEAD_SIZE = 128  # of every published Wan transformer; no shape tells it

# Our field -> theirs. `dim` of the transformer and `dim_attn` of the encoder are products there.
FIELDS: dict[str, dict[str, str]] = {
    "transformer": {
        "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "in_dim": "in_channels", "out_dim": "out_channels", "eps": "eps",
        "num_heads": "num_attention_heads", "num_layers": "num_layers", "text_dim": "text_dim",
        "patch_size": "patch_size", "text_len": "text_len",
    },
    "vae": {
        "dim": "base_dim", "z_dim": "z_dim", "dim_mult": "dim_mult", "num_res_blocks": "num_res_blocks",
        "temporal_downsample": "temperal_downsample", "latents_mean": "latents_mean", "latents_std": "latents_std",
    },
    "text_encoder": {
        "vocab_size": "vocab_size", "dim": "d_model", "dim_ffn": "d_ff", "num_heads": "num_heads",
        "num_layers": "num_layers", "num_buckets": "relative_attention_num_buckets",
    },
}  # fmt: skip
# What their configs say besides, for the programs that read them.
CONSTANTS = {
    "transformer": {
        "_class_name": "WanTransformer3DModel", "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    },
    "vae": {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0},
    "text_encoder": {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "layer_norm_epsilon": 1e-6, "pad_token_id": 0,
        "eos_token_id": 1, "relative_attention_max_distance": 128, "tie_word_embeddings": True,
    },
}  # fmt: skip
# What the programs that read them take for a field that a config leaves out, where ours is another model's.
DEFAULTS = {
    "transformer": {"ffn_dim": 13824, "num_attention_heads": 40, "attention_head_dim": 128, "num_layers": 40},
    "vae": {},
    "text_encoder": {"vocab_size": 250112, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 6, "num_layers": 8},
}
for _table in (FIELDS, CONSTANTS, DEFAULTS):
    _table["transformer_2"] = _table["transformer"]


def from_diffusers(part: str, theirs: dict) -> dict:
    """Our fields, from the -Diffusers config.json of a part: a transformer, the "vae" or the "text_encoder"."""
    theirs = DEFAULTS[part] | {key: value for key, value in theirs.items() if value is not None}
    found = {ours: theirs[key] for ours, key in FIELDS[part].items() if key in theirs}
    if part == "vae":
        return found | {"patch_size": theirs.get("patch_size") or 1}
    if part == "text_encoder":
        return found | {"dim_attn": _product(theirs["num_heads"], theirs["d_kv"])}
    kind = "i2v" if theirs.get("image_dim") or theirs.get("added_kv_proj_dim") else "t2v"
    return found | {"dim": _product(theirs["num_attention_heads"], theirs["attention_head_dim"]), "model_type": kind}


def _product(a: Any, b: Any) -> int | None:
    return a * b if type(a) is type(b) is int else None  # None: refused later, as a value of the wrong type


def to_diffusers(part: str, config: Any) -> dict:
    """The -Diffusers config.json of a part."""
    theirs = CONSTANTS[part] | {key: getattr(config, ours) for ours, key in FIELDS[part].items()}
    if part == "text_encoder":
        return theirs | {"d_kv": config.dim_attn // config.num_heads}
    if part == "vae":
        channels = 3 * config.patch_size**2
        return theirs | {
            "in_channels": channels, "out_channels": channels,
            "patch_size": None if config.patch_size == 1 else config.patch_size,
            "scale_factor_spatial": config.patch_size * 2 ** (len(config.dim_mult) - 1),
            "scale_factor_temporal": 2 ** sum(config.temporal_downsample),
        }  # fmt: skip
    if config.text_len == 512:  # diffusers does not know this key, and warns
        del theirs["text_len"]
    return theirs | {"attention_head_dim": config.dim // config.num_heads}


def from_shapes(part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Our fields, from the shapes of a part's tensors by their original names; KeyError names one that is missing."""
    return {"vae": _vae, "text_encoder": _text_encoder}.get(part, _transformer)(shapes)


def layers(names: Iterable[str]) -> int:
    """How many blocks the tensors of these names make up."""
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def other_kind(config: Any, class_name: str | None) -> str:
    """What a transformer is if it is not for text-to-video, else ""; class_name: its config's `_class_name`."""
    known = class_name in (None, "WanModel", "WanTransformer3DModel")
    name = config.model_type if known else str(class_name)
    kind = name.lower()
    if "vace" in kind:
        return "a VACE model"
    if kind == "ti2v" or config.out_dim == 48:
        return f"a TI2V model of {config.out_dim} latent channels, with another VAE"
    if kind in ("i2v", "flf2v") or config.in_dim == 36:
        return f"an image-conditioned (I2V) model of {config.in_dim} input channels"
    if kind != "t2v" or config.in_dim != config.out_dim:
        return f"a {name} model of {config.in_dim} input and {config.out_dim} output channels"
    return ""


def _transformer(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    dim, in_dim, *patch_size = shapes["patch_embedding.weight"]
    if dim % HEAD_SIZE:
        raise ValueError(f"width {dim}, expected a multiple of {HEAD_SIZE}, the size of a head")
    modules = {name.split(".")[0] for name in shapes}
    return {
        "dim": dim, "in_dim": in_dim, "patch_size": tuple(patch_size), "num_heads": dim // HEAD_SIZE,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0], "freq_dim": shapes["time_embedding.0.weight"][1],
        "out_dim": shapes["head.head.weight"][0] // math.prod(patch_size), "num_layers": layers(shapes),
        "text_dim": shapes["text_embedding.0.weight"][1],
        "model_type": "vace" if "vace_blocks" in modules else "i2v" if "img_emb" in modules else "t2v",
    }  # fmt: skip


def _vae(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    dim, folded = shapes["encoder.conv1.weight"][:2]
    widths, temporal, i = [], [], 0
    while any(name.startswith(f"encoder.downsamples.{i}.") for name in shapes):
        block, i = f"encoder.downsamples.{i}.", i + 1
        if block + "resample.1.weight" in shapes:
            temporal.append(block + "time_conv.weight" in shapes)
        else:
            widths.append(shapes[block + "residual.6.weight"][0])
    blocks = len(widths) // (len(temporal) + 1)  # of each level
    return {
        "dim": dim, "dim_mult": tuple(width // dim for width in widths[::blocks]), "num_res_blocks": blocks,
        "z_dim": shapes["conv2.weight"][0], "temporal_downsample": tuple(temporal),
        "patch_size": round((folded / 3) ** 0.5),
    }  # fmt: skip


def _text_encoder(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    vocab_size, dim = shapes["token_embedding.weight"]
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return {
        "vocab_size": vocab_size, "dim": dim, "num_buckets": num_buckets, "num_heads": num_heads,
        "dim_attn": shapes["blocks.0.attn.q.weight"][0], "dim_ffn": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": layers(shapes),
    }  # fmt: skip
