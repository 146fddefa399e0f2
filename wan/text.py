"""Text: a prompt becomes tokens, and the umT5 encoder turns tokens into the context that the transformer attends to.

umT5 is T5's encoder with a relative position bias in every block. A block is pre-norm, and nothing in it has a bias:

    norm(x)  = w · x / sqrt(mean(x²) + eps)                              no mean is subtracted
    x ← x + softmax(q·kᵀ + b[bucket(j - i)]) v · o    of norm1(x)        no 1/sqrt(d): T5's initialisation holds it
    x ← x + fc2(fc1(x) · gelu(gate(x)))               of norm2(x)

Parameter names are those of the published `models_t5_umt5-xxl-enc-bf16.pth`. Prompts are padded to `text_len`, and
vectors past the prompt's end are zero: the transformer attends to them too, without a mask.
"""

import html
import json
import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn

MAX_DISTANCE = 128  # tokens; the last bucket takes every distance from about here on
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder; the defaults are umT5-XXL's, which Wan uses."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096  # all heads together
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32  # of relative positions, both directions together

    def __post_init__(self):
        if self.dim_attn % self.num_heads:
            got = f"got dim_attn {self.dim_attn} with {self.num_heads} heads in the text encoder's config"
            raise ValueError(f"{got}, expected a multiple of num_heads; change one of them")
        if self.num_buckets < 4 or self.num_buckets % 4:
            raise ValueError(f"got num_buckets {self.num_buckets} in the text encoder's config, expected 4, 8, 12 ...")


def position_buckets(length: int, num_buckets: int = 32) -> Tensor:
    """Which row of the position bias serves query i and key j → (length, length) int64 (T5, arXiv 1910.10683).

    Half of the buckets are for keys after the query. Within a half, the first half is one bucket a distance; the rest
    grow by a constant factor up to `MAX_DISTANCE`.
    """
    exact = num_buckets // 4
    # The first distance of each bucket, for 32: 0, 1 ... 7, 8, 12, 16, 23, 32, 46, 64, 91. In double precision: a
    # float32 logarithm on the device may put 16, 32 or 64 one bucket too low.
    growth = (MAX_DISTANCE / exact) ** (1 / exact)
    starts = [*range(exact), *(math.ceil(exact * growth**j - 1e-6) for j in range(exact))]
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]  # key minus query
    return torch.bucketize(distance.abs(), torch.tensor(starts), right=True) - 1 + (distance > 0) * (num_buckets // 2)


class T5Norm(nn.RMSNorm):
    """Division by the root mean square, in fp32 whatever the type of x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), eps=1e-6).to(x.dtype)


class T5Attention(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.dim, config.dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        """x (B,T,dim), bias (1,heads,T,T), mask (B,1,1,T): True where a key may be seen → (B,T,dim)."""
        q, k, v = (rearrange(y, "b t (h d) -> b h t d", h=self.num_heads) for y in (self.q(x), self.k(x), self.v(x)))
        # Filled after the cast, as fp32's lowest is -inf in bf16; finite, or a row that sees nothing would be NaN.
        bias = bias.to(q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)  # (B,heads,T,T)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(x, "b h t d -> b t (h d)"))


class T5FeedForward(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = nn.Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class T5Block(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.norm1 = T5Norm(config.dim)
        self.attn = T5Attention(config)
        self.norm2 = T5Norm(config.dim)
        self.ffn = T5FeedForward(config)
        # A module around the embedding, as in the published file's names.
        self.pos_embedding = nn.ModuleDict({"embedding": nn.Embedding(config.num_buckets, config.num_heads)})

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        """x (B,T,dim), buckets (T,T), mask (B,1,1,T): True where a key may be seen → (B,T,dim)."""
        bias = rearrange(self.pos_embedding["embedding"](buckets), "i j h -> 1 h i j")
        # Rows must lie together in memory: the fused attention kernels ask for it.
        x = x + self.attn(self.norm1(x), bias.contiguous(), mask)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nn.Module):
    """The encoder of umT5 (arXiv 2304.09151)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.norm = T5Norm(config.dim)
        self.init_weights()

    def init_weights(self) -> None:
        """T5's initialisation: each linear keeps unit variance, and q is small enough to stand in for 1/sqrt(d)."""
        config = self.config
        nn.init.normal_(self.token_embedding.weight, std=1.0)
        for block in self.blocks:
            attn, ffn = block.attn, block.ffn
            nn.init.normal_(attn.q.weight, std=(config.dim * config.dim_attn / config.num_heads) ** -0.5)
            for linear in (attn.k, attn.v, attn.o, ffn.gate[0], ffn.fc1, ffn.fc2):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.normal_(block.pos_embedding["embedding"].weight, std=config.dim**-0.5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B,T) int64, mask (B,T) bool, True on the prompt's tokens → (B,T,dim), zero where the mask is False."""
        T, mask = ids.shape[1], mask.bool()
        # Most of 512 positions are padding, which changes nothing: work up to the end of the longest prompt only.
        length = max(1, int((mask * torch.arange(1, T + 1, device=mask.device)).max()))
        ids, mask = ids[:, :length], mask[:, :length]
        buckets = position_buckets(length, self.config.num_buckets).to(ids.device)
        x = self.token_embedding(ids)  # (B,length,dim)
        for block in self.blocks:
            x = block(x, buckets, mask[:, None, None, :])
        x = self.norm(x).masked_fill(~mask[:, :, None], 0.0)
        return F.pad(x, (0, 0, 0, T - length))  # (B,T,dim)


def clean(prompt: str) -> str:
    """Resolve HTML entities (twice: `&amp;lt;`), compose Unicode (NFC), make each run of whitespace one space.

    Unlike Wan's own cleaning, which calls ftfy, it leaves alone: text decoded wrongly, curly quotes, ligatures,
    full-width letters and punctuation, control characters, byte-order marks; without these the two agree.
    """
    return " ".join(unicodedata.normalize("NFC", html.unescape(html.unescape(prompt))).split())


class Tokenizer:
    """A `tokenizer.json`, padded and cut to `text_len` tokens; `</s>` stays the last one of a prompt that is cut."""

    def __init__(self, path: str | Path, text_len: int):
        if not Path(path).is_file():
            where = "Wan2.1 has it in google/umt5-xxl/, or in tokenizer/ of its -Diffusers folder"
            raise ValueError(f"no tokenizer at {path}: expected a Hugging Face tokenizer.json; {where}")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            expected = "expected a Hugging Face tokenizer.json; download or train it again"
            raise ValueError(f"cannot read {path} as a tokenizer ({error}), {expected}") from None
        pad_id = self.tokenizer.token_to_id(PAD)
        if pad_id is None or self.tokenizer.num_special_tokens_to_add(is_pair=False) < 1:
            expected = "expected both as in umT5's tokenizer.json; use the tokenizer of the model"
            raise ValueError(f"{path} has no {PAD} token or does not end prompts with {END}, {expected}")
        self.text_len = text_len
        self.tokenizer.enable_truncation(text_len)
        self.tokenizer.enable_padding(length=text_len, pad_id=pad_id, pad_token=PAD)

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Clean and encode B prompts → ids (B,text_len) int64, mask (B,text_len) bool, True on tokens and `</s>`."""
        encodings = self.tokenizer.encode_batch([clean(prompt) for prompt in prompts])
        ids = torch.tensor([encoding.ids for encoding in encodings])
        return ids, torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.bool)

    def unknown(self, prompts: Iterable[str]) -> list[str]:
        """The words of prompts for which the model has no token, each once."""
        words, unknown = {}, self.tokenizer.token_to_id(UNKNOWN)
        for prompt in map(clean, prompts):
            encoding = self.tokenizer.encode(prompt)
            spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == unknown]
            words |= dict.fromkeys(prompt[start:end].strip().lower() for start, end in spans)
        return [word for word in words if any(map(str.isalnum, word))]

    def embed(self, encoder: UMT5Encoder, prompts: list[str]) -> Tensor:
        """What the transformer attends to: B prompts → (B,text_len,dim), on the encoder's device."""
        device = encoder.token_embedding.weight.device
        return encoder(*(tensor.to(device) for tensor in self(prompts)))


def train_tokenizer(captions: Iterable[str], vocab_size: int = 256) -> tokenizers.Tokenizer:
    """One token a word, in lower case, punctuation apart: for the closed vocabulary of a small model.

    Ids 0, 1, 2 are `<pad>`, `</s>`, `<unk>`; words follow by frequency, then alphabet, so the order of the captions
    changes nothing. Words beyond `vocab_size` tokens become `<unk>`.
    """
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    settings = {"vocab_size": vocab_size, "special_tokens": [PAD, END, UNKNOWN]}
    tokenizer.train_from_iterator(map(clean, captions), trainers.WordLevelTrainer(**settings, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return tokenizer


def tokenizer_files(tokenizer: tokenizers.Tokenizer, text_len: int) -> dict[str, str]:
    """What to write into a folder, {file name: text}, for `Tokenizer`, transformers and diffusers to read it."""
    plain = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    plain.no_padding()  # every reader of the file sets these two itself
    plain.no_truncation()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": text_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN,
    }  # fmt: skip
    return {
        "tokenizer.json": plain.to_str(pretty=True) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
