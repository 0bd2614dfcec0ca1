"""The student: its size, shapes, starting point, and gates."""

from types import SimpleNamespace

import pytest
import torch

import sharpen_kd as kd


def count(**options):
    return sum(p.numel() for p in kd.StudentUNet(**options).parameters())


def test_the_reports_student_has_the_reports_parameters():
    assert round(count(base_channels=256, stem_stride=1) / 1e6, 2) == 25.52
    assert kd.StudentUNet().stem_stride == 4


@pytest.mark.parametrize("widths", [(2, 3, 5, 7, 11), (3, 2, 7)])
def test_multiply_adds_worked_by_hand(widths):
    # one 3x3 convolution of 9*in*out a position, at 1, 1/4, 1/16 ... of the positions
    folded = 12
    inputs = (folded, *widths[:-1])
    encoder = sum(9 * (i * w + w * w) / 4**level for level, (i, w) in enumerate(zip(inputs, widths, strict=True)))
    decoder = sum(9 * (2 * w * w + w * w) / 4**level for level, w in enumerate(widths[:-1]))
    up = sum(widths[level + 1] * w / 4**level for level, w in enumerate(widths[:-1]))
    by_hand = (encoder + decoder + up + folded * widths[0]) / 4
    student = kd.StudentUNet(stem_stride=2, widths=widths)
    gates = sum(2 * w * max(1, w // 8) for w in (*widths, *widths[:-1]))  # once a frame
    side = 16 * student.alignment
    assert kd.multiply_adds_per_pixel(student) == pytest.approx(by_hand + gates / side**2)
    assert kd.multiply_adds_per_pixel(kd.PlainLayers()) == 9 * (12 * 24 + 4 * 24 * 24 + 24 * 12) / 4


def test_multiply_adds_of_lateral_skips_worked_by_hand():
    # the second stage's first convolution strides; a decoder stage's first sees the skip alone
    a, b, c = 8, 12, 16
    finest = 9 * (12 * a + a * a) + b * a + 12 * a  # in and lateral, from below, out
    second = 9 * (a * b + b * b + b * b + b * b) + c * b  # strided, its other, lateral, its other, from below
    by_hand = (finest + second / 4 + 9 * b * c / 16) / 4
    student = kd.StudentUNet(stem_stride=2, widths=(a, b, c), skips="lateral", convolutions=(1, 2, 1))
    gates = sum(2 * w * max(1, w // 8) for w in (b, c, b))  # none at the finest scale
    assert kd.multiply_adds_per_pixel(student) == pytest.approx(by_hand + gates / (16 * student.alignment) ** 2)


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (17, 33), (64, 64), (50, 7)])
@pytest.mark.parametrize("widths", [(5, 4, 6, 6, 8), (5, 4, 6, 8), (5, 4)])
@pytest.mark.parametrize("skips", ["concatenate", "lateral"])
def test_any_size_and_number_of_scales(stem_stride, size, widths, skips):
    student = kd.StudentUNet(stem_stride=stem_stride, widths=widths, skips=skips)
    picture = torch.rand(2, 3, *size)
    assert student(picture).shape == picture.shape
    output, features = student(picture, features=True)
    assert output.shape == picture.shape
    assert {name: f.shape[1] for name, f in features.items()} == {"e2": 4, "e4": widths[-2], "b": widths[-1]}
    assert {name: f.shape[1] for name, f in features.items()} == student.feature_widths


@pytest.mark.parametrize("skips", kd.SKIPS)
def test_four_scales_compare_with_the_teacher_on_its_own_grids(skips):
    student = kd.StudentUNet(stem_stride=2, widths=(4, 4, 4, 4), skips=skips)
    _, features = student(torch.rand(1, 3, 64, 32), features=True)
    assert {name: f.shape[2:] for name, f in features.items()} == {"e2": (16, 8), "e4": (8, 4), "b": (4, 2)}


@pytest.mark.parametrize("skips", kd.SKIPS)
def test_untrained_student_returns_nearly_its_input_and_learns_at_once(skips):
    torch.manual_seed(0)
    student = kd.StudentUNet(stem_stride=2, widths=(8, 8, 8, 8, 8), skips=skips)
    picture = torch.rand(4, 3, 32, 32)
    assert (student(picture) - picture).abs().max() < 0.05
    target = (picture * 0.5).detach()
    optimiser = torch.optim.Adam(student.parameters(), 3e-3)
    losses = []
    for _ in range(100):
        loss = (student(picture) - target).abs().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


def test_deep_stages_come_in_as_they_learn():
    """At first almost nothing from below a stage is heard, and no channel is silent for good."""
    torch.manual_seed(0)
    student = kd.StudentUNet(stem_stride=2, widths=(8, 8, 8, 8, 8))
    picture = torch.rand(4, 3, 32, 32)
    below = []
    for up in student.up:
        up.register_forward_hook(lambda module, inputs, output: below.append(output.std() / inputs[0].std()))
    _, features = student(picture, features=True)
    assert max(below) < 0.1
    for f in features.values():
        gradient = torch.autograd.grad(f.sum(), student.encoder[0].layers[0].weight, retain_graph=True)[0]
        assert gradient.abs().amax((1, 2, 3)).min() > 0
    assert (features["b"] < 0).any()  # leaky


def test_wrong_dimensions_are_refused():
    for options in ({"widths": (8,)}, {"stem_stride": 3}, {"out_channels": 1}, {"skips": "none"},
                    {"convolutions": (2, 2)}, {"convolutions": (1, 1, 0, 1, 1)}, {"widths": (8, 0)},
                    {"widths": (8, 8, 8), "convolutions": (1,) * 5}):  # fmt: skip
        with pytest.raises(ValueError, match=r"two stages|stem stride|--convolutions"):
            kd.StudentUNet(**options)


def test_every_stage_takes_a_gate_or_none_does():
    student, folded = kd.StudentUNet(stem_stride=2, widths=(4, 4, 4)), torch.rand(1, 12, 8, 8)
    _, _, own = student.correct(folded)
    assert len(own) == len(student.gate_widths) == 5
    _, _, used = student.correct(folded, own)
    assert all(torch.equal(a, b) for a, b in zip(own, used, strict=True))
    with pytest.raises(StopIteration):
        student.correct(folded, own[:-1])


def to_frames(pictures):
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize("skips", kd.SKIPS)
def test_gates_of_one_patch_are_the_plain_ones(student_file, skips):
    torch.manual_seed(0)
    student = kd.StudentUNet(stem_stride=2, widths=(8, 12, 16, 16, 24), skips=skips)
    torch.nn.init.normal_(student.output.weight, std=0.05)
    for up in student.up:
        torch.nn.init.normal_(up.weight, std=0.3)
    frames = to_frames(torch.rand(1, 3, 64, 96))
    picture = frames.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        gates = kd.FrameNetwork(student)(frames)
        finest = 0 if skips == "lateral" else 8 + 8
        assert len(gates) == finest + sum((12, 16, 16, 24, 16, 16, 12)) == sum(student.gate_widths)
        plain, restored = to_frames(student(picture).clamp(0, 1)).int(), kd.FrameNetwork(student)(frames, gates).int()
        assert (plain - restored).abs().max() <= 1
        assert (plain - restored).abs().float().mean() < 0.01
        assert (restored - frames.int()).abs().float().mean() > 1
        other = kd.FrameNetwork(student)(frames, 0.5 * gates).int()
        assert (plain - other).abs().float().mean() > 0.1


def test_gates_are_the_mean_over_patches(student_file):
    student, _ = kd.load_student(student_file)
    patches = to_frames(torch.rand(3, 3, 32, 32) * torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1, 1))
    network = kd.FrameNetwork(student)
    with torch.no_grad():
        each = torch.stack([network(patch[None]) for patch in patches])
        assert torch.allclose(network(patches), each.mean(0), atol=1e-6)
        assert each.std(0).max() > 0.01
        x, first = torch.nn.functional.pixel_unshuffle(patches.permute(0, 3, 1, 2) / 255, 2), student.encoder[0]
        for layer in first.layers:
            x = torch.nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
            x = torch.where(x > 0, x, 0.1 * x)
        by_hand = first.se(x).mean((0, 2, 3))
        assert torch.allclose(network(patches)[:8], by_hand, atol=1e-6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
def test_a_stage_in_one_pass_is_the_stage():
    torch.manual_seed(0)
    stage, picture, gate = kd.Stage(6, 8, 2), torch.randn(2, 6, 20, 30), torch.rand(1, 8, 1, 1)
    with torch.inference_mode():
        expected = picture
        for layer in stage.layers:
            expected = torch.nn.functional.conv2d(expected, layer.weight, layer.bias, padding=1)
            expected = torch.where(expected > 0, expected, 0.1 * expected)
        for forward in (stage.forward, stage.forward_in_one_pass):
            assert torch.allclose(forward(picture)[1], stage.se(expected), atol=1e-6)
            assert torch.allclose(forward(picture)[0], expected * stage.se(expected), atol=1e-6)
            assert torch.allclose(forward(picture, gate)[0], expected * gate, atol=1e-6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
@pytest.mark.parametrize("convolutions", [1, 2])
@pytest.mark.parametrize("excited", [True, False])
def test_a_stage_strides_first_and_adds_what_comes_from_below_there(excited, convolutions):
    torch.manual_seed(0)
    stage, picture, below = (
        kd.Stage(6, 8, convolutions, 2, excited),
        torch.randn(2, 6, 20, 30),
        torch.randn(2, 8, 10, 15),
    )
    given = torch.rand(1, 8, 1, 1)
    first, *others = stage.layers
    with torch.inference_mode():
        expected = torch.nn.functional.conv2d(picture, first.weight, first.bias, 2, padding=1) + below
        expected = torch.where(expected > 0, expected, 0.1 * expected)
        for layer in others:
            expected = torch.nn.functional.conv2d(expected, layer.weight, layer.bias, padding=1)
            expected = torch.where(expected > 0, expected, 0.1 * expected)
        for forward in (stage.forward, stage.forward_in_one_pass):
            features, gate = forward(picture, below=below.clone())
            assert torch.allclose(gate, stage.se(expected), atol=1e-6) if excited else gate is None
            assert torch.allclose(features, expected * gate if excited else expected, atol=1e-5)
            if excited:
                assert torch.allclose(forward(picture, given, below.clone())[0], expected * given, atol=1e-5)


@pytest.mark.parametrize("checkpoint", kd.SHIPPED)
def test_in_bf16_no_map_meets_another_type(random_frame, monkeypatch, checkpoint):
    """oneDNN refuses what differs in type, and has bf16 on some processors only; so stand-ins look and compute."""

    def convolution(x, weight, bias, padding, stride, dilation, groups, *_):
        assert x.dtype == weight.dtype == bias.dtype == torch.bfloat16
        features = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return torch.nn.functional.leaky_relu(features, kd.LEAK)

    def convolution_into(below, x, weight, bias, padding, stride, dilation, groups, *_):
        assert below.dtype == x.dtype == weight.dtype == bias.dtype == torch.bfloat16
        below += torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise", convolution)
    monkeypatch.setattr(torch.ops.mkldnn, "_convolution_pointwise_", SimpleNamespace(binary=convolution_into))
    network, frame = kd.FrameNetwork(kd.load_student(checkpoint)[0]), torch.from_numpy(random_frame(32, 48)[None])
    with torch.inference_mode():
        expected = network(frame, network(frame))
        network = network.to(torch.bfloat16)
        for stage in network.modules():
            if isinstance(stage, kd.Stage):
                stage.forward = stage.forward_in_one_pass
        restored = network(frame, network(frame))
    assert (restored.int() - expected.int()).abs().float().mean() < 0.5


def test_added_skips_need_narrower_stages():
    widths = (4, 6, 8, 10, 12)
    fewer = count(widths=widths) - count(widths=widths, skips="add")
    assert fewer == sum(9 * width * width for width in widths[:4])
    finest_gates = 2 * (4 * 1 + 1 + 1 * 4 + 4)  # the encoder's and the decoder's, of one hidden value
    assert count(widths=widths, skips="add") - count(widths=widths, skips="lateral") == finest_gates


def test_convolutions_are_one_number_or_one_a_scale():
    widths, each = (4, 6, 8, 10, 12), {}
    assert count(widths=widths, convolutions=(2,) * 5) == count(widths=widths)
    for scale in range(5):
        convolutions = tuple(3 if scale == other else 2 for other in range(5))
        each[scale] = count(widths=widths, convolutions=convolutions) - count(widths=widths)
    layers = [9 * width * width + width for width in widths]
    assert list(each.values()) == [2 * n for n in layers[:4]] + layers[4:]  # the encoder's and the decoder's
