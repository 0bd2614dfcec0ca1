"""Pairs, transforms, the xS protocol and the held-out part."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import sharpen_kd as kd


def save(path, size=(24, 16), value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def test_pairs_match_by_path_without_extension_and_suffix(tmp_path):
    save(tmp_path / "blurred/text/a_blurred.png")
    save(tmp_path / "sharp/text/a_sharp.jpg")
    save(tmp_path / "blurred/b_blur.png")
    save(tmp_path / "sharp/b.png")
    pairs = kd.find_pairs(tmp_path)
    assert [(p.key, p.category) for p in pairs] == [("b", "all"), ("text/a", "text")]
    assert pairs[1].sharp.name == "a_sharp.jpg"


def test_published_gopro_layout(tmp_path):
    for sequence in ("GOPR0372_07_00", "GOPR0372_07_01"):
        for side in ("blur", "blur_gamma", "sharp"):
            save(tmp_path / sequence / side / "000047.png")
    pairs = kd.find_pairs(tmp_path)
    assert [p.key for p in pairs] == ["GOPR0372_07_00/000047", "GOPR0372_07_01/000047"]
    assert all(p.blurred.parent.name == "blur" for p in pairs)


def test_a_folder_without_sides_is_all_sharp(tmp_path):
    save(tmp_path / "text/a_blur.png")
    save(tmp_path / "b.png")
    assert [(p.key, p.blurred) for p in kd.find_pairs(tmp_path, "x2")] == [("b", None), ("text/a_blur", None)]
    save(tmp_path / "b.jpg")
    with pytest.raises(kd.UserError, match=r"b\.png and .*b\.jpg are the sharp side|b\.jpg and .*b\.png are the sharp"):
        kd.find_pairs(tmp_path, "x2")


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


def test_what_cannot_be_compared_is_named_when_it_is_read(tmp_path):
    save(tmp_path / "tiny.png", (7, 30))  # which is cut to 6
    Image.fromarray(np.full((20, 20), 1.5, np.float32)).save(tmp_path / "bright.tif")
    for name, named in (("tiny.png", "tiny.png: SSIM needs"), ("bright.tif", "bright.tif: not a readable picture")):
        with pytest.raises(kd.UserError, match=named):
            kd.Pair("key", tmp_path / name).load()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
def test_to_tensor_takes_every_mode(mode):
    grey = np.tile(np.linspace(0, 255, 12).astype(np.uint8), (5, 1))
    image = Image.fromarray(grey)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    else:
        image = (image if mode == "P" else image.convert("RGB")).convert(mode, dither=Image.Dither.NONE)
    tensor = kd.CustomToTensor()(image)
    assert tensor.shape == (3, 5, 12)
    assert tensor.dtype == torch.float32
    expected = torch.from_numpy(grey / 255).float()
    if mode == "1":
        expected = (expected >= 0.5).float()
    assert (tensor - expected).abs().max() < (0.03 if mode in ("CMYK", "YCbCr", "HSV") else 1e-6)


def test_to_tensor_takes_arrays_and_refuses_others():
    to_tensor = kd.CustomToTensor()
    assert torch.allclose(to_tensor(np.full((4, 5), 0.3)), torch.full((3, 4, 5), 0.3))
    assert torch.allclose(to_tensor(np.full((4, 5, 1), 32768, np.uint16)), torch.tensor(32768 / 65535))
    assert to_tensor(np.ones((4, 5, 4), bool)).shape == (3, 4, 5)
    rgba = np.dstack([np.full((2, 2), v, np.uint8) for v in (0, 51, 255, 7)])
    assert torch.allclose(to_tensor(rgba)[:, 0, 0], torch.tensor([0, 0.2, 1]))
    for wrong in (np.full((4, 5), 2.0), np.zeros((4, 5, 7)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match=r"picture has shape|pixels must be"):
            to_tensor(wrong)


@pytest.mark.parametrize(("scale", "small"), [(2, (15, 10)), (3, (10, 7)), (4, (8, 5))])
def test_protocol(photographs, scale, small):
    image = photographs["coffee"].crop((10, 10, 41, 31))  # 31x21: cut to 30x20
    sharp = kd.even_sized(image)
    blurred = kd.PROTOCOLS[f"x{scale}"](sharp)
    expected = image.crop((0, 0, 30, 20))
    assert np.array_equal(sharp, expected)
    assert np.array_equal(blurred, expected.resize(small, Image.BICUBIC).resize((30, 20), Image.BICUBIC))


def test_prepare_is_repeatable_and_keeps_categories(tmp_path, sharp_folder, data_root):
    def run(root, *flags):
        arguments = [str(sharp_folder), "--split", "test", "--data-root", str(tmp_path / root), *flags]
        assert kd.main(["prepare", *arguments]) == 0
        return [(p.key, p.load()[0]) for p in kd.find_pairs(tmp_path / root / "test")]

    mixed = ("--scale", "2", "4", "--extra-blur", "1", "--seed", "3")
    first, second, plain = run("a", *mixed), run("b", *mixed), run("c")
    assert [key for key, _ in first] == [key for key, _ in second]
    assert {key.split("/")[0] for key, _ in first} == {"photo", "text"}
    assert all(np.array_equal(x, y) for (_, x), (_, y) in zip(first, second, strict=True))
    assert not all(np.array_equal(x, y) for (_, x), (_, y) in zip(first, plain, strict=True))


def test_prepare_leaves_nothing_behind_when_a_picture_is_broken(tmp_path, sharp_folder, capsys):
    broken = tmp_path / "in"
    save(broken / "a.png")
    (broken / "b.png").write_bytes(b"no picture")
    assert kd.main(["prepare", str(broken), "--data-root", str(tmp_path / "out")]) == 2
    assert "b.png" in capsys.readouterr().err
    assert not (tmp_path / "out/train").exists()


def test_prepare_turns_pictures_upright_and_refuses_what_would_not_be_a_dataset(tmp_path, photographs, capsys):
    exif, folder = Image.Exif(), tmp_path / "in"
    exif[0x0112] = 6  # rotate by 90 degrees
    folder.mkdir()
    photographs["astronaut"].resize((40, 30)).save(folder / "a.jpg", exif=exif)
    root = ("--data-root", str(tmp_path / "out"))
    (tmp_path / "out/train").mkdir(parents=True)
    (tmp_path / "out/train/notes.txt").write_text("kept")
    assert kd.main(["prepare", str(folder), *root]) == 0
    assert (tmp_path / "out/train/notes.txt").read_text() == "kept"
    assert {Image.open(path).size for path in (tmp_path / "out/train").rglob("*.png")} == {(30, 40)}
    assert not list(tmp_path.rglob(".*"))
    save(folder / "a_blur.png")  # which would be the blurred side of a's pair
    assert kd.main(["prepare", str(folder), "--split", "test", *root]) == 2
    assert "of one pair" in capsys.readouterr().err
    assert kd.main(["prepare", str(folder), "--data-root", str(folder)]) == 2
    assert f"--data-root {folder}: is in {folder}" in capsys.readouterr().err
    assert not (tmp_path / "out/test").exists()


def test_extra_blur_blurs(tmp_path, sharp_folder):
    def blurred(root, *flags):
        arguments = [str(sharp_folder), "--data-root", str(tmp_path / root), *flags]
        assert kd.main(["prepare", *arguments]) == 0
        return [p.load()[0].astype(float) for p in kd.find_pairs(tmp_path / root / "train")]

    def detail(image):
        return np.abs(np.diff(image, axis=1)).mean()

    plain, more = (list(map(detail, blurred(*flags))) for flags in (("a",), ("b", "--extra-blur", "3")))
    assert sum(more) < 0.9 * sum(plain)


def test_crops_share_their_geometry_and_are_drawn_by_seed_epoch_and_index(data_root):
    pairs = [kd.Pair(p.key, p.sharp, p.sharp) for p in kd.find_pairs(data_root / "train")]
    same = kd.GoProSharpeningDataset(pairs, 32, blur_probability=0.0, seed=5)
    for epoch in range(3):
        blurred, sharp = same[(epoch, 1)].values()
        assert blurred.shape == (3, 32, 32)
        assert torch.equal(blurred, sharp)
    assert torch.equal(
        same[(2, 1)]["sharp"], kd.GoProSharpeningDataset(pairs, 32, 0.0, seed=5, cache=True)[(2, 1)]["sharp"]
    )
    assert not torch.equal(same[(2, 1)]["sharp"], same[(1, 1)]["sharp"])
    assert not torch.equal(same[(2, 1)]["sharp"], kd.GoProSharpeningDataset(pairs, 32, 0.0, seed=6)[(2, 1)]["sharp"])


@pytest.mark.parametrize("degradation", ["pairs", "mixed"])
def test_what_a_loader_takes_is_the_crops_in_8_bits(data_root, degradation):
    pairs = kd.find_pairs(data_root / "train")
    dataset = kd.GoProSharpeningDataset(pairs, 32, seed=5, degradation=degradation)
    items = [(0, 2), (3, 1), (3, 0)]
    (batch,) = DataLoader(dataset, batch_sampler=[items])
    assert list(batch) == ["blurred", "sharp"]
    assert all(crops.dtype == torch.uint8 and crops.shape == (3, 32, 32, 3) for crops in batch.values())
    for name, crops in kd.on_device(batch, torch.device("cpu")).items():
        assert crops.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(crops, torch.stack([dataset[item][name] for item in items]))


def test_blur_touches_the_blurred_side_only(data_root):
    pairs = [kd.Pair(p.key, p.sharp, p.sharp) for p in kd.find_pairs(data_root / "train")]
    always = kd.GoProSharpeningDataset(pairs, 64, blur_probability=1.0)
    never = kd.GoProSharpeningDataset(pairs, 64, blur_probability=0.0)
    differences = []
    for index in range(len(pairs)):
        (blurred, sharp), untouched = always[(0, index)].values(), never[(0, index)]["sharp"]
        assert torch.equal(sharp, untouched)
        assert blurred.std() <= sharp.std() + 1e-6
        differences.append((blurred - sharp).abs().max())
    assert max(differences) > 0.05


def test_small_images_are_enlarged_and_large_ones_cropped_at_even_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    for side in ("blurred", "sharp"):
        (tmp_path / side).mkdir()
        Image.fromarray(pixels).save(tmp_path / side / "a.png")
    pairs = kd.find_pairs(tmp_path)
    dataset = kd.GoProSharpeningDataset(pairs, 48, blur_probability=0.0)
    assert dataset.images(0)[0].shape == (48, 72, 3)  # keeping its proportions
    assert all(image.shape == (3, 48, 48) for image in dataset[(0, 0)].values())
    dataset = kd.GoProSharpeningDataset(pairs, 8, blur_probability=0.0)
    starts = set()
    for epoch in range(30):
        crop = (dataset[(epoch, 0)]["sharp"] * 255).round().permute(1, 2, 0).numpy()
        either = (crop, crop[:, ::-1])
        places = [(y, x) for y in range(9) for x in range(17) for c in either if (pixels[y:, x:][:8, :8] == c).all()]
        assert len(places) == 1
        starts |= set(places)
    assert len(starts) > 15
    assert all(y % 2 == x % 2 == 0 for y, x in starts)


def test_mixed_crops_come_from_the_sharp_picture_alone(data_root, sharp_folder):
    pairs = kd.find_pairs(data_root / "train", "x2")
    assert [p.key for p in pairs] == [p.key for p in kd.find_pairs(sharp_folder, "x2")]
    assert all(p.blurred is None for p in pairs)
    dataset = kd.GoProSharpeningDataset(pairs, 64, seed=1, degradation="mixed")
    crops = [dataset[(epoch, 0)] for epoch in range(60)]
    differences = [float((c["blurred"] - c["sharp"]).abs().mean()) for c in crops]
    assert 1 <= differences.count(0.0) <= 15  # 8 % untouched
    assert len(set(differences)) > 40
    again = kd.GoProSharpeningDataset(pairs, 64, seed=1, degradation="mixed", cache=True)[(7, 0)]
    assert all(torch.equal(again[name], crops[7][name]) for name in again)


def test_the_mixture_holds_what_it_promises():
    rng = np.random.default_rng(0)
    drawn = [kd.Degradation.draw(rng) for _ in range(4000)]
    shares = {
        "untouched": [d == kd.Degradation(1) for d in drawn],
        "twice": [d.scale == 2 for d in drawn],
        "jpeg": [d.quality > 0 for d in drawn],
    }
    assert {name: round(float(np.mean(flags)), 1) for name, flags in shares.items()} == {
        "untouched": 0.1, "twice": 0.5, "jpeg": 0.2,
    }  # fmt: skip
    others = [d.scale for d in drawn if d.scale not in (1, 2)]
    assert 1.5 <= min(others) < 1.6
    assert 3.9 < max(others) <= 4
    assert {d.quality for d in drawn} == {0, *range(30, 96)}
    assert {d.early for d in drawn if d.quality} == {True, False}


def test_jpeg_before_and_after_enlarging(photographs):
    sharp = kd.even_sized(photographs["coffee"].crop((0, 0, 80, 64)))
    file = io.BytesIO()
    sharp.resize((40, 32), Image.BICUBIC).save(file, "JPEG", quality=40)
    early = Image.open(file).convert("RGB").resize((80, 64), Image.BICUBIC)
    assert np.array_equal(kd.Degradation(2, quality=40, early=True)(sharp), early)
    file = io.BytesIO()
    kd.PROTOCOLS["x2"](sharp).save(file, "JPEG", quality=50)
    assert np.array_equal(kd.PROTOCOLS["x2-jpeg50"](sharp), Image.open(file).convert("RGB"))
    assert np.array_equal(kd.PROTOCOLS["sharp"](sharp), sharp)


def test_hold_out_keeps_sequences_whole():
    keys = [f"GOPR03{s}_07_00/{i:06}" for s in range(10, 16) for i in range(20)]
    pairs = [kd.Pair(key, None) for key in keys]
    training, held = kd.hold_out(pairs, 0.1)
    assert len(training) + len(held) == len(pairs)
    assert len(held) == 20
    assert len({p.category for p in held}) == 1
    assert not {p.category for p in held} & {p.category for p in training}
    assert kd.hold_out(pairs, 0.1) == (training, held)
    assert kd.hold_out(pairs, 0.0) == (pairs, [])
    assert kd.hold_out(pairs[:1], 0.5) == (pairs[:1], [])


def test_balanced_categories_are_equally_large():
    pairs = [kd.Pair(f"{name}/{i}", None) for name, count in (("a", 5), ("b", 2), ("c", 1)) for i in range(count)]
    counts = [kd.balanced(pairs).count(pair) for pair in pairs]
    assert counts == [1, 1, 1, 1, 1, 3, 2, 5]


def test_embedded_pictures_come_from_the_wheel():
    pairs = kd.embedded_pairs()
    assert len(pairs) >= 10
    assert {"animals", "people", "nature", "text"} == {p.category for p in pairs}
    blurred, sharp = next(p for p in pairs if p.sharp.stem == "coffee").load()
    assert blurred.shape == sharp.shape == (400, 600, 3)
    assert 20 < kd.score(blurred, sharp)[0] < 45
