"""What the tensors of a Wan model are called in a -Diffusers folder.

In memory they have their original names, those of the published Wan2.1 files. There is a table for each part:

    rename("blocks.0.self_attn.q.weight", TRANSFORMER_NAMES)    # blocks.0.attn1.to_q.weight
"""

import re
from collections.abc import Callable
from typing import Any

Table = tuple[tuple[str, str | Callable[[re.Match], str]], ...]

# Original name -> -Diffusers name: substitutions, applied in this order.
TRANSFORMER_NAMES = (
    (r"^(time|text)_embedding\.0\b", r"condition_embedder.\1_embedder.linear_1"),
    (r"^(time|text)_embedding\.2\b", r"condition_embedder.\1_embedder.linear_2"),
    (r"^time_projection\.1\b", "condition_embedder.time_proj"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])\b", r".to_\1"),
    (r"\.o\b", ".to_out.0"),
    (r"\.ffn\.0\b", ".ffn.net.0.proj"),
    (r"\.ffn\.2\b", ".ffn.net.2"),
    (r"\.norm3\b", ".norm2"),  # the affine norm; the other two have no weights
    (r"^head\.head\b", "proj_out"),
    (r"(^head\.)?\bmodulation\b", "scale_shift_table"),
)
# Every layer of a transformer that has parameters, with {} for a block's number. A modulation counts as one.
TRANSFORMER_LAYERS = (
    "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
    "time_projection.1", "head.head", "head.modulation",
    *(f"blocks.{{}}.{kind}_attn.{layer}" for kind in ("self", "cross") for layer in (*"qkvo", "norm_q", "norm_k")),
    "blocks.{}.norm3", "blocks.{}.modulation", "blocks.{}.ffn.0", "blocks.{}.ffn.2",
)  # fmt: skip
VAE_NAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"coder\.conv1\.", "coder.conv_in."),
    (r"coder\.head\.0\.", "coder.norm_out."),
    (r"coder\.head\.2\.", "coder.conv_out."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)  # and the decoder's flat list of blocks, which the other layout groups by level: `vae_names`
TEXT_NAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.", "encoder.block."),
    (r"\.attn\.", ".layer.0.SelfAttention."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
)


def rename(name: str, table: Table) -> str:
    """The -Diffusers name of an original name: `rename("head.head.bias", TRANSFORMER_NAMES)` is `proj_out.bias`."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


_SPELLINGS = {name: layer for layer in TRANSFORMER_LAYERS for name in (layer, rename(layer, TRANSFORMER_NAMES))}
_SPELLINGS |= {name.replace(".", "_"): layer for name, layer in _SPELLINGS.items()}


def layer_name(spelling: str) -> str | None:
    """The original name of a layer that is spelled in any way, or None: `blocks_3_ffn_0` is `blocks.3.ffn.0`."""
    number = re.findall(r"^blocks[._](\d+)", spelling)
    layer = _SPELLINGS.get(re.sub(r"^(blocks[._])\d+", r"\1{}", spelling))
    return layer and layer.format(*number)


def vae_names(num_res_blocks: int) -> Table:
    """`VAE_NAMES` and the decoder's blocks: on each level `num_res_blocks + 1` residual ones, then an upsampling."""
    residual = num_res_blocks + 1

    def block(match: re.Match) -> str:
        level, i = divmod(int(match[1]), residual + 1)
        return f".up_blocks.{level}." + (f"resnets.{i}." if i < residual else "upsamplers.0.")

    return (*VAE_NAMES, (r"\.upsamples\.(\d+)\.", block))


def of_part(part: str, config: Any) -> Table:
    """The table for a part: a transformer, the "vae" or the "text_encoder"; config: of that part."""
    if part == "vae":
        return vae_names(config.num_res_blocks)
    return TEXT_NAMES if part == "text_encoder" else TRANSFORMER_NAMES
