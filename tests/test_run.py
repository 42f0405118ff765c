"""What stands around the training loop: batches, accumulation, telemetry, the run's folder, the switches together."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import model.assigners
import train
import training.folder
from data import CocoDataset, eval_transform, find_splits, generate_shapes
from data.dataset import batches_from
from errors import UserError
from kernels import OTAConfig, PointGrid, assignment_statistics
from kernels.assign_reference import assign_image
from model import Detector, DetectorConfig, init_weights, save_weights
from model.batch import pack, pad_rows, padded_side
from tests.support.scenes import make_scene
from training.folder import RunFolder

ROOT = Path(__file__).parent.parent
SMALL = (
    *("--backbone", "test_resnet", "--no-pretrained", "--channels", "32", "--head-convs", "1"),
    *("--device", "cpu", "--workers", "0"),
)


def tiny_detector(backbone: str = "test_resnet", num_classes: int = 3, **settings) -> Detector:
    torch.manual_seed(0)
    settings = {"channels": 32, "head_convs": 1, "image_size": (96, 128)} | settings
    return Detector(DetectorConfig(num_classes, backbone, **settings))


def random_images(sizes: list[tuple[int, int]], counts: list[int]) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    targets = []
    for (height, width), count in zip(sizes, counts, strict=True):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        side = 8 + torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.3
        labels = torch.randint(0, 3, (count,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + side], 1), "labels": labels})
    return images, targets


# Batches


def test_batch_is_ragged_and_padded():
    images, targets = random_images([(40, 70), (64, 33), (10, 10)], [2, 0, 3])
    targets[2]["ignore"] = torch.tensor([[0.0, 0, 5, 5], [1, 1, 2, 2]])
    batch = pack(images, targets)
    assert batch.images.shape == (3, 3, 64, 96) and batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[40, 70], [64, 33], [10, 10]] and batch.gt_offsets.tolist() == [0, 2, 2, 5]
    assert torch.equal(batch.gt_boxes[2:], targets[2]["boxes"]) and batch.ignore_image.tolist() == [2, 2]
    for image, slot in zip(images, batch.images, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(slot[:, :height, :width], image)
        assert not slot[:, height:].any() and not slot[:, :, width:].any()


def test_static_batch_gives_the_same_losses():
    """Rows are added that belong to no image; of images that are padded further only the padding differs."""
    detector = tiny_detector("test_convnext").train()
    images, targets = random_images([(64, 96), (64, 90)], [3, 0])
    targets[0]["ignore"] = torch.tensor([[0.0, 0, 30, 30]])
    plain, static = pack(images, targets), pack(images, targets, (96, 160))
    assert static.images.shape == (2, 3, 96, 96) and len(static.gt_labels) == len(static.ignore_boxes) == 64
    assert static.gt_labels[3:].unique().tolist() == [-1] and torch.equal(static.gt_offsets, plain.gt_offsets)
    rows_only = static._replace(images=plain.images)
    further = detector.normalise(static.images, static.sizes)
    assert torch.equal(further[:, :, :64, :96], detector.normalise(plain.images, plain.sizes))
    assert not further[:, :, 64:].any()
    losses = [detector(batch)[0] for batch in (plain, rows_only)]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    for rows, padded in ((0, 64), (64, 64), (65, 128), (129, 256)):
        assert len(pad_rows(torch.zeros(rows, 4))) == padded


def test_one_graph_serves_every_number_of_ground_truths(monkeypatch):
    """As --compile has it on a GPU: the assignment is an operator, and the whole step to the losses is one graph."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(model.assigners, "ota_assign", partial(model.assigners.ota_assign, backend="triton"))
    detector = tiny_detector(frozen_norm=True).train().to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(detector, backend=counter, dynamic=False, fullgraph=True)
    for counts in ([3, 2], [2, 0]):
        images, targets = random_images([(64, 96)] * 2, counts)
        targets[0]["ignore"] = torch.tensor([[1.0, 1, 9, 9]]).expand(1 + sum(counts), 4)
        batch = pack(images, targets).to(device)
        batch.mark_ragged()
        losses, assignment, _ = compiled(batch)
        sum(losses.values()).backward()
        expected, eager_assignment, _ = detector.losses(batch)
        assert torch.equal(assignment.gt_index, eager_assignment.gt_index)
        torch.testing.assert_close(losses, expected)
    assert counter.frame_count == 1


def test_batch_gives_the_losses_of_lists():
    detector = tiny_detector("test_convnext").train()
    images, targets = random_images([(40, 70), (64, 33)], [2, 3])
    listed, packed = detector(images, targets)[0], detector(pack(images, targets))[0]
    assert all(torch.equal(listed[name], packed[name]) for name in listed)


def test_images_of_both_types_go_into_one_batch():
    images, targets = random_images([(40, 70), (64, 33)], [1, 1])
    mixed = pack([images[0], images[1].float() / 255], targets).images
    torch.testing.assert_close(mixed, pack(images, targets).images / 255)


@pytest.mark.parametrize(
    ("shortest", "longest", "sides"),
    [(800, 1333, (800, 1088, 1344)), (480, 1333, (480, 672, 832, 992, 1184, 1344)), (512, 512, (512,))],
    ids=["coco", "multi-scale", "square"],
)
def test_static_sides(shortest, longest, sides):
    assert train.static_sides(shortest, longest) == sides
    assert {padded_side(s, sides) for s in range(1, longest + 1)} == set(sides)


# Order


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_batches_of_one_orientation(batch_size):
    tall = (torch.rand(101, generator=torch.Generator().manual_seed(batch_size)) < 0.3).tolist()
    steps = 3 * (101 // batch_size)
    batches = list(batches_from(0, steps, tall, batch_size, 5))
    assert list(batches_from(steps // 2, steps, tall, batch_size, 5)) == batches[steps // 2 :]
    for epoch in range(3):
        mine = [[i for e, i in batch if e == epoch] for batch in batches]
        seen = [i for batch in mine for i in batch]
        assert len(set(seen)) == len(seen) == 101 // batch_size * batch_size
        assert sum(len({tall[i] for i in batch}) > 1 for batch in mine) <= 1
    plain = list(batches_from(0, steps, [True] * 101, batch_size, 5))
    assert plain == list(batches_from(0, steps, [False] * 101, batch_size, 5))


def test_images_of_a_rare_orientation_are_seen():
    tall = [i < 3 for i in range(99)]
    seen = [i for batch in batches_from(0, 50 * (99 // 8), tall, 8, 0) for _, i in batch]
    assert min(seen.count(i) for i in range(99)) > 40


def test_first_images_are_those_with_boxes(tmp_path):
    generate_shapes(tmp_path / "shapes", train_images=6, val_images=0, size_px=64)
    split = find_splits(str(tmp_path / "shapes"))[0]
    content = json.loads(split.annotations.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (1, 3)]
    split.annotations.write_text(json.dumps(content))
    dataset = CocoDataset(split, eval_transform((64, 107)), first=3)
    assert [image["id"] for image in dataset.images] == [2, 4, 5] and len(dataset) == 3
    assert {a["image_id"] for a in dataset.annotations["annotations"]} == {2, 4, 5}
    assert dataset[1][1]["image_id"] == 4 and len(dataset.class_names) == 5


# Accumulation


def accumulated(model, detector, images, targets, passes) -> tuple[dict, list]:
    size = len(images) // passes
    parts = [slice(i, i + size) for i in range(0, len(images), size)]
    terms, _ = train.backward(model, detector, [pack(images[p], targets[p]) for p in parts], bf16=False)
    return terms, [p.grad for p in detector.parameters()]


@pytest.mark.parametrize("counts", [[1, 6, 0, 3], [0, 0, 2, 2], [0, 0, 0, 0]], ids=["uneven", "one-empty", "no-gt"])
def test_passes_give_the_gradient_of_one(counts):
    images, targets = random_images([(64, 96)] * 4, counts)
    detector = tiny_detector("test_convnext").train()  # a backbone without batch norm
    terms, expected = accumulated(detector, detector, images, targets, 1)
    for passes in (2, 4):
        detector.zero_grad()
        summed, grads = accumulated(detector, detector, images, targets, passes)
        torch.testing.assert_close(summed, terms)
        for one, many in zip(expected, grads, strict=True):
            torch.testing.assert_close(many, one, rtol=1e-3, atol=1e-6)


def rank_of_accumulation(rank: int, world: int, folder) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    images, targets = random_images([(64, 96)] * 4, [1, 6, 0, 3])
    share = slice(2 * rank, 2 * rank + 2)
    detector = tiny_detector("test_convnext").train()
    model = DistributedDataParallel(detector)
    torch.save(accumulated(model, detector, images[share], targets[share], 2)[1], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_of_two_passes_give_the_gradient_of_one(tmp_path):
    mp.spawn(rank_of_accumulation, args=(2, tmp_path), nprocs=2)
    detector = tiny_detector("test_convnext").train()
    _, expected = accumulated(detector, detector, *random_images([(64, 96)] * 4, [1, 6, 0, 3]), 1)
    for one, two, both in zip(torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt"), expected, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, both, rtol=1e-3, atol=1e-6)


def test_predictions_are_those_of_the_last_pass():
    images, targets = random_images([(64, 96)] * 2, [1, 6])
    detector, alone = tiny_detector().train(), tiny_detector().train()
    passes = [pack(images[i:][:1], targets[i:][:1]) for i in (0, 1)]
    _, of_two = train.backward(detector, detector, passes, bf16=False)
    terms, of_one = train.backward(alone, alone, passes[1:], bf16=False)
    assert torch.equal(of_two.boxes, of_one.boxes) and set(terms) == {"cls", "box", "iou"}
    assert detector.statistics(of_two, passes[1])["mean_k"] == alone.statistics(of_one, passes[1])["mean_k"] > 0


# Telemetry


def test_statistics_are_those_of_the_dense_plan():
    """Share of background in points that are nobody's candidate is 1, so only candidate points are looked at."""
    grid, config = PointGrid.for_image((104, 136), (8, 16, 32)), OTAConfig(iterations=7)
    scene = make_scene(grid, (5, 0, 9), 3, seed=2)
    found = {name: value.item() for name, value in assignment_statistics(scene, config)[2].items()}
    positives = k = ambiguous = residual = points = 0
    for b in (0, 2):
        rows = slice(scene.gt_offsets[b], scene.gt_offsets[b + 1])
        dense = assign_image(scene.logits[b].double(), scene.boxes[b].double(), scene.gt_boxes[rows].double(),
                             scene.gt_labels[rows], grid, config)  # fmt: skip
        plan = dense["log_plan"].exp()[:, dense["candidates"].any(0)]
        positives += (dense["supplier"] < len(dense["k"])).sum().item()
        k += dense["k"].sum().item()
        ambiguous += (plan.amax(0) < 0.9 * plan.sum(0)).sum().item()
        residual += (plan.sum(0) - 1).abs().sum().item()
        points += plan.shape[1]
    expected = {
        "positives_per_gt": positives / 14, "mean_k": k / 14, "ambiguous": ambiguous / points,
        "residual": residual / points,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < found["ambiguous"] < 1 and found["residual"] > 0
    converged = assignment_statistics(scene, OTAConfig(iterations=500))[2]
    assert converged["residual"] < 0.1 * found["residual"]


def test_statistics_without_ground_truth_are_zero():
    scene = make_scene(PointGrid.for_image((64, 64)), (0, 0), 3)
    assert not any(assignment_statistics(scene, OTAConfig())[2].values())


# Weights to start from


@pytest.mark.parametrize("frozen", [False, True], ids=["batch-norm", "frozen-norm"])
def test_init_takes_everything_where_the_classes_are_the_same(tmp_path, frozen):
    source = tiny_detector("resnet10t", frozen_norm=not frozen)
    source.mean.fill_(0.3)
    save_weights(tmp_path / "a.safetensors", source, {"class_names": ["a", "b", "c"]})
    torch.manual_seed(5)
    detector = tiny_detector("resnet10t", frozen_norm=frozen)
    detector.head.cls.weight.data.fill_(7.0)
    said = init_weights(detector, tmp_path / "a.safetensors", ["a", "b", "c"])
    assert "same 3 classes" in said and detector.mean.flatten().tolist() == pytest.approx([0.3] * 3)
    theirs = source.state_dict()
    assert all(torch.equal(v, theirs[n]) for n, v in detector.state_dict().items() if n in theirs)


def test_init_starts_the_class_layer_afresh_for_other_classes(tmp_path):
    source = tiny_detector(num_classes=2)
    for p in source.parameters():
        p.data.fill_(0.25)
    save_weights(tmp_path / "a.safetensors", source, {"class_names": ["a", "b"]})
    detector = tiny_detector(num_classes=3)
    before = detector.head.cls.weight.clone()
    said = init_weights(detector, tmp_path / "a.safetensors", ["a", "b", "c"])
    assert "class layer of the head starts afresh" in said
    assert torch.equal(detector.head.cls.weight, before) and (detector.head.box.weight == 0.25).all()


def test_init_from_another_network_is_refused(tmp_path):
    save_weights(tmp_path / "a.safetensors", tiny_detector(), {"class_names": ["a", "b", "c"]})
    with pytest.raises(UserError, match="another network: channels is 32, not 64"):
        init_weights(tiny_detector(channels=64), tmp_path / "a.safetensors", ["a", "b", "c"])


# The folder


def folder_of(path: Path, log=(), step: int = 0) -> RunFolder:
    path.mkdir(exist_ok=True)
    return RunFolder(path, {"seed": 0}, {}, {"class_names": ["a", "b", "c"]}, 100, step, list(log))


def metrics_of(ap: float) -> dict:
    return {"AP": ap, "AP50": ap, "per_class": {}}


def test_best_weights_are_kept_over_a_restart(tmp_path):
    detector, folder = tiny_detector(), folder_of(tmp_path / "out")
    for step, ap in ((10, 0.3), (20, 0.5), (30, 0.4)):
        detector.head.scales.data.fill_(step)
        folder.write_evaluation(detector, step, metrics_of(ap), "val")
    folder = folder_of(tmp_path / "out", folder.log, step=30)
    detector.head.scales.data.fill_(40)
    folder.write_evaluation(detector, 40, metrics_of(0.45), "val")
    best, last = (load_file(tmp_path / "out" / f"{name}.safetensors")["head.scales"] for name in ("best", "ota"))
    assert best.unique().tolist() == [20] and last.unique().tolist() == [40]
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("log", [[], [{"step": 1, "loss": 2.0}]], ids=["from-step-0", "from-step-1"])
def test_lines_after_the_checkpoint_are_written_again(tmp_path, log):
    killed = folder_of(tmp_path / "out")
    assert not (tmp_path / "out" / "log.jsonl").exists()
    for step in (1, 2):
        killed.write_line({"step": step, "loss": 2.0})
    folder = folder_of(tmp_path / "out", log, step=len(log))
    folder.write_line({"step": 2, "loss": 2.0})
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, len(log) + 1), 2]


def test_curves_are_redrawn_while_the_run_goes_on(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "out")
    line = {"loss": 1.0, "cls": 0.5, "box": 0.3, "iou": 0.2, "positives_per_gt": 3.0, "mean_k": 4.0}
    folder.write_line({"step": 1} | line)
    assert not (tmp_path / "out" / "curves.png").exists()
    monkeypatch.setattr(training.folder, "REDRAW_S", -1)
    folder.write_line({"step": 2} | line)
    Image.open(tmp_path / "out" / "curves.png").load()


def test_numbers_go_to_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).name, purge_step))

        def add_scalar(self, *scalar):
            written.append(scalar)

        def flush(self):
            pass

    module = ModuleType("tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    folder = folder_of(tmp_path / "out", step=7)
    folder.write_line({"step": 8, "loss": 0.5})
    folder.write_line({"step": 8, "split": "val", "AP": 0.1, "per_class": {}})
    assert written[0] == ("tensorboard", 8)
    assert {("training/loss", 0.5, 8), ("evaluation/AP", 0.1, 8)} <= set(written[1:]) and len(written) == 5
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    folder_of(tmp_path / "without").write_line({"step": 1, "loss": 0.5})


# The command


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run") / "shapes"
    generate_shapes(root, train_images=13, val_images=2, size_px=96)
    return root


def start(*args, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "train.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def test_profile_leaves_a_trace_and_no_step(call, shapes, tmp_path):
    args = ("--data", shapes, *SMALL, "--image-size", 64, "--batch-size", 4, "--steps", 20, "--out", tmp_path / "out")
    said = call(train, "--profile", 2, *args)
    assert "2 steps after 5" in said and "aten::" in said
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert sum("Optimizer.step" in event.get("name", "") for event in events) == 2
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-00000000.pt"]
    with pytest.raises(UserError, match="--profile 16 takes 21 steps"):
        call(train, "--profile", 16, *args)


def test_overfit_takes_the_first_images_and_says_so(call, shapes, tmp_path):
    args = ("--data", shapes, *SMALL, "--image-size", 64, "--overfit", 3, "--steps", 2, "--out", tmp_path / "out")
    assert "2 steps of 3 images" in call(train, *args)  # not the recipe's 8
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--multi-scale", "64", "300"], "--multi-scale 300 is over the longest side"),
        (["--clip-norm", "0"], "--clip-norm: 0 is not a finite number above 0"),
        (["--ema", "1"], "--ema: 1 is not a decay between 0 and 1"),
        (["--overfit", "4", "--multi-scale", "64"], "--overfit trains without augmentation"),
        (["--compile", "reduce-overhead", "--accumulate", "2"], "--compile reduce-overhead overwrites the gradients"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_switches_out_of_range_are_named(monkeypatch, capsys, args, message):
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit):
        train.parse_args()
    assert message in capsys.readouterr().err


def test_passes_must_divide_the_batch(call, shapes, tmp_path):
    with pytest.raises(UserError, match=r"divide by 1 ranks x 3 passes \(--accumulate\)"):
        call(train, "--data", shapes, *SMALL, "--batch-size", 4, "--accumulate", 3, "--out", tmp_path / "out")


@pytest.mark.slow
def test_compiled_network_learns_like_the_eager_one(shapes, tmp_path):
    """Minutes of compilation. Images of 96 x 96 px need one padded size, so the network is compiled once."""
    args = ("--data", shapes, *SMALL, "--image-size", 64, "--batch-size", 4, "--steps", 8, "--log-every", 2)
    losses = {}
    for name, flags in (("eager", ()), ("compiled", ("--compile",))):
        done = start(*args, *flags, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert ("sides are 64, " in done.stdout) == (name == "compiled")
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=0.02)


LOADER_SCRIPT = """
from torch.utils.data import DataLoader
from training.process import ignore_interrupts, setup_distributed

def main():
    setup_distributed("cpu")
    batches = iter(DataLoader(range(100), num_workers=1, worker_init_fn=ignore_interrupts))
    next(batches)
    raise RuntimeError("not foreseen")

main()
"""


def test_error_that_nobody_foresaw_ends_the_loader_processes_too():
    """They ignore signals, and Python would wait for them."""
    result = subprocess.run(
        [sys.executable, "-c", LOADER_SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1 and "RuntimeError: not foreseen" in result.stderr
