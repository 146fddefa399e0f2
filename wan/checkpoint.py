"""Base models: finding, downloading, reading and writing them.

    model = open("checkpoints/tiny", Wan)    # or a folder or file of yours, or Wan-AI/Wan2.1-T2V-1.3B
    model.config, model.preset               # the transformer's sizes, and how the model is best sampled
    model.transformer(), model.vae(), ...    # its parts, each loaded when it is asked for

Three layouts hold the same weights; in memory, tensors have their original names.

    original     config.json, diffusion_pytorch_model*.safetensors, Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth,
                 google/umt5-xxl/tokenizer.json; Wan2.2 has high_noise_model/ and low_noise_model/ for the first two
    -Diffusers   model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/; Wan2.2 adds transformer_2/
    single file  FILE.safetensors, a transformer as ComfyUI has it; the other parts are those of the folder it lies in.
                 An expert of Wan2.2 lies alone in high_noise_model/ or low_noise_model/ of an original folder

What a model is comes from its configs and tensors, never from its folder's name. Modules are built without memory and
filled tensor by tensor, so loading needs the size of one model, not two.
"""

import functools
import hashlib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from support import cache
from support.cli import fits, replacing, write_json
from wan import files, names, text
from wan.vae import VAEConfig, WanVAE

PARTS = ("transformer", "transformer_2", "vae", "text_encoder")  # what has weights; the second is the low-noise expert
STEMS = dict.fromkeys(PARTS, "diffusion_pytorch_model") | {"text_encoder": "model"}  # of their files, in -Diffusers
VAE_FILE, TEXT_FILE = "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"


@dataclass(frozen=True)
class Preset:
    """How a model is best sampled: what its weights do not say. The defaults are Pusa's for Wan2.1-T2V-1.3B."""

    size: tuple[int, int] = (832, 480)  # width and height in pixels
    frames: int = 81
    fps: float = 16.0
    steps: int = 30
    shift: float = 5.0
    guidance: float = 3.0
    history_guidance: float = 1.0  # away from the video without its conditions; 1: off
    context_noise: float = 0.0  # that conditions are told to have, as a share of the highest level
    noise: float | None = None  # m of every condition; None: the default of each task
    strength: float = 1.0  # of the LoRA in the model's own folder
    boundary: float = 0.875  # with two experts, the low-noise one takes the steps where every frame's tau is below this
    guidance_2: float | None = None  # guidance of the low-noise expert; None: the same
    negative_prompt: str = (  # a paraphrase: neither Wan's nor the official Pusa's
        "oversaturated, overexposed, static, blurry details, subtitles, style, painting, picture, still, grey overall, "
        "worst quality, low quality, JPEG artifacts, ugly, incomplete, extra fingers, badly drawn hands and faces, "
        "deformed, disfigured, malformed limbs, fused fingers, motionless, cluttered background, walking backwards"
    )


_RANGES = {  # of a preset's numbers, where it is not 0 to 1
    "frames": (1, 1e6), "fps": (1e-3, 1e6), "steps": (1, 1e9), "shift": (1e-9, 1e9), "guidance": (0, 1e9),
    "guidance_2": (0, 1e9), "history_guidance": (0, 1e9), "strength": (-1e9, 1e9),
}  # fmt: skip
# The published text-to-video models; what Pusa samples them with differs in the size alone.
SMALL, LARGE, TWO_EXPERTS = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-14B", "Wan-AI/Wan2.2-T2V-A14B"
# Where their transformers differ from the defaults of `model.WanConfig`; VAE and text encoder are those of all three.
_OF_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
SIZES = {SMALL: {}, LARGE: _OF_14B, TWO_EXPERTS: _OF_14B}
# What `--preset` puts in their place: what Wan publishes, and what LoRAs that distil many steps into few ask for.
PRESETS = {
    "wan": {
        SMALL: {"steps": 50, "shift": 8.0, "guidance": 6.0},
        LARGE: {"steps": 50, "shift": 5.0, "guidance": 5.0},
        TWO_EXPERTS: {"steps": 40, "shift": 12.0, "guidance": 4.0, "guidance_2": 3.0},
    },
    "lightx2v": dict.fromkeys((SMALL, LARGE, TWO_EXPERTS), {"steps": 4, "shift": 5.0, "guidance": 1.0}),
}
# The noise of conditions, as of `--noise`, where Pusa publishes another for a model than its default for the task.
NOISE = {TWO_EXPERTS: {"extend": "0.2,0.4,0.4,0.4", "start-end": "0.2,0.5"}}


class Part(NamedTuple):
    """Where a part of a model is in its folder."""

    weights: list[str]  # files
    config: str | None = None  # file; None where it has none: its sizes are then those of its tensors
    renamed: bool = False  # whether names and fields are those of a -Diffusers folder


_MARKS = "model_index.json", "config.json", "sampling.json", "high_noise_model", *PARTS  # one is in a model's folder
# Layouts. Each has `folder`, `two_experts`, `tokenizer`, `part`, and the `suffix` of its published repositories.


class Diffusers:
    suffix, tokenizer = "-Diffusers", "tokenizer/tokenizer.json"

    def __init__(self, folder: Path):
        self.folder = folder
        # The index lists each part as [library, class], and as [null, null] if it is not there.
        listed = _json(folder / "model_index.json").get("transformer_2")
        self.two_experts = isinstance(listed, list) and any(listed)

    def part(self, part: str) -> Part:
        return Part(_shards(self.folder, f"{part}/{STEMS[part]}"), f"{part}/config.json", True)


class Original:
    suffix, tokenizer = "", "google/umt5-xxl/tokenizer.json"

    def __init__(self, folder: Path):
        self.folder, self.two_experts = folder, (folder / "high_noise_model").is_dir()

    def part(self, part: str) -> Part:
        if part in ("vae", "text_encoder"):
            return Part([VAE_FILE if part == "vae" else TEXT_FILE])
        home = {"transformer": "high_noise_model/", "transformer_2": "low_noise_model/"}[part] * self.two_experts
        if self.two_experts and not (self.folder / home / "config.json").is_file():
            alone = list((self.folder / home).glob("*.safetensors"))  # as ComfyUI has an expert
            if len(alone) == 1:
                return Part([home + alone[0].name])
        return Part(_shards(self.folder, home + "diffusion_pytorch_model"), home + "config.json")


class SingleFile:
    """A transformer that is one file; the other parts are those of the folder that it lies in."""

    two_experts = False

    def __init__(self, file: Path):
        self.file, self.folder = file, file.parent
        self.beside = (Diffusers if (file.parent / "model_index.json").is_file() else Original)(file.parent)
        self.suffix, self.tokenizer = self.beside.suffix, self.beside.tokenizer

    def part(self, part: str) -> Part:
        return Part([self.file.name]) if part == "transformer" else self.beside.part(part)


class Absent:
    """A published model of which nothing is here: enough for a rehearsal."""

    def __init__(self, name: str):
        self.folder, self.published = Path(name), name.removesuffix(Diffusers.suffix)
        self.suffix, self.two_experts = name.removeprefix(self.published), self.published == TWO_EXPERTS

    def part(self, part: str) -> Part:
        return Part([])


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
        where = _json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ValueError(f"cannot read {index}: expected a weight_map, tensor to file; download or write it again")
        return sorted({home + name for name in where.values()})
    if numbered := sorted(folder.glob(f"{stem}-*-of-[0-9][0-9][0-9][0-9][0-9].safetensors")):
        count = int(numbered[0].stem[-5:])
        return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    return [f"{stem}.safetensors"]


def open(name: str | Path, network: type[nn.Module], rehearsal: bool = False) -> "Opened":
    """Find a model: a folder, a `.safetensors` file, or the name `owner/repository` of one on Hugging Face.

    network: the class of the transformer, `model.Wan`. A repository's descriptions are downloaded now, a few megabytes,
    and its weights when their part is asked for. For a rehearsal, which measures and loads nothing, the published
    models need no internet. ValueError if there is no such model, or it is no text-to-video model.
    """
    path, repository, here = Path(name), None, Path(__file__).parent.parent / name
    # The embedded model lies beside the code.
    path = here if path.parts[:1] == ("checkpoints",) and not path.exists() and here.is_dir() else path
    if not (path.is_dir() or (path.is_file() and path.suffix == ".safetensors")):
        is_file_name = path.exists() or path.suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".gguf")
        if is_file_name or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
            expected = f"expected a folder, a .safetensors file or a Hugging Face repository such as {SMALL}"
            raise ValueError(f"got {name} as a model, {expected}")
        repository = str(name)
        if rehearsal and repository.removesuffix(Diffusers.suffix) in SIZES:
            return Opened(repository, Absent(repository), network, repository)
        path = _download(repository, ("*.json",))  # a star matches slashes too
    elif path.is_dir() and any(path.iterdir()) and not any((path / mark).exists() for mark in _MARKS):
        inside = f": {name}/model has one" if (path / "model").is_dir() else f"; one such as {SMALL} is downloaded"
        raise ValueError(f"got {name} as a model, a folder without any of {', '.join(_MARKS)}{inside}")
    opened = Opened(str(name), _layout(path), network, repository)
    if repository:
        described = opened.layout.part("transformer").config
        if described is None or not (path / described).is_file():
            raise ValueError(f"the repository {name} has no config of a Wan transformer; use one such as {SMALL}")
        opened.config  # noqa: B018  a model of another kind is refused before its gigabytes arrive
    return opened


class Opened:
    """A model that was found: its config and preset, and its parts, each loaded when it is asked for.

    `dtype` of a part is the type to hold it in; None keeps the stored one. All parts are in evaluation mode.
    """

    def __init__(self, name: str, layout: Any, network: type[nn.Module], repository: str | None):
        self.name, self.layout, self.network, self.repository = name, layout, network, repository
        self.folder, self.two_experts = layout.folder, layout.two_experts

    @cached_property
    def config(self) -> Any:
        """The sizes of the transformer, a `network.config_class`; with two experts, of the high-noise one."""
        return self._described("transformer")

    @cached_property
    def preset(self) -> Preset:
        """What `sampling.json` says, and else what is published for such a model. ValueError for bad entries."""
        preset = Preset() if self.published == SMALL else Preset(size=(1280, 720))
        boundary = _json(self.folder / "model_index.json").get("boundary_ratio")
        if fits(boundary, float):
            preset = replace(preset, boundary=boundary)
        path, kinds = self.folder / "sampling.json", {field.name: field.type for field in fields(Preset)}
        entries = _json(path)
        if unknown := sorted(entries.keys() - kinds.keys()):
            raise ValueError(f"{path} has {unknown}, expected only the fields of checkpoint.Preset; remove them")
        for name, value in entries.items():
            if not fits(value, kinds[name]):
                kind = inspect.formatannotation(kinds[name])
                raise ValueError(f"{path} has {name} {json.dumps(value)}, expected {kind}; mend or remove it")
            least, greatest = _RANGES.get(name, (0, 1))
            if fits(value, float) and not least <= value <= greatest:
                raise ValueError(f"{path} has {name} {value}, expected {least:g} to {greatest:g}; mend or remove it")
        return replace(preset, **{**entries, "size": tuple(entries.get("size", preset.size))})

    def settings(self, preset: str | None, task: str, guidance: float | None = None) -> dict[str, Any]:
        """The settings of sampling that are left to the model, by name.

        preset: one of `PRESETS`, which changes steps, shift and guidance alone. guidance: the user's, which is then for
        both of two experts, and for history guidance too where the model has one weight for both: they share a run of
        the network. `noise` is None where it is the task's own.
        """
        noise = None if self.preset.noise is None else f"{self.preset.noise:g}"
        values = asdict(self.preset) | {"noise": noise or NOISE.get(self.published, {}).get(task)}
        values |= {"guidance_2": None, **PRESETS[preset][self.published]} if preset else {}
        if 1 != self.preset.history_guidance == self.preset.guidance:
            values["history_guidance"] = values["guidance"] if guidance is None else guidance
        if not self.two_experts:
            return values | {"boundary": None, "guidance_2": None}
        own = guidance is None and values["guidance_2"] is not None
        return values | ({} if own else {"guidance_2": values["guidance"] if guidance is None else guidance})

    @cached_property
    def published(self) -> str:
        """The published model with as many experts and layers: what this one lacks is taken from there."""
        if isinstance(self.layout, Absent):
            return self.layout.published
        if self.two_experts:
            return TWO_EXPERTS
        name = self.layout.part("transformer").config
        layers = _json(self.folder / name).get("num_layers") if name else files.layers(self._stored("transformer"))
        return LARGE if layers == 40 else SMALL

    def fetch(self, parts: Iterable[str] = PARTS) -> None:
        """Download the weights of these parts that are not here yet, all before any is loaded."""
        if self.repository:
            parts = [part for part in parts if part != "transformer_2" or self.two_experts]
            weights = [name for part in parts for name in self.layout.part(part).weights]
            _download(self.repository, ("*.json", *weights))

    def transformer(self, dtype: torch.dtype | None = None, device: str = "cpu", expert: str = "high") -> nn.Module:
        """The diffusion transformer; with two experts, the one for "high" or "low" noise.

        Nothing can be computed in fp8: stored weights of that type become bf16 unless `dtype` says otherwise.
        """
        part = {"high": "transformer", "low": "transformer_2"}[expert]
        if expert == "low" and not self.two_experts:
            raise ValueError(f"{self.name} has one transformer, expected two; leave out what is for the low-noise one")
        return self._load(part, dtype, device)

    def vae(self, dtype: torch.dtype | None = torch.float32, device: str = "cpu") -> WanVAE:
        """The VAE, with the published statistics of latents where the files have none."""
        return self._load("vae", dtype, device)

    def text_encoder(self, dtype: torch.dtype | None = None, device: str = "cpu") -> text.UMT5Encoder:
        """The umT5 encoder, which the published files store in bf16."""
        return self._load("text_encoder", dtype, device)

    def tokenizer(self) -> text.Tokenizer:
        """The tokenizer, padding to the `text_len` of the transformer's config (512 in the published models)."""
        return text.Tokenizer(self._need(self.layout.tokenizer), self.config.text_len)

    def encode_prompts(
        self, prompts: Iterable[str], dtype: torch.dtype, device: str, cache_folder: Path | str
    ) -> Callable[[list[str]], Tensor]:
        """A function from any of these prompts to their embeddings, (B, text_len, text_dim) in fp32 on the CPU.

        Each prompt is encoded once ever: `cache_folder` holds its embedding without the padding, which is zero. The
        encoder is loaded only if a prompt is not there, and it is freed before this returns.
        """
        tokenizer, prompts = self.tokenizer(), list(dict.fromkeys(prompts))
        encoder = functools.cache(lambda: self.text_encoder(dtype, device))

        def embed(prompt: str) -> Tensor:
            embedding = tokenizer.embed(encoder(), [prompt])[0]
            return embedding[embedding.any(-1)]

        # Another device, or type, gives other bits.
        name = f"{self._text_fingerprint()} {tokenizer.text_len} {dtype} {torch.device(device).type}"
        embeddings = cache.embeddings(prompts, embed, name, cache_folder)
        index = {prompt: i for i, prompt in enumerate(prompts)}

        def look_up(wanted: list[str]) -> Tensor:
            found = [embeddings[index[prompt]] for prompt in wanted]
            padding = [(0, 0, 0, tokenizer.text_len - len(embedding)) for embedding in found]
            return torch.stack(list(map(nn.functional.pad, found, padding)))

        return look_up

    def outline(self) -> tuple[nn.Module, WanVAE, text.UMT5Encoder]:
        """Transformer, VAE and text encoder without memory, to be measured, from the configs alone.

        The original layout has none for the last two, whose sizes are then the published ones.
        """
        return tuple(self._empty(part, self._described(part)) for part in ("transformer", "vae", "text_encoder"))

    def _described(self, part: str) -> Any:
        """The config of a part without looking at its weights: the published one where the layout has none."""
        if part == "transformer" and isinstance(self.layout, Absent):
            return self.network.config_class(**SIZES[self.published])
        if part == "transformer" or self.layout.part(part).config:
            return self._config(part)
        return VAEConfig() if part == "vae" else text.T5Config()

    def _config(self, part: str) -> Any:
        """The config of a part in any layout. ValueError for a model that is not text-to-video, and for another VAE."""
        config_class = {"vae": VAEConfig, "text_encoder": text.T5Config}.get(part, self.network.config_class)
        weights, name, renamed = self.layout.part(part)
        if name is None:  # all sizes are in the shapes of the part's tensors
            class_name, shapes = None, {key: tensor.shape for key, tensor in self._stored(part).items()}
            try:
                measured = files.from_shapes(part, shapes)
            except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
                reason = f"no tensor {error.args[0]}" if isinstance(error, KeyError) else error
                found = f"the weights in {self.folder / weights[0]} are not Wan2.1's ({reason})"
                raise ValueError(f"{found}; {self._advice()}") from None
            config = _checked(config_class, measured, self.folder / weights[0])
        else:
            path = self._need(name)
            theirs = _json(path)
            config = _checked(config_class, files.from_diffusers(part, theirs) if renamed else theirs, path)
            class_name = theirs.get("_class_name")
            if part == "vae" and (theirs.get("is_residual") or class_name not in (None, "AutoencoderKLWan")):
                raise ValueError(f"{path} is not a Wan2.1 VAE (AutoencoderKLWan without is_residual); {self._advice()}")
        if part.startswith("transformer") and (kind := files.other_kind(config, class_name)):
            expected = "expected a text-to-video (T2V) model: it serves every task here"
            raise ValueError(f"{self.name} is {kind}, {expected}; use {SMALL}, {LARGE} or {TWO_EXPERTS}")
        return config

    def _stored(self, part: str) -> dict[str, files.Stored]:
        """What the files with a part's weights hold. Nothing is read yet."""
        paths = [self._need(name) for name in self.layout.part(part).weights]
        if part.startswith("transformer") and self.layout.part(part).config is None:
            return files.single_file(paths[0])
        # Some files name the token embedding as the text encoder's own: it is the same tensor.
        return {name.replace("encoder.embed_tokens.", "shared."): found for name, found in files.stored(paths).items()}

    def _empty(self, part: str, config: Any) -> nn.Module:
        with torch.device("meta"), _Undrawn():
            module = {"vae": WanVAE, "text_encoder": text.UMT5Encoder}.get(part, self.network)(config)
        needed = 2 * sum(parameter.numel() for parameter in module.parameters()) / 2**40
        if needed > 16:
            raise ValueError(f"the {part} of {self.name} would take {needed:.3g} TiB in bf16; {self._advice()}")
        return module

    def _load(self, part: str, dtype: torch.dtype | None, device: str) -> nn.Module:
        """Build a part without memory and give it its tensors; every name and shape must be the module's."""
        self.fetch([part])
        config, stored = self._config(part), self._stored(part)
        if dtype is None and any(tensor.fp8 for tensor in stored.values()):
            dtype = torch.bfloat16
        module = self._empty(part, config)
        table = names.of_part(part, config) if self.layout.part(part).renamed else ()
        ours = {names.rename(name, table): name for name in module.state_dict()}
        shapes = {theirs: tuple(module.state_dict()[name].shape) for theirs, name in ours.items()}
        if misfits := _misfits(shapes, stored):
            got = f"the {type(module).__name__} weights in {self.name} are not those of its config"
            expected = f"expected a Wan2.1 text-to-video model, {self._advice()}"
            raise ValueError(f"{got}: of {len(shapes)} tensors, {misfits}; {expected}")
        state = {}
        for theirs, name in ours.items():
            tensor = stored[theirs].read()
            if not tensor.is_floating_point():
                got = f"{theirs} in {self.name} is of {tensor.dtype}"
                raise ValueError(f"{got}, expected floating point; use another copy")
            state[name] = tensor = tensor.to(device, dtype)
            if not all(extreme.isfinite() for extreme in tensor.aminmax()):
                raise ValueError(f"{theirs} in {self.name} holds NaN or infinity as {tensor.dtype}; {self._advice()}")
        module.load_state_dict(state, assign=True)
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        return module.eval()

    def _text_fingerprint(self) -> str:
        """A name for this way to encode prompts, from tokenizer, config and some of the weights, not from its path.

        A file of weights counts by its size and 64 evenly spaced pages: reading all 11 GB would take longer than a
        prompt. Training changes every page; whoever edits a few by hand empties the folder of embeddings.
        """
        self.fetch(["text_encoder"])
        digest = hashlib.sha256(self._need(self.layout.tokenizer).read_bytes())
        digest.update(repr(self._described("text_encoder")).encode())
        for path in map(self._need, self.layout.part("text_encoder").weights):
            size = path.stat().st_size
            digest.update(str(size).encode())
            with path.open("rb") as file:
                for page in range(64):
                    file.seek(page * size // 64)
                    digest.update(file.read(4096))
        return digest.hexdigest()

    def _need(self, name: str) -> Path:
        if not (self.folder / name).is_file():
            got = f"{self.folder} has no {name}, which a Wan text-to-video model needs"
            raise ValueError(f"{got}; {self._advice(name)}")
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

        expert: which of two ("high" or "low") `transformer` is; the other stays. boundary: None for the preset's.
        """
        preset = self.preset if boundary is None else replace(self.preset, boundary=boundary)
        parts = {"transformer": transformer, "vae": self.vae(), "tokenizer": self.tokenizer()}
        parts["text_encoder"] = text_encoder or self.text_encoder()
        if expert == "high":
            parts["transformer_2"] = self.transformer(expert="low")
        elif expert == "low":
            parts |= {"transformer": self.transformer(), "transformer_2": transformer}
        save_pipeline(folder, parts, preset)


@functools.cache  # every part that is loaded asks again
def _download(repository: str, patterns: tuple[str, ...]) -> Path:
    """The files of a repository that match; progress, resuming, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE are the library's."""
    from huggingface_hub import constants, errors, snapshot_download  # here, because importing it takes long

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # network, spelling, permission, disk: the library has many kinds
        origin = error.__cause__ or error
        status = getattr(getattr(origin, "response", None), "status_code", None)
        reason = (str(origin) or type(origin).__name__).splitlines()[0]
        if constants.HF_HUB_OFFLINE:
            cause = "HF_HUB_OFFLINE is set, and what was downloaded before lacks it; unset it until it is here"
        elif isinstance(origin, errors.GatedRepoError) or status == 403:
            cause = f"access is restricted; ask for it at https://huggingface.co/{repository} and set HF_TOKEN"
        elif isinstance(origin, errors.RepositoryNotFoundError) or status in (401, 404):
            cause = f"there is none, or it is private; check the name, as in {SMALL}, or set HF_TOKEN"
        elif isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError)):
            cause = f"it cannot be reached ({reason}); check the network, or name a folder"
        else:
            cause = f"{reason}; when that is mended, the same command goes on where it stopped"
        raise ValueError(f"{repository} is no folder here and cannot be had from Hugging Face: {cause}") from error


def _misfits(shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, files.Stored]) -> str:
    """How many tensors are missing, unknown or of another shape, and the first of each kind; "" if none is."""
    wrong = [name for name, shape in shapes.items() if name in stored and stored[name].shape != shape]
    kinds = {
        "missing": [name for name in shapes if name not in stored],
        "unknown": [name for name in stored if name not in shapes],
        "of another shape": [f"{name} {stored[name].shape}, expected {shapes[name]}" for name in wrong],
    }
    return ", ".join(f"{len(some)} are {kind} (first: {some[0]})" for kind, some in kinds.items() if some)


class _Undrawn(TorchFunctionMode):
    """Leave out drawing and scaling of initial weights, which mean nothing without memory and cost a second there:
    torch imports its compiler to find out that they do not change a shape."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "div"):  # of the tensor and of nn.init
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# What no model exceeds; for other fields it is 2^20.
_MOST = {"num_layers": 1000, "num_res_blocks": 100, "patch_size": 16, "dim_mult": 64, "text_len": 2**16}


def _checked(config_class: type, values: dict, path: Path) -> Any:
    """The config of these values and its defaults. ValueError for one of another type or of an absurd size."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    values = {field.name: values.get(field.name, field.default) for field in fields(config_class)}
    for field in fields(config_class):
        value, most = values[field.name], _MOST.get(field.name, 2**20)
        each = value if isinstance(value, tuple) else (value,)
        sizes_fit = len(each) <= 64 and all(0 < size <= most for size in each if type(size) is int)
        finite = all(math.isfinite(number) for number in each if type(number) is float)
        if not (fits(value, field.type) and sizes_fit and finite):
            kind = inspect.formatannotation(field.type)
            got, expected = f"{field.name} {value!r:.60}", f"{kind}, sizes from 1 to {most}"
            raise ValueError(f"cannot read {path}: got {got}, expected {expected}; download or write it again")
    return config_class(**values)


def _json(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got a {type(content).__name__}")
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path} as JSON ({error}); download or write it again") from None


# Writing.

# The only scheduler in diffusers that is Euler on `flow.sigma_schedule`, step for step. FlowMatchEuler spaces u in
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


def save_pipeline(
    folder: str | Path, parts: Mapping[str, Any], preset: Preset | None = None,
    dtype: Mapping[str, torch.dtype] | None = None,
) -> None:  # fmt: skip
    """Write parts, by the names of `PARTS` and "tokenizer", as a -Diffusers folder; what is there of others stays.

    The preset is written as `sampling.json` if there is one.
    `dtype`: which parts are stored in another type, such as `{"vae": torch.float16}`. ValueError for an unknown part.
    `model_index.json` and `scheduler/` are written only with a transformer; name both where there are two experts.
    """
    folder, dtype = Path(folder), dtype or {}
    if unknown := dtype.keys() - set(PARTS):
        raise ValueError(f"got a dtype for {sorted(unknown)}, expected one for {', '.join(PARTS)}")
    tokenizer, transformer = parts.get("tokenizer"), parts.get("transformer")
    if preset is not None:
        write_json(folder / "sampling.json", asdict(preset))
    preset = preset or Preset()
    if tokenizer is not None:
        text_len = getattr(tokenizer, "text_len", None) or (transformer.config.text_len if transformer else 512)
        for name, content in text.tokenizer_files(getattr(tokenizer, "tokenizer", tokenizer), text_len).items():
            with replacing(folder / "tokenizer" / name) as path:
                path.write_text(content, encoding="utf-8")
    for part in (part for part in PARTS if part in parts):
        model, table = parts[part], names.of_part(part, parts[part].config)
        state = {names.rename(name, table): tensor for name, tensor in model.state_dict().items()}
        state = {name: tensor.to("cpu", dtype.get(part)).contiguous() for name, tensor in state.items()}
        with replacing(folder / part / f"{STEMS[part]}.safetensors") as path:
            save_file(state, path, metadata={"format": "pt"})
        write_json(folder / part / "config.json", files.to_diffusers(part, model.config))
    if transformer is not None:
        both = {"transformer_2": _INDEX["transformer"], "boundary_ratio": preset.boundary}
        write_json(folder / "scheduler" / "scheduler_config.json", {**_SCHEDULER, "shift": preset.shift})
        write_json(folder / "model_index.json", _INDEX | (both if "transformer_2" in parts else {}))


def fingerprint(model: nn.Module) -> str:
    """A name for a model's weights and config, so that the results of another model are never taken for this one's.

    Only every n-th value of a large tensor is hashed: all would take a minute, and training changes them all anyway.
    """
    digest = hashlib.sha256(repr(getattr(model, "config", None)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // 65536)].cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
