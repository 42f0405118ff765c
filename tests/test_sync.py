"""A steady training step asks the device for nothing: no value, no shape that depends on data."""

from functools import partial
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch.utils._python_dispatch import TorchDispatchMode

import model.assigners
import train
from model import Detector, DetectorConfig
from model.batch import Batch, pack

aten = torch.ops.aten
NAMES = (
    "_local_scalar_dense nonzero nonzero_numpy masked_select is_nonzero equal _unique2 unique_dim unique_consecutive "
    "repeat_interleave bincount argwhere"
)
WAITS = {getattr(aten, name) for name in NAMES.split()}


class NoWaiting(TorchDispatchMode):
    """Raises at what would make the host wait for a GPU. A Triton operator is one call here, whatever is inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert func.overloadpacket not in WAITS and not by_mask, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def batches(monkeypatch) -> list[Batch]:
    """Of five images with 3, 0, 2, 0 and 0 objects, the last two without any, and a region to ignore in each."""
    pytest.importorskip("triton")
    interpreted = partial(model.assigners.ota_assign, backend="triton", check=False)
    monkeypatch.setattr(model.assigners, "ota_assign", interpreted)
    generator = torch.Generator().manual_seed(0)
    counts, packed = [3, 0, 2, 0, 0], []
    for part in (counts[:3], counts[3:]):
        images = [torch.randint(0, 256, (3, 64, 96 - 8 * i), dtype=torch.uint8) for i in range(len(part))]
        corner = [torch.rand(n, 2, generator=generator) * 40 for n in part]
        targets = [
            {
                "boxes": torch.cat([c, c + 20], 1),
                "labels": torch.arange(len(c)),
                "ignore": torch.tensor([[1.0, 1, 9, 9]]),
            }
            for c in corner
        ]
        packed.append(pack(images, targets))
    return packed


def forbid_reading(monkeypatch) -> None:
    """What reads a tensor without a call that a dispatch mode sees, or moves it."""

    def refuse(*_, **__):
        raise AssertionError("waits for the device")

    for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_training_step_does_not_wait(monkeypatch, batches, passes):
    torch.manual_seed(0)
    config = DetectorConfig(3, "test_resnet", channels=32, head_convs=1, image_size=(96, 128))
    detector = Detector(config).train()
    ema = ModelEmaV3(detector, 0.9, use_warmup=True)
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9)
    before = detector.head.cls.weight.clone()
    train.backward(detector, detector, batches[:passes], bf16=False)  # Triton asks its driver, points are made
    optimizer.zero_grad(set_to_none=True)
    with monkeypatch.context() as patch, NoWaiting():
        forbid_reading(patch)
        for step in range(2):
            values, _ = train.backward(detector, detector, batches[:passes], bf16=True)
            values["grad_norm"] = torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(detector, step + 1)
            pending = [(step, [1, 2, 3], torch.stack(list(values.values())))]
    assert not torch.equal(detector.head.cls.weight, before)
    numbers = train.read_losses(pending, list(values), Path("annotations.json"))[0]
    assert set(numbers) == {"cls", "box", "iou", "grad_norm"} and all(v > 0 for v in numbers.values())


@pytest.mark.parametrize(
    "wait",
    [lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: float(x.sum()), lambda x: x.masked_select(x > 0)],
    ids=["mask", "nonzero", "float", "masked_select"],
)
def test_waiting_is_noticed(wait):
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        wait(torch.randn(5))


@pytest.mark.gpu
@pytest.mark.parametrize("passes", [1, 2])
def test_a_training_step_does_not_wait_for_a_gpu(batches, passes):
    device = torch.device("cuda")
    config = DetectorConfig(3, "test_resnet", channels=32, head_convs=1, image_size=(96, 128))
    detector = Detector(config).train().to(device)
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9, fused=True)
    pinned = [Batch(*(tensor.pin_memory() for tensor in batch)) for batch in batches[:passes]]
    for mode in ("default", "error"):  # the first round compiles kernels and chooses convolutions
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for step in range(3):
                values, _ = train.backward(detector, detector, [batch.to(device) for batch in pinned], bf16=True)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                pending = [(step, [1, 2, 3], torch.stack(list(values.values())))]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert train.read_losses(pending, list(values), Path("annotations.json"))[0]["cls"] > 0
