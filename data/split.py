"""One half of a data set: its files, and the form that they are in."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.checks import Records, check_annotations
from data.files import DatasetError


class Form(NamedTuple):
    """A form of annotations.

    read      (split, digest, look_at_files) -> the content of a COCO file; feeds each file's bytes to the digest
    recipe    the name of its recipe in train.py, if it has one
    boxes     the kinds of boxes to choose from, the default first
    metrics   (annotations, results) -> numbers that evaluation reports beside COCO's
    """

    name: str
    read: Callable[["Split", "hashlib._Hash", bool], object]
    recipe: str | None = None
    boxes: tuple[str, ...] = ()
    metrics: Callable[[dict, list[dict]], dict[str, float]] | None = None


@dataclass(frozen=True)
class Split:
    """Where one half of a data set lies; `name` is "train" or "val", `box` one of the form's kinds of boxes.

    follow_links: read links to files outside the folders of images and annotations, instead of refusing them.
    """

    name: str
    annotations: Path
    images: Path
    form: Form
    box: str | None = None
    follow_links: bool = False

    def read(self, look_at_files: bool = True) -> Records:
        """Read and check the annotation files. Raises DatasetError.

        look_at_files: also check the headers of the image files.
        """
        if not self.images.is_dir():
            raise DatasetError(
                f"{self.annotations.absolute()} is there, but its image folder {self.images.absolute()} is not"
            )
        digest = hashlib.sha256()
        content = self.form.read(self, digest, look_at_files)
        records = check_annotations(content, self.images, self.annotations, look_at_files, self.follow_links)
        return records._replace(digest=digest.hexdigest())
