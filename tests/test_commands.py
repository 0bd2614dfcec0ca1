"""`eval`, `fps` and the command line as a whole, on real pictures."""

import csv
import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import sharpen_kd as kd


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_json(path):
    """The content of a JSON file, which may not hold what JSON does not know."""

    def refuse(name):
        pytest.fail(f"{path} holds {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


def plain_means(scores):
    """The mean of each metric, over finite scores."""
    return {name: statistics.fmean(each[name] for each in scores) for name in ("psnr", "ssim")}


# --- Scores ---------------------------------------------------------------------------------------


def test_a_score_is_scikit_images_psnr_and_ssim(photographs):
    sharp = photographs["coffee"].crop((0, 0, 90, 70))
    blurred = np.array(kd.degrade(sharp, kd.PROTOCOLS["x2"]))
    sharp = np.array(sharp)
    scores = kd.score(blurred, sharp)
    mean_square = np.mean((blurred / 255 - sharp / 255) ** 2)
    assert list(scores) == ["psnr", "ssim"]
    assert scores["psnr"] == pytest.approx(-10 * np.log10(mean_square))
    assert scores["psnr"] == pytest.approx(peak_signal_noise_ratio(sharp, blurred))
    assert scores["ssim"] == structural_similarity(sharp, blurred, channel_axis=2)


def test_equal_frames_score_infinitely_many_decibels_without_a_warning(recwarn):
    frame = np.full((8, 8, 3), 90, np.uint8)
    assert kd.score(frame, frame) == {"psnr": math.inf, "ssim": 1}
    assert len(recwarn) == 0


def test_an_equal_picture_does_not_make_the_mean_infinite():
    assert kd.mean_psnr([30.0, 20.0]) == 25.0
    assert kd.mean_psnr([math.inf, 20.0]) == pytest.approx(10 * np.log10(2 / 0.01))
    assert kd.mean_psnr([math.inf] * 2) == math.inf


def test_json_holds_no_infinite_numbers(tmp_path):
    content = {"a": math.inf, "b": [-math.inf, {"c": math.nan}], "d": 1.5}
    kd.write_json(content, tmp_path / "new/scores.json")
    assert read_json(tmp_path / "new/scores.json") == {
        "a": None,
        "b": [None, {"c": None}],
        "d": 1.5,
    }


# --- Packages -------------------------------------------------------------------------------------


def test_a_missing_base_package_costs_one_line():
    command = [sys.executable, "-I", "-S", kd.__file__, "--help"]  # without site-packages
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    requirements = kd.Path(kd.__file__).with_name("requirements.txt")
    message = f"numpy is not installed; pip install -r {requirements}"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"sharpen_kd: error: {message}\n"


# --- eval -----------------------------------------------------------------------------------------


def scores_by_protocol(path):
    return {protocol: result["scores"] for protocol, result in read_json(path).items()}


def test_eval_scores_and_pictures(tmp_path, data_root, student_file, tiny_teacher, capsys):
    out = tmp_path / "out"
    command = ["eval", "--data-root", str(data_root), "--checkpoint", str(student_file)]
    command += ["--teacher", "--teacher-weights", str(tiny_teacher), "--save-images"]
    command += ["--output-dir", str(out), "--json", str(tmp_path / "scores.json")]
    assert kd.main(command) == 0

    result = read_json(tmp_path / "scores.json")
    assert list(result) == ["images", "scores"]
    assert result["images"] == 8
    scores = result["scores"]
    assert list(scores) == ["all", "photo", "text"]
    assert list(scores["all"]) == ["input", "teacher", "student"]
    pairs = kd.find_pairs(data_root / "test")
    inputs = [kd.score(*pair.load()) for pair in pairs]
    assert scores["all"]["input"] == pytest.approx(plain_means(inputs))
    assert scores["text"]["input"] == pytest.approx(plain_means(inputs[4:]))

    # The saved pictures are what was scored.
    saved = []
    for pair in pairs:
        picture = np.array(Image.open(out / f"{pair.key}.png"))
        saved.append(kd.score(picture, pair.load()[1]))
    assert scores["all"]["student"] == pytest.approx(plain_means(saved))

    rows = read_csv(out / "scores.csv")
    assert [row["picture"] for row in rows] == [pair.key for pair in pairs]
    assert [row["category"] for row in rows] == ["photo"] * 4 + ["text"] * 4
    assert float(rows[3]["student_psnr"]) == pytest.approx(saved[3]["psnr"])
    assert {"teacher_psnr", "teacher_ssim"} <= rows[0].keys()

    printed = capsys.readouterr().out
    titles = [line.split()[0] for line in printed.splitlines()[-4:]]
    assert titles == ["pairs", "all", "photo", "text"]
    student = scores["all"]["student"]
    assert f"{student['psnr']:.2f} / {student['ssim']:.4f}" in printed

    # Four panels: blurred, teacher, student, sharp.
    assert sorted(path.name for path in (out / "side_by_side").iterdir()) == [
        "photo.png",
        "text.png",
    ]
    sheet = np.array(Image.open(out / "side_by_side/photo.png"))
    assert sheet.shape == (24 + 96 + 4 + 96, 4 * 100 - 4, 3)
    _, sharp = pairs[0].load()  # the first of its category
    shown = sheet[24:120, 300:396]
    assert (shown == sharp).all(2).mean() > 0.9  # all but the red square


def test_evals_teacher_is_the_weight_file_that_is_named(
    tmp_path, data_root, student_file, tiny_teacher, tiny_restormer
):
    command = ["eval", "--data-root", str(data_root), "--checkpoint", str(student_file)]
    command += ["--teacher-weights", str(tiny_teacher), "--device", "cpu"]
    command += ["--precision", "float32", "--output-dir", str(tmp_path)]
    assert kd.main(command) == 0
    teacher = kd.teacher_frames(tiny_restormer, torch.device("cpu"), "float32")
    blurred, sharp = kd.find_pairs(data_root / "test")[5].load()
    expected = kd.score(teacher(blurred), sharp)["psnr"]
    assert float(read_csv(tmp_path / "scores.csv")[5]["teacher_psnr"]) == pytest.approx(expected)


def test_evals_student_of_no_strength_is_the_input(tmp_path, data_root, student_file):
    command = ["eval", "--data-root", str(data_root), "--checkpoint", str(student_file)]
    command += ["--output-dir", str(tmp_path), "--json", str(tmp_path / "s.json")]
    assert kd.main([*command, "--strength", "0"]) == 0
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]["all"]
    assert scores["student"] == scores["input"]


def test_eval_resize_is_the_reports_protocol(tmp_path, data_root, student_file, capsys):
    command = ["eval", "--data-root", str(data_root), "--checkpoint", str(student_file)]
    command += ["--output-dir", str(tmp_path), "--json", str(tmp_path / "scores.json")]
    assert kd.main([*command, "--resize", "48"]) == 0

    expected = []
    for pair in kd.find_pairs(data_root / "test"):
        resized = [Image.fromarray(image).resize((48, 48)) for image in pair.load()]
        expected.append(kd.score(*map(np.array, resized)))
    scores = read_json(tmp_path / "scores.json")["scores"]
    assert scores["all"]["input"] == pytest.approx(plain_means(expected))

    assert kd.main([*command, "--resize", "5"]) == 2
    assert "--resize 5: SSIM needs" in capsys.readouterr().err


def test_eval_degrades_sharp_pictures_by_protocol(tmp_path, sharp_folder, student_file, capsys):
    (tmp_path / "test").symlink_to(sharp_folder)
    command = ["eval", "--data-root", str(tmp_path), "--checkpoint", str(student_file)]
    command += ["--protocol", "x3", "sharp", "--output-dir", str(tmp_path)]
    assert kd.main([*command, "--json", str(tmp_path / "scores.json")]) == 0

    expected = []
    for path in sorted(sharp_folder.rglob("*.png")):
        sharp = Image.open(path)
        blurred = sharp.resize((32, 32)).resize((96, 96))
        expected.append(kd.score(np.array(blurred), np.array(sharp)))
    scores = scores_by_protocol(tmp_path / "scores.json")
    assert list(scores) == ["x3", "sharp"]
    assert scores["x3"]["all"]["input"] == pytest.approx(plain_means(expected))
    assert scores["sharp"]["all"]["input"] == {"psnr": None, "ssim": 1.0}  # infinitely many dB
    assert 10 < scores["sharp"]["all"]["student"]["psnr"] < 60

    rows = read_csv(tmp_path / "scores.csv")
    assert [row["protocol"] for row in rows] == ["x3"] * 8 + ["sharp"] * 8
    titles = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert titles == ["x3", "all", "photo", "text", "sharp", "all", "photo", "text"]


def test_eval_scores_under_conditions(tmp_path, sharp_folder, student_file):
    command = ["eval", "--data-root", str(sharp_folder), "--checkpoint", str(student_file)]
    command += ["--output-dir", str(tmp_path), "--json", str(tmp_path / "scores.json")]
    assert kd.main([*command, "--protocol", *kd.CONDITIONS]) == 0
    scores = scores_by_protocol(tmp_path / "scores.json")
    assert list(scores) == ["x2-cut", "x2-caption", "x2-grey", "x2-border"]

    expected = {name: [] for name in scores}
    for path in sorted(sharp_folder.rglob("*.png")):
        sharp = Image.open(path)
        blurred = sharp.resize((48, 48)).resize((96, 96))
        frames = np.array(blurred), np.array(sharp)
        grey = [np.array(image.convert("L").convert("RGB")) for image in (blurred, sharp)]
        outer = [frame[[*range(8), *range(88, 96)]] for frame in frames]
        captioned = [kd.with_caption(frame) for frame in frames]
        covered = (captioned[0] == captioned[1]).all(2)
        assert 0.05 < covered.mean() < 0.5
        changed = (captioned[1] != frames[1]).any(2)
        assert not changed[:, :12].any()
        assert not changed[:, 84:].any()
        expected["x2-cut"].append(kd.score(*(frame[1:, 1:] for frame in frames)))
        expected["x2-caption"].append(kd.score(*captioned))
        expected["x2-grey"].append(kd.score(*grey))
        expected["x2-border"].append(kd.score(*outer))
    for name, of_pictures in expected.items():
        assert scores[name]["all"]["input"] == pytest.approx(plain_means(of_pictures))
        assert scores[name]["all"]["student"] != scores[name]["all"]["input"]


def test_eval_of_a_plain_folder_needs_no_test_folder_in_it(tmp_path, sharp_folder, student_file):
    command = ["eval", "--data-root", str(sharp_folder), "--checkpoint", str(student_file)]
    command += ["--protocol", "x2", "--output-dir", str(tmp_path)]
    assert kd.main(command) == 0
    assert len(read_csv(tmp_path / "scores.csv")) == 8


def test_eval_without_a_dataset_takes_the_samples_and_says_so(
    tmp_path, student_file, monkeypatch, capsys
):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/README.md").write_text("no pictures here")
    monkeypatch.setattr(kd, "DATASET", tmp_path / "dataset")
    command = ["eval", "--data-root", str(tmp_path / "dataset"), "--checkpoint", str(student_file)]
    assert kd.main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    originals = kd.SAMPLES / "originals"
    said = (
        f"No pictures in {tmp_path / 'dataset'}: scoring the five in {originals}; see --data-root"
    )
    assert said in capsys.readouterr().out
    rows = read_csv(tmp_path / "out/scores.csv")
    categories = ["animals", "games", "nature", "people", "text"]
    assert [row["category"] for row in rows] == categories
    assert {row["protocol"] for row in rows} == {"x2"}


def test_eval_by_protocol_asks_for_pictures_and_not_for_pairs(tmp_path, student_file, capsys):
    command = ["eval", "--data-root", str(tmp_path), "--checkpoint", str(student_file)]
    command += ["--output-dir", str(tmp_path / "out")]
    assert kd.main([*command, "--protocol", "x2"]) == 2
    error = capsys.readouterr().err
    assert "no sharp pictures in this folder" in error
    assert "pair" not in error
    assert kd.main(command) == 2
    assert "no blurred/sharp pairs" in capsys.readouterr().err


@pytest.fixture
def third_metric(monkeypatch):
    """A metric beside PSNR and SSIM: the largest error, of which the worst picture counts."""

    def largest_error(output, sharp):
        return float(np.abs(output.astype(int) - sharp).max())

    monkeypatch.setitem(kd.METRICS, "worst", kd.Metric(largest_error, max, 1))
    return largest_error


def test_a_new_metric_is_in_every_result(tmp_path, data_root, student_file, third_metric, capsys):
    command = ["eval", "--data-root", str(data_root), "--checkpoint", str(student_file)]
    command += ["--output-dir", str(tmp_path), "--json", str(tmp_path / "scores.json")]
    assert kd.main(command) == 0
    worst = max(third_metric(*pair.load()) for pair in kd.find_pairs(data_root / "test"))

    scores = read_json(tmp_path / "scores.json")["scores"]
    assert scores["all"]["input"]["worst"] == worst
    rows = read_csv(tmp_path / "scores.csv")
    assert max(float(row["input_worst"]) for row in rows) == worst
    assert max(float(row["student_worst"]) for row in rows) == scores["all"]["student"]["worst"]
    assert f" / {worst:.1f}" in capsys.readouterr().out


def test_a_tables_columns_stay_apart(third_metric, capsys):
    means = {"psnr": 28.123, "ssim": 0.91234, "worst": 123.45}
    kd.print_table("pairs", {"all": {"input": means, "student": means}})
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"all +28\.12 / 0\.9123 / 12\d\.\d +28\.12 / 0\.9123 / 12\d\.\d", line)


def test_the_sheet_magnifies_what_changed_most():
    blurred = np.full((100, 120, 3), 90, np.uint8)
    sharp = blurred.copy()
    sharp[50:60, 96:106] = 250  # in the block of 24 pixels that starts at row 48, column 96
    sheet = np.array(kd.side_by_side({"blurred": blurred, "sharp": sharp}, detail=24))
    assert sheet.shape == (24 + 100 + 4 + 120, 2 * 124 - 4, 3)
    assert (sheet[128:, :120] == 90).all()
    magnified = sheet[128:, 124:]
    assert (magnified == 250).all(2).sum() == 50 * 50  # ten pixels at five to one
    assert (magnified[10:60, 0:50] == 250).all()


# --- fps ------------------------------------------------------------------------------------------


@pytest.fixture
def quick_fps(monkeypatch):
    """Small frames, and PyTorch in the place of every backend: int8 alone would take a minute."""
    make_engine = kd.make_engine

    def make(student, device, precision, backend, strength):
        return make_engine(student, device, precision, "torch", strength)

    monkeypatch.setattr(kd, "make_engine", make)
    monkeypatch.setattr(kd, "FPS_SIZES", ((64, 96), (192, 256)))


def test_fps_rows(tmp_path, student_file, sharp_folder, capsys, quick_fps):
    (tmp_path / "test").symlink_to(sharp_folder)
    backends = ("torch", "openvino", "openvino-int8")
    command = ["fps", "--checkpoint", str(student_file), "--device", "cpu"]
    command += ["--backend", *backends, "--frames", "2", "--warmup", "1", "--tile", "128"]
    assert kd.main([*command, "--json", str(tmp_path / "fps.json")]) == 0

    rows = read_json(tmp_path / "fps.json")["rows"]
    small, large = (96, 64), (256, 192)
    whole = [*itertools.product((small, large), (kd.YARDSTICK, "student"), (False,))]
    cases = [*whole, (large, "student", True)]
    found = [(r["backend"], (r["width"], r["height"]), r["checkpoint"], r["tiled"]) for r in rows]
    assert found == [(backend, *case) for backend in backends for case in cases]
    for row in rows:
        pixels = row["height"] * row["width"]
        operations = 2 * row["macs_per_pixel"] * pixels
        assert row["fps"] == pytest.approx(1000 / row["frame_ms"])
        assert row["gflops"] == pytest.approx(operations / row["network_ms"] / 1e6)
        assert row["network_ms"] > 0
        assert row["frame_ms"] <= row["frame_ms_p95"]
    precisions = [rows[number]["precision"] for number in (0, 5, 10)]
    assert precisions[0] == precisions[1] in ("float32", "bfloat16")
    assert precisions[2] == "int8"
    for number in range(0, len(rows), 5):  # five rows a backend, the yardstick first
        assert {row["plain_ms"] for row in rows[number : number + 2]} == {rows[number]["frame_ms"]}
        plain = rows[number + 2]["frame_ms"]
        assert {row["plain_ms"] for row in rows[number + 2 : number + 5]} == {plain}
    bests = {row["best_gflops"] for row in rows}
    assert len(bests) == len(backends) * 2  # timed beside the networks

    printed = capsys.readouterr().out
    student = kd.load_student(student_file)[0]
    assert f"student: {sum(p.numel() for p in student.parameters()):,} parameters" in printed
    assert re.search(r"3x3 convolutions in \S+: (\d+ \(\d+ wide\)(, )?){5} GFLOP/s", printed)
    percent, ratio = re.findall(r"student .* tiled .* (\d+)% +([\d.]+)\n", printed)[0]
    of_best = rows[4]["gflops"] / rows[4]["best_gflops"]
    assert float(percent) == pytest.approx(100 * of_best, abs=0.6)
    assert float(ratio) == pytest.approx(rows[4]["frame_ms"] / rows[4]["plain_ms"], abs=0.006)


def test_fps_times_the_path_of_a_clip(tmp_path, student_file, capsys, quick_fps):
    av = pytest.importorskip("av")
    clip = tmp_path / "clip.mkv"
    with av.open(clip, "w") as file:
        stream = file.add_stream("ffv1", rate=25, width=48, height=32, pix_fmt="bgr0")
        for level in range(7):
            pixels = np.full((32, 48, 3), 30 * level, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    command = ["fps", "--clip", str(clip), "--checkpoint", str(student_file), "--backend", "torch"]
    command += ["--device", "cpu", "--size", "64x48", "--json", str(tmp_path / "fps.json")]
    assert kd.main(command) == 0
    (row,) = read_json(tmp_path / "fps.json")["rows"]
    assert (row["width"], row["height"], row["frames"]) == (64, 48, 7)
    assert row["checkpoint"] == "student"
    assert row["fps"] > 0
    assert f"7 frames, {row['fps']:>6.1f} a second" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mkv", "fps.json"]

    picture = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(picture)
    mistakes = (
        (["--plot", str(tmp_path / "plot.png")], "--clip, --plot"),
        (["--size", "64"], "--size 64: write it as WIDTHxHEIGHT"),
        (["--clip", str(tmp_path)], f"--clip {tmp_path}: no clip's file (.mp4 "),
        (["--clip", str(picture)], f"--clip {picture}: no clip's file (.mp4 "),
        (["--clip", str(tmp_path / "none.mkv")], "none.mkv: no such file"),
    )
    for extra, named in mistakes:
        assert kd.main([*command, *extra]) == 2
        printed = capsys.readouterr()
        assert named in printed.err
        assert printed.out == ""


def test_fps_draws_quality_beside_speed(tmp_path, student_file, sharp_folder, capsys, quick_fps):
    (tmp_path / "test").symlink_to(sharp_folder)
    (tmp_path / "train").symlink_to(sharp_folder)
    command = ["fps", "--checkpoint", str(student_file), "--device", "cpu", "--backend", "torch"]
    command += ["--frames", "1", "--warmup", "0", "--data-root", str(tmp_path)]
    assert kd.main([*command, "--plot", str(tmp_path / "fps.png")]) == 0

    pairs = kd.find_sharp(sharp_folder, kd.PROTOCOLS["x2"])
    means = kd.format_scores(plain_means([kd.score(*pair.load()) for pair in pairs]))
    printed = capsys.readouterr().out
    assert re.search(rf"\ninput +[\d.]+ ms   {means} at x2, 8 pictures\n", printed)
    assert re.search(r"unsharp mask: radius \S+, \d+ % is best on 1 other pictures", printed)
    assert re.search(r"\nunsharp mask +[\d.]+ ms", printed)
    assert re.search(r"\nstudent, torch +[\d.]+ ms", printed)
    assert kd.YARDSTICK + "," not in printed
    assert Image.open(tmp_path / "fps.png").size[0] > 500


def test_the_unsharp_mask_is_the_best_of_those_tried(photographs):
    sharp = photographs["coffee"].crop((0, 0, 128, 128))
    frames = [(np.array(kd.degrade(sharp, kd.PROTOCOLS["x2"])), np.array(sharp))]
    mask = kd.best_unsharp_mask(frames)
    best = kd.frame_psnr(mask(frames[0][0]), frames[0][1])
    others = [kd.unsharp_mask(r, p) for r, p in itertools.product((0.5, 1, 3), (25, 100, 150))]
    assert best >= max(kd.frame_psnr(other(frames[0][0]), frames[0][1]) for other in others)
    assert best > kd.frame_psnr(*frames[0])


def test_functions_take_turns_and_the_warm_up_is_not_counted():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    config = kd.FpsConfig(warmup=1, frames=3)
    timings = kd.time_in_turns(functions, torch.device("cpu"), config)
    assert calls == ["a", "b"] * 4
    assert all(0 < timing.median <= timing.late for timing in timings.values())

    waits = iter((0.2, 0.0, 0.0, 0.0))
    functions = {"slow at first": lambda: time.sleep(next(waits))}
    timings = kd.time_in_turns(functions, torch.device("cpu"), config)
    assert timings["slow at first"].late < 100  # milliseconds


@pytest.mark.parametrize("stride", [2, 4])
def test_fps_of_an_untrained_student(tmp_path, capsys, monkeypatch, stride):
    monkeypatch.setattr(kd, "FPS_SIZES", ((64, 64),))
    command = ["fps", "--backend", "torch", "--frames", "1", "--warmup", "0"]
    command += ["--base-channels", "16", "--stem-stride", str(stride)]
    assert kd.main([*command, "--json", str(tmp_path / "fps.json")]) == 0
    expected = kd.multiply_adds_per_pixel(kd.StudentUNet(base_channels=16, stem_stride=stride))
    assert f"c=16 r={stride}: " in capsys.readouterr().out
    assert read_json(tmp_path / "fps.json")["rows"][1]["macs_per_pixel"] == expected


def test_fps_takes_the_backends_that_are_installed_and_start_quickly(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert kd.fps_backends(kd.FpsConfig(), cpu) == ["torch", "openvino"]
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert kd.fps_backends(kd.FpsConfig(), cpu) == ["torch"]
    assert kd.fps_backends(kd.FpsConfig(), torch.device("cuda")) == ["torch"]


def test_threads_are_as_many_as_is_asked_for():
    before = torch.get_num_threads()
    for number in (1, 2):
        kd.pick_device(kd.DeviceConfig(device="cpu", threads=number))
        assert torch.get_num_threads() == number
    torch.set_num_threads(before)


def test_files_of_one_name_are_not_confused(tmp_path, student_file, capsys):
    files = [tmp_path / folder / "best.pth" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        shutil.copy(student_file, file)
    assert kd.main(["fps", "--checkpoint", *map(str, files)]) == 2
    assert "two files of one name" in capsys.readouterr().err


def test_frames_are_pictures():
    frames = kd.sample_frames(90, 160)
    assert len(frames) == 3
    assert all(frame.shape == (90, 160, 3) for frame in frames)
    assert all(frame.std() > 20 for frame in frames)


# --- Files ----------------------------------------------------------------------------------------


def test_files_to_write_are_settled_before_the_work(tmp_path, data_root, student_file, capsys):
    (tmp_path / "file").write_text("")
    mistakes = {
        ("fps", "--plot", tmp_path / "speed.jpeg2"): "speed.jpeg2: name a .png",
        ("fps", "--json", tmp_path / "file/fps.json"): "file",
        ("export", "-o", "."): "-o .: name a file",
        ("eval", "--data-root", data_root, "--json", tmp_path): f"{tmp_path}: cannot be written",
    }
    for arguments, named in mistakes.items():
        assert kd.main([*map(str, arguments), "--checkpoint", str(student_file)]) == 2
        printed = capsys.readouterr()
        assert named in printed.err
        assert printed.out == ""


def test_folders_of_results_are_made(tmp_path, data_root, student_file):
    command = ["eval", "--data-root", str(data_root), "--checkpoint", str(student_file)]
    command += [
        "--output-dir",
        str(tmp_path / "scores"),
        "--json",
        str(tmp_path / "a/b/scores.json"),
    ]
    assert kd.main(command) == 0
    assert read_json(tmp_path / "a/b/scores.json")["images"] == 8


def test_wrong_files_are_named_in_one_line(tmp_path, data_root, student_file, capsys):
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"params": {}}, tmp_path / "other.pth")
    evaluate = ["eval", "--data-root", str(data_root)]
    mistakes = {
        ("fps", "--checkpoint", "text.pth"): "text.pth: not a PyTorch weight file",
        ("fps", "--checkpoint", "none.pth"): "none.pth: no such file",
        ("export", "--checkpoint", "list.pth"): "list.pth: holds no dictionary",
        (
            *evaluate,
            "--checkpoint",
            "other.pth",
        ): "other.pth: not a student of this script (it has no 'network')",
        (
            *evaluate,
            "--teacher-weights",
            "none.pth",
        ): "none.pth: no such file; get motion_deblurring",
        (*evaluate, "--teacher-weights", "other.pth"): "other.pth: not the weights of a Restormer",
    }
    for arguments, named in mistakes.items():
        arguments = [str(tmp_path / a) if a.endswith(".pth") else a for a in arguments]
        assert kd.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("sharpen_kd: error: ")
        assert error.count("\n") == 1
        assert f"{tmp_path}/{named}" in error


# --- The command line -----------------------------------------------------------------------------


def test_help_shows_every_flag_and_default(capsys):
    defaults = {"train": ("0.0002", "GoPro_dataset", "0", "0.0"), "sharpen": ("2048", "1.0")}
    for name, config_class in kd.CONFIGS.items():
        with pytest.raises(SystemExit) as stop:
            kd.main([name, "--help"])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        flags = [item for item in dataclasses.fields(config_class) if item.metadata]
        assert len(flags) > 2
        for item in flags:
            assert item.name.replace("_", "-") in text or item.name in text
        for default in defaults.get(name, ()):
            assert f"(default: {default})" in text


def test_trains_help_explains_the_presets(capsys):
    with pytest.raises(SystemExit):
        kd.main(["train", "--help"])
    text = "".join(capsys.readouterr().out.split())  # lines end at spaces and at hyphens
    for name, preset in kd.PRESETS.items():
        assert "".join(f"--preset {name}: {preset.about}.".split()) in text


def test_every_command_has_settings_and_a_function():
    assert kd.COMMANDS.keys() == kd.CONFIGS.keys()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "COMMAND"),
        (["sharpn"], "sharpn"),
        (["train", "--epocs", "3"], "--epocs"),
        (["train", "--epochs", "1.5"], "--epochs: 1.5 is not a whole number"),
        (["train", "--epochs", "0"], "--epochs: 0 must be at least 1"),
        (["train", "--seed", "4294967296"], "--seed: 4294967296 must be at most 4294967295"),
        (["train", "--widths", "1" + "0" * 400], "0 must be at most 4096"),
        (["sharpen", ""], "inputs: an empty name"),
        (["train", "--run-dir", ""], "--run-dir: an empty name"),
        (["train", "--learning-rate", "0"], "--learning-rate: 0 must be above 0"),
        (["train", "--lambda-kl", "nan"], "--lambda-kl: nan must be at least 0"),
        (["eval", "--protocol", "x5"], "--protocol: invalid choice: 'x5'"),
        (["ablate", "--validate-every", "3"], "--validate-every"),
        (["ablate", "--seed", "3"], "--seed"),  # not an abbreviation of --seeds
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_line_and_exit_status_2(arguments, named, monkeypatch, capsys):
    def work(config):
        pytest.fail(f"{arguments} were accepted")

    monkeypatch.setattr(kd, "COMMANDS", dict.fromkeys(kd.COMMANDS, work))
    assert kd.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("sharpen_kd: error: ")
    assert printed.err.count("\n") == 1
    assert named in printed.err
    assert "--help explains the flags" in printed.err


def test_ctrl_c_is_exit_status_130(monkeypatch, tmp_path):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setitem(kd.COMMANDS, "prepare", interrupted)
    assert kd.main(["prepare", str(tmp_path)]) == 130


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--help"], 0), (["--version"], 0), (["train", "--epocs", "3"], 2)]
)
def test_what_needs_no_pytorch_does_not_wait_for_it(tmp_path, arguments, status):
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    command = [sys.executable, kd.__file__, *arguments]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert "PyTorch was imported" not in done.stderr
    assert done.stderr.count("\n") == (1 if status else 0)
    shown = {"--help": "sharpen", "--version": f"sharpen_kd {kd.__version__}\n", "train": ""}
    assert shown[arguments[0]] in done.stdout


# --- A student of another kind --------------------------------------------------------------------


def test_a_plain_stack_is_trained_and_then_used_by_every_command(
    tmp_path, data_root, photographs, monkeypatch, capsys
):
    monkeypatch.setattr(kd, "FPS_SIZES", ((64, 64),))
    run = tmp_path / "run"
    command = ["train", "--network", "plain", "--data-root", str(data_root), "--stem-stride", "2"]
    command += ["--widths", "8", "--convolutions", "3", "--image-size", "32", "--workers", "0"]
    command += ["--lambda-perceptual", "0", "--lambda-feature", "0", "--lambda-kl", "0"]
    assert kd.main([*command, "--max-steps", "2", "--run-dir", str(run)]) == 0
    student, _ = kd.load_student(run / "best.pth")
    wanted = {"kind": "plain", "stem_stride": 2, "width": 8, "layers": 3}
    assert student.config == wanted

    photographs["astronaut"].resize((40, 30)).save(tmp_path / "a.png")
    checkpoint = ["--checkpoint", str(run / "best.pth")]
    out = str(tmp_path / "scores")
    for arguments in (
        ["eval", "--data-root", str(data_root), "--output-dir", out],
        ["sharpen", str(tmp_path / "a.png")],
        ["fps", "--backend", "torch", "openvino", "--frames", "1", "--warmup", "0"],
        ["export", "-o", str(tmp_path / "plain.onnx")],
    ):
        assert kd.main([*arguments, *checkpoint]) == 0
    assert len(read_csv(tmp_path / "scores/scores.csv")) == 8
    assert Image.open(tmp_path / "a_sharpened.png").size == (40, 30)
    assert "\nbest " in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.onnx")] == ["plain.onnx"]


def test_a_plain_stack_is_told_that_it_has_no_features(tmp_path, data_root, capsys):
    command = ["train", "--network", "plain", "--data-root", str(data_root)]
    assert kd.main([*command, "--run-dir", str(tmp_path / "run")]) == 2
    assert "--network plain: has no features; add --lambda-feature 0" in capsys.readouterr().err


def test_an_unknown_network_is_named_with_those_there_are(tmp_path, data_root, capsys):
    command = ["train", "--network", "large", "--data-root", str(data_root)]
    assert kd.main([*command, "--run-dir", str(tmp_path / "run")]) == 2
    assert "--network large: choose from unet, plain" in capsys.readouterr().err


# --- No network -----------------------------------------------------------------------------------


def test_the_network_is_denied_to_tests_and_to_what_they_start(denied):
    """So every other test shows that its command works without; VGG19 alone is ever fetched."""
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    with pytest.raises(OSError, match="the tests have no network"):
        exec(code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the tests have no network" in done.stderr
    assert denied == ["192.0.2.1"]
    denied.clear()


def test_ctrl_c_while_packages_are_imported_ends_in_no_traceback():
    command = [sys.executable, kd.__file__, "fps", "--help"]
    for seconds in (0.5, 1.0, 2.0):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        assert b"Traceback" not in process.communicate()[1]


def test_a_checkpoint_that_is_not_there_is_answered_with_the_names_of_those_that_are(capsys):
    assert kd.main(["eval", "--checkpoint", "faster"]) == 2
    assert "faster: no such file; name one of quality, fast, " in capsys.readouterr().err


def test_too_little_memory_is_told_in_a_line(monkeypatch, capsys):
    monkeypatch.setitem(kd.COMMANDS, "fps", lambda config: torch.empty(2**50))
    assert kd.main(["fps"]) == 2
    assert capsys.readouterr().err == "sharpen_kd: error: there is not enough memory for this\n"
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        kd.main(["fps", "--debug"])
    monkeypatch.setitem(kd.COMMANDS, "fps", lambda config: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):  # a fault of the script
        kd.main(["fps"])
