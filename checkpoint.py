"""Base models on disk: finding, downloading, naming, streaming and writing them.

Two layouts hold the same weights under different names. Everywhere else the names are the original ones; the tables
`TRANSFORMER_NAMES`, `VAE_NAMES` and `TEXT_NAMES` say what each is called in the other layout.

    original    config.json, diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth,
                google/umt5-xxl/tokenizer.json
    -Diffusers  model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/

    pipeline = load_pipeline("checkpoints/tiny")    # or a folder of yours, or Wan-AI/Wan2.1-T2V-1.3B-Diffusers

What a model is comes from its configs and tensors, never from its folder's name. Modules are built without memory and
filled tensor by tensor, so loading needs the size of one model, not two.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cli import replacing
from model import Wan, WanConfig
from text import T5Config, Tokenizer, UMT5Encoder, write_tokenizer
from vae import VAEConfig, WanVAE

Table = tuple[tuple[str, str | Callable[[re.Match], str]], ...]

# Original name -> -Diffusers name: substitutions, applied in this order. The way back is the inverse of what they give
# for the names that a model has, see `_fill`.
TRANSFORMER_NAMES = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])\.", r".to_\1."),
    (r"\.o\.", ".to_out.0."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"\.norm3\.", ".norm2."),  # the affine norm; the other two have no weights
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
)
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
# Our config field -> theirs. `dim` of the transformer and `dim_attn` of the encoder are products there.
TRANSFORMER_FIELDS = {
    "ffn_dim": "ffn_dim", "freq_dim": "freq_dim", "in_dim": "in_channels", "out_dim": "out_channels", "eps": "eps",
    "num_heads": "num_attention_heads", "num_layers": "num_layers", "text_dim": "text_dim", "patch_size": "patch_size",
    "text_len": "text_len",
}  # fmt: skip
VAE_FIELDS = {
    "dim": "base_dim", "z_dim": "z_dim", "dim_mult": "dim_mult", "num_res_blocks": "num_res_blocks",
    "temporal_downsample": "temperal_downsample", "latents_mean": "latents_mean", "latents_std": "latents_std",
}  # fmt: skip
TEXT_FIELDS = {
    "vocab_size": "vocab_size", "dim": "d_model", "dim_ffn": "d_ff", "num_heads": "num_heads",
    "num_layers": "num_layers", "num_buckets": "relative_attention_num_buckets",
}  # fmt: skip

PUBLISHED = "Wan-AI/Wan2.1-T2V-1.3B"
VAE_FILE, TEXT_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
# Patterns of a download, which leave out other copies of the weights; a star matches slashes too.
_DESCRIPTIONS = ["*.json"]
_WEIGHTS = [f"{part}/*.safetensors" for part in ("transformer", "vae", "text_encoder")]
_WEIGHTS += ["diffusion_pytorch_model*.safetensors", VAE_FILE, TEXT_FILE]


@dataclass(frozen=True)
class Preset:
    """How a model is best sampled: what its weights do not say. The defaults are the published ones for Pusa on Wan."""

    size: tuple[int, int] = (832, 480)  # width and height in pixels
    frames: int = 81
    fps: float = 16.0
    steps: int = 30
    shift: float = 5.0
    guidance: float = 3.0
    noise: float | None = None  # m of every condition; None: each task's own
    strength: float = 1.4  # of a LoRA for which the user names none
    negative_prompt: str = (
        "oversaturated, overexposed, static, blurry details, subtitles, style, painting, picture, still, grey overall, "
        "worst quality, low quality, JPEG artifacts, ugly, incomplete, extra fingers, badly drawn hands and faces, "
        "deformed, disfigured, malformed limbs, fused fingers, motionless, cluttered background, walking backwards"
    )


@dataclass
class Pipeline:
    """The four parts of a text-to-video model, ready to run, and how it is best sampled."""

    transformer: Wan
    vae: WanVAE
    text_encoder: UMT5Encoder
    tokenizer: Tokenizer
    preset: Preset
    path: Path
    name: str


def load_preset(model: str | Path) -> Preset:
    """What the folder's `sampling.json` says, and the published settings for what it leaves out."""
    path = find_model(model) / "sampling.json"
    entries = _json(path) if path.is_file() else {}
    unknown = entries.keys() - {field.name for field in fields(Preset)}
    if unknown:
        raise ValueError(f"{path} has {sorted(unknown)}, expected only the fields of checkpoint.Preset; remove them")
    return Preset(**{**entries, "size": tuple(entries.get("size", Preset.size))})


def save_preset(folder: str | Path, preset: Preset) -> None:
    _write_json(Path(folder) / "sampling.json", asdict(preset))


def load_pipeline(model: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Pipeline:
    """Load all parts of a folder or a Hugging Face repository, which is downloaded if it is not on disk.

    `dtype` is for the transformer and the text encoder, None as stored; the VAE is always fp32.
    """
    folder = find_model(model)
    return Pipeline(
        transformer=load_transformer(folder, dtype, device),
        vae=load_vae(folder, device=device),
        text_encoder=load_text_encoder(folder, dtype, device),
        tokenizer=load_tokenizer(folder),
        preset=load_preset(folder),
        path=folder,
        name=folder.resolve().name if Path(model).is_dir() else str(model),
    )


def find_model(model: str | Path) -> Path:
    """The folder of a model on disk; a name `owner/repository` that is no folder is downloaded from Hugging Face."""
    if Path(model).is_dir():
        return Path(model)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)) or Path(model).exists():
        raise ValueError(f"got {model} as a model, expected a folder or a Hugging Face repository such as {PUBLISHED}")
    folder = _download(str(model), _DESCRIPTIONS)
    _transformer_config(folder)  # refuse a model of another kind before its gigabytes arrive
    return _download(str(model), _DESCRIPTIONS + _WEIGHTS)


def load_config(model: str | Path) -> WanConfig:
    """The sizes of a model's transformer, without its weights."""
    return _transformer_config(find_model(model))


def load_transformer(model: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Wan:
    """The diffusion transformer alone; `dtype` None keeps the type that is stored."""
    folder = find_model(model)
    config = _transformer_config(folder)
    if _is_original(folder):
        return _fill(Wan, config, (), folder, _tensors(_shards(folder, "diffusion_pytorch_model")), dtype, device)
    tensors = _tensors(_shards(folder, "transformer/diffusion_pytorch_model"))
    return _fill(Wan, config, TRANSFORMER_NAMES, folder, tensors, dtype, device)


def load_vae(model: str | Path, dtype: torch.dtype | None = torch.float32, device: str = "cpu") -> WanVAE:
    """The VAE alone, in fp32 unless told otherwise; the published latent statistics where the files have none."""
    folder = find_model(model)
    if _is_original(folder):
        state = dict(_tensors([_need(folder, VAE_FILE)]))
        return _fill(WanVAE, _sizes(_vae_sizes, state, folder), (), folder, state.items(), dtype, device)
    path = _need(folder, "vae/config.json")
    theirs = _json(path)
    if theirs.get("is_residual") or theirs.get("_class_name", "AutoencoderKLWan") != "AutoencoderKLWan":
        raise ValueError(f"{path} is not a Wan2.1 VAE (AutoencoderKLWan without is_residual); {_advice(folder)}")
    config = _config(VAEConfig, VAE_FIELDS, theirs, patch_size=theirs.get("patch_size") or 1)
    tensors = _tensors(_shards(folder, "vae/diffusion_pytorch_model"))
    return _fill(WanVAE, config, vae_names(config), folder, tensors, dtype, device)


def load_text_encoder(model: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> UMT5Encoder:
    """The umT5 encoder alone; `dtype` None keeps the type that is stored (bf16 in the published files)."""
    folder = find_model(model)
    if _is_original(folder):
        state = dict(_tensors([_need(folder, TEXT_FILE)]))
        return _fill(UMT5Encoder, _sizes(_text_sizes, state, folder), (), folder, state.items(), dtype, device)
    path = _need(folder, "text_encoder/config.json")
    theirs = _json(path)
    dim_attn = theirs.get("num_heads", 6) * theirs.get("d_kv", 64)  # transformers' defaults
    config = _config(T5Config, TEXT_FIELDS, theirs, dim_attn=dim_attn)
    tensors = _tensors(_shards(folder, "text_encoder/model"))
    # Some files name the token embedding as the encoder's own: it is the same tensor.
    tensors = ((name.replace("encoder.embed_tokens.", "shared."), tensor) for name, tensor in tensors)
    return _fill(UMT5Encoder, config, TEXT_NAMES, folder, tensors, dtype, device)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer, padding to the `text_len` of the transformer's config (512 in the published models)."""
    folder = find_model(model)
    path = _need(folder, "google/umt5-xxl/tokenizer.json" if _is_original(folder) else "tokenizer/tokenizer.json")
    return Tokenizer(path, _transformer_config(folder).text_len)


def save_pipeline(
    folder: str | Path,
    transformer: Wan | None = None,
    vae: WanVAE | None = None,
    text_encoder: UMT5Encoder | None = None,
    tokenizer: Tokenizer | tokenizers.Tokenizer | None = None,
    shift: float = 5.0,
    dtype: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write the parts that are given as a -Diffusers folder; parts that are there and not given stay as they are.

    `dtype` says which parts are stored in another type, such as `{"vae": torch.float16}`. The files that describe the
    whole (`model_index.json`, `scheduler/`) are written with the transformer.
    """
    folder, dtype = Path(folder), dtype or {}
    if unknown := dtype.keys() - {"transformer", "vae", "text_encoder"}:
        raise ValueError(f"got a dtype for {sorted(unknown)}, expected transformer, vae or text_encoder")
    if tokenizer is not None:
        text_len = getattr(tokenizer, "text_len", None) or getattr(transformer, "config", WanConfig).text_len
        plain = tokenizers.Tokenizer.from_str(getattr(tokenizer, "tokenizer", tokenizer).to_str())
        plain.no_padding()  # who reads the file sets these two by itself
        plain.no_truncation()
        write_tokenizer(folder / "tokenizer", plain, text_len)
    if text_encoder is not None:
        path = folder / "text_encoder" / "model.safetensors"
        _write(path, text_encoder, TEXT_NAMES, dtype.get("text_encoder"))
        _write_json(path.with_name("config.json"), _text_json(text_encoder.config))
    if vae is not None:
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        _write(path, vae, vae_names(vae.config), dtype.get("vae"))
        _write_json(path.with_name("config.json"), _vae_json(vae.config))
    if transformer is not None:
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        _write(path, transformer, TRANSFORMER_NAMES, dtype.get("transformer"))
        _write_json(path.with_name("config.json"), _transformer_json(transformer.config))
        _write_json(folder / "scheduler" / "scheduler_config.json", {**_SCHEDULER, "shift": shift})
        _write_json(folder / "model_index.json", _INDEX)


def rename(name: str, table: Table) -> str:
    """The -Diffusers name of an original name: `rename("head.head.bias", TRANSFORMER_NAMES)` is `proj_out.bias`."""
    for pattern, replacement in table:
        name = re.sub(pattern, replacement, name)
    return name


def vae_names(config: VAEConfig) -> Table:
    """`VAE_NAMES` and the decoder's blocks: on each level `num_res_blocks + 1` residual ones, then an upsampling."""
    residual = config.num_res_blocks + 1

    def block(match: re.Match) -> str:
        level, i = divmod(int(match[1]), residual + 1)
        return f".up_blocks.{level}." + (f"resnets.{i}." if i < residual else "upsamplers.0.")

    return (*VAE_NAMES, (r"\.upsamples\.(\d+)\.", block))


# Reading.


def _download(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # here, because importing it takes long

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # network, spelling, permission: the library has many kinds
        raise ValueError(
            f"{repository} is no folder here and cannot be had from Hugging Face ({type(error).__name__}), expected a "
            f"model on disk or a repository such as {PUBLISHED}; check the name and the network"
        ) from error


def _is_original(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def _transformer_config(folder: Path) -> WanConfig:
    """The config, in either layout; one sentence for a model that is not text-to-video by a single transformer."""
    index = folder / "model_index.json"
    index = _json(index) if index.is_file() else {}
    original = _is_original(folder)
    path = folder / ("config.json" if original else "transformer/config.json")
    # model_index.json lists each part as [library, class], and [null, null] for one that is not there.
    two = index.get("boundary_ratio") is not None or any(index.get("transformer_2") or ())
    two = two or (folder / "high_noise_model").is_dir()
    theirs = {} if two else _json(_need(folder, path.relative_to(folder).as_posix()))
    kind, class_name = theirs.get("model_type", "t2v"), str(theirs.get("_class_name", "WanModel"))
    channels = theirs.get("in_dim", theirs.get("in_channels", 16))
    if two:
        found = "a Wan2.2 model of two transformers"
    elif "vace" in (kind + class_name).lower():
        found = "a VACE model"
    elif channels == 48 or kind == "ti2v":
        found = f"a TI2V model of {channels} latent channels"
    elif channels == 36 or kind != "t2v" or theirs.get("image_dim") or theirs.get("added_kv_proj_dim"):
        found = f"an image-conditioned (I2V) model of {channels} input channels"
    elif class_name not in ("WanModel", "WanTransformer3DModel"):
        found = f"a {class_name}"
    elif original:
        return WanConfig.from_json(path)
    else:
        dim = theirs.get("num_attention_heads", 40) * theirs.get("attention_head_dim", 128)  # diffusers' defaults
        return _config(WanConfig, TRANSFORMER_FIELDS, theirs, dim=dim)
    raise ValueError(
        f"{folder} is {found}, expected a text-to-video (T2V) model of one transformer: it serves every task here; "
        f"use {PUBLISHED} or its 14B sister"
    )


def _config(config_class: type, names: dict[str, str], theirs: dict, **known):
    values = {ours: theirs[key] for ours, key in names.items() if theirs.get(key) is not None} | known
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _sizes(measure: Callable, state: dict[str, Tensor], folder: Path):
    """The config of an original file, which has none: all sizes are in the shapes of its tensors."""
    try:
        return measure(state)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"the VAE or text encoder in {folder} is not Wan2.1's ({error}); {_advice(folder)}") from None


def _vae_sizes(state: dict[str, Tensor]) -> VAEConfig:
    dim, folded = state["encoder.conv1.weight"].shape[:2]
    widths, temporal, i = [], [], 0
    while any(name.startswith(f"encoder.downsamples.{i}.") for name in state):
        block, i = f"encoder.downsamples.{i}.", i + 1
        if block + "resample.1.weight" in state:
            temporal.append(block + "time_conv.weight" in state)
        else:
            widths.append(state[block + "residual.6.weight"].shape[0])
    blocks = len(widths) // (len(temporal) + 1)
    return VAEConfig(
        dim=dim,
        z_dim=state["conv2.weight"].shape[0],
        dim_mult=tuple(width // dim for width in widths[::blocks]),
        num_res_blocks=blocks,
        temporal_downsample=tuple(temporal),
        patch_size=round((folded / 3) ** 0.5),
    )


def _text_sizes(state: dict[str, Tensor]) -> T5Config:
    vocab_size, dim = state["token_embedding.weight"].shape
    num_buckets, num_heads = state["blocks.0.pos_embedding.embedding.weight"].shape
    return T5Config(
        vocab_size=vocab_size,
        dim=dim,
        dim_attn=state["blocks.0.attn.q.weight"].shape[0],
        dim_ffn=state["blocks.0.ffn.fc1.weight"].shape[0],
        num_heads=num_heads,
        num_layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        num_buckets=num_buckets,
    )


def _shards(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a part: one, or those of an index, or numbered ones without an index."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        parts = set(_json(index).get("weight_map", {}).values())
        names = {(index.parent / part).relative_to(folder).as_posix() for part in parts}
    elif numbered := sorted(folder.glob(f"{stem}-*-of-*.safetensors")):
        count = int(numbered[0].stem.rsplit("-", 1)[1])
        names = {f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)}
    else:
        names = {f"{stem}.safetensors"}
    return [_need(folder, name) for name in sorted(names)]


def _tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after another, read from disk only when they are used."""
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        yield name, file.get_tensor(name)
            else:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
                yield from state.get("model_state", state).items()
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot read {path} ({reason}); download or write it again") from error


class _Undrawn(TorchFunctionMode):
    """Leave out drawing and scaling of initial weights, which mean nothing without memory and cost a second there:
    torch imports its compiler to find out that they do not change a shape."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "div"):  # of the tensor and of nn.init
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _fill(
    model_class: type[nn.Module],
    config,
    table: Table,
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    device: str,
) -> nn.Module:
    """Build a model without memory and give it the tensors; every name and shape must be the model's."""
    with torch.device("meta"), _Undrawn():
        model = model_class(config)
    expected = {rename(name, table): (name, tensor.shape) for name, tensor in model.state_dict().items()}
    state, unknown, misshapen = {}, [], []
    for theirs, tensor in tensors:
        name, shape = expected.get(theirs, (None, None))
        if name is None:
            unknown.append(theirs)
        elif tensor.shape != shape:
            misshapen.append(f"{theirs} {tuple(tensor.shape)}, expected {tuple(shape)}")
            state[name] = None
        else:
            # A copy: the tensor may be a window on the file, and the file may be written anew.
            state[name] = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
    missing = [theirs for theirs, (name, _) in expected.items() if name not in state]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": misshapen}
    if found := [f"{len(names)} are {kind} (first: {names[0]})" for kind, names in kinds.items() if names]:
        raise ValueError(
            f"the {model_class.__name__} weights in {folder} are not those of its config: of {len(expected)} tensors, "
            f"{', '.join(found)}; expected a Wan2.1 text-to-video model, {_advice(folder)}"
        )
    model.load_state_dict(state, assign=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval()


def _need(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ValueError(f"{folder} has no {name}, which a Wan text-to-video model needs; {_advice(folder)}")
    return folder / name


def _advice(folder: Path) -> str:
    """Which command gets a complete published model of this folder's layout and size."""
    original = _is_original(folder)
    config = folder / ("config.json" if original else "transformer/config.json")
    large = config.is_file() and _json(config).get("num_layers") == 40
    repository = (PUBLISHED.replace("1.3B", "14B") if large else PUBLISHED) + ("" if original else "-Diffusers")
    return f"`hf download {repository} --local-dir {folder.as_posix()}` gets the published one"


def _json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cannot read {path} as JSON ({error}); download or write it again") from None


# Writing.

# Of diffusers' schedulers this one alone is Euler on `flow.sigma_schedule`, step for step. FlowMatchEuler spaces u in
# K - 1 parts and shifts its end twice; the multistep solvers hand the network whole timesteps only.
_SCHEDULER = {"_class_name": "FlowMapEulerDiscreteScheduler", "num_train_timesteps": 1000}
_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", _SCHEDULER["_class_name"]],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def _transformer_json(config: WanConfig) -> dict:
    theirs = {key: getattr(config, ours) for ours, key in TRANSFORMER_FIELDS.items()}
    if config.text_len == 512:  # diffusers does not know this key, and warns
        del theirs["text_len"]
    return {
        "_class_name": "WanTransformer3DModel",
        **theirs,
        "attention_head_dim": config.dim // config.num_heads,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }


def _vae_json(config: VAEConfig) -> dict:
    theirs = {key: getattr(config, ours) for ours, key in VAE_FIELDS.items()}
    channels = 3 * config.patch_size**2
    return {
        "_class_name": "AutoencoderKLWan",
        **theirs,
        "attn_scales": [],
        "dropout": 0.0,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": None if config.patch_size == 1 else config.patch_size,
        "scale_factor_spatial": config.patch_size * 2 ** (len(config.dim_mult) - 1),
        "scale_factor_temporal": 2 ** sum(config.temporal_downsample),
    }


def _text_json(config: T5Config) -> dict:
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        **{key: getattr(config, ours) for ours, key in TEXT_FIELDS.items()},
        "d_kv": config.dim_attn // config.num_heads,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "layer_norm_epsilon": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "relative_attention_max_distance": 128,
        "tie_word_embeddings": True,
    }


def _write(path: Path, model: nn.Module, table: Table, dtype: torch.dtype | None) -> None:
    state = {rename(name, table): tensor.to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


def _write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
