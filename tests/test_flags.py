"""Flags of train.py: recipes, what overrides them, the learning rate, and the message for each refusal."""

import sys
from unittest import mock

import pytest
import torch

import train
from kernels import OTAConfig
from model import DetectorConfig


@pytest.fixture
def parse(monkeypatch):
    """Return the parsed flags of a command line."""

    def parse(line: str):
        monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
        return train.parse_args()

    return parse


def test_coco_recipe_is_the_papers(parse):
    args = parse("--data coco")
    assert (args.backbone, args.pretrained, args.image_size, args.optimizer) == ("resnet50", True, [800, 1333], "sgd")
    assert (args.steps, args.batch_size, args.lr, args.weight_decay) == (90_000, 16, 0.01, 1e-4)
    assert train.detector_config(args, 80) == DetectorConfig(80, frozen_norm=True)
    augments = {"coco": "flip", "crowdhuman": "flip", "shapes": "flip", "my-data": "light", "coco --overfit 4": "none"}
    assert {line: parse(f"--data {line}").augment for line in augments} == augments


@pytest.mark.parametrize(
    ("line", "rates"),
    [
        ("--data coco", {0: 1e-5, 500: 0.00501, 59_999: 0.01, 60_000: 0.001, 79_999: 0.001, 80_000: 0.0001}),
        ("--data coco --batch-size 64", {500: 0.02004, 50_000: 0.04}),
        ("--lr 0.1 --batch-size 16 --steps 1000", {0: 0.001, 49: 0.049703, 500: 0.05, 999: 2.467e-7}),
        ("--lr 0.1 --batch-size 16 --steps 10 --schedule step", {0: 0.02, 3: 0.08, 4: 0.1, 9: 0.001}),
    ],
    ids=["steps", "scaled-with-the-batch", "cosine", "warmup-is-half-the-run-at-most"],
)
def test_learning_rate(parse, line, rates):
    args = parse(line)
    found = {step: train.learning_rate(step, args.steps, args) for step in rates}
    assert found == pytest.approx(rates, rel=1e-3)


def test_settings_of_ota_override_the_recipe(parse):
    args = parse("--ota top_q=7 fixed_k=null rescale=false")
    assert train.detector_config(args, 5).ota == OTAConfig(radius=3, top_q=7, rescale=False)
    args = parse("--ota center_prior=radius")  # the recipe's radius belongs to "closest"
    assert train.detector_config(args, 5).ota.radius == 2.5


def test_images_are_padded_to_sides_from_the_smallest_that_is_drawn(parse, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)  # restored after the test
    flags = ("", "--augment light", "--augment light --multi-scale 32 60")
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would leave the configuration without it
        sides = [train.compile_detector(mock.Mock(), parse(f"--image-size 100 160 {more}"), print) for more in flags]
    assert [(found[0], found[-1]) for found in sides] == [(128, 160), (96, 160), (32, 160)]


def test_a_run_says_its_classes_and_the_flags_that_replace_those_of_the_recipe(parse):
    args = parse("--data coco --steps 30 --no-pretrained --seed 3")
    dataset = mock.MagicMock(class_counts=[5, 0, 7, *range(10, 90)], class_names=[f"c{c}" for c in range(83)])
    dataset.__len__.return_value = 160
    said = train.explain(args, dataset, args.steps)
    assert "83 classes" in said and ": c82 89, c81 88, " in said
    assert said.splitlines()[0].endswith("c76 83, 73 more, the rarest three, c2 7, c0 5, c1 0")
    assert said.endswith(
        "3.0 epochs, shorter side 800 px, longest 1333 px, --augment flip, from the recipe for coco "
        "in docs/training.md except for --steps --no-pretrained"
    )


REFUSED = {
    "--steps 0": "--steps: 0 is not an integer of at least 1",
    f"--seed {10**20}": "--seed",
    "--lr nan": "--lr: nan is not a finite number above 0",
    "--weight-decay nan": "--weight-decay",
    "--clip-norm 0": "--clip-norm: 0 is not a finite number above 0",
    "--ema 1": "--ema: 1 is not a decay between 0 and 1",
    "--image-size 64 32": "--image-size takes the shorter and the longest side",
    "--multi-scale 64 300": "--multi-scale 300 is over the longest side",
    "--overfit 4 --multi-scale 64": "--overfit trains without augmentation, so not with --multi-scale",
    "--overfit 4 --augment light": "--overfit trains without augmentation, so not with --augment light",
    "--compile reduce-overhead --accumulate 2": "--compile reduce-overhead overwrites the gradients",
    "--ota radius=2.5": "OTAConfig.radius is 2.5: 'closest'",
    "--ota alpha=x": "OTAConfig.alpha is 'x', it must be a number",
    "--ota sigma=1": "'sigma=1' is no key=value with a key of alpha, eps,",
    "--assigner simota --ota top_q=3": "--ota is for --assigner ota, not for simota",
    "--data shapes --box vbox": "--box vbox is for CrowdHuman",
    "--steps 1e3": "--steps: 1e3 is not",
    "--surprise": "unrecognized arguments: --surprise",
}


@pytest.mark.parametrize("line", REFUSED)
def test_flag_that_no_run_can_use_is_named(parse, capsys, line):
    with pytest.raises(SystemExit) as stop:
        parse(line)
    assert stop.value.code == 2 and REFUSED[line] in capsys.readouterr().err


def test_restarts_of_torchrun_need_a_named_folder(parse, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(SystemExit):
        parse("--data shapes")
    assert "--max-restarts needs --out" in capsys.readouterr().err
    parse("--data shapes --out runs/x")
