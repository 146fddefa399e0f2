"""paper/: tasks without training, tables of any order, wrong noise levels, text-to-video: known answers for each."""

import shutil

import pytest
import torch
from small import model_fixture  # noqa: F401

import tasks
from paper import context, preservation, retake, schedules, stream, vector, zero_shot
from paper.lab import Config, Lab
from toy import world
from toy.judge import Judge

# How many clips each makes of a scene.
CLAIMS = {zero_shot: 22, schedules: 20, vector: 40, preservation: 12, retake: 5, context: 20}
K, SHIFT = 10, 3.0
OTHERS = (*schedules.ORDERLY, *schedules.RANDOM)


class Sheet(Lab):
    """A bench whose figures are told, not measured: `told(name)` gives the value of every scene and seed."""

    def __init__(self, tmp_path, told, quick=False):
        super().__init__(Config(quick=quick, results=str(tmp_path), device="cpu"), "told")
        self.give = told

    def figure(self, name, values, same=""):
        self.figures[name] = [[self.give(name) + seed / 100 for _ in range(3)] for seed in self.seeds]


def _bench(tmp_path, model, name) -> Lab:
    """A bench of one scene on the small model, which finds its LoRAs trained."""
    lab = Lab(Config(results=str(tmp_path), work=str(tmp_path), model=str(model), commit="x", device="cpu"), name)
    lab.scenes, lab.seeds = 1, (0,)
    (tmp_path / "seed-0").mkdir(parents=True)
    shutil.copy(model / "lora.safetensors", tmp_path / "seed-0")
    return lab


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_claim_measures_within_its_budget_and_not_again(claim, tmp_path, model, monkeypatch):
    lab, calls = _bench(tmp_path, model, "claim"), []
    lab.scenes, lab.seeds = 2, (0, 1)

    def perfect(judge, network, task, seed=0, taus=None, **settings):
        calls.append(task)
        return judge.truth + 1e-3 * torch.randn(judge.truth.shape)

    monkeypatch.setattr(Judge, "videos", perfect)
    claim.measure(lab)
    assert len(calls) == 2 * CLAIMS[claim]
    values = {name: torch.tensor(each) for name, each in lab.figures.items()}
    assert all(each.shape == (2, 1) and each.isfinite().all() for each in values.values())
    for name, each in values.items():
        if name.endswith(": error") or claim is schedules:
            assert each.max() < 1, "true clips have their shapes in their places"
        if "kept" in name:
            assert each.min() > 60
        if "prompted" in name:
            assert each.min() == 100
        if "diversity" in name:
            assert each.max() < 0.5, "every seed made the same clip"
    claim.measure(lab)
    assert len(calls) == 2 * CLAIMS[claim], "what has been measured is not measured again"


@pytest.mark.parametrize("quick", (False, True), ids=("full", "quick"))
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
def test_a_claim_is_drawn(claim, quick, tmp_path):
    lab = Sheet(tmp_path, lambda name: 1.0 + len(name) % 5, quick)
    claim.measure(lab)
    claim.draw(lab, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert all(row.ours and (row.paper or "Beyond the paper" in claim.__doc__) for row in claim.rows(lab))


def _held(claim, tmp_path, told) -> list[bool]:
    lab = Sheet(tmp_path, told)
    claim.measure(lab)
    return [row.holds for row in claim.rows(lab)]


def test_tasks_hold_only_if_the_error_falls_and_conditions_stay(tmp_path):
    def told(name, after=2.0, decibels=30.0):
        return after if "seed-0: error" in name else 8.0 if "error" in name else decibels

    assert _held(zero_shot, tmp_path, told) == [True] * 10
    worse = _held(zero_shot, tmp_path, lambda name: told(name, after=8.0))
    assert worse == [None] * 8 + [True] * 2
    assert _held(zero_shot, tmp_path, lambda name: told(name, decibels=20.0)) == [False, True, *[False] * 7, True]
    level = _held(zero_shot, tmp_path, lambda name: 2.0 if "told one" in name else told(name))
    assert level == [True, None, *[True] * 8], "than a base that is told one level"


def test_tables_hold_only_if_the_strange_ones_are_as_good(tmp_path):
    stairs, paces = [False, False, True, True, False, True], [False, True, False, True, True, True]
    assert _held(schedules, tmp_path, lambda name: 4.0) == [True] * 6
    assert _held(schedules, tmp_path, lambda name: 8.0 if "staircase" in name else 4.0) == stairs
    assert _held(schedules, tmp_path, lambda name: 8.0 if "pace" in name else 4.0) == paces
    worse = _held(schedules, tmp_path, lambda name: 8.0 if name.endswith("random levels") else 4.0)
    assert worse == [False, True, True, False, True, False], "than random levels that all frames share"


def test_a_vector_carries_a_task_only_if_every_scalar_is_worse(tmp_path):
    assert _held(vector, tmp_path, lambda name: 5.0 if "for all" in name else 4.0) == [True, True, None, *[True] * 4]
    assert _held(vector, tmp_path, lambda name: 5.0 if "mean for all" in name else 4.0) == [None] * 7
    assert _held(vector, tmp_path, lambda name: 4.0) == [None] * 7
    told_one = _held(vector, tmp_path, lambda name: 3.0 if f"seed-0: {vector.SCALARS[0]}" in name else 4.0)
    assert told_one == [False, None, True, *[False] * 4]
    for scalar, gains in zip(vector.SCALARS, (False, None), strict=True):
        held = _held(vector, tmp_path, lambda name, scalar=scalar: 3.0 if scalar in name else 4.0)
        assert held == [False, gains, None, *[False] * 4], "the base, told the mean, may be worse or not"


def test_text_to_video_is_kept_only_if_nothing_is_lost(tmp_path):
    assert _held(preservation, tmp_path, lambda name: 9.0 if "first clean" in name else 4.0) == [True] * 3
    assert _held(preservation, tmp_path, lambda name: 1.0 if name.endswith(", 1") else 4.0) == [False, False, False]


# Tables


def test_the_own_table_is_the_task_s():
    for task in ("i2v", "extend"):
        m = Judge.plan(task).m
        torch.testing.assert_close(schedules.taus(schedules.OWN, task, K, SHIFT), tasks.tau_schedule(m, K, SHIFT))


@pytest.mark.parametrize("task", ("i2v", "extend"))
@pytest.mark.parametrize("table", OTHERS)
def test_tables_go_from_noise_to_data_and_keep_conditions_clean(table, task):
    taus, m = schedules.taus(table, task, K, SHIFT, seed=1), Judge.plan(task).m
    assert taus.shape == (K + 1, 9) and taus.min() >= 0 and taus.max() <= 1
    torch.testing.assert_close(taus[0], m)
    assert (taus[-1] == 0).all() and (taus[:, m == 0] == 0).all()
    assert (taus - schedules.taus(schedules.OWN, task, K, SHIFT)).abs().max() > 0.1


def test_one_frame_is_late_early_or_backwards():
    own, late, early, back = (schedules.taus(n, "i2v", K, SHIFT) for n in (schedules.OWN, "late", "early", "backwards"))
    others = [i for i in range(9) if i != 5]
    for taus in (late, early, back):
        assert torch.equal(taus[:, others], own[:, others])
    assert (late[1:-1, 5] > own[1:-1, 5]).all() and (early[1:-1, 5] < own[1:-1, 5]).all()
    assert (back.diff(dim=0)[:, 5] > 0).any() and not (own.diff(dim=0) > 0).any()


def test_a_staircase_leads_from_its_end():
    stairs, turned = (schedules.taus(n, "i2v", K, SHIFT) for n in ("staircase", "staircase from the end"))
    assert (stairs[1:-1, 1:].diff(dim=1) > 0).all()
    assert torch.equal(turned[:, 1:], stairs[:, 1:].flip(1))


def test_strangeness_is_0_in_step_and_a_third_for_levels_as_the_lora_is_trained():
    own, levels = (schedules.taus(n, "i2v", 4000, SHIFT) for n in (schedules.OWN, "random levels"))
    assert schedules.strangeness(own, "i2v") == 0
    assert schedules.strangeness(levels, "i2v") == pytest.approx(1 / 3, abs=0.01)
    pair = torch.zeros(2, 9)
    pair[0, 1] = 0.8  # one of 8 frames apart from 7: 7 of 28 pairs
    assert schedules.strangeness(pair, "i2v") == pytest.approx(0.8 * 7 / 28)


def test_random_tables_differ_by_seed():
    for table in schedules.RANDOM:
        one, same, other = (schedules.taus(table, "i2v", K, SHIFT, seed) for seed in (0, 0, 1))
        assert torch.equal(one, same) and not torch.equal(one, other)
    assert (schedules.taus("random pace", "i2v", K, SHIFT).diff(dim=0) <= 0).all()


# Wrong levels


class Ear(torch.nn.Module):
    def prompt_keys(self, context):
        return ["keys", context]

    def forward(self, z, tau, context):
        self.heard = tau
        return z


def test_a_misled_network_hears_another_level_where_it_should():
    ear, tau = Ear(), torch.tensor([[0.0, 0.9] + [0.9] * 7, [0.0] + [0.45] * 8])
    mean = tau.mean(1)
    wrong_for = {vector.RIGHT: [], vector.SCALARS[1]: range(9), vector.PARTS[0]: [0], vector.PARTS[1]: range(1, 9)}
    for told, wrong in wrong_for.items():
        network = vector.Told(ear, vector.misled(told, "i2v"))
        network(torch.zeros(2, 16, 9, 1, 1), tau, None)
        for i in range(9):
            torch.testing.assert_close(ear.heard[:, i], mean if i in wrong else tau[:, i])
    vector.Told(ear, vector.misled(vector.SCALARS[0], "i2v"), highest=True)(torch.zeros(2, 16, 9, 1, 1), tau, None)
    assert torch.equal(ear.heard, tau[:, 1:2].expand(2, 9)), "what the free frames have, for all"
    assert tau[0, 0] == 0, "the table itself is not touched"
    assert network.prompt_keys("a") == ["keys", "a"]


# Tasks and text-to-video


def test_a_transition_between_the_ends_of_a_clip_is_a_completion():
    one, other = (Judge.plan(task) for task in ("complete", "transition"))
    truth = torch.rand(1, 3, world.FRAMES, 64, 64)
    assert torch.equal(one.m, other.m) and [s.positions for s in one.slots] == [s.positions for s in other.slots]
    parts = (Judge._inputs(task, plan, truth) for task, plan in (("complete", one), ("transition", other)))
    assert all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


def test_starts_apart_are_measured_in_pixels():
    thing = world.Thing("circle", "red", "small", "slowly", "right", 20.0, 20.0)
    moved = thing._replace(x=23.0, y=24.0)
    one, other = (world.measure(world.render(world.Scene("black", (t,)), 1)[None]) for t in (thing, moved))
    empty = world.measure(torch.full((1, 3, 1, 64, 64), -1.0))
    scenes = [world.Scene("black", (thing,))]
    assert preservation.apart(scenes, one, other).tolist() == [pytest.approx(5, abs=0.1)]
    assert preservation.apart(scenes, one, one).tolist() == preservation.apart(scenes, one, empty).tolist() == [0]


def test_the_change_of_the_velocity_is_the_lora_s(tmp_path, model):
    lab = _bench(tmp_path, model, "claim")
    change = preservation._change(lab, 0.5, preservation.EQUAL, 0)
    assert change.shape == (1,) and change > 1
    base = lab.network("base")
    assert lab.network("base") is base and lab.network("seed-0", 0.0) is not base
    z, right = lab.velocity(base, torch.full((9,), 0.5), 0)
    assert z.shape == right.shape == (1, 16, 9, 8, 8)
    x1 = torch.randn(right.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(right, x1 - lab.judge.vae.encode(lab.judge.truth))


# Stream


def test_a_stream_goes_on_from_true_frames_in_windows_and_on_a_ramp(tmp_path, model, monkeypatch):
    monkeypatch.setattr(stream, "SECONDS", (1, 3))
    monkeypatch.setattr(stream, "F", 13)  # latent frames: more than a window
    lab = _bench(tmp_path, model, "stream")
    stream.measure(lab)
    assert len(lab.figures) == len(stream.METHODS) * 2 * len(stream.KINDS)
    assert torch.tensor([*lab.figures.values()]).isfinite().all()
    lab.seed, given = 0, lab.latents[:, :, : stream.GIVEN]
    led, network = (lab.judge.context, lab.judge.negative, 3.0), lab.network("embedded")
    for method in stream.METHODS:
        made = stream.generate(lab, network, method, lab.judge.truth, led, torch.Generator().manual_seed(0))
        torch.testing.assert_close(made[:, :, : stream.GIVEN], given)
