"""Pictures of label assignment: what is drawn is what is assigned, files are written, mistakes are named."""

import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

from data import CocoDataset, DatasetError, find_splits, generate_shapes
from errors import UserError
from eval import load_with_data
from kernels import OTAConfig, PointGrid, ota_assign
from model import Detector, DetectorConfig
from model.assigners import STRATEGIES, assign_with_statistics
from model.weights import save_weights
from studies import draw_assignment
from studies.draw_assignment import COLORS, colors_of, generated_crowd, toy_scene
from studies.predictions import find_image, predicted_scene
from tests.support.scenes import make_scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A generated data set of one training image and three of validation."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    generate_shapes(root, train_images=1, val_images=3, size_px=96, seed=2)
    return root


@pytest.fixture(scope="module")
def dataset(shapes) -> CocoDataset:
    return CocoDataset(find_splits(str(shapes))[1])


@pytest.fixture(scope="module")
def weights(shapes, dataset, tmp_path_factory):
    """A detector that has learned nothing."""
    torch.manual_seed(0)
    config = DetectorConfig(5, "test_resnet", (96, 160), channels=64, head_convs=0, ota=OTAConfig(radius=3))
    path = tmp_path_factory.mktemp("weights") / "ota.safetensors"
    classes = {"class_names": dataset.class_names, "category_ids": dataset.category_ids}
    save_weights(path, Detector(config), classes | {"data": str(shapes)})
    return path


def test_labels_are_those_of_ota_assign_and_ambiguity_that_of_the_log():
    scene, config = make_scene(PointGrid.for_image((104, 136), (8, 16, 32)), (5, 0, 7), 3, seed=1), OTAConfig()
    match, ambiguous, numbers = assign_with_statistics("ota", scene, config)
    expected = ota_assign(*scene, config, backend="torch")
    assert all(torch.equal(one, other) for one, other in zip(match, expected, strict=True))
    points = sum(len(draw_assignment.solve(image, config)[1].points) for image in scene.images())
    assert ambiguous.shape == match.gt_index.shape and not ambiguous[1].any()
    assert int(ambiguous.sum()) == round(float(numbers["ambiguous"]) * points) > 0


def test_boxes_that_meet_differ_in_colour():
    boxes = generated_crowd()[2].gt_boxes
    colors = colors_of(boxes)
    met = (box_iou(boxes, boxes) > 0).fill_diagonal_(False)
    assert met.any() and all(colors[i] != colors[j] for i, j in met.nonzero().tolist())


def test_more_boxes_than_colours_have_a_colour_each():
    assert len(colors_of(torch.tensor([[0.0, 0, 9, 9]]).repeat(25, 1))) == 25 > len(COLORS)


def test_objects_of_the_toy_scene_contend():
    """Some point is sent units by two objects, and is ambiguous."""
    scene, config = toy_scene(), OTAConfig()
    plan = draw_assignment.solve(scene, config)[1]
    sent = torch.zeros(3, scene.grid.num_points, dtype=torch.float64)
    sent[plan.gt, plan.flat_point] = plan.log_plan.exp()
    contended = (sent > 0.05).sum(0) > 1
    assert contended.any() and assign_with_statistics("ota", scene, config)[1][0, contended].all()


def test_pictures_of_a_generated_crowd(tmp_path, capsys):
    draw_assignment.main(["--out", str(tmp_path), "--strategies", *STRATEGIES[:2]])
    for name in ("plan.png", "levels.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300 and len(picture.convert("P").getcolors()) > 50
    assert f"wrote {tmp_path / 'levels.png'}" in capsys.readouterr().out


def test_pictures_of_a_detector(weights, tmp_path):
    draw_assignment.main(["--weights", str(weights), "--out", str(tmp_path)])
    assert (tmp_path / "levels.png").exists()


def test_predictions_are_of_the_image_as_the_detector_sees_it(weights):
    detector, dataset, _ = load_with_data(weights, None)
    image, scene = predicted_scene(detector, dataset, 1)
    assert detector.config.ota.radius == 3 and image.shape == (3, 96, 96)
    boxes, scores = scene.boxes, scene.logits.sigmoid()
    assert boxes.shape == (1, scene.grid.num_points, 4) and scores.shape == (1, scene.grid.num_points, 5)
    assert len(scene.gt_boxes) == int(scene.gt_offsets[-1]) == len(dataset[1][1]["boxes"])


def test_image_is_found_by_index_by_name_and_by_its_objects(dataset):
    counts = [len(dataset[i][1]["boxes"]) for i in range(3)]
    assert find_image(dataset, "2") == 2
    assert find_image(dataset, "000002.jpg") == 1
    assert counts[find_image(dataset, None)] == max(counts)


@pytest.mark.parametrize("wanted", ["3", "-1", "other.jpg"])
def test_image_that_is_not_there_is_named(wanted, dataset):
    with pytest.raises(DatasetError, match=f"--image {wanted} is neither a file name in .* nor an index in 0..2"):
        find_image(dataset, wanted)


@pytest.mark.parametrize("flag", ["--data", "--image"])
def test_flags_without_weights_are_refused(flag, tmp_path):
    with pytest.raises(UserError, match="--data and --image need --weights"):
        draw_assignment.main([flag, "1", "--out", str(tmp_path)])


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match="there is no weights file"):
        draw_assignment.main(["--weights", str(tmp_path / "none.safetensors"), "--out", str(tmp_path)])
