"""Degradations, pairs, crops and the held-out part."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

import sharpen_kd as kd

X2 = kd.PROTOCOLS["x2"]
BICUBIC = Image.Resampling.BICUBIC


def save(path, size=(24, 16), value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def compressed(picture, quality):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


# --- Degradations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "small"), [(2, (15, 10)), (3, (10, 7)), (4, (8, 5))])
def test_a_protocol_shrinks_and_enlarges_bicubically(photographs, scale, small):
    image = photographs["coffee"].crop((10, 10, 41, 31))  # 31x21, which is cut to 30x20
    sharp = kd.even_sized(image)
    expected = image.crop((0, 0, 30, 20))
    assert np.array_equal(sharp, expected)
    blurred = kd.degrade(sharp, kd.PROTOCOLS[f"x{scale}"])
    by_hand = expected.resize(small, BICUBIC).resize((30, 20), BICUBIC)
    assert np.array_equal(blurred, by_hand)


def test_a_thin_picture_keeps_a_pixel():
    thin = Image.new("RGB", (40, 1), (10, 20, 30))
    assert np.array_equal(kd.degrade(thin, kd.PROTOCOLS["x4"]), thin)


def test_steps_follow_one_another(photographs):
    sharp = photographs["coffee"].crop((0, 0, 80, 64))

    blurred = sharp.filter(ImageFilter.GaussianBlur(1.5)).resize((27, 21), BICUBIC)
    enlarged = blurred.resize((80, 64), BICUBIC)
    steps = (kd.GaussianBlur(1.5), kd.Shrink(3), kd.Enlarge())
    assert np.array_equal(kd.degrade(sharp, steps), enlarged)

    small = compressed(sharp.resize((40, 32), BICUBIC), 40)
    steps = (kd.Shrink(2), kd.Jpeg(40), kd.Enlarge())
    assert np.array_equal(kd.degrade(sharp, steps), small.resize((80, 64), BICUBIC))

    late = compressed(kd.degrade(sharp, X2), 50)
    assert np.array_equal(kd.degrade(sharp, kd.PROTOCOLS["x2-jpeg50"]), late)

    assert np.array_equal(kd.degrade(sharp, kd.PROTOCOLS["sharp"]), sharp)


def test_one_purpose_does_not_shift_the_draws_of_another():
    alone = kd.generator((3, 1, 4), "a").random(5)
    busy = kd.generator((3, 1, 4), "b")
    before = busy.random(1000)
    assert np.array_equal(kd.generator((3, 1, 4), "a").random(5), alone)
    assert not np.array_equal(before[:5], alone)
    assert not np.array_equal(kd.generator((3, 1, 5), "a").random(5), alone)
    assert not np.array_equal(kd.generator((3, 2, 4), "a").random(5), alone)


@pytest.mark.parametrize("purpose", ["shrink", "blur", "jpeg"])
def test_a_damage_of_the_mixture_is_drawn_apart_from_the_others(monkeypatch, purpose):
    """Other draws for one kind of damage leave the other kinds as they were."""
    kinds = {"shrink": kd.Shrink, "blur": kd.GaussianBlur, "jpeg": kd.Jpeg}
    keys = [(7, index) for index in range(200)]

    def of_the_other_kinds(degradation):
        return [step for step in degradation if type(step) is not kinds[purpose]]

    def of_this_kind(degradation):
        return [step for step in degradation if type(step) is kinds[purpose]]

    usual = [kd.draw_mixture(key) for key in keys]
    generator = kd.generator
    monkeypatch.setattr(
        kd, "generator", lambda key, name: generator((*key, 1) if name == purpose else key, name)
    )
    redrawn = [kd.draw_mixture(key) for key in keys]

    # JPEG may be before or after enlarging: the order of steps is no draw of another kind.
    assert [sorted(map(str, of_the_other_kinds(d))) for d in redrawn] == [
        sorted(map(str, of_the_other_kinds(d))) for d in usual
    ]
    assert [of_this_kind(d) for d in redrawn] != [of_this_kind(d) for d in usual]


@pytest.fixture(scope="module")
def mixture():
    """Many degradations of the mixture, and those among them that do something."""
    drawn = [kd.draw_mixture((0, index)) for index in range(10_000)]
    return drawn, [degradation for degradation in drawn if degradation]


def step_of(kind, degradation):
    """The step of this kind; None without."""
    for step in degradation:
        if isinstance(step, kind):
            return step
    return None


def share(values):
    return np.mean([bool(value) for value in values])


def test_the_mixture_has_the_shares_that_it_promises(mixture):
    drawn, damaged = mixture
    alone = {kd.Jpeg: 0.22, kd.Noise: 0.04, kd.MotionBlur: 0.04}
    for kind, promised in alone.items():
        only = share(len(d) == 1 and isinstance(d[0], kind) for d in drawn)
        assert only == pytest.approx(promised, abs=0.01)
    assert share(degradation == () for degradation in drawn) == pytest.approx(0.08, abs=0.01)

    shrunk = [degradation for degradation in damaged if step_of(kd.Shrink, degradation)]
    blurs = [step_of(kd.GaussianBlur, degradation) for degradation in shrunk]
    jpegs = [step_of(kd.Jpeg, degradation) for degradation in shrunk]
    factors = [step_of(kd.Shrink, degradation).factor for degradation in shrunk]
    assert share(factor == 2 for factor in factors) == pytest.approx(2 / 3, abs=0.02)
    assert share(blurs) == pytest.approx(0.1, abs=0.01)
    assert share(jpegs) == pytest.approx(0.2, abs=0.015)
    filters = [step_of(kd.Enlarge, degradation).filter for degradation in shrunk]
    assert share(f == "bilinear" for f in filters) == pytest.approx(0.12, abs=0.015)
    assert share(f == "nearest" for f in filters) == pytest.approx(0.08, abs=0.01)

    compressed_ones = [degradation for degradation in shrunk if step_of(kd.Jpeg, degradation)]
    early = share(isinstance(degradation[-1], kd.Enlarge) for degradation in compressed_ones)
    assert early == pytest.approx(0.5, abs=0.04)


def test_the_mixture_draws_from_the_whole_of_its_ranges(mixture):
    _, damaged = mixture

    def values(kind, name):
        steps = [step_of(kind, degradation) for degradation in damaged]
        return [getattr(step, name) for step in steps if step]

    others = [factor for factor in values(kd.Shrink, "factor") if factor != 2]
    assert 1.2 <= min(others) < 1.22
    assert 3.98 < max(others) <= 4
    assert np.mean(others) == pytest.approx(2.6, abs=0.06)

    sigmas = values(kd.GaussianBlur, "sigma")
    assert 0.3 <= min(sigmas) < 0.32
    assert 1.18 < max(sigmas) <= 1.2

    assert set(values(kd.Jpeg, "quality")) == set(range(15, 96))
    assert set(values(kd.MotionBlur, "length")) == {5, 7, 9, 11, 13, 15}
    noise = values(kd.Noise, "sigma")
    assert 1 <= min(noise) < 1.1
    assert 7.9 < max(noise) <= 8


def test_the_mixture_blurs_first_and_compresses_small_or_large_pictures(mixture):
    _, damaged = mixture
    orders = {tuple(type(step).__name__ for step in degradation) for degradation in damaged}
    assert orders == {
        ("Jpeg",),
        ("Noise",),
        ("MotionBlur",),
        ("Shrink", "Enlarge"),
        ("Shrink", "Jpeg", "Enlarge"),
        ("Shrink", "Enlarge", "Jpeg"),
        ("GaussianBlur", "Shrink", "Enlarge"),
        ("GaussianBlur", "Shrink", "Jpeg", "Enlarge"),
        ("GaussianBlur", "Shrink", "Enlarge", "Jpeg"),
    }


def test_the_mixture_of_calls_has_the_shares_and_ranges_that_it_promises():
    calls = [kd.draw_call((0, index)) for index in range(4000)]
    for codec, promised in zip(kd.CODECS, (0.5, 0.25, 0.13, 0.12), strict=True):
        assert share(call.codec == codec for call in calls) == pytest.approx(promised, abs=0.02)
    assert share(call.factor == 1 for call in calls) == pytest.approx(0.25, abs=0.02)
    assert share(call.factor == 2 for call in calls) == pytest.approx(0.35, abs=0.02)
    assert all(1 <= call.factor <= 3 for call in calls)

    bits = [call.bits for call in calls]
    assert 0.03 <= min(bits) < 0.0301
    assert 0.398 < max(bits) <= 0.4
    assert np.median(bits) == pytest.approx((0.03 * 0.4) ** 0.5, rel=0.05)  # even in its logarithm


# --- Files ----------------------------------------------------------------------------------------


def test_hidden_files_are_left_out(tmp_path):
    shown = save(tmp_path / "folder/a.png")
    save(tmp_path / "folder/.b.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert kd.list_files(tmp_path) == [shown, tmp_path / "notes.txt"]
    assert kd.list_pictures(tmp_path) == [shown]


def test_a_folder_that_can_be_listed_but_not_entered_is_unreadable(tmp_path, monkeypatch):
    shown = save(tmp_path / "a.png")
    save(tmp_path / "closed/b.png")
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: "closed" not in str(p) and access(p, mode))
    unreadable = []
    assert kd.list_files(tmp_path, unreadable) == [shown]
    assert unreadable == [tmp_path / "closed"]
    with pytest.raises(kd.UserError, match="closed: cannot be read"):
        kd.list_files(tmp_path)


def test_a_folder_that_links_to_itself_is_entered_once(tmp_path):
    inside = save(tmp_path / "folder/a.png")
    (tmp_path / "folder/again").symlink_to(tmp_path / "folder", target_is_directory=True)
    assert kd.list_files(tmp_path / "folder") == [inside]


def test_of_two_links_to_a_folder_the_first_by_name_is_entered(tmp_path):
    save(tmp_path / "elsewhere/a.png")
    (tmp_path / "folder").mkdir()
    for name in ("c", "b", "d"):  # made in another order than that of their names
        (tmp_path / "folder" / name).symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert kd.list_files(tmp_path / "folder") == [tmp_path / "folder/b/a.png"]


def test_a_linked_folder_is_entered(tmp_path):
    save(tmp_path / "elsewhere/a.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert kd.list_files(tmp_path / "folder") == [tmp_path / "folder/link/a.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_no_picture(tmp_path):
    """Opening one waits for its writer, perhaps for ever."""
    picture = save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert kd.list_pictures(tmp_path) == [picture]
    assert [pair.sharp for pair in kd.find_sharp(tmp_path, X2)] == [picture]


# --- Pictures -------------------------------------------------------------------------------------

ALL_MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_to_tensor_takes_every_mode(mode):
    grey = np.tile(np.linspace(0, 255, 12).astype(np.uint8), (5, 1))
    expected = torch.from_numpy(grey / 255).float()
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    elif mode == "P":
        image = Image.fromarray(grey).convert("P")
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode, dither=Image.Dither.NONE)
    if mode == "1":
        expected = (expected >= 0.5).float()

    tensor = kd.CustomToTensor()(image)
    assert tensor.shape == (3, 5, 12)
    assert tensor.dtype == torch.float32
    tolerance = 0.03 if mode in ("CMYK", "YCbCr", "HSV") else 1e-6
    assert (tensor - expected).abs().max() < tolerance


def test_to_tensor_takes_arrays_and_refuses_others():
    to_tensor = kd.CustomToTensor()
    floats = np.full((4, 5), 0.3)
    assert torch.allclose(to_tensor(floats), torch.full((3, 4, 5), 0.3))
    sixteen_bits = np.full((4, 5, 1), 32768, np.uint16)
    assert torch.allclose(to_tensor(sixteen_bits), torch.tensor(32768 / 65535))
    assert to_tensor(np.ones((4, 5, 4), bool)).shape == (3, 4, 5)
    rgba = np.dstack([np.full((2, 2), value, np.uint8) for value in (0, 51, 255, 7)])
    assert torch.allclose(to_tensor(rgba)[:, 0, 0], torch.tensor([0, 0.2, 1]))
    grey_with_alpha = np.dstack([np.full((2, 2), value, np.uint8) for value in (51, 7)])
    assert torch.allclose(to_tensor(grey_with_alpha), torch.tensor(0.2))
    for wrong in (np.full((4, 5), 2.0), np.zeros((4, 5, 7)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match=r"picture has shape|pixels must be"):
            to_tensor(wrong)


def test_frames_are_rounded_to_8_bits():
    floats = np.array([[0.0, 0.4 / 255, 0.6 / 255, 99.4 / 255, 99.6 / 255, 1.0]])
    assert kd.frame_array(floats)[0, :, 0].tolist() == [0, 0, 1, 99, 100, 255]
    sixteen_bits = np.array([[0, 128, 129, 65535]], np.uint16)  # 257 are one of 8 bits
    assert kd.frame_array(sixteen_bits)[0, :, 0].tolist() == [0, 0, 1, 255]
    eight_bits = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(kd.frame_array(eight_bits), eight_bits)


# --- Pairs ----------------------------------------------------------------------------------------


def test_pairs_match_by_path_without_ending_and_suffix(tmp_path):
    save(tmp_path / "blurred/text/a_blurred.png")
    save(tmp_path / "sharp/text/a_sharp.jpg")
    save(tmp_path / "blurred/b_blur.png")
    save(tmp_path / "sharp/b.png")
    first, second = kd.find_pairs(tmp_path)
    assert (first.key, first.category) == ("b", "all")
    assert (second.key, second.category) == ("text/a", "text")
    assert second.sharp.name == "a_sharp.jpg"
    assert second.blurred.name == "a_blurred.png"


def test_the_category_is_the_first_folder(tmp_path):
    save(tmp_path / "people/faces/a.png")
    (pair,) = kd.find_sharp(tmp_path, X2)
    assert (pair.key, pair.category) == ("people/faces/a", "people")


def test_the_published_gopro_layout_is_read(tmp_path):
    for sequence in ("GOPR0372_07_00", "GOPR0372_07_01"):
        for side in ("blur", "blur_gamma", "sharp"):
            save(tmp_path / sequence / side / "000047.png")
    pairs = kd.find_pairs(tmp_path)
    assert [pair.key for pair in pairs] == ["GOPR0372_07_00/000047", "GOPR0372_07_01/000047"]
    assert all(pair.blurred.parent.name == "blur" for pair in pairs)


def test_a_folder_without_sides_is_all_sharp(tmp_path):
    save(tmp_path / "text/a_blur.png")
    save(tmp_path / "b.png")
    pairs = kd.find_sharp(tmp_path, X2)
    assert [pair.key for pair in pairs] == ["b", "text/a_blur"]
    assert [pair.blurred for pair in pairs] == [None, None]
    save(tmp_path / "b.jpg")
    with pytest.raises(kd.UserError, match=r"b\.(png|jpg) and .*b\.(png|jpg) are the sharp side"):
        kd.find_sharp(tmp_path, X2)


def test_of_pairs_the_sharp_side_is_taken(tmp_path):
    save(tmp_path / "blurred/a.png")
    sharp = save(tmp_path / "sharp/a.png")
    (pair,) = kd.find_sharp(tmp_path, X2)
    assert (pair.key, pair.sharp, pair.blurred) == ("a", sharp, None)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda root: save(root / "blurred/lonely.png"), "lonely.png has no sharp partner"),
        (lambda root: save(root / "sharp/lonely.png"), "lonely.png has no blurred partner"),
        (lambda root: save(root / "sharp/a.png", (20, 16)), "has another size than"),
        (lambda root: (root / "sharp/a.png").write_bytes(b"no picture"), "a.png is unreadable"),
        (lambda root: save(root / "sharp/a_sharp.png"), "are the sharp side of one pair"),
    ],
)
def test_nothing_is_dropped_silently(tmp_path, spoil, named):
    save(tmp_path / "blurred/a.png")
    save(tmp_path / "sharp/a.png")
    assert len(kd.find_pairs(tmp_path)) == 1
    spoil(tmp_path)
    with pytest.raises(kd.UserError, match=named):
        kd.find_pairs(tmp_path)


def test_what_sharpen_wrote_beside_its_inputs_is_neither_learned_from_nor_scored(tmp_path):
    for name in ("a", "a_sharpened", "a_before_after", "b_sharpened"):
        save(tmp_path / f"{name}.png")
    assert [pair.key for pair in kd.find_sharp(tmp_path, X2)] == ["a", "b_sharpened"]


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    for command in ("eval", "train"):
        flags = ["--data-root", str(tmp_path / "none"), "--run-dir", str(tmp_path / "run")]
        assert kd.main([command, *flags[: 2 if command == "eval" else 4]]) == 2
        assert f"--data-root {tmp_path}/none: no such folder" in capsys.readouterr().err


def test_sharp_pictures_without_blurred_ones_are_told_apart_from_nothing(tmp_path):
    with pytest.raises(kd.UserError, match=r"no blurred/sharp pairs; `prepare FOLDER` makes them"):
        kd.find_pairs(tmp_path)
    with pytest.raises(kd.UserError, match="no sharp pictures in this folder"):
        kd.find_sharp(tmp_path, X2)
    save(tmp_path / "a.png")
    with pytest.raises(kd.UserError, match=r"`--degradation mixed` take them"):
        kd.find_pairs(tmp_path)


def test_what_cannot_be_compared_is_named_when_it_is_read(tmp_path):
    save(tmp_path / "tiny.png", (7, 30))  # which is cut to 6
    with pytest.raises(kd.UserError, match=r"tiny\.png: SSIM needs"):
        kd.Pair("key", tmp_path / "tiny.png").load()
    Image.fromarray(np.full((20, 20), 1.5, np.float32)).save(tmp_path / "bright.tif")
    with pytest.raises(kd.UserError, match=r"bright\.tif: not a readable picture"):
        kd.Pair("key", tmp_path / "bright.tif").load()


def test_a_sharp_picture_is_degraded_when_it_is_read(tmp_path, photographs):
    crop = photographs["coffee"].crop((200, 150, 241, 190))
    crop.save(tmp_path / "a.png")
    for name in ("x2", "x3", "sharp"):
        (pair,) = kd.find_sharp(tmp_path, kd.PROTOCOLS[name])
        blurred, sharp = pair.load()
        assert np.array_equal(sharp, crop.crop((0, 0, 40, 40)))
        assert np.array_equal(blurred, kd.degrade(Image.fromarray(sharp), kd.PROTOCOLS[name]))


def test_embedded_pictures_come_from_the_wheel():
    pairs = kd.embedded_pairs()
    assert len(pairs) >= 10
    assert {pair.category for pair in pairs} == {"animals", "people", "nature", "text"}
    (coffee,) = [pair for pair in pairs if pair.key == "nature/coffee"]
    blurred, sharp = coffee.load()
    assert blurred.shape == sharp.shape == (400, 600, 3)
    assert 20 < kd.score(blurred, sharp)["psnr"] < 45


# --- The command prepare --------------------------------------------------------------------------


def prepare(sharp_folder, root, *flags):
    return kd.main(["prepare", str(sharp_folder), "--data-root", str(root), *flags])


def test_prepare_is_repeatable_and_keeps_categories(tmp_path, sharp_folder):
    def pictures(name, *flags):
        root = tmp_path / name
        assert prepare(sharp_folder, root, "--split", "test", *flags) == 0
        return {pair.key: pair.load()[0].tobytes() for pair in kd.find_pairs(root / "test")}

    flags = ("--scale", "2", "4", "--extra-blur", "1", "--seed", "3")
    first = pictures("a", *flags)
    assert {key.split("/")[0] for key in first} == {"photo", "text"}
    assert pictures("b", *flags) == first
    assert pictures("c").keys() == first.keys()
    assert pictures("d") != first


def test_prepare_writes_the_x2_pairs_of_the_sharp_pictures(sharp_folder, data_root):
    pairs = kd.find_pairs(data_root / "train")
    sharp_ones = kd.find_sharp(sharp_folder, X2)
    assert [pair.key for pair in pairs] == [pair.key for pair in sharp_ones]
    for pair, original in zip(pairs, sharp_ones, strict=True):
        assert np.array_equal(pair.load(), original.load())


def test_pictures_are_upright_as_they_are_read(tmp_path, photographs):
    """A photograph that its EXIF turns fits the upright picture that was made of it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees, clockwise
    upright = photographs["astronaut"].convert("RGB").resize((30, 40))
    for side in ("sharp", "blurred"):
        (tmp_path / side).mkdir()
    upright.rotate(90, expand=True).save(tmp_path / "sharp/a.png", exif=exif)
    upright.save(tmp_path / "blurred/a.png")
    (pair,) = kd.find_pairs(tmp_path)
    blurred, sharp = pair.load()
    assert np.array_equal(sharp, np.array(upright))
    assert np.array_equal(blurred, sharp)
    dataset = kd.GoProSharpeningDataset([pair], 8, degradation="x2")
    assert np.array_equal(dataset.images(0)[0], sharp)
    for ending in ("tif", "jpg"):  # the size in the header is the one that is read
        upright.rotate(90, expand=True).save(tmp_path / f"a.{ending}", exif=exif)
        assert kd.picture_size(tmp_path / f"a.{ending}") == (30, 40)
        assert kd.open_picture(tmp_path / f"a.{ending}").size == (30, 40)


def test_prepare_leaves_nothing_behind_when_a_picture_is_broken(tmp_path, capsys):
    save(tmp_path / "in/a.png")
    (tmp_path / "in/b.png").write_bytes(b"no picture")
    assert prepare(tmp_path / "in", tmp_path / "out") == 2
    assert "b.png" in capsys.readouterr().err
    assert not (tmp_path / "out/train").exists()


def test_prepare_turns_pictures_upright_and_keeps_what_else_is_there(tmp_path, photographs):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    (tmp_path / "in").mkdir()
    photographs["astronaut"].resize((40, 30)).save(tmp_path / "in/a.jpg", exif=exif)
    train = tmp_path / "out/train"
    train.mkdir(parents=True)
    (train / "notes.txt").write_text("kept")
    assert prepare(tmp_path / "in", tmp_path / "out") == 0
    assert (train / "notes.txt").read_text() == "kept"
    assert {Image.open(path).size for path in train.rglob("*.png")} == {(30, 40)}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("in_the_way", ["blurred", "sharp/notes.txt"])
def test_prepare_says_at_once_what_is_in_the_way(tmp_path, sharp_folder, capsys, in_the_way):
    place = tmp_path / "data/train" / in_the_way
    place.parent.mkdir(parents=True)
    place.write_text("mine")
    command = ["prepare", str(sharp_folder), "--data-root", str(tmp_path / "data")]
    assert kd.main(command) == 2
    assert "is in the way; remove it" in capsys.readouterr().err
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == [place]


def test_prepare_refuses_what_would_not_be_a_dataset(tmp_path, capsys):
    folder = tmp_path / "in"
    save(folder / "a.png")
    save(folder / "a_blur.png")  # which would be the blurred side of a's pair
    assert prepare(folder, tmp_path / "out") == 2
    named = f"{folder}/a.png and {folder}/a_blur.png would both become a; rename one"
    assert named in capsys.readouterr().err
    assert prepare(folder, folder) == 2
    assert f"--data-root {folder}: is in {folder}" in capsys.readouterr().err
    folder.rename(tmp_path / "train")  # which is where the pairs would go
    assert prepare(tmp_path / "train", tmp_path) == 2
    assert "train holds pictures; choose another --data-root" in capsys.readouterr().err
    assert not (tmp_path / "out/train").exists()


def test_prepare_leaves_nothing_where_a_picture_cannot_be_read(tmp_path, capsys):
    folder = tmp_path / "in"
    save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no picture")
    assert prepare(folder, tmp_path / "out") == 2
    assert "b.png: not a readable picture" in capsys.readouterr().err
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []


def test_extra_blur_blurs(tmp_path, sharp_folder):
    def detail(name, *flags):
        assert prepare(sharp_folder, tmp_path / name, *flags) == 0
        pairs = kd.find_pairs(tmp_path / name / "train")
        changes = [np.diff(pair.load()[0].astype(float), axis=1) for pair in pairs]
        return np.abs(changes).mean()

    assert detail("blurred", "--extra-blur", "3") < 0.9 * detail("plain")


# --- Crops ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def equal_pairs(data_root):
    """Pairs whose blurred picture is the sharp one, so that their crops show what is done to it."""
    pairs = kd.find_pairs(data_root / "train")
    return [kd.Pair(pair.key, pair.sharp, pair.sharp) for pair in pairs]


@pytest.fixture(scope="module")
def sharp_pairs(data_root):
    return kd.find_sharp(data_root / "train", X2)


def test_both_sides_of_a_crop_are_cut_and_flipped_alike(equal_pairs):
    dataset = kd.GoProSharpeningDataset(equal_pairs, 32, blur_probability=0.0)
    for epoch in range(5):
        crop = dataset[(epoch, 1)]
        assert crop["sharp"].shape == (3, 32, 32)
        assert torch.equal(crop["blurred"], crop["sharp"])


def test_crops_are_drawn_by_seed_epoch_and_index(equal_pairs):
    def sharp(seed, epoch, cache=False):
        dataset = kd.GoProSharpeningDataset(equal_pairs, 32, 0.0, seed, cache)
        return dataset[(epoch, 1)]["sharp"]

    assert torch.equal(sharp(5, 2), sharp(5, 2))
    assert torch.equal(sharp(5, 2), sharp(5, 2, cache=True))
    assert not torch.equal(sharp(5, 2), sharp(5, 1))
    assert not torch.equal(sharp(5, 2), sharp(6, 2))


@pytest.mark.parametrize("degradation", ["pairs", "mixed"])
def test_what_a_loader_takes_is_the_crops_in_8_bits(data_root, degradation):
    pairs = kd.find_pairs(data_root / "train")
    dataset = kd.GoProSharpeningDataset(pairs, 32, seed=5, degradation=degradation)
    items = [(0, 2), (3, 1), (3, 0)]
    (batch,) = DataLoader(dataset, batch_sampler=[items])
    assert list(batch) == ["blurred", "sharp"]
    for crops in batch.values():
        assert crops.dtype == torch.uint8
        assert crops.shape == (3, 32, 32, 3)
    for name, crops in kd.on_device(batch, torch.device("cpu")).items():
        assert crops.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(crops, torch.stack([dataset[item][name] for item in items]))


def test_each_side_of_a_crop_comes_from_its_own_file(data_root):
    pairs = kd.find_pairs(data_root / "train")
    dataset = kd.GoProSharpeningDataset(pairs, 96, blur_probability=0.0)  # as large as a picture
    for index, pair in enumerate(pairs):
        blurred, sharp = pair.load()
        assert not np.array_equal(blurred, sharp)
        crop = dataset.crop(0, index)
        if not np.array_equal(crop["sharp"], sharp):  # flipped
            blurred = blurred[:, ::-1]
            sharp = sharp[:, ::-1]
        assert np.array_equal(crop["sharp"], sharp)
        assert np.array_equal(crop["blurred"], blurred)


def test_half_of_the_crops_are_flipped(equal_pairs):
    dataset = kd.GoProSharpeningDataset(equal_pairs, 96, blur_probability=0.0)
    whole = equal_pairs[0].load()[1]
    flipped = 0
    for epoch in range(100):
        crop = dataset.crop(epoch, 0)["sharp"]
        if np.array_equal(crop, whole[:, ::-1]):
            flipped += 1
        else:
            assert np.array_equal(crop, whole)
    assert 35 <= flipped <= 65


def test_further_blur_touches_the_blurred_side_only(equal_pairs):
    always = kd.GoProSharpeningDataset(equal_pairs, 64, blur_probability=1.0)
    never = kd.GoProSharpeningDataset(equal_pairs, 64, blur_probability=0.0)
    differences = []
    for index in range(len(equal_pairs)):
        crop = always[(0, index)]
        assert torch.equal(crop["sharp"], never[(0, index)]["sharp"])
        assert crop["blurred"].std() <= crop["sharp"].std() + 1e-6
        differences.append((crop["blurred"] - crop["sharp"]).abs().max())
    assert max(differences) > 0.05


def test_the_blur_probability_is_the_share_of_crops_blurred_further(equal_pairs):
    dataset = kd.GoProSharpeningDataset(equal_pairs, 16, blur_probability=0.25, cache=True)
    crops = [dataset.crop(epoch, 0) for epoch in range(400)]
    blurred = share(not np.array_equal(crop["blurred"], crop["sharp"]) for crop in crops)
    assert blurred == pytest.approx(0.22, abs=0.06)  # sigmas near 0.1 change nothing


def test_further_blur_is_gaussian_with_sigmas_from_a_tenth_to_two(equal_pairs, monkeypatch):
    drawn = []

    def gaussian_blur(planes, size, sigma):
        drawn.append((size, sigma))
        return planes

    monkeypatch.setattr(kd.TF, "gaussian_blur", gaussian_blur)
    dataset = kd.GoProSharpeningDataset(equal_pairs, 16, blur_probability=1.0, cache=True)
    for epoch in range(300):
        dataset.crop(epoch, 0)
    sizes, sigmas = zip(*drawn, strict=True)
    assert set(sizes) == {3}
    assert 0.1 <= min(sigmas) < 0.15
    assert 1.95 < max(sigmas) <= 2.0


@pytest.mark.parametrize(
    ("degradation", "small"), [("x2", (16, 16)), ("x3", (11, 11)), ("x4", (8, 8))]
)
def test_a_protocol_degrades_the_sharp_crop(sharp_pairs, degradation, small):
    dataset = kd.GoProSharpeningDataset(sharp_pairs, 32, degradation=degradation)
    for index in range(3):
        crop = dataset.crop(0, index)
        sharp = Image.fromarray(crop["sharp"])
        by_hand = sharp.resize(small, BICUBIC).resize((32, 32), BICUBIC)
        assert np.array_equal(crop["blurred"], by_hand)


def test_mixed_crops_meet_the_mixture(sharp_pairs):
    dataset = kd.GoProSharpeningDataset(sharp_pairs, 64, seed=1, degradation="mixed")
    differences = []
    for epoch in range(60):
        crop = dataset.crop(epoch, 0)
        sharp = Image.fromarray(crop["sharp"])
        degradation = kd.draw_mixture((1, epoch, 0))
        assert np.array_equal(crop["blurred"], kd.degrade(sharp, degradation))
        differences.append(np.abs(crop["blurred"].astype(float) - crop["sharp"]).mean())
    assert 1 <= differences.count(0.0) <= 15  # 8 % untouched
    assert len(set(differences)) > 40


def test_mixed_crops_are_the_same_from_memory(sharp_pairs):
    read = kd.GoProSharpeningDataset(sharp_pairs, 64, seed=1, degradation="mixed")
    kept = kd.GoProSharpeningDataset(sharp_pairs, 64, seed=1, cache=True, degradation="mixed")
    first = read.crop(7, 0)
    second = kept.crop(7, 0)
    assert np.array_equal(first["blurred"], second["blurred"])
    assert np.array_equal(first["sharp"], second["sharp"])


@pytest.fixture
def noise_pairs(tmp_path):
    """(pairs, pixels) of one picture of noise, 24x16, in which every window is another."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    for side in ("blurred", "sharp"):
        (tmp_path / side).mkdir()
        Image.fromarray(pixels).save(tmp_path / side / "a.png")
    return kd.find_pairs(tmp_path), pixels


def test_small_pictures_are_enlarged_in_proportion(noise_pairs):
    pairs, _ = noise_pairs
    dataset = kd.GoProSharpeningDataset(pairs, 48, blur_probability=0.0)
    assert dataset.images(0)[0].shape == (48, 72, 3)
    assert all(image.shape == (3, 48, 48) for image in dataset[(0, 0)].values())


def test_crops_start_at_every_even_pixel(noise_pairs):
    pairs, pixels = noise_pairs
    dataset = kd.GoProSharpeningDataset(pairs, 8, blur_probability=0.0)
    places = {}
    for top in range(9):
        for left in range(17):
            window = pixels[top : top + 8, left : left + 8]
            places[window.tobytes()] = (top, left)
            places[window[:, ::-1].tobytes()] = (top, left)
    starts = {places[dataset.crop(epoch, 0)["sharp"].tobytes()] for epoch in range(400)}
    assert starts == {(top, left) for top in range(0, 9, 2) for left in range(0, 17, 2)}


# --- The held-out part ----------------------------------------------------------------------------


def test_hold_out_keeps_sequences_whole():
    sequences = [f"GOPR03{number}_07_00" for number in range(10, 16)]
    pairs = [kd.Pair(f"{name}/{i:06}", None) for name in sequences for i in range(20)]
    training, held_out = kd.hold_out(pairs, 0.1)
    assert len(training) == 100
    assert len(held_out) == 20
    (category,) = {pair.category for pair in held_out}
    assert category not in {pair.category for pair in training}


def test_hold_out_takes_nothing_for_a_share_of_0_and_leaves_one_to_train_on():
    pairs = [kd.Pair(name, None) for name in "abc"]
    assert kd.hold_out(pairs, 0.0) == (pairs, [])
    assert kd.hold_out(pairs[:1], 0.5) == (pairs[:1], [])
    training, held_out = kd.hold_out(pairs, 0.99)
    assert (len(training), len(held_out)) == (1, 2)


def test_hold_out_draws_what_it_always_drew():
    """Scores of runs compare only as long as they are of the same pictures."""
    _, held_out = kd.hold_out(kd.embedded_pairs(), 0.3)
    assert [pair.key for pair in held_out] == [
        "nature/coffee",
        "nature/brick",
        "animals/chelsea",
        "nature/gravel",
        "nature/grass",
    ]

    pairs = [kd.Pair(f"photo/{number:02}", None) for number in range(20)]
    training, held_out = kd.hold_out(pairs, 0.2)
    assert [pair.key for pair in held_out] == ["photo/04", "photo/19", "photo/06", "photo/02"]
    assert training == [pair for pair in pairs if pair not in held_out]
    assert kd.hold_out(pairs[::-1], 0.2)[1] == held_out


def test_the_demo_holds_out_a_face_and_a_page():
    training, held_out = kd.training_pairs(kd.TrainConfig(data_root=None))
    keys = [pair.key for pair in held_out]
    assert sorted(keys) == ["animals/chelsea", "nature/coffee", "people/astronaut", "text/page"]
    assert len(training) == len(kd.embedded_pairs()) - 4
    assert not set(keys) & {pair.key for pair in training}
    assert {pair.category for pair in training} == {pair.category for pair in held_out}


@pytest.mark.parametrize("embedded", [False, True])
def test_a_run_is_scored_at_the_degradation_that_it_trains_on(sharp_folder, embedded):
    """The mixture's is x2."""
    for name, expected in (("x3", "x3"), ("mixed", "x2")):
        data_root = None if embedded else sharp_folder
        config = kd.TrainConfig(data_root=data_root, degradation=name, validation_fraction=0.3)
        _, held_out = kd.training_pairs(config)
        assert len(held_out) >= 3
        assert all(pair.degradation == kd.PROTOCOLS[expected] for pair in held_out)


def test_a_split_is_a_folder_or_a_plain_folder_of_pictures(tmp_path):
    save(tmp_path / "plain/text/a.png")
    assert kd.split_folder(tmp_path / "plain", "train") == tmp_path / "plain"
    save(tmp_path / "dataset/test/a.png")
    assert kd.split_folder(tmp_path / "dataset", "test") == tmp_path / "dataset/test"
    assert kd.split_folder(tmp_path / "dataset", "train") == tmp_path / "dataset/train"
    with pytest.raises(kd.UserError, match="missing: no such folder"):
        kd.split_folder(tmp_path / "missing", "train")


def test_balanced_categories_are_equally_large():
    counts = {"a": 5, "b": 2, "c": 1}
    pairs = [kd.Pair(f"{name}/{i}", None) for name, count in counts.items() for i in range(count)]
    repeated = kd.balanced(pairs)
    assert [repeated.count(pair) for pair in pairs] == [1, 1, 1, 1, 1, 3, 2, 5]


def test_blurred_pictures_alone_are_not_taken_for_sharp_ones(tmp_path):
    save(tmp_path / "blurred/a.png")
    with pytest.raises(kd.UserError, match="no sharp pictures in this folder"):
        kd.find_sharp(tmp_path, kd.PROTOCOLS["x2"])


def test_what_an_interrupted_prepare_left_is_no_dataset(tmp_path):
    save(tmp_path / ".train.unfinished/sharp/a.png")
    assert kd.list_files(tmp_path) == []
    with pytest.raises(kd.UserError, match="no sharp pictures in this folder"):
        kd.find_sharp(kd.split_folder(tmp_path, "train"), kd.PROTOCOLS["x2"])


def test_every_crop_has_noise_of_its_own(tmp_path):
    save(tmp_path / "grey.png", (32, 32))
    pairs = kd.find_sharp(tmp_path, kd.PROTOCOLS["noise5"])
    dataset = kd.GoProSharpeningDataset(pairs, 32, degradation="noise5")
    first, second, again = (dataset.crop(epoch, 0)["blurred"] for epoch in (0, 1, 0))
    assert np.array_equal(first, again)
    assert (first == second).mean() < 0.2
    assert np.std(second.astype(float)) == pytest.approx(5, rel=0.1)


def test_a_repeated_picture_is_decoded_once(tmp_path, monkeypatch):
    save(tmp_path / "a.png", (32, 32))
    pairs = kd.find_sharp(tmp_path, kd.PROTOCOLS["x2"]) * 3
    opened = []
    open_picture = kd.open_picture
    monkeypatch.setattr(kd, "open_picture", lambda path: opened.append(path) or open_picture(path))
    dataset = kd.GoProSharpeningDataset(pairs, 16, cache=True, degradation="x2")
    assert [len(dataset.images(index)) for index in range(3)] == [1, 1, 1]
    assert len(opened) == 1
