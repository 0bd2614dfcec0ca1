"""The frozen teacher: loading, taps, padding, what trains and what does not; its cache."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import sharpen_kd as kd
from Restormer.basicsr.models.archs.restormer_arch import Restormer

CPU = torch.device("cpu")
FLOAT32 = torch.autocast("cpu", enabled=False)
WIDTHS = {"e2": 5, "e4": 6, "b": 7}
X2 = kd.PROTOCOLS["x2"]


@pytest.fixture
def teacher(tiny_teacher):
    torch.manual_seed(0)
    return kd.RestormerTeacherWrapper(kd.load_restormer(tiny_teacher), WIDTHS)


# --- Weight files ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"dim": 8, "num_blocks": (1, 2, 1, 3), "num_refinement_blocks": 2, "heads": (1, 2, 2, 4)},
        {"dim": 16, "num_blocks": (1, 1, 1, 1), "ffn_expansion_factor": 2.0, "bias": True},
        {"dim": 16, "num_blocks": (1, 1, 1, 1), "LayerNorm_type": "BiasFree"},
        {"dim": 48, "num_blocks": (1, 1, 1, 1)},
    ],
)
def test_dimensions_are_read_from_the_weights(tmp_path, options):
    torch.manual_seed(0)
    network = Restormer(**options).eval()
    torch.save({"params": network.state_dict()}, tmp_path / "weights.pth")
    loaded = kd.load_restormer(tmp_path / "weights.pth")
    picture = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(picture), network(picture))


def test_a_stem_folds_the_picture_for_an_unchanged_restormer(tmp_path):
    torch.manual_seed(0)
    options = {"dim": 8, "num_blocks": (1,) * 4, "num_refinement_blocks": 1, "heads": (1,) * 4}
    inner = Restormer(12, 12, **options).eval()
    torch.save(inner.state_dict(), tmp_path / "folded.pth")
    restormer = kd.load_restormer(tmp_path / "folded.pth")
    picture = torch.rand(1, 3, 32, 48)
    planes = []
    for color in range(3):
        for row in range(2):
            for column in range(2):
                planes.append(picture[:, color, row::2, column::2])
    with torch.no_grad():
        output = restormer(picture)
        folded = inner(torch.stack(planes, dim=1))
        assert torch.equal(output[:, 1, 0::2, 1::2], folded[:, 5])  # green; 5 = 4 * 1 + 2 * 0 + 1
        padded = kd.RestormerTeacherWrapper(restormer)(picture[..., :21, :37])
    assert padded.shape == (1, 3, 21, 37)


def test_weights_that_do_not_fit_say_what_to_do(tmp_path, tiny_restormer):
    missing = tmp_path / "missing.pth"
    remedy = r"missing.pth: no such file; get motion_deblurring.pth from"
    with pytest.raises(kd.UserError, match=remedy):
        kd.load_restormer(missing)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(kd.UserError, match=r"text.pth: not a PyTorch weight file"):
        kd.load_restormer(tmp_path / "text.pth")

    state = tiny_restormer.state_dict()
    cut = dict(state)
    del cut["latent.0.attn.qkv.weight"]
    contents = {
        "other.pth": {"params": nn.Linear(2, 2).state_dict()},
        "cut.pth": cut,
        "more.pth": state | {"extra.weight": torch.zeros(1)},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(kd.UserError, match=f"{name}: not the weights of a Restormer"):
            kd.load_restormer(tmp_path / name)

    dual_pixel = Restormer(dim=8, num_blocks=(1,) * 4, inp_channels=6, dual_pixel_task=True)
    torch.save(dual_pixel.state_dict(), tmp_path / "dual.pth")
    with pytest.raises(kd.UserError, match="does not map RGB to RGB"):
        kd.load_restormer(tmp_path / "dual.pth")


# --- The frozen network ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 24), (13, 9), (1, 1), (3, 50)])
def test_any_size_is_restored_and_its_features_are_kept(teacher, size):
    picture = torch.rand(2, 3, *size)
    output = teacher(picture)
    features = teacher.project(teacher.tapped)
    assert output.shape == picture.shape
    rows = -(-size[0] // 8) * 8
    columns = -(-size[1] // 8) * 8
    assert features["e2"].shape == (2, 5, rows // 2, columns // 2)
    assert features["e4"].shape == (2, 6, rows // 4, columns // 4)
    assert features["b"].shape == (2, 7, rows // 8, columns // 8)


def test_taps_are_what_the_named_levels_give(teacher):
    picture = torch.rand(1, 3, 16, 24)
    teacher(picture)
    restormer = teacher.restormer
    with torch.no_grad():
        level1 = restormer.encoder_level1(restormer.patch_embed(picture))
        level2 = restormer.encoder_level2(restormer.down1_2(level1))
        level3 = restormer.encoder_level3(restormer.down2_3(level2))
        latent = restormer.latent(restormer.down3_4(level3))
    assert torch.allclose(teacher.tapped["e2"], level2, atol=1e-5)
    assert torch.allclose(teacher.tapped["e4"], level3, atol=1e-5)
    assert torch.allclose(teacher.tapped["b"], latent, atol=1e-5)


def test_padding_is_reflection_and_is_cut_off_again(teacher):
    picture = torch.rand(1, 3, 13, 21)
    padded = nn.functional.pad(picture, (0, 3, 0, 3), mode="reflect")
    with torch.no_grad():
        assert torch.equal(teacher(picture), teacher.restormer(padded)[..., :13, :21])


def test_a_narrow_picture_is_reflected_more_than_once():
    narrow = torch.arange(3.0).view(1, 1, 1, 3)
    padded = kd.pad_to_multiple(narrow, 8)
    assert padded.shape == (1, 1, 8, 8)
    assert padded[0, 0, 7].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]


def test_the_teacher_is_frozen_and_its_projections_train(teacher):
    teacher.train()
    assert not teacher.restormer.training
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    trained = {name: p for name, p in teacher.named_parameters() if p.requires_grad}
    assert trained.keys() == {f"proj_{tap}.{part}" for tap in WIDTHS for part in ("weight", "bias")}

    output = teacher(torch.rand(1, 3, 16, 16, requires_grad=True))
    assert not output.requires_grad
    features = teacher.project(teacher.tapped)
    optimiser = torch.optim.Adam(teacher.parameters(), 0.1)
    sum(each.square().mean() for each in features.values()).backward()
    optimiser.step()
    after = dict(teacher.named_parameters())
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == trained.keys()


def test_features_are_projected_in_float32(teacher):
    teacher(torch.rand(1, 3, 16, 16))
    halves = {name: features.half() for name, features in teacher.tapped.items()}
    expected = teacher.project(teacher.tapped)
    for name, features in teacher.project(halves).items():
        assert features.dtype == torch.float32
        assert torch.allclose(features, expected[name], atol=1e-2)


def test_a_teacher_restores_frames_to_the_nearest_8_bits(teacher, random_frame):
    frame = random_frame(19, 26)
    restored = kd.teacher_frames(teacher.restormer, CPU, "float32")(frame)
    exact = teacher(kd.CustomToTensor()(frame)[None])[0].permute(1, 2, 0) * 255
    assert restored.shape == frame.shape
    assert restored.dtype == np.uint8
    difference = np.abs(restored - exact.clamp(0, 255).numpy())
    assert difference.max() < 0.501
    assert difference.mean() > 0.1


def test_a_missing_tap_is_an_error(tiny_teacher):
    restormer = kd.load_restormer(tiny_teacher)
    del restormer.latent
    with pytest.raises(AttributeError, match="latent"):
        kd.RestormerTeacherWrapper(restormer, WIDTHS)


# --- The cache ------------------------------------------------------------------------------------


@pytest.fixture
def make_cache(tmp_path, data_root, teacher):
    """A function that opens or builds the cache of two pictures, with these settings of its crops.

    By default the crops are as large as the pictures.
    """

    def make(degradation="mixed", blur_probability=1.0, size=96, seed=4, autocast=FLOAT32):
        if degradation == "pairs":
            pairs = kd.find_pairs(data_root / "train")
        else:
            pairs = kd.find_sharp(data_root / "train", X2)
        dataset = kd.GoProSharpeningDataset(
            pairs[:2], size, blur_probability, seed, degradation=degradation
        )
        return kd.TeacherCache(tmp_path / "cache", dataset, teacher, 2, autocast)

    return make


def losses(teacher, batch) -> dict[str, float]:
    """Every teacher term of a fresh student on one batch."""
    torch.manual_seed(3)
    student = kd.StudentUNet(stem_stride=2, widths=(4, 5, 6, 6, 7))
    loss = kd.DistillationLoss({"reconstruction": 1.0, "feature": 1.0, "kl": 1.0, "output": 1.0})
    objective = kd.Objective(student, teacher, loss)
    return {name: term.item() for name, term in objective(batch, FLOAT32).items()}


def test_the_cache_gives_the_losses_of_the_online_teacher(make_cache, teacher):
    cache = make_cache()
    for epoch in range(3):
        crop = cache[(epoch, 1)]
        batch = kd.on_device({name: grid[None] for name, grid in crop.items()}, CPU)
        assert batch["e2"].shape == (1, 16, 48, 48)
        online = losses(teacher, {name: batch[name] for name in ("blurred", "sharp")})
        assert losses(teacher, batch) == pytest.approx(online, rel=1e-2, abs=5e-5)  # KL: 1e-3
        assert all(value > 0 for value in online.values())


def test_cached_crops_are_windows_of_the_whole_picture(make_cache):
    cache = make_cache()
    cache.dataset.image_size = 32
    places = {}
    for variant in range(2):
        maps = torch.load(cache.file(variant, 0), weights_only=True)
        for top in range(0, 65, 8):
            for left in range(0, 65, 8):
                window = maps["blurred"][top : top + 32, left : left + 32]
                deepest = maps["b"][top // 8 : top // 8 + 4, left // 8 : left // 8 + 4]
                places[window.numpy().tobytes()] = (variant, top, left, deepest)

    starts = set()
    variants = set()
    for epoch in range(40):
        crop = cache[(epoch, 0)]
        variant, top, left, deepest = places[crop["blurred"].numpy().tobytes()]
        assert torch.equal(crop["b"], deepest)
        starts.add((top, left))
        variants.add(variant)
    assert len(starts) > 15
    assert variants == {0, 1}


@pytest.mark.parametrize("degradation", ["mixed", "pairs"])
def test_variants_of_a_picture_differ(make_cache, degradation):
    cache = make_cache(degradation)
    for index in range(2):
        first = torch.load(cache.file(0, index), weights_only=True)
        second = torch.load(cache.file(1, index), weights_only=True)
        assert first.keys() == {"blurred", "sharp", "teacher_output", "e2", "e4", "b"}
        assert all(grid.dtype == torch.float16 for grid in first.values())
        for name in ("blurred", "teacher_output", "b"):
            assert not torch.equal(first[name], second[name])


def test_a_cache_is_used_again(make_cache):
    first = make_cache()
    files = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    assert len(files) == 2 * 2 + 1  # two variants of two pictures, and the key
    second = make_cache()
    assert torch.equal(first[(0, 0)]["b"], second[(0, 0)]["b"])
    assert files == {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}


def test_an_interrupted_cache_goes_on_where_it_stopped(make_cache, teacher, monkeypatch):
    write = kd.write_checkpoint
    left = [0]

    def write_those_left(content, path):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(content, path)

    def make_interrupted(after):
        left[0] = after
        with pytest.raises(KeyboardInterrupt):
            make_cache()

    monkeypatch.setattr(kd, "write_checkpoint", write_those_left)
    make_interrupted(after=2)
    with torch.no_grad():
        next(teacher.restormer.parameters()).add_(1e-3)
    make_interrupted(after=3)  # another teacher: the two files are made anew
    left[0] = 1
    cache = make_cache()
    files = sorted(path.name for path in cache.folder.iterdir())
    assert files == ["000000_0.pt", "000000_1.pt", "000001_0.pt", "000001_1.pt", "key"]


def test_runs_of_two_seeds_share_a_cache_and_take_other_crops(make_cache):
    def crops(seed):
        cache = make_cache(seed=seed)
        cache.dataset.image_size = 32
        return [cache[(epoch, 0)]["sharp"].numpy().tobytes() for epoch in range(8)]

    assert crops(1) == crops(1)
    assert crops(1) != crops(2)


def test_another_teachers_cache_is_refused(make_cache, teacher):
    make_cache()
    with torch.no_grad():
        next(teacher.restormer.parameters()).add_(1e-3)
    with pytest.raises(kd.UserError, match="another teacher's"):
        make_cache()


def test_a_cache_of_other_pictures_is_refused(make_cache, monkeypatch):
    make_cache()
    find_sharp = kd.find_sharp
    monkeypatch.setattr(kd, "find_sharp", lambda *arguments: find_sharp(*arguments)[::-1])
    with pytest.raises(kd.UserError, match="remove it or name another"):
        make_cache()


def test_a_cache_of_other_blurred_pictures_is_refused(make_cache, monkeypatch):
    make_cache("pairs")
    find_pairs = kd.find_pairs

    def unblurred(folder):
        return [dataclasses.replace(pair, blurred=pair.sharp) for pair in find_pairs(folder)]

    monkeypatch.setattr(kd, "find_pairs", unblurred)
    with pytest.raises(kd.UserError, match="remove it or name another"):
        make_cache("pairs")


def test_a_cache_for_crops_of_another_size_is_refused(make_cache):
    """Pictures that are smaller than a crop are enlarged to it."""
    make_cache(size=96)
    with pytest.raises(kd.UserError, match="remove it or name another"):
        make_cache(size=104)


def test_crops_that_do_not_fit_the_teachers_grid_are_refused(make_cache):
    with pytest.raises(kd.UserError, match=r"--image-size 50: the cache needs a multiple of 8"):
        make_cache(size=50)


def test_a_cache_of_another_precision_is_refused(make_cache):
    make_cache()
    with pytest.raises(kd.UserError, match="remove it or name another"):
        make_cache(autocast=torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize("content", [b"cut off", [1, 2], {"blurred": torch.zeros(4, 4, 3)}])
def test_a_damaged_file_of_the_cache_is_named(make_cache, content):
    cache = make_cache()
    for variant in range(2):
        if isinstance(content, bytes):
            cache.file(variant, 1).write_bytes(content)
        else:
            torch.save(content, cache.file(variant, 1))
    with pytest.raises(kd.UserError, match=r"000001_\d\.pt: damaged .*; remove --teacher-cache"):
        cache[(0, 1)]


def test_a_cache_of_another_degradation_is_refused(make_cache):
    make_cache("x2")
    make_cache("x2")
    for other in ("x3", "mixed", "pairs"):
        with pytest.raises(kd.UserError, match="other data's"):
            make_cache(other)


def test_a_cache_of_another_blur_probability_is_refused(make_cache):
    make_cache("pairs", 0.5)
    make_cache("pairs", 0.5)
    for other in (0.0, 1.0, 0.5 + 1e-6):  # the last blurs the same few crops
        with pytest.raises(kd.UserError, match="other data's"):
            make_cache("pairs", other)


def test_a_cache_of_another_mixture_is_refused(make_cache, monkeypatch):
    draw_mixture = kd.draw_mixture
    make_cache("mixed")
    monkeypatch.setattr(kd, "draw_mixture", lambda key: (*draw_mixture(key), kd.Jpeg(90)))
    with pytest.raises(kd.UserError, match="other data's"):
        make_cache("mixed")


def test_a_cache_of_the_same_protocol_made_otherwise_is_refused(make_cache, monkeypatch):
    make_cache("x2")
    monkeypatch.setitem(kd.PROTOCOLS, "x2", (kd.Shrink(2.1), kd.Enlarge()))
    with pytest.raises(kd.UserError, match="other data's"):
        make_cache("x2")


def test_training_reads_the_cache(data_root, tiny_teacher, tmp_path):
    cache = tmp_path / "cache"
    settings = {
        "--data-root": data_root,
        "--run-dir": tmp_path / "run",
        "--teacher-weights": tiny_teacher,
        "--teacher-cache": cache,
        "--max-steps": 2,
        "--stem-stride": 2,
        "--image-size": 32,
        "--lambda-perceptual": 0,
        "--workers": 0,
    }

    def train(*flags):
        command = ["train", "--widths", "4", "4", "4", "4", "4", *flags]
        for name, value in settings.items():
            command += [name, str(value)]
        return kd.main(command)

    def written():
        return {path: path.stat().st_mtime_ns for path in cache.iterdir()}

    assert train("--degradation", "mixed") == 0
    files = written()
    assert len(files) == 4 * 7 + 1  # four variants of the pictures not held out, and the key
    assert train("--degradation", "mixed", "--overwrite") == 0
    assert written() == files
    assert train("--degradation", "pairs", "--overwrite") == 2

    # Other seeds, and runs without a teacher term, take their crops from it too.
    settings |= {"--lambda-feature": 0, "--lambda-kl": 0, "--seed": 5}
    assert train("--degradation", "mixed", "--overwrite") == 0
    assert written() == files


def test_a_cache_of_pairs_degraded_otherwise_is_refused(tmp_path, data_root, tiny_teacher):
    teacher = kd.RestormerTeacherWrapper(kd.load_restormer(tiny_teacher))
    for protocol in ("x2", "x4"):
        pairs = kd.find_sharp(data_root / "train", kd.PROTOCOLS[protocol])[:1]
        dataset = kd.GoProSharpeningDataset(pairs, 96, blur_probability=0.0)
        arguments = (tmp_path / "cache", dataset, teacher, 1, FLOAT32)
        if protocol == "x2":
            kd.TeacherCache(*arguments)
        else:
            with pytest.raises(kd.UserError, match="another teacher's or other data's"):
                kd.TeacherCache(*arguments)
