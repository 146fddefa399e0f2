"""vta.py: the embedding of a vector τ against its formula, and modulation frame by frame, never token by token."""

import math

import pytest
import torch

import vta


def test_embedding_is_cosines_then_sines_of_1000_tau():
    tau = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.0005, 0.75]])
    embedding = vta.timestep_embedding(tau, 6)
    assert embedding.shape == (2, 3, 6) and embedding.dtype == torch.float32
    for i in range(2):
        for j in range(3):
            angles = [1000 * tau[i, j].item() * 10000 ** (-k / 3) for k in range(3)]
            expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
            assert embedding[i, j].tolist() == pytest.approx(expected, abs=1e-6)
    assert embedding[0, 0].tolist() == [1, 1, 1, 0, 0, 0]


def test_angles_are_taken_in_double_precision():
    # In single precision 1000 τ would be wrong by up to 3e-5, and with it the fastest cosine.
    tau = torch.rand(1, 500)
    exact = [math.cos(1000 * t) for t in tau[0].tolist()]
    assert vta.timestep_embedding(tau, 256)[0, :, 0].tolist() == pytest.approx(exact, abs=2e-7)


def test_levels_between_integer_timesteps_stay_apart():
    one, other, zero = vta.timestep_embedding(torch.tensor([[0.0005, 0.0009, 0.0]]), 256)[0]
    assert (one - other).abs().max() > 0.2 and (one - zero).abs().max() > 0.4
    u = torch.linspace(1, 0, 1001)
    for grid in (torch.linspace(0, 1, 10001), 5 * u / (1 + 4 * u)):
        assert vta.timestep_embedding(grid[None], 256)[0].unique(dim=0).shape[0] == len(grid)


def test_frame_levels_from_scalars_and_vectors():
    scalars = vta.frame_levels(torch.tensor([0.1, 0.7], dtype=torch.float64), 2, 3)
    assert scalars.dtype == torch.float32 and torch.equal(scalars, torch.tensor([[0.1] * 3, [0.7] * 3]))
    vector = torch.rand(2, 3)
    assert torch.equal(vta.frame_levels(vector, 2, 3), vector)
    # As many samples as frames: one number a sample is still one number a sample.
    assert torch.equal(vta.frame_levels(torch.tensor([0.0, 1.0]), 2, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1), (1, 3), (3, 2), (2, 3, 1)])
def test_tau_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"got tau of shape .* expected \(2,\) or \(2, 3\)"):
        vta.frame_levels(torch.zeros(shape), 2, 3)


def test_split_adds_the_table_to_every_frame():
    table, embedding = torch.randn(1, 6, 8), torch.randn(2, 3, 6, 8)
    parts = vta.split(table.bfloat16(), embedding)
    assert len(parts) == 6 and all(part.shape == (2, 3, 1, 8) and part.dtype == torch.float32 for part in parts)
    for n, part in enumerate(parts):
        assert torch.equal(part[:, :, 0], embedding[:, :, n] + table.bfloat16().float()[0, n])
    # The head's table has two rows, and one embedding for both.
    shift, scale = vta.split(table[:, :2], embedding[:, :, :1])
    assert torch.equal(shift[:, :, 0], embedding[:, :, 0] + table[0, 0])
    assert torch.equal(scale[:, :, 0], embedding[:, :, 0] + table[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulate_takes_each_frame_by_its_own_numbers(dtype):
    x, shift, scale = torch.randn(2, 3, 5, 8).to(dtype), torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 8)
    out = vta.modulate(x, shift, scale)
    assert out.shape == x.shape and out.dtype == torch.float32
    for b in range(2):
        for f in range(3):
            for s in range(5):
                expected = x[b, f, s].float() * (1 + scale[b, f, 0]) + shift[b, f, 0]
                torch.testing.assert_close(out[b, f, s], expected, rtol=1e-5, atol=1e-6)


def test_modulation_is_never_copied_to_tokens():
    B, F, S, D = 1, 3, 50, 8
    table = torch.randn(1, 6, D, requires_grad=True)
    x = torch.randn(B, F, S, D, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        shift, scale, gate, *_ = vta.split(table, torch.randn(B, F, 6, D))
        out = vta.modulate(x, shift, scale)
    # What the backward pass keeps: the tokens themselves, and beside them nothing larger than all six rows a frame.
    assert sum(size == 4 * B * F * S * D for size in kept) == 1
    assert sum(size for size in kept if size != 4 * B * F * S * D) <= 4 * B * F * 6 * D
    assert shift.untyped_storage().data_ptr() == gate.untyped_storage().data_ptr()
    out.sum().backward()
    assert table.grad[0, 0].eq(B * F * S).all() and table.grad[0, 1].ne(0).all() and table.grad[0, 2:].eq(0).all()
