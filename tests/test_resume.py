"""The folder of a run: states that rotate and come back to the bit, figures without gaps or doubles, a polite stop.

That a whole training goes on to the byte, killed wherever it may be, is asked in test_train.py.
"""

import signal

import pytest
import torch

from support import resume

SETTINGS, INPUTS = {"lr": 0.1, "out": "a"}, {"clips": "1"}


def _trained(seed):
    torch.manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, 2))]
    return parameters, torch.optim.AdamW(parameters, lr=0.1)


def _step(parameters, optimizer):
    sum(p.square().sum() for p in parameters).backward()
    optimizer.step()
    optimizer.zero_grad()


def _saved(out, steps, keep=2):
    out.mkdir(exist_ok=True)
    parameters, optimizer = _trained(0)
    for step in range(1, steps + 1):
        _step(parameters, optimizer)
        resume.save_state(out, keep, SETTINGS, INPUTS, {"step": step, "smooth": 0.1}, parameters, [optimizer])
    return parameters, optimizer


def test_a_state_brings_back_weights_and_moments_to_the_bit(tmp_path):
    parameters, optimizer = _saved(tmp_path, 3)
    others, other = _trained(1)
    state = resume.load_state(tmp_path, {**SETTINGS, "out": "b", "new flag": 1}, {"out"})
    assert resume.restore(state, INPUTS, others, [other]) == {"step": 3, "smooth": 0.1}
    for _ in range(3):
        _step(parameters, optimizer)
        _step(others, other)
    assert all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_states_rotate_by_their_step_and_unfinished_ones_do_not_count(tmp_path):
    assert resume.newest_state(tmp_path) is None
    (tmp_path / ".state-999999.1.tmp.pt").write_bytes(b"half")
    _saved(tmp_path, 11, keep=2)
    (tmp_path / "state-1000000.pt").touch()
    assert resume.newest_state(tmp_path).name == "state-1000000.pt"
    assert sorted(path.name for path in tmp_path.glob("state-0*")) == ["state-000010.pt", "state-000011.pt"]


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no run in"):
        resume.load_state(tmp_path, SETTINGS, set())
    (tmp_path / "settings.json").touch()
    assert resume.load_state(tmp_path, SETTINGS, set()) is None, "stopped before its first save"
    parameters, optimizer = _saved(tmp_path, 1)
    with pytest.raises(ValueError, match="with 0.2 as --lr, but the run in .* began with 0.1"):
        resume.load_state(tmp_path, {"lr": 0.2}, set())
    before = [p.clone() for p in parameters]
    with pytest.raises(ValueError, match="the clips changed since the run began"):
        resume.restore(resume.load_state(tmp_path, SETTINGS, set()), {"clips": "2"}, parameters, [optimizer])
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_figures_have_no_gaps_and_no_doubles(tmp_path):
    resume.open_folder(tmp_path, SETTINGS, {}, 0)
    for step in range(1, 6):
        resume.log(tmp_path, None, {"step": step, "loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in resume.read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    resume.open_folder(tmp_path, SETTINGS, {}, 3)
    resume.log(tmp_path, None, {"step": 4, "loss": 1.0})
    assert [line["step"] for line in resume.read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_signal_is_only_noted_and_the_second_is_not(capfd):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="last save"), resume.stopping() as stopping:
        assert not stopping()
        signal.raise_signal(signal.SIGTERM)
        assert stopping() and "after this step" in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
