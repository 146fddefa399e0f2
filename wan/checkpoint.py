"""Base models on disk: finding, downloading, naming, streaming and writing them.

The layouts below hold the same weights. Everywhere else the names of tensors are the original ones; `names.py` says
what each is called in a -Diffusers folder.

    original     config.json, diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth,
                 google/umt5-xxl/tokenizer.json; Wan2.2 has high_noise_model/ and low_noise_model/ for the first two
    -Diffusers   model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/; Wan2.2 adds transformer_2/
    single file  FILE.safetensors, a transformer as ComfyUI has it; the other parts are those of the folder it lies in.
                 Of two experts, each lies alone in high_noise_model/ or low_noise_model/ of an original folder

    pipeline = load_pipeline("checkpoints/tiny")    # or a folder or file of yours, or Wan-AI/Wan2.1-T2V-1.3B

What a model is comes from its configs and tensors, never from its folder's name. Modules are built without memory and
filled tensor by tensor, so loading needs the size of one model, not two.
"""

import hashlib
import inspect
import json
import math
import pickle
import re
import typing
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model import Wan, WanConfig
from support.cli import replacing, write_json
from wan.names import (
    TEXT_FIELDS,
    TEXT_NAMES,
    TRANSFORMER_FIELDS,
    TRANSFORMER_NAMES,
    VAE_FIELDS,
    Table,
    rename,
    vae_names,
)
from wan.text import T5Config, Tokenizer, UMT5Encoder, tokenizer_files
from wan.vae import VAEConfig, WanVAE

PARTS = ("transformer", "transformer_2", "vae", "text_encoder")  # what has weights; the second is the low-noise expert
VAE_FILE, TEXT_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"
HEAD_SIZE = 128  # of every published Wan transformer; nothing in a single file says it


@dataclass(frozen=True)
class Preset:
    """How a model is best sampled: what its weights do not say. The defaults are those of Wan2.1-T2V-1.3B."""

    size: tuple[int, int] = (832, 480)  # width and height in pixels
    frames: int = 81
    fps: float = 16.0
    steps: int = 30
    shift: float = 5.0
    guidance: float = 3.0
    noise: float | None = None  # m of every condition; None: each task's own
    strength: float = 1.4  # of a LoRA for which the user names none
    boundary: float = 0.875  # of two experts, the low-noise one runs where sigma, before multipliers, is below this
    guidance_2: float | None = None  # of the low-noise expert; None: as of the other
    negative_prompt: str = (
        "oversaturated, overexposed, static, blurry details, subtitles, style, painting, picture, still, grey overall, "
        "worst quality, low quality, JPEG artifacts, ugly, incomplete, extra fingers, badly drawn hands and faces, "
        "deformed, disfigured, malformed limbs, fused fingers, motionless, cluttered background, walking backwards"
    )


# The published text-to-video models, and how Pusa samples each: alike, but for what the model was made for.
PRESETS = {
    "Wan-AI/Wan2.1-T2V-1.3B": Preset(),
    "Wan-AI/Wan2.1-T2V-14B": Preset(size=(1280, 720)),
    "Wan-AI/Wan2.2-T2V-A14B": Preset(size=(1280, 720)),
}
SMALL, LARGE, TWO_EXPERTS = PRESETS


@dataclass
class Pipeline:
    """The parts of a text-to-video model, ready to run, and how it is best sampled."""

    transformer: Wan
    vae: WanVAE
    text_encoder: UMT5Encoder
    tokenizer: Tokenizer
    preset: Preset
    transformer_2: Wan | None = None  # Wan2.2's low-noise expert; `transformer` is then the high-noise one


class Opened:
    """A model that is found and known: its config and preset, and its parts, each loaded when it is asked for."""

    def __init__(self, name: str | Path, network: type[nn.Module]):
        self.name = str(name)
        self.folder = _folder(find_model(name, parts=()))
        self.config, self.preset, self.two_experts = load_config(name), load_preset(name), has_two_experts(name)

    def fetch(self) -> None:
        """Download the weights of all parts that are not here yet, before any work is done."""
        find_model(self.name)

    def transformer(self, dtype: torch.dtype | None = None, device: str = "cpu", expert: str = "high") -> Wan:
        return load_transformer(self.name, dtype, device, expert)

    def vae(self, dtype: torch.dtype | None = torch.float32, device: str = "cpu") -> WanVAE:
        return load_vae(self.name, dtype, device)

    def text_encoder(self, dtype: torch.dtype | None = None, device: str = "cpu") -> UMT5Encoder:
        return load_text_encoder(self.name, dtype, device)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.name)

    def outline(self) -> tuple[Wan, WanVAE, UMT5Encoder]:
        """Transformer, VAE and text encoder without memory, to be measured."""
        return outline(self.name)

    def encode_prompts(
        self, prompts: Iterable[str], dtype: torch.dtype, device: str, cache_folder: str | Path
    ) -> Callable[[list[str]], Tensor]:
        """A function from some of these prompts to their embeddings (B, text_len, text_dim), on the CPU.

        Each prompt is encoded once ever and kept in `cache_folder`; the encoder is loaded only for one that is not
        there, and gone when this returns.
        """
        from support import cache
        from wan.text import padded

        prompts = list(dict.fromkeys(prompts))
        stored = cache.prompts(self.name, prompts, dtype, device, cache_folder)
        index = {prompt: i for i, prompt in enumerate(prompts)}
        return lambda texts: padded([stored[index[prompt]] for prompt in texts], self.config.text_len)


def open(name: str | Path, network: type[nn.Module]) -> Opened:
    """Find or download a model, and decide its layout, once. network: the transformer's class, `model.Wan`."""
    return Opened(name, network)


def load_preset(model: str | Path) -> Preset:
    """What the folder's `sampling.json` says, and for what it leaves out, the published settings of such a model."""
    model = find_model(model, parts=())
    preset, folder = PRESETS[_published(model)], _folder(model)
    index, path = folder / "model_index.json", folder / "sampling.json"
    if index.is_file() and (boundary := _json(index).get("boundary_ratio")) is not None:
        preset = replace(preset, boundary=boundary)
    entries = _json(path) if path.is_file() else {}
    unknown = entries.keys() - {field.name for field in fields(Preset)}
    if unknown:
        raise ValueError(f"{path} has {sorted(unknown)}, expected only the fields of checkpoint.Preset; remove them")
    kinds = {field.name: field.type for field in fields(Preset)}
    for name, value in entries.items():
        if not _fits(value, kinds[name]):
            kind = inspect.formatannotation(kinds[name])
            raise ValueError(f"{path} has {name} {json.dumps(value)}, expected {kind}; mend or remove it")
    return replace(preset, **{**entries, "size": tuple(entries.get("size", preset.size))})


def _fits(value, kind) -> bool:
    """Whether a value of JSON is of a type such as int, `float | None` or `tuple[int, int]`."""
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        return isinstance(value, list) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    return isinstance(value, kind) and not isinstance(value, bool) or type(value) is int and isinstance(0.0, kind)


def save_preset(folder: str | Path, preset: Preset) -> None:
    write_json(Path(folder) / "sampling.json", asdict(preset))


def load_pipeline(model: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Pipeline:
    """Load all parts of a model that is on disk, or on Hugging Face, from where it is downloaded.

    `dtype` is for the transformers and the text encoder, None as stored; the VAE is always fp32.
    """
    path = find_model(model)
    return Pipeline(
        transformer=load_transformer(path, dtype, device),
        transformer_2=load_transformer(path, dtype, device, expert="low") if has_two_experts(path) else None,
        vae=load_vae(path, device=device),
        text_encoder=load_text_encoder(path, dtype, device),
        tokenizer=load_tokenizer(path),
        preset=load_preset(path),
    )


def find_model(model: str | Path, parts: tuple[str, ...] = PARTS) -> Path:
    """The folder or `.safetensors` file of a model on disk; the name `owner/repository` is downloaded if it is neither.

    parts: those whose weights are needed; `()` is enough for configs, tokenizer and preset, a few megabytes.
    """
    path = Path(model)
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    is_file_name = path.exists() or path.suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".gguf")
    if is_file_name or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)):
        raise ValueError(
            f"got {model} as a model, expected a folder, a .safetensors file "
            f"or a Hugging Face repository such as {SMALL}"
        )
    descriptions = "*.json"  # a star matches slashes too
    folder = _download(str(model), (descriptions,))
    if not (folder / (_home(folder, "transformer") + "config.json")).is_file():
        raise ValueError(f"the repository {model} has no config of a Wan transformer; use one such as {SMALL}")
    _transformer_config(folder)  # refuse a model of another kind before its gigabytes arrive
    parts = tuple(part for part in parts if part != "transformer_2" or has_two_experts(folder))
    files = [name for part in parts for name in _weight_files(folder, part)]
    return _download(str(model), (descriptions, *files)) if files else folder


def has_two_experts(model: str | Path) -> bool:
    """Whether a model has a transformer for high and one for low noise, as Wan2.2-T2V-A14B has."""
    path = find_model(model, parts=())
    index = path / "model_index.json"
    if index.is_file():  # it lists each part as [library, class], and [null, null] for one that is not there
        return any(_json(index).get("transformer_2") or ())
    return (path / "high_noise_model").is_dir()


def load_config(model: str | Path) -> WanConfig:
    """The sizes of a model's transformer, without its weights."""
    return _transformer_config(find_model(model, parts=()))


def load_transformer(
    model: str | Path, dtype: torch.dtype | None = None, device: str = "cpu", expert: str = "high"
) -> Wan:
    """The diffusion transformer alone; of two experts the one for "high" or "low" noise.

    `dtype` None keeps the type that is stored, but for fp8, in which nothing can be computed: that becomes bf16.
    """
    part = {"high": "transformer", "low": "transformer_2"}[expert]
    model = find_model(model, (part,))
    if expert == "low" and not has_two_experts(model):
        raise ValueError(f"{model} has one transformer, expected two; leave out what is for the low-noise one")
    config, stored = _transformer_config(model, part), _part(model, part)
    if dtype is None and any(tensor.fp8 for tensor in stored.values()):
        dtype = torch.bfloat16
    table = () if model.is_file() or _is_original(model) else TRANSFORMER_NAMES
    return _fill(Wan, config, table, model, stored, dtype, device)


def load_vae(model: str | Path, dtype: torch.dtype | None = torch.float32, device: str = "cpu") -> WanVAE:
    """The VAE alone, in fp32 unless told otherwise; the published latent statistics where the files have none."""
    model = find_model(model, ("vae",))
    if _is_original(model):
        stored = _part(model, "vae")
        return _fill(WanVAE, _measure(_vae_sizes, stored, VAE_FILE, model), (), model, stored, dtype, device)
    config = _vae_config(model)
    return _fill(WanVAE, config, vae_names(config.num_res_blocks), model, _part(model, "vae"), dtype, device)


def load_text_encoder(model: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> UMT5Encoder:
    """The umT5 encoder alone; `dtype` None keeps the type that is stored (bf16 in the published files)."""
    model = find_model(model, ("text_encoder",))
    if _is_original(model):
        stored = _part(model, "text_encoder")
        return _fill(UMT5Encoder, _measure(_text_sizes, stored, TEXT_FILE, model), (), model, stored, dtype, device)
    config = _text_config(model)
    # Some files name the token embedding as the encoder's own: it is the same tensor.
    stored = _part(model, "text_encoder").items()
    stored = {name.replace("encoder.embed_tokens.", "shared."): tensor for name, tensor in stored}
    return _fill(UMT5Encoder, config, TEXT_NAMES, model, stored, dtype, device)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer, padding to the `text_len` of the transformer's config (512 in the published models)."""
    model = find_model(model, parts=())
    return Tokenizer(_tokenizer_file(model), _transformer_config(model).text_len)


def text_fingerprint(model: str | Path) -> str:
    """A name for what prompts become, wherever the model lies: by its tokenizer, its config and some of its weights.

    Of a file of weights its size and 64 pages, evenly spaced, are read: all of 11 GB would take longer than a prompt.
    Training changes them all; whoever edits a few by hand empties the folder of what is kept.
    """
    model = find_model(model, ("text_encoder",))
    digest = hashlib.sha256(_tokenizer_file(model).read_bytes())
    digest.update(repr(T5Config() if _is_original(model) else _text_config(model)).encode())
    for path in (_need(model, name) for name in _weight_files(model, "text_encoder")):
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for page in range(64):
                file.seek(page * size // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()


def outline(model: str | Path) -> tuple[Wan, WanVAE, UMT5Encoder]:
    """Transformer, VAE and text encoder without memory, to be measured, from the configs alone.

    The original layout has none for the last two, whose sizes are then the published ones.
    """
    model = find_model(model, parts=())
    vae, text = (VAEConfig(), T5Config()) if _is_original(model) else (_vae_config(model), _text_config(model))
    with torch.device("meta"), _Undrawn():
        return Wan(_transformer_config(model)), WanVAE(vae), UMT5Encoder(text)


def save_pipeline(
    folder: str | Path,
    transformer: Wan | None = None,
    vae: WanVAE | None = None,
    text_encoder: UMT5Encoder | None = None,
    tokenizer: Tokenizer | tokenizers.Tokenizer | None = None,
    shift: float = 5.0,
    dtype: Mapping[str, torch.dtype] | None = None,
    transformer_2: Wan | None = None,
    boundary: float = Preset.boundary,
) -> None:
    """Write the parts that are given as a -Diffusers folder; parts that are there and not given stay as they are.

    `dtype` says which parts are stored in another type, such as `{"vae": torch.float16}`. The files that describe the
    whole (`model_index.json`, `scheduler/`) are written with the transformer, of two experts with both.
    """
    folder, dtype = Path(folder), dtype or {}
    if unknown := dtype.keys() - set(PARTS):
        raise ValueError(f"got a dtype for {sorted(unknown)}, expected one for {', '.join(PARTS)}")
    if tokenizer is not None:
        text_len = getattr(tokenizer, "text_len", None) or getattr(transformer, "config", WanConfig).text_len
        plain = tokenizers.Tokenizer.from_str(getattr(tokenizer, "tokenizer", tokenizer).to_str())
        plain.no_padding()  # who reads the file sets these two by itself
        plain.no_truncation()
        for name, content in tokenizer_files(plain, text_len).items():
            with replacing(folder / "tokenizer" / name) as path:
                path.write_text(content, encoding="utf-8")
    if text_encoder is not None:
        path = folder / "text_encoder" / "model.safetensors"
        _write(path, text_encoder, TEXT_NAMES, dtype.get("text_encoder"))
        write_json(path.with_name("config.json"), _text_json(text_encoder.config))
    if vae is not None:
        path = folder / "vae" / "diffusion_pytorch_model.safetensors"
        _write(path, vae, vae_names(vae.config.num_res_blocks), dtype.get("vae"))
        write_json(path.with_name("config.json"), _vae_json(vae.config))
    for part, model in (("transformer", transformer), ("transformer_2", transformer_2)):
        if model is not None:
            path = folder / part / "diffusion_pytorch_model.safetensors"
            _write(path, model, TRANSFORMER_NAMES, dtype.get(part))
            write_json(path.with_name("config.json"), _transformer_json(model.config))
    if transformer is not None:
        both = {"transformer_2": _INDEX["transformer"], "boundary_ratio": boundary}
        write_json(folder / "scheduler" / "scheduler_config.json", {**_SCHEDULER, "shift": shift})
        write_json(folder / "model_index.json", {**_INDEX, **(both if transformer_2 else {})})


# Reading.


@cache  # every part that is loaded asks again
def _download(repository: str, patterns: tuple[str, ...]) -> Path:
    """The files of a repository that match; progress, resuming, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE are the library's."""
    from huggingface_hub import snapshot_download  # here, because importing it takes long

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # network, spelling, permission, disk: the library has many kinds
        raise ValueError(
            f"{repository} is no folder here and cannot be had from Hugging Face: {_cause(error, repository)}"
        ) from error


def _cause(error: Exception, repository: str) -> str:
    """Why a download failed and what to do, in one clause."""
    from huggingface_hub import constants, errors

    origin = error.__cause__ or error
    status = getattr(getattr(origin, "response", None), "status_code", None)
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and what was downloaded before lacks it; unset it until it is here"
    if isinstance(origin, errors.GatedRepoError) or status == 403:
        return f"access is restricted; ask for it at https://huggingface.co/{repository} and set HF_TOKEN"
    if isinstance(origin, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"there is none, or it is private; check the name, as in {SMALL}, or set HF_TOKEN"
    reason = (str(origin) or type(origin).__name__).splitlines()[0]
    if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError)):
        return f"it cannot be reached ({reason}); check the network, or name a folder"
    return f"{reason}; when that is mended, the same command goes on where it stopped"


def _folder(model: Path) -> Path:
    return model.parent if model.is_file() else model


def _is_original(model: Path) -> bool:
    """Whether the parts are where the authors of Wan put them; those beside a single file are, if in no other place."""
    folder = _folder(model)
    known = model.is_file() or (folder / "config.json").is_file() or (folder / "high_noise_model").is_dir()
    return known and not (folder / "model_index.json").is_file()


def _single_file(model: Path, part: str) -> Path | None:
    """Where a transformer is one file without a config: the model itself, or alone in the folder of an expert."""
    if model.is_file():
        return model
    if not (_is_original(model) and has_two_experts(model)):
        return None
    home = model / _home(model, part)
    files = [] if (home / "config.json").is_file() else list(home.glob("*.safetensors"))
    return files[0] if len(files) == 1 else None


def _home(model: Path, part: str) -> str:
    """What the names of a transformer's files start with."""
    if not _is_original(model):
        return f"{part}/"
    if not has_two_experts(model):
        return ""
    return "high_noise_model/" if part == "transformer" else "low_noise_model/"


def _weight_files(model: Path, part: str) -> list[str]:
    """The names of the files with a part's weights: one, or those of an index, or numbered ones without an index."""
    folder, original = _folder(model), _is_original(model)
    if original and part in ("vae", "text_encoder"):
        return [VAE_FILE if part == "vae" else TEXT_FILE]
    home = f"{part}/" if part in ("vae", "text_encoder") else _home(model, part)
    stem = home + ("model" if part == "text_encoder" else "diffusion_pytorch_model")
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        return sorted({home + name for name in _json(index).get("weight_map", {}).values()})
    if numbered := sorted(folder.glob(f"{stem}-*-of-*.safetensors")):
        count = int(numbered[0].stem.rsplit("-", 1)[1])
        return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [f"{stem}.safetensors"]


def _transformer_config(model: Path, part: str = "transformer") -> WanConfig:
    """The config, in any layout; one sentence for a model that is not text-to-video."""
    if single := _single_file(model, part):
        name = single.relative_to(_folder(model)).as_posix()
        config = _measure(_transformer_sizes, _comfy(single), name, model)
    else:
        path = _need(model, _home(model, part) + "config.json")
        theirs = _json(path)
        if _is_original(model):
            config = WanConfig.from_json(path)
        else:
            dim = theirs.get("num_attention_heads", 40) * theirs.get("attention_head_dim", 128)  # diffusers' defaults
            kind = "i2v" if theirs.get("image_dim") or theirs.get("added_kv_proj_dim") else "t2v"
            config = _config(WanConfig, TRANSFORMER_FIELDS, theirs, dim=dim, model_type=kind)
        class_name = theirs.get("_class_name", "WanModel")
        if class_name not in ("WanModel", "WanTransformer3DModel"):
            config = replace(config, model_type=str(class_name))
    kind = config.model_type.lower()
    if "vace" in kind:
        found = "a VACE model"
    elif kind == "ti2v" or config.out_dim == 48:
        found = f"a TI2V model of {config.out_dim} latent channels, with another VAE"
    elif kind in ("i2v", "flf2v") or config.in_dim == 36:
        found = f"an image-conditioned (I2V) model of {config.in_dim} input channels"
    elif kind != "t2v" or config.in_dim != config.out_dim:
        found = f"a {config.model_type} model of {config.in_dim} input and {config.out_dim} output channels"
    else:
        return config
    raise ValueError(
        f"{model} is {found}, expected a text-to-video (T2V) model: it serves every task here; "
        f"use {SMALL}, {LARGE} or {TWO_EXPERTS}"
    )


def _vae_config(model: Path) -> VAEConfig:
    path = _need(model, "vae/config.json")
    theirs = _json(path)
    if theirs.get("is_residual") or theirs.get("_class_name", "AutoencoderKLWan") != "AutoencoderKLWan":
        raise ValueError(f"{path} is not a Wan2.1 VAE (AutoencoderKLWan without is_residual); {_advice(model)}")
    return _config(VAEConfig, VAE_FIELDS, theirs, patch_size=theirs.get("patch_size") or 1)


def _text_config(model: Path) -> T5Config:
    theirs = _json(_need(model, "text_encoder/config.json"))
    dim_attn = theirs.get("num_heads", 6) * theirs.get("d_kv", 64)  # transformers' defaults
    return _config(T5Config, TEXT_FIELDS, theirs, dim_attn=dim_attn)


def _tokenizer_file(model: Path) -> Path:
    return _need(model, "google/umt5-xxl/tokenizer.json" if _is_original(model) else "tokenizer/tokenizer.json")


def _config(config_class: type, names: dict[str, str], theirs: dict, **known):
    values = {ours: theirs[key] for ours, key in names.items() if theirs.get(key) is not None} | known
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


class Stored(NamedTuple):
    """A tensor in a file, which `read` reads."""

    shape: tuple[int, ...]
    fp8: bool
    read: Callable[[], Tensor]


def _measure(sizes: Callable, stored: Mapping[str, Stored], name: str, model: Path):
    """The config of the file of that name, which comes without one: all sizes are in the shapes of its tensors."""
    try:
        return sizes(stored)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        reason = f"no tensor {error.args[0]}" if isinstance(error, KeyError) else error
        found = f"the weights in {_folder(model) / name} are not Wan2.1's ({reason})"
        raise ValueError(f"{found}; {_advice(model)}") from None


def _layers(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _transformer_sizes(stored: Mapping[str, Stored]) -> WanConfig:
    dim, in_dim, *patch_size = stored["patch_embedding.weight"].shape
    if dim % HEAD_SIZE:
        raise ValueError(f"width {dim}, expected a multiple of {HEAD_SIZE}, the size of a head")
    modules = {name.split(".")[0] for name in stored}
    return WanConfig(
        dim=dim,
        ffn_dim=stored["blocks.0.ffn.0.weight"].shape[0],
        freq_dim=stored["time_embedding.0.weight"].shape[1],
        in_dim=in_dim,
        out_dim=stored["head.head.weight"].shape[0] // math.prod(patch_size),
        num_heads=dim // HEAD_SIZE,
        num_layers=_layers(stored),
        text_dim=stored["text_embedding.0.weight"].shape[1],
        patch_size=tuple(patch_size),
        model_type="vace" if "vace_blocks" in modules else "i2v" if "img_emb" in modules else "t2v",
    )


def _vae_sizes(state: Mapping[str, Stored]) -> VAEConfig:
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


def _text_sizes(state: Mapping[str, Stored]) -> T5Config:
    vocab_size, dim = state["token_embedding.weight"].shape
    num_buckets, num_heads = state["blocks.0.pos_embedding.embedding.weight"].shape
    return T5Config(
        vocab_size=vocab_size,
        dim=dim,
        dim_attn=state["blocks.0.attn.q.weight"].shape[0],
        dim_ffn=state["blocks.0.ffn.fc1.weight"].shape[0],
        num_heads=num_heads,
        num_layers=_layers(state),
        num_buckets=num_buckets,
    )


def _part(model: Path, part: str) -> dict[str, Stored]:
    """What the files with a part's weights hold."""
    if part in ("transformer", "transformer_2") and (single := _single_file(model, part)):
        return _comfy(single)
    return _stored(_need(model, name) for name in _weight_files(model, part))


def _stored(files: Iterable[Path]) -> dict[str, Stored]:
    """What the files hold, by name. Nothing is read yet."""
    stored = {}
    for path in files:
        with _reading(path):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():
                        entry = file.get_slice(name)
                        is_fp8 = entry.get_dtype().startswith("F8")
                        stored[name] = Stored(tuple(entry.get_shape()), is_fp8, partial(_read, path, name))
            else:  # mapped, so that what is cast or moved to a GPU is never all in memory twice
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
                state = state.get("model_state", state)
                stored |= {name: Stored(tuple(value.shape), False, value.detach) for name, value in state.items()}
    return stored


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


def _comfy(path: Path) -> dict[str, Stored]:
    """The transformer of a single file under its original names; fp8 weights get their scales as they are read."""
    stored = _stored([path])
    prefixes = ("model.diffusion_model.", "diffusion_model.")
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in stored)), "")
    stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
    marked = stored.pop("scaled_fp8", None) is not None
    for name, tensor in list(stored.items()):
        if not tensor.fp8 or len(tensor.shape) != 2:
            continue
        stored.pop(name.removesuffix("weight") + "scale_input", None)  # for products in fp8, which nobody does here
        scale = stored.pop(name.removesuffix("weight") + "scale_weight", None)
        if scale and scale.shape in ((), (1,), (1, 1), (tensor.shape[0], 1)):
            stored[name] = tensor._replace(read=partial(_scaled, tensor, scale))
        elif scale or marked:
            found = f"a scale of {scale.shape}" if scale else "no scale"
            raise ValueError(
                f"{path} has {found} for {name}, expected one a tensor or row; use another copy of the model"
            )
    return stored


def _scaled(weight: Stored, scale: Stored) -> Tensor:
    """W = fp8 · scale, in fp32."""
    return weight.read().float() * scale.read().float()


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
    model: Path,
    stored: Mapping[str, Stored],
    dtype: torch.dtype | None,
    device: str,
) -> nn.Module:
    """Build a module without memory and give it the tensors; every name and shape must be the module's."""
    with torch.device("meta"), _Undrawn():
        module = model_class(config)
    expected = {rename(name, table): (name, tuple(tensor.shape)) for name, tensor in module.state_dict().items()}
    kinds = {
        "missing": [name for name in expected if name not in stored],
        "unknown": [name for name in stored if name not in expected],
        "of another shape": [
            f"{name} {stored[name].shape}, expected {shape}"
            for name, (_, shape) in expected.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    if found := [f"{len(names)} are {kind} (first: {names[0]})" for kind, names in kinds.items() if names]:
        raise ValueError(
            f"the {model_class.__name__} weights in {model} are not those of its config: of {len(expected)} tensors, "
            f"{', '.join(found)}; expected a Wan2.1 text-to-video model, {_advice(model)}"
        )
    state = {}
    for theirs, (name, _) in expected.items():
        tensor = stored[theirs].read()
        if not tensor.is_floating_point():
            raise ValueError(f"{theirs} in {model} is of {tensor.dtype}, expected floating point; use another copy")
        state[name] = tensor = tensor.to(device, dtype)
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise ValueError(f"{theirs} in {model} holds NaN or infinity as {tensor.dtype}; {_advice(model)}")
    module.load_state_dict(state, assign=True)
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    return module.eval()


def _need(model: Path, name: str) -> Path:
    folder = _folder(model)
    if not (folder / name).is_file():
        raise ValueError(f"{folder} has no {name}, which a Wan text-to-video model needs; {_advice(model, name)}")
    return folder / name


def _advice(model: Path, name: str = "") -> str:
    """Which command gets the published model of this layout and size, or the part of it that a missing file is of."""
    repository = _published(model) + ("" if _is_original(model) else "-Diffusers")
    what = f'--include "{name.split("/")[0]}/*" ' if "/" in name else f"{name} " if name else ""
    return f"`hf download {repository} {what}--local-dir {_folder(model).as_posix()}` gets the published one"


def _published(model: Path) -> str:
    """The published model with as many experts and layers: its settings are fit, and its files can stand in."""
    if has_two_experts(model):
        return TWO_EXPERTS
    if model.is_file():
        layers = _layers(_comfy(model))
    else:
        config = model / (_home(model, "transformer") + "config.json")
        layers = _json(config).get("num_layers") if config.is_file() else None
    return LARGE if layers == 40 else SMALL


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got a {type(content).__name__}")
        return content
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
