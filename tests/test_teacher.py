"""The frozen teacher: loading, taps, padding, what trains and what does not."""

import pytest
import torch
from torch import nn

import sharpen_kd as kd
from Restormer.basicsr.models.archs.restormer_arch import Restormer

WIDTHS = {"e2": 5, "e4": 6, "b": 7}


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
    inner = Restormer(12, 12, dim=8, num_blocks=(1,) * 4, num_refinement_blocks=1, heads=(1, 1, 1, 1)).eval()
    torch.save(inner.state_dict(), tmp_path / "folded.pth")
    restormer = kd.load_restormer(tmp_path / "folded.pth")
    picture = torch.rand(1, 3, 32, 48)
    folded = torch.cat([picture[:, c : c + 1, i::2, j::2] for c in range(3) for i in (0, 1) for j in (0, 1)], 1)
    with torch.no_grad():
        output, corner = restormer(picture), inner(folded)[:, 5]  # green, second row and second column: 1*4 + 1
        assert torch.equal(output[:, 1, 0::2, 1::2], corner)
        assert kd.RestormerTeacherWrapper(restormer)(picture[..., :21, :37]).shape == (1, 3, 21, 37)


def test_weights_that_do_not_fit_say_what_to_do(tmp_path, tiny_restormer):
    missing = tmp_path / "missing.pth"
    with pytest.raises(kd.UserError, match=r"missing.pth: no such file; get motion_deblurring.pth from"):
        kd.load_restormer(missing)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(kd.UserError, match=r"text.pth: not a PyTorch weight file"):
        kd.load_restormer(tmp_path / "text.pth")
    state = tiny_restormer.state_dict()
    for name, content in (
        ("other.pth", {"params": nn.Linear(2, 2).state_dict()}),
        ("cut.pth", {k: v for k, v in state.items() if k != "latent.0.attn.qkv.weight"}),
        ("more.pth", state | {"extra.weight": torch.zeros(1)}),
    ):
        torch.save(content, tmp_path / name)
        with pytest.raises(kd.UserError, match=f"{name}: not the weights of a Restormer"):
            kd.load_restormer(tmp_path / name)
    torch.save(Restormer(dim=8, num_blocks=(1,) * 4, inp_channels=6, dual_pixel_task=True).state_dict(), missing)
    with pytest.raises(kd.UserError, match="does not map RGB to RGB"):
        kd.load_restormer(missing)


@pytest.mark.parametrize("size", [(16, 24), (13, 9), (1, 1), (3, 50)])
def test_any_size_and_the_features_of_the_named_layers(tiny_teacher, size):
    teacher = kd.RestormerTeacherWrapper(kd.load_restormer(tiny_teacher), WIDTHS)
    picture = torch.rand(2, 3, *size)
    output = teacher(picture)
    features = teacher.project(teacher.tapped)
    assert output.shape == picture.shape
    rows, columns = (-(-side // 8) * 8 for side in size)
    assert features["e2"].shape == (2, 5, rows // 2, columns // 2)
    assert features["e4"].shape == (2, 6, rows // 4, columns // 4)
    assert features["b"].shape == (2, 7, rows // 8, columns // 8)


def test_padding_is_reflection_and_is_cut_off_again(tiny_teacher):
    teacher = kd.RestormerTeacherWrapper(kd.load_restormer(tiny_teacher))
    picture = torch.rand(1, 3, 13, 21)
    padded = nn.functional.pad(picture, (0, 3, 0, 3), mode="reflect")
    with torch.no_grad():
        assert torch.equal(teacher(picture), teacher.restormer(padded)[..., :13, :21])
    narrow = torch.arange(3.0).view(1, 1, 1, 3)
    assert kd.pad_to_multiple(narrow, 8)[0, 0, 7].tolist() == [0, 1, 2, 1, 0, 1, 2, 1]


def test_teacher_is_frozen_and_projections_train(tiny_teacher):
    teacher = kd.RestormerTeacherWrapper(kd.load_restormer(tiny_teacher), WIDTHS).train()
    assert not teacher.restormer.training
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    trainable = {name for name, p in teacher.named_parameters() if p.requires_grad}
    assert trainable == {f"proj_{tap}.{part}" for tap in WIDTHS for part in ("weight", "bias")}
    output = teacher(torch.rand(1, 3, 16, 16, requires_grad=True))
    features = teacher.project(teacher.tapped)
    assert not output.requires_grad
    optimiser = torch.optim.Adam([p for p in teacher.parameters() if p.requires_grad], 0.1)
    sum(f.square().mean() for f in features.values()).backward()
    optimiser.step()
    changed = {name for name, p in teacher.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trainable


def test_a_missing_tap_is_an_error(tiny_teacher):
    restormer = kd.load_restormer(tiny_teacher)
    del restormer.latent
    with pytest.raises(AttributeError, match="latent"):
        kd.RestormerTeacherWrapper(restormer, WIDTHS)


def losses(teacher, batch) -> dict[str, float]:
    """Every teacher term of a fresh student on one batch."""
    torch.manual_seed(3)
    student = kd.StudentUNet(stem_stride=2, widths=(4, 5, 6, 6, 7))
    terms = kd.DistillationLoss({"reconstruction": 1.0, "feature": 1.0, "kl": 1.0, "output": 1.0})
    objective = kd.Distillation(student, teacher, terms)
    return {name: term.item() for name, term in objective(batch, FLOAT32).items()}


FLOAT32 = torch.autocast("cpu", enabled=False)


@pytest.fixture
def cached(tmp_path, data_root, tiny_teacher):
    """(teacher, dataset, a function that makes their cache), for crops as large as the pictures."""
    pairs = kd.find_pairs(data_root / "train", "x2")[:2]
    torch.manual_seed(0)
    teacher = kd.RestormerTeacherWrapper(kd.load_restormer(tiny_teacher), {"e2": 5, "e4": 6, "b": 7})
    dataset = kd.GoProSharpeningDataset(pairs, 96, seed=4, degradation="mixed")
    return teacher, dataset, lambda: kd.TeacherCache(tmp_path / "cache", dataset, teacher, 2, FLOAT32)


def test_the_cache_gives_the_losses_of_the_online_teacher(cached):
    teacher, _, make = cached
    cache = make()
    for epoch in range(3):
        batch = kd.on_device({name: crop[None] for name, crop in cache[(epoch, 1)].items()}, torch.device("cpu"))
        assert batch["e2"].shape == (1, 16, 48, 48)
        online = losses(teacher, {name: batch[name] for name in ("blurred", "sharp")})
        assert losses(teacher, batch) == pytest.approx(online, rel=1e-2, abs=5e-5)  # KL is about 1e-3
        assert all(value > 0 for value in online.values())


def test_cached_crops_are_windows_of_the_whole_picture(cached):
    _, dataset, make = cached
    cache = make()
    dataset.image_size = 32
    starts, variants = set(), set()
    for epoch in range(40):
        crop = cache[(epoch, 0)]
        for variant in range(2):
            maps = torch.load(cache.file(0, variant), weights_only=True)
            for top in range(0, 65, 8):
                for left in range(0, 65, 8):
                    if torch.equal(maps["blurred"][top:, left:][:32, :32], crop["blurred"]):
                        assert torch.equal(maps["b"][top // 8 :, left // 8 :][:4, :4], crop["b"])
                        starts.add((top, left))
                        variants.add(variant)
    assert len(starts) > 15
    assert variants == {0, 1}


def test_a_stale_cache_is_refused(cached):
    teacher, dataset, make = cached
    first = make()[(0, 0)]
    assert torch.equal(make()[(0, 0)]["b"], first["b"])
    with torch.no_grad():
        weight = next(teacher.restormer.parameters())
        weight += 1e-3
    with pytest.raises(kd.UserError, match="another teacher's"):
        make()
    with torch.no_grad():
        weight -= 1e-3
    dataset.pairs = dataset.pairs[::-1]
    with pytest.raises(kd.UserError, match="remove it or name another"):
        make()


def test_training_reads_the_cache(data_root, tiny_teacher, tmp_path):
    command = [
        *("train", "--data-root", str(data_root), "--run-dir", str(tmp_path / "run"), "--max-steps", "2"),
        *("--teacher-weights", str(tiny_teacher), "--teacher-cache", str(tmp_path / "cache"), "--stem-stride", "2"),
        *("--widths", "4", "4", "4", "4", "4", "--image-size", "32", "--lambda-perceptual", "0", "--workers", "0"),
    ]
    assert kd.main([*command, "--degradation", "mixed"]) == 0
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 4 * 7 + 1  # four variants of the seven pictures that are not held out, and the key
    assert kd.main([*command, "--degradation", "mixed", "--overwrite"]) == 0
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert kd.main([*command, "--overwrite"]) == 2
    # other seeds, and runs without a teacher term, take their crops from it too
    plain = ["--overwrite", "--degradation", "mixed", "--lambda-feature", "0", "--lambda-kl", "0", "--seed", "5"]
    assert kd.main([*command, *plain]) == 0
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
