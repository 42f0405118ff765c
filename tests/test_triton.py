"""The Triton backend: what a batch, a compiler and a CUDA graph ask of it, beside the parity of test_parity.py."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import kernels.assign_triton
from kernels import OTAConfig, PointGrid, ota_assign
from kernels.assign import BACKENDS
from tests.support.backends import GPU_OR_INTERPRETER as DEVICE
from tests.support.backends import GRID, ORDINARY, assert_equal, assert_parity, scene_of
from tests.support.parity import EXCLUDED_SHARE, parity
from tests.support.scenes import WORKLOADS, Scene, make_scene, make_workload

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
ROOT = Path(__file__).parent.parent
QUICK = OTAConfig(iterations=3)
gpu = pytest.mark.gpu


def scene_with(counts: tuple[int, ...], seed: int = 0) -> Scene:
    return make_scene(GRID, counts, 3, seed=seed).to(DEVICE)


def test_several_tiles():
    """More points, ground truths and pairs of each than a program looks at together; many images."""
    rows = make_scene(PointGrid((8,), ((19, 31),)), (37, 1), 2, seed=3, size_px=(20, 90))
    assert assert_parity(rows, OTAConfig(center_prior="none", iterations=2), "triton").points > 512
    images = make_scene(PointGrid((8,), ((3, 3),)), (1, *[0] * 27) * 2, 2, size_px=(6, 20))
    assert_parity(images, OTAConfig(iterations=2), "triton")


def test_unchecked_offsets_of_any_kind_read_nothing_out_of_bounds():
    for offsets in ((0, 4, 0, 4), (-5, 1, 2**33, 99)):
        scene = scene_with((2, 1, 1))._replace(gt_offsets=torch.tensor(offsets, device=DEVICE))
        match = ota_assign(*scene, replace(QUICK, radius=2), backend="triton", check=False)
        assert match.gt_index.min() >= -1 and match.gt_index.max() < 4


def weighted(scene: Scene, scale: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    match = ota_assign(scene.logits * scale, *scene[1:5], GRID, QUICK, backend=backend)
    return match.gt_index, match.iou * 2


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=gpu)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_keeps_it_in_one_graph(backend, compiler):
    """The second scene has other numbers of images and ground truths."""
    compiled = torch.compile(weighted, fullgraph=True, backend=compiler)
    for counts in ((1, 0), (1, 0, 1)):
        scene, scale = scene_with(counts), torch.tensor(1.5, device=DEVICE)
        for a, b in zip(compiled(scene, scale, backend), weighted(scene, scale, backend), strict=True):
            assert torch.equal(a, b)


def test_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels.assign, "COMPILED", True)
    with pytest.raises(
        ValueError, match="backend='triton' needs tensors on a GPU, they are on cpu; TRITON_INTERPRET=1"
    ):
        ota_assign(*scene_of([ORDINARY]), backend="triton")


def test_kernels_without_triton():
    """The other backends work, and are the default; asking for this one says what is missing."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels import PointGrid, ota_assign\n"
        "box = torch.tensor([[4.0, 4, 28, 28]])\n"
        "inputs = torch.zeros(1, 16, 2), box.expand(1, 16, 4), box, torch.tensor([1]), torch.tensor([0, 1])\n"
        "inputs = *inputs, PointGrid((8,), ((4, 4),))\n"
        "assert int(ota_assign(*inputs).k) > 0\n"
        "ota_assign(*inputs, backend='triton')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "ModuleNotFoundError: backend='triton' needs the package triton" in result.stderr


@gpu
@pytest.mark.parametrize("name", ["coco", "crowd"])
def test_full_size(name):
    """Parity, half precision as it is, and the same bits ten times."""
    scene = make_workload(WORKLOADS[name]).to(DEVICE)
    assert assert_parity(scene, OTAConfig(), "triton").excluded_share < EXCLUDED_SHARE
    first = ota_assign(*scene)
    for _ in range(9):
        assert_equal(ota_assign(*scene), first)
    for dtype in (torch.bfloat16, torch.float16):
        half = scene._replace(logits=scene.logits.to(dtype), boxes=scene.boxes.to(dtype))
        rounded = half._replace(logits=half.logits.float(), boxes=half.boxes.float())
        assert_equal(ota_assign(*half), ota_assign(*rounded))


@gpu
def test_parity_of_aerial_images():
    """The image with 4,967 ground truths would take the dense reference some 40 GiB."""
    workload = WORKLOADS["aerial"]
    scene = make_workload(workload).to(DEVICE)
    images = [b for b, count in enumerate(workload.counts) if count <= 1000][:20]
    result = parity(scene, OTAConfig(), "triton", images)
    assert not result.failures, "\n".join(result.failures)
    assert result.excluded_share < EXCLUDED_SHARE
    torch_match, match = (ota_assign(*scene, backend=backend) for backend in ("torch", "triton"))
    assert (match.gt_index[0] != torch_match.gt_index[0]).float().mean() < EXCLUDED_SHARE


@gpu
@pytest.mark.parametrize("center_prior", ["closest", "radius", "none"])
def test_no_synchronisation(center_prior):
    """Not even for the tables of a grid that is seen for the first time."""
    scene, config = make_workload(WORKLOADS["coco"]).to(DEVICE), OTAConfig(center_prior=center_prior)
    other = make_scene(PointGrid.for_image((96, 160 + 8 * len(center_prior))), (3, 1), 80).to(DEVICE)
    ota_assign(*scene, config)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ota_assign(*scene, config)
        ota_assign(*other, config)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.parametrize("center_prior", ["closest", "radius", "none"])
def test_cuda_graph_with_changed_inputs(center_prior):
    """A replay sees whatever has been copied into the inputs, rows after the last offset included."""
    config = OTAConfig(center_prior=center_prior)
    scenes = [make_scene(GRID, counts, 3, seed=seed).to(DEVICE) for seed, counts in enumerate([(7, 0, 23), (1, 20, 9)])]
    for offsets in ([0, 2, 2, 5], [0, 0, 0, 0]):
        scenes.append(scenes[0]._replace(gt_offsets=torch.tensor(offsets, device=DEVICE)))
    static = Scene(*(tensor.clone() for tensor in scenes[0][:5]), GRID)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ota_assign(*static, config)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        match = ota_assign(*static, config)
    for scene in (*scenes, *reversed(scenes)):
        for target, source in zip(static[:5], scene[:5], strict=True):
            target.copy_(source)
        graph.replay()
        assert_equal(match, ota_assign(*scene, config))


@gpu
@pytest.mark.parametrize("name, limit_mib", [("coco", 32), ("crowd", 64), ("aerial", 512)])
def test_memory_follows_the_pairs(name, limit_mib):
    scene = make_workload(WORKLOADS[name]).to(DEVICE)
    ota_assign(*scene)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    match = ota_assign(*scene)
    outputs = sum(tensor.numel() * tensor.element_size() for tensor in match)
    assert torch.cuda.max_memory_allocated() - before - outputs <= limit_mib * 2**20


@gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_no_address_out_of_bounds():
    code = (
        "from tests.support.scenes import make_scene; from kernels import OTAConfig, PointGrid, ota_assign\n"
        "scene = make_scene(PointGrid.for_image((104, 136), (8, 16, 32)), (7, 0, 70), 3).to('cuda')\n"
        "for prior in ('closest', 'radius', 'none'): ota_assign(*scene, OTAConfig(center_prior=prior))"
    )
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
