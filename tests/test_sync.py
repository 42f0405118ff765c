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

CONFIG = DetectorConfig(3, "test_resnet", channels=32, head_convs=1, image_size=(96, 128))
aten = torch.ops.aten
NAMES = (
    "_local_scalar_dense nonzero nonzero_numpy masked_select is_nonzero equal _unique2 unique_dim unique_consecutive "
    "repeat_interleave bincount argwhere"
)
WAITS = {getattr(aten, name) for name in NAMES.split()}
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)


class NoWaiting(TorchDispatchMode):
    """Raises at what would make the host wait for a GPU. A Triton operator is one call, whatever is inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        by_mask = func.overloadpacket in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert func.overloadpacket not in WAITS and not by_mask, f"{func} waits for the device"
        if func.overloadpacket == aten._to_copy and kwargs.get("device") is not None:
            assert torch.device(kwargs["device"]) == args[0].device, f"{func} between devices waits for the device"
        return func(*args, **kwargs)


@pytest.fixture
def batches(monkeypatch) -> list[Batch]:
    """A batch of images with 3, 0 and 2 objects, one of images without any; each image has a region to ignore."""
    pytest.importorskip("triton")
    interpreted = partial(model.assigners.ota_assign, backend="triton", check=False)
    monkeypatch.setattr(model.assigners, "ota_assign", interpreted)
    torch.manual_seed(0)
    packed = []
    for counts in ((3, 0, 2), (0, 0)):
        images = [torch.randint(0, 256, (3, 64, 96 - 8 * i), dtype=torch.uint8) for i in range(len(counts))]
        corners, ignore = [torch.rand(n, 2) * 40 for n in counts], torch.tensor([[1.0, 1, 9, 9]])
        boxes = [torch.cat([corner, corner + 20], 1) for corner in corners]
        targets = [{"boxes": box, "labels": torch.arange(len(box)), "ignore": ignore} for box in boxes]
        packed.append(pack(images, targets))
    return packed


def test_a_training_step_does_not_wait(monkeypatch, batches):
    torch.manual_seed(0)
    detector = Detector(CONFIG).train()
    ema = ModelEmaV3(detector, 0.9, use_warmup=True)
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9)
    before = detector.head.cls.weight.clone()
    train.backward(detector, detector, batches, bf16=False)  # Triton asks its driver, points are made
    optimizer.zero_grad(set_to_none=True)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        optimizer.param_groups[0]["params"][0].nonzero()
    with monkeypatch.context() as patch, NoWaiting():  # the mode does not see all calls that read or move a tensor
        for name in ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, lambda *_, **__: pytest.fail("waits for the device"))
        for step in range(2):
            values, _ = train.backward(detector, detector, batches, bf16=True)
            values["grad_norm"] = torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(detector, step + 1)
            pending = [(step, [1, 2, 3], torch.stack(list(values.values())))]
    assert not torch.equal(detector.head.cls.weight, before)
    numbers = train.read_losses(pending, list(values), Path("annotations.json"))[0]
    assert set(numbers) == {"cls", "box", "iou", "grad_norm"} and all(v > 0 for v in numbers.values())


@pytest.mark.gpu
def test_a_training_step_does_not_wait_for_a_gpu(batches):
    device = torch.device("cuda")
    detector = Detector(CONFIG).train().to(device)
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9, fused=True)
    pinned = [Batch(*(tensor.pin_memory() for tensor in batch)) for batch in batches]
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
