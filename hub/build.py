"""Write kernels/ as a repository of the Hugging Face Kernels Hub: python hub/build.py FOLDER

FOLDER gets the card as README.md, and build/torch-{cpu,cuda,rocm} with the package and its metadata.json, as in
https://huggingface.co/docs/kernels/kernel-requirements. Nothing is uploaded.
"""

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
VERSION = 0  # the Hub's convention for a kernel whose interface may still change


def sha256(content: bytes) -> str:
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def write_repository(folder: Path) -> None:
    files = {path.name: sha256(path.read_bytes()) for path in sorted((ROOT / "kernels").glob("*.*"))}
    unique = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:7]
    for backend in ("cpu", "cuda", "rocm"):
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(ROOT / "kernels", variant, ignore=shutil.ignore_patterns("__pycache__"))
        metadata = {
            "name": "ota-triton",
            "id": f"_ota_triton_{backend}_{unique}",  # the client's name for the module, and for torch.ops
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": files},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2))
    shutil.copy(ROOT / "hub" / "card.md", folder / "README.md")


if __name__ == "__main__":
    write_repository(Path(sys.argv[1]))
