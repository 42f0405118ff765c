"""Without a GPU, Triton kernels run in Triton's interpreter. Fixtures that several files use."""

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.lib import NumpyVersion

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU, runs compiled kernels")
    if not torch.cuda.is_available():
        _refuse_broken_interpreter()
        _patch_once_per_launch()
        _leave_out_what_is_dropped()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="module")
def one_thread():
    """One thread: on tensors this small, several only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def poisoned_memory():
    """Make torch.empty give NaN and the largest integers, so that an output which is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def call() -> Callable[..., str]:
    """Return a function: call a script's main() in this process, on one thread; return what it printed."""

    def call(script: ModuleType, *args) -> str:
        argv, threads, precision = sys.argv, torch.get_num_threads(), torch.get_float32_matmul_precision()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        sys.argv = [f"{script.__name__}.py", *map(str, args)]
        torch.set_num_threads(1)
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                script.main()
        finally:
            sys.argv = argv
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            print(said.getvalue(), end="")  # for capsys, and beside a failure
        return said.getvalue()

    return call


@pytest.fixture
def figures(monkeypatch) -> list:
    """Every matplotlib figure that is written to a file during the test."""
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **more: (drawn.append(figure), save(figure, *args, **more))
    )
    return drawn


@pytest.fixture
def changed(tmp_path) -> Callable[..., Path]:
    """Return a function: generate a data set, change the content of its annotation files, return its folder."""

    def changed(change=lambda content: None) -> Path:
        from data import generate_shapes

        root = tmp_path / "set"
        generate_shapes(root, train_images=4, val_images=2, size_px=96)
        for path in (root / "annotations").glob("*.json"):
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        return root

    return changed


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """A data set of generated shapes: an epoch is 5 steps of 4 images, and one image is left over."""
    from data import generate_shapes

    root = tmp_path_factory.mktemp("shapes") / "shapes"
    generate_shapes(root, train_images=21, val_images=4, size_px=96)
    return root


@pytest.fixture(scope="session")
def exported(tmp_path_factory, call) -> Path:
    """A folder with weights of a detector that finds dozens of objects with scores far apart, many of them overlapping,
    in which docs/export.md's command for ONNX was run; it takes half a minute."""
    pytest.importorskip("onnxscript")
    import export
    from tests.support.detectors import EXPORT_FLAGS, save_lively_detector

    folder = tmp_path_factory.mktemp("exported")
    settings = {"channels": 16, "head_convs": 0, "image_size": (160, 256), "topk_per_level": 300}
    save_lively_detector(folder / "ota.safetensors", 0.1, 0.03, **settings)
    with contextlib.chdir(folder):
        call(export, *EXPORT_FLAGS)
    return folder


def _refuse_broken_interpreter() -> None:
    """Triton 3.6, with torch 2.11, makes integers of arrays with one element, which numpy 2.4 refuses."""
    with contextlib.suppress(ImportError):
        from triton import __version__ as triton

        if NumpyVersion(triton) < "3.7.0" and NumpyVersion(np.__version__) >= "2.4.0":
            remedy = 'pip install "numpy<2.4", or a newer torch'
            pytest.exit(f"Triton {triton} cannot interpret kernels with numpy {np.__version__}: {remedy}", 4)


def _patch_once_per_launch():
    """The interpreter patches triton.language anew at every call of a device function, half of its time in all."""
    try:
        from triton.runtime import interpreter

        patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    except (ImportError, AttributeError):
        return
    patched = set()

    def patch_once(fn):
        if fn.__module__ in patched:
            return None
        patched.add(fn.__module__)
        return patch(fn)

    def launch_afresh(executor, *args, **kwargs):
        patched.clear()
        return launch(executor, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


def _leave_out_what_is_dropped() -> None:
    """The interpreter computes whether integers overflow, a third of its time, and looks at that with debug=True only;
    and it writes down the table of types at every use.
    """
    try:
        from triton.runtime import interpreter

        builder, find = interpreter.interpreter_builder, interpreter._get_np_dtype
        if not builder.options.debug:
            builder.options = replace(builder.options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        return
    found = {}

    def find_once(dtype):
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = find_once
