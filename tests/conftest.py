"""Shared pictures and small networks. The pictures are those scikit-image carries in its wheel."""

import io
import os
import sys
import time
from pathlib import Path

# One thread, here and in the commands that tests start. Small networks gain nothing by two, and on
# a busy machine the two would wait for each other most of the time.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import sharpen_kd as kd  # noqa: E402

# No network, here and in commands that tests start: the module denies it where it is imported, and
# is imported by every Python process that finds one of its name at its start.
OFFLINE = str(ROOT / "tests/offline")
os.environ["PYTHONPATH"] = os.pathsep.join([OFFLINE, os.environ.get("PYTHONPATH", "")])
sys.path.insert(0, OFFLINE)
if not hasattr(sys.modules.get("sitecustomize"), "denied"):
    sys.modules.pop("sitecustomize", None)  # the system's own
import sitecustomize  # noqa: E402


@pytest.fixture(autouse=True)
def denied() -> list[str]:
    """The addresses that a test's process wanted; a test that expects some takes them out."""
    sitecustomize.denied.clear()
    yield sitecustomize.denied
    assert sitecustomize.denied == []


@pytest.fixture(scope="session")
def photographs() -> dict[str, Image.Image]:
    """A few of scikit-image's photographs and pages, by name."""
    wanted = ("astronaut", "coffee", "page", "camera")
    files = [pair.sharp for pair in kd.embedded_pairs() if pair.sharp.stem in wanted]
    return {file.stem: kd.open_picture(file) for file in files}


@pytest.fixture(scope="session")
def sharp_folder(tmp_path_factory, photographs) -> Path:
    """Eight small sharp crops in two categories."""
    folder = tmp_path_factory.mktemp("sharp")
    for category, name in (("photo", "astronaut"), ("text", "page")):
        (folder / category).mkdir()
        for number in range(4):
            left = 90 * number
            crop = photographs[name].convert("RGB").crop((left, 40, left + 96, 136))
            crop.save(folder / category / f"{name}_{number}.png")
    return folder


@pytest.fixture(scope="session")
def data_root(tmp_path_factory, sharp_folder) -> Path:
    """Both splits, as `prepare` writes them from `sharp_folder`."""
    root = tmp_path_factory.mktemp("dataset")
    for split in ("train", "test"):
        status = kd.main(["prepare", str(sharp_folder), "--split", split, "--data-root", str(root)])
        assert status == 0
    return root


@pytest.fixture(scope="session")
def tiny_restormer() -> kd.StemmedRestormer:
    torch.manual_seed(0)
    return kd.StemmedRestormer(
        dim=8, num_blocks=(1, 1, 1, 1), num_refinement_blocks=1, heads=(1, 1, 2, 2)
    )


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory, tiny_restormer) -> Path:
    """A weight file in the official layout."""
    path = tmp_path_factory.mktemp("teacher") / "tiny.pth"
    torch.save({"params": tiny_restormer.state_dict()}, path)
    return path


@pytest.fixture(scope="session")
def student_file(tmp_path_factory) -> Path:
    """A student whose gates and correction are far from their initial values, as a checkpoint."""
    torch.manual_seed(1)
    student = kd.StudentUNet(stem_stride=2, widths=(8, 12, 16, 16, 24))
    for module in student.modules():
        if isinstance(module, kd.SEBlock):
            torch.nn.init.normal_(module.excite.weight, std=1.0)
    torch.nn.init.normal_(student.output.weight, std=0.05)
    path = tmp_path_factory.mktemp("student") / "student.pth"
    torch.save({"network": student.config, "params": student.state_dict()}, path)
    return path


@pytest.fixture
def random_frame():
    """A function that makes a smooth random 8-bit RGB frame of a given size."""

    def make(height: int, width: int, seed: int = 0) -> np.ndarray:
        shape = (height // 4 + 2, width // 4 + 2, 3)
        small = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        image = Image.fromarray(small)
        return np.array(image.resize((width, height), Image.Resampling.BICUBIC))

    return make


@pytest.fixture(scope="session")
def screenshot_of():
    """A function that takes a screenshot (H, W, 3) of a page or a part of it.

    Now and then a busy Chromium is unable to, and able a moment later.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")

    def take(shown, attempts: int = 5) -> np.ndarray:
        try:
            png = shown.screenshot()
        except playwright.Error as error:
            if "Unable to capture screenshot" not in str(error) or attempts == 1:
                raise
            time.sleep(1)
            return take(shown, attempts - 1)
        return np.array(Image.open(io.BytesIO(png)).convert("RGB"))

    return take


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "endurance: takes minutes; run by `-m endurance` alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "endurance" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="takes minutes; `python -m pytest -m endurance` runs it")
    for item in items:
        if item.get_closest_marker("endurance"):
            item.add_marker(skip)
