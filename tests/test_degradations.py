"""The steps of degradations, each against Pillow or a value worked by hand."""

import io

import numpy as np
import pytest
from PIL import Image

import sharpen_kd as kd


@pytest.fixture
def sharp(photographs) -> Image.Image:
    return photographs["coffee"].convert("RGB").crop((100, 100, 180, 164))


@pytest.mark.parametrize("name", ["bilinear", "nearest"])
def test_other_windows_enlarge_in_other_ways(sharp, name):
    small = sharp.resize((40, 32), Image.Resampling.BICUBIC)
    expected = small.resize((80, 64), Image.Resampling[name.upper()])
    assert np.array_equal(kd.degrade(sharp, kd.PROTOCOLS[f"x2-{name}"]), expected)


def test_a_small_picture_may_be_compressed_before_it_is_enlarged(sharp):
    file = io.BytesIO()
    sharp.resize((40, 32), Image.Resampling.BICUBIC).save(file, "JPEG", quality=50)
    small = Image.open(file).convert("RGB")
    expected = small.resize((80, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(kd.degrade(sharp, kd.PROTOCOLS["jpeg50-x2"]), expected)


@pytest.mark.parametrize("quality", [15, 40, 75])
def test_compression_alone(sharp, quality):
    file = io.BytesIO()
    sharp.save(file, "JPEG", quality=quality)
    expected = Image.open(file).convert("RGB")
    assert np.array_equal(kd.degrade(sharp, kd.PROTOCOLS[f"jpeg{quality}"]), expected)


def test_a_factor_of_1_3_rounds_the_small_size(sharp):
    small = sharp.resize((62, 49), Image.Resampling.BICUBIC)  # 61.5 and 49.2
    expected = small.resize((80, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(kd.degrade(sharp, kd.PROTOCOLS["x1.3"]), expected)


def test_noise_has_its_sigma_and_is_the_same_each_time():
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    noisy = np.array(kd.degrade(grey, kd.PROTOCOLS["noise5"])).astype(float)
    assert noisy.std() == pytest.approx(5, rel=0.02)
    assert noisy.mean() == pytest.approx(128, abs=0.1)
    assert np.array_equal(noisy, kd.degrade(grey, kd.PROTOCOLS["noise5"]))
    other = np.array(kd.Noise(5, seed=1)(grey, grey.size))
    assert not np.array_equal(noisy, other)


def test_motion_blur_is_the_mean_of_nine_neighbours():
    row = np.zeros((1, 20, 3), np.uint8)
    row[0, 10] = 90
    blurred = np.array(kd.degrade(Image.fromarray(row), kd.PROTOCOLS["motion9"]))
    expected = [10 if 6 <= column <= 14 else 0 for column in range(20)]
    assert blurred[0, :, 0].tolist() == expected
    row[0, 0] = 90  # stands for the four that the picture lacks to its left
    blurred = np.array(kd.degrade(Image.fromarray(row), kd.PROTOCOLS["motion9"]))
    assert blurred[0, 0, 0] == 50
