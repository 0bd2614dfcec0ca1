"""Students: their sizes, shapes, starting points and gates; the networks of frames made of them."""

import math
import pathlib
import zipfile

import pytest
import torch
import torch.nn.functional as F

import sharpen_kd as kd

SKIPS = ("concatenate", "lateral")

# One of each kind and way to take skips, at a stem stride of 2.
STUDENTS = {
    "concatenate": lambda stride=2: kd.StudentUNet(stem_stride=stride, widths=(8, 12, 16)),
    "lateral": lambda stride=2: kd.StudentUNet(
        stem_stride=stride, widths=(8, 12, 16), skips="lateral", convolutions=(2, 1, 1)
    ),
    "plain": lambda stride=2: kd.PlainStack(stem_stride=stride, width=8, layers=3),
}


def luma_unet():
    """A small U-Net on the planes of the luma, with a correction that is seen."""
    torch.manual_seed(0)
    student = awake(kd.StudentUNet(stem_stride=2, widths=(8, 12, 16), skips="lateral", luma=True))
    torch.nn.init.normal_(student.correction.weight, std=0.05)
    return student


def parameters(**options):
    return sum(p.numel() for p in kd.StudentUNet(**options).parameters())


def awake(student):
    """The student with a correction that is seen, and deep stages that are heard."""
    if student.output.weight.requires_grad:
        torch.nn.init.normal_(student.output.weight, std=0.05)
    for up in getattr(student, "up", ()):
        torch.nn.init.normal_(up.weight, std=0.3)
    return student


# --- The contract ---------------------------------------------------------------------------------


def test_a_student_without_all_members_cannot_be_made():
    class Incomplete(kd.Student):
        def features(self, folded):
            return kd.Features(folded, {})

    with pytest.raises(TypeError, match="abstract"):
        Incomplete()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 33), (64, 64), (50, 7)])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_takes_any_size(name, stride, size):
    student = STUDENTS[name](stride)
    picture = torch.rand(2, 3, *size)
    output, taps = student(picture, taps=True)
    assert output.shape == picture.shape
    assert torch.equal(student(picture), output)
    assert {tap: features.shape[1] for tap, features in taps.items()} == student.feature_widths


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_folds_the_picture_and_adds_its_correction(name):
    torch.manual_seed(0)
    student = awake(STUDENTS[name]())
    picture = torch.rand(1, 3, 32, 64)
    planes = []
    for color in range(3):
        for row in range(2):
            for column in range(2):
                planes.append(picture[:, color, row::2, column::2])
    with torch.no_grad():
        correction = student.output(student.features(torch.stack(planes, dim=1)).last)
        restored = student(picture)
    by_hand = picture.clone()
    for plane in range(12):
        color, row, column = plane // 4, plane // 2 % 2, plane % 2
        by_hand[:, color, row::2, column::2] += correction[:, plane]
    assert torch.allclose(restored, by_hand, atol=1e-6)
    assert (restored - picture).abs().mean() > 0.01


@pytest.mark.parametrize("name", STUDENTS)
def test_a_picture_that_does_not_fit_is_reflected_at_the_right_and_the_bottom(name):
    torch.manual_seed(0)
    student = awake(STUDENTS[name](4))
    height = max(student.alignment, 8)
    width = 2 * height
    picture = torch.rand(1, 3, height - 3, width - 3)
    padded = F.pad(picture, (0, 3, 0, 3), mode="reflect")
    assert torch.equal(student(picture), student(padded)[..., :-3, :-3])


@pytest.mark.parametrize("name", STUDENTS)
def test_an_untrained_student_returns_nearly_its_input_and_learns_at_once(name):
    torch.manual_seed(0)
    student = STUDENTS[name]()
    picture = torch.rand(4, 3, 32, 32)
    assert (student(picture) - picture).abs().max() < 0.05
    target = picture * 0.5
    optimiser = torch.optim.Adam(student.parameters(), 3e-3)
    losses = []
    for _ in range(100):
        loss = (student(picture) - target).abs().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", STUDENTS)
def test_a_students_config_builds_it_again(name):
    student = awake(STUDENTS[name]())
    again = kd.build_student(student.config)
    assert type(again) is type(student)
    assert again.config == student.config
    again.load_state_dict(student.state_dict())
    picture = torch.rand(1, 3, 16, 16)
    assert torch.equal(again(picture), student(picture))


@pytest.mark.parametrize("kind", kd.STUDENTS)
def test_the_kind_in_a_students_config_is_its_name(kind):
    config = kd.StudentConfig(widths=(), base_channels=16, stem_stride=4)
    student = kd.STUDENTS[kind].from_flags(config)
    assert student.config["kind"] == kind
    assert student.stem_stride == 4


def test_a_plain_stack_has_one_width():
    for flags in ({"widths": (8, 8)}, {"convolutions": (3, 3)}):
        with pytest.raises(kd.UserError, match="a plain stack takes one number of each"):
            kd.PlainStack.from_flags(kd.StudentConfig(network="plain", **flags))
    config = kd.StudentConfig(stem_stride=2, widths=(8,), convolutions=(5,))
    wanted = {"kind": "plain", "stem_stride": 2, "width": 8, "layers": 5}
    assert kd.PlainStack.from_flags(config).config == wanted


def test_luma_and_colour_differences_are_those_of_bt_601():
    to_planes, to_rgb = kd.luma_layers()
    picture = torch.rand(1, 3, 4, 6)
    planes = to_planes(F.pixel_unshuffle(picture, 2))
    red, green, blue = picture[0]
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    upper, lower = luma[:2, 2:4].tolist()
    (a, b), (c, d) = upper, lower
    of_the_second_fold = [a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]
    assert (2 * planes[0, :4, 0, 1]).tolist() == pytest.approx(of_the_second_fold, abs=1e-5)
    cell = picture[0, :, :2, 2:4].mean((1, 2))
    mean_luma = luma[:2, 2:4].mean()
    assert planes[0, 4, 0, 1].item() == pytest.approx(
        (cell[2] - mean_luma).item() / 1.772, abs=1e-3
    )
    assert planes[0, 5, 0, 1].item() == pytest.approx(
        (cell[0] - mean_luma).item() / 1.402, abs=1e-3
    )
    flat = torch.tensor([0.3, 0.6, 0.1]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    again = F.pixel_shuffle(to_rgb(to_planes(F.pixel_unshuffle(flat, 2))), 2)
    assert torch.allclose(again, flat, atol=1e-3)


def test_what_is_grey_stays_grey():
    student = luma_unet()
    grey = torch.rand(1, 1, 48, 64).expand(1, 3, 48, 64)
    restored = student(grey)
    assert (restored - grey).abs().mean() > 0.01
    assert (restored - restored.mean(1, keepdim=True)).abs().max() < 1e-5


def test_colours_are_corrected_where_there_are_some():
    """By half where the two differences are 0.006 and 0.008: their squares add up to 1e-4."""
    colours = torch.tensor([[0.0, 0.006, 0.6], [0.0, 0.008, 0.8]]).view(1, 2, 1, 3)
    correction = torch.rand(1, 6, 1, 3)
    planes = torch.cat([torch.rand(1, 4, 1, 3), colours], 1)
    share = kd.KeepGrey()(correction, planes) / correction
    assert torch.allclose(share[0, :4], torch.ones(4, 1, 3))
    assert share[0, 4:].flatten().tolist() == pytest.approx([0, 0.5, 1] * 2, abs=1e-3)


def test_flags_describe_a_student():
    unet = kd.StudentConfig(
        stem_stride=2, widths=(4, 6, 8), convolutions=(1, 2, 3), skips="lateral"
    )
    assert kd.StudentUNet.from_flags(unet).config == {
        "kind": "unet",
        "stem_stride": 2,
        "widths": (4, 6, 8),
        "skips": "lateral",
        "convolutions": (1, 2, 3),
        "luma": False,
    }
    assert kd.StudentUNet.from_flags(kd.StudentConfig(base_channels=16)).config == {
        "kind": "unet",
        "stem_stride": 4,
        "widths": (4, 8, 16, 32, 48),
        "skips": "concatenate",
        "convolutions": (2, 2, 2, 2, 2),
        "luma": False,
    }
    plain = kd.StudentConfig(stem_stride=1, widths=(8,), convolutions=(4,))
    expected = {"kind": "plain", "stem_stride": 1, "width": 8, "layers": 4}
    assert kd.PlainStack.from_flags(plain).config == expected
    plain = kd.StudentConfig(stem_stride=2)
    expected = {"kind": "plain", "stem_stride": 2, "width": 16, "layers": 6}
    assert kd.PlainStack.from_flags(plain).config == expected


@pytest.mark.parametrize("kind", ["resnet", "", "UNET"])
def test_an_unknown_kind_names_the_choices(kind):
    with pytest.raises(kd.UserError, match=r"--network .*: choose from unet, plain"):
        kd.build_student({"kind": kind, "stem_stride": 2})


def test_a_checkpoint_without_a_kind_is_a_unets(tmp_path):
    student = STUDENTS["lateral"]()
    network = dict(student.config)
    del network["kind"]
    torch.save({"network": network, "params": student.state_dict()}, tmp_path / "old.pth")
    loaded, content = kd.load_student(tmp_path / "old.pth")
    assert type(loaded) is kd.StudentUNet
    assert loaded.config == student.config
    assert content["network"] == network
    picture = torch.rand(1, 3, 16, 16)
    assert torch.allclose(loaded(picture), student(picture), atol=1e-6)


class Harmful:
    """What runs code where it is loaded without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.touch, (self.file,)


def test_a_checkpoint_runs_no_code(tmp_path):
    file = tmp_path / "harm"
    torch.save({"network": Harmful(file), "params": {}}, tmp_path / "harmful.pth")
    with pytest.raises(kd.UserError, match=r"harmful\.pth: not a PyTorch weight file"):
        kd.load_student(tmp_path / "harmful.pth")
    assert not file.exists()


def small_checkpoint():
    """The content of a small student's checkpoint."""
    student = kd.StudentUNet(stem_stride=2, widths=(4, 4), skips="lateral", luma=True)
    return {"network": student.config, "params": student.state_dict()}


@pytest.mark.parametrize("key", ["params", "params_ema", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_found_under_the_names_of_other_frameworks(tmp_path, key, prefix):
    content = small_checkpoint()
    params = content.pop("params")
    content[key] = {prefix + name: values for name, values in params.items()}
    torch.save(content, tmp_path / "a.pth")
    student, _ = kd.load_student(tmp_path / "a.pth")
    for name, values in student.state_dict().items():
        assert torch.equal(values, params[name])


def test_averaged_weights_are_taken_first(tmp_path):
    content = small_checkpoint()
    content["params_ema"] = {name: values + 1 for name, values in content["params"].items()}
    assert torch.equal(
        kd.weights_in(content)["planes.weight"], content["params"]["planes.weight"] + 1
    )


BAD_WEIGHTS = {
    "a list": [1, 2],
    "NaN": {"planes.weight": torch.full((6, 12, 1, 1), math.nan)},
    "infinite": {"planes.weight": torch.full((6, 12, 1, 1), math.inf)},
    "whole numbers": {"planes.weight": torch.ones(6, 12, 1, 1, dtype=torch.int64)},
    "another shape": {"planes.weight": torch.ones(6, 11, 1, 1)},
    "no tensor": {"planes.weight": 1.0},
    "a number for a name": {5: torch.ones(6)},
    "one number for many": {"planes.weight": torch.ones(1).expand(6, 12, 1, 1)},
}


@pytest.mark.parametrize("wrong", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
def test_weights_must_be_finite_floats_of_the_networks_shapes(tmp_path, wrong):
    content = small_checkpoint()
    content["params"] = content["params"] | wrong if isinstance(wrong, dict) else wrong
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(kd.UserError, match=r"a\.pth: not a student of this script \("):
        kd.load_student(tmp_path / "a.pth")


def test_a_runs_state_is_no_student(tmp_path):
    torch.save({"optimiser": {}, "ema": {}}, tmp_path / "last.pth")
    with pytest.raises(
        kd.UserError, match=r"last\.pth: is a run's state, for --resume; name its best"
    ):
        kd.load_student(tmp_path / "last.pth")


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "plain", "layers": 10**9},
        {"kind": "plain", "width": 10**9},
        {"kind": "plain", "width": -1},
        {"kind": "plain", "layers": 2.5},
        {"kind": "plain", "layers": None},
        {"widths": (16, 10**9), "convolutions": (1, 1)},
        {"widths": (16, 16), "convolutions": (10**9, 1)},
        {"widths": (16, 16), "stem_stride": 0},
    ],
)
def test_a_network_larger_than_its_weights_is_refused_before_it_is_built(
    tmp_path, wrong, monkeypatch
):
    content = small_checkpoint()
    content["network"] = content["network"] | wrong
    torch.save(content, tmp_path / "a.pth")
    monkeypatch.setattr(kd, "build_student", None)  # calling it would be a TypeError
    with pytest.raises(kd.UserError, match="does not fit its weights"):
        kd.load_student(tmp_path / "a.pth")


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path):
    torch.save(small_checkpoint(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        entries = archive.infolist()
    largest = max(entries, key=lambda entry: entry.file_size)
    for distance in (300, 500, 700):  # behind the entry's header
        damaged = bytearray(whole)
        damaged[largest.header_offset + distance] ^= 16
        (tmp_path / "b.pth").write_bytes(damaged)
        with pytest.raises(
            kd.UserError, match=r"b\.pth: not a PyTorch weight file \(.* is damaged"
        ):
            kd.load_student(tmp_path / "b.pth")


def test_a_checkpoint_that_would_inflate_is_refused(tmp_path):
    torch.save(small_checkpoint(), tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as whole,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
        packed.writestr("a/data/999", bytes(10**6))
    with pytest.raises(kd.UserError, match=r"b\.pth: .* is compressed"):
        kd.load_student(tmp_path / "b.pth")


def test_a_checkpoint_may_hold_a_plain_stack(tmp_path):
    student = STUDENTS["plain"]()
    content = {"network": student.config, "params": student.state_dict()}
    torch.save(content, tmp_path / "plain.pth")
    loaded, _ = kd.load_student(tmp_path / "plain.pth")
    assert type(loaded) is kd.PlainStack
    assert not loaded.training


# --- The report's U-Net ---------------------------------------------------------------------------


def test_the_reports_student_has_the_reports_parameters():
    count = parameters(base_channels=256, stem_stride=1)
    assert round(count / 1e6, 2) == 25.52
    assert kd.StudentUNet().stem_stride == 4


@pytest.mark.parametrize("widths", [(2, 3, 5, 7, 11), (3, 2, 7)])
def test_multiply_adds_worked_by_hand(widths):
    # A 3x3 convolution has 9 * in * out a position, at 1, 1/4, 1/16 ... of the folded positions.
    folded = 12
    encoder = 0
    inputs = folded
    for scale, width in enumerate(widths):
        encoder += 9 * (inputs * width + width * width) / 4**scale
        inputs = width
    decoder = 0
    for scale, width in enumerate(widths[:-1]):
        up = widths[scale + 1] * width
        decoder += (up + 9 * (2 * width * width + width * width)) / 4**scale
    last = folded * widths[0]
    by_hand = (encoder + decoder + last) / 4

    student = kd.StudentUNet(stem_stride=2, widths=widths)
    gates = sum(2 * width * max(1, width // 8) for width in (*widths, *widths[:-1]))  # of a cell
    assert kd.multiply_adds_per_pixel(student) == pytest.approx(by_hand + gates / 32**2)


def test_multiply_adds_of_lateral_skips_worked_by_hand():
    a, b, c = 8, 12, 16
    # In, and the lateral; from below; out.
    finest = 9 * (12 * a + a * a) + b * a + 12 * a
    # The strided and another; the lateral and another; from below.
    second = 9 * (a * b + b * b) + 9 * (b * b + b * b) + c * b
    coarsest = 9 * b * c
    by_hand = (finest + second / 4 + coarsest / 16) / 4

    student = kd.StudentUNet(
        stem_stride=2, widths=(a, b, c), skips="lateral", convolutions=(1, 2, 1)
    )
    gates = sum(2 * width * max(1, width // 8) for width in (b, c, b))  # none at the finest scale
    assert kd.multiply_adds_per_pixel(student) == pytest.approx(by_hand + gates / 32**2)


@pytest.mark.parametrize("skips", SKIPS)
@pytest.mark.parametrize("widths", [(5, 4, 6, 6, 8), (5, 4, 6, 8), (5, 4)])
def test_any_number_of_scales_has_the_three_taps(widths, skips):
    student = kd.StudentUNet(stem_stride=2, widths=widths, skips=skips)
    picture = torch.rand(1, 3, 33, 50)
    output, taps = student(picture, taps=True)
    assert output.shape == picture.shape
    counts = {name: features.shape[1] for name, features in taps.items()}
    assert counts == {"e2": 4, "e4": widths[-2], "b": widths[-1]}
    assert counts == student.feature_widths


@pytest.mark.parametrize("skips", SKIPS)
def test_four_scales_compare_with_the_teacher_on_its_own_grids(skips):
    student = kd.StudentUNet(stem_stride=2, widths=(4, 4, 4, 4), skips=skips)
    _, taps = student(torch.rand(1, 3, 64, 32), taps=True)
    grids = {name: features.shape[2:] for name, features in taps.items()}
    assert grids == {"e2": (16, 8), "e4": (8, 4), "b": (4, 2)}


def copying(network):
    """The network with all 3x3 kernels set to hand their first channel on, and without gates."""
    for module in network.modules():
        if isinstance(module, kd.Stage):
            module.se = None
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
            module.weight.data[:, 0, 1, 1] = 1
    return network


def test_the_reports_unet_pools_by_maximum():
    student = copying(kd.StudentUNet(stem_stride=1, widths=(1, 1), convolutions=(1,)))
    red = torch.tensor([[1.0, 2, 0, 0, 7, 2], [3, 4, 0, 5, 6, 1]])
    picture = torch.stack([red, torch.zeros(2, 6), torch.zeros(2, 6)])[None]
    coarse = student.features(picture).taps["b"]
    assert coarse[0, 0].tolist() == [[4, 5, 7]]


def test_a_decoder_stage_takes_what_comes_up_before_its_skip():
    student = copying(kd.StudentUNet(stem_stride=1, widths=(1, 1), convolutions=(1,)))
    torch.nn.init.constant_(student.up[0].weight, 0.5)
    picture = torch.arange(48.0).view(1, 3, 4, 4)
    below = torch.tensor([[5.0, 7.0], [13.0, 15.0]]) / 2  # half the maxima
    enlarged = below.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(student.features(picture).last[0, 0], enlarged)

    student.decoder[0].layers[0].weight.data[:, :, 1, 1] = torch.tensor([0.0, 1.0])
    assert torch.equal(student.features(picture).last[0, 0], picture[0, 0])


def test_deep_stages_come_in_as_they_learn():
    """At first almost nothing from below a stage is heard, and no channel is silent for good."""
    torch.manual_seed(0)
    student = kd.StudentUNet(stem_stride=2, widths=(8, 8, 8, 8, 8))
    picture = torch.rand(4, 3, 32, 32)
    heard = []

    def listen(module, inputs, output):
        heard.append(output.std() / inputs[0].std())

    for up in student.up:
        up.register_forward_hook(listen)
    _, taps = student(picture, taps=True)
    assert len(heard) == 4
    assert max(heard) < 0.1

    first = student.first_layer.weight
    for features in taps.values():
        (gradient,) = torch.autograd.grad(features.sum(), first, retain_graph=True)
        assert gradient.abs().amax((1, 2, 3)).min() > 0
    assert (taps["b"] < 0).any()  # leaky


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"widths": (8,)}, "two scales or more"),
        ({"widths": (8, 0)}, "--widths, --convolutions: 1 or more each"),
        ({"skips": "add"}, "--skips add: concatenate or lateral"),
        ({"convolutions": (2, 2)}, "--convolutions .*: one number, or one for each of the 5"),
        ({"convolutions": (1, 1, 0, 1, 1)}, "--widths, --convolutions: 1 or more each"),
        ({"widths": (8, 8, 8), "convolutions": (1,) * 5}, "one for each of the 3 scales"),
    ],
)
def test_wrong_dimensions_of_a_unet_are_refused(options, named):
    with pytest.raises(kd.UserError, match=named):
        kd.StudentUNet(**options)


def test_lateral_skips_need_narrower_stages_and_no_gates_at_the_finest_scale():
    widths = (4, 6, 8, 10, 12)
    fewer = parameters(widths=widths) - parameters(widths=widths, skips="lateral")
    concatenated = sum(9 * width * width for width in widths[:4])
    finest_gates = 2 * (4 * 1 + 1 + 1 * 4 + 4)  # the encoder's and the decoder's, one hidden value
    assert fewer == concatenated + finest_gates


def test_convolutions_are_one_number_or_one_for_each_scale():
    widths = (4, 6, 8, 10, 12)
    usual = parameters(widths=widths)
    assert parameters(widths=widths, convolutions=(2,) * 5) == usual
    for scale, width in enumerate(widths):
        convolutions = [2] * 5
        convolutions[scale] = 3
        stages = 1 if scale == 4 else 2  # the encoder's and the decoder's
        more = parameters(widths=widths, convolutions=convolutions) - usual
        assert more == stages * (9 * width * width + width)


# --- Stages and gates -----------------------------------------------------------------------------


def convolved(layer, x, stride=1):
    return F.conv2d(x, layer.weight, layer.bias, stride, padding=1)


def leaky(x):
    return torch.where(x > 0, x, 0.1 * x)


def test_a_gate_is_the_sigmoid_of_two_layers_of_its_neighbourhoods_means():
    torch.manual_seed(0)
    block = kd.SEBlock(16, cell=1)  # not blended: each position is a cell
    x = torch.randn(2, 16, 5, 7)
    gates = block(x)
    assert gates.shape == x.shape
    assert block.squeeze.out_features == 2
    inside = (slice(2, 5), slice(3, 6))
    corner = (slice(0, 2), slice(0, 2))  # of which less is there
    for (row, column), (rows, columns) in (((3, 4), inside), ((0, 0), corner)):
        means = x[:, :, rows, columns].mean((2, 3))
        hidden = (means @ block.squeeze.weight.T + block.squeeze.bias).clamp(min=0)
        gate = torch.sigmoid(hidden @ block.excite.weight.T + block.excite.bias)
        assert torch.allclose(gates[:, :, row, column], gate, atol=1e-6)


def test_a_gate_depends_on_its_neighbourhood_alone():
    torch.manual_seed(0)
    block = kd.SEBlock(8, cell=4)
    x = torch.randn(1, 8, 24, 40)
    changed = x.clone()
    changed[..., 20:] += 1
    difference = (block(x) - block(changed)).abs().amax((0, 1, 2))
    # A cell sees its neighbours, and its gate is blended with those of the cells beside it.
    assert difference[: 20 - 4 - 2].max() == 0
    assert difference[20 - 4 : 20].min() > 0


def test_a_stage_multiplies_by_its_gates():
    torch.manual_seed(0)
    stage = kd.Stage(6, 8, convolutions=2, cell=10)
    picture = torch.randn(2, 6, 20, 30)
    expected = picture
    for layer in stage.layers:
        expected = leaky(convolved(layer, expected))
    assert torch.allclose(stage(picture), expected * stage.se(expected), atol=1e-6)


@pytest.mark.parametrize("convolutions", [1, 2])
@pytest.mark.parametrize("cell", [5, None])
def test_a_stage_strides_first_and_adds_there_what_comes_from_below(cell, convolutions):
    torch.manual_seed(0)
    stage = kd.Stage(6, 8, convolutions, stride=2, cell=cell)
    picture = torch.randn(2, 6, 20, 30)
    below = torch.randn(2, 8, 10, 15)
    first, *others = stage.layers
    expected = leaky(convolved(first, picture, stride=2) + below)
    for layer in others:
        expected = leaky(convolved(layer, expected))
    if cell:
        expected = expected * stage.se(expected)
    assert torch.allclose(stage(picture, from_below=below), expected, atol=1e-5)


@pytest.mark.parametrize("skips", SKIPS)
@pytest.mark.parametrize(("widths", "stride"), [((4, 4, 4), 2), ((4,) * 5, 4)])
def test_cells_are_of_32_pixels_or_as_large_as_the_coarsest_position(widths, stride, skips):
    student = kd.StudentUNet(stem_stride=stride, widths=widths, skips=skips)
    cells = [stage.se.cell for stage in (*student.encoder, student.bottleneck) if stage.se]
    pixels = 32 if stride == 2 else 64
    of_all_scales = [pixels // stride // 2**scale for scale in range(len(widths))]
    assert cells == of_all_scales[-len(cells) :]
    assert len(cells) == len(widths) - (skips == "lateral")
    assert student.alignment == pixels


# --- A plain stack --------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "layers"), [(24, 6), (7, 2)])
def test_a_plain_stacks_multiply_adds_worked_by_hand(width, layers):
    student = kd.PlainStack(stem_stride=2, width=width, layers=layers)
    between = (layers - 2) * width * width
    by_hand = 9 * (12 * width + between + width * 12) / 4
    assert kd.multiply_adds_per_pixel(student) == by_hand


def test_a_plain_stack_has_no_features_to_compare():
    student = STUDENTS["plain"]()
    features = student.features(torch.rand(1, 12, 8, 8))
    assert features.taps == {}
    assert student.feature_widths == {}
    assert student.alignment == student.stem_stride


def test_a_plain_stack_is_its_layers_with_leaky_relus_between():
    torch.manual_seed(0)
    student = kd.PlainStack(stem_stride=1, width=5, layers=4)
    picture = torch.rand(1, 3, 12, 10)
    x = picture
    for layer in student.layers:
        x = leaky(convolved(layer, x))
    by_hand = picture + convolved(student.output, x)
    assert len(student.layers) == 3
    assert torch.allclose(student(picture), by_hand, atol=1e-6)


@pytest.mark.parametrize(("stride", "layers"), [(1, 2), (2, 4), (4, 3)])
def test_a_pixel_changes_what_a_plain_stack_makes_as_far_as_its_reach(stride, layers):
    """The pixel is the first of its fold, so the other side changes to the end of the last fold."""
    torch.manual_seed(0)
    student = kd.PlainStack(stride, width=4, layers=layers).double()
    for parameter in student.parameters():  # what adds up cannot cancel out
        torch.nn.init.uniform_(parameter, 0.1, 0.2)
    picture = torch.rand(1, 3, 64, 64, dtype=torch.float64)
    brighter = picture.clone()
    brighter[..., 32, 32] += 1
    with torch.no_grad():
        changed = (student(brighter) != student(picture)).any(dim=1)[0]
    for places in changed.nonzero(as_tuple=True):
        assert 32 - places.min() == student.reach
        assert places.max() - 32 == student.reach + stride - 1


def test_wrong_dimensions_of_a_plain_stack_are_refused():
    with pytest.raises(kd.UserError, match="--convolutions 1: a plain stack has two layers"):
        kd.PlainStack(layers=1)
    for wrong in ({"widths": (8, 8)}, {"convolutions": (3, 3)}):
        with pytest.raises(kd.UserError, match="a plain stack takes one number of each"):
            kd.PlainStack.from_flags(kd.StudentConfig(**wrong))


# --- The U-Net on the luma ------------------------------------------------------------------------


def test_a_unet_on_the_luma_corrects_colours_where_there_are_any():
    student = luma_unet()
    picture = torch.rand(1, 1, 64, 192).repeat(1, 3, 1, 1)
    picture[:, 0, :, 128:] = 0.5  # colours at the right, two cells of 16 pixels from the middle
    colours = student(picture) - picture
    colours = (colours - colours.mean(1, keepdim=True)).abs()
    assert colours[..., :104].max() < 1e-5
    assert colours[..., 128:].mean() > 0.01


def test_a_unet_on_the_luma_needs_a_stride_of_two_and_its_config_builds_it_again():
    with pytest.raises(kd.UserError, match="--luma: takes --stem-stride 2"):
        kd.StudentUNet.from_flags(kd.StudentConfig(stem_stride=4, luma=True))
    student = luma_unet()
    again = kd.build_student(student.config)
    again.load_state_dict(student.state_dict())
    picture = torch.rand(1, 3, 35, 50)
    assert torch.equal(again(picture), student(picture))


def test_a_unet_on_the_luma_starts_as_a_copy_and_keeps_its_fixed_layers():
    student = kd.StudentUNet(stem_stride=2, widths=(8, 12), luma=True)
    picture = torch.rand(1, 3, 32, 32)
    assert (student(picture) - picture).abs().max() < 0.05
    fixed = {name for name, weight in student.named_parameters() if not weight.requires_grad}
    assert fixed == {"planes.weight", "planes.bias", "output.weight"}
    planes, output = kd.luma_layers()
    assert torch.equal(student.planes.weight, planes.weight)
    assert torch.equal(student.output.weight, output.weight)


# --- Networks of frames ---------------------------------------------------------------------------


def to_frames(pictures):
    return (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def to_pictures(frames):
    return frames.permute(0, 3, 1, 2) / 255


def difference(first, second):
    return (first.int() - second.int()).abs().float()


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("name", STUDENTS)
def test_the_network_of_frames_is_the_student(name, stride):
    torch.manual_seed(0)
    student = awake(STUDENTS[name](stride))
    frames = to_frames(torch.rand(1, 3, 64, 96))
    with torch.no_grad():
        plain = to_frames(student(to_pictures(frames)))
        restored = kd.FrameNetwork(student)(frames)
    assert restored.shape == frames.shape
    assert restored.dtype == torch.uint8
    assert difference(plain, restored).max() <= 1
    assert difference(plain, restored).mean() < 0.01
    assert difference(restored, frames).mean() > 1


def test_the_network_of_frames_is_the_unet_on_the_luma():
    student = luma_unet()
    frames = to_frames(torch.rand(1, 3, 64, 96))
    with torch.no_grad():
        plain = to_frames(student(to_pictures(frames)))
        restored = kd.FrameNetwork(student)(frames)
    assert difference(plain, restored).max() <= 1
    assert difference(restored, frames).mean() > 1


def test_the_network_of_frames_leaves_the_student_as_it_was():
    student = STUDENTS["lateral"]()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    kd.FrameNetwork(student)
    after = student.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_in_bf16_a_small_correction_leaves_odd_levels_alone():
    """In bf16 101 + 0.3 is 101.5, which rounds to 102."""
    student = kd.StudentUNet(stem_stride=2, widths=(4, 4))
    student.output.bias.data.fill_(0.3 / 255)
    network = kd.FrameNetwork(student).to(torch.bfloat16).eval()
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    frame = levels.repeat(4, 4, 1)[None].contiguous()
    with torch.inference_mode():
        assert torch.equal(network(frame), frame)


@pytest.mark.parametrize("checkpoint", kd.SHIPPED)
def test_in_bf16_no_map_meets_another_type(random_frame, checkpoint):
    """A convolution refuses maps of another type than its weights."""
    student, _ = kd.load_student(checkpoint)
    frame = torch.from_numpy(random_frame(32, 64)[None])
    network = kd.FrameNetwork(student)
    types = set()

    def note_type(module, inputs, output):
        types.add(output.dtype)

    with torch.inference_mode():
        expected = network(frame)
        for module in network.to(torch.bfloat16).modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear):
                module.register_forward_hook(note_type)
        restored = network(frame)
    assert types == {torch.bfloat16}
    assert difference(restored, expected).mean() < 0.5
