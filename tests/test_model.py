"""model.py: the transformer against the published one's numbers, and what a noise level for every frame means."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import model
import vta
from model import Wan, WanConfig
from wan import checkpoint

GOLDEN = Path(__file__).parent / "golden" / "dit.safetensors"
CLOSE = 1e-5  # relative; with the other formula for GELU it would be 3e-5


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture
def wan(golden):
    with safe_open(GOLDEN, "pt") as file:
        config = json.loads(file.metadata()["config"])
    wan = Wan(WanConfig(**{**config, "patch_size": tuple(config["patch_size"])}))
    wan.load_state_dict({name[6:]: tensor for name, tensor in golden.items() if name.startswith("model.")})
    return wan.requires_grad_(False)


def _small(**changes):
    sizes = {"dim": 24, "ffn_dim": 32, "freq_dim": 16, "num_heads": 2, "num_layers": 2, "text_len": 6, "text_dim": 10}
    return Wan(WanConfig(**{**sizes, **changes}))


def _error(ours, theirs):
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def _modulation_fed_to(wan, *inputs):
    """What the first block is told of the noise levels, (B, F, 6, D)."""
    seen = []
    hook = wan.blocks[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    wan(*inputs)
    hook.remove()
    return seen[0]


# The published numbers


def test_vector_tau_matches_the_published_code(wan, golden):
    velocity = wan(golden["x"], golden["tau"], golden["context"])
    assert velocity.shape == golden["x"].shape
    assert _error(velocity, golden["velocity"]) < CLOSE


def test_scalar_t_matches_the_published_code(wan, golden):
    tau = golden["timestep_uniform"] / 1000
    assert _error(wan(golden["x"], tau, golden["context"]), golden["velocity_uniform"]) < CLOSE
    assert _error(golden["velocity"], golden["velocity_uniform"]) > 1e-2  # the two cases do differ


def test_names_and_shapes_are_the_published_ones(golden):
    with torch.device("meta"):
        wan = _small(dim=48, ffn_dim=96, freq_dim=32, text_dim=40)
    published = {name[6:]: tensor.shape for name, tensor in golden.items() if name.startswith("model.")}
    assert {name: parameter.shape for name, parameter in wan.named_parameters()} == published
    assert list(wan.buffers()) == []  # what would be missing or left over in a published file


def test_the_ten_linears_that_lora_adapts_are_there(wan):
    for block in wan.blocks:
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert linears == {f"{a}_attn.{n}" for a in ("self", "cross") for n in "qkvo"} | {"ffn.0", "ffn.2"}


# One level a frame


def test_equal_tau_is_the_base_model_to_the_bit(wan, golden):
    t = torch.tensor([0.123, 0.987])
    vector = wan(golden["x"], t[:, None].repeat(1, 5), golden["context"])
    assert torch.equal(vector, wan(golden["x"], t, golden["context"]))


def test_a_batch_is_its_samples(wan, golden):
    x, tau, context = golden["x"], golden["tau"], golden["context"]
    together = wan(x, tau, context)
    for i in range(2):
        alone = wan(x[i : i + 1], tau[i : i + 1], context[i : i + 1])
        assert _error(together[i : i + 1], alone) < 1e-5


def test_without_attention_a_frame_sees_its_own_level_alone(wan, golden):
    x, tau, context = golden["x"], golden["tau"], golden["context"]
    changed = tau.clone()
    changed[:, 2] = 1 - changed[:, 2]
    others = [0, 1, 3, 4]

    difference = wan(x, changed, context) - wan(x, tau, context)
    assert (difference.abs().amax(dim=(0, 1, 3, 4)) > 1e-4).all()  # attention carries it to every frame

    for block in wan.blocks:
        block.self_attn.o.weight.zero_()
    difference = wan(x, changed, context) - wan(x, tau, context)
    assert difference[:, :, others].eq(0).all() and difference[:, :, 2].abs().max() > 1e-2


def test_without_attention_a_frame_does_not_know_its_place(wan, golden):
    for block in wan.blocks:
        block.self_attn.o.weight.zero_()
    order = [3, 0, 4, 1, 2]
    shuffled = wan(golden["x"][:, :, order], golden["tau"][:, order], golden["context"])
    expected = wan(golden["x"], golden["tau"], golden["context"])[:, :, order]
    assert _error(shuffled, expected) < 1e-5


def test_modulation_is_one_row_a_frame(wan, golden):
    six = _modulation_fed_to(wan, golden["x"], golden["tau"], golden["context"])
    assert six.shape == (2, 5, 6, 48) and six.dtype == torch.float32
    assert _modulation_fed_to(wan, golden["x"], golden["tau"][:, 0], golden["context"]).shape == (2, 5, 6, 48)


# The prompt


def test_prompt_keys_stand_for_the_prompt(wan, golden):
    keys = wan.prompt_keys(golden["context"])
    assert len(keys) == 2 and all(k.shape == v.shape == (2, 2, 9, 24) for k, v in keys)
    for tau in (golden["tau"], 1 - golden["tau"]):
        assert torch.equal(wan(golden["x"], tau, keys), wan(golden["x"], tau, golden["context"]))


def test_the_prompt_matters_and_its_order_does_not(wan, golden):
    x, tau, context = golden["x"], golden["tau"], golden["context"]
    assert _error(wan(x, tau, torch.zeros_like(context)), golden["velocity"]) > 1e-3
    assert _error(wan(x, tau, context.flip(1)), golden["velocity"]) < 1e-5


# Number formats


def test_bf16_weights_give_nearly_the_same_velocity(wan, golden):
    inputs = golden["x"], golden["tau"], golden["context"]
    wan.bfloat16()
    velocity = wan(*inputs)
    assert velocity.dtype == torch.float32  # that of the latents
    assert wan(inputs[0].bfloat16(), *inputs[1:]).dtype == torch.bfloat16
    assert 0 < _error(velocity, golden["velocity"]) < 0.03


@pytest.mark.parametrize("way", ["bf16 weights", "bf16 autocast"])
def test_noise_levels_stay_fp32(wan, golden, way):
    tau = torch.stack([golden["tau"][0].clamp(max=0.999)] * 2)
    tau[1] += 1e-4  # bf16 would not keep these two apart
    inputs = golden["x"], tau, golden["context"]
    if way == "bf16 weights":
        wan.bfloat16()
        six = _modulation_fed_to(wan, *inputs)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            six = _modulation_fed_to(wan, *inputs)
    assert six.dtype == torch.float32
    assert (six[0] != six[1]).flatten(1).any(dim=1).all()

    # The same sums in fp32 from the stored weights: nothing in between was rounded.
    h = vta.timestep_embedding(tau, wan.config.freq_dim)
    for layer in (*wan.time_embedding, *wan.time_projection):
        h = (
            nn.functional.linear(h, layer.weight.float(), layer.bias.float())
            if isinstance(layer, nn.Linear)
            else layer(h)
        )
    assert _error(six.flatten(2), h) < 1e-5


def test_norms_are_fp32():
    x, weight, bias = torch.randn(3, 5, 24).bfloat16(), torch.randn(24).bfloat16(), torch.randn(24).bfloat16()
    rms, layer = model.RMSNorm(24, eps=1e-6).bfloat16(), model.LayerNorm(24, 1e-6).bfloat16()
    rms.weight.data, layer.weight.data, layer.bias.data = weight, weight, bias
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert rms(x).dtype == torch.bfloat16 and torch.equal(rms(x), exact.to(torch.bfloat16))
    centred = x.double() - x.double().mean(-1, keepdim=True)
    exact = centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double() + bias.double()
    assert layer(x).dtype == torch.float32 and _error(layer(x), exact) < 1e-6


def test_tokens_between_layers_are_bf16_where_the_weights_are(wan, golden):
    seen = []
    for block in wan.blocks:
        for norm in (block.norm1, block.norm3, block.norm2):
            norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    wan.bfloat16()(golden["x"], golden["tau"], golden["context"])
    assert seen == [torch.bfloat16] * 6


def test_autocast_computes_in_bf16_and_keeps_the_latents_dtype(wan, golden):
    inputs = golden["x"], golden["tau"], golden["context"]
    with torch.autocast("cpu", torch.bfloat16):
        velocity = wan(*inputs)
        from_keys = wan(*inputs[:2], wan.prompt_keys(inputs[2]))
    assert velocity.dtype == torch.float32
    assert 1e-4 < _error(velocity, golden["velocity"]) < 0.03
    assert torch.equal(velocity, from_keys)


# Positions


def test_rope_tables_are_made_once_a_grid_by_each_model():
    wan, cpu = _small(), torch.device("cpu")
    first = wan.rope((5, 4, 3), 24, cpu)
    assert wan.rope((5, 4, 3), 24, cpu) is first and _small().rope((5, 4, 3), 24, cpu) is not first
    other = wan.rope((4, 5, 3), 24, cpu)
    assert other[0].shape == first[0].shape == (60, 12) and not torch.equal(other[0], first[0])


def test_rope_by_hand():
    cos, sin = model.rope_tables(
        (2, 3, 4), 16, torch.device("cpu")
    )  # 8 pairs: 4 of the frame, 2 of row and column each
    assert cos.shape == sin.shape == (24, 8) and cos.dtype == sin.dtype == torch.float32
    f, h, w = 1, 2, 3
    angles = [f * 10000 ** (-k / 4) for k in range(4)] + [p * 10000 ** (-k / 2) for p in (h, w) for k in range(2)]
    angles = torch.tensor(angles, dtype=torch.float64)
    token = (f * 3 + h) * 4 + w
    torch.testing.assert_close(cos[token].double(), angles.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[token].double(), angles.sin(), rtol=0, atol=1e-7)

    x = torch.randn(1, 2, 24, 16)
    turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (8, 2))) * torch.complex(cos, sin)).flatten(-2)
    torch.testing.assert_close(model.rotate(x, (cos, sin)), turned, rtol=1e-6, atol=1e-6)
    assert model.rotate(x.bfloat16(), (cos, sin)).dtype == torch.bfloat16


# Training


def test_fresh_weights_give_zero_velocity():
    wan = _small().init_weights()
    assert wan(torch.randn(2, 16, 3, 4, 6), torch.rand(2, 3), torch.randn(2, 6, 10)).eq(0).all()
    zero = {name for name, parameter in wan.named_parameters() if name.endswith("weight") and parameter.eq(0).all()}
    assert zero == {"head.head.weight"}


def test_gradient_reaches_every_parameter():
    wan = _small().init_weights()
    x, tau, context = torch.randn(2, 16, 3, 4, 4), torch.rand(2, 3), torch.randn(2, 6, 10)
    target = torch.randn_like(x)
    optimizer = torch.optim.SGD(wan.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        (wan(x, tau, context) - target).square().mean().backward()
        reached = {name for name, p in wan.named_parameters() if p.grad is not None and p.grad.ne(0).any()}
        if step == 0:  # behind an output layer of zeros, nothing learns yet
            assert reached == {"head.head.weight", "head.head.bias"}
        optimizer.step()
    assert reached == {name for name, _ in wan.named_parameters()}


# Sizes and mistakes


def test_frames_and_frame_sizes_are_free(wan, golden):
    for frames, height, width in ((1, 2, 2), (3, 4, 10), (7, 6, 2)):
        x = torch.randn(1, 16, frames, height, width)
        velocity = wan(x, torch.rand(1, frames), golden["context"][:1])
        assert velocity.shape == x.shape and velocity.isfinite().all()


def test_patches_of_another_shape():
    wan = _small(patch_size=(1, 4, 2), in_dim=3, out_dim=5)
    nn.init.zeros_(wan.head.head.weight)
    wan.head.head.bias.data.copy_(torch.arange(40.0))  # a patch is (row, column, channel), channel fastest
    out = wan(torch.randn(1, 3, 2, 8, 4), torch.rand(1, 2), torch.randn(1, 6, 10))
    assert out.shape == (1, 5, 2, 8, 4)
    expected = torch.arange(40.0).view(4, 2, 5).permute(2, 0, 1).repeat(1, 2, 2)
    assert torch.equal(out[0, :, 1], expected)


@pytest.mark.parametrize(
    "shape, got",
    [
        ((1, 20, 5, 8, 8), "20 channels"),
        ((1, 36, 5, 8, 8), "36 channels"),
        ((1, 16, 5, 7, 8), "16 channels, 8x7"),
        ((1, 16, 5, 8, 3), "16 channels, 3x8"),
    ],
)
def test_latents_that_do_not_fit_are_refused(wan, golden, shape, got):
    with pytest.raises(ValueError, match=f"got latents of {got}.* expected 16 channels.* multiples of 2x2"):
        wan(torch.zeros(shape), torch.zeros(1, 5), golden["context"][:1])


@pytest.mark.parametrize("shape", [(5,), (2, 1), (1, 5), (2, 4), (2, 5, 1)])
def test_tau_that_does_not_fit_is_refused(wan, golden, shape):
    with pytest.raises(ValueError, match=r"got tau of shape .* expected \(2,\) or \(2, 5\)"):
        wan(golden["x"], torch.zeros(shape), golden["context"])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": 5}, "got dim 24 and 5 heads"),
        ({"num_heads": 8}, "got dim 24 and 8 heads"),  # 3 channels a head cannot be turned in pairs
        ({"patch_size": (2, 2, 2)}, "expected 1 in time"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _small(**changes)


def test_a_config_of_the_original_layout_is_read(tmp_path):
    path = tmp_path / "config.json"
    published = {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 5120, "eps": 1e-06, "ffn_dim": 13824,
        "freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 40, "num_layers": 40, "out_dim": 16,
        "text_len": 512,
    }  # fmt: skip
    path.write_text(json.dumps(published), encoding="utf-8")
    config = checkpoint.open(tmp_path, Wan).config
    assert config == WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
    assert config.patch_size == (1, 2, 2) and config.text_dim == 4096

    path.write_text(json.dumps({"patch_size": [1, 4, 4], "text_len": 24}), encoding="utf-8")
    assert checkpoint.open(tmp_path, Wan).config == WanConfig(patch_size=(1, 4, 4), text_len=24)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 1


def test_defaults_are_wan_1_3b():
    with torch.device("meta"):
        wan = Wan(WanConfig())
    assert sum(parameter.numel() for parameter in wan.parameters()) == 1_418_996_800


def test_training_goes_on_after_inference_mode():
    wan = _small()
    inputs = torch.randn(1, 16, 2, 10, 4), torch.rand(1, 2), torch.randn(1, 6, 10)
    with torch.inference_mode():
        wan(*inputs)
    wan(*inputs).sum().backward()


def test_a_model_without_memory_gives_the_shape_of_its_velocity():
    with torch.device("meta"):
        wan = _small()
        velocity = wan(torch.randn(2, 16, 3, 10, 4), torch.rand(2, 3), torch.randn(2, 6, 10))
    assert velocity.is_meta and velocity.shape == (2, 16, 3, 10, 4)
    velocity.sum().backward()
    assert all(parameter.grad is not None for parameter in wan.parameters())
