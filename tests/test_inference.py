"""Tiles, frames, backends and picture files."""

import itertools
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from skimage.metrics import peak_signal_noise_ratio

import sharpen_kd as kd

CPU = torch.device("cpu")


@pytest.mark.parametrize("alignment", [32, 64])
@pytest.mark.parametrize(("tile", "overlap"), [(1024, 64), (512, 64), (128, 32), (100, 10), (64, 0)])
def test_tiles_cover_the_frame_once_and_share_the_overlap(tile, overlap, alignment):
    for length in (1, 31, 64, 100, 127, 129, 513, 720, 1080, 1920):
        parts = kd.tile_side(length, tile, overlap, alignment)
        taken = [part.taken for part in parts]
        size = taken[0].stop
        assert size % alignment == 0
        assert size <= max(1.5 * tile, tile + alignment) + alignment
        assert all(t.stop - t.start == size and t.start % alignment == 0 for t in taken)
        assert taken[-1].stop == -(-length // alignment) * alignment
        assert all(a.stop - b.start >= overlap and a.start < b.start for a, b in itertools.pairwise(taken))
        positions = np.arange(taken[-1].stop)
        assert np.array_equal(np.concatenate([positions[part.given] for part in parts]), np.arange(length))
        for part in parts:
            assert np.array_equal(positions[part.taken][part.inner], positions[part.given])
        for a, b in itertools.pairwise(parts):  # the cut is in the middle of what two tiles share
            assert abs((a.taken.stop - a.given.stop) - (b.given.start - b.taken.start)) <= 1
    assert [part.taken for part in kd.tile_side(1080, 0, overlap, alignment)] == [slice(0, 1088)]


def test_a_4k_frame_in_tiles_is_little_more_than_the_frame():
    student, _ = kd.load_student("quality")
    sharpener = kd.FrameSharpener(student, CPU)
    rows, columns = map(sharpener.side, (2160, 3840))
    computed = len(rows) * rows[0].taken.stop * len(columns) * columns[0].taken.stop
    assert len(rows) * len(columns) > 1
    assert computed / (2160 * 3840) < 1.1


@pytest.mark.parametrize("budget", [64, 112])
@pytest.mark.parametrize("overlap", [32, 0])
def test_tiles_of_a_local_operation_join_without_a_trace(student_file, random_frame, overlap, budget):
    student, _ = kd.load_student(student_file)
    frame = random_frame(150, 210)
    sharpener = kd.FrameSharpener(student, CPU, tile=64, overlap=overlap)
    sharpener.batch = budget**2  # as large as one tile, or as two
    started, waited, sizes = [], [], set()

    def start(tiles, *gates):
        started.append(len(waited))
        sizes.add(len(tiles))
        return lambda: waited.append(len(started)) or 255 - tiles

    sharpener.network = start
    rows, columns = map(sharpener.side, (150, 210))
    fitting = budget**2 // (rows[0].taken.stop * columns[0].taken.stop)
    assert np.array_equal(sharpener(frame), 255 - frame)
    batches = len(started) - 1  # the first are the gates
    assert batches > 1
    assert waited == [1, *range(3, batches + 2), batches + 1]  # a batch is started before the last is waited for
    assert max(sizes) == max(1, fitting)
    assert fitting > 1 or budget == 64


@pytest.mark.parametrize("skips", ["concatenate", "lateral"])
@pytest.mark.parametrize("options", [{"convolutions": (3, 2, 1, 1, 2)}, {"stem_stride": 1}, {"widths": (4,) * 3}])
def test_the_default_overlap_follows_what_an_output_can_see(options, skips):
    torch.manual_seed(0)
    student = kd.StudentUNet(**({"stem_stride": 2, "widths": (4,) * 5, "skips": skips} | options))
    torch.nn.init.normal_(student.output.weight)
    for up in student.up:
        torch.nn.init.normal_(up.weight)
    picture, side = torch.rand(1, 3, 32, 1024, requires_grad=True), student.stem_stride
    folded = torch.nn.functional.pixel_unshuffle(picture, side)
    open_gates = [torch.ones(1, 4, 1, 1)] * len(student.gate_widths)  # others see the whole picture
    correction, _, _ = student.correct(folded, open_gates)
    correction[..., 512 // side].sum().backward()
    (seen,) = picture.grad.abs().sum((0, 1, 2)).nonzero(as_tuple=True)
    reach = 512 - seen.min().item()  # 512 begins a cell of every scale; inside one a pixel sees some more on one side
    assert (3 / 4 if skips == "lateral" else 7 / 9) * reach < student.reach <= reach


@pytest.mark.parametrize("backend", ["torch", "openvino", "openvino-int8"])
@pytest.mark.parametrize(("name", "checkpoint"), [("coffee", "quality"), ("astronaut", "quality"), ("coffee", "fast")])
def test_tiled_and_whole_agree_at_1080p(photographs, name, checkpoint, backend):
    student, _ = kd.load_student(checkpoint)
    frame = np.array(photographs[name].resize((1920, 1080), Image.BICUBIC))
    whole = kd.FrameSharpener(student, CPU, tile=0, backend=backend)(frame).astype(int)
    assert np.abs(whole - frame).mean() > 0.5  # the network does something
    difference = np.abs(whole - kd.FrameSharpener(student, CPU, tile=1024, backend=backend)(frame))
    assert difference.max() <= 2
    assert difference.mean() <= 0.05


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (7, 5), (64, 64), (129, 257)])
def test_any_size(student_file, random_frame, size):
    student, _ = kd.load_student(student_file)
    frame = random_frame(*size)
    output = kd.FrameSharpener(student, CPU, tile=64, overlap=32)(frame)
    assert output.shape == frame.shape
    assert output.dtype == np.uint8


def test_a_mirrored_frame_needs_no_copy_by_hand(student_file, random_frame):
    sharpener, frame = kd.FrameSharpener(kd.load_student(student_file)[0], CPU), random_frame(64, 96)
    assert np.array_equal(sharpener(frame[..., ::-1]), sharpener(frame[..., ::-1].copy()))  # as OpenCV's BGR


@pytest.mark.parametrize("options", [{"skips": "add"}, {"skips": "lateral"}, {"stem_stride": 4}])
def test_openvino_agrees_with_pytorch(random_frame, options):
    torch.manual_seed(0)
    student = kd.StudentUNet(**({"stem_stride": 2, "widths": (4, 4, 4, 4, 4)} | options))
    torch.nn.init.normal_(student.output.weight, std=0.05)
    settings = {"tile": 96, "overlap": 32, "precision": "float32"}
    ours, theirs = (kd.FrameSharpener(student, CPU, **settings, backend=name) for name in ("torch", "openvino"))
    frame = random_frame(80, 450)
    assert len(ours.side(450)) > 2  # a tile's result must outlive the next one's start
    batches = [[len(tiles) for (tiles, _), *_ in sharpener.tiles(frame)] for sharpener in (ours, theirs)]
    assert batches == [[len(ours.side(450))], [1] * len(ours.side(450))]  # PyTorch takes a row together
    ((_, gates), *_), ((_, other_gates), *_) = next(ours.tiles(frame)), next(theirs.tiles(frame))
    assert np.allclose(gates, other_gates, atol=1e-4)
    difference = np.abs(ours(frame).astype(int) - theirs(frame))
    assert difference.max() <= 1  # a half that is rounded the other way
    assert difference.mean() < 1e-3
    assert np.abs(ours(frame).astype(int) - frame).mean() > 1


def test_int8_stays_within_a_tenth_of_a_decibel(photographs):
    student, _ = kd.load_student("fast")
    sharp = np.array(photographs["astronaut"])
    blurred = np.array(kd.PROTOCOLS["x2"](photographs["astronaut"]))
    ours, theirs = (kd.FrameSharpener(student, CPU, backend=name)(blurred) for name in ("torch", "openvino-int8"))
    assert kd.score(theirs, sharp)[0] > kd.score(ours, sharp)[0] - 0.1
    assert kd.score(ours, sharp)[0] > kd.score(blurred, sharp)[0] + 1
    assert not np.array_equal(ours, theirs)


def test_int8_keeps_black_and_white(photographs):
    student, _ = kd.load_student("quality")
    page = np.array(kd.PROTOCOLS["x2"](kd.even_sized(photographs["page"])))
    ours, theirs = (kd.FrameSharpener(student, CPU, backend=name)(page) for name in ("openvino", "openvino-int8"))
    assert kd.score(theirs, ours)[0] > 40  # 37 if ranges end at the pictures' mean extremes


@pytest.mark.parametrize("name", ["plain", "fast"])
def test_int8_takes_every_convolution(name):
    network = kd.FrameNetwork(kd.PlainLayers() if name == "plain" else kd.load_student(name)[0]).eval()
    model = kd.quantized(kd.traced(network, "openvino", True), network)
    convolutions = [node for node in model.get_ops() if node.get_type_name() == "Convolution"]
    weights = [node.input_value(1).get_node().get_type_name() for node in convolutions]  # int8 ones are scaled
    assert weights.count("Multiply") == len(weights) > 5
    for node in convolutions:
        source = node.input_value(0).get_node()
        while source.get_type_name() != "FakeQuantize":
            assert source.get_type_name() in ("Transpose", "Reshape", "MaxPool")
            source = source.input_value(0).get_node()


def test_a_signal_after_openvino_networks_have_come_and_gone():
    """OpenVINO's second Core used to leave a signal stack that was not mapped any more."""
    script = """
import gc, os, signal, numpy as np, torch, sharpen_kd as kd
make = lambda: kd.FrameSharpener(kd.PlainLayers(), torch.device("cpu"), backend="openvino")
frame = np.zeros((32, 32, 3), np.uint8)
first = make(); first(frame); second = make(); second(frame)
del first; gc.collect(); del second; gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    command = [sys.executable, "-X", "faulthandler", "-c", script]
    done = subprocess.run(command, cwd=kd.HERE, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr


def test_the_compiler_agrees_with_pytorch(random_frame):
    torch.manual_seed(0)
    layers = kd.PlainLayers()  # a student would be compiled for a minute
    ours, theirs = (kd.FrameSharpener(layers, CPU, precision="float32", backend=name) for name in ("torch", "compile"))
    frame = random_frame(64, 96)
    assert np.abs(ours(frame).astype(int) - theirs(frame)).max() <= 1
    assert np.abs(ours(frame).astype(int) - frame).mean() > 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator gives memory back at once")
def test_freed_memory_is_used_again():
    script = """
import resource, torch, sharpen_kd as kd
def pages():  # that the system maps for 64 MiB, at the best of three times
    faults = []
    for _ in range(4):
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        torch.ones(2**26, dtype=torch.uint8)
    return min(b - a for a, b in zip(faults, faults[1:]))
print(pages()); kd.keep_freed_memory(); print(pages())
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=kd.HERE, capture_output=True, text=True, check=True)
    mapped, kept = map(int, done.stdout.split())
    assert 10 * kept < mapped  # 16,384, or 32 huge ones


def test_a_missing_package_is_named(student_file, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert kd.main(["sharpen", str(kd.SAMPLES / "blurred_cat.png"), "--backend", "openvino-int8"]) == 2
    assert "pip install nncf" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openvino", None)
    command = ["--checkpoint", str(student_file)]
    picture = str(kd.SAMPLES / "blurred_cat.png")
    assert kd.main(["sharpen", picture, *command, "-o", str(tmp_path / "a.png"), "--backend", "openvino"]) == 2
    assert "pip install openvino" in capsys.readouterr().err
    assert kd.main(["export", *command, "-o", str(tmp_path / "student"), "--format", "openvino"]) == 2
    assert not list(tmp_path.iterdir())


def test_exported_files_are_the_student(tmp_path, student_file, random_frame):
    import onnxruntime

    frame = random_frame(64, 96)[None]
    expected = kd.FrameSharpener(kd.load_student(student_file)[0], CPU, precision="float32")(frame[0]).astype(int)
    command = ["export", "--checkpoint", str(student_file), "-o", str(tmp_path / "s"), "--format"]
    assert kd.main([*command, "onnx"]) == kd.main([*command, "openvino"]) == 0
    session, gates = (onnxruntime.InferenceSession(tmp_path / name) for name in ("s.onnx", "s_gates.onnx"))
    (restored,) = session.run(None, {"frames": frame, "gates": gates.run(None, {"frames": frame})[0]})
    assert np.abs(restored[0] - expected).max() <= 1
    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    model, gates = (kd.openvino_core().compile_model(tmp_path / name, "CPU", hint) for name in ("s.xml", "s_gates.xml"))
    assert np.abs(model([frame, gates([frame])[0]])[0][0] - expected).max() <= 1


def test_strength_scales_the_correction(student_file, random_frame):
    student, _ = kd.load_student(student_file)
    frame = random_frame(48, 64)
    none, half, full = (kd.FrameSharpener(student, CPU, strength=s)(frame).astype(int) for s in (0, 0.5, 1))
    assert np.array_equal(none, frame)
    inside = (full > 0) & (full < 255)
    assert np.abs(half - (frame + full) / 2)[inside].max() <= 1
    assert np.abs(full - frame).max() > 3


def test_small_frame_is_its_own_patch(random_frame):
    small = random_frame(100, 200)
    assert np.array_equal(kd.sample_patches(small, 96)[0], small)
    assert kd.sample_patches(random_frame(90, 2000), 96).shape == (2, 90, 96, 3)
    assert kd.sample_patches(random_frame(180, 190), 96).shape == (1, 180, 190, 3)  # not only its corner
    assert kd.sample_patches(random_frame(180, 290), 96).shape == (2, 96, 96, 3)


def test_patches_of_a_large_frame_are_where_its_detail_is(random_frame):
    frame = np.full((512, 640, 3), 128, np.uint8)
    frame[128:256, :256] = random_frame(128, 256)
    frame[384:, 256:384] = random_frame(128, 128, seed=1) // 2
    patches = kd.sample_patches(frame, 128, count=3)
    places = ((128, 0), (128, 128), (384, 256))
    assert patches.shape == (3, 128, 128, 3)
    assert {p.tobytes() for p in patches} == {frame[y : y + 128, x : x + 128].tobytes() for y, x in places}
    assert {p.tobytes() for p in kd.sample_patches(frame, 128)} == {p.tobytes() for p in patches[1:]}


def test_score_is_the_stated_protocol(photographs):
    sharp = np.array(photographs["coffee"].crop((0, 0, 90, 70)))
    blurred = np.array(kd.PROTOCOLS["x2"](Image.fromarray(sharp)))
    psnr, _ = kd.score(blurred, sharp)
    mse = np.mean((blurred / 255 - sharp / 255) ** 2)
    assert psnr == pytest.approx(-10 * np.log10(mse))
    assert psnr == pytest.approx(peak_signal_noise_ratio(sharp, blurred))
    assert kd.score(sharp, sharp) == (np.inf, 1)


@pytest.fixture
def run_sharpen(student_file, capsys):
    """`sharpen` with the small student; returns (exit status, standard error)."""

    def run(*arguments):
        status = kd.main(["sharpen", *map(str, arguments), "--checkpoint", str(student_file)])
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "F", "LAB"])
def test_every_mode_is_sharpened(tmp_path, run_sharpen, photographs, mode):
    image = photographs["astronaut"].resize((40, 30))
    if mode == "I;16":
        image = Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(np.array(image.convert("L")).astype(np.float32) / 255)
    elif mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    else:
        image = image.convert(mode)
    image.save(tmp_path / "in.tif")
    assert run_sharpen(tmp_path / "in.tif", "-o", tmp_path / "out.png", "--strength", "0") == (0, "")
    result = Image.open(tmp_path / "out.png")
    greys = ("1", "L", "I;16", "F")
    assert result.mode == ("L" if mode in greys else mode if mode in ("LA", "RGBA") else "RGB")
    expected = kd.frame_array(image if mode != "LAB" else photographs["astronaut"].resize((40, 30)))
    tolerance = 6 if mode == "LAB" else 1
    assert np.abs(kd.frame_array(result).astype(int) - expected).max() <= tolerance


def test_orientation_exif_profile_alpha_and_resolution_are_kept(tmp_path, run_sharpen, photographs):
    image = photographs["astronaut"].resize((40, 30)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((40, 30)))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"  # orientation: rotate by 90 degrees; maker
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "in.png", exif=exif, icc_profile=profile, dpi=(300, 300))
    assert run_sharpen(tmp_path / "in.png", "-o", tmp_path / "out.png")[0] == 0
    result = Image.open(tmp_path / "out.png")
    assert result.size == (30, 40)
    assert result.mode == "RGBA"
    assert np.array_equal(result.getchannel("A"), image.getchannel("A").rotate(-90, expand=True))
    assert result.getexif().get(0x010F) == "camera"
    assert result.getexif().get(0x0112, 1) == 1
    assert result.info["icc_profile"] == profile
    assert result.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_metadata_of_a_tiff_is_kept_and_damaged_metadata_is_not(tmp_path, run_sharpen, photographs):
    image, exif = photographs["astronaut"].resize((40, 30)), Image.Exif()
    exif[0x010F], exif[0x0112] = "camera", 6
    image.save(tmp_path / "in.tif", exif=exif)
    assert run_sharpen(tmp_path / "in.tif", "-o", tmp_path / "out.png")[0] == 0
    result = Image.open(tmp_path / "out.png")
    assert dict(result.getexif()) == {0x010F: "camera"}  # and nothing of how the TIFF is stored
    assert result.size == (30, 40)
    image.save(tmp_path / "exif.jpg", exif=b"Exif\0\0garbage!")
    image.convert("CMYK").save(tmp_path / "profile.jpg", icc_profile=b"garbage")
    image.save(tmp_path / "size.tif", dpi=(0, 0))
    for name in ("exif.jpg", "profile.jpg", "size.tif"):
        assert run_sharpen(tmp_path / name, "-o", tmp_path / "out.png", "--strength", "0") == (0, "")
        expected = kd.frame_array(kd.open_picture(tmp_path / name))
        assert np.array_equal(kd.frame_array(Image.open(tmp_path / "out.png")), expected)


def test_sixteen_bits_and_a_transparent_grey(tmp_path, run_sharpen):
    values = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(16, 64)
    Image.fromarray(values).save(tmp_path / "in.png", transparency=int(values[0, 0]))
    assert run_sharpen(tmp_path / "in.png", "-o", tmp_path / "out.png", "--strength", "0") == (0, "")
    result = Image.open(tmp_path / "out.png")
    assert np.array_equal(np.array(result.getchannel("L")), np.rint(values / 257))
    assert np.array_equal(np.array(result.getchannel("A")) == 0, values == 0)


def test_a_folder_may_be_linked_and_holds_pictures_of_many_kinds(tmp_path, run_sharpen, photographs):
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.gif", "b.png", "c.jp2"):
        photographs["astronaut"].resize((40, 30)).save(tmp_path / "elsewhere" / name)
    (tmp_path / "in/folder.png").mkdir(parents=True)  # a folder, whatever its name
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    assert run_sharpen(tmp_path / "in", "-o", tmp_path / "out")[0] == 0
    assert sorted(p.name for p in (tmp_path / "out/linked").iterdir()) == ["a.png", "b.png", "c.png"]


def test_no_picture_that_is_read_is_written(tmp_path, run_sharpen, photographs):
    (tmp_path / "in/sub").mkdir(parents=True)
    for name, picture in (("in/a.png", "astronaut"), ("in/sub/a.png", "camera")):
        photographs[picture].resize((40, 30)).save(tmp_path / name)
    before = (tmp_path / "in/sub/a.png").read_bytes()
    status, error = run_sharpen(tmp_path / "in", "-o", tmp_path / "in/sub")
    assert status == 2
    assert f"{tmp_path}/in/sub/a.png: would be overwritten" in error
    assert (tmp_path / "in/sub/a.png").read_bytes() == before
    assert len(list(tmp_path.rglob("*.png"))) == 2
    assert run_sharpen(tmp_path / "in/a.png", tmp_path / "in/a.png", "-o", tmp_path / "out")[0] == 0  # named twice


def test_folders_keep_their_relative_paths(tmp_path, run_sharpen, sharp_folder):
    assert run_sharpen(sharp_folder, "-o", tmp_path / "out")[0] == 0
    written = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.*"))
    assert written == sorted(p.relative_to(sharp_folder) for p in sharp_folder.rglob("*.png"))


def test_default_output(tmp_path, run_sharpen, photographs, monkeypatch):
    monkeypatch.setattr(kd, "SAMPLES", tmp_path / "samples")
    photographs["camera"].resize((20, 20)).save(tmp_path / "call.jpg")
    assert run_sharpen(tmp_path / "call.jpg")[0] == 0
    assert Image.open(tmp_path / "samples/call_sharpened.png").mode == "L"


def test_mistakes_are_named_and_nothing_is_written(tmp_path, run_sharpen, photographs):
    picture = tmp_path / "a.png"
    photographs["camera"].resize((20, 20)).convert("LA").save(picture)
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    before = sorted(tmp_path.iterdir())
    for arguments, named in (
        ((tmp_path / "none.png",), "none.png: no such file"),
        ((tmp_path / "a.jpg", "-o", tmp_path / "b.png"), "a.jpg: not a readable picture"),
        ((picture, "-o", picture), "a.png: would be overwritten"),
        ((tmp_path / "a.jpg", "-o", tmp_path), f"-o {tmp_path}: holds the pictures themselves"),
        ((picture, tmp_path / "a.jpg", "-o", tmp_path / "out"), "would both become"),
        ((picture, "-o", tmp_path / "a.xyz"), "cannot write the file type .xyz"),
        ((picture, "-o", tmp_path / "a.psd"), "cannot write the file type .psd"),
        ((picture, "-o", tmp_path / "b.jpg"), "b.jpg: cannot be written"),
        ((picture, "--tile", "64", "--overlap", "64"), "--tile 64 --overlap 64"),
        ((picture, "--tile", "-1"), "--tile -1: must be at least 0"),
        ((picture, "--strength", "nan"), "--strength nan: must be at least 0"),
        ((picture, "--strength", "inf"), "--strength inf: must be at least 0, and finite"),
    ):
        status, error = run_sharpen(*arguments)
        assert status == 2
        assert named in error
        assert error.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
    assert kd.main(["sharpen", str(picture), "--checkpoint", str(tmp_path / "none.pth")]) == 2
    with pytest.raises(kd.UserError, match="no such file"):
        kd.main(["sharpen", str(tmp_path / "none.png"), "--debug"])


def test_a_broken_picture_does_not_stop_the_others(tmp_path, run_sharpen, photographs):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"no picture")
    photographs["camera"].resize((20, 20)).save(tmp_path / "in/b.png")
    photographs["camera"].resize((20, 20)).convert("F").save(tmp_path / "in/aa.tif")  # floats above 1
    status, error = run_sharpen(tmp_path / "in", "-o", tmp_path / "out")
    assert status == 2
    assert "a.png: not a readable picture" in error
    assert "aa.tif: not a readable picture (pixels must be" in error
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["b.png"]
