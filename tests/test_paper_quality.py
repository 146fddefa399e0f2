"""paper/quality.py: each dimension on clips of which the answer is known."""

import pytest
import torch

from paper import quality
from toy import world
from toy.world import Scene, Thing


def _clip(background="grey", frames=33, **changes):
    thing = Thing("circle", "red", "large", "slowly", "right", 24.0, 32.0)._replace(**changes)
    return world.render(Scene(background, (thing,)), frames)


TRUE = _clip()
STILL = TRUE[:, :1].expand(-1, 33, -1, -1)
EMPTY = world.render(Scene("grey", ()))


def _scores(*clips):
    videos = torch.stack(clips)
    return quality.scores(videos, TRUE[None, :, :1].expand(len(clips), -1, -1, -1, -1))


def test_a_true_clip_has_all_but_for_its_turns():
    scores = {name: value.item() for name, value in _scores(TRUE).items()}
    for name in ("I2V subject", "subject consistency", "dynamic degree"):
        assert scores[name] == 100, name
    for name in ("I2V background", "background consistency"):
        assert scores[name] == pytest.approx(100, abs=0.01), name
    assert 98 < scores["motion smoothness"] < 100, "it turns round once"


def test_a_still_clip_is_all_but_dynamic():
    scores = {name: value.item() for name, value in _scores(STILL).items()}
    assert scores.pop("dynamic degree") == 0
    assert all(value == pytest.approx(100, abs=0.01) for name, value in scores.items() if name != "total")
    assert scores["total"] < _scores(TRUE)["total"].item()


def test_another_subject_is_not_that_of_the_image():
    halfway = torch.cat([TRUE[:, :17], _clip(shape="square")[:, 17:]], 1)
    right, half, wrong, none = _scores(TRUE, halfway, _clip(colour="blue"), EMPTY)["I2V subject"].tolist()
    assert (right, wrong, none) == (100, 0, 0) and half == pytest.approx(100 * 17 / 33)
    itself = _scores(TRUE, halfway, _clip(colour="blue"), EMPTY)["subject consistency"].tolist()
    assert itself[0] == itself[2] == 100 and itself[3] == 0
    assert itself[1] == pytest.approx(100 * (16 / 32 + 31 / 32) / 2)


def test_another_background_is_not_that_of_the_image():
    dark = _clip("black")
    change = torch.cat([TRUE[:, :17], dark[:, 17:]], 1)
    scores = _scores(TRUE, dark, change)
    black, grey = (torch.tensor(world.BACKGROUNDS[name][0]).float() for name in ("black", "grey"))
    apart = 100 * (grey - black).abs().mean().item() / 255
    assert scores["I2V background"].tolist() == pytest.approx([100, 100 - apart, 100 - apart * 16 / 33], abs=0.01)
    steps = 100 - apart * (16 / 32 + 1 / 32) / 2
    assert scores["background consistency"].tolist() == pytest.approx([100, 100, steps], abs=0.01)


def test_jumps_are_not_smooth_and_jitter_is_no_motion():
    shaking = torch.stack([(_clip(x=24.0 + 2 * (n % 2)))[:, 0] for n in range(33)], 1)
    smooth, shaken = _scores(TRUE, shaking)["motion smoothness"].tolist()
    assert shaken == pytest.approx(50, abs=2) and smooth > 98, "2 of 4 pixels off at each frame"
    assert _scores(shaking)["dynamic degree"].item() == 0


def test_the_total_is_vbenchs():
    """By the published formula, for dimensions that are all 0.9 (dynamic degree 0.5)."""
    values = {name: torch.tensor([0.9]) for name in (*quality.AGAINST_THE_IMAGE, *quality.IN_ITSELF)}
    values["dynamic degree"] = torch.tensor([0.5])
    subject, around = (0.9 - 0.1462) / (1 - 0.1462), (0.9 - 0.2615) / (1 - 0.2615)
    smooth = (0.9 - 0.706) / (0.9975 - 0.706)
    expected = ((subject + around) / 2 + (subject + around + smooth + 0.5 * 0.5) / 3.5) / 2
    assert quality.total(values).item() == pytest.approx(expected)
