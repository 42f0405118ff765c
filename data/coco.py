"""COCO's form: one JSON file with the lists images, annotations and categories."""

import json
import re

from data.files import DatasetError, json_text, parse_json
from data.split import Split

# Most of a large file, and not needed; parsing these numbers takes twice the time of the rest.
POLYGONS = re.compile(r'"segmentation"\s*:\s*\[(?:[^][{}"]|\[[^][{}"]*\])*\]')


def read_coco(split: Split, digest, look_at_files: bool) -> object:
    """Return the content of the file, without polygons. Raises DatasetError."""
    try:
        content = split.annotations.read_bytes()
        digest.update(content)
        text, size = json_text(content), len(content)
        del content
        try:
            return parse_json(POLYGONS.sub('"segmentation":[]', text))
        except ValueError:
            return parse_json(text)  # for an error at its place in the file
    except ValueError as error:
        cut = isinstance(error.__cause__, json.JSONDecodeError)
        remark = f". The file has {size} bytes; is it whole?" if cut else ""
        raise DatasetError(f"{split.annotations}: {error}{remark}") from error
    except OSError as error:
        raise DatasetError(f"{split.annotations}: cannot be read: {error}") from error
