"""Python use of a trained detector, and predict.py: the same detections as the evaluation, files of every kind."""

import copy
import importlib.util
import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

import predict as predict_script
from data import CocoDataset, eval_transform, find_splits, generate_shapes
from errors import UserError
from eval import detect_dataset
from model import Detections, load
from predict import find_images, picture_paths
from tests.support.detectors import IDS, NAMES, save_lively_detector

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_lively_detector(tmp_path_factory.mktemp("weights") / "ota.safetensors", 0.15, 0.15)


@pytest.fixture(scope="module")
def detector(weights):
    return load(weights)


def photo(path, size=(80, 60), seed=0, **options):
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


def close(one: Detections, other: Detections) -> bool:
    """Equal except for what a convolution rounds differently in a batch."""
    pairs = zip(one[:2], other[:2], (1e-3, 1e-5), strict=True)
    return one.names == other.names and all(torch.allclose(a, b, atol=atol, rtol=0) for a, b, atol in pairs)


def test_detections_have_names_scores_and_boxes_inside_the_image(detector, tmp_path):
    found = detector.predict(str(photo(tmp_path / "a.png")), score=0)
    assert len(found.scores) > 5 and found.names == [NAMES[c] for c in found.labels.tolist()]
    assert found.boxes.shape == (len(found.scores), 4) and (found.scores.diff() <= 0).all()
    assert found.boxes.min() >= 0 and (found.boxes.amax(0) <= torch.tensor([80, 60, 80, 60]) + 1e-4).all()
    assert found.boxes[:, 2].max() > 70  # px of the image as given, not of the resized one
    best = detector.predict(tmp_path / "a.png", score=float(found.scores[2]))
    assert len(best.scores) == 3 and torch.equal(best.boxes, found.boxes[:3])


def test_without_a_score_every_class_has_its_own(detector, tmp_path):
    path, other = photo(tmp_path / "a.png"), copy.deepcopy(detector)
    found = detector.predict(path, score=0)
    c = int(found.labels[0])
    other.cuts = [0.0 if label == c else 1.0 for label in range(len(NAMES))]
    assert torch.equal(other.predict(path).scores, found.scores[found.labels == c])
    assert other.predict(path, score=1).names == []
    assert torch.equal(detector.predict(path).scores, found.scores[found.scores >= 0.5])


def test_detections_of_supervision(detector, tmp_path):
    found = detector.predict(photo(tmp_path / "a.png"), score=0)
    if importlib.util.find_spec("supervision") is None:
        with pytest.raises(UserError, match="pip install supervision"):
            found.to_supervision()
        return
    theirs = found.to_supervision()
    assert theirs.data["class_name"].tolist() == found.names and theirs.class_id.tolist() == found.labels.tolist()
    assert np.array_equal(theirs.xyxy, found.boxes) and np.array_equal(theirs.confidence, found.scores)
    assert (
        len(found._replace(boxes=found.boxes[:0], scores=found.scores[:0], labels=found.labels[:0]).to_supervision())
        == 0
    )


def test_an_upright_image_in_any_form_gives_the_same(detector, tmp_path):
    """A file and a PIL image are turned upright by their EXIF orientation; images beside an image change nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path, others = photo(tmp_path / "a.png", exif=exif), [photo(tmp_path / "b.png", (128, 40), seed=1)]
    pixels = np.rot90(np.asarray(Image.open(path)), -1)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    wanted = detector.predict(path, score=0)
    assert pixels.shape == (80, 60, 3) and wanted.boxes[:, 3].max() > 70
    *found, other = detector.predict(
        [path, str(path), Image.open(path), pixels, tensor, *others], score=0, batch_size=4
    )
    assert all(close(one, wanted) for one in found) and close(other, detector.predict(others[0], score=0))
    with torch.no_grad():
        assert close(detector([tensor])[0], wanted)
    floats = detector.predict(tensor / 255, score=0)
    assert torch.equal(floats.labels[:5], wanted.labels[:5]) and (floats.boxes[:5] - wanted.boxes[:5]).abs().max() < 3
    assert detector.predict([]) == []


def test_settings_and_mode_of_predict_are_checked(detector):
    for name, value in (("batch_size", 0), ("batch_size", 2.5), ("score", float("nan")), ("score", "0.5")):
        with pytest.raises(ValueError, match=f"^{name} is {value!r}, it must be an?"):
            detector.predict([], **{name: value})
    with pytest.raises(RuntimeError, match=r"call eval\(\) first"):
        copy.deepcopy(detector).train().predict(torch.zeros(3, 64, 64))


def test_detector_of_another_float_type(detector, tmp_path):
    """Scores as in float32 up to the rounding of 16 bits; what comes out is float32."""
    path, other = photo(tmp_path / "a.png"), copy.deepcopy(detector).bfloat16()
    found, wanted = other.predict(path, score=0), detector.predict(path, score=0)
    assert found.boxes.dtype == found.scores.dtype == torch.float32 and len(found.scores) > 5
    assert (found.scores[:5] - wanted.scores[:5]).abs().max() < 0.02


def test_weights_of_the_hub(weights, monkeypatch):
    def download(*names: str) -> str:
        if names[0] != "a/b":
            raise ConnectionError("no route")
        asked.append(names)
        return str(weights)

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load("hf://a/b").class_names == load("hf://a/b/sub/best.safetensors").class_names == NAMES
    assert asked == [("a/b", "ota.safetensors"), ("a/b", "sub/best.safetensors")]
    with pytest.raises(UserError, match=r"no ota.safetensors for hf://a/gone .*no route\n.*connection"):
        load("hf://a/gone")
    with pytest.raises(UserError, match=r"for hf://repo \(hf://user/repo or"):
        load("hf://repo")


def test_predict_and_eval_give_the_same_detections(call, detector, tmp_path, weights, one_thread):
    """Of four generated images, two of them cut to other sizes."""
    root, out = tmp_path / "shapes", tmp_path / "out"
    generate_shapes(root, train_images=1, val_images=4, size_px=128)
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    for record, size in zip(content["images"][:2], [(90, 128), (67, 91)], strict=True):
        image = Image.open(root / "val" / record["file_name"])
        image.crop((0, 0, *size)).save(root / "val" / record["file_name"], quality=95)
        record["width"], record["height"] = size
    content["categories"] = [{"id": i, "name": name} for i, name in zip(IDS, NAMES, strict=True)]
    path.write_text(json.dumps(content | {"annotations": []}))
    dataset = CocoDataset(find_splits(str(root))[1], eval_transform(detector.config.image_size))
    wanted = detect_dataset(detector, dataset, batch_size=4, workers=0)
    assert min(row["score"] for row in wanted) < 0.3 < max(row["score"] for row in wanted)

    for score in (0, 0.3):
        call(predict_script, root / "val", "--weights", weights, "--score", score, "--out", out, *CPU)
        found = json.loads((out / "detections.json").read_text())
        for row in found:
            place = int(row["file_name"][-10:-4])  # 000001.jpg is the first
            assert row.pop("file_name") == str(root / "val" / dataset.images[place - 1]["file_name"])
            assert row["image_id"] == place and row.pop("category_name") == NAMES[IDS.index(row["category_id"])]
        assert found == [row for row in wanted if row["score"] >= score]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_files_are_named_and_the_others_come_out(call, weights, tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    photo(folder / "good.jpg")
    photo(folder / "thin.jpg", (1000, 15))
    (folder / "broken.jpg").write_bytes(b"no image")
    whole = photo(folder / "cut.png", (300, 200)).read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (12_000, 12_000)).save(folder / "huge.png")
    Image.new("RGB", (2000, 1)).save(folder / "narrow.png")
    with pytest.raises(SystemExit, match="5 of 7 images could not be read") as stopped:
        call(predict_script, folder, folder / "nothing.jpg", "--weights", weights, "--out", out, *CPU)
    assert isinstance(stopped.value.code, str)  # which is status 1, and the text on stderr
    lines = capsys.readouterr().err.splitlines()
    for name, why in (
        ("broken.jpg", "cannot identify"), ("cut.png", "truncated"), ("huge.png", "12000 x 12000 px is more"),
        ("narrow.png", "too narrow"), ("nothing.jpg", "there is no image file"),
    ):  # fmt: skip
        assert [line for line in lines if name in line and why in line], (name, lines)
    assert {path.name for path in out.iterdir()} == {"good.jpg", "thin.jpg", "detections.json"}

    with pytest.raises(UserError, match="cannot write to .*good.jpg/out: .*; name another folder with --out"):
        call(predict_script, out / "thin.jpg", "--weights", weights, "--out", folder / "good.jpg" / "out", *CPU)


def test_folders_and_globs(tmp_path, monkeypatch):
    for name in ("b.jpg", "a.PNG", "notes.txt", "._b.jpg", "d.avif", "sub/c.jpg", "odd[1].jpg", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for inputs, found in (
        ([".", "b.jpg"], ["a.PNG", "b.jpg", "d.avif", "odd[1].jpg"]),
        (["**/*"], ["a.PNG", "b.jpg", "d.avif", "odd[1].jpg", "sub/c.jpg"]),
        (["odd[1].jpg", "missing.jpg"], ["odd[1].jpg", "missing.jpg"]),
    ):
        assert [str(path) for path in find_images(inputs)] == found
    with pytest.raises(UserError, match="no images in empty, .*bmp"):
        find_images(["empty", "*.bmp"])


def test_pictures_stay_below_out_and_overwrite_nothing():
    names = ["x/a.jpg", "y/a.jpg", "y/A.JPG", "../z/b.jpg", "c.gif", "c.gif.png"]
    found = picture_paths(list(map(Path, names)), Path("out"))
    written = ["a.jpg", "1-a.jpg", "2-A.JPG", "b.jpg", "c.gif.png", "1-c.gif.png"]
    assert found == [Path("out", name) for name in written]
    with pytest.raises(UserError, match=r"b\.jpg would overwrite it"):
        picture_paths([Path("b.jpg")], Path())
