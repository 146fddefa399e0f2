"""paper/efficiency.py and paper/i2v.py: the rivals of a LoRA do what they are said to do, and budgets are compared."""

from types import SimpleNamespace

import pytest
import torch
from small import model_fixture, opened  # noqa: F401 (a fixture)

import flow
from paper import efficiency, i2v, lab, price, quality
from support import cost

F, GIVEN = 7, [0, 6]


@pytest.fixture(scope="module", name="base")
def base_fixture(model):
    return opened(model).transformer(torch.float32)


def _noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X0, X1, TAU, CONTEXT = _noise(2, 16, F, 4, 4), _noise(2, 16, F, 4, 4, seed=1), torch.rand(2, F), _noise(2, 32, 16)


def test_the_network_is_told_where_conditions_are_and_no_other_latents():
    y = i2v.condition_channels(X0, GIVEN)
    assert y.shape == (2, 20, F, 4, 4)
    assert y[:, :4, GIVEN].eq(1).all() and torch.equal(y[:, 4:, GIVEN], X0[:, :, GIVEN])
    assert not y[:, :, 1:6].any()


@torch.no_grad()
def test_the_wide_network_begins_as_the_base_and_all_of_it_learns(base):
    network = i2v.widened(base)
    assert network.config.in_dim == 36 and network.config.out_dim == 16
    sampled = i2v.ImageToVideo(network)
    sampled.condition(X0, X1, GIVEN)
    before = sampled(X1, TAU, sampled.prompt_keys(CONTEXT))
    assert torch.equal(before, base(X1, TAU, CONTEXT))
    network.patch_embedding.weight[:, 16:] = 0.1
    assert not torch.equal(sampled(X1, TAU, sampled.prompt_keys(CONTEXT)), before), "it sees the conditions"


@torch.no_grad()
def test_a_known_frame_that_is_put_back_walks_to_its_image(base):
    network = i2v.Replacement(base)
    network.condition(X0, X1, GIVEN)
    keys, passed = network.prompt_keys(CONTEXT), []
    taus = flow.sigma_schedule(4, 3.0)[:, None].expand(-1, F)
    z = flow.denoise(lambda z, tau: network(z, tau, keys), X0, X1, taus, lambda k, z: passed.append(z))
    for k, z in enumerate(passed):
        torch.testing.assert_close(z[:, :, GIVEN], flow.interpolate(X0, X1, taus[k + 1, None])[:, :, GIVEN])
    free = flow.denoise(lambda z, tau: base(z, tau, keys), X0, X1, taus)
    assert not torch.equal(z[:, :, 1:6], free[:, :, 1:6]), "the others see it"


def test_the_finetune_goes_on_where_it_was_stopped(base, tmp_path):
    data = (_noise(6, 16, F, 4, 4), _noise(6, 32, 16), torch.zeros(1, 32, 16))

    def trained(steps, state):
        network = i2v.widened(base).requires_grad_()
        i2v._train(network, data, steps, 1e-3, state, "cpu", "auto", every=2)
        return network.state_dict()

    whole = trained(4, tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["step"] == 4 and whole["patch_embedding.weight"][:, 16:].any()
    changed = [name for name, tensor in i2v.widened(base).state_dict().items() if torch.equal(tensor, whole[name])]
    assert not changed, "all weights are trained"

    stopped = [0]

    def stop(*arguments):
        stopped[0] += 1
        if stopped[0] == 4:
            raise KeyboardInterrupt
        return loss(*arguments)

    loss = i2v._loss
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(i2v, "_loss", stop)
        trained(4, tmp_path / "b.pt")
    assert torch.load(tmp_path / "b.pt", weights_only=True)["step"] == 2
    again = trained(4, tmp_path / "b.pt")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_learning_rate_is_the_one_with_the_lowest_loss_and_is_tried_once(tmp_path, monkeypatch):
    bench, tried = SimpleNamespace(config=lab.Config(), work=tmp_path, device="cpu"), []
    monkeypatch.setattr(i2v, "_trained", lambda bench, steps, rate, state: (tried.append((steps, rate)) or rate, 0.0))
    monkeypatch.setattr(i2v, "_clips", lambda bench, held_out: (held_out,))
    losses = {3e-4: 2.0, 1e-3: 1.0, 3e-3: float("nan")}
    monkeypatch.setattr(i2v, "_loss", lambda rate, held_out, draw: torch.tensor(losses[rate]))
    assert i2v.learning_rate(bench) == i2v.learning_rate(bench) == 1e-3
    assert tried == [(i2v.TRIAL, rate) for rate in i2v.RATES]


@pytest.mark.parametrize("goal, budget", [(4, 100), (3, 100 * 2**0.5), (2, 200), (1, 400), (9, 50)])
def test_a_budget_is_found_between_two_on_a_logarithmic_scale(goal, budget):
    assert efficiency.reached([50, 100, 200, 400], [8, 4, 2, 1], goal) == pytest.approx(budget)


def test_an_error_that_no_budget_reaches_is_a_mistake():
    with pytest.raises(ValueError, match="the lowest error is 1"):
        efficiency.reached([50, 100], [8, 1], 0.5)


class _Lab:
    """Figures as if they had been measured; luck: how much higher the error of each further seed of training is."""

    seeds, luck = (0, 1), lab.Lab.luck

    def __init__(self, pusa, finetune, luck=1.0):
        self.errors = {f"{efficiency.PUSA}, {n} steps": error for n, error in zip(lab.BUDGETS, pusa, strict=True)}
        self.errors |= {f"{efficiency.FINETUNE}, {n} steps": e for n, e in zip(i2v.BUDGETS, finetune, strict=True)}
        self.errors |= {name: self.errors[efficiency.SEEDS[0]] * luck**n for n, name in enumerate(efficiency.SEEDS)}

    def few(self, values):
        return values

    def values(self, name):
        return [[self.errors[name]] * 3] * len(self.seeds)


def test_the_ratio_is_taken_at_the_lowest_error_that_both_reach():
    falling, late = [8, 7, 6, 5, 4, 3, 2, 1], [9, 9, 9, 9, 9, 9, 9, 3]
    found = efficiency.ratio(_Lab(falling, late))
    assert found[:] == (4, 4, 4, 3, "") and found.more is True, "Pusa is at 3 px after 400 steps, the finetune at 1600"
    found = efficiency.ratio(_Lab(falling, late), goal=6)
    assert found.goal == 6 and found.told == pytest.approx(25.6), "50 steps to 1280"
    found = efficiency.ratio(_Lab([9, 9, 9, 9, 9, 9, 9, 4], falling))
    assert found[:] == (0.16, 0.16, 0.16, 4, "") and found.more is False, "here the finetune needs 256"
    assert efficiency.ratio(_Lab([2] * 8, falling)).bound == "at least ", "Pusa may have been there before 12 steps"
    assert efficiency.ratio(_Lab(falling, [2] * 8)).bound == "at most "
    same = efficiency.ratio(_Lab([2] * 8, [2] * 8))
    assert same.bound == "about " and same.more is None and same.low > 1, "both may have been there before"


def test_the_ratio_tells_how_far_the_scenes_agree():
    bench, random = _Lab([9] * 8, [9] * 8), torch.Generator().manual_seed(0)
    falling = {name: 8 - 7 * n / 8 for way in (lab.BUDGETS, i2v.BUDGETS) for n, name in enumerate(way)}
    steps = {name: int(name.partition(" steps")[0].split()[-1]) for name in bench.errors}
    errors = {name: falling[n] + torch.randn(40, generator=random) for name, n in steps.items()}
    bench.values = lambda name: [errors[name].tolist()]
    found = efficiency.ratio(bench)
    assert found.low < found.told < found.high and found.more is None


def test_the_ratio_tells_how_far_the_luck_of_trainings_reaches():
    falling, late = [8, 7, 6, 5, 4, 3, 2, 1], [9, 9, 9, 9, 9, 9, 9, 3]
    little, much = (efficiency.ratio(_Lab(falling, late, luck)) for luck in (1.01, 2.0))
    assert little.told == much.told == 4 and little.more is True and much.more is None
    assert much.low < little.low < 4 < little.high < much.high


class _Measured(lab.Lab):
    """Takes down which figures a claim asks for, each with values around a number of its own."""

    def figure(self, name, values, same=""):
        level = 10 + len(self.figures)
        self.figures[name] = [[level - 0.1 * seed] * 3 for seed in self.seeds]


@pytest.mark.parametrize("claim", [efficiency, quality, price])
def test_a_claim_tells_and_draws_what_it_measures(claim, model, tmp_path, monkeypatch):
    """Nothing is sampled, trained or loaded to find out which figures there are."""
    monkeypatch.setattr(efficiency, "LATENTS", (16, 3, 4, 4))
    bench = _Measured(lab.Config(model=str(model), results=str(tmp_path), work=str(tmp_path)), "claim")
    bench.judge_of = lambda part: SimpleNamespace(preset=bench.opened.preset, transformer=print, truth=None)
    claim.measure(bench)
    asked = []
    monkeypatch.setattr(_Measured, "values", lambda self, name: asked.append(name) or lab.Lab.values(self, name))
    assert all(row.claim and row.ours for row in claim.rows(bench))
    claim.draw(bench, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert bench.figures.keys() == set(asked), "all that is measured is told or drawn"
    assert not (tmp_path / "i2v").exists()


def test_operations_are_counted_with_what_is_trained(model):
    bench = type("Lab", (), {"opened": opened(model)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficiency, "LATENTS", (16, 3, 4, 4))
        dear = efficiency.flops(bench)
        patch.setattr(efficiency, "RANK", 1)
        cheap = efficiency.flops(bench)
    base = cost.window_flops(opened(model).outline()[0], (16, 3, 4, 4))  # all of its weights trained
    assert cheap[efficiency.PUSA] < base < dear[efficiency.PUSA], "32 is a high rank for a width of 48"
    assert base < cheap[efficiency.FINETUNE] == dear[efficiency.FINETUNE] < 1.1 * base, "20 channels more cost little"
