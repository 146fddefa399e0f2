"""Base models: finding, downloading, reading and writing them.

    model = open("checkpoints/tiny", Wan)    # or a folder or file of yours, or Wan-AI/Wan2.1-T2V-1.3B
    model.config, model.preset               # the transformer's sizes, and how the model is best sampled
    model.transformer(), model.vae(), ...    # its parts, each loaded when it is asked for

The layouts below hold the same weights. Everywhere else the names of tensors are the original ones; `names.py` says
what each is called in a -Diffusers folder.

    original     config.json, diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth,
                 google/umt5-xxl/tokenizer.json; Wan2.2 has high_noise_model/ and low_noise_model/ for the first two
    -Diffusers   model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/; Wan2.2 adds transformer_2/
    single file  FILE.safetensors, a transformer as ComfyUI has it; the other parts are those of the folder it lies in.
                 Of two experts, each lies alone in high_noise_model/ or low_noise_model/ of an original folder

What a model is comes from its configs and tensors, never from its folder's name. Modules are built without memory and
filled tensor by tensor, so loading needs the size of one model, not two.
"""

import functools
import hashlib
import inspect
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from support import cache
from support.cli import fits, replacing, write_json
from wan import configs, names, text
from wan.vae import VAEConfig, WanVAE

PARTS = ("transformer", "transformer_2", "vae", "text_encoder")  # what has weights; the second is the low-noise expert
VAE_FILE, TEXT_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"


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


# Layouts: where the files of a part are, and what its tensors are called. `config_file` is None where a part has no
# config: its sizes are then those of its tensors.


class Diffusers:
    """A -Diffusers folder."""

    suffix, tokenizer_file = "-Diffusers", "tokenizer/tokenizer.json"

    def __init__(self, folder: Path):
        self.folder, index = folder, folder / "model_index.json"
        # The index lists each part as [library, class], and as [null, null] if it is not there.
        self.two_experts = index.is_file() and any(_json(index).get("transformer_2") or ())

    def weight_files(self, part: str) -> list[str]:
        return _shards(self.folder, f"{part}/" + ("model" if part == "text_encoder" else "diffusion_pytorch_model"))

    def config_file(self, part: str) -> str | None:
        return f"{part}/config.json"

    def table(self, part: str, config: Any) -> names.Table:
        if part == "vae":
            return names.vae_names(config.num_res_blocks)
        return names.TEXT_NAMES if part == "text_encoder" else names.TRANSFORMER_NAMES


class Original:
    """The folder that the authors of Wan publish."""

    suffix, tokenizer_file = "", "google/umt5-xxl/tokenizer.json"

    def __init__(self, folder: Path):
        self.folder, self.two_experts = folder, (folder / "high_noise_model").is_dir()

    def weight_files(self, part: str) -> list[str]:
        if part in ("vae", "text_encoder"):
            return [VAE_FILE if part == "vae" else TEXT_FILE]
        return self._alone(part) or _shards(self.folder, self._home(part) + "diffusion_pytorch_model")

    def config_file(self, part: str) -> str | None:
        has_none = part in ("vae", "text_encoder") or self._alone(part)
        return None if has_none else self._home(part) + "config.json"

    def table(self, part: str, config: Any) -> names.Table:
        return ()

    def _home(self, part: str) -> str:
        return {"transformer": "high_noise_model/", "transformer_2": "low_noise_model/"}[part] * self.two_experts

    def _alone(self, part: str) -> list[str]:
        """The single file that an expert's folder may have in place of config and weights."""
        home = self.folder / self._home(part)
        files = [] if not self.two_experts or (home / "config.json").is_file() else list(home.glob("*.safetensors"))
        return [self._home(part) + files[0].name] if len(files) == 1 else []


class SingleFile:
    """A transformer that is one file; the other parts are those of the folder around it."""

    two_experts = False

    def __init__(self, file: Path):
        self.file, self.folder = file, file.parent
        self.beside = (Diffusers if (self.folder / "model_index.json").is_file() else Original)(self.folder)
        self.suffix, self.tokenizer_file = self.beside.suffix, self.beside.tokenizer_file

    def weight_files(self, part: str) -> list[str]:
        return [self.file.name] if part == "transformer" else self.beside.weight_files(part)

    def config_file(self, part: str) -> str | None:
        return None if part == "transformer" else self.beside.config_file(part)

    def table(self, part: str, config: Any) -> names.Table:
        return () if part == "transformer" else self.beside.table(part, config)


def _layout(path: Path) -> Diffusers | Original | SingleFile:
    if path.is_file():
        return SingleFile(path)
    original = (path / "config.json").is_file() or (path / "high_noise_model").is_dir()
    return Original(path) if original and not (path / "model_index.json").is_file() else Diffusers(path)


def _shards(folder: Path, stem: str) -> list[str]:
    """The names of the files with a part's weights: one, or those of an index, or numbered ones without an index."""
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():
        home = stem[: stem.rfind("/") + 1]
        return sorted({home + name for name in _json(index).get("weight_map", {}).values()})
    if numbered := sorted(folder.glob(f"{stem}-*-of-*.safetensors")):
        count = int(numbered[0].stem.rsplit("-", 1)[1])
        return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [f"{stem}.safetensors"]


# A model.


def open(name: str | Path, network: type[nn.Module]) -> "Opened":
    """Find a model: a folder, a `.safetensors` file, or the name `owner/repository` of one on Hugging Face.

    network: the class of the transformer, `model.Wan`. Of a repository the descriptions are downloaded now, a few
    megabytes, and weights when their part is asked for. ValueError if there is no such model, or it is no text-to-video
    model.
    """
    path, repository = Path(name), None
    if not (path.is_dir() or (path.is_file() and path.suffix == ".safetensors")):
        is_file_name = path.exists() or path.suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".gguf")
        if is_file_name or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
            raise ValueError(
                f"got {name} as a model, expected a folder, a .safetensors file "
                f"or a Hugging Face repository such as {SMALL}"
            )
        repository = str(name)
        path = _download(repository, ("*.json",))  # a star matches slashes too
    opened = Opened(str(name), path, network, repository)
    if repository:
        described = opened.layout.config_file("transformer")
        if described is None or not (path / described).is_file():
            raise ValueError(f"the repository {name} has no config of a Wan transformer; use one such as {SMALL}")
        opened.config  # noqa: B018  a model of another kind is refused before its gigabytes arrive
    return opened


class Opened:
    """A model that was found: its config and preset, and its parts, each loaded when it is asked for.

    `dtype` of a part is the type to hold it in; None keeps the stored one. All parts are in evaluation mode.
    """

    def __init__(self, name: str, path: Path, network: type[nn.Module], repository: str | None):
        self.name, self.network, self.repository = name, network, repository
        self.layout = _layout(path)
        self.folder, self.two_experts = self.layout.folder, self.layout.two_experts

    @cached_property
    def config(self) -> Any:
        """The sizes of the transformer, a `network.config_class`; of two experts, of the one for high noise."""
        return self._config("transformer")

    @cached_property
    def preset(self) -> Preset:
        """What the folder's `sampling.json` says; what it leaves out is as published for such a model."""
        preset, index, path = PRESETS[self.published], self.folder / "model_index.json", self.folder / "sampling.json"
        if index.is_file() and (boundary := _json(index).get("boundary_ratio")) is not None:
            preset = replace(preset, boundary=boundary)
        entries = _json(path) if path.is_file() else {}
        kinds = {field.name: field.type for field in fields(Preset)}
        if unknown := entries.keys() - kinds.keys():
            raise ValueError(
                f"{path} has {sorted(unknown)}, expected only the fields of checkpoint.Preset; remove them"
            )
        for name, value in entries.items():
            if not fits(value, kinds[name]):
                kind = inspect.formatannotation(kinds[name])
                raise ValueError(f"{path} has {name} {json.dumps(value)}, expected {kind}; mend or remove it")
        return replace(preset, **{**entries, "size": tuple(entries.get("size", preset.size))})

    @cached_property
    def published(self) -> str:
        """The published model with as many experts and layers: its settings are fit, and its files can stand in."""
        if self.two_experts:
            return TWO_EXPERTS
        name = self.layout.config_file("transformer")
        if name is None:
            layers = configs.layers(self._stored("transformer"))
        else:
            layers = _json(self.folder / name).get("num_layers") if (self.folder / name).is_file() else None
        return LARGE if layers == 40 else SMALL

    def fetch(self, parts: Iterable[str] = PARTS) -> None:
        """Download the weights of these parts that are not here yet, all before any is loaded."""
        if self.repository:
            parts = [part for part in parts if part != "transformer_2" or self.two_experts]
            files = [name for part in parts for name in self.layout.weight_files(part)]
            _download(self.repository, ("*.json", *files))

    def transformer(self, dtype: torch.dtype | None = None, device: str = "cpu", expert: str = "high") -> nn.Module:
        """The diffusion transformer; of two experts the one for "high" or "low" noise.

        Nothing can be computed in fp8: stored weights of that type become bf16 unless `dtype` says otherwise.
        """
        part = {"high": "transformer", "low": "transformer_2"}[expert]
        if expert == "low" and not self.two_experts:
            raise ValueError(f"{self.name} has one transformer, expected two; leave out what is for the low-noise one")
        self.fetch([part])
        config, stored = self._config(part), self._stored(part)
        if dtype is None and any(tensor.fp8 for tensor in stored.values()):
            dtype = torch.bfloat16
        return self._fill(self.network, part, config, stored, dtype, device)

    def vae(self, dtype: torch.dtype | None = torch.float32, device: str = "cpu") -> WanVAE:
        """The VAE, with the published statistics of latents where the files have none."""
        self.fetch(["vae"])
        return self._fill(WanVAE, "vae", self._config("vae"), self._stored("vae"), dtype, device)

    def text_encoder(self, dtype: torch.dtype | None = None, device: str = "cpu") -> text.UMT5Encoder:
        """The umT5 encoder, which the published files store in bf16."""
        self.fetch(["text_encoder"])
        # Some files name the token embedding as the encoder's own: it is the same tensor.
        stored = self._stored("text_encoder").items()
        stored = {name.replace("encoder.embed_tokens.", "shared."): tensor for name, tensor in stored}
        return self._fill(text.UMT5Encoder, "text_encoder", self._config("text_encoder"), stored, dtype, device)

    def tokenizer(self) -> text.Tokenizer:
        """The tokenizer, padding to the `text_len` of the transformer's config (512 in the published models)."""
        return text.Tokenizer(self._need(self.layout.tokenizer_file), self.config.text_len)

    def encode_prompts(
        self, prompts: Iterable[str], dtype: torch.dtype, device: str, cache_folder: Path | str
    ) -> Callable[[list[str]], Tensor]:
        """A function from any of these prompts to their embeddings, (B, text_len, text_dim) in fp32 on the CPU.

        Each prompt is encoded once ever: `cache_folder` keeps its embedding without the padding, which is zero. Only
        for a prompt that is not there the encoder is loaded, and it is gone when this returns.
        """
        tokenizer, prompts = self.tokenizer(), list(dict.fromkeys(prompts))
        encoder = functools.cache(lambda: self.text_encoder(dtype, device))

        def embed(prompt: str) -> Tensor:
            embedding = text.embed(tokenizer, encoder(), [prompt])[0]
            return embedding[embedding.any(-1)]

        # Another device, or type, gives other bits.
        name = f"{self._text_fingerprint()} {tokenizer.text_len} {dtype} {torch.device(device).type}"
        embeddings = cache.embeddings(prompts, embed, name, cache_folder)
        index = {prompt: i for i, prompt in enumerate(prompts)}
        return lambda some: text.padded([embeddings[index[prompt]] for prompt in some], tokenizer.text_len)

    def outline(self) -> tuple[nn.Module, WanVAE, text.UMT5Encoder]:
        """Transformer, VAE and text encoder without memory, to be measured, from the configs alone.

        The original layout has none for the last two, whose sizes are then the published ones.
        """
        described = self.layout.config_file("vae") is not None
        vae = self._config("vae") if described else VAEConfig()
        encoder = self._config("text_encoder") if described else text.T5Config()
        with torch.device("meta"), _Undrawn():
            return self.network(self.config), WanVAE(vae), text.UMT5Encoder(encoder)

    def _config(self, part: str) -> Any:
        """The config of a part in any layout. ValueError for a model that is not text-to-video, and for another VAE."""
        config_class = {"vae": VAEConfig, "text_encoder": text.T5Config}.get(part, self.network.config_class)
        name = self.layout.config_file(part)
        if name is None:
            config, class_name = config_class(**self._measured(part)), None
        else:
            path = self._need(name)
            theirs, original = _json(path), isinstance(self.layout, Original)
            config = config_class.from_json(path) if original else config_class(**configs.from_diffusers(part, theirs))
            class_name = theirs.get("_class_name")
            if part == "vae" and (theirs.get("is_residual") or class_name not in (None, "AutoencoderKLWan")):
                raise ValueError(f"{path} is not a Wan2.1 VAE (AutoencoderKLWan without is_residual); {self._advice()}")
        if part.startswith("transformer") and (kind := configs.other_kind(config, class_name)):
            raise ValueError(
                f"{self.name} is {kind}, expected a text-to-video (T2V) model: it serves every task here; "
                f"use {SMALL}, {LARGE} or {TWO_EXPERTS}"
            )
        return config

    def _measured(self, part: str) -> dict:
        """The fields of a config that is not there: all sizes are in the shapes of the part's tensors."""
        shapes = {name: tensor.shape for name, tensor in self._stored(part).items()}
        try:
            return configs.from_shapes(part, shapes)
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            reason = f"no tensor {error.args[0]}" if isinstance(error, KeyError) else error
            found = f"the weights in {self.folder / self.layout.weight_files(part)[0]} are not Wan2.1's ({reason})"
            raise ValueError(f"{found}; {self._advice()}") from None

    def _stored(self, part: str) -> dict[str, "Stored"]:
        """What the files with a part's weights hold. Nothing is read yet."""
        files = [self._need(name) for name in self.layout.weight_files(part)]
        single = part.startswith("transformer") and self.layout.config_file(part) is None
        return _single_file(files[0]) if single else _stored(files)

    def _fill(
        self, module_class: type[nn.Module], part: str, config: Any, stored: Mapping[str, "Stored"],
        dtype: torch.dtype | None, device: str,
    ) -> nn.Module:  # fmt: skip
        """Build a part without memory and give it its tensors; every name and shape must be the module's."""
        with torch.device("meta"), _Undrawn():
            module = module_class(config)
        table = self.layout.table(part, config)
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        expected = {names.rename(name, table): (name, shape) for name, shape in shapes.items()}
        if misfits := _misfits(expected, stored):
            raise ValueError(
                f"the {module_class.__name__} weights in {self.name} are not those of its config: of {len(expected)} "
                f"tensors, {misfits}; expected a Wan2.1 text-to-video model, {self._advice()}"
            )
        state = {}
        for theirs, (name, _) in expected.items():
            tensor = stored[theirs].read()
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{theirs} in {self.name} is of {tensor.dtype}, expected floating point; use another copy"
                )
            state[name] = tensor = tensor.to(device, dtype)
            if not all(extreme.isfinite() for extreme in tensor.aminmax()):
                raise ValueError(f"{theirs} in {self.name} holds NaN or infinity as {tensor.dtype}; {self._advice()}")
        module.load_state_dict(state, assign=True)
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        return module.eval()

    def _text_fingerprint(self) -> str:
        """A name for what prompts become, wherever the model lies: by tokenizer, config and some of the weights.

        Of a file of weights its size and 64 pages, evenly spaced, are read: all of 11 GB would take longer than a
        prompt. Training changes them all; whoever edits a few by hand empties the folder of embeddings.
        """
        self.fetch(["text_encoder"])
        digest = hashlib.sha256(self._need(self.layout.tokenizer_file).read_bytes())
        described = self.layout.config_file("text_encoder") is not None
        digest.update(repr(self._config("text_encoder") if described else text.T5Config()).encode())
        for path in map(self._need, self.layout.weight_files("text_encoder")):
            size = path.stat().st_size
            digest.update(str(size).encode())
            with path.open("rb") as file:
                for page in range(64):
                    file.seek(page * size // 64)
                    digest.update(file.read(4096))
        return digest.hexdigest()

    def _need(self, name: str) -> Path:
        if not (self.folder / name).is_file():
            raise ValueError(
                f"{self.folder} has no {name}, which a Wan text-to-video model needs; {self._advice(name)}"
            )
        return self.folder / name

    def _advice(self, name: str = "") -> str:
        """The command that gets the published model of this layout and size, or the part that a missing file is of."""
        what = f'--include "{name.split("/")[0]}/*" ' if "/" in name else f"{name} " if name else ""
        command = f"hf download {self.published}{self.layout.suffix} {what}--local-dir {self.folder.as_posix()}"
        return f"`{command}` gets the published one"

    def save_with(
        self, folder: Path, transformer: nn.Module, text_encoder: text.UMT5Encoder | None = None,
        expert: str | None = None, boundary: float | None = None,
    ) -> None:  # fmt: skip
        """Write this model as a -Diffusers folder with another transformer, and maybe another text encoder.

        expert: of two, which one ("high" or "low") `transformer` is; the other stays. boundary: None for the preset's.
        """
        experts, preset = {expert or "high": transformer}, self.preset
        if expert:
            other = "low" if expert == "high" else "high"
            experts[other] = self.transformer(expert=other)
        if boundary is not None:
            preset = replace(preset, boundary=boundary)
        save_pipeline(
            folder, experts["high"], self.vae(), text_encoder or self.text_encoder(), self.tokenizer(), preset.shift,
            transformer_2=experts.get("low"), boundary=preset.boundary,
        )  # fmt: skip
        save_preset(folder, preset)


# Downloading.


@functools.cache  # every part that is loaded asks again
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


# Reading.


class Stored(NamedTuple):
    """A tensor in a file, which `read` reads."""

    shape: tuple[int, ...]
    fp8: bool
    read: Callable[[], Tensor]


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


def _single_file(path: Path) -> dict[str, Stored]:
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


def _misfits(expected: Mapping[str, tuple[str, tuple[int, ...]]], stored: Mapping[str, Stored]) -> str:
    """How many stored tensors are not the expected ones, {name: (our name, shape)}, and the first of each kind."""
    kinds = {
        "missing": [name for name in expected if name not in stored],
        "unknown": [name for name in stored if name not in expected],
        "of another shape": [
            f"{name} {stored[name].shape}, expected {shape}"
            for name, (_, shape) in expected.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    return ", ".join(f"{len(names)} are {kind} (first: {names[0]})" for kind, names in kinds.items() if names)


class _Undrawn(TorchFunctionMode):
    """Leave out drawing and scaling of initial weights, which mean nothing without memory and cost a second there:
    torch imports its compiler to find out that they do not change a shape."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "div"):  # of the tensor and of nn.init
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


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


def save_preset(folder: str | Path, preset: Preset) -> None:
    """Write `sampling.json` into the folder of a model."""
    write_json(Path(folder) / "sampling.json", asdict(preset))


def save_pipeline(
    folder: str | Path,
    transformer: nn.Module | None = None,
    vae: WanVAE | None = None,
    text_encoder: text.UMT5Encoder | None = None,
    tokenizer: text.Tokenizer | tokenizers.Tokenizer | None = None,
    shift: float = 5.0,
    dtype: Mapping[str, torch.dtype] | None = None,
    transformer_2: nn.Module | None = None,
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
        text_len = getattr(tokenizer, "text_len", None) or (transformer.config.text_len if transformer else 512)
        plain = tokenizers.Tokenizer.from_str(getattr(tokenizer, "tokenizer", tokenizer).to_str())
        plain.no_padding()  # who reads the file sets these two by itself
        plain.no_truncation()
        for name, content in text.tokenizer_files(plain, text_len).items():
            with replacing(folder / "tokenizer" / name) as path:
                path.write_text(content, encoding="utf-8")
    models = {"transformer": transformer, "transformer_2": transformer_2, "vae": vae, "text_encoder": text_encoder}
    for part, model in models.items():
        if model is not None:
            table = Diffusers(folder).table(part, model.config)
            file = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
            _write(folder / part / file, model, table, dtype.get(part))
            write_json(folder / part / "config.json", configs.to_diffusers(part, model.config))
    if transformer is not None:
        both = {"transformer_2": _INDEX["transformer"], "boundary_ratio": boundary}
        write_json(folder / "scheduler" / "scheduler_config.json", {**_SCHEDULER, "shift": shift})
        write_json(folder / "model_index.json", {**_INDEX, **(both if transformer_2 else {})})


def _write(path: Path, model: nn.Module, table: names.Table, dtype: torch.dtype | None) -> None:
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    state = {names.rename(name, table): tensor for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
