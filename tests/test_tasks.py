"""tasks.py: every task's noise levels by hand, the schedule with delays, what is cut from the inputs, and mistakes."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from small import call

import flow
import tasks
from support import plots
from tasks import Slot, cut, plan, tau_schedule

GOLDEN = Path(__file__).parent / "golden" / "sampler.safetensors"
SIGMA = [1, 15 / 16, 5 / 6, 5 / 8, 0]  # K = 4, shift 5: 5u / (1 + 4u) at u = 1, 3/4, 1/2, 1/4, 0

M = {  # by hand, on 9 latent frames
    "t2v": [1, 1, 1, 1, 1, 1, 1, 1, 1],
    "i2v": [0.2, 1, 1, 1, 1, 1, 1, 1, 1],
    "start-end": [0.2, 1, 1, 1, 1, 1, 1, 1, 0.4],
    "extend": [0, 0.3, 0.4, 0.5, 1, 1, 1, 1, 1],
    "prepend": [1, 1, 1, 1, 1, 0.5, 0.4, 0.3, 0],
    "complete": [0.3, 0.3, 1, 1, 1, 1, 1, 0.3, 0.3],
    "transition": [0.3, 0.3, 1, 1, 1, 1, 1, 0.3, 0.3],
    "keyframes": [0.2, 1, 1, 1, 0.2, 1, 1, 1, 0.2],
    "loop": [0.2, 1, 1, 1, 1, 1, 1, 1, 0.4],
    "restyle": [0.7] * 9,
    "retake": [0, 0, 0, 0.7, 0.7, 0.7, 0, 0, 0],
    "stream": [1, 1, 1, 1, 1, 1, 1, 1, 1],
}
GIVEN = {  # which part of which input, where, how many pixel frames of it, latents to drop
    "t2v": [],
    "i2v": [Slot("image", 0, (0,), 1, 0)],
    "start-end": [Slot("image", 0, (0,), 1, 0), Slot("image", 1, (8,), 5, 1)],
    "extend": [Slot("tail", 0, (0, 1, 2, 3), 13, 0)],
    "prepend": [Slot("head", 0, (5, 6, 7, 8), 17, 1)],
    "complete": [Slot("head", 0, (0, 1), 5, 0), Slot("tail", 0, (7, 8), 9, 1)],
    "transition": [Slot("tail", 0, (0, 1), 5, 0), Slot("head", 1, (7, 8), 9, 1)],
    "keyframes": [Slot("image", 0, (0,), 1, 0), Slot("image", 1, (4,), 5, 1), Slot("image", 2, (8,), 5, 1)],
    "loop": [Slot("image", 0, (0,), 1, 0), Slot("image", 0, (8,), 5, 1)],
    "restyle": [Slot("head", 0, tuple(range(9)), 33, 0)],
    "retake": [Slot("head", 0, tuple(range(9)), 33, 0)],
    "stream": [],
}


def _plan(name, F=9, **settings):
    stretch = (9, 21) if name == "retake" else None
    return plan(name, F, at=(0, 4, 8) if name == "keyframes" else (), stretch=stretch, **settings)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_by_hand(name):
    m, d, given = _plan(name)
    assert m.tolist() == pytest.approx(M[name]) and given == GIVEN[name]
    assert d.tolist() == pytest.approx([i / 18 for i in range(9)] if name == "stream" else [0] * 9)
    taus = tau_schedule(m, 4, 5.0, d)
    assert taus.shape == (5, 9) and taus.dtype == torch.float32
    if name != "stream":
        assert taus.tolist() == [pytest.approx([sigma * m for m in M[name]], abs=1e-6) for sigma in SIGMA]
    assert (taus[0] == m).all() and (taus[-1] == 0).all() and (taus.diff(dim=0) <= 0).all()


def test_tasks_are_those_of_the_tables_above():
    assert list(tasks.TASKS) == list(M) == list(GIVEN)


def test_the_published_table():
    with safe_open(GOLDEN, "pt") as file:
        metadata, tau = file.metadata(), file.get_tensor("tau")
    m = torch.ones(tau.shape[1])
    for frame, multiplier in json.loads(metadata["cond"]).items():
        m[int(frame)] = multiplier
    assert (tau_schedule(m, int(metadata["steps"]), float(metadata["shift"])) - tau).abs().max() < 1e-6


def test_without_delay_the_schedule_is_a_product():
    m = torch.tensor([0.0, 0.25, 0.7, 1.0])
    taus = tau_schedule(m, 7, 3.0)
    sigma = flow.sigma_schedule(7, 3.0)
    assert torch.allclose(taus, sigma[:, None] * m[None], rtol=1e-6, atol=0)
    assert torch.equal(taus[:, 3], sigma) and torch.equal(tau_schedule(m, 7, 3.0, torch.zeros(4)), taus)


def test_delays_by_hand():
    # d_max = 1/2: each frame takes half of the run, 4 of 8 steps, and starts 0, 2 or 4 steps late.
    taus = tau_schedule([1.0, 1.0, 0.5], 8, 5.0, [0.0, 0.25, 0.5])
    a, b, c = SIGMA[1:4]
    assert taus[:, 0].tolist() == pytest.approx([1, a, b, c, 0, 0, 0, 0, 0])
    assert taus[:, 1].tolist() == pytest.approx([1, 1, 1, a, b, c, 0, 0, 0])
    assert taus[:, 2].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.5, a / 2, b / 2, c / 2, 0])


@pytest.mark.parametrize("stagger, K, last", [(0.5, 18, range(10, 19)), (1.0, 27, range(3, 28, 3)), (0.0, 6, [6] * 9)])
def test_stream_finishes_one_frame_after_another(stagger, K, last):
    m, d, _ = plan("stream", 9, stagger=stagger)
    taus = tau_schedule(m, K, 5.0, d)
    assert (taus == 0).int().argmax(dim=0).tolist() == list(last)  # exactly 0, in spite of shares like 1/9
    assert (taus.diff(dim=0) <= 0).all()


def test_stream_goes_on_from_a_clip():
    m, d, given = plan("stream", 8, videos=1)
    assert given == [Slot("tail", 0, (0, 1, 2, 3), 13, 0)] and m.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert d.tolist() == [0, 0, 0, 0, 0, 0.125, 0.25, 0.375]
    assert (tau_schedule(m, 10, 5.0, d)[:, :4] == 0).all()


def test_noise_and_counts_of_the_users_own():
    assert _plan("extend", noise=(0,)).m.tolist() == [0] * 4 + [1] * 5  # one value serves all
    assert _plan("extend", noise=(0, 0.5)).m.tolist() == [0, 0.5] + [1] * 7  # several say how many
    assert _plan("prepend", noise=(0.5, 0)).slots == [Slot("head", 0, (7, 8), 9, 1)]
    assert _plan("complete", noise=(0, 0.25, 0.5, 0.75)).m[[0, 1, 7, 8]].tolist() == [0, 0.25, 0.5, 0.75]
    assert _plan("transition", noise=(0, 0, 0)).slots[0] == Slot("tail", 0, (0,), 1, 0)
    assert _plan("transition", noise=(0, 0, 0)).slots[1] == Slot("head", 1, (7, 8), 9, 1)
    assert plan("keyframes", 9, images=2, at=(7, 2), noise=(0, 0.5)).m[[7, 2]].tolist() == [0, 0.5]
    assert _plan("restyle", strength=0.25).m.tolist() == [0.25] * 9


def test_clips_and_images_are_keyframes():
    m, _, given = plan("keyframes", 21, images=1, videos=2, at=(8, 0, 15), lengths=(13, 9), noise=(0.2,))
    assert given == [
        Slot("image", 0, (8,), 5, 1), Slot("head", 0, (0, 1, 2, 3), 13, 0), Slot("head", 1, (15, 16), 9, 1)
    ]  # fmt: skip
    assert [i for i, noise in enumerate(m.tolist()) if noise < 1] == [0, 1, 2, 3, 8, 15, 16]
    many = plan("keyframes", 9, images=0, videos=1, at=(3,), lengths=(9,), noise=(0.1, 0.3))
    assert many.m.tolist() == pytest.approx([1, 1, 1, 0.1, 0.3, 1, 1, 1, 1])


def test_a_stretch_is_made_again_in_every_latent_that_it_touches():
    def m(first, end):
        return plan("retake", 9, stretch=(first, end), strength=0.8).m.tolist()

    assert m(0, 1) == pytest.approx([0.8] + [0] * 8) and m(1, 2) == pytest.approx([0, 0.8] + [0] * 7)
    assert m(4, 9) == pytest.approx([0, 0.8, 0.8] + [0] * 6) and m(0, 33) == pytest.approx([0.8] * 9)


def test_cut_takes_only_what_the_user_has():
    video = torch.arange(40.0).reshape(1, 1, 40, 1, 1)
    frames = {name: [cut(slot, video).flatten().int().tolist() for slot in _plan(name).slots] for name in tasks.TASKS}
    assert frames["i2v"] == [[0]] and frames["loop"] == [[0], [0] * 5]
    assert frames["extend"] == [list(range(27, 40))] and frames["prepend"] == [list(range(17))]
    assert frames["complete"] == [list(range(5)), list(range(31, 40))]
    assert frames["transition"] == [list(range(35, 40)), list(range(9))]
    assert frames["restyle"] == [list(range(33))]
    for name in tasks.TASKS:  # what is encoded gives as many latents as the slot has room for
        for slot in _plan(name).slots:
            assert tasks.latent_frames(slot.frames) - slot.drop == len(slot.positions)


def test_frames_and_latents():
    assert [tasks.latent_frames(N) for N in (1, 5, 33, 81)] == [1, 2, 9, 21]
    assert [tasks.pixel_frames(F) for F in (1, 2, 9, 21)] == [1, 5, 33, 81]
    assert [tasks.latent_index(n, 9) for n in range(9)] == [0, 1, 1, 1, 1, 2, 2, 2, 2]


def test_table_is_aligned_and_shows_clean_frames():
    text = plots.table(tau_schedule([0, 1.0, 0.3], 10, 5.0))
    lines = text.splitlines()
    assert len(lines) == 12 and len({len(line) for line in lines}) == 1 and text.isascii()
    assert lines[1].split() == ["0", "|", "0", "1.00", "0.30"] and lines[-1].split() == ["10", "|", "0", "0", "0"]
    assert len(plots.table(torch.ones(11, 21)).splitlines()[0]) < 120


@pytest.mark.parametrize("F, K", [(1, 1), (9, 10), (21, 50), (61, 4)])
def test_picture(F, K, tmp_path):
    m = torch.ones(F)
    m[0] = 0
    plots.tau_table(tmp_path / "a.png", tau_schedule(m, K, 5.0), [("image", (0,))], "i2v: the first image")
    image = Image.open(tmp_path / "a.png")
    assert image.getchannel("A").getextrema() == (255, 255) and max(image.size) < 1600
    colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert (255, 244, 222) in colours and ((44, 30, 84) in colours or F == 1)  # data is cream, noise indigo
    assert (27, 153, 139) in colours  # the mark of what was given


def test_command_prints_and_draws_every_task(tmp_path):
    printed = call(tasks, "--out", tmp_path, "--steps", 2).out
    for name in tasks.TASKS:
        assert f"{name}: " in printed
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size[0] > 300
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in tasks.TASKS}  # nothing left over
    short = call(tasks, "--out", tmp_path / "short", "--frames", 5)
    assert short.status == 2 and "for start-end" in short.err and not (tmp_path / "short").exists()


@pytest.mark.parametrize(
    "mistake, sentence",
    [
        (lambda: tau_schedule([0.5, 1.2], 4, 5.0), r"got noise 1.2 for latent frame 1, expected a number in \[0, 1\]"),
        (lambda: tau_schedule([-0.1], 4, 5.0), "got noise -0.1 for latent frame 0"),
        (lambda: tau_schedule([float("nan")], 4, 5.0), "got noise nan"),
        (lambda: tau_schedule([1.0, 1.0], 4, 5.0, [0.0, 1.0]), r"got delay 1 for latent frame 1, .* \[0, 1\)"),
        (lambda: tau_schedule([1.0], 4, 5.0, [-0.5]), "got delay -0.5"),
        (lambda: tau_schedule([1.0, 1.0], 4, 5.0, [0.5]), r"got m \(2,\) and d \(1,\)"),
        (lambda: tau_schedule([], 4, 5.0), r"got m \(0,\)"),
        (lambda: tau_schedule([1.0], 0, 5.0), "got 0 steps"),
        (lambda: tau_schedule([1.0], 4, 0.0), "got shift 0.0"),
        (lambda: plan("expand", 9), "got task 'expand', expected one of t2v, i2v"),
        (lambda: plan("start-end", 9, images=1), "got 1 images for start-end, expected 2"),
        (lambda: plan("transition", 9, videos=1), "got 1 videos for transition, expected 2"),
        (lambda: plan("stream", 9, videos=2), "got 2 videos for stream"),
        (lambda: plan("t2v", 9, noise=(0.2,)), "got noise for t2v, expected none"),
        (lambda: plan("restyle", 9, noise=(0.2,)), "got noise for restyle, expected none"),
        (lambda: plan("i2v", 9, at=(3,)), "got positions for i2v, expected none"),
        (lambda: plan("i2v", 9, noise=(0.2, 0.3)), "got 2 noise values for 1 condition latents"),
        (lambda: plan("extend", 9, noise=()), "got 0 noise values for 4 condition latents"),
        (lambda: plan("extend", 4), "got 4 latent frames for extend, .* at least --frames 17"),
        (lambda: plan("start-end", 1), "got 1 latent frames for start-end, .* at least --frames 9"),
        (lambda: plan("keyframes", 9), "got 0 positions"),
        (lambda: plan("keyframes", 9, images=3, at=(0, 4)), "got 2 positions, expected one for each image"),
        (lambda: plan("keyframes", 9, images=1, at=(0, 4, 6), lengths=(5,)), "got 3 positions, expected one for each"),
        (lambda: plan("keyframes", 9, at=(0,), lengths=(10,)), "got 10 frames, expected 4k.1"),
        (lambda: plan("keyframes", 9, at=(0, 2), lengths=(13, 5)), r"got positions \[0, 1, 2, 3, 2\], .* only once"),
        (lambda: plan("keyframes", 9, at=(7,), lengths=(13,)), r"got positions \[7, 8, 9\], .* 0 to 8"),
        (lambda: plan("keyframes", 9, at=(0, 9)), r"got positions \[0, 9\], expected each only once, and 0 to 8"),
        (lambda: plan("keyframes", 9, at=(0, -1)), r"got positions \[0, -1\]"),
        (lambda: plan("keyframes", 9, at=(4, 4)), r"got positions \[4, 4\], expected each only once"),
        (lambda: tau_schedule([1.0] * 9, 4, 5.0, plan("stream", 9, stagger=1.5).d), "got delay 1 for latent frame 6"),
        (lambda: tasks.latent_frames(34), "got 34 frames, expected 4k.1 .* nearest are 33 and 37"),
        (lambda: tasks.latent_frames(32), "nearest are 29 and 33"),
        (lambda: tasks.latent_frames(0), "nearest are 1 and 5"),
        (lambda: tasks.latent_index(33, 33), "got frame 33, expected a frame of the video, 0 to 32"),
        (lambda: cut(plan("extend", 9).slots[0], torch.zeros(1, 3, 12, 8, 8)), "got a clip of 12 frames, .* least 13"),
    ],
)
def test_mistakes(mistake, sentence):
    with pytest.raises(ValueError, match=sentence):
        mistake()
