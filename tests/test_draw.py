"""Pictures: boxes, captions and fonts of detections, looked at pixel by pixel, and the curves of a training run."""

from pathlib import Path

import matplotlib
import pytest
import torch

from data.draw import draw_curves, draw_detections, fonts_of
from tests.support.detectors import NAMES

NONE_TRUE = torch.empty(0, 4)


@pytest.mark.parametrize("size", [(40, 30), (500, 400)], ids=["small", "large"])
def test_boxes_have_the_colour_of_their_class_and_small_images_are_enlarged(size):
    """Three detections, of which the second has the place of the first, and one true box."""
    width, height = size
    sides = torch.tensor([width, height] * 2)
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.1, 0.2, 0.5, 0.6], [0.7, 0.6, 0.9, 0.9]]) * sides
    truth = torch.tensor([[0.55, 0.1, 0.95, 0.5]]) * sides
    image = torch.full((3, height, width), 100, dtype=torch.uint8)
    picture = draw_detections(image, truth, boxes, torch.tensor([0.9, 0.6, 0.4]), torch.tensor([0, 1, 2]), NAMES)
    assert picture.shape == (3, *((400, 533) if size == (40, 30) else (height, width)))

    def pixel(x: float, y: float) -> list[int]:
        """At the share x of the width and y of the height, 1 px further on both."""
        return picture[:, int(y * picture.shape[1]) + 1, int(x * picture.shape[2]) + 1].tolist()

    red, green = [255, 38, 38], pixel(0.7, 0.8)
    assert pixel(0.1, 0.5) == pixel(0.45, 0.2) == red  # left and upper side, of the best detection
    assert green != red and pixel(0.88, 0.6) == green
    assert pixel(0.55, 0.3) == pixel(0.75, 0.1) == [255, 255, 255]
    assert pixel(0.3, 0.5) == pixel(0.8, 0.8) == pixel(0.75, 0.3) == [100] * 3  # nothing inside


def test_captions_are_in_a_font_that_has_the_name_or_numbers(tmp_path, monkeypatch):
    """Here the machine has one font more than matplotlib's first, and one that is broken."""
    stix = Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [str(tmp_path / "broken.ttf"), str(stix)])
    fonts_of.cache_clear()
    names = ["cat", "\u1d81", "\U0001f6b2", "two\nlines"]  # d with palatal hook: not in DejaVu Sans
    fonts = {name: Path(file).name for name, file in fonts_of(tuple(names)).items()}
    assert fonts == {"cat": "DejaVuSans.ttf", "\u1d81": "STIXGeneral.ttf"}
    x = torch.tensor([20.0, 100, 180, 260])
    boxes = torch.stack([x, torch.full((4,), 60.0), x + 70, torch.full((4,), 90.0)], 1)
    arguments = torch.zeros(3, 400, 500, dtype=torch.uint8), NONE_TRUE, boxes, torch.full((4,), 0.5), torch.arange(4)
    drawn = draw_detections(*arguments, names)
    assert torch.equal(drawn, draw_detections(*arguments, [*names[:2], "#2", r"two\nlines"]))
    assert not torch.equal(drawn, draw_detections(*arguments, ["cat", *(f"#{c}" for c in range(1, 4))]))
    fonts_of.cache_clear()


def test_curves_show_the_numbers_of_the_log(tmp_path, figures):
    log = [
        {"step": 10, "loss": 3.0, "cls": 1.5, "box": 1.0, "iou": 0.5, "positives_per_gt": 4.0, "mean_k": 5.0},
        {"step": 20, "AP": 0.25, "AP50": 0.5, "AP75": 0.125},
        {"step": 20, "loss": 2.0, "cls": 1.0, "box": 0.75, "iou": 0.25, "positives_per_gt": 6.0, "mean_k": 7.0},
    ]
    draw_curves(log, tmp_path / "curves.png")
    (figure,) = figures
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = [{line.get_label(): line.get_xydata().tolist() for line in axis.lines} for axis in figure.axes]
    assert drawn == [
        {"loss": [[10, 3], [20, 2]], "cls": [[10, 1.5], [20, 1]], "box": [[10, 1], [20, 0.75]],
         "iou": [[10, 0.5], [20, 0.25]]},
        {"AP": [[20, 0.25]], "AP50": [[20, 0.5]], "AP75": [[20, 0.125]]},
        {"positives_per_gt": [[10, 4], [20, 6]], "mean_k": [[10, 5], [20, 7]]},
    ]  # fmt: skip
