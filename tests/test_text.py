"""Text: agreement with the published umT5 and with transformers, what padding may not change, and the tokenizer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wan.text import T5Config, Tokenizer, UMT5Encoder, clean, position_buckets, tokenizer_files, train_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "text.safetensors"
SMALL = T5Config(vocab_size=50, dim=24, dim_attn=32, dim_ffn=40, num_heads=4, num_layers=2)
CAPTIONS = [
    "A red circle moves left, slowly.",
    "A blue square moves right; then it stops.",
    "Two red squares move up!",
    "a red circle bounces.",
]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def encoder():
    """A small encoder whose position bias matters."""
    torch.manual_seed(0)
    model = UMT5Encoder(SMALL).eval()
    for block in model.blocks:
        torch.nn.init.normal_(block.pos_embedding.embedding.weight, std=1.0)
        torch.nn.init.normal_(block.norm1.weight, mean=1.0, std=0.3)
    return model


@pytest.fixture
def batch():
    """ids (2,150), mask (2,150): one prompt fills it (far enough for the last bucket), one has 7 tokens."""
    ids = torch.randint(0, SMALL.vocab_size, (2, 150), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(150) < torch.tensor([[150], [7]])
    return ids, mask


def write_tokenizer(folder, text_len):
    for name, content in tokenizer_files(train_tokenizer(CAPTIONS), text_len).items():
        (folder / name).write_text(content, encoding="utf-8")


def in_transformers(encoder):
    """The same encoder, as transformers builds it, with the same weights."""
    c = encoder.config
    config = UMT5Config(
        vocab_size=c.vocab_size,
        d_model=c.dim,
        d_kv=c.dim_attn // c.num_heads,
        d_ff=c.dim_ffn,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    model = UMT5EncoderModel(config).eval()
    names = {
        "attn.": "layer.0.SelfAttention.",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
    }
    state = {}
    for name, weight in encoder.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace("blocks.", "encoder.block.").replace("token_embedding", "shared")
        state["encoder.final_layer_norm.weight" if name == "norm.weight" else name] = weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"encoder.embed_tokens.weight"}  # tied to `shared`
    return model


def test_agrees_with_the_published_encoder():
    golden = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        c = json.loads(file.metadata()["config"])
    encoder = UMT5Encoder(T5Config(c["vocab"], c["dim"], c["attn"], c["ffn"], c["heads"], c["layers"]))
    encoder.load_state_dict({name[3:]: tensor for name, tensor in golden.items() if name.startswith("t5.")})
    mask = golden["mask"].bool()
    hidden = encoder(golden["ids"], mask)
    assert relative(hidden[mask], golden["hidden"][mask]) < 1e-4
    assert hidden[~mask].abs().max() == 0


def test_agrees_with_transformers_in_output_and_gradients(encoder, batch):
    ids, mask = batch
    other = in_transformers(encoder)
    hidden = encoder(ids, mask)
    expected = other(ids, attention_mask=mask.long()).last_hidden_state
    assert relative(hidden[mask], expected[mask]) < 1e-5
    weight = torch.randn(hidden[mask].shape, generator=torch.Generator().manual_seed(2))
    (hidden[mask] * weight).sum().backward()
    (expected[mask] * weight).sum().backward()
    pairs = [(encoder.token_embedding, other.shared)]
    for block, layer in zip(encoder.blocks, other.encoder.block, strict=True):
        attention, dense = layer.layer[0].SelfAttention, layer.layer[1].DenseReluDense
        pairs += [(block.pos_embedding.embedding, attention.relative_attention_bias), (block.attn.q, attention.q)]
        pairs += [(block.ffn.gate[0], dense.wi_0), (block.norm1, layer.layer[0].layer_norm)]
    for ours, theirs in pairs:
        assert relative(ours.weight.grad, theirs.weight.grad) < 1e-4


def test_position_buckets_are_those_of_transformers(encoder):
    attention = in_transformers(encoder).encoder.block[0].layer[0].SelfAttention
    position = torch.arange(512)
    expected = attention._relative_position_bucket(position[None, :] - position[:, None])
    assert torch.equal(position_buckets(512), expected)


def test_padding_changes_nothing(encoder, batch):
    ids, mask = batch
    with torch.no_grad():
        together = encoder(ids, mask)
        alone = encoder(ids[1:, :7], mask[1:, :7])
        longer = encoder(torch.cat([ids[1:, :7], torch.full((1, 30), 3)], 1), torch.arange(37)[None] < 7)
        other_padding = encoder(torch.where(mask, ids, 9), mask)
    assert relative(together[1:, :7], alone) < 1e-5
    assert torch.equal(longer[:, :7], alone) and longer.shape == (1, 37, SMALL.dim)
    assert torch.equal(together, other_padding)


def test_masked_positions_are_zero_even_when_nothing_is_seen(encoder, batch):
    ids, mask = batch
    mask = mask & torch.tensor([[True], [False]])
    hidden = encoder(ids, mask)
    assert hidden[~mask].abs().max() == 0 and hidden[mask].abs().min(dim=-1).values.isfinite().all()
    assert torch.equal(encoder(ids, torch.zeros_like(mask)), torch.zeros(2, 150, SMALL.dim))


def test_bf16_is_close_to_fp32(encoder, batch):
    ids, mask = batch
    with torch.no_grad():
        expected = encoder(ids, mask)
        with torch.autocast("cpu", torch.bfloat16):
            assert relative(encoder(ids, mask).float(), expected) < 0.03
        hidden = encoder.bfloat16()(ids, mask)
    assert hidden.dtype == torch.bfloat16
    assert relative(hidden.float(), expected) < 0.03


def test_norm_is_taken_in_fp32(encoder):
    x = torch.full((1, SMALL.dim), 1000.0, dtype=torch.float16)  # its square does not fit in fp16
    assert torch.allclose(encoder.norm.half()(x).float(), torch.ones(1, SMALL.dim))
    norm = encoder.norm.bfloat16()
    y = torch.randn(64, SMALL.dim, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = (y.double() / (y.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16()
    assert torch.equal(norm(y), exact)


def test_initial_weights_keep_the_stream_and_the_attention_moderate():
    torch.manual_seed(0)
    encoder = UMT5Encoder(T5Config(vocab_size=64, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2))
    ids = torch.randint(0, 64, (4, 16))
    attn = encoder.blocks[0].attn
    with torch.no_grad():
        x = encoder.token_embedding(ids)
        q, k = (proj(x).unflatten(-1, (4, 16)).transpose(1, 2) for proj in (attn.q, attn.k))
        assert 0.5 < (q @ k.transpose(-1, -2)).std() < 2  # logits of unit size without 1/sqrt(d)
        assert 0.9 < encoder(ids, torch.ones(4, 16, dtype=torch.bool)).square().mean().sqrt() < 1.1


def test_config_mistakes_are_sentences():
    with pytest.raises(ValueError, match="multiple of num_heads"):
        T5Config(dim_attn=30, num_heads=4)
    with pytest.raises(ValueError, match="num_buckets"):
        T5Config(num_buckets=2)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("  a\tred \n\n circle  ", "a red circle"),
        ("salt &amp;amp; pepper &lt;3", "salt & pepper <3"),
        ("cafe\u0301", "caf\u00e9"),
        ("a&nbsp;&#32;b", "a b"),
        ("", ""),
    ],
)
def test_clean(prompt, expected):
    assert clean(prompt) == expected


def test_trained_tokenizer_is_deterministic_and_closed(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS)
    assert tokenizer.to_str() == train_tokenizer(CAPTIONS[::-1]).to_str()
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["<pad>", "</s>", "<unk>", ".", "a"]
    assert tokenizer.encode("A GREEN circle, slowly").tokens == ["a", "<unk>", "circle", ",", "slowly", "</s>"]
    assert train_tokenizer(CAPTIONS, vocab_size=6).get_vocab_size() == 6


@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, PreTrainedTokenizerFast.from_pretrained])
def test_transformers_reads_the_tokenizer_and_gives_the_same_ids(tmp_path, load):
    write_tokenizer(tmp_path, text_len=8)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    # words unknown, none at all, longer than 8 tokens, exactly 8 with </s>, in upper case, with a special token
    prompts = [*CAPTIONS, "an unseen word", "", "red " * 20, "red " * 7, "BLUE Square?!", "red <pad> circle </s>"]
    ids, mask = Tokenizer(tmp_path / "tokenizer.json", text_len=8)(prompts)
    theirs = load(tmp_path)
    assert theirs.model_max_length == 8 and (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    expected = theirs(  # as diffusers' WanPipeline calls it
        prompts,
        padding="max_length",
        max_length=8,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape == (len(prompts), 8)
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(mask, expected.attention_mask.bool())


def test_truncation_keeps_the_end_token_and_padding_is_masked(tmp_path):
    write_tokenizer(tmp_path, text_len=6)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", text_len=6)
    ids, mask = tokenizer(["red " * 20, " red &#32; circle ", ""])
    red, circle = (tokenizer.tokenizer.token_to_id(word) for word in ("red", "circle"))
    assert ids.tolist() == [[red] * 5 + [1], [red, circle, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert mask.sum(1).tolist() == [6, 3, 1] and torch.equal(mask, ids != 0)


def test_words_without_a_token_are_told(tmp_path):
    write_tokenizer(tmp_path, text_len=8)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", text_len=8)
    assert tokenizer.unknown(["a Cat, slowly!", "the cat", "a red circle"]) == ["cat", "the"]


def test_tokenizer_mistakes_are_sentences(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer(tmp_path / "tokenizer.json", 8)
    (tmp_path / "broken.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="cannot read"):
        Tokenizer(tmp_path / "broken.json", 8)
    tokenizer = train_tokenizer(CAPTIONS)
    tokenizer.post_processor = None
    tokenizer.save(str(tmp_path / "endless.json"))
    with pytest.raises(ValueError, match="does not end prompts"):
        Tokenizer(tmp_path / "endless.json", 8)


@torch.no_grad()
def test_embed_pads_each_prompt_with_zeros_and_does_not_mix_them(tmp_path):
    write_tokenizer(tmp_path, text_len=12)
    tokenizer, encoder = Tokenizer(tmp_path / "tokenizer.json", 12), UMT5Encoder(SMALL)
    prompts = ["a red circle", "red"]
    context = tokenizer.embed(encoder, prompts)
    assert context.shape == (2, 12, SMALL.dim)
    assert [int(row.any(-1).sum()) for row in context] == [4, 2]  # with </s>
    for prompt, together in zip(prompts, context, strict=True):
        torch.testing.assert_close(tokenizer.embed(encoder, [prompt])[0], together)
