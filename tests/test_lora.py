"""LoRA: agrees with the published merge, with PEFT and with diffusers; changes all that it should and nothing else."""

import json
import pickle
import re
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from small import Code, call, mistake

import lora
from model import Wan, WanConfig
from wan import checkpoint, lora_files, names
from wan.lora_files import LoRA, Pair

GOLDEN = "tests/golden/"
COMMAND = SimpleNamespace(__file__=lora.__file__, main=partial(lora_files.command, Wan))  # what lora.py runs


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN + "dit.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    config["patch_size"] = tuple(config["patch_size"])
    return WanConfig(**config), load_file(GOLDEN + "dit.safetensors")


@pytest.fixture
def wan(golden):
    config, tensors = golden
    model = Wan(config).eval()
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    return model


@pytest.fixture
def inputs(golden):
    return [golden[1][name] for name in ("x", "tau", "context")]


@pytest.fixture(scope="module")
def official():
    """The pairs under the keys of the official trainer."""
    tensors = load_file(GOLDEN + "lora.safetensors")
    return {k.removeprefix("lora."): v for k, v in tensors.items() if k.startswith("lora.")}


def _random(model, rank=3, alpha=None, seed=0):
    """A LoRA in which both A and B are random, for every target layer of `model`."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"blocks.{i}.{target}" for i in range(len(model.blocks)) for target in lora.TARGETS]
    pairs = {}
    for name in names:
        out_features, in_features = model.get_submodule(name).weight.shape
        A = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        pairs[name] = Pair(A, torch.randn(out_features, rank, generator=generator) / 10, alpha)
    return LoRA(pairs)


def _whole(model, seed=1, kinds=("weight", "bias", "modulation")):
    """A diff of every parameter that no pair can change: norms, biases, modulations, the patches' convolution."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator) / 10
        for name, parameter in model.named_parameters()
        if name.endswith(kinds) and (parameter.ndim != 2)
    }


def _merged_as_expected(model, before, loaded, strength):
    """Every parameter is what the formula says, in fp64: those that the LoRA names, and no other."""
    for name, got in model.state_dict().items():
        expected = before[name].double()
        if name in loaded.diffs:
            expected = expected + strength * loaded.diffs[name].double()
        if name.endswith(".weight") and (layer := name.removesuffix(".weight")) in loaded.pairs:
            A, B, alpha = loaded.pairs[layer]
            expected = expected + strength * (1 if alpha is None else alpha / A.shape[0]) * B.double() @ A.double()
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def _train(model, trained):
    """Set the pairs of an injected model, as if they had been trained."""
    for name, (A, B, _) in trained.pairs.items():
        model.get_submodule(name).lora_A.data.copy_(A)
        model.get_submodule(name).lora_B.data.copy_(B)


def _snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _same(ours, theirs):
    assert ours.pairs.keys() == theirs.pairs.keys() and not ours.diffs and not theirs.diffs
    for name, (A, B, alpha) in ours.pairs.items():
        other = theirs.pairs[name]
        assert torch.equal(A, other.A) and torch.equal(B, other.B) and alpha == other.alpha, name


def _error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# Merging


@torch.no_grad()
def test_merge_is_the_published_one(wan, inputs, official, tmp_path):
    base = wan(*inputs)
    save_file(official, tmp_path / "pusa.safetensors")
    with safe_open(GOLDEN + "lora.safetensors", "pt") as file:
        strength, expected = float(file.metadata()["strength"]), file.get_tensor("velocity")
    lora.merge(wan, lora.load(tmp_path / "pusa.safetensors"), strength)
    assert _error(wan(*inputs), expected) < 1e-4
    assert _error(base, expected) > 1e-2  # or the test would prove nothing


@pytest.mark.parametrize("alpha", [None, 2.0, 12.0])
def test_merge_agrees_with_peft(wan, golden, alpha):
    peft = pytest.importorskip("peft")
    change = _random(wan, rank=3, alpha=alpha)
    other = Wan(golden[0])
    other.load_state_dict(wan.state_dict())
    settings = peft.LoraConfig(r=3, lora_alpha=3 if alpha is None else alpha, target_modules=list(change.pairs))
    other = peft.get_peft_model(other, settings)
    for name, (A, B, _) in change.pairs.items():
        layer = other.base_model.model.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(A)
        layer.lora_B["default"].weight.data.copy_(B)
    theirs = other.merge_and_unload().state_dict()
    before = _snapshot(wan)
    lora.merge(wan, change)
    for name, weight in wan.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, before[name]) != (name.removesuffix(".weight") in change.pairs), name


def test_sum_in_fp32_and_cast_back(wan):
    wan.to(torch.bfloat16)
    change, before = _random(wan), _snapshot(wan)
    lora.merge(wan, change, 0.7)
    for name, (A, B, _) in change.pairs.items():
        weight = wan.get_submodule(name).weight
        expected = before[name + ".weight"].double() + 0.7 * B.double() @ A.double()
        assert weight.dtype == torch.bfloat16
        assert ((weight.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all(), name


def test_ranks_may_differ_from_layer_to_layer(wan):
    before = _snapshot(wan)
    two, five = _random(wan, rank=2, alpha=1.0), _random(wan, rank=5, alpha=1.0)
    pairs = {name: (two if i % 2 else five).pairs[name] for i, name in enumerate(two.pairs)}
    assert {len(A) for A, _, _ in pairs.values()} == {2, 5}
    lora.merge(wan, LoRA(pairs), 1.4)
    for name, (A, B, _) in pairs.items():
        expected = before[name + ".weight"] + 1.4 / len(A) * B @ A
        torch.testing.assert_close(wan.get_submodule(name).weight.data, expected, rtol=1e-5, atol=1e-6)


def _rename_last(pairs, diffs):
    pairs["blocks.9.ffn.2"] = pairs.pop("blocks.1.ffn.2")


def _name_a_norm(pairs, diffs):
    pairs["blocks.0.norm3"] = pairs.pop("blocks.1.ffn.2")


def _narrow_the_last(pairs, diffs):
    A, B, alpha = pairs["blocks.1.ffn.2"]
    pairs["blocks.1.ffn.2"] = Pair(A[:, 1:], B, alpha)


def _misfit_ranks(pairs, diffs):
    A, B, alpha = pairs["blocks.1.ffn.2"]
    pairs["blocks.1.ffn.2"] = Pair(A[1:], B, alpha)


def _add_a_bias_to_a_norm_without(pairs, diffs):
    diffs["blocks.0.self_attn.norm_q.bias"] = torch.zeros(48)


def _shorten_a_bias(pairs, diffs):
    diffs["head.head.bias"] = torch.zeros(63)


def _empty(pairs, diffs):
    pairs.clear()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_rename_last, r"matched 19 of 20 layers and parameters; first unmatched blocks\.9\.ffn\.2"),
        (_name_a_norm, r"matched 19 of 20 layers and parameters; first unmatched blocks\.0\.norm3"),
        (_narrow_the_last, r"blocks\.1\.ffn\.2 has A \(3, 95\) and B \(48, 3\), expected \(rank, 96\)"),
        (_misfit_ranks, r"blocks\.1\.ffn\.2 has A \(2, 96\) and B \(48, 3\)"),
        (_add_a_bias_to_a_norm_without, r"matched 20 of 21 .*; first unmatched blocks\.0\.self_attn\.norm_q\.bias"),
        (_shorten_a_bias, r"change of head\.head\.bias is \(63,\), expected \(64,\)"),
        (_empty, "matched 0 of 0 layers"),
    ],
)
def test_a_lora_that_does_not_fit_changes_nothing(wan, spoil, message):
    change, before = _random(wan), _snapshot(wan)
    spoil(change.pairs, change.diffs)
    with pytest.raises(ValueError, match=message):
        lora.merge(wan, change)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wan.state_dict().items())


def test_pairs_and_diffs_add_up(wan):
    before = _snapshot(wan)
    change = LoRA(_random(wan).pairs, {**_whole(wan), "blocks.0.ffn.0.weight": torch.ones(96, 48)})  # two of one weight
    lora.merge(wan, change, 1.4)
    changed = {*change.diffs, *(f"{layer}.weight" for layer in change.pairs)}
    assert {name for name, tensor in wan.state_dict().items() if not torch.equal(tensor, before[name])} == changed
    _merged_as_expected(wan, before, change, 1.4)


def test_strength_must_be_finite(wan):
    with pytest.raises(ValueError, match="strength nan"):
        lora.merge(wan, _random(wan), float("nan"))


# Training


@torch.no_grad()
def test_a_new_pair_is_the_base_to_the_bit(wan, inputs):
    base = wan(*inputs)
    lora.inject(wan, rank=4)
    assert torch.equal(wan(*inputs), base)


def test_exactly_the_pairs_are_trainable(wan, inputs, golden):
    names = set(wan.state_dict())
    trainable = lora.inject(wan, rank=4)
    expected = {f"blocks.{i}.{target}.lora_{part}" for i in range(2) for target in lora.TARGETS for part in "AB"}
    assert {name for name, parameter in wan.named_parameters() if parameter.requires_grad} == expected
    assert {id(parameter) for parameter in trainable} == {id(wan.get_parameter(name)) for name in expected}
    assert all(parameter.dtype == torch.float32 for parameter in trainable)
    assert set(wan.state_dict()) == names | expected  # the base keeps its names

    optimizer = torch.optim.SGD(trainable, lr=1.0)
    before = _snapshot(wan)
    for _ in range(2):  # A has a gradient only once B is no longer zero
        optimizer.zero_grad()
        wan(*inputs).square().mean().backward()
        optimizer.step()
    changed = {name for name, tensor in wan.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == expected


def test_some_targets_only(wan):
    lora.inject(wan, rank=2, targets=("self_attn.q", "ffn.2"))
    assert {name for name, parameter in wan.named_parameters() if parameter.requires_grad} == {
        f"blocks.{i}.{target}.lora_{part}" for i in range(2) for target in ("self_attn.q", "ffn.2") for part in "AB"
    }


@torch.no_grad()
@pytest.mark.parametrize("alpha, strength", [(None, 1.0), (9.0, 1.0), (None, 1.4)])
def test_merged_equals_unmerged(wan, golden, inputs, alpha, strength):
    change = _random(wan)
    base = wan(*inputs)
    lora.inject(wan, rank=3, alpha=alpha)
    _train(wan, change)
    trained = lora.extract(wan)
    for name in change.pairs:
        wan.get_submodule(name).alpha *= strength
    injected = wan(*inputs)
    merged = Wan(golden[0]).eval()
    names = merged.state_dict().keys()
    merged.load_state_dict({name: tensor for name, tensor in wan.state_dict().items() if name in names})
    assert torch.equal(merged(*inputs), base)
    lora.merge(merged, trained, strength)
    assert _error(merged(*inputs), injected) < 1e-5
    assert _error(base, injected) > 1e-2


@pytest.mark.parametrize("base, autocast", [("float32", True), ("bfloat16", True), ("bfloat16", False)])
def test_fp32_pairs_on_a_bf16_layer(base, autocast):
    dtype = getattr(torch, base)
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 6, dtype=dtype)
    layer = lora.LoRALinear(linear, rank=2, alpha=2.0)
    layer.lora_B.data.normal_()
    x = torch.randn(5, 8, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
    exact = x.double() @ (linear.weight + layer.lora_B @ layer.lora_A).double().T + linear.bias.double()
    assert _error(y.double(), exact) < 0.02


def test_injection_mistakes(wan):
    for arguments in ({"rank": 0}, {"rank": 4, "alpha": 0.0}, {"rank": 4, "alpha": float("inf")}):
        with pytest.raises(ValueError, match="expected both to be positive"):
            lora.inject(wan, **arguments)
    with pytest.raises(ValueError, match="no linear layers norm3"):
        lora.inject(wan, rank=2, targets=("ffn.0", "norm3"))
    assert all(parameter.requires_grad for parameter in wan.parameters())
    lora.inject(wan, rank=2)
    with pytest.raises(ValueError, match="already carries"):
        lora.inject(wan, rank=2)


# Files


@pytest.mark.parametrize("alpha", [None, 3.0, 8.0])
def test_round_trip(wan, tmp_path, alpha):
    lora.inject(wan, rank=3, alpha=alpha)
    _train(wan, _random(wan))
    extracted = lora.extract(wan)
    path = tmp_path / "new" / "mine.safetensors"
    lora.save(path, extracted, base="tiny", metadata={"steps": "900"})
    # alpha = rank is the scale 1, which needs no alpha in the file
    written = alpha if alpha == 8.0 else None
    _same(lora.load(path), LoRA({name: Pair(A, B, written) for name, (A, B, _) in extracted.pairs.items()}))
    with safe_open(path, "pt") as file:
        shown = f"{alpha or 3.0:g}"
        assert file.metadata() == {"format": "pt", "rank": "3", "alpha": shown, "base": "tiny", "steps": "900"}
    assert [entry.name for entry in path.parent.iterdir()] == ["mine.safetensors"]
    with pytest.raises(ValueError, match="no LoRA pairs"):
        lora.save(path, LoRA())


PEFT_NAMES = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


MUSUBI = "lora_unet_{flat}.lora_{down_up}.weight"
FUN = "lora_unet__{flat}.lora_{down_up}.weight"


@pytest.mark.parametrize(
    "pattern, suffix, dtype, alpha, writer",
    [
        ("{name}.lora_{AB}.default.weight", ".pt", torch.float32, None, "the official Pusa"),
        ("{name}.lora_{AB}.weight", ".safetensors", torch.bfloat16, None, "PEFT"),  # Pusa for Wan2.2 in some copies
        ("diffusion_model.{name}.lora_{AB}.default.weight", ".safetensors", torch.bfloat16, None, "the official Pusa"),
        ("{name}.lora_{down_up}.weight", ".safetensors", torch.bfloat16, 8.0, "LightX2V"),
        ("diffusion_model.{name}.lora_{down_up}.weight", ".safetensors", torch.float16, None, "LightX2V, or extracted"),
        ("diffusion_model.{name}.lora_{down_up}.weight", ".pth", torch.float16, 2.5, "LightX2V, or extracted"),
        (MUSUBI, ".safetensors", torch.bfloat16, 16.0, "musubi-tuner"),
        (FUN, ".safetensors", torch.float32, 1.0, "Fun-LoRA"),
        ("transformer.{peft}.lora_{AB}.weight", ".safetensors", torch.float32, None, "diffusers"),
        ("base_model.model.{peft}.lora_{AB}.pusa.weight", ".bin", torch.float32, 4.0, "diffusers"),
        ("base_model.model.transformer.{name}.lora_{AB}.weight", ".safetensors", torch.float32, None, "PEFT"),
        ("diffusion_model.{name}.lora_{AB}.weight", ".safetensors", torch.float32, None, "ComfyUI, diffusion-pipe"),
    ],
)
def test_each_layout(wan, tmp_path, pattern, suffix, dtype, alpha, writer):
    """The keys of each program, with a rank for each layer, merged as the formula says."""
    two, five = _random(wan, rank=2, alpha=alpha), _random(wan, rank=5, alpha=alpha)
    pairs, tensors = {}, {}
    for i, name in enumerate(two.pairs):
        A, B, _ = (two if i % 3 else five).pairs[name]
        pairs[name] = Pair(A.to(dtype), B.to(dtype), alpha)
        _, block, layer = name.split(".", 2)
        names = {"name": name, "flat": name.replace(".", "_"), "peft": f"blocks.{block}.{PEFT_NAMES[layer]}"}
        for tensor, AB, down_up in zip(pairs[name][:2], ("A", "B"), ("down", "up"), strict=True):
            key = pattern.format(AB=AB, down_up=down_up, **names)
            tensors[key] = tensor
        if alpha is not None:
            tensors[key.split(".lora_")[0] + ".alpha"] = torch.tensor(alpha, dtype=dtype)
    path = tmp_path / f"lora{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)

    before = _snapshot(wan)
    lora.merge(wan, lora.load(path), 1.4)
    _merged_as_expected(wan, before, LoRA(pairs), 1.4)
    shown = call(COMMAND, "inspect", path)
    assert shown.status == 0 and f"written by  {writer}" in shown.out and "rank        2, 5\n" in shown.out


def test_the_table_of_layers_names_every_parameter(wan):
    parameters = [name for name in wan.state_dict() if not name.endswith(".bias")]
    layers = {re.sub(r"^blocks\.\d+", "blocks.{}", name.removesuffix(".weight")) for name in parameters}
    assert sorted(names.TRANSFORMER_LAYERS) == sorted(layers)
    assert names.rename("blocks.3.ffn.0", names.TRANSFORMER_NAMES) == "blocks.3.ffn.net.0.proj"


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_whole_changes_of_every_parameter_in_every_spelling(theirs, flat, tmp_path):
    """`.diff`, `.diff_b` and `.diff_m`, as LightX2V and ComfyUI extract them, also outside of the ten layers."""
    model = Wan(WanConfig(12, 16, 8, num_heads=2, num_layers=12, text_dim=6))
    before, diffs, tensors = _snapshot(model), {}, {}
    for name, parameter in model.named_parameters():
        diffs[name] = torch.randn_like(parameter)
        layer, _, kind = (names.rename(name, names.TRANSFORMER_NAMES) if theirs else name).rpartition(".")
        spelled = f"{layer}.{kind}".lstrip(".") if "bias" not in kind and "weight" not in kind else layer
        spelled = "lora_unet_" + spelled.replace(".", "_") if flat else "diffusion_model." + spelled
        tensors[spelled + (".diff_b" if kind == "bias" else ".diff")] = diffs[name]
    if not theirs and not flat:
        for name in ("blocks.11", "head"):
            tensors[f"diffusion_model.{name}.diff_m"] = tensors.pop(f"diffusion_model.{name}.modulation.diff")
    save_file(tensors, tmp_path / "lora.safetensors")
    lora.merge(model, lora.load(tmp_path / "lora.safetensors"), -0.7)
    _merged_as_expected(model, before, LoRA(diffs=diffs), -0.7)


def test_pairs_outside_of_the_ten_layers(wan, tmp_path):
    """CausVid changes every linear layer, and an extraction also the convolution that cuts patches."""
    generator = torch.Generator().manual_seed(0)
    names = ("time_projection.1", "text_embedding.2", "time_embedding.0", "head.head")
    pairs = {}
    for name in names:
        rows, columns = wan.get_submodule(name).weight.shape
        pairs[name] = Pair(torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator))
    A, B = torch.randn(3, 16, 1, 2, 2, generator=generator), torch.randn(48, 3, 1, 1, 1, generator=generator)
    tensors = {
        f"{name}.lora_{part}.weight": getattr(pair, part) for name, pair in pairs.items() for part in "AB"
    }
    save_file(
        {**tensors, "patch_embedding.lora_A.weight": A, "patch_embedding.lora_B.weight": B}, tmp_path / "a.safetensors"
    )
    before = _snapshot(wan)
    lora.merge(wan, lora.load(tmp_path / "a.safetensors"), 0.5)
    change = LoRA(pairs, {"patch_embedding.weight": torch.einsum("orabc,rixyz->oixyz", B, A)})
    _merged_as_expected(wan, before, change, 0.5)


@pytest.mark.filterwarnings("ignore:Adapter")  # PEFT's own, about the biases that it writes
def test_a_folder_that_peft_wrote(wan, golden, tmp_path):
    """PEFT scales by lora_alpha/rank, the bias of B as well, and keeps alpha in a file of its own."""
    peft = pytest.importorskip("peft")
    targets = r"blocks\.\d+\.(self_attn\.[qkvo]|ffn\.0)|head\.head"
    other = Wan(golden[0])
    other.load_state_dict(wan.state_dict())
    settings = peft.LoraConfig(r=3, lora_alpha=12, lora_bias=True, target_modules=targets, rank_pattern={"ffn.0": 2})
    other = peft.get_peft_model(other, settings)
    for name, parameter in other.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    other.save_pretrained(tmp_path)
    lora.merge(wan, lora.load(tmp_path / "adapter_model.safetensors"))
    for name, expected in other.merge_and_unload().state_dict().items():
        torch.testing.assert_close(wan.state_dict()[name], expected, rtol=1e-5, atol=1e-6)

    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
    with pytest.raises(ValueError, match="use_rslora"):
        lora.load(tmp_path / "adapter_model.safetensors")


A, B = torch.zeros(2, 4), torch.zeros(4, 2)
PAIR = {"blocks.0.ffn.0.lora_A.weight": A, "blocks.0.ffn.0.lora_B.weight": B}


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({**PAIR, "blocks.0.ffn.1.diff_b": B}, r"understood 2 of 3 keys; first unknown blocks\.0\.ffn\.1\.diff_b"),
        ({**PAIR, "blocks.0.ffn.0.diff_m": A}, "understood 2 of 3 keys"),
        ({**PAIR, "blocks.0.cross_attn.k_img.lora_A.weight": A}, "understood 2 of 3 keys.*text-to-video Wan"),
        ({**PAIR, "lora_unet_blocks_0_ffn_00.alpha": A[0, 0]}, "understood 2 of 3 keys"),
        ({**PAIR, "blocks.0.ffn.0.lora_A.bias": B}, "understood 2 of 3 keys"),
        ({**PAIR, "blocks.0.ffn.0.dora_scale": B}, "understood 2 of 3 keys"),
        ({**PAIR, "blocks.0.ffn.0.alpha": B}, "understood 2 of 3 keys"),
        ({"blocks.0.ffn.0.weight": A}, "understood 0 of 1 keys"),
        ({}, "understood 0 of 0 keys"),
        ({**PAIR, "blocks.1.ffn.0.lora_A.weight": A}, r"1 of 2 layers lack A or B; first incomplete blocks\.1\.ffn\.0"),
        ({**PAIR, "blocks.1.ffn.0.alpha": A[0, 0]}, "1 of 2 layers lack A or B"),
        ({**PAIR, "blocks.1.ffn.0.lora_B.bias": B[0]}, "1 of 2 layers lack A or B"),
        ({**PAIR, "diffusion_model.blocks.0.ffn.0.lora_A.weight": A}, "more than one A for a layer"),
        ({**PAIR, "lora_unet_blocks_0_ffn_0.lora_up.weight": A}, "more than one B for a layer"),
        ({**PAIR, "blocks.0.ffn.0.alpha": A[0, 0] / 0}, r"numbers in blocks\.0\.ffn\.0\.alpha that are not finite"),
        ([A, B], "not a flat dict of tensors"),
        ({"state_dict": PAIR}, "not a flat dict of tensors"),
        ({"model_state": PAIR}, "not a flat dict of tensors"),
        ({**PAIR, 1: A}, "not a flat dict of tensors"),
        ({**PAIR, "blocks.0.ffn.0.diff": A.to_sparse()}, "not a flat dict of tensors"),
        ({**PAIR, "blocks.0.ffn.0.diff": A.to("meta")}, "not a flat dict of tensors"),
        ({**PAIR, "blocks.0.ffn.0.diff": torch.nested.nested_tensor([A, B])}, "not a flat dict of tensors"),
        ({**PAIR, "blocks.0.ffn.0.diff": torch.quantize_per_tensor(A, 1.0, 0, torch.quint8)}, "not a flat dict of ten"),
    ],
)
def test_a_file_that_is_not_wholly_understood(tmp_path, tensors, message):
    torch.save(tensors, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=message):
        lora.load(tmp_path / "lora.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused(tmp_path, zipped):
    trap = tmp_path / "trap"
    content = {**PAIR, "alpha": Code(trap)}
    path = tmp_path / "lora.pt"
    torch.save(content, path) if zipped else path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="could run code") as caught:
        lora.load(path)
    assert not trap.exists() and len(str(caught.value).splitlines()) == 1


def test_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match="no LoRA file at"):
        lora.load(tmp_path / "none.safetensors")
    save_file(PAIR, tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    torch.save(PAIR, tmp_path / "whole.pt")
    zipped = (tmp_path / "whole.pt").read_bytes()
    damaged = {"a.safetensors": whole[:-9], "b.safetensors": b"", "c.pt": zipped[:-300], "d.pt": b"", "e.pt": b"text"}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read|is damaged"):
            lora.load(tmp_path / name)
    (tmp_path / "lora.txt").write_bytes(whole)
    with pytest.raises(ValueError, match="to end in"):
        lora.load(tmp_path / "lora.txt")


# Writing, and other programs.


def _published(path, rank=512, pattern="{}.lora_{}.default.weight", change=lambda tensors: tensors, metadata=None):
    """A file such as Pusa's authors publish, of two narrow blocks."""
    layers = [f"blocks.{i}.{target}" for i in range(2) for target in lora.TARGETS]
    shapes = {"A": (rank, 3), "B": (3, rank)}
    tensors = change({pattern.format(name, part): torch.ones(shapes[part]) for name in layers for part in "AB"})
    torch.save(tensors, path) if path.suffix == ".pt" else save_file(tensors, path, metadata)
    return path


def test_published_pusa_files_are_known_by_what_is_in_them(tmp_path):
    for path in (
        _published(tmp_path / "a.pt"),
        _published(tmp_path / "b.safetensors", pattern="diffusion_model.{}.lora_{}.weight", metadata={"format": "pt"}),
        _published(tmp_path / "c.safetensors", pattern="{}.lora_{}.weight"),
    ):
        assert [lora_files.usual_strength(path, expert) for expert in ("", "high", "low")] == [1.4, 1.5, 1.4]


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 256},
        {"metadata": {"rank": "512", "alpha": "512"}},  # ours
        {"change": lambda t: {**t, "diffusion_model.blocks.0.ffn.0.alpha": torch.ones(1)}},
        {"change": lambda t: {name: tensor for name, tensor in t.items() if "ffn.2" not in name}},
        {"change": lambda t: {**t, "blocks.0.norm3.diff_b": torch.ones(3)}},
        {"change": lambda t: {name.replace("_A", "_down").replace("_B", "_up"): tensor for name, tensor in t.items()}},
        {"pattern": "transformer.{}.lora_{}.weight"},
    ],
)
def test_what_others_publish_is_not_taken_for_pusas(settings, tmp_path):
    path = _published(tmp_path / "a.safetensors", **settings)
    assert [lora_files.usual_strength(path, expert) for expert in ("", "high", "low")] == [1, 1, 1]


def test_own_files_are_not_taken_for_pusas(wan, tmp_path):
    for to in lora_files.LAYOUTS:
        lora.save(tmp_path / f"{to}.safetensors", _random(wan, rank=512), to=to)
        assert lora_files.usual_strength(tmp_path / f"{to}.safetensors", "high") == 1


def test_equal_input_gives_equal_bytes(wan, tmp_path):
    change = _random(wan, alpha=2.5)
    metadata = {key: 'ä " \\ \n' + key for key in "hgfedcba"}
    for i, order in enumerate((list(metadata), sorted(metadata))):
        lora.save(tmp_path / f"{i}.safetensors", change, base="tiny", metadata={key: metadata[key] for key in order})
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert file.metadata() == {**metadata, "format": "pt", "rank": "3", "alpha": "2.5", "base": "tiny"}
    _same(lora.load(tmp_path / "0.safetensors"), change)


@pytest.mark.parametrize("to", ["comfy", "peft", "original"])
def test_convert(wan, tmp_path, to, monkeypatch):
    """From musubi-tuner's keys to each layout and back to memory: the same change, byte for byte the same file."""
    change, tensors = _random(wan, rank=4, alpha=6.0), {}
    for name, (A, B, alpha) in change.pairs.items():
        flat = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": torch.tensor(alpha)}
    save_file(tensors, tmp_path / "in.safetensors", {"base": "a model", "lora_adapter_metadata": "{}"})
    out = tmp_path / "new" / "out.safetensors"
    ended = call(COMMAND, "convert", tmp_path / "in.safetensors", out, "--to", to)
    assert ended.status == 0, ended.err
    assert ended.out == f"{out}: 20 pairs and 0 whole parameters, named as for {to}\n"
    expected = {"comfy": "diffusion_model.blocks.1.self_attn.o.lora_A.weight",
                "peft": "transformer.blocks.1.attn1.to_out.0.lora_A.weight",
                "original": "blocks.1.self_attn.o.lora_A.default.weight"}  # fmt: skip
    with safe_open(out, "pt") as file:
        assert expected[to] in file.keys() and len(file.keys()) == (60 if to == "comfy" else 40)
        shown = {"format": "pt", "rank": "4", "alpha": "6" if to == "comfy" else "4", "base": "a model"}
        assert file.metadata() == shown
    before = _snapshot(wan)
    lora.merge(wan, lora.load(out), 1.4)
    _merged_as_expected(wan, before, change, 1.4)

    again = tmp_path / "again.safetensors"
    assert call(COMMAND, "convert", out, again, "--to", to).status == 0
    assert again.read_bytes() == out.read_bytes()
    mistake(call(COMMAND, "convert", out, again), "again.safetensors exists", "--overwrite")
    with monkeypatch.context() as patch:
        full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        patch.setattr(lora_files, "save_file", mock.Mock(side_effect=full))
        ended = call(COMMAND, "convert", out, again, "--to", to, "--overwrite")
        mistake(ended, f"cannot write {again}", "as the disk is full")
    assert again.read_bytes() == out.read_bytes() and sorted(again.parent.glob(".*")) == []
    assert call(COMMAND, "convert", out, again, "--to", "comfy", "--overwrite").status == 0


def test_convert_keeps_whole_changes_or_refuses(wan, tmp_path):
    change, before = LoRA(_random(wan, alpha=2.0).pairs, _whole(wan)), _snapshot(wan)
    lora.save(tmp_path / "a.safetensors", change)
    lora.merge(wan, lora.load(tmp_path / "a.safetensors"), 1.4)
    _merged_as_expected(wan, before, change, 1.4)
    count = len(_whole(wan))
    for to, lost in (("peft", count - 20), ("original", count)):  # PEFT has the biases of the twenty pairs
        ended = call(COMMAND, "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", to)
        mistake(ended, f"{lost} changes of whole parameters", "use comfy")
    mistake(call(COMMAND, "convert", tmp_path / "a.safetensors"), "expected convert IN OUT")
    mistake(call(COMMAND, "convert", tmp_path / "a.safetensors", tmp_path / "b.pt"), "ends in .safetensors")
    with pytest.raises(ValueError, match="layout kohya, expected one of comfy, peft, original"):
        lora.save(tmp_path / "b.safetensors", change, to="kohya")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_inspect(wan, tmp_path):
    A, B = torch.zeros(2, 48), torch.zeros(48, 2)
    A[0, 0], B[0, 0], B[1, 0] = 2.0, 3.0, 4.0  # of norm 2 and 5
    pairs = {"blocks.0.self_attn.q": Pair(A, B, 1.0), "blocks.1.self_attn.q": Pair(A.clone(), B.clone())}
    diffs = {"head.modulation": A.clone()[None]}
    path = tmp_path / "a.safetensors"
    lora.save(path, LoRA(pairs, diffs), base="tiny", metadata={"steps": "900"})
    checkpoint.save_pipeline(tmp_path / "model", {"transformer": wan})
    shown = call(COMMAND, "inspect", path, "--model", tmp_path / "model")
    assert shown.status == 0, shown.err
    rows = dict(line.split(maxsplit=1) for line in shown.out.replace("written by", "writer").splitlines())
    assert rows["changes"] == "2 layers by a pair, 1 whole parameters"
    assert (rows["rank"], rows["alpha"], rows["parameters"]) == ("2", "1, as the rank", "480")
    assert rows["stored"] == "as   float32" and rows["[steps]"] == "900" and rows["[base]"] == "tiny"
    assert rows["matched"].startswith("3 of 3 in")
    assert rows["strongest"] == "blocks.1.self_attn.q (10), blocks.0.self_attn.q (5), head.modulation (2)"

    lora.save(path, LoRA({**pairs, "blocks.2.ffn.0": Pair(A.clone(), B.clone())}, diffs))
    mistake(call(COMMAND, "inspect", path, "--model", tmp_path / "model"), "matched 3 of 4", "blocks.2.ffn.0")


def _diffusers_model(config, wan):
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    theirs = WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.dim // config.num_heads,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    ).eval()
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(_snapshot(wan)))
    return theirs


@torch.no_grad()
def _agree(wan, theirs, tensors):
    x, timestep, context = tensors["x"], tensors["timestep_uniform"], tensors["context"]
    ours = wan(x, timestep / 1000, context)
    assert _error(ours, theirs(x, timestep, context).sample) < 1e-4
    assert _error(ours, tensors["velocity_uniform"]) > 1e-2


@pytest.mark.parametrize("alpha", [None, 7.0])
@pytest.mark.parametrize("to", ["comfy", "peft"])
def test_diffusers_reads_our_file(wan, golden, tmp_path, alpha, to):
    theirs = _diffusers_model(golden[0], wan)
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    change = _random(wan, rank=3, alpha=alpha)
    if alpha is not None:
        change.diffs["blocks.1.ffn.0.bias"] = torch.randn(96)
    lora.save(tmp_path / "mine.safetensors", change, base="tiny", to=to)
    state = WanLoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name="mine.safetensors")
    theirs.load_lora_adapter(state)
    lora.merge(wan, change)
    _agree(wan, theirs, golden[1])


@pytest.mark.parametrize("says_alpha", [True, False])
def test_a_file_that_diffusers_wrote(wan, golden, tmp_path, says_alpha):
    theirs = _diffusers_model(golden[0], wan)
    import peft
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    settings = peft.LoraConfig(r=4, lora_alpha=8 if says_alpha else 4, target_modules=list(PEFT_NAMES.values())[:4])
    theirs.add_adapter(settings)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    about = {"r": 4, "lora_alpha": 8} if says_alpha else None
    state = peft.get_peft_model_state_dict(theirs)
    WanLoraLoaderMixin.save_lora_weights(tmp_path, state, transformer_lora_adapter_metadata=about)
    lora.merge(wan, lora.load(tmp_path / "pytorch_lora_weights.safetensors"))
    _agree(wan, theirs, golden[1])
