"""eval, fps and the command line as a whole, on real pictures."""

import csv
import json

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
    assert Image.open(tmp_path / "out/side_by_side/photo.png").size == (4 * 100 - 4, 96 + 24)
    assert f"{scores['all']['student'][0]:.2f}" in capsys.readouterr().out


def test_eval_resize_is_the_reports_protocol(tmp_path, data_root, student_file):
    command = ["eval", "--data-root", str(data_root), "--checkpoint", str(student_file), "--resize", "48"]
    command += ["--output-dir", str(tmp_path), "--json", str(tmp_path / "scores.json")]
    assert kd.main(command) == 0
    expected = [
        kd.score(*(np.array(Image.fromarray(image).resize((48, 48), Image.BICUBIC)) for image in pair.load()))
        for pair in kd.find_pairs(data_root / "test")
    ]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["all"]["input"] == pytest.approx(np.mean(expected, 0).tolist())


def test_fps_rows(tmp_path, student_file, capsys):
    command = ["fps", "--checkpoint", str(student_file), "--frames", "2", "--warmup", "1"]
    assert kd.main([*command, "--json", str(tmp_path / "fps.json")]) == 0
    rows = json.loads((tmp_path / "fps.json").read_text())["rows"]
    assert [(row["height"], row["width"], row["tiled"]) for row in rows] == [
        (512, 512, False),
        (1080, 1920, True),
    ]
    for row in rows:
        assert set(row) == {
            *("checkpoint", "backend", "precision", "device", "threads", "height", "width", "tiled"),
            *("network_ms", "frame_ms", "frame_ms_p95", "fps", "macs_per_pixel", "gflops"),
        }
        assert row["fps"] == pytest.approx(1000 / row["frame_ms"])
        multiply_adds = row["macs_per_pixel"] * row["height"] * row["width"]
        assert row["gflops"] == pytest.approx(2 * multiply_adds / (row["network_ms"] * 1e6))
        assert row["network_ms"] > 0
        assert row["frame_ms"] <= row["frame_ms_p95"]
    assert "multiply-adds a pixel" in capsys.readouterr().out


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
            assert field.name.replace("_", "-") in text or field.name in text
        for default in {"train": ("0.0002", "GoPro_dataset"), "sharpen": ("512", "1.0")}.get(name, ()):
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
