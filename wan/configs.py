"""Configs of a model's parts: our fields, those of a -Diffusers folder, and what the shapes of tensors tell.

Our fields are those of `model.WanConfig`, `vae.VAEConfig` and `text.T5Config`. The original layout has no config for
VAE and text encoder, and ComfyUI's files have none at all; there, every size is in the shapes of the tensors.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

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
FIELDS["transformer_2"] = FIELDS["transformer"]
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
CONSTANTS["transformer_2"] = CONSTANTS["transformer"]


def from_diffusers(part: str, theirs: dict) -> dict:
    """Our fields, from the -Diffusers config.json of a part: a transformer, the "vae" or the "text_encoder"."""
    found = {ours: theirs[key] for ours, key in FIELDS[part].items() if theirs.get(key) is not None}
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    if part == "vae":
        return found | {"patch_size": theirs.get("patch_size") or 1}
    if part == "text_encoder":
        dim_attn = _product(theirs.get("num_heads", 6), theirs.get("d_kv", 64))  # transformers' defaults
        return found | {"dim_attn": dim_attn}
    dim = _product(theirs.get("num_attention_heads", 40), theirs.get("attention_head_dim", 128))  # diffusers' defaults
    kind = "i2v" if theirs.get("image_dim") or theirs.get("added_kv_proj_dim") else "t2v"
    return found | {"dim": dim, "model_type": kind}


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
