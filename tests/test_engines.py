"""What runs a student: OpenVINO, int8 and PyTorch's compiler against plain PyTorch; exports."""

import functools
import platform
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import sharpen_kd as kd

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine_of():
    """A function that gives a shipped student's sharpener by a backend, made once: int8 takes long.

    Each call gives one of its own with the tile size that is asked for, on the same engines.
    """

    @functools.cache
    def engines(checkpoint, backend):
        student, _ = kd.load_student(checkpoint)
        return student, kd.make_engine(student, CPU, torch.float32, backend, strength=1.0)

    def make(checkpoint, backend, tile=0):
        student, made = engines(checkpoint, backend)
        sharpener = kd.FrameSharpener(student, tile=tile, precision="float32")
        sharpener.engine = made
        return sharpener

    return make


def difference(first, second):
    """The absolute difference of two 8-bit frames, by pixel."""
    return np.abs(first.astype(int) - second)


def psnr(output, sharp):
    return kd.score(output, sharp)["psnr"]


def run_script(script):
    """Run Python code beside the script, in a process of its own."""
    command = [sys.executable, "-X", "faulthandler", "-c", script]
    return subprocess.run(command, cwd=kd.HERE, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("backend", ["torch", "openvino", "openvino-int8"])
@pytest.mark.parametrize(("name", "checkpoint"), [("coffee", "quality"), ("astronaut", "fast")])
def test_tiled_and_whole_agree_at_1080p(engine_of, photographs, name, checkpoint, backend):
    blurred = np.array(kd.degrade(kd.even_sized(photographs[name]), kd.PROTOCOLS["x2"]))
    frame = np.tile(blurred, (3, 4, 1))[:1080, :1920]
    assert frame.shape == (1080, 1920, 3)
    whole = engine_of(checkpoint, backend)(frame)
    tiled = engine_of(checkpoint, backend, tile=1024)(frame)
    assert difference(whole, frame).mean() > 0.5  # the network does something
    # What gates of several stages see far away adds up, and int8 makes steps of it.
    apart = difference(whole, tiled)
    assert apart.max() <= (4 if backend == "openvino-int8" else 2)
    assert (apart > 2).mean() < 2e-5
    assert apart.mean() <= 0.05


@pytest.mark.parametrize(
    "shape",
    [
        {"kind": "plain", "width": 4, "layers": 3},
        {"widths": (4,) * 5},
        {"widths": (4,) * 5, "skips": "lateral"},
        {"widths": (4,) * 3, "stem_stride": 4},
        {"widths": (4,) * 3, "skips": "lateral", "luma": True},
    ],
    ids=["plain", "concatenate", "lateral", "stem 4", "luma"],
)
def test_openvino_agrees_with_pytorch(random_frame, shape):
    torch.manual_seed(0)
    network = kd.build_student({"stem_stride": 2} | shape)
    nn.init.normal_((network.correction if "luma" in shape else network.output).weight, std=0.05)
    settings = {"tile": 96, "overlap": 32, "precision": "float32"}
    ours = kd.FrameSharpener(network, **settings)
    theirs = kd.FrameSharpener(network, **settings, backend="openvino")
    frame = random_frame(80, 450)
    _, tiles = ours.cut(frame)
    assert len(tiles) > 2
    assert difference(ours(frame), theirs(frame)).max() <= 1  # a half rounded the other way
    assert difference(ours(frame), theirs(frame)).mean() < 1e-3
    assert difference(ours(frame), frame).mean() > 1


def test_int8_stays_within_a_twentieth_of_a_decibel(engine_of, photographs):
    sharp = photographs["astronaut"]
    blurred = np.array(kd.degrade(sharp, kd.PROTOCOLS["x2"]))
    ours = engine_of("fast", "torch")(blurred)
    theirs = engine_of("fast", "openvino-int8")(blurred)
    assert psnr(theirs, np.array(sharp)) > psnr(ours, np.array(sharp)) - 0.05
    assert psnr(ours, np.array(sharp)) > psnr(blurred, np.array(sharp)) + 1
    assert not np.array_equal(ours, theirs)


def test_int8_keeps_black_and_white(engine_of, photographs):
    sharp = kd.even_sized(photographs["page"])
    page = np.array(kd.degrade(sharp, kd.PROTOCOLS["x2"]))
    ours = engine_of("quality", "openvino")(page)
    theirs = engine_of("quality", "openvino-int8")(page)
    assert psnr(theirs, ours) > 40  # 37 if ranges end at the pictures' mean extremes


@pytest.mark.parametrize(
    ("name", "in_float"),
    [
        ("plain", set()),
        ("unet", set()),
        ("fast", {"encoder.0.layers.0", "correction", "outputs.0", "outputs.1"}),
    ],
)
def test_int8_takes_every_convolution_but_those_that_need_more(engine_of, name, in_float):
    if name == "plain":
        network = kd.FrameNetwork(kd.PlainStack()).eval()
        model = kd.quantized(kd.openvino_model(network), network.student)
    else:
        model = engine_of(name, "openvino-int8").engine.model
    kinds = {}
    for op in model.get_ops():
        layer = op.get_friendly_name().split("/")[0]
        is_gate = ".se." in layer  # stays in float
        if op.get_type_name() == "Convolution" and not is_gate:
            kinds[layer.removeprefix("__module.").removeprefix("student.")] = op
    assert len(kinds) > 5
    for layer, convolution in kinds.items():
        weights = convolution.input_value(1).get_node().get_type_name()
        source = convolution.input_value(0).get_node()
        while source.get_type_name() in ("Transpose", "Reshape", "MaxPool"):
            source = source.input_value(0).get_node()
        is_int8 = (weights == "Multiply", source.get_type_name() == "FakeQuantize")
        assert is_int8 == ((False, False) if layer in in_float else (True, True)), layer
    assert in_float <= set(kinds)


def test_openvino_wants_the_cpu():
    with pytest.raises(kd.UserError, match="add --device cpu"):
        kd.make_engine(kd.PlainStack(), torch.device("cuda"), torch.float32, "openvino", 1.0)


def test_a_signal_after_openvino_networks_have_come_and_gone():
    """OpenVINO's second Core used to leave a signal stack that was not mapped any more."""
    done = run_script("""
import gc, os, signal
import numpy as np
import sharpen_kd as kd

def make():
    return kd.FrameSharpener(kd.PlainStack(), backend="openvino")

frame = np.zeros((32, 32, 3), np.uint8)
first = make()
first(frame)
second = make()
second(frame)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
os.kill(os.getpid(), signal.SIGUSR1)
""")
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr


def test_the_compiler_agrees_with_pytorch(random_frame):
    torch.manual_seed(0)
    stack = kd.PlainStack(layers=3)  # a U-Net would be compiled for a minute
    nn.init.normal_(stack.output.weight, std=0.05)
    ours = kd.FrameSharpener(stack, precision="float32")
    theirs = kd.FrameSharpener(stack, precision="float32", backend="compile")
    frame = random_frame(64, 96)
    assert difference(ours(frame), theirs(frame)).max() <= 1
    assert difference(ours(frame), frame).mean() > 1


def test_the_compiler_is_missed_before_any_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert kd.main(["fps", "--backend", "compile", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--backend compile: needs a C++ compiler; install" in printed.err
    with pytest.raises(kd.UserError, match="install"):
        kd.FrameSharpener(kd.PlainStack(), backend="compile")
    for compiler in (f"{sys.executable} --with-an-argument", sys.executable):
        monkeypatch.setenv("CXX", compiler)
        kd.require_compiler()
    monkeypatch.setenv("CXX", '"unbalanced')
    with pytest.raises(kd.UserError, match="install"):
        kd.require_compiler()


def test_backends_of_the_cpu_are_refused_before_any_other_is_timed(monkeypatch):
    monkeypatch.setattr(kd, "require_packages", lambda packages, wanted: None)
    config = kd.FpsConfig(backend=("torch", "openvino"))
    with pytest.raises(kd.UserError, match="--backend openvino: computes on the CPU"):
        kd.fps_backends(config, torch.device("cuda"))
    assert kd.fps_backends(config, torch.device("cpu")) == config.backend


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back at once"
)
def test_freed_memory_is_used_again():
    script = """
import resource, torch
import sharpen_kd as kd

def pages():
    # that the system maps for 64 MiB, at the best of three times
    faults = []
    for _ in range(4):
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        torch.ones(2**26, dtype=torch.uint8)
    return min(b - a for a, b in zip(faults, faults[1:]))

print(pages())
kd.keep_freed_memory()
print(pages())
"""
    shares = []  # of the pages mapped before; where the heap has no room to grow it helps nothing
    for _ in range(3):
        mapped, kept = map(int, run_script(script).stdout.split())
        shares.append(kept / mapped)
    assert min(shares) < 0.1  # of 16,384 pages, or of 32 huge ones


def test_every_command_keeps_freed_memory(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(kd, "keep_freed_memory", lambda: calls.append(1))
    assert kd.main(["prepare", str(tmp_path / "none")]) == 2
    assert calls == [1]


# --- Missing packages -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["sharpen", "PICTURE", "--backend", "openvino"], "openvino"),
        (["sharpen", "PICTURE", "--backend", "openvino-int8"], "nncf"),
        (["fps", "--backend", "openvino"], "openvino"),
        (["fps", "--backend", "torch", "openvino-int8"], "nncf"),
        (["fps", "--plot", "PLOT"], "matplotlib"),
        (["export", "-o", "FILE"], "onnx"),
        (["export", "-o", "FILE", "--format", "openvino"], "openvino"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_missing_package_is_named_before_any_work(
    arguments, package, student_file, photographs, tmp_path, monkeypatch, capsys
):
    photographs["camera"].resize((20, 20)).save(tmp_path / "in.png")
    monkeypatch.setitem(sys.modules, package, None)
    places = {
        "PICTURE": tmp_path / "in.png",
        "PLOT": tmp_path / "fps.png",
        "FILE": tmp_path / "student",
    }
    arguments = [str(places.get(word, word)) for word in arguments]
    assert kd.main([*arguments, "--checkpoint", str(student_file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith(f"pip install {package}\n")
    assert printed.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


# --- Exports --------------------------------------------------------------------------------------


def test_exported_files_are_the_student(tmp_path, student_file, random_frame, capsys):
    sharpener = kd.load_sharpener(student_file, precision="float32")
    frame, ((row, column),) = sharpener.cut(random_frame(64, 96))
    expected = sharpener(random_frame(64, 96))
    given = (row.inner, column.inner)

    command = ["export", "--checkpoint", str(student_file), "-o"]
    assert kd.main([*command, str(tmp_path / "stud.onnx")]) == 0
    assert kd.main([*command, str(tmp_path / "LOUD.ONNX")]) == 0
    assert kd.main([*command, str(tmp_path / "stud"), "--format", "openvino"]) == 0
    assert kd.main([*command, str(tmp_path / "LOUD.XML"), "--format", "openvino"]) == 0
    written = sorted(path.name for path in tmp_path.iterdir())
    model = ["LOUD.bin", "LOUD.xml", "stud.bin", "stud.onnx", "stud.xml"]
    assert written == ["LOUD.ONNX", *model]
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'stud.onnx'}\n" in printed
    assert "sides multiples of 32" in printed
    assert '"f16"' not in (tmp_path / "stud.xml").read_text()  # all weights as they are

    session = onnxruntime.InferenceSession(tmp_path / "stud.onnx")
    (restored,) = session.run(["restored"], {"frames": frame[None]})
    assert difference(restored[0][given], expected).max() <= 1

    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compile_model = kd.openvino_core().compile_model
    restored = compile_model(tmp_path / "stud.xml", "CPU", hint)([frame[None]])[0]
    assert difference(restored[0][given], expected).max() <= 1


def test_a_name_of_no_format_is_refused(tmp_path, capsys):
    assert kd.main(["export", "-o", str(tmp_path / "a.tflite")]) == 2
    assert "a.tflite: a name for --format onnx ends in .onnx" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "format_", "other"), [("a.xml", "onnx", "openvino"), ("a.ONNX", "openvino", "onnx")]
)
def test_a_name_of_the_other_format_is_refused(tmp_path, name, format_, other, capsys):
    assert kd.main(["export", "-o", str(tmp_path / name), "--format", format_]) == 2
    remedy = f"{name}: is a name for another format; add --format {other}\n"
    assert capsys.readouterr().err.endswith(remedy)
    assert list(tmp_path.iterdir()) == []


def test_a_plain_stack_is_exported_to_one_file(tmp_path, random_frame):
    torch.manual_seed(0)
    stack = kd.PlainStack(stem_stride=2, width=8, layers=3)
    nn.init.normal_(stack.output.weight, std=0.05)
    checkpoint = tmp_path / "plain.pth"
    torch.save({"network": stack.config, "params": stack.state_dict()}, checkpoint)

    target = tmp_path / "out/plain.onnx"
    assert kd.main(["export", "--checkpoint", str(checkpoint), "-o", str(target)]) == 0
    assert [path.name for path in target.parent.iterdir()] == ["plain.onnx"]

    sharpener = kd.load_sharpener(checkpoint, precision="float32")
    expected = sharpener(random_frame(50, 70))
    frame, ((row, column),) = sharpener.cut(random_frame(50, 70))
    frames = np.stack([frame, frame[::-1]])  # a batch may have any size too
    (restored,) = onnxruntime.InferenceSession(target).run(None, {"frames": frames})
    assert difference(restored[0][row.inner, column.inner], expected).max() <= 1
    assert difference(restored[1], restored[0]).max() > 1
    assert difference(expected, random_frame(50, 70)).mean() > 1
