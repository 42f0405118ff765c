"""Detection losses in what runs them: torch's operator registry, torch.compile, CUDA graphs, a GPU's memory."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import box_loss, focal_loss
from kernels.box_loss_triton import box_gradient, box_sums
from kernels.focal_triton import focal_gradient, focal_sum
from tests.support.backends import COMPARED, GPU_OR_INTERPRETER, assert_equal
from tests.support.losses import Batch, assert_parity, make_batch, run

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")


@pytest.fixture(params=COMPARED)
def backend(request) -> str:
    return request.param


def test_triton_operators_are_registered_as_torch_wants_them():
    for strided, ignored in ((False, True), (True, False)):
        batch = make_batch(2, 9, 3, 4, ignored=ignored).to(GPU_OR_INTERPRETER)
        logits, boxes = batch.logits, batch.boxes
        if strided:
            logits, boxes = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (logits, boxes))
        rest = (batch.gt_index, batch.iou, batch.gt_boxes)
        focal = (batch.gt_index, batch.gt_labels, batch.ignored)
        upstream = torch.tensor([0.3, 0.7], device=logits.device)
        torch.library.opcheck(focal_gradient, (upstream[0], logits, *focal))
        torch.library.opcheck(box_gradient, (upstream, boxes, batch.iou_logits, *rest))
        logits, boxes, iou_logits = (x.detach().requires_grad_() for x in (logits, boxes, batch.iou_logits))
        torch.library.opcheck(focal_sum, (logits, *focal))
        torch.library.opcheck(box_sums, (boxes, iou_logits, *rest))


def scaled(batch: Batch, backend: str) -> Tensor:
    focal = focal_loss(batch.logits * 1.5, batch.gt_index, batch.gt_labels, batch.ignored, backend=backend)
    giou, entropy = box_loss(
        batch.boxes * 1.1, batch.iou_logits * 2, batch.gt_index, batch.iou, batch.gt_boxes, backend=backend
    )
    return focal + 2 * giou + 3 * entropy


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_torch_compile_keeps_them_in_one_graph(compiler, backend):
    """The second batch has other numbers of images and ground truths."""
    compiled = torch.compile(scaled, fullgraph=True, backend=compiler)
    for B, G in ((2, 5), (3, 8)):
        batch = make_batch(B, 37, 7, G, ignored=True).to(GPU_OR_INTERPRETER)
        leaves = [tensor.requires_grad_() for tensor in batch[:3]]
        losses = compiled(batch, backend), scaled(batch, backend)
        found, expected = ((loss, *torch.autograd.grad(loss, leaves)) for loss in losses)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)  # a compiler may have another sigmoid


def full_size(dtype: torch.dtype = torch.float32) -> Batch:
    return make_batch(16, 22_400, 80, 117, matched=0.01, ignored=True).cast(dtype).to(GPU_OR_INTERPRETER)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_full_size(dtype):
    """Parity, and the same bits ten times."""
    batch = full_size(dtype)
    first = assert_parity(batch, "triton")
    for _ in range(9):
        assert_equal(run(batch, "triton"), first)


@pytest.mark.gpu
def test_no_synchronisation(backend):
    batch = full_size()
    leaves = [tensor.requires_grad_() for tensor in batch[:3]]
    torch.autograd.grad(scaled(batch, backend), leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(scaled(batch, backend), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph_with_changed_inputs(backend):
    """A replay sees whatever has been copied into the inputs."""
    batches = [make_batch(2, 517, 11, 9, ignored=True, seed=seed).to(GPU_OR_INTERPRETER) for seed in range(3)]
    static = Batch(*(tensor.clone() for tensor in batches[0]))
    static_leaves = [tensor.requires_grad_() for tensor in static[:3]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(scaled(static, backend), static_leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(scaled(static, backend), static_leaves)
    for batch in (*batches, *reversed(batches)):
        with torch.no_grad():
            for target, source in zip(static, batch, strict=True):
                target.copy_(source)
        graph.replay()
        fresh = Batch(*(tensor.clone() for tensor in batch))
        leaves = [tensor.requires_grad_() for tensor in fresh[:3]]
        for a, b in zip(captured, torch.autograd.grad(scaled(fresh, backend), leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_memory_is_the_gradient():
    batch = full_size()
    logits = batch.logits.requires_grad_()

    def gradient() -> Tensor:
        loss = focal_loss(logits, batch.gt_index, batch.gt_labels, batch.ignored, backend="triton")
        return torch.autograd.grad(loss, logits)[0]

    gradient()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient()
    assert torch.cuda.max_memory_allocated() - before <= logits.nbytes + 2**20
