"""Every strategy of --assigner: one contract for all, and each one against a literal version in plain Python."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import Assignment, OTAConfig, PointGrid
from model.assigners import CLAIMS, STRATEGIES, assign, assign_with_statistics
from model.assigners.claims import NEITHER, ImageInputs, assign_claims
from model.assigners.paa import fit_two_gaussians, up_to_the_densest
from tests.support.scenes import Scene, make_scene, trained_predictions

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
GRID = PointGrid.for_image((104, 136), (8, 16, 32))
N = GRID.num_points
C = 3


@pytest.fixture(params=STRATEGIES)
def strategy(request) -> str:
    return request.param


def labels_of(strategy: str, scene: Scene) -> Assignment:
    return assign(strategy, scene, OTAConfig())


def scene_of(gt_boxes: list, offsets: list[int] | None = None) -> Scene:
    boxes = torch.tensor(gt_boxes, dtype=torch.float32).reshape(-1, 4)
    labels, offsets = torch.zeros(len(boxes), dtype=torch.int64), torch.tensor(offsets or [0, len(boxes)])
    generator = torch.Generator().manual_seed(0)
    rows = [slice(*ends) for ends in itertools.pairwise(offsets.tolist())]
    predictions = [trained_predictions(GRID, boxes[row], labels[row], C, generator) for row in rows]
    logits, predicted = (torch.stack(tensors) for tensors in zip(*predictions, strict=True))
    return Scene(logits, predicted, boxes, labels, offsets, GRID)


def assert_equal(one: Assignment, other: Assignment) -> None:
    for name, a, b in zip(Assignment._fields, one, other, strict=True):
        assert torch.equal(a, b), f"{name} differs at {(a != b).nonzero()[:8].tolist()}"


def assert_background(match: Assignment) -> None:
    assert (match.gt_index == -1).all() and (match.iou == 0).all() and (match.k == 0).all()


# The contract.


@pytest.mark.parametrize("offsets", [[0, 0], [0, 0, 0]], ids=["one-image", "two-images"])
def test_no_gt(offsets, strategy):
    assert_background(labels_of(strategy, scene_of([], offsets)))


def test_no_gt_in_one_image(strategy):
    scene = make_scene(GRID, (4, 0, 3), C)
    match = labels_of(strategy, scene)
    assert (match.gt_index[1] == -1).all() and (match.gt_index[0] >= 0).any() and (match.gt_index[2] >= 0).any()


def test_matched_row_is_of_the_image_and_iou_of_the_row(strategy):
    scene = make_scene(GRID, (5, 2), C)
    match = labels_of(strategy, scene)
    for b in range(2):
        point = (match.gt_index[b] >= 0).nonzero()[:, 0]
        row = match.gt_index[b, point]
        assert ((row >= scene.gt_offsets[b]) & (row < scene.gt_offsets[b + 1])).all()
        iou = torch.tensor([iou_of(*pair) for pair in zip(scene.gt_boxes[row], scene.boxes[b, point], strict=True)])
        torch.testing.assert_close(match.iou[b, point], iou)
        assert (match.iou[b, match.gt_index[b] < 0] == 0).all()


@pytest.mark.parametrize("name", ["after-the-last", "label", "no-area", "infinite"])
def test_row_is_ignored(name, strategy):
    scene = make_scene(GRID, (4, 3), C)
    extra = torch.tensor([[10.0, 10, 60, 60]])
    label = torch.tensor([0])
    if name == "label":
        label = torch.tensor([-1])
    elif name == "no-area":
        extra = torch.tensor([[10.0, 10, 10, 60]])
    elif name == "infinite":
        extra = torch.tensor([[10.0, 10, math.inf, 60]])
    offsets = scene.gt_offsets.clone()
    if name != "after-the-last":
        offsets[-1] += 1
    padded = scene._replace(
        gt_boxes=torch.cat([scene.gt_boxes, extra]), gt_labels=torch.cat([scene.gt_labels, label]), gt_offsets=offsets
    )
    match = labels_of(strategy, padded)
    assert match.k[-1] == 0
    assert_equal(match._replace(k=match.k[:-1]), labels_of(strategy, scene))


def test_tiny_box(strategy):
    """Between four points: some strategies keep one for it, none fails."""
    match = labels_of(strategy, scene_of([[45.5, 45.5, 46.5, 46.5]]))
    assert (match.gt_index >= 0).sum() == (strategy in ("ota", "simota", "hungarian"))


@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_non_finite_prediction_is_nobody_s(value, part, strategy):
    scene = make_scene(GRID, (6,), C, size_px=(30, 90))
    matched = (labels_of(strategy, scene).gt_index[0] >= 0).nonzero()[:, 0]
    broken = scene._replace(**{part: getattr(scene, part).clone()})
    getattr(broken, part)[0, matched[::2]] = value
    match = labels_of(strategy, broken)
    assert (match.gt_index[0, matched[::2]] < 0).all()
    assert match.iou.isfinite().all() and (match.gt_index >= 0).any()


def test_nothing_but_non_finite_predictions(strategy):
    scene = make_scene(GRID, (3, 4), C)
    scene.logits[0] = math.nan
    match = labels_of(strategy, scene)
    assert (match.gt_index[0] < 0).all() and (match.gt_index[1] >= 0).any() and match.iou.isfinite().all()


def test_huge_predictions(strategy):
    scene = make_scene(GRID, (3,), C)
    scene.boxes[0, ::3] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    match = labels_of(strategy, scene)
    assert match.iou.isfinite().all() and (match.gt_index[0, ::3] < 0).all()


def test_identical_boxes_go_to_the_lowest_index(strategy):
    box = [20.0, 20, 84, 84]
    match = labels_of(strategy, scene_of([box, box]))
    rows = match.gt_index[match.gt_index >= 0]
    if strategy == "hungarian":
        assert set(rows.tolist()) == {0, 1}
    else:
        assert set(rows.tolist()) == {0}


def test_image_alone_is_image_in_a_batch(strategy):
    scene = make_scene(GRID, (5, 0, 3), C)
    match = labels_of(strategy, scene)
    for b, (first, end) in enumerate(itertools.pairwise(scene.gt_offsets.tolist())):
        alone = Scene(scene.logits[b : b + 1], scene.boxes[b : b + 1], scene.gt_boxes[first:end],
                      scene.gt_labels[first:end], torch.tensor([0, end - first]), GRID)  # fmt: skip
        gt_index = match.gt_index[b : b + 1]
        gt_index = torch.where(gt_index >= 0, gt_index - first, gt_index)
        assert_equal(labels_of(strategy, alone), Assignment(gt_index, match.iou[b : b + 1], match.k[first:end]))


def test_padding_of_the_batch_changes_nothing(strategy):
    """An image beside a wider one: the points that are added predict nothing finite here."""
    scene, wide = make_scene(GRID, (6,), C), PointGrid.for_image((104, 264), (8, 16, 32))
    columns = torch.cat([
        (torch.arange(h)[:, None] * ww + torch.arange(w) + offset).flatten()
        for (h, w), (_, ww), offset in zip(GRID.sizes, wide.sizes, wide.level_offsets[:-1], strict=True)
    ])  # fmt: skip
    logits = torch.full((1, wide.num_points, C), math.nan)
    boxes = torch.full((1, wide.num_points, 4), math.nan)
    logits[:, columns], boxes[:, columns] = scene.logits, scene.boxes
    match = labels_of(strategy, scene._replace(logits=logits, boxes=boxes, grid=wide))
    assert torch.equal(match.gt_index[:, columns], labels_of(strategy, scene).gt_index)


def test_permuted_boxes_give_the_permuted_result(strategy):
    scene = make_scene(GRID, (7,), C)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    match = labels_of(strategy, scene)
    permuted = labels_of(strategy, scene._replace(gt_boxes=scene.gt_boxes[order], gt_labels=scene.gt_labels[order]))
    back = torch.where(permuted.gt_index >= 0, order[permuted.gt_index], permuted.gt_index)
    assert torch.equal(back, match.gt_index) and torch.equal(permuted.k, match.k[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_loaded_as_it_is(dtype, strategy):
    scene = make_scene(GRID, (5,), C)
    rounded = scene._replace(logits=scene.logits.to(dtype), boxes=scene.boxes.to(dtype))
    wide = rounded._replace(logits=rounded.logits.float(), boxes=rounded.boxes.float())
    assert_equal(labels_of(strategy, rounded), labels_of(strategy, wide))


def test_label_out_of_range(strategy):
    scene = make_scene(GRID, (2,), C)
    scene.gt_labels[1] = C
    with pytest.raises(ValueError, match=r"gt_labels\[1\] is 3, expected 0..2"):
        labels_of(strategy, scene)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 5), min_size=1, max_size=3))
def test_any_scene(seed, counts):
    grid = PointGrid((8, 32), ((1, 1 + seed % 7), (1 + seed % 3, 2)))
    scene = make_scene(grid, tuple(counts), C, seed=seed, size_px=(3, 70))
    for strategy in STRATEGIES:
        match, ambiguous, _ = assign_with_statistics(strategy, scene, OTAConfig())
        assert match.gt_index.shape == match.iou.shape == ambiguous.shape == scene.logits.shape[:2]
        positives = torch.bincount(match.gt_index[match.gt_index >= 0], minlength=sum(counts))
        assert match.iou.isfinite().all() and (strategy == "ota" or (positives <= match.k).all())


def test_ambiguous_points_are_those_that_several_objects_claim():
    """Two objects that share half of their points, and one that is alone."""
    scene = scene_of([[16, 16, 80, 80], [24, 16, 88, 80], [104, 72, 136, 104]])
    _, ambiguous, _ = assign_with_statistics("fcos", scene, OTAConfig())
    x, y = GRID.points()[ambiguous[0]].unbind(1)
    assert ambiguous.any() and ((x > 24) & (x < 80) & (y > 16) & (y < 80)).all()
    assert not assign_with_statistics("hungarian", scene, OTAConfig())[1].any()
    assert assign_with_statistics("ota", scene, OTAConfig())[1].any()


def test_statistics(strategy):
    scene = make_scene(GRID, (5, 3), C)
    numbers = assign_with_statistics(strategy, scene, OTAConfig())[2]
    match = labels_of(strategy, scene)
    assert numbers["positives_per_gt"] == pytest.approx((match.gt_index >= 0).sum().item() / 8)
    assert numbers["mean_k"] == pytest.approx(match.k.sum().item() / 8)
    assert 0 <= numbers["ambiguous"] <= 1


# Each strategy, literally.


def iou_of(a: Tensor, b: Tensor) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(float(width), 0) * max(float(height), 0)
    area_b = max(float(b[2] - b[0]), 0) * max(float(b[3] - b[1]), 0)
    return overlap / (float((a[2] - a[0]) * (a[3] - a[1])) + area_b - overlap)


def giou_of(a: Tensor, b: Tensor) -> float:
    hull = float((max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1])))
    area_b = max(float(b[2] - b[0]), 0) * max(float(b[3] - b[1]), 0)
    area_a = float((a[2] - a[0]) * (a[3] - a[1]))
    union = (area_a + area_b) / (1 + iou_of(a, b))
    return iou_of(a, b) - (hull - union) / hull


class Literal:
    """One object of an image and one point after the other."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.points = [tuple(p) for p in GRID.points().tolist()]
        self.strides = GRID.point_strides().tolist()
        self.levels = [range(*ends) for ends in itertools.pairwise(GRID.level_offsets)]
        self.objects = range(len(scene.gt_boxes))
        self.logits, self.boxes = scene.logits[0].double(), scene.boxes[0].double()
        self.gts, self.labels = scene.gt_boxes.double(), scene.gt_labels.tolist()

    def sides(self, i: int, j: int) -> tuple[float, ...]:
        (x1, y1, x2, y2), (x, y) = self.gts[i].tolist(), self.points[j]
        return x - x1, y - y1, x2 - x, y2 - y

    def offset(self, i: int, j: int) -> tuple[float, float]:
        (x1, y1, x2, y2), (x, y) = self.gts[i].tolist(), self.points[j]
        return abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)

    def anchor(self, j: int) -> Tensor:
        (x, y), half = self.points[j], 4 * self.strides[j]
        return torch.tensor([x - half, y - half, x + half, y + half], dtype=torch.float64)

    def score(self, i: int, j: int) -> float:
        return float(self.logits[j, self.labels[i]].sigmoid())

    def fcos(self) -> list[set[int]]:
        ranges = {8: (0, 64), 16: (64, 128), 32: (128, math.inf)}
        return [
            {
                j for j in range(N)
                if min(self.sides(i, j)) > 0.01 and max(self.offset(i, j)) < 1.5 * self.strides[j]
                and ranges[self.strides[j]][0] < max(self.sides(i, j)) <= ranges[self.strides[j]][1]
            }
            for i in self.objects
        ]  # fmt: skip

    def retinanet(self) -> list[set[int]]:
        claims = []
        for i in self.objects:
            iou = {j: iou_of(self.gts[i], self.anchor(j)) for j in range(N) if min(self.sides(i, j)) > 0.01}
            claims.append({j for j in iou if iou[j] >= 0.5 or abs(iou[j] - max(iou.values())) < 1e-6})
        return claims

    def atss(self) -> list[set[int]]:
        claims = []
        for i in self.objects:
            candidates = []
            for level in self.levels:
                candidates += sorted(level, key=lambda j: (sum(o * o for o in self.offset(i, j)), j))[:9]
            iou = torch.tensor([iou_of(self.gts[i], self.anchor(j)) for j in candidates])
            least = float(iou.mean() + iou.std()) - 1e-7
            claims.append({j for j, v in zip(candidates, iou.tolist(), strict=True)
                           if v >= least and min(self.sides(i, j)) > 0.01})  # fmt: skip
        return claims

    def simota(self) -> list[set[int]]:
        claims = []
        for i in self.objects:
            cost, iou = {}, {}
            for j in range(N):
                inside, near = min(self.sides(i, j)) > 0.01, max(self.offset(i, j)) < 2.5 * self.strides[j]
                if inside or near:
                    target = torch.zeros(C, dtype=torch.float64)
                    target[self.labels[i]] = 1
                    iou[j] = iou_of(self.gts[i], self.boxes[j])
                    bce = torch.nn.functional.binary_cross_entropy_with_logits(self.logits[j], target, reduction="sum")
                    cost[j] = float(bce) - 3 * math.log(iou[j] + 1e-8) + 1e5 * (not (inside and near))
            k = max(1, int(sum(sorted(iou.values())[-10:])))
            claims.append(set(sorted(cost, key=cost.get)[:k]))
        return claims

    def tal(self) -> list[set[int]]:
        claims = []
        for i in self.objects:
            metric = {j: self.score(i, j) * iou_of(self.gts[i], self.boxes[j]) ** 6 for j in range(N)}
            best = sorted(metric, key=metric.get)[-13:]
            claims.append({j for j in best if metric[j] > 0 and min(self.sides(i, j)) > 0.01})
        return claims

    def paa(self) -> list[set[int]]:
        claims = []
        anchor_iou = [[iou_of(self.gts[i], self.anchor(j)) for j in range(N)] for i in self.objects]
        for i in self.objects:
            loss = {}
            inside = [j for j in range(N) if min(self.sides(i, j)) > 0.01]
            best = max((anchor_iou[i][j] for j in inside), default=0)
            for j in inside:
                column = [anchor_iou[o][j] for o in self.objects]
                good = column[i] >= 0.1 or abs(column[i] - best) < 1e-6
                if good and column.index(max(column)) == i:
                    focal = 0.0
                    for c in range(C):
                        p = float(self.logits[j, c].sigmoid())
                        own = c == self.labels[i]
                        focal -= 0.25 * (1 - p) ** 2 * math.log(p) if own else 0.75 * p**2 * math.log(1 - p)
                    loss[j] = focal + (1 - giou_of(self.gts[i], self.boxes[j]))
            candidates = []
            for level in self.levels:
                candidates += sorted((j for j in level if j in loss), key=loss.get)[:9]
            candidates.sort(key=loss.get)
            claims.append(self.better(candidates, [loss[j] for j in candidates]))
        return claims

    @staticmethod
    def better(candidates: list[int], x: list[float]) -> set[int]:
        if not x:
            return set()
        mean, variance, share = [x[0], x[-1]], [1.0, 1.0], [0.5, 0.5]

        def joint(v: float) -> list[float]:
            return [
                share[c] * math.exp(-((v - mean[c]) ** 2) / (2 * variance[c])) / math.sqrt(2 * math.pi * variance[c])
                for c in (0, 1)
            ]

        likelihood = -math.inf
        for _ in range(100):
            before, likelihood = likelihood, sum(math.log(sum(joint(v))) for v in x) / len(x)
            weight = [[p / sum(joint(v)) for p in joint(v)] for v in x]
            for c in (0, 1):
                total = sum(w[c] for w in weight)
                mean[c] = sum(w[c] * v for w, v in zip(weight, x, strict=True)) / total
                variance[c] = sum(w[c] * (v - mean[c]) ** 2 for w, v in zip(weight, x, strict=True)) / total + 1e-6
                share[c] = total / len(x)
            if abs(likelihood - before) < 1e-3:
                break
        good = [r for r, v in enumerate(x) if joint(v)[0] >= joint(v)[1]]
        last = max(good, key=lambda r: sum(joint(x[r])), default=len(x))
        return set(candidates[: last + 1])


@pytest.mark.parametrize("crowded", [False, True], ids=["sparse", "crowded"])
@pytest.mark.parametrize("name", ["fcos", "retinanet", "atss", "simota", "tal", "paa"])
def test_claims_are_the_literal_ones(name, crowded):
    scene = make_scene(GRID, (9,), C, seed=4, size_px=(8, 120), crowded=crowded)
    expected = getattr(Literal(scene), name)()
    seen = []

    def watched(image: ImageInputs):
        claims = CLAIMS[name](image)
        seen.extend({int(j) for j in row.nonzero()[:, 0]} for row in claims.wanted)
        return claims

    match, ambiguous = assign_claims(watched, scene)
    assert seen == expected
    assert ambiguous[0].nonzero()[:, 0].tolist() == [j for j in range(N) if sum(j in c for c in expected) > 1]
    for j in range(N):
        owners = [i for i in range(9) if j in expected[i]]
        assert (match.gt_index[0, j] >= 0) == bool(owners) and (not owners or match.gt_index[0, j] in owners)


def test_fcos_point_goes_to_the_smallest():
    match = labels_of("fcos", scene_of([[8, 8, 72, 72], [16, 16, 56, 56]]))
    inner = PointGrid.points(GRID)
    j = int(((inner - 36).abs().sum(1) == 0).nonzero()[0])
    assert match.gt_index[0, j] == 1


def test_retinanet_ignores_what_lies_between():
    """An anchor of 64 px that is moved by a px over a box of 64 px has the IoU (64 - a) / (64 + a)."""
    match = labels_of("retinanet", scene_of([[4 + 32, 4 + 16, 68 + 32, 84]]))
    points = GRID.points()
    for shift, expected in ((16, 0), (24, NEITHER), (32, -1)):  # IoU 0.6, 0.4545, 0.33
        j = int(((points[:221] == torch.tensor([68.0 + shift, 52.0])).all(1)).nonzero()[0])
        assert match.gt_index[0, j] == expected, shift


def test_hungarian_match_is_the_cheapest_of_all():
    grid = PointGrid((32,), ((2, 3),))
    scene = make_scene(grid, (3,), C, seed=5, size_px=(20, 60))
    match = assign("hungarian", scene, OTAConfig())

    def cost(i: int, j: int) -> float:
        gt, box = scene.gt_boxes[i], scene.boxes[0, j]
        p = float(scene.logits[0, j, scene.gt_labels[i]].sigmoid())
        focal = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
        a, b = (torch.cat([(x[:2] + x[2:]) / 2, x[2:] - x[:2]]) for x in (gt, box))
        l1 = float((a - b).abs().sum() / (gt[2:] - gt[:2]).max())
        return 2 * focal + 5 * l1 - 2 * giou_of(gt.double(), box.double())

    best = min(itertools.permutations(range(6), 3), key=lambda js: sum(cost(i, j) for i, j in enumerate(js)))
    found = [int((match.gt_index[0] == i).nonzero()[0, 0]) for i in range(3)]
    assert tuple(found) == best and (match.gt_index >= 0).sum() == 3


def test_more_objects_than_points():
    grid = PointGrid((32,), ((1, 2),))
    match = assign("hungarian", make_scene(grid, (5,), C, size_px=(20, 60)), OTAConfig())
    assert (match.gt_index >= 0).all() and match.k.sum() == 2


@pytest.mark.parametrize(
    ("losses", "positive"),
    [([0.5, 0.9, 1.0, 1.0, 1.1, 1.8], 3), ([0.69, 1.10, 2.15], 2), ([0.7], 1), ([0.4, 0.4], 1)],
    ids=["lowest-is-of-the-other", "few", "one", "equal"],
)
def test_paa_takes_all_up_to_the_densest(losses, positive):
    """How many scikit-learn's mixture gives, used as in the paper's code."""
    value = torch.tensor([losses, [math.inf] * len(losses)])
    assert up_to_the_densest(value).tolist() == [[r < positive for r in range(len(losses))], [False] * len(losses)]


def test_two_gaussians_tell_two_clusters_apart():
    value = torch.tensor([[0.1, 0.12, 0.15, 2.0, 2.1, 2.2], [0.3, math.inf] + [math.inf] * 4])
    density, better = fit_two_gaussians(value)
    assert better.tolist() == [[True] * 3 + [False] * 3, [True] + [False] * 5]
    assert density[1, 1:].isneginf().all()
