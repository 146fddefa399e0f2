"""flow.py: the path, PTSS, the loss and the sampler, against hand calculation and the published scheduler's loop."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import flow

GOLDEN = Path(__file__).parent / "golden"


def test_interpolate_takes_each_frame_along_its_own_path():
    x0, x1 = torch.full((2, 1, 3, 1, 1), 10.0), torch.full((2, 1, 3, 1, 1), 20.0)
    x = flow.interpolate(x0, x1, torch.tensor([[0.0, 0.3, 1.0], [0.5, 0.0, 0.1]]))
    assert x[:, 0, :, 0, 0].tolist() == [pytest.approx([10, 13, 20]), pytest.approx([15, 10, 11])]
    assert torch.equal(flow.interpolate(x0, x1, torch.tensor([[0.0, 0.3, 1.0]]))[1], x[0])
    assert flow.interpolate(x0.bfloat16(), x1.bfloat16(), torch.rand(2, 3)).dtype == torch.float32


@pytest.mark.parametrize("shape", [(2,), (3, 3), (2, 4), (3, 2)])
def test_tau_of_another_shape_is_refused(shape):
    x = torch.zeros(2, 4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"got tau .* expected \(2, 3\)"):
        flow.interpolate(x, x, torch.zeros(shape))


def test_sigma_schedule_by_hand():
    assert flow.sigma_schedule(4, 5.0).tolist() == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8, 0])
    assert flow.sigma_schedule(4, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]
    many = flow.sigma_schedule(1000, 5.0)
    assert many.dtype == torch.float32 and many.unique().numel() == 1001 and (many.diff() < 0).all()


def _draw(p_async, B=4000, shift=1.0, seed=0):
    return flow.sample_tau(B, 6, p_async, shift, torch.Generator().manual_seed(seed))


def test_ptss_shares_or_separates_frames():
    tau = _draw(0.0)
    assert tau.shape == (4000, 6) and tau.dtype == torch.float32
    assert (tau == tau[:, :1]).all() and tau[:, 0].unique().numel() > 3900
    assert not (_draw(1.0).diff(dim=1) == 0).any()
    shared = (_draw(0.3) == _draw(0.3)[:, :1]).all(dim=1)
    assert shared.float().mean() == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("p_async", [0.0, 0.5, 1.0])
def test_ptss_is_uniform_in_every_frame_before_the_shift(p_async):
    tau = _draw(p_async, B=20000)
    assert 0 <= tau.min() and tau.max() < 1
    for q in (0.1, 0.5, 0.9):
        assert (tau < q).float().mean(dim=0).tolist() == pytest.approx([q] * 6, abs=0.02)
    # Shifted, the median moves to 5·½ / (1 + 4·½) = 5/6.
    assert _draw(p_async, B=20000, shift=5.0).median() == pytest.approx(5 / 6, abs=0.01)


def test_ptss_frames_are_independent_and_repeat_with_the_seed():
    assert (torch.corrcoef(_draw(1.0, B=20000).T) - torch.eye(6)).abs().max() < 0.03
    assert torch.equal(_draw(0.5, seed=3), _draw(0.5, seed=3)) and not torch.equal(_draw(0.5), _draw(0.5, seed=3))


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_ptss_draws_are_shifted(shift):
    plain = torch.rand(9, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(flow.sample_tau(9, 3, 1, shift, torch.Generator().manual_seed(1)), flow.shifted(plain, shift))


def _batch(B=2, F=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, 4, F, 2, 2, generator=generator) for _ in range(3)]


def test_fafm_is_the_mean_squared_error_against_the_constant_velocity():
    velocity, x0, x1 = _batch()
    total = 0.0
    for v, a, b in zip(velocity.flatten().tolist(), x0.flatten().tolist(), x1.flatten().tolist(), strict=True):
        total += (v - (b - a)) ** 2
    loss = flow.fafm_loss(velocity, x0, x1, torch.rand(2, 3))
    assert loss.item() == pytest.approx(total / velocity.numel(), rel=1e-5)
    assert flow.fafm_loss(x1 - x0, x0, x1, torch.rand(2, 3)) == 0
    low = flow.fafm_loss(velocity.bfloat16(), x0, x1, torch.rand(2, 3))
    assert low.shape == () and low.dtype == torch.float32


def test_bell_is_the_published_curve():
    middle, quarter = 1 - math.exp(-0.5), math.exp(-0.125) - math.exp(-0.5)
    weights = flow.bell(torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0]]))[0]
    assert weights[0] == weights[4] == 0 and weights[1] == weights[3]
    assert (weights[1] / weights[2]).item() == pytest.approx(quarter / middle, rel=1e-5)
    assert flow.bell((torch.arange(1000) + 0.5) / 1000).mean().item() == pytest.approx(1, abs=1e-4)


def test_bell_weights_each_frame_of_each_sample():
    velocity, x0, x1 = _batch()
    tau = torch.tensor([[0.1, 0.5, 0.9], [0.3, 1.0, 0.0]])
    per_frame = (velocity - (x1 - x0)).square().mean(dim=(1, 3, 4))
    loss = flow.fafm_loss(velocity, x0, x1, tau, "bell")
    assert loss.item() == pytest.approx((flow.bell(tau) * per_frame).mean().item(), rel=1e-5)
    # A weight on the averaged loss could not tell these from it: two frames, or two samples, trade their levels.
    assert abs(flow.fafm_loss(velocity, x0, x1, tau[:, [1, 0, 2]], "bell") - loss) > 1e-3
    assert abs(flow.fafm_loss(velocity, x0, x1, tau.flip(0), "bell") - loss) > 1e-3


def test_euler_is_exact_on_a_straight_path_and_reports_each_step():
    _, x0, x1 = _batch()
    taus = flow.sigma_schedule(4, 5.0)[:, None] * torch.tensor([0.0, 0.4, 1.0])
    start, seen, asked = flow.interpolate(x0, x1, taus[:1]), [], []

    def velocity(z, tau):
        asked.append(tau)
        return x1 - x0

    z = flow.euler(velocity, start, taus, lambda k, z: seen.append((k, z)))
    assert torch.allclose(z, x0, atol=1e-5)
    assert [k for k, _ in seen] == [0, 1, 2, 3] and torch.equal(seen[-1][1], z)
    assert torch.allclose(seen[1][1], flow.interpolate(x0, x1, taus[2:3]), atol=1e-5)
    assert torch.equal(torch.stack(asked), taus[:-1, None].expand(4, 2, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_frame_whose_level_stands_still_is_kept_to_the_bit(bad):
    _, z, _ = _batch()
    z[:, 0, 0] = -0.0
    taus = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 1.0]])

    def velocity(z, tau):
        v = torch.ones_like(z)
        v[:, :, [0, 2]] = bad
        return v

    end = flow.euler(velocity, z, taus)
    assert torch.equal(end[:, :, [0, 2]].view(torch.int32), z[:, :, [0, 2]].contiguous().view(torch.int32))
    assert torch.allclose(end[:, :, 1], z[:, :, 1] - 1)


def test_the_published_trajectory():
    model = pytest.importorskip("model")
    golden, weights = load_file(GOLDEN / "sampler.safetensors"), load_file(GOLDEN / "dit.safetensors")
    with safe_open(GOLDEN / "dit.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
    config["patch_size"] = tuple(config["patch_size"])
    wan = model.Wan(model.WanConfig(**config)).eval()
    wan.load_state_dict({name[6:]: weight for name, weight in weights.items() if name.startswith("model.")})
    start = flow.interpolate(golden["clean"], golden["noise"], golden["tau"][:1])
    states = [start[0]]
    with torch.no_grad():
        velocity = lambda z, tau: wan(z, tau, golden["context"])  # noqa: E731
        end = flow.euler(velocity, start, golden["tau"], lambda k, z: states.append(z[0]))
    for ours, theirs in zip(states, golden["trajectory"], strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-4
    assert torch.equal(end[:, :, 0], golden["clean"][:, :, 0])  # its multiplier is 0


@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (lambda: flow.sigma_schedule(0, 5.0), "got 0 steps, expected at least 1"),
        (lambda: flow.sigma_schedule(4, 0.0), "got shift 0.0, expected a number above 0"),
        (lambda: flow.sample_tau(1, 2, p_async=1.5), r"got p_async 1.5, expected a probability in \[0, 1\]"),
        (lambda: flow.sample_tau(1, 2, shift=-1), "got shift -1"),
        (lambda: flow.sample_tau(1, 2, shift=0.0), "got shift 0.0"),
        (lambda: flow.fafm_loss(*_batch(), torch.rand(2, 3), "cone"), "got weighting 'cone', expected 'none' or"),
        (lambda: flow.fafm_loss(*_batch(), torch.rand(3, 2), "bell"), "got tau"),
        (lambda: flow.euler(lambda z, tau: z, torch.zeros(1, 4, 3, 2, 2), torch.zeros(5, 4)), r"expected \(K\+1, 3\)"),
    ],
)
def test_mistakes(mistake, sentence):
    with pytest.raises(ValueError, match=sentence):
        mistake()
