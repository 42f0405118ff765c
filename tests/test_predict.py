"""Python use of a trained detector, and predict.py: the same detections as the evaluation, files of every kind."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from pycocotools.coco import COCO
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

import predict as predict_script
from data import CocoDataset, eval_transform, find_splits, generate_shapes
from data.draw import draw_detections, fonts_of
from errors import UserError
from eval import detect_dataset
from images import ImageError, header_size, load_image, to_tensor
from model import Detections, Detector, DetectorConfig, load, save_weights
from predict import find_images, picture_paths

CPU = ("--device", "cpu")
NAMES, IDS = ["cat", "dog", "tuba"], [3, 5, 9]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with a detector that finds something everywhere."""
    torch.manual_seed(0)
    config = DetectorConfig(num_classes=3, backbone="test_resnet", channels=32, head_convs=1, image_size=(96, 128))
    detector = Detector(config)
    for parameter in detector.head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    path = tmp_path_factory.mktemp("weights") / "ota.safetensors"
    save_weights(path, detector, {"class_names": NAMES, "category_ids": IDS})
    return path


@pytest.fixture(scope="module")
def detector(weights):
    return load(weights)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Six generated images, two of them cut to other sizes."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    generate_shapes(root, train_images=1, val_images=6, size_px=128)
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    for record, size in zip(content["images"][:2], [(90, 128), (128, 70)], strict=True):
        image = Image.open(root / "val" / record["file_name"])
        image.crop((0, 0, *size)).save(root / "val" / record["file_name"], quality=95)
        record["width"], record["height"] = size
    content["categories"] = [{"id": i, "name": name} for i, name in zip(IDS, NAMES, strict=True)]
    content["annotations"] = []
    path.write_text(json.dumps(content))
    return root


def photo(path, size=(80, 60), seed=0, **options):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


def same(one: Detections, other: Detections) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True)) and one.names == other.names


def close(one: Detections, other: Detections) -> bool:
    """But for what a convolution rounds differently in a batch."""
    pairs = zip(one[:2], other[:2], (1e-3, 1e-5), strict=True)
    return one.names == other.names and all(torch.allclose(a, b, atol=atol, rtol=0) for a, b, atol in pairs)


def test_load_gives_a_detector_that_knows_its_classes(detector):
    assert not detector.training
    assert detector.class_names == NAMES and detector.category_ids == IDS


def test_detections_have_names_scores_and_boxes_inside_the_image(detector, tmp_path):
    found = detector.predict(str(photo(tmp_path / "a.png")))
    assert len(found.scores) > 5 and found.names == [NAMES[c] for c in found.labels.tolist()]
    assert found.boxes.shape == (len(found.scores), 4) and (found.scores.diff() <= 0).all()
    assert found.boxes.min() >= 0 and (found.boxes.amax(0) <= torch.tensor([80, 60, 80, 60]) + 1e-4).all()
    assert found.boxes[:, 2].max() > 70  # px of the image as given, not of the resized one
    best = detector.predict(tmp_path / "a.png", score=float(found.scores[2]))
    assert len(best.scores) == 3 and torch.equal(best.boxes, found.boxes[:3])


def test_an_image_in_any_form_gives_the_same(detector, tmp_path):
    path = photo(tmp_path / "a.png")
    pixels = np.asarray(Image.open(path))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    forms = [path, str(path), Image.open(path), pixels, pixels[:, ::-1][:, ::-1], tensor, tensor.contiguous()]
    wanted = detector.predict(path)
    assert all(same(detector.predict(form), wanted) for form in forms)
    assert all(close(found, wanted) for found in detector.predict(forms, batch_size=3))
    floats = detector.predict(tensor / 255)
    assert torch.equal(floats.labels[:5], wanted.labels[:5]) and (floats.boxes[:5] - wanted.boxes[:5]).abs().max() < 3
    assert detector.predict([]) == []


def test_images_beside_an_image_change_nothing(detector, tmp_path):
    sizes = [(80, 60), (60, 80), (80, 60), (128, 40), (81, 61)]
    paths = [photo(tmp_path / f"{i}.png", size, seed=i) for i, size in enumerate(sizes)]
    for together, path in zip(detector.predict(paths), paths, strict=True):
        assert close(together, detector.predict(path))


@pytest.mark.parametrize("form", ["path", "pil"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_honoured(detector, tmp_path, suffix, form):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = photo(tmp_path / f"a.{suffix}", exif=exif)
    found = detector.predict(path if form == "path" else Image.open(path))
    upright = load_image(path)
    assert upright.shape == (3, 80, 60) and same(found, detector.predict(upright))


TURNS = {  # EXIF orientation: from the pixels (H, W, 3) as stored to those displayed
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip
FORMATS = {
    "jpeg": {}, "mpo": {}, "png": {}, "webp": {}, "avif": {}, "tiff": {}, "tiff-lzw": {"compression": "tiff_lzw"},
    "tiff-jpeg": {"compression": "jpeg"}, "png-xmp": {},
}  # fmt: skip


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("name", FORMATS)
def test_size_and_pixels_in_every_orientation(tmp_path, name, orientation):
    """Nothing is turned twice, whether Pillow turns at loading, which it does with TIFF, or not."""
    kind = name.partition("-")[0].upper()
    if kind not in Image.registered_extensions().values() and kind != "MPO":
        pytest.skip(f"this Pillow writes no {kind}")
    stored = np.zeros((48, 96, 3), np.uint8)
    stored[:24, :48], stored[:24, 48:, 0], stored[24:, :48, 1] = 200, 250, 250
    exif, options = Image.Exif(), FORMATS[name]
    exif[0x0112] = orientation
    options = options | {"exif": exif}
    if name == "png-xmp":
        note = PngImagePlugin.PngInfo()
        note.add_itxt("XML:com.adobe.xmp", f'<x:xmpmeta tiff:Orientation="{orientation}"/>')
        options = {"pnginfo": note}
    path = tmp_path / "image"
    Image.fromarray(stored).save(path, kind, **options)
    with Image.open(path) as opened, Image.open(path) as loaded:
        loaded.load()
        tensors = load_image(path), to_tensor(opened), to_tensor(loaded)
    assert header_size(path) == (tensors[0].shape[2], tensors[0].shape[1])
    wanted = TURNS[orientation](stored).astype(int)
    for tensor in tensors:
        pixels = tensor.permute(1, 2, 0).numpy()
        assert pixels.shape == wanted.shape and np.abs(pixels - wanted).mean() < 15


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_modes_of_pil_images(mode):
    assert to_tensor(Image.new(mode, (5, 4))).shape == (3, 4, 5)


@pytest.mark.parametrize(
    ("image", "story"),
    [
        pytest.param(np.zeros((4, 5), np.uint8), r"image 0 must .* uint8 .*, not \(4, 5\) uint8", id="grey-array"),
        pytest.param(np.zeros((4, 5, 3)), r"\(4, 5, 3\) float64", id="float-array"),
        pytest.param(torch.zeros(1, 3, 4, 5), r"list\(batch\)", id="batch"),
        pytest.param(torch.zeros(4, 5, 3), r"\(3, H, W\)", id="hwc-tensor"),
        pytest.param(torch.zeros(3, 4, 5).long(), "uint8, or floating point.*int64", id="int64-tensor"),
        pytest.param(torch.full((3, 4, 5), 255.0), r"in 0\.\.1 .*, not torch.float32 from 255 to 255", id="float-255"),
        pytest.param(torch.full((3, 4, 5), -1.0), "without the normalisation.* from -1 to -1", id="float-normalised"),
        pytest.param(torch.full((3, 4, 5), torch.nan), "from nan to nan", id="float-nan"),
        pytest.param(torch.full((3, 4, 5), -torch.inf), "from -inf to -inf", id="float-inf"),
        pytest.param(torch.zeros(3, 0, 5), r"\(3, 0, 5\)", id="empty"),
        pytest.param(torch.zeros(3, 1, 2000, dtype=torch.uint8), "2000 x 1 px is too narrow", id="narrow"),
        pytest.param(Image.new("I;16", (4, 5)), "size=4x5.* cannot be read.*more than 8 bits", id="16-bit"),
        pytest.param("nowhere.jpg", "there is no image file nowhere.jpg", id="missing"),
        pytest.param(None, "image 0 must be a path.* not NoneType", id="none"),
    ],
)
def test_what_is_no_image_is_named(detector, image, story):
    with pytest.raises(ImageError, match=story):
        detector.predict(image)


def test_what_resizing_adds_to_0_to_1_is_taken():
    image = (torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    resized = resize(image, [53, 77], InterpolationMode.BICUBIC, antialias=False)
    assert resized.min() < -0.2 and resized.max() > 1.2 and torch.equal(to_tensor(resized), resized)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_tensors_given_to_the_detector_are_in_range(detector, training):
    targets = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    with pytest.raises(ImageError, match="image 1 must .* from -2 to -2"):
        copy.deepcopy(detector).train(training)([torch.zeros(3, 96, 96), torch.full((3, 96, 96), -2.0)], targets)


@pytest.mark.parametrize("settings", [{"batch_size": b} for b in (0, -1, 2.5, "8", None)]
                         + [{"score": s} for s in (float("nan"), "0.5", None)], ids=str)  # fmt: skip
@pytest.mark.parametrize("images", [[], torch.zeros(3, 64, 64)], ids=["none", "one"])
def test_settings_of_predict_are_checked(detector, images, settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"^{name} is .*, it must be an?"):
        detector.predict(images, **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["norm", "frozen-norm"])
def test_detector_of_another_float_type(detector, tmp_path, frozen, dtype):
    """Scores as in float32 up to the rounding of 16 bits; what comes out is float32."""
    other = Detector(replace(detector.config, frozen_norm=frozen)).eval()
    other.load_state_dict(detector.state_dict(), strict=False)
    path = photo(tmp_path / "a.png")
    found, wanted = other.to(dtype).predict(path), detector.predict(path)
    assert found.boxes.dtype == found.scores.dtype == torch.float32 and len(found.scores) > 5
    assert (found.scores[:5] - wanted.scores[:5]).abs().max() < (1e-5 if dtype == torch.float64 else 0.02)


def test_training_mode_predicts_nothing(detector):
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        copy.deepcopy(detector).train().predict(torch.zeros(3, 64, 64))


@pytest.mark.parametrize(
    ("name", "repo", "file"),
    [("hf://a/b", "a/b", "ota.safetensors"), ("hf://a/b/sub/best.safetensors", "a/b", "sub/best.safetensors")],
    ids=["default-file", "file"],
)  # fmt: skip
def test_weights_of_the_hub(weights, monkeypatch, name, repo, file):
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: asked.append(names) or str(weights))
    assert load(name).class_names == NAMES and asked == [(repo, file)]


def test_hub_that_cannot_be_reached_is_named(monkeypatch):
    def unreachable(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"no ota.safetensors for hf://user/repo .*no route\n.*connection"):
        load("hf://user/repo")
    with pytest.raises(UserError, match=r"for hf://repo \(hf://user/repo or"):
        load("hf://repo")


def test_names_that_do_not_fit_the_weights_are_refused(detector, tmp_path):
    save_weights(tmp_path / "a.safetensors", detector, {"class_names": ["cat"]})
    with pytest.raises(UserError, match="1 class_names for 3 classes"):
        load(tmp_path / "a.safetensors")


def test_predict_and_eval_give_the_same_detections(call, detector, shapes, tmp_path, weights, one_thread):
    dataset = CocoDataset(find_splits(str(shapes))[1], eval_transform(detector.config.image_size))
    wanted = detect_dataset(detector, dataset, batch_size=6, workers=0)
    call(predict_script, shapes / "val", "--weights", weights, "--score", 0, "--batch-size", 6, "--out", tmp_path, *CPU)
    found = json.loads((tmp_path / "detections.json").read_text())
    id_of = {image["file_name"]: image["id"] for image in dataset.images}
    for row in found:
        row["image_id"] = id_of[row.pop("file_name").rsplit("/", 1)[1]]
        assert row.pop("category_name") == NAMES[IDS.index(row["category_id"])]
    assert len(found) > 100 and found == wanted


def test_results_are_in_coco_format(call, weights, tmp_path):
    photo(tmp_path / "in" / "a.jpg")
    call(predict_script, tmp_path / "in", "--weights", weights, "--score", 0.3, "--out", tmp_path / "out", *CPU)
    truth = COCO()
    truth.dataset = {"images": [{"id": 1}], "annotations": [], "categories": [{"id": i} for i in IDS], "info": {}}
    truth.createIndex()
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert rows and min(row["score"] for row in rows) >= 0.3
    assert len(truth.loadRes(str(tmp_path / "out" / "detections.json")).anns) == len(rows)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_files_are_named_and_the_others_come_out(call, weights, tmp_path, capsys):
    folder = tmp_path / "in"
    for i in range(3):
        photo(folder / f"{i}.jpg", seed=i)
    (folder / "broken.jpg").write_bytes(b"no image")
    whole = photo(folder / "cut.png", (300, 200)).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (12_000, 12_000)).save(folder / "huge.png")
    Image.new("RGB", (2000, 1)).save(folder / "narrow.png")
    with pytest.raises(SystemExit, match="5 of 8 images could not be read") as stopped:
        call(predict_script, folder, folder / "nothing.jpg", "--weights", weights, "--out", tmp_path / "out", *CPU)
    assert isinstance(stopped.value.code, str)  # which is status 1, and the text on stderr
    said = capsys.readouterr()
    for name, why in (
        ("broken.jpg", "cannot identify"), ("cut.png", "truncated"), ("huge.png", "12000 x 12000 px is more"),
        ("narrow.png", "too narrow"), ("nothing.jpg", "there is no image file"),
    ):  # fmt: skip
        assert [line for line in said.err.splitlines() if name in line and why in line], (name, said.err)
    assert "3 pictures" in said.out
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"0.jpg", "1.jpg", "2.jpg", "detections.json"}


def test_folders_and_globs(tmp_path, monkeypatch):
    names = ["b.jpg", "a.PNG", "notes.txt", "sub/c.jpg", "odd[1].jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def found(*inputs):
        return [str(path) for path in find_images(list(inputs))]

    assert found(".") == ["a.PNG", "b.jpg", "odd[1].jpg"]
    assert found("**/*") == ["a.PNG", "b.jpg", "odd[1].jpg", "sub/c.jpg"]
    assert found("odd[1].jpg", "notes.txt", "missing.jpg") == ["odd[1].jpg", "notes.txt", "missing.jpg"]
    assert found("b.jpg", ".", str(tmp_path / "b.jpg")) == ["b.jpg", "a.PNG", "odd[1].jpg"]
    for nothing in ("empty", "*.bmp"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="no images in"):
            find_images([nothing])


def test_files_of_the_same_name_do_not_overwrite_one_another(tmp_path):
    names = ["x/a.jpg", "y/a.jpg", "y/A.JPG", "a.jpg", "z/b.jpg", "z/c.gif"]
    pictures = picture_paths([tmp_path / name for name in names], tmp_path / "out")
    wanted = ["a.jpg", "1-a.jpg", "2-A.JPG", "3-a.jpg", "b.jpg", "c.gif.png"]
    assert [str(path.relative_to(tmp_path / "out")) for path in pictures] == wanted
    with pytest.raises(UserError, match=r"b\.jpg would overwrite it"):
        picture_paths([tmp_path / "b.jpg"], tmp_path)


def test_pictures_stay_below_out(tmp_path, monkeypatch):
    """Whatever path names an image; no two get the same place."""
    for name in ("here/a.png", "there/a.png", "here/b.gif", "here/b.gif.png"):
        photo(tmp_path / name)
    monkeypatch.chdir(tmp_path / "here")
    found = predict_script.find_images(["a.png", "../there/a.png", "../here/a.png", "b.gif", "b.gif.png"])
    assert len(found) == 4
    pictures = predict_script.picture_paths(found, Path("out"))
    wanted = ["out/a.png", "out/1-a.png", "out/b.gif.png", "out/1-b.gif.png"]
    assert [str(path) for path in pictures] == wanted


def test_long_thin_image_has_a_picture_that_can_be_written(call, weights, tmp_path):
    photo(tmp_path / "in" / "thin.jpg", (4000, 60))
    call(predict_script, "--weights", weights, tmp_path / "in", "--out", tmp_path / "out", *CPU)
    with Image.open(tmp_path / "out" / "thin.jpg") as picture:
        assert picture.width == 4000


@pytest.mark.parametrize("size", [(40, 30), (500, 400), (3000, 2000)], ids=["small", "middle", "large"])
def test_boxes_and_captions_are_legible_at_any_size(size):
    width, height = size
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    found = {
        "boxes": torch.tensor([[0, 0, 0.5, 0.5], [0.7, 0.6, 1, 1]]) * torch.tensor([width, height, width, height]),
        "scores": torch.tensor([0.9, 0.4]), "labels": torch.tensor([0, 2]),
    }  # fmt: skip
    picture = draw_detections(image, torch.empty(0, 4), **found, class_names=NAMES)
    assert min(picture.shape[1:]) >= 400 and picture.shape[2] * height == picture.shape[1] * width or size == (40, 30)
    drawn = (picture.amax(0) > 0).float().mean()
    assert 0.01 < drawn < 0.2


def test_names_are_drawn_in_a_font_that_has_them_or_as_numbers(tmp_path, monkeypatch):
    """Here the machine has one font more than matplotlib's first, one that is broken and one that is gone."""
    stix = Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf")
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    machine = [str(tmp_path / "broken.ttf"), str(tmp_path / "gone.ttf"), str(stix)]
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: machine)
    fonts_of.cache_clear()
    names = ["cat", "\u1d81", "\U0001f6b2", "two\nlines", "\ud800"]  # d with palatal hook: not in DejaVu Sans
    fonts = fonts_of(tuple(names))
    assert [Path(fonts[name]).name if name in fonts else None for name in names] == [
        "DejaVuSans.ttf", "STIXGeneral.ttf", None, None, None
    ]  # fmt: skip
    found = {
        "boxes": torch.tensor([[20.0, 60, 90, 90]] * 5) + 80 * torch.arange(5)[:, None] * torch.tensor([1.0, 0] * 2)
    }
    found |= {"scores": torch.full((5,), 0.5), "labels": torch.arange(5)}
    arguments = torch.zeros(3, 400, 500, dtype=torch.uint8), torch.empty(0, 4), *found.values()
    drawn = draw_detections(*arguments, names)
    assert torch.equal(drawn, draw_detections(*arguments, [*names[:2], "#2", r"two\nlines", r"\ud800"]))
    assert not torch.equal(drawn, draw_detections(*arguments, ["cat", *(f"#{c}" for c in range(1, 5))]))
    fonts_of.cache_clear()


def test_ordinary_names_look_for_no_fonts(monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: pytest.fail("looked for fonts"))
    assert len(fonts_of(("person", "Größe", "велосипед"))) == 3


def test_nothing_found_leaves_the_picture_as_it_is():
    image = torch.randint(0, 256, (3, 400, 500), dtype=torch.uint8)
    none = {"boxes": torch.empty(0, 4), "scores": torch.empty(0), "labels": torch.empty(0, dtype=torch.int64)}
    assert torch.equal(draw_detections(image, torch.empty(0, 4), *none.values(), NAMES), image)
