"""eval, fps and the command line as a whole, on real pictures."""

import csv
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import sharpen_kd as kd


def test_eval_scores_and_pictures(tmp_path, data_root, student_file, tiny_teacher, capsys):
    command = ["eval", "--data-root", str(data_root), "--checkpoint", str(student_file), "--save-images"]
    command += ["--teacher", "--teacher-weights", str(tiny_teacher), "--output-dir", str(tmp_path / "out")]
    assert kd.main([*command, "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == ["all", "photo", "text", "images"]
    assert scores["images"] == 8
    pairs = kd.find_pairs(data_root / "test")
    by_hand = np.array([kd.score(*pair.load()) for pair in pairs])
    assert scores["all"]["input"] == pytest.approx(by_hand.mean(0).tolist())
    assert scores["text"]["input"] == pytest.approx(by_hand[4:].mean(0).tolist())
    # the saved pictures are what was scored
    saved = [
        kd.score(kd.frame_array(Image.open(tmp_path / "out" / f"{pair.key}.png")), pair.load()[1]) for pair in pairs
    ]
    assert scores["all"]["student"] == pytest.approx(np.mean(saved, 0).tolist())
    with (tmp_path / "out/scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == [pair.key for pair in pairs]
    assert float(rows[3]["student_psnr"]) == pytest.approx(saved[3][0])
    assert {"teacher_psnr", "teacher_ssim"} <= rows[0].keys()
    assert Image.open(tmp_path / "out/side_by_side/photo.png").size == (4 * 100 - 4, 24 + 96 + 4 + 96)
    assert f"{scores['all']['student'][0]:.2f}" in capsys.readouterr().out


def test_eval_resize_is_the_reports_protocol(tmp_path, data_root, student_file, capsys):
    command = ["eval", "--data-root", str(data_root), "--checkpoint", str(student_file), "--resize", "48"]
    command += ["--output-dir", str(tmp_path), "--json", str(tmp_path / "scores.json")]
    assert kd.main(command) == 0
    expected = [
        kd.score(*(np.array(Image.fromarray(image).resize((48, 48), Image.BICUBIC)) for image in pair.load()))
        for pair in kd.find_pairs(data_root / "test")
    ]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["all"]["input"] == pytest.approx(np.mean(expected, 0).tolist())
    assert kd.main([*command, "--resize", "5"]) == 2
    assert "--resize 5: SSIM needs" in capsys.readouterr().err


def test_eval_degrades_sharp_pictures_by_protocol(tmp_path, sharp_folder, student_file, capsys):
    (tmp_path / "test").symlink_to(sharp_folder)
    command = ["eval", "--data-root", str(tmp_path), "--checkpoint", str(student_file), "--output-dir", str(tmp_path)]
    assert kd.main([*command, "--protocol", "x3", "sharp", "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert list(scores) == ["x3", "sharp"]
    expected = []
    for path in sorted(sharp_folder.rglob("*.png")):
        sharp = Image.open(path)
        blurred = sharp.resize((32, 32), Image.BICUBIC).resize((96, 96), Image.BICUBIC)
        expected.append(kd.score(np.array(blurred), np.array(sharp)))
    assert scores["x3"]["all"]["input"] == pytest.approx(np.mean(expected, 0).tolist())
    assert scores["sharp"]["all"]["input"] == [float("inf"), 1.0]
    assert 10 < scores["sharp"]["all"]["student"][0] < 60
    with (tmp_path / "scores.csv").open(newline="") as file:
        assert [row["protocol"] for row in csv.DictReader(file)] == ["x3"] * 8 + ["sharp"] * 8
    assert "sharp" in capsys.readouterr().out


def test_an_equal_picture_does_not_make_the_mean_infinite():
    assert kd.mean_psnr([30.0, 20.0]) == 25.0
    assert kd.mean_psnr([float("inf"), 20.0]) == pytest.approx(10 * np.log10(2 / 0.01))
    assert kd.mean_psnr([float("inf")] * 2) == float("inf")


def test_the_sheet_magnifies_what_changed_most():
    blurred = np.full((100, 120, 3), 90, np.uint8)
    sharp = blurred.copy()
    sharp[50:60, 96:106] = 250  # inside the block that starts at row 48, column 48 or 96
    sheet = np.array(kd.side_by_side({"blurred": blurred, "sharp": sharp}, detail=24))
    assert sheet.shape == (24 + 100 + 4 + 120, 2 * 124 - 4, 3)
    assert (sheet[128:, :120] == 90).all()
    magnified = sheet[128:, 124:]
    assert (magnified == 250).all(2).sum() == 50 * 50  # ten pixels at five to one
    assert (magnified[10:60, 0:50] == 250).all()


def test_fps_rows(tmp_path, student_file, sharp_folder, capsys, monkeypatch):
    (tmp_path / "test").symlink_to(sharp_folder)
    monkeypatch.setattr(kd, "FPS_SIZES", ((96, 64), (720, 1280)))
    command = ["fps", "--checkpoint", str(student_file), "--frames", "2", "--warmup", "1", "--tile", "768"]
    backends = ("torch", "openvino", "openvino-int8")
    command += ["--backend", *backends, "--data-root", str(tmp_path), "--plot", str(tmp_path / "fps.png")]
    assert kd.main([*command, "--json", str(tmp_path / "fps.json")]) == 0
    rows = json.loads((tmp_path / "fps.json").read_text())["rows"]
    sizes = ((64, 96), (1280, 720))
    cases = [*itertools.product(sizes, ("plain", "student"), (False,)), (sizes[1], "student", True)]
    found = [(r["backend"], (r["width"], r["height"]), r["checkpoint"].split()[0], r["tiled"]) for r in rows]
    assert found == [(backend, *case) for backend in backends for case in cases]
    for row in rows:
        assert row["fps"] == pytest.approx(1000 / row["frame_ms"])
        multiply_adds = row["macs_per_pixel"] * row["height"] * row["width"]
        assert row["gflops"] == pytest.approx(2 * multiply_adds / (row["network_ms"] * 1e6))
        assert row["network_ms"] > 0
        assert row["frame_ms"] <= row["frame_ms_p95"]
        plain = [
            r for r in rows if r["checkpoint"] == "plain layers" and all(r[k] == row[k] for k in ("backend", "height"))
        ]
        assert row["plain_ms"] == plain[0]["frame_ms"]
    printed = capsys.readouterr().out
    assert "multiply-adds a pixel" in printed
    ratio = re.findall(r"student .* tiled .* ([\d.]+)\n", printed)[0]
    assert float(ratio) == pytest.approx(rows[4]["frame_ms"] / rows[4]["plain_ms"], abs=0.006)
    assert re.search(r"3x3 convolutions in torch\.\w+: (\d+ \(\d+ wide\)(, )?){5} GFLOP/s", printed)
    of_best = re.findall(r"student .* tiled .* (\d+)%", printed)[0]
    assert float(of_best) == pytest.approx(100 * rows[4]["gflops"] / rows[4]["best_gflops"], abs=0.6)
    assert len({row["best_gflops"] for row in rows}) == len(backends) * len(sizes)  # timed beside the networks
    by_hand = np.mean([kd.score(*pair.load()) for pair in kd.find_pairs(tmp_path / "test", "x2")], 0)
    assert re.search(rf"input +[\d.]+ ms   {by_hand[0]:.2f} dB / {by_hand[1]:.4f} at x2", printed)
    assert re.findall(r"\n(\S+, \S+) +[\d.]+ ms", printed) == [f"student, {backend}" for backend in backends]
    assert Image.open(tmp_path / "fps.png").size[0] > 500


@pytest.mark.parametrize("stride", [2, 4])
def test_fps_of_an_untrained_student(tmp_path, capsys, monkeypatch, stride):
    monkeypatch.setattr(kd, "FPS_SIZES", ((64, 64),))
    command = ["fps", "--backend", "torch", "--frames", "1", "--warmup", "0", "--json", str(tmp_path / "fps.json")]
    assert kd.main([*command, "--base-channels", "16", "--stem-stride", str(stride)]) == 0
    expected = kd.multiply_adds_per_pixel(kd.StudentUNet(base_channels=16, stem_stride=stride))
    assert f"c=16 r={stride}: " in capsys.readouterr().out
    assert json.loads((tmp_path / "fps.json").read_text())["rows"][1]["macs_per_pixel"] == expected


def test_files_of_one_name_are_not_confused(tmp_path, student_file, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(student_file, tmp_path / folder / "best.pth")
    assert kd.main(["fps", "--checkpoint", str(tmp_path / "a/best.pth"), str(tmp_path / "b/best.pth")]) == 2
    assert "two files of one name" in capsys.readouterr().err


def test_files_to_write_are_settled_before_the_work(tmp_path, data_root, student_file, capsys):
    assert kd.main(["fps", "--plot", str(tmp_path / "speed.jpeg2")]) == 2
    assert "speed.jpeg2: name a .png" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert kd.main(["fps", "--json", str(tmp_path / "file/fps.json")]) == 2
    assert capsys.readouterr().out == ""
    command = ["eval", "--data-root", str(data_root), "--checkpoint", str(student_file)]
    command += ["--output-dir", str(tmp_path / "scores"), "--json", str(tmp_path / "new/folder/scores.json")]
    assert kd.main(command) == 0
    assert json.loads((tmp_path / "new/folder/scores.json").read_text())["images"] == 8
    assert kd.main([*command, "--json", str(tmp_path)]) == 2
    assert kd.main([*command, "--teacher-weights", str(tmp_path / "none.pth")]) == 2
    printed = capsys.readouterr()
    assert f"{tmp_path}: cannot be written" in printed.err
    assert "none.pth: no such file" in printed.err
    assert kd.main(["export", "-o", "."]) == 2
    assert "-o .: name a file" in capsys.readouterr().err


def test_frames_are_pictures():
    frames = kd.sample_frames(90, 160)
    assert len(frames) == 3
    assert all(frame.shape == (90, 160, 3) and frame.std() > 20 for frame in frames)


def test_help_shows_every_default_and_no_command_is_an_error(capsys):
    for name, (config_class, _) in kd.COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            kd.main([name, "--help"])
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        for field in kd.dataclasses.fields(config_class):
            if not field.metadata:
                continue
            assert field.name.replace("_", "-") in text or field.name in text
        for default in {"train": ("0.0002", "GoPro_dataset", "0", "0.0"), "sharpen": ("2048", "1.0")}.get(name, ()):
            assert f"(default: {default})" in text
    with pytest.raises(SystemExit) as stop:
        kd.main([])
    assert stop.value.code == 2


def test_wrong_files_are_named(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("hello")
    for command in (["fps"], ["eval", "--data-root", str(tmp_path)]):
        assert kd.main([*command, "--checkpoint", str(tmp_path / "text.pth")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("sharpen_kd: error: ")
        assert error.count("\n") == 1
        assert str(tmp_path) in error
