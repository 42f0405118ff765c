"""Runs that are interrupted, and how the same command continues them: with the result of a run that was left alone.

Kills at every moment and torchrun's restarts take minutes: test_faults.py.
"""

import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import eval as eval_script
import train
import training.process
from errors import UserError
from model import Detector, load_weights
from tests.support.runs import SWITCHES, Run, assert_same_run, flags_of, log_of
from training.folder import load_checkpoint

NOT_FINITE = r"step 10: the loss is not finite \(cls nan, box .*iou .*\); image ids \d+, \d+, \d+, \d+ of .*--lr"
STEPS = 15  # three epochs of 5 steps, evaluated after the second and at the end
pytestmark = pytest.mark.usefixtures("one_thread")


def small(shapes: Path, out: Path, *args, steps: int = STEPS, **flags) -> list:
    return flags_of(shapes, out, "--eval-every", 2, *args, steps=steps, **flags)


@pytest.fixture(scope="module")
def undisturbed(call, shapes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    call(train, *small(shapes, out))
    return out


def at_step(monkeypatch, step: int, act) -> None:
    """Call `act` in the middle of a step."""
    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda s, *args: (s == step and act(), rate(s, *args))[1])


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


# Faults: each gets pytest's monkeypatch and breaks something in a run that continues after step 8.


def signal_in_a_step(number: signal.Signals):
    """In the ninth, after which nothing else would be saved."""
    return lambda monkeypatch: at_step(monkeypatch, 8, send(number))


def interrupt_twice() -> None:
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)


def ctrl_c(monkeypatch) -> None:
    """A terminal sends it to the loader process too, which ignores it: three more steps need it. torchrun sends a rank
    a copy at once, which is no second Ctrl-C."""
    at_step(monkeypatch, 8, lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGINT))
    at_step(monkeypatch, 11, interrupt_twice)


def second_ctrl_c(monkeypatch) -> None:
    monkeypatch.setattr(training.process, "ONE_SIGNAL_S", -1)
    at_step(monkeypatch, 8, interrupt_twice)


def signal_in_an_evaluation(monkeypatch) -> None:
    monkeypatch.setattr(eval_script, "detect_dataset", lambda *_: (send(signal.SIGTERM)(), time.sleep(60)))


def full_disk(monkeypatch) -> None:
    """No file may pass 3 MB, which a checkpoint with the optimizer's state does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def prediction_is_not_a_number(monkeypatch) -> None:
    predict = Detector.predict_raw

    def spoilt(self, batch):
        predictions, grid = predict(self, batch)
        if self.training:
            predictions.logits[1] = float("nan")
        return predictions, grid

    at_step(monkeypatch, 9, lambda: monkeypatch.setattr(Detector, "predict_raw", spoilt))


def weight_is_not_a_number(monkeypatch) -> None:
    update = torch.optim.AdamW.step

    def spoil(self):
        update(self)
        self.param_groups[0]["params"][0].data[0] = float("nan")

    at_step(monkeypatch, 11, lambda: monkeypatch.setattr(torch.optim.AdamW, "step", spoil))


class Fault(NamedTuple):
    breaks: Callable[[pytest.MonkeyPatch], None]
    error: type[BaseException]
    message: str  # of the error; of SystemExit the exit status
    newest: int  # step of the newest checkpoint afterwards
    screen: str = ""


FAULTS = {
    "sigterm": Fault(signal_in_a_step(signal.SIGTERM), SystemExit, "0", 9, "stopped by SIGTERM after step 9"),
    "sigusr1": Fault(signal_in_a_step(signal.SIGUSR1), SystemExit, "0", 9, "stopped by SIGUSR1 after step 9"),
    "ctrl-c": Fault(ctrl_c, SystemExit, "130", 12, "interrupted after step 12; weights are in"),
    "second-ctrl-c": Fault(second_ctrl_c, KeyboardInterrupt, "^$", 8, "once more to quit at once"),
    "sigterm-in-an-evaluation": Fault(signal_in_an_evaluation, SystemExit, "0", 10, "stopped in the evaluation"),
    "full-disk": Fault(full_disk, UserError, "cannot write to .*out: .*last checkpoint, checkpoint-00000008.pt, is", 8),
    "nan-prediction": Fault(prediction_is_not_a_number, UserError, NOT_FINITE, 8),
    "nan-weight": Fault(weight_is_not_a_number, UserError, "step 12: parameters that are not finite: 1,", 10),
}


@pytest.fixture(scope="module")
def halfway(call, shapes, tmp_path_factory) -> Path:
    """The folder of a run that was stopped after step 8."""
    out = tmp_path_factory.mktemp("halfway") / "out"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 7, send(signal.SIGTERM))
        call(train, *small(shapes, out))
    return out


@pytest.mark.parametrize("name", FAULTS)
def test_run_with_a_fault_continues_bit_for_bit(call, shapes, undisturbed, halfway, tmp_path, monkeypatch, capfd, name):
    fault, out, limit = FAULTS[name], tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.copytree(halfway, out)
    with monkeypatch.context() as patch:
        fault.breaks(patch)
        try:
            with pytest.raises(fault.error, match=fault.message):
                call(train, *small(shapes, out, workers=int(name == "ctrl-c")))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    captured = capfd.readouterr()
    assert fault.screen in captured.out + captured.err
    assert load_checkpoint(out)["step"] == fault.newest and not list(out.glob(".*"))
    if name == "ctrl-c":
        assert load_weights(out / "ota.safetensors")[1]["training"]["step"] == 12
        assert "the same command continues the run" in captured.err
    said = call(train, *small(shapes, out))
    assert f"continuing the run in {out} after step {fault.newest} of {STEPS}" in said
    assert_same_run(out, undisturbed)


def test_run_killed_before_its_first_checkpoint_continues_bit_for_bit(call, shapes, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = Run(shapes, out, "--eval-every", 2, steps=STEPS, workers=1, save_every=99).until("step 3/")
    run.process.kill()
    assert run.end() == -signal.SIGKILL and load_checkpoint(out)["step"] == 0
    call(train, *small(shapes, out))
    assert len(list(out.glob("checkpoint-*.pt"))) == 2 and not list(out.glob(".*"))
    assert f"is complete, all {STEPS} steps" in call(train, *small(shapes, out))
    assert_same_run(out, undisturbed)


def test_run_with_every_switch_continues_and_its_steps_are_as_the_flags_say(call, shapes, tmp_path, monkeypatch):
    """Two neighbouring checkpoints give the gradient, whose norm is clipped, and the average of the weights."""
    flags, one, out = (*SWITCHES, "--optimizer", "sgd", "--lr", 0.05), tmp_path / "one", tmp_path / "out"
    call(train, *small(shapes, one, *flags, steps=6))
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 2, send(signal.SIGINT))
        call(train, *small(shapes, out, *flags, save_every=1, steps=6))
    states = [torch.load(path, weights_only=True) for path in sorted(out.glob("checkpoint-*.pt"))]
    assert [state["step"] for state in states] == [2, 3]
    line, squares, decay = log_of(out)[-1], 0.0, 1 - 3 ** (-2 / 3)  # step 3 of the warm-up of timm's --ema
    names = [name for name, _ in load_weights(out / "ota.safetensors")[0].named_parameters()]
    for i, name in enumerate(names):
        (before, after), (old, new) = ([state[key][name] for state in states] for key in ("model", "ema"))
        momentum = [state["optimizer"]["state"][i]["momentum_buffer"] for state in states]
        squares += (momentum[1] - 0.9 * momentum[0] - 0.05 * before).square().sum().item()
        torch.testing.assert_close(after, before - line["lr"] * momentum[1])
        torch.testing.assert_close(new, decay * old + (1 - decay) * after)
    assert squares**0.5 == pytest.approx(0.5, rel=1e-3) and line["grad_norm"] > 0.5

    call(train, *small(shapes, out, *flags, steps=6))
    assert_same_run(out, one)
    averaged, last = load_weights(out / "ota.safetensors")[0], load_checkpoint(out)
    assert torch.equal(averaged.head.cls.weight, last["ema"]["head.cls.weight"])
    assert not torch.equal(averaged.head.cls.weight, last["model"]["head.cls.weight"])


def test_only_settings_that_leave_the_result_may_change(call, shapes, undisturbed, tmp_path):
    before = (undisturbed / "ota.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds step 15(.|\n)*--lr: was 0.004, is 0.01 now(.|\n)*--out") as error:
        call(train, *small(shapes, undisturbed, "--lr", 0.01, "--seed", 1, "--log-every", 1, workers=1))
    assert "--seed: was 0, is 1 now" in str(error.value) and "--log-every" not in str(error.value)
    assert (undisturbed / "ota.safetensors").read_bytes() == before
    (tmp_path / "ota.safetensors").touch()
    with pytest.raises(UserError, match="holds a run already, without a checkpoint"):
        call(train, *small(shapes, tmp_path))
