"""The folder of a run: states that rotate and come back to the bit, figures without gaps or doubles, a polite stop.

That a whole training goes on to the byte, killed wherever it may be, is asked in test_train.py.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import model_fixture  # noqa: F401 (a fixture)

from model import Wan
from support import report, resume
from wan import checkpoint

SETTINGS, INPUTS = {"lr": 0.1, "steps": 99, "batch": 2, "save_every": 1, "device": "cpu", "keep": 2}, {"clips": "1"}


def _run(out, **settings):
    settings = {**SETTINGS, "out": str(out), "resume": resume.newest_state(out) is not None, **settings}
    return resume.Run(settings, {"out", "resume"})


def _trained(seed, muon=False):
    """A model with a frozen part, and its optimizers."""
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "frozen": torch.nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    if not muon:
        return model, [torch.optim.AdamW(model["a"].parameters(), lr=0.1)]
    return model, [torch.optim.AdamW([model["a"].bias], lr=0.1), torch.optim.Muon([model["a"].weight], lr=0.1)]


def _step(model, optimizers):
    sum(p.square().sum() for p in model["a"].parameters()).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _saved(out, steps, muon=False, **settings):
    model, optimizers = _trained(0, muon)
    run = _run(out, **settings)
    with run.open(model, optimizers, INPUTS, {}):
        for _ in range(steps):
            _step(model, optimizers)
            run.count(0.1, seconds=1.0, tokens=1, flops=1.0)
            run.save()
    return model, optimizers


@pytest.mark.parametrize("muon", [False, True])
def test_a_state_brings_back_weights_and_moments_to_the_bit(muon, tmp_path):
    model, optimizers = _saved(tmp_path, 3, muon)
    other, others = _trained(1, muon)
    run = _run(tmp_path, **{"new flag": 1})
    with run.open(other, others, INPUTS, {}) as steps:
        assert steps == range(3, 99) and (run.figures["step"], run.figures["smooth"]) == (3, 0.1)
    for _ in range(3):
        _step(model, optimizers)
        _step(other, others)
    assert all(torch.equal(a, b) for a, b in zip(model["a"].parameters(), other["a"].parameters(), strict=True))


def test_a_state_has_only_what_is_trained(tmp_path):
    _saved(tmp_path, 1)
    state = torch.load(resume.newest_state(tmp_path), weights_only=True)
    assert state["model"].keys() == state["optimizers"]["state"].keys() == {"a.weight", "a.bias"}


def test_states_rotate_by_their_step_and_unfinished_ones_do_not_count(tmp_path):
    assert resume.newest_state(tmp_path) is None
    (tmp_path / ".state-999999.1.tmp.pt").write_bytes(b"half")
    _saved(tmp_path, 11)
    (tmp_path / "state-1000000.pt").touch()
    assert resume.newest_state(tmp_path).name == "state-1000000.pt"
    assert sorted(path.name for path in tmp_path.glob("state-0*")) == ["state-000010.pt", "state-000011.pt"]


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no run in"):
        _run(tmp_path, resume=True)
    for unfinished in ("", "[]", json.dumps(SETTINGS)):
        (tmp_path / "settings.json").write_text(unfinished)
        assert _run(tmp_path, resume=True).state is None, "stopped before its first save"
    with pytest.raises(ValueError, match="with 0.3 as --lr, but the run in .* began with 0.1"):
        _run(tmp_path, resume=True, lr=0.3)
    model, optimizers = _saved(tmp_path, 1)
    with pytest.raises(ValueError, match="which holds a run; go on with --resume"):
        _run(tmp_path, resume=False)
    with pytest.raises(ValueError, match="with 0.2 as --lr, but the run in .* began with 0.1"):
        _run(tmp_path, lr=0.2)
    with pytest.raises(ValueError, match="with 98 as --steps"):
        _run(tmp_path, steps=98)
    assert _run(tmp_path, steps=100).state
    before = [p.clone() for p in model.parameters()]
    with (
        pytest.raises(ValueError, match="the clips changed since the run began"),
        _run(tmp_path).open(model, optimizers, {"clips": "2"}, {}),
    ):
        pass
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("state", [[1, 2], dict.fromkeys(("settings", "inputs", "figures", "model", "optimizers"), {})])
def test_a_state_that_is_none_of_todays_is_refused_in_a_sentence(state, tmp_path):
    torch.save(state, tmp_path / "state-000001.pt")
    with pytest.raises(ValueError, match=r"cannot read .*state-000001.pt .*start again with another --out"):
        _run(tmp_path)


def test_figures_have_no_gaps_and_no_doubles(tmp_path):
    model, optimizers = _trained(0)
    for first, last in ((0, 5), (3, 4)):
        run = _run(tmp_path)
        with run.open(model, optimizers, INPUTS, {}) as steps:
            assert steps[0] == first
            for step in range(first, last):
                run.log(run.count(1.0, seconds=1.0, tokens=1, flops=1.0))
                if step == 2:
                    run.save()
        assert [line["step"] for line in report.read_metrics(tmp_path)] == list(range(1, last + 1))
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 6, "lo')
        assert [line["step"] for line in report.read_metrics(tmp_path)] == list(range(1, last + 1))


def test_a_signal_is_only_noted_and_the_second_is_not(tmp_path, capfd):
    before = signal.getsignal(signal.SIGINT)
    run = _run(tmp_path)
    with pytest.raises(KeyboardInterrupt, match="last save"), run.open(*_trained(0), INPUTS, {}):
        assert not run.stop
        signal.raise_signal(signal.SIGTERM)
        assert run.stop and "after this step" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_fingerprint_tells_weights_apart(model):
    opened = checkpoint.open(model, Wan)
    vae = opened.vae()
    before = checkpoint.fingerprint(vae)
    assert checkpoint.fingerprint(opened.vae()) == before
    with torch.no_grad():
        vae.decoder.conv1.bias[3] += 1e-6
    assert checkpoint.fingerprint(vae) != before


# Whose folder it is.


def _claimed(out, **settings):
    return resume.claim({**SETTINGS, "out": out and str(out), "resume": False, **settings}, {"out", "resume"})


def test_a_folder_is_one_runs_alone_until_that_ends(tmp_path):
    out = tmp_path / "out"
    with _claimed(out) as run:
        assert run.out == out and run.settings["out"] == str(out)
        for resumed in (False, True):
            with pytest.raises(ValueError, match="another run is writing to .*out; wait for its end"):
                _claimed(out, resume=resumed).__enter__()
        with _claimed(tmp_path / "other"):
            pass
        (out / "settings.json").write_text("{}")
    with _claimed(out, resume=True):
        pass
    assert sorted(tmp_path.iterdir()) == [out] and [*out.iterdir()] == [out / "settings.json"], "no locks left"


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_run_holds_nothing(tmp_path):
    code = "import time; from support import resume\n"
    code += f"with resume._locked(resume.Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(600)"
    root = Path(__file__).parent.parent
    with subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run is writing"):
            _claimed(tmp_path).__enter__()
        other.kill()
    with _claimed(tmp_path):
        assert (tmp_path / ".lock").exists()


def test_a_lock_that_was_removed_is_no_lock(tmp_path, monkeypatch):
    """Its holder ended between the opening of its file and the locking."""
    monkeypatch.setattr(resume, "_lock", lambda file: Path(file.name).unlink())
    with pytest.raises(ValueError, match="another run is writing"):
        _claimed(tmp_path).__enter__()


def test_where_nothing_can_be_locked_a_run_is_not_refused(tmp_path, monkeypatch):
    def unknown(file):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(resume, "_lock", unknown)
    with _claimed(tmp_path) as run:
        assert run.out == tmp_path


def test_without_out_a_run_takes_the_next_folder_and_goes_on_in_the_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with _claimed(None) as first, _claimed(None) as second:
        assert [str(run.out) for run in (first, second)] == [str(Path("runs", f"pusa-00{n}")) for n in (1, 2)]
        (first.out / "settings.json").write_text("{}")
    with _claimed(None) as third:
        (third.out / "settings.json").write_text("{}")
    with _claimed(None) as fourth:
        assert str(third.out)[-3:] == "002" and str(fourth.out)[-3:] == "003"
    with _claimed(None, resume=True) as last:
        assert last.out == third.out, "the folder of the fourth, which wrote nothing, is gone"
    glob = Path.glob
    with monkeypatch.context() as patch:  # another run is just as fast: its folder was not there a moment ago
        first = lambda self, name: [Path("pusa-001")] if name.startswith("pusa-") else glob(self, name)  # noqa: E731
        patch.setattr(Path, "glob", first)
        with _claimed(None) as late:
            assert str(late.out)[-3:] == "003"


def test_a_folder_that_cannot_be_written_to_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to .*out .*choose another folder by --out"):
        _claimed(tmp_path / "file" / "out").__enter__()


# What is the best.


def _losses(*each):
    return dict.fromkeys(("sync", "async", "clean"), torch.tensor(each))


def test_the_best_must_win_by_more_than_the_triples_differ_and_outlives_a_stop(tmp_path):
    model, optimizers = _trained(0)
    run = _run(tmp_path)
    with run.open(model, optimizers, INPUTS, {}):
        figures = run.judge({**_losses(1.0, 9.0), "copy": torch.tensor([0.5, 0.7])})
        assert figures == pytest.approx({"sync": 5, "async": 5, "clean": 5, "copy": 0.6}) and run.figures["best"] == 0
        run.count(0.1, seconds=1.0, tokens=1, flops=1.0)
        run.judge(_losses(0.0, 9.5))
        assert run.figures["best"] == 0, "one far better, one worse"
        run.judge(_losses(0.9, 8.9))
        assert run.figures["best"] == 1, "both better by the same, little as it is"
        run.save()
    again = _run(tmp_path)
    with again.open(*_trained(1), INPUTS, {}):
        again.count(0.1, seconds=1.0, tokens=1, flops=1.0)
        again.judge(_losses(0.95, 8.95))
        assert again.figures["best"] == 1
        again.judge(_losses(0.8, 8.8))
        assert again.figures["best"] == 2
