"""The paper's claims: the bench they share, the command that runs and tells them, and two of the claims."""

import dataclasses
import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from small import call, mistake
from torch import nn

import flow
import lora
import train
from model import SelfAttention, rope_tables
from paper import __main__ as paper
from paper import ablation, efficiency, lab, mechanism, vector
from toy import grow
from toy.judge import Judge

HERE = Path("README.md").resolve().parent


@pytest.fixture
def config(tmp_path) -> lab.Config:
    """A quick pass whose folders are all in a temporary one."""
    folders = {name: str(tmp_path / name) for name in ("work", "results", "docs", "readme")}
    return lab.Config(quick=True, commit="c0ffee", **folders)


def test_a_figure_that_another_claim_has_measured_is_copied_and_not_measured_again(config):
    config = dataclasses.replace(config, quick=False, scenes=4)
    one, two = lab.Lab(config, "zero_shot"), lab.Lab(config, "ablation")
    one.seeds = (0, 1)  # it was stopped before the third
    one.figure("i2v, seed-0: error", lambda seed: torch.arange(4.0) + 10 * seed)
    asked = []

    def measured(seed: int) -> torch.Tensor:
        asked.append(seed)
        return torch.full((2,), 9.0)

    two.figure(ablation.Run().name, measured, ablation.same(ablation.Run()))
    assert asked == [2] and two.figures[ablation.Run().name] == [[0, 1, 2, 3], [10, 11, 12, 13], [9, 9]]
    two.figure("rank", measured, ablation.same(ablation.Run(strength=1.4)))
    assert asked == [2, 0, 1, 2], "no other figure is the same"
    other = lab.Lab(dataclasses.replace(config, scenes=8), "vector")
    with pytest.raises(ValueError, match="scenes 8 .*zero_shot.json.* 4"):
        other._of_another("zero_shot", "i2v, seed-0: error")


def test_the_claims_know_no_guidance_but_the_paper_s_whatever_the_model_is_sampled_with(config, monkeypatch):
    other = lab.checkpoint.Preset(history_guidance=3.0, context_noise=0.5, steps=7)
    monkeypatch.setattr(lab.checkpoint.Opened, "preset", other)
    bench = lab.Lab(config, "vector")
    preset = bench.opened.preset
    assert (preset.history_guidance, preset.context_noise, preset.steps) == (1.0, 0.0, 7)


def flags(config: lab.Config) -> list[str]:
    return [f"--{name}={getattr(config, name)}" for name in ("work", "results", "docs", "readme", "commit")]


@pytest.fixture
def claims(monkeypatch) -> dict[str, ModuleType]:
    """Three claims in place of the paper's: one that measures, one that fails, one that fails when it is drawn."""

    def claim(name: str, measure, draw) -> ModuleType:
        module = ModuleType(f"paper.{name}", f"What {name} claims.\n\nMore about it.")
        module.measure, module.draw, module.TITLE = measure, draw, "a | title"
        module.rows = lambda bench: [lab.Row(f"{name} | claim", "1.7", bench.told("one"), True)]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    def measures(bench):
        bench.figure("one", lambda seed: torch.full((bench.scenes,), 2.0))

    def draws(bench, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a picture")

    def fails(*arguments):
        raise RuntimeError("no such luck")

    made = {"good": claim("good", measures, draws), "bad": claim("bad", fails, draws)}
    made["undrawn"] = claim("undrawn", measures, fails)
    monkeypatch.setattr(paper, "CLAIMS", ("bad", "undrawn", "good"))
    return made


# The bench


def test_a_figure_is_measured_once_and_goes_on_after_a_stop(config):
    config = dataclasses.replace(config, quick=False, scenes=4)
    bench, asked = lab.Lab(config, "x"), []

    def values(seed: int) -> torch.Tensor:
        asked.append(seed)
        if seed == 2 and len(asked) == 3:
            raise KeyboardInterrupt
        return torch.tensor([seed, 1.234567, 1e-5 / 3, 1000.0])

    with pytest.raises(KeyboardInterrupt):
        bench.figure("one", values)
    again = lab.Lab(config, "x")
    again.figure("one", values)
    assert asked == [0, 1, 2, 2]
    record = json.loads(again.path.read_text())
    assert record["figures"] == {"one": [[seed, 1.235, 3.333e-6, 1000.0] for seed in (0, 1, 2)]}
    assert record["seeds"] == [0, 1, 2] and record["scenes"] == 4 and record["commits"] == ["c0ffee"]
    assert record["settings"]["steps"] == 10


@pytest.mark.parametrize("other", [{"scenes": 8}, {"dtype": "bfloat16"}, {"quick": False, "scenes": 4}])
def test_figures_measured_on_other_terms_are_neither_taken_over_nor_lost(config, other):
    bench = lab.Lab(config, "x")
    bench.figure("one", lambda seed: torch.ones(4))
    before = bench.path.read_bytes()
    with pytest.raises(ValueError, match="x.json.* expected the same, or another folder for --results"):
        lab.Lab(dataclasses.replace(config, **{"quick": False, **other}), "x")
    assert bench.path.read_bytes() == before and lab.Lab(config, "x").figures


def test_figures_and_loras_of_other_weights_are_not_taken_for_those_of_these(config, monkeypatch):
    config = dataclasses.replace(config, quick=False, scenes=4)
    monkeypatch.setattr(grow, "train_or_resume", lambda training, prepare, result: None)
    bench = lab.Lab(config, "x")
    bench.figure("one", lambda seed: torch.ones(4))
    bench.lora("rank-4")
    monkeypatch.setattr(lab, "digest", lambda model, pattern: "other")
    with pytest.raises(ValueError, match="weights {'base': 'other', .* for .*x.json"):
        lab.Lab(config, "x")
    with pytest.raises(ValueError, match="other weights .* another folder for --work"):
        lab.Lab(config, "y").lora("rank-128")


def test_a_figure_is_below_another_if_the_scenes_tell_it(config):
    bench, values = lab.Lab(config, "x"), torch.rand(64, generator=torch.Generator().manual_seed(0)).tolist()
    wavering = [value + (0.3 if n % 2 else -0.3) for n, value in enumerate(values)]
    each = {"a": values, "b": [value + 0.1 for value in values], "c": wavering}
    bench.figures = {name: [figures[:32], figures[32:]] for name, figures in each.items()}
    for median in (True, False):
        below = [bench.below(*names, median) for names in (("a", "b"), ("b", "a"), ("a", "c"), ("a", "a"))]
        assert below == [True, False, None, None]
        assert bench.below("b", "a", median, factor=1.5) is True, "no more than half as much again"
        assert bench.below("a", "b", median, luck=1.0) is None, "so different may be two trainings of one kind"
    assert bench.luck(["a", "a", "a"]) == 0 and bench.luck(["a", "b"]) > 0.05
    with pytest.raises(LookupError):
        bench.below("a", "d")
    bench.seeds = (0, 1, 2)
    with pytest.raises(LookupError, match="2 of 3 seeds"):
        bench.below("a", "b")


def test_a_lora_is_trained_once(config, monkeypatch):
    trained = []

    def fake(settings: train.TrainConfig, prepare) -> None:
        trained.append(settings)
        (Path(settings.out) / "lora.safetensors").parent.mkdir(parents=True)
        (Path(settings.out) / "lora.safetensors").touch()

    monkeypatch.setattr(grow, "train", fake)
    bench = lab.Lab(dataclasses.replace(config, quick=False), "x")
    assert bench.lora("rank-4") == bench.lora("rank-4") == Path(config.work) / "rank-4" / "lora.safetensors"
    bench.lora("async-50")
    assert [(t.rank, t.steps, t.batch, t.p_async) for t in trained] == [(4, 800, 32, 1.0), (32, 800, 32, 0.5)]
    assert lab.Lab(config, "x").lora("seed-0") == Path("checkpoints/tiny/lora.safetensors"), (
        "a quick pass needs a good one"
    )


def test_those_who_come_to_one_path_wait_for_each_other(tmp_path):
    order, inside = [], threading.Event()

    def second() -> None:
        inside.wait()
        with lab.alone(tmp_path / "a" / "x"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with lab.alone(tmp_path / "a" / "x"):
        inside.set()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# The command


def test_a_claim_that_fails_does_not_stop_the_others(config, claims):
    result = call(paper, *flags(config), "--quick")
    assert result.status.startswith("failed: bad, undrawn;") and "no such luck" in result.err
    assert json.loads((Path(config.results) / "undrawn.json").read_text())["figures"]
    page = (Path(config.docs) / "reproduction.md").read_text()
    assert "| good \\| claim | 1.7 | 2.00 ± 0.00 px | yes | `python -m paper good` |" in page
    assert "\n| good \\| claim | 1.7 | 2.00 ± 0.00 px | yes |\n" in page.partition("## good")[2].partition("## bad")[0]
    assert "| What bad claims. |  | not run |  | `python -m paper bad` |" in page
    assert "![good](good.png)" in page and "undrawn.png" not in page
    assert "4 scenes, shared out to 1 seeds; measured at c0ffee" in page


def test_a_claim_that_was_stopped_is_told_as_such(config, claims):
    claims["good"].rows = lambda bench: [lab.Row("good", "", bench.told("two"), None)]
    page = Path(config.docs) / "reproduction.md"
    call(paper, "good", *flags(config), "--quick")
    assert "| What good claims. |  | not run to its end |" in page.read_text()


def test_measuring_alone_draws_nothing(config, claims):
    result = call(paper, "good", "undrawn", *flags(config), "--quick", "--measure")
    assert result.status == 0 and not Path(config.docs).exists()
    assert {path.name for path in Path(config.results).iterdir()} == {"good.json", "undrawn.json"}


def test_the_readme_gets_the_first_line_of_each_claim(config, claims):
    claims["good"].rows = lambda bench: [lab.Row(name, "1", "2", holds) for name, holds in (("a", None), ("b", False))]
    readme = Path(config.readme)
    readme.write_text("# before\n\n<!-- paper -->\n\nold\n\n<!-- /paper -->\n\nafter\n")
    call(paper, "good", *flags(config), "--quick")
    before, table, after = (
        readme.read_text().partition("<!-- paper -->\n")[0],
        *readme.read_text().split("<!-- paper -->\n")[1].split("\n<!-- /paper -->"),
    )
    assert (before, after) == ("# before\n\n", "\n\nafter\n")
    assert table.strip().splitlines() == [
        "| claim | the paper | here | holds |", "| --- | --- | --- | --- |", "| a | 1 | 2 | cannot be told |", "",
        "Not run yet, or not to the end: `bad`, `undrawn`.",
    ]  # fmt: skip


def test_a_quick_pass_writes_only_to_a_temporary_folder(claims, monkeypatch, tmp_path):
    (tmp_path / "checkpoints").symlink_to(HERE / "checkpoints")
    (tmp_path / "README.md").write_text("<!-- paper -->\n\nold\n\n<!-- /paper -->\n")
    monkeypatch.chdir(tmp_path)
    result = call(paper, "good", "--quick", "--commit", "x")
    page = Path(result.out.splitlines()[-1])
    assert result.status == 0 and page.is_file() and tmp_path not in page.parents
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "README.md"}
    assert "old" in (tmp_path / "README.md").read_text()


def test_a_pass_over_other_scenes_leaves_what_was_measured(claims, monkeypatch, tmp_path):
    (tmp_path / "checkpoints").symlink_to(HERE / "checkpoints")
    monkeypatch.chdir(tmp_path)
    assert call(paper, "good", "--commit", "x").status == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "check" not in str(path)}
    assert call(paper, "good", "--commit", "y", "--scenes", 8).status == 0
    assert len(before) > 2 and all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("arguments, words", [
    (["nothing"], ["'nothing'", "ablation"]), (["train", "ablation"], ["'train'", "alone"]),
    (["train", "--only", "rank-7"], ["'rank-7'", "rank-4"]), (["--only", "rank-4"], ["rank-4", "train"]),
    (["--model", "nowhere"], ["nowhere", "folder"]), (["--device", "nothing"], ["nothing", "device"]),
])  # fmt: skip
def test_mistakes_end_in_a_sentence(arguments, words):
    mistake(call(paper, *arguments), *words)


@pytest.mark.slow
def test_the_whole_runs_and_its_orders_are_right(config):
    names = paper.CLAIMS[: paper.CLAIMS.index("history")]  # what is beyond the paper takes longer
    result = call(paper, *names, *flags(config), "--quick")
    assert result.status == 0, result.err
    page = (Path(config.docs) / "reproduction.md").read_text(encoding="utf-8")
    for name in names:
        assert f"![{name}]({name}.png)" in page and f"| not run |  | `python -m paper {name}` |" not in page
    varied = lab.Lab(config, "ablation")
    strengths, extend = (ablation.curves(varied)[name] for name in ("rank 32", "p_async, extend"))
    assert varied.middle(strengths[1].name) < varied.middle(strengths[0].name), "Pusa against the base, from an image"
    assert varied.middle(extend[1].name) < varied.middle(extend[0].name), "Pusa against two steps, from a clip"
    known = (mechanism.known_name(name, 0.0) for name in ("base", "Pusa"))
    for claim, low, high in (
        ("zero_shot", "i2v, seed-0: error", "i2v, base: error"), ("efficiency", efficiency.HIDDEN, efficiency.CLAMPED),
        ("vector", f"complete, base: {vector.SCALARS[0]}", f"complete, base: {vector.RIGHT}"),
        ("vector", "loss at 0.95, seed-0: first clean", "loss at 0.95, seed-0: all at t"),
        ("preservation", "change at 1: all at t", "change at 1: first clean"), ("mechanism", *known),
    ):  # fmt: skip
        bench = lab.Lab(config, claim)
        assert bench.middle(low) < bench.middle(high), (claim, low, high)


# Ablation


def test_the_ablation_varies_one_setting_at_a_time(config, monkeypatch, tmp_path):
    asked = []

    def evaluate(bench: lab.Lab, run: ablation.Run, seed: int) -> torch.Tensor:
        asked.append((run, seed))
        worse = {"rank-4": 2.0, "rank-128": -0.5, "async-0": 4.0, "steps-1600": 0.5, "base": 1.0}.get(run.lora, 0.0)
        error = 3 + worse + abs(run.strength - 1.7) + 10 / run.steps + 4 * run.m + 0.001 * seed
        return torch.full((bench.scenes,), 100 - error if run.task == "t2v" else error)

    monkeypatch.setattr(ablation, "evaluate", evaluate)
    bench = lab.Lab(dataclasses.replace(config, quick=False), "ablation")
    ablation.measure(bench)
    assert len(asked) == len(set(asked)) == 3 * 48
    varied = {run: sum(a != b for a, b in zip(run, ablation.Run(), strict=True)) for run, _ in asked}
    assert set(varied.values()) == {0, 1, 2, 3}
    assert {run.lora for run, count in varied.items() if count == 3} == {"async-0"}
    assert {run.lora for run in varied if run.context_noise} == {"async-0", "seed-0"}
    holds = {row.claim.partition(":")[0].partition(" (")[0]: row.holds for row in ablation.rows(bench)}
    assert holds == {
        "10 steps of sampling suffice": False, "strength 1.7 is better than 1": True,
        "a higher rank is better": True, "twice as long a training is not better by more than 5 %": True,
        "i2v": True, "extend": True, "T2V loses no more than 2 % by a level for each frame": True,
        "noise on the given image helps the frames after it": False,
    }  # fmt: skip
    ablation.draw(bench, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    assert bench.path.stat().st_size < 10**6


def test_an_evaluation_is_what_its_run_says(config):
    bench, asked = lab.Lab(config, "ablation"), []
    bench.judge_of = lambda part: SimpleNamespace(preset=bench.opened.preset, plan=Judge.plan)
    bench.network = lambda *network: network
    bench.error = lambda network, task, seed, **settings: asked.append((network, task, seed, settings)) or torch.ones(4)
    ablation.evaluate(bench, ablation.Run("extend", "rank-2", 1.4, 5, 0.2), 7)
    (network, task, seed, settings), sigma = asked[0], flow.sigma_schedule(5, 3.0)
    assert (network, task, seed, settings["context_noise"]) == (("rank-2", 1.4), "extend", 7, 0)
    assert torch.allclose(settings["taus"], sigma[:, None] * torch.tensor([0.2] * 4 + [1.0] * 5))


# Mechanism


def test_attention_by_frames_is_that_of_the_layer():
    layer, frames, S = SelfAttention(12, 2, 1e-6), 3, 4
    rope, x = rope_tables((frames, 2, 2), 6, torch.device("cpu")), torch.randn(2, frames * S, 12)
    shares = mechanism.frame_attention(layer, x, rope, frames)
    assert torch.allclose(shares.sum(1), torch.ones(frames))
    nn.init.eye_(layer.o.weight)
    nn.init.zeros_(layer.o.bias)
    for frame in range(frames):  # values of 1 in a frame, 0 elsewhere: the layer's output is the share it gets
        value = torch.zeros(2, frames * S, 12)
        value[:, frame * S : (frame + 1) * S] = 1
        layer.v.forward = lambda x, value=value: value
        out = layer(x, rope).unflatten(1, (frames, S)).mean((0, 2, 3))
        assert torch.allclose(out, shares[:, frame], atol=1e-6)


def test_the_change_of_a_layer_is_relative(tmp_path):
    layers = {"blocks.0.ffn.0": torch.randn(6, 4), "blocks.0.ffn.2": torch.randn(4, 6)}
    pairs = {name: lora.Pair(torch.randn(2, W.shape[1]), torch.randn(W.shape[0], 2), 4.0) for name, W in layers.items()}
    lora.save(tmp_path / "l.safetensors", lora.LoRA(pairs))
    moved = {f"{name}.weight": W + 1.5 * 2 * pairs[name].B @ pairs[name].A for name, W in layers.items()}
    right = mechanism.changes(layers, moved)
    assert torch.allclose(mechanism.lora_changes(layers, tmp_path / "l.safetensors", 1.5), right, rtol=1e-4)
    assert mechanism.changes(layers, {f"{name}.weight": 3 * W for name, W in layers.items()}).tolist() == [2, 2]
