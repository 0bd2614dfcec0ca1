"""Each loss term against a value worked out independently."""

import dataclasses

import numpy as np
import pytest
import torch
import torchvision
from scipy.stats import entropy
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import sharpen_kd as kd


def test_ssim_is_scikit_images(photographs):
    sharp = np.array(photographs["coffee"].crop((100, 100, 180, 164)))
    blurred = np.array(photographs["coffee"].crop((101, 100, 181, 164)))
    expected, everywhere = structural_similarity(
        sharp / 255,
        blurred / 255,
        channel_axis=2,
        data_range=1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )
    first = kd.CustomToTensor()(sharp)[None]
    second = kd.CustomToTensor()(blurred)[None]
    assert kd.ssim(first, second).item() == pytest.approx(expected, abs=1e-5)
    assert kd.ssim(first, first).item() == pytest.approx(1, abs=1e-5)
    of_every_third = everywhere[5:-5:3, 5:-5:3].mean()  # without where windows leave the picture
    assert kd.ssim(first, second, every=3).item() == pytest.approx(of_every_third, abs=1e-5)
    assert of_every_third != pytest.approx(expected, abs=1e-3)

    mirrored_too = [torch.cat([batch, batch.flip(-1)]) for batch in (first, second)]
    assert kd.ssim(*mirrored_too).item() == pytest.approx(expected, abs=1e-5)


def test_kl_is_over_the_positions_of_each_channel():
    random = np.random.default_rng(0)
    student = random.random((2, 3, 4, 5)) * 6
    teacher = random.random((2, 3, 4, 5)) * 6

    def soft(channel):
        exponentials = np.exp(channel.ravel() / 4)
        return exponentials / exponentials.sum()

    divergences = []
    for picture in range(2):
        for channel in range(3):
            target = soft(teacher[picture, channel])
            divergences.append(entropy(target, soft(student[picture, channel])))
    result = kd.positional_kl(torch.tensor(student), torch.tensor(teacher), 4.0)
    assert result.item() == pytest.approx(16 * np.mean(divergences))


def test_kl_does_not_see_an_offset():
    teacher = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    assert kd.positional_kl(teacher + 1, teacher, 4.0).item() == pytest.approx(0, abs=1e-12)


def test_feature_loss_by_hand():
    student = {"e2": torch.tensor([[[[5.0, 7.0], [5.0, 7.0]]]])}  # centred: -1 1 -1 1
    teacher = {"e2": torch.tensor([[[[0.0, 0.0], [8.0, 8.0]]]])}  # standardised: -1 -1 1 1
    assert kd.feature_loss(student, teacher).item() == pytest.approx((0 + 2 + 2 + 0) / 4)
    student["b"] = torch.tensor([[[[2.0, 6.0]]]])  # centred: -2 2
    teacher["b"] = torch.tensor([[[[1.0, 1.0, 2.0, 2.0]] * 2]])  # halved: 1 2; standardised: -1 1
    assert kd.feature_loss(student, teacher).item() == pytest.approx((1 + 1) / 2, abs=1e-3)


def test_a_coarser_position_compares_with_all_that_it_covers():
    """Without an average, the outer two of every four columns would not count."""
    teacher = {"b": torch.tensor([[[[1.0, 0, 0, 1, 0, 0, 0, 0]] * 4]])}  # left above right: 1 -1
    student = {"b": torch.tensor([[[[6.0, 2.0]]]])}  # centred: 2 -2
    assert kd.feature_loss(student, teacher).item() == pytest.approx(1, abs=1e-3)


def test_features_are_standardised_by_channel_over_the_whole_batch():
    torch.manual_seed(0)
    student = torch.rand(2, 3, 4, 4)
    teacher = torch.rand(2, 3, 4, 4)
    losses = []
    for channel in range(3):
        ours = student[:, channel].numpy()
        theirs = teacher[:, channel].numpy()
        standardised = (theirs - theirs.mean()) / theirs.std()
        losses.append(np.abs(ours - ours.mean() - standardised).mean())
    result = kd.feature_loss({"e2": student}, {"e2": teacher}).item()
    assert result == pytest.approx(np.mean(losses), rel=1e-5)


def test_shrinking_wins_nothing():
    torch.manual_seed(0)
    teacher = torch.rand(2, 4, 8, 8)
    target = teacher - teacher.mean((0, 2, 3), keepdim=True)
    target = target / target.square().mean((0, 2, 3), keepdim=True).sqrt()
    spread = target.abs().mean().item()
    for scale in (0.0, 0.01, 0.5, 1.0, 2.0):  # the pattern in a wrong size is paid for
        loss = kd.feature_loss({"e2": scale * target}, {"e2": teacher}).item()
        assert loss == pytest.approx(abs(1 - scale) * spread, abs=1e-4)

    student = torch.rand(2, 4, 8, 8)
    loss = kd.feature_loss({"e2": student}, {"e2": teacher}).item()
    for scale in (0.01, 0.1, 10.0):  # and the projections' size does not matter
        scaled = kd.feature_loss({"e2": student}, {"e2": scale * teacher}).item()
        assert scaled == pytest.approx(loss, rel=1e-2)


def test_training_on_features_alone_does_not_collapse(tiny_teacher, photographs):
    torch.manual_seed(0)
    student = kd.StudentUNet(stem_stride=1, widths=(8, 8, 8, 8, 8))
    restormer = kd.load_restormer(tiny_teacher)
    teacher = kd.RestormerTeacherWrapper(restormer, student.feature_widths)
    picture = kd.CustomToTensor()(photographs["coffee"].crop((200, 150, 264, 214)))[None]
    trained = [*student.parameters()]
    trained += [parameter for parameter in teacher.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(trained, 3e-3)
    teacher(picture)

    losses = []
    spreads = []
    for _ in range(60):
        _, features = student(picture, taps=True)
        projected = teacher.project(teacher.tapped)
        loss = kd.feature_loss(features, projected)
        losses.append(loss.item())
        maps = [*features.values(), *projected.values()]
        spreads.append([each.detach().std((2, 3)).mean().item() for each in maps])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]
    for before, after in zip(spreads[0], spreads[-1], strict=True):
        assert after > 0.5 * before


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


def test_the_perceptual_term_is_l1_between_vgg_features(vgg_cache):
    loss = kd.DistillationLoss({"perceptual": 0.5})
    output, taught = torch.rand(2, 1, 3, 48, 48)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    relu5_4 = vgg_cache[:36]
    with torch.no_grad():
        first = relu5_4((output - mean) / std)
        second = relu5_4((taught - mean) / std)
        terms = loss(kd.Comparison(output, sharp=None, teacher_output=taught))
    by_hand = 0.5 * (first - second).abs().mean()
    assert terms.keys() == {"perceptual"}
    assert terms["perceptual"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_missing_vgg_weights_name_file_place_address_and_flag(tmp_path, monkeypatch, denied):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    address = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
    named = rf"checkpoints/vgg19-dcbb9e9d.pth.*{address}.*--lambda-perceptual 0"
    with pytest.raises(kd.UserError, match=named):
        kd.DistillationLoss({"perceptual": 0.01})
    assert denied == ["download.pytorch.org"]
    denied.clear()


@pytest.fixture
def seen():
    """Random pictures and features."""
    torch.manual_seed(0)
    output, sharp, taught = torch.rand(3, 1, 3, 16, 16)
    ours, theirs = torch.rand(2, 1, 2, 4, 4)
    return kd.Comparison(output, sharp, taught, {"b": ours}, {"b": theirs})


def test_terms_are_weighted_and_absent_at_zero(seen):
    weights = {
        "reconstruction": 2.0,
        "perceptual": 0.0,
        "feature": 3.0,
        "kl": 5.0,
        "ssim": 7.0,
        "output": 11.0,
        "psnr": 13.0,
    }
    loss = kd.DistillationLoss(weights, temperature=2.0)
    assert loss.vgg is None
    terms = {name: term.item() for name, term in loss(seen).items()}
    feature = kd.feature_loss(seen.features, seen.teacher_features)
    kl = kd.positional_kl(seen.output, seen.teacher_output, 2.0)
    assert terms == pytest.approx(
        {
            "reconstruction": 2 * (seen.output - seen.sharp).abs().mean().item(),
            "feature": 3 * feature.item(),
            "kl": 5 * kl.item(),
            "ssim": 7 * (1 - kd.ssim(seen.output, seen.sharp, every=2).item()),
            "output": 11 * (seen.output - seen.teacher_output).abs().mean().item(),
            "psnr": 13 * kd.missing_decibels(seen.output, seen.sharp).item(),
        }
    )


def test_missing_decibels_are_those_of_each_crop():
    sharp = torch.full((3, 3, 8, 8), 0.5)
    output = sharp + torch.tensor([0.0, 0.1, 0.01]).view(3, 1, 1, 1)
    # Mean squared errors 0, 1e-2, 1e-4 beside the 1e-5 of 50 dB: 1, 1001 and 11 times that.
    lacking = (0 + 30.0043 + 10.4139) / 3
    assert kd.missing_decibels(output, sharp).item() == pytest.approx(lacking, abs=1e-3)
    psnr = peak_signal_noise_ratio(sharp[1].numpy(), output[1].numpy(), data_range=1)
    alone = kd.missing_decibels(output[1:2], sharp[1:2], enough=60)
    assert 60 - alone.item() == pytest.approx(psnr, abs=1e-3)


def test_to_missing_decibels_all_crops_are_worth_the_same_and_to_l1_the_hard_ones():
    sharp = torch.full((2, 3, 8, 8), 0.5)
    error = torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)

    def change_by_a_tenth_less(loss, crop):
        scale = torch.ones(2, 1, 1, 1)
        scale[crop] = 0.9
        return loss(sharp + error, sharp) - loss(sharp + error * scale, sharp)

    hard, easy = (change_by_a_tenth_less(kd.missing_decibels, crop).item() for crop in (0, 1))
    assert hard == pytest.approx(easy, rel=0.03)
    hard, easy = (
        change_by_a_tenth_less(torch.nn.functional.l1_loss, crop).item() for crop in (0, 1)
    )
    assert hard == pytest.approx(10 * easy, rel=1e-3)


def objective_of(name, weight, teacher_weights):
    """What `train` minimises with this term alone."""
    config = kd.TrainConfig(stem_stride=2, widths=(4, 4, 4), teacher_weights=teacher_weights)
    for other in kd.LOSS_TERMS:
        setattr(config, f"lambda_{other}", 0.0)
    setattr(config, f"lambda_{name}", weight)
    return kd.make_objective(config, resumed=False)


@pytest.mark.parametrize("name", [name for name in kd.LOSS_TERMS if name != "perceptual"])
def test_a_teacher_is_loaded_for_a_term_that_needs_one(tiny_teacher, name):
    objective = objective_of(name, 0.5, tiny_teacher)
    assert objective.loss.lambdas == {name: 0.5}
    assert (objective.teacher is not None) == kd.LOSS_TERMS[name].needs_teacher


@pytest.mark.parametrize("name", [name for name in kd.LOSS_TERMS if name != "perceptual"])
def test_a_term_needs_a_teacher_where_its_row_says_so(seen, name):
    alone = dataclasses.replace(seen, teacher_output=None, teacher_features=None)
    loss = kd.DistillationLoss({name: 1.0})
    assert loss(seen)[name] > 0
    if kd.LOSS_TERMS[name].needs_teacher:
        with pytest.raises((AttributeError, TypeError)):
            loss(alone)
    else:
        assert torch.equal(loss(alone)[name], loss(seen)[name])


@pytest.mark.parametrize("name", kd.LOSS_TERMS)
def test_every_row_of_the_table_has_a_method_and_a_flag(name):
    assert f"{name}_term" in vars(kd.DistillationLoss)
    config = kd.parse_command_line(["train", f"--lambda-{name}", "0.25"])
    assert config[f"lambda_{name}"] == 0.25


def test_a_new_row_with_a_method_is_a_term(tiny_teacher, monkeypatch):
    row = kd.LossTerm(weight=0.0, needs_teacher=True, about="the largest difference")

    class Loss(kd.DistillationLoss):
        def largest_term(self, seen):
            return (seen.output - seen.teacher_output).abs().max()

    monkeypatch.setattr(kd, "LOSS_TERMS", kd.LOSS_TERMS | {"largest": row})
    monkeypatch.setattr(kd, "DistillationLoss", Loss)
    objective = objective_of("largest", 3.0, tiny_teacher)
    picture = torch.rand(1, 3, 16, 16)
    batch = {"blurred": picture, "sharp": picture}
    with torch.no_grad():
        terms = objective(batch, torch.autocast("cpu", enabled=False))
        largest = (objective.network(picture) - objective.teacher(picture)).abs().max()
    assert terms.keys() == {"largest"}
    assert terms["largest"].item() == pytest.approx(3 * largest.item())


def test_the_reports_weights_are_the_defaults():
    config = kd.TrainConfig()
    assert config.lambda_reconstruction == 1.0
    assert config.lambda_perceptual == 0.01
    assert config.lambda_feature == 1.0
    assert config.lambda_kl == 0.01
    assert config.lambda_ssim == 10.0
    assert config.lambda_output == 0.0
    assert config.temperature == 4.0
