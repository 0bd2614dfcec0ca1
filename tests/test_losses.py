"""Each of the five terms against a value worked out independently."""

import numpy as np
import pytest
import torch
import torchvision
from scipy.stats import entropy
from skimage.metrics import structural_similarity

import sharpen_kd as kd


def test_ssim_is_scikit_images(photographs):
    sharp = np.array(photographs["coffee"].crop((100, 100, 180, 164)))
    blurred = np.array(photographs["coffee"].crop((101, 100, 181, 164)))
    expected = structural_similarity(
        sharp / 255, blurred / 255, channel_axis=2, data_range=1,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )  # fmt: skip
    tensors = [kd.CustomToTensor()(image)[None] for image in (sharp, blurred)]
    assert kd.ssim(*tensors).item() == pytest.approx(expected, abs=1e-5)
    both = [torch.cat([t, t.flip(-1)]) for t in tensors]
    assert kd.ssim(*both).item() == pytest.approx(expected, abs=1e-5)
    assert kd.ssim(tensors[0], tensors[0]).item() == pytest.approx(1, abs=1e-5)


def test_kl_is_over_positions_of_each_channel():
    generator = np.random.default_rng(0)
    student, teacher = generator.random((2, 3, 4, 5)) * 6, generator.random((2, 3, 4, 5)) * 6

    def soft(x):
        return np.exp(x.ravel() / 4) / np.exp(x.ravel() / 4).sum()

    expected = np.mean([entropy(soft(teacher[b, c]), soft(student[b, c])) * 16 for b in range(2) for c in range(3)])
    result = kd.positional_kl(torch.tensor(student), torch.tensor(teacher), 4.0)
    assert result.item() == pytest.approx(expected)
    brighter = torch.tensor(teacher) + 1  # a distribution over positions does not see an offset
    assert kd.positional_kl(brighter, torch.tensor(teacher), 4.0).item() == pytest.approx(0, abs=1e-12)


def test_feature_loss_by_hand():
    student = {"e2": torch.tensor([[[[5.0, 7.0], [5.0, 7.0]]]])}  # centred: -1 1 -1 1
    teacher = {"e2": torch.tensor([[[[0.0, 0.0], [8.0, 8.0]]]])}  # standardised: -1 -1 1 1
    assert kd.feature_loss(student, teacher).item() == pytest.approx((0 + 2 + 2 + 0) / 4)
    student["b"] = torch.tensor([[[[2.0, 6.0]]]])  # centred: -2 2
    teacher["b"] = torch.tensor([[[[1.0, 1.0, 2.0, 2.0]] * 2]])  # halved: 1 2; standardised: -1 1
    assert kd.feature_loss(student, teacher).item() == pytest.approx((1 + 1) / 2, abs=1e-3)


def test_shrinking_wins_nothing():
    torch.manual_seed(0)
    teacher = {"e2": torch.rand(2, 4, 8, 8)}
    target = teacher["e2"] - teacher["e2"].mean((0, 2, 3), keepdim=True)
    target = target / target.square().mean((0, 2, 3), keepdim=True).sqrt()
    spread = target.abs().mean().item()
    for scale in (0.0, 0.01, 0.5, 1.0, 2.0):  # a student that has the pattern pays for every wrong size
        loss = kd.feature_loss({"e2": scale * target}, teacher).item()
        assert loss == pytest.approx(abs(1 - scale) * spread, abs=1e-4)
    student = {"e2": torch.rand(2, 4, 8, 8)}
    loss = kd.feature_loss(student, teacher).item()
    for scale in (0.01, 0.1, 10.0):  # and the projections' size does not matter
        assert kd.feature_loss(student, {"e2": scale * teacher["e2"]}).item() == pytest.approx(loss, rel=1e-2)


def test_training_on_features_alone_does_not_collapse(tiny_teacher, photographs):
    torch.manual_seed(0)
    student = kd.StudentUNet(stem_stride=1, widths=(8, 8, 8, 8, 8))
    teacher = kd.RestormerTeacherWrapper(kd.load_restormer(tiny_teacher), student.feature_widths)
    picture = kd.CustomToTensor()(photographs["coffee"].crop((200, 150, 264, 214)))[None]
    trainable = [p for m in (student, teacher) for p in m.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trainable, 3e-3)
    losses, spreads = [], []
    for _ in range(60):
        _, features = student(picture, features=True)
        teacher(picture)
        projected = teacher.project(teacher.tapped)
        loss = kd.feature_loss(features, projected)
        losses.append(loss.item())
        spreads.append([f.detach().std((2, 3)).mean().item() for f in (*features.values(), *projected.values())])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    assert all(after > 0.5 * before for before, after in zip(spreads[0], spreads[-1], strict=True))


@pytest.fixture
def vgg_cache(tmp_path, monkeypatch):
    """A torch.hub cache that holds a VGG19 file of random weights under torchvision's name."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(0)
    features = torchvision.models.vgg19(weights=None).features
    (tmp_path / "checkpoints").mkdir()
    state = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    torch.save(state, tmp_path / "checkpoints/vgg19-dcbb9e9d.pth")
    return features


def test_perceptual_term_is_l1_between_vgg_features(vgg_cache):
    loss = kd.DistillationLoss({"perceptual": 0.5})
    output, teacher_output = torch.rand(2, 1, 3, 48, 48)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        first, second = (vgg_cache[:36]((image - mean) / std) for image in (output, teacher_output))
        terms = loss(output, None, teacher_output=teacher_output)
    assert terms.keys() == {"perceptual"}
    assert terms["perceptual"].item() == pytest.approx(0.5 * (first - second).abs().mean().item(), rel=1e-4)
    assert not any(p.requires_grad for p in loss.parameters())


def test_missing_vgg_weights_name_file_place_and_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(kd.UserError, match=r"checkpoints/vgg19-dcbb9e9d.pth.*--lambda-perceptual 0"):
        kd.DistillationLoss({"perceptual": 0.01})


def test_terms_are_weighted_and_absent_at_zero():
    torch.manual_seed(0)
    output, sharp, taught = torch.rand(3, 1, 3, 16, 16)
    features, projected = {"b": torch.rand(1, 2, 4, 4)}, {"b": torch.rand(1, 2, 4, 4)}
    weights = {"reconstruction": 2.0, "perceptual": 0.0, "feature": 3.0, "kl": 5.0, "ssim": 7.0}
    loss = kd.DistillationLoss(weights, temperature=2.0)
    assert loss.vgg is None
    terms = loss(output, sharp, features, taught, projected)
    assert terms.keys() == {"reconstruction", "feature", "kl", "ssim"}
    assert terms["reconstruction"].item() == pytest.approx(2 * (output - sharp).abs().mean().item())
    assert terms["feature"].item() == pytest.approx(3 * kd.feature_loss(features, projected).item())
    assert terms["kl"].item() == pytest.approx(5 * kd.positional_kl(output, taught, 2.0).item())
    assert terms["ssim"].item() == pytest.approx(7 * (1 - kd.ssim(output, sharp).item()))
    assert kd.DistillationLoss({"ssim": 1.0, "feature": 0.0, "kl": 0.0}).needs_teacher is False
    assert kd.DistillationLoss({"kl": 1.0}).needs_teacher is True


def test_the_reports_weights_are_the_defaults():
    config = kd.TrainConfig()
    weights = (config.lambda_reconstruction, config.lambda_perceptual, config.lambda_feature)
    assert (*weights, config.lambda_kl, config.lambda_ssim) == (1.0, 0.01, 1.0, 0.01, 10.0)
    assert config.temperature == 4.0
