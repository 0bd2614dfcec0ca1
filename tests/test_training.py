"""The loop: order, accumulation, averaging, resuming, interruption, several processes."""

import csv
import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sharpen_kd as kd

SCRIPT = Path(kd.__file__)
STUDENT = ["--stem-stride", "2", "--widths", "4", "6", "8", "8", "8"]


@pytest.fixture
def arguments(data_root, tiny_teacher):
    """A `train` command of a few seconds a dozen steps, without its --run-dir."""
    return [
        *("train", "--data-root", str(data_root), "--teacher-weights", str(tiny_teacher), *STUDENT),
        *("--image-size", "32", "--lambda-perceptual", "0", "--workers", "0", "--validation-fraction", "0.1"),
    ]


def weights(run, file="last.pth"):
    content = torch.load(run / file, weights_only=True)
    return content["params"] if "params" in content else content["objective"] | content["ema"]


def read_log(run):
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_epoch_sees_every_pair_and_counts_its_last_group():
    config = kd.FitConfig(epochs=3, batch_size=1, gradient_accumulation_steps=4)
    order = kd.CropOrder(10, config)
    batches = list(order)
    assert order.steps_per_epoch == 3
    assert [order.batches_in_step(step) for step in range(6)] == [4, 4, 2, 4, 4, 2]
    for epoch in range(3):
        items = [item for batch in batches[10 * epoch : 10 * epoch + 10] for item in batch]
        assert sorted(items) == [(epoch, index) for index in range(10)]
    assert batches[:10] != [[(0, index)] for index in range(10)]
    order.first_step = 4  # the second epoch's second group
    assert list(order) == batches[14:]


def test_processes_share_out_what_one_process_sees():
    alone = kd.CropOrder(8, kd.FitConfig(epochs=2, batch_size=1, gradient_accumulation_steps=4))
    config = kd.FitConfig(epochs=2, batch_size=1, gradient_accumulation_steps=2)
    pair = [kd.CropOrder(8, config, rank, 2) for rank in (0, 1)]
    assert pair[0].steps_per_epoch == alone.steps_per_epoch
    one, two = np.array(list(alone)), np.array([list(order) for order in pair])
    for step in range(4):
        expected = {tuple(item) for item in one[4 * step : 4 * step + 4, 0]}
        assert {tuple(item) for item in two[:, 2 * step : 2 * step + 2, 0].reshape(-1, 2)} == expected


def test_ema_follows_its_formula_and_forgets_the_start():
    ema, network = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(ema.weight, 1.0)
    by_hand = 1.0
    for step, value in enumerate([2.0, -3.0, 5.0]):
        nn.init.constant_(network.weight, value)
        kd.update_ema(ema, dict(network.named_parameters()), step, decay=0.2)
        decay = min(0.2, (1 + step) / (10 + step))
        by_hand = decay * by_hand + (1 - decay) * value
        assert ema.weight.item() == pytest.approx(by_hand)
    nn.init.constant_(ema.weight, 1.0)
    nn.init.constant_(network.weight, 0.0)
    for step in range(100):
        kd.update_ema(ema, dict(network.named_parameters()), step, decay=0.999)
    assert ema.weight.item() < 1e-6  # the initial weights' share, which a plain 0.999 leaves at 0.9


def test_an_expansion_adds_a_product_to_every_3x3_kernel():
    torch.manual_seed(0)
    student, expected = (kd.StudentUNet(stem_stride=2, widths=(4, 6), skips="lateral") for _ in range(2))
    objective = kd.Distillation(student, None, kd.DistillationLoss({"reconstruction": 1.0}), expansion=5)
    batch = {"blurred": torch.rand(2, 3, 16, 16), "sharp": torch.rand(2, 3, 16, 16)}
    named, kernels = dict(student.named_parameters()), iter(zip(objective.outer, objective.inner, strict=True))
    assert all(torch.equal(weight, named[name]) for name, weight in objective.weights().items())  # at first
    for name, weight in expected.named_parameters():
        weight.data = named[name].data.clone()
        if weight.shape[2:] == (3, 3):
            outer, inner = next(kernels)
            nn.init.normal_(outer)
            inner = inner.unflatten(1, weight.shape[1:])
            weight.data += torch.einsum("or,rixy->oixy", outer.data, inner.data)
    assert next(kernels, None) is None
    loss = objective(batch, torch.autocast("cpu", enabled=False))["reconstruction"]
    assert torch.allclose(loss, (expected(batch["blurred"]) - batch["sharp"]).abs().mean())
    kd.update_ema(student, objective.weights(), step=0, decay=0.0)
    assert all(map(torch.allclose, student.parameters(), expected.parameters()))


def test_accumulated_gradient_is_the_mean_over_the_group(data_root, tmp_path):
    pairs = kd.find_pairs(data_root / "train")[:3]
    config = kd.TrainConfig(
        run_dir=tmp_path, image_size=32, gradient_accumulation_steps=2, clip_norm=0,
        validation_fraction=0, device="cpu", precision="float32", epochs=1,
    )  # fmt: skip
    torch.manual_seed(0)
    student = kd.StudentUNet(stem_stride=2, widths=(4, 4, 4, 4, 4))
    loss = kd.DistillationLoss({"reconstruction": 1.0, "ssim": 10.0})
    run = kd.Fit(config, kd.Distillation(student, None, loss), student.config, pairs, kd.FrameSharpener)
    items = [item for batch in run.order for item in batch]
    examples = [{name: image[None] for name, image in run.dataset[item].items()} for item in items]
    batches = iter([torch.utils.data.default_collate(run.dataset.__getitems__([item])) for item in items])
    seen = []
    run.optimiser.step = lambda: seen.append(student.output.weight.grad.clone())
    for _ in range(2):
        run.optimise(batches)
    expected = []
    for example in examples:
        student.zero_grad()
        output, sharp = student(example["blurred"]), example["sharp"]
        ((output - sharp).abs().mean() + 10 * (1 - kd.ssim(output, sharp))).backward()
        expected.append(student.output.weight.grad.clone())
    assert torch.allclose(seen[0], (expected[0] + expected[1]) / 2, atol=1e-5)
    assert torch.allclose(seen[1], expected[2], atol=1e-5)  # the last, partial group


def test_a_run_of_another_command_is_not_resumed(tmp_path, capsys):
    torch.save({"config": {"dim": 24, "run_dir": str(tmp_path)}}, tmp_path / "last.pth")
    for command in ("train", "teacher"):
        assert kd.main([command, "--resume", "--run-dir", str(tmp_path)]) == 2
        assert "last.pth: another command's run" in capsys.readouterr().err


def test_a_run_on_the_embedded_sample_stays_on_it(tmp_path, monkeypatch):
    monkeypatch.setattr(kd, "list_pictures", lambda folder: [])
    config = kd.settle(kd.TrainConfig, {"run_dir": tmp_path, "epochs": 3})
    assert config.data_root is None
    assert (config.epochs, config.stem_stride) == (3, 2)  # its own settings below the given ones
    saved = {name: str(v) if isinstance(v, kd.Path) else v for name, v in vars(config).items()}
    torch.save({"config": saved}, tmp_path / "last.pth")
    monkeypatch.setattr(kd, "list_pictures", lambda folder: [folder / "a.png"])  # a dataset that came later
    assert kd.settle(kd.TrainConfig, {}).data_root == kd.DATASET
    assert kd.settle(kd.TrainConfig, {"run_dir": tmp_path, "resume": True}) == dataclasses.replace(config, resume=True)


def test_resumed_run_reaches_the_same_weights(arguments, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [*arguments, "--expansion", "3"]
    assert kd.main([*arguments, "--run-dir", str(whole), "--max-steps", "5"]) == 0
    assert kd.main([*arguments, "--run-dir", str(parts), "--max-steps", "3"]) == 0
    assert not all(torch.equal(t, weights(parts)[name]) for name, t in weights(whole).items())
    # nothing but the folder is named: the run's settings are in last.pth
    assert kd.main(["train", "--resume", "--run-dir", str(parts), "--max-steps", "5"]) == 0
    first, second = weights(whole), weights(parts)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(name.startswith("teacher.proj_e2") for name in first)
    assert any(first[name].any() for name in first if name.startswith("outer"))
    assert kd.load_student(whole / "best.pth")[0].config["widths"] == (4, 6, 8, 8, 8)  # a student like any other
    strip = [{k: v for k, v in row.items() if not k.startswith(("val_", "seconds"))} for row in read_log(whole)]
    assert strip == [{k: v for k, v in r.items() if not k.startswith(("val_", "seconds"))} for r in read_log(parts)]


def test_log_holds_terms_shares_and_scores(arguments, tmp_path):
    run = tmp_path / "run"
    assert kd.main([*arguments, "--run-dir", str(run), "--max-steps", "3", "--log-gradients", "2"]) == 0
    rows = read_log(run)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    terms = ("reconstruction", "feature", "kl", "ssim")
    for row in rows:
        assert float(row["loss"]) == pytest.approx(sum(float(row[name]) for name in terms), rel=1e-4)
    assert sum(float(rows[0][f"gradient_{name}"]) for name in terms) == pytest.approx(1, abs=1e-4)
    assert rows[1]["gradient_ssim"] == ""
    assert float(rows[2]["val_psnr"]) > 10
    assert (run / "curves.png").stat().st_size > 1000
    best = torch.load(run / "best.pth", weights_only=True)
    assert best["step"] == 3
    assert best["held_out"]["psnr"] == float(rows[2]["val_psnr"])
    _, held_out = kd.hold_out(kd.find_pairs(Path(arguments[2]) / "train"), 0.05)
    sharpener = kd.FrameSharpener(kd.load_student(run / "best.pth")[0], torch.device("cpu"))
    psnr, similarity = kd.mean_score([pair.load() for pair in held_out], sharpener)
    assert best["held_out"] == {"psnr": psnr, "ssim": similarity, "pictures": len(held_out)}


def test_training_improves_held_out_pictures(data_root, tmp_path, capsys):
    run = tmp_path / "run"
    command = [
        *("train", "--data-root", str(data_root), "--run-dir", str(run), *STUDENT, "--epochs", "120"),
        *("--restart-epochs", "120", "--gradient-accumulation-steps", "1", "--image-size", "64"),
        *("--learning-rate", "3e-3", "--blur-probability", "0", "--batch-size", "3", "--workers", "0"),
        *("--lambda-perceptual", "0", "--lambda-feature", "0", "--lambda-kl", "0", "--lambda-ssim", "1", "--cache"),
        *("--lambda-reconstruction", "10", "--validation-fraction", "0.25", "--validate-every", "120"),
    ]
    assert kd.main(command) == 0
    before, after = capsys.readouterr().out.strip().splitlines()[-2:]
    assert before.startswith("before: ")
    assert after.startswith("after: ")
    psnr_before, psnr_after = (float(line.split()[1]) for line in (before, after))
    assert psnr_after > psnr_before + 0.1
    assert float(after.split()[-1]) > float(before.split()[-1]) + 0.01


def test_teacher_command_writes_weights_that_train_accepts(data_root, tmp_path):
    command = ["teacher", "--data-root", str(data_root), "--run-dir", str(tmp_path / "run"), "--dim", "8"]
    command += ["--num-blocks", "1", "1", "1", "2", "--heads", "1", "1", "2", "2", "--image-size", "32"]
    assert kd.main([*command, "--max-steps", "2", "--batch-size", "2", "--workers", "0"]) == 0
    restormer = kd.load_restormer(tmp_path / "run/best.pth")
    assert len(restormer.latent) == 2
    rows = read_log(tmp_path / "run")
    assert len(rows) == 2
    assert all(row["loss"] == row["reconstruction"] and float(row["loss"]) > 0 for row in rows)


def test_a_teacher_continues_and_its_hooks_do_not_pile_up(data_root, tmp_path, monkeypatch):
    command = ["teacher", "--run-dir", str(tmp_path / "run")]
    settings = ["--data-root", str(data_root), "--dim", "8", "--num-blocks", "1", "1", "1", "2", "--workers", "0"]
    settings += ["--heads", "1", "1", "2", "2", "--image-size", "32", "--validate-every", "1", "--batch-size", "8"]
    assert kd.main([*command, *settings, "--max-steps", "1"]) == 0
    wrapped, wrap = [], kd.RestormerTeacherWrapper
    monkeypatch.setattr(kd, "RestormerTeacherWrapper", lambda network: wrapped.append(network) or wrap(network))
    assert kd.main([*command, "--resume", "--max-steps", "3"]) == 0
    assert [row["step"] for row in read_log(tmp_path / "run")] == ["1", "2", "3"]
    assert all(float(row["val_psnr"]) > 10 for row in read_log(tmp_path / "run"))
    assert len(wrapped) == 2  # a validation each
    assert all(len(network.latent._forward_hooks) == 1 for network in wrapped)  # every validation used to add one


def test_bf16_training_stays_close_to_float32(arguments, tmp_path):
    losses = []
    for precision in ("float32", "bf16"):
        run = tmp_path / precision
        assert kd.main([*arguments, "--run-dir", str(run), "--max-steps", "2", "--precision", precision]) == 0
        losses.append([float(row["loss"]) for row in read_log(run)])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_mistakes_are_named_before_anything_is_written(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    for extra, named in (
        (["--image-size", "40"], "--image-size 40: must be a multiple of 16"),
        (["--learning-rate", "0"], "--learning-rate 0.0: must be above 0"),
        (["--widths", "4"], "--widths (4,): a student has two stages or more"),
        (["--widths", "4", "0"], "--widths (4, 0): a student has two stages or more, each 1"),
        (["--teacher-weights", str(tmp_path / "none.pth")], "none.pth: no such file; get motion_deblurring"),
        (["--data-root", str(tmp_path)], "no blurred/sharp pairs"),
        (["--resume"], "last.pth: no such file"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (
            ["--lambda-reconstruction", "0", "--lambda-feature", "0", "--lambda-kl", "0", "--lambda-ssim", "0"],
            "all are 0",
        ),
    ):
        assert kd.main([*arguments, "--run-dir", str(run), *extra]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
        assert not run.exists()
    assert kd.main([*arguments, "--run-dir", str(run), "--max-steps", "1"]) == 0
    before = weights(run)
    assert kd.main([*arguments, "--run-dir", str(run), "--max-steps", "2"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert kd.main([*arguments, "--run-dir", str(run), "--resume", "--overwrite"]) == 2
    assert "--resume, --overwrite: one goes on" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(run).items())


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_that_breaks_off_is_named(arguments, data_root, tmp_path, capfd, workers):
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    for broken in (root / "train/sharp").rglob("*_[0-3].png"):
        broken.write_bytes(broken.read_bytes()[:2000])  # the header, and so the size, is whole
    command = [*arguments, "--run-dir", str(tmp_path / "run"), "--validation-fraction", "0"]
    assert kd.main([*command, "--data-root", str(root), "--workers", workers]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"sharpen_kd: error: \S+/train/sharp/\w+/\w+_\d.png: not a readable picture", error)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "last.pth"
    kd.save_atomically({"step": 1}, file)

    def broken(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] disk full")  # as PyTorch does

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(kd.UserError, match=r"last.pth: cannot be written .*disk full"):
        kd.save_atomically({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_ctrl_c_saves_and_the_run_continues_to_the_same_weights(arguments, tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    arguments = [*arguments, "--device", "cpu", "--threads", "1"]
    command = [sys.executable, str(SCRIPT), *arguments, "--run-dir", str(run), "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        seen = ""
        while not re.search(r" [2-9]/\d+ ", seen):  # the progress bar's second step
            seen += process.stdout.read(1) or pytest.fail(f"ended before its second step: {seen}")
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "Traceback" not in output
    steps = torch.load(run / "last.pth", weights_only=True)["step"]
    assert f"stopped after step {steps}" in output
    steps = str(steps + 2)
    for extra in (["train", "--resume", "--run-dir", str(run)], [*arguments, "--run-dir", str(whole)]):
        done = subprocess.run([sys.executable, str(SCRIPT), *extra, "--max-steps", steps], check=False)
        assert done.returncode == 0
    first, second = weights(whole), weights(run)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_match_one(arguments, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    common = [*arguments, "--max-steps", "3", "--device", "cpu", "--threads", "1", "--precision", "float32"]
    common += ["--validation-fraction", "0", "--lambda-ssim", "1"]
    assert kd.main([*common, "--gradient-accumulation-steps", "4", "--run-dir", str(one)]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(SCRIPT), *common, "--gradient-accumulation-steps", "2", "--run-dir", str(two)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = weights(one, "best.pth"), weights(two, "best.pth")
    start = kd.StudentUNet(stem_stride=2, widths=(4, 6, 8, 8, 8))
    assert not torch.allclose(first["output.weight"], start.output.weight, atol=1e-4)
    for name in first:
        assert torch.allclose(first[name], second[name], atol=2e-5), name


def test_learning_rate_is_the_cosine_after_a_linear_warm_up(arguments, tmp_path):
    run = tmp_path / "run"
    flags = ("--max-steps", "9", "--warmup-steps", "4", "--learning-rate", "1e-3", "--restart-epochs", "1", "--balance")
    assert kd.main([*arguments, "--run-dir", str(run), *flags]) == 0
    rows = read_log(run)
    for step, row in enumerate(rows):
        start, length = max(
            (start, length) for start, length in ((0, 1), (1, 2), (3, 4)) if float(row["epoch"]) >= start
        )
        cosine = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi * (float(row["epoch"]) - start) / length)) / 2
        assert float(row["learning_rate"]) == pytest.approx(cosine * min(1, (step + 1) / 4))
    assert all(float(row["seconds"]) > 0 for row in rows)


def test_a_run_follows_its_flags(arguments, tmp_path, monkeypatch):
    runs, fit, terms = [], kd.Fit, kd.DistillationLoss
    monkeypatch.setattr(kd, "Fit", lambda *a, **k: runs.append(fit(*a, **k)) or runs[-1])
    monkeypatch.setattr(kd, "DistillationLoss", lambda *a: temperatures.append(a[1]) or terms(*a))
    temperatures, norms, clip = [], [], nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda p, norm: norms.append(norm) or clip(p, norm))
    root = Path(arguments[2])
    fewer = tmp_path / "data"
    shutil.copytree(root, fewer)
    for path in fewer.rglob("text/page_[01].png"):
        path.unlink()
    flags = ("--data-root", str(fewer), "--balance", "--clip-norm", "0.5", "--temperature", "2", "--max-steps", "1")
    assert kd.main([*arguments, "--run-dir", str(tmp_path / "run"), *flags]) == 0
    categories = [pair.category for pair in runs[0].dataset.pairs]
    assert categories.count("text") == categories.count("photo")
    assert norms == [0.5]
    assert temperatures == [2.0]


def test_a_run_may_start_from_another_students_weights(arguments, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert kd.main([*arguments, "--run-dir", str(first), "--max-steps", "3"]) == 0
    start = (*arguments, "--run-dir", str(second), "--init", str(first / "best.pth"), "--max-steps", "1")
    assert kd.main([*start, "--learning-rate", "1e-9"]) == 0
    before, after = (kd.load_student(run / "best.pth")[0].state_dict() for run in (first, second))
    assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)
    assert kd.main([*start, "--overwrite", "--widths", "4", "4", "4", "4", "8"]) == 2
    assert (second / "best.pth").exists()  # a mistake gives up no run


def test_overwrite_leaves_nothing_of_the_run_before(arguments, tmp_path, monkeypatch):
    command = [*arguments, "--run-dir", str(tmp_path), "--max-steps", "2"]
    assert kd.main(command) == 0
    found = []

    def stop(run, batches):
        found.append(sorted(path.name for path in tmp_path.glob("*.pth")))
        raise KeyboardInterrupt

    monkeypatch.setattr(kd.Fit, "optimise", stop)
    assert kd.main([*command, "--resume", "--max-steps", "3"]) == 130
    assert kd.main([*command, "--overwrite"]) == 130
    assert found == [["best.pth", "last.pth"], []]


def test_a_run_is_kept_without_its_last_state_and_continues_where_it_was_moved(arguments, tmp_path, capsys):
    run = tmp_path / "run"
    command = [*arguments, "--run-dir", str(run), "--max-steps", "1"]
    assert kd.main(command) == 0
    run.rename(tmp_path / "moved")
    assert kd.main(["train", "--resume", "--run-dir", str(tmp_path / "moved"), "--max-steps", "2"]) == 0
    assert not run.exists()
    assert [row["step"] for row in read_log(tmp_path / "moved")] == ["1", "2"]
    (tmp_path / "moved/last.pth").unlink()
    assert kd.main([*arguments, "--run-dir", str(tmp_path / "moved")]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert (tmp_path / "moved/best.pth").exists()


def test_a_run_that_is_resumed_where_it_ends_is_validated(arguments, tmp_path):
    command = [*arguments, "--run-dir", str(tmp_path), "--max-steps", "2"]
    assert kd.main(command) == 0
    last = torch.load(tmp_path / "last.pth", weights_only=True)  # as if stopped before the first validation
    torch.save(last | {"best": -math.inf}, tmp_path / "last.pth")
    (tmp_path / "best.pth").unlink()
    assert kd.main(["train", "--resume", "--run-dir", str(tmp_path), "--max-steps", "1"]) == 0
    assert torch.load(tmp_path / "best.pth", weights_only=True)["step"] == 2


def test_validation_computes_in_the_precision_of_the_run(arguments, tmp_path, monkeypatch):
    precisions, sharpener = [], kd.FrameSharpener
    monkeypatch.setattr(kd, "FrameSharpener", lambda *a, **k: precisions.append(k["precision"]) or sharpener(*a, **k))
    assert kd.main([*arguments, "--run-dir", str(tmp_path), "--max-steps", "1", "--precision", "float32"]) == 0
    assert precisions == ["float32"]


def test_a_teachers_dimensions_fit_each_other(data_root, tmp_path, capsys):
    command = ["teacher", "--data-root", str(data_root), "--run-dir", str(tmp_path / "run")]
    for extra, named in (
        (["--heads", "1", "2"], "four numbers each"),
        (["--num-blocks", "1", "1", "1", "1", "1"], "four numbers each"),
        (["--dim", "9", "--heads", "1", "1", "1", "1"], "--dim 9: must be even"),
        (["--dim", "10", "--heads", "1", "3", "4", "8"], "a multiple of its --heads"),
        (["--dim", "0"], "--dim 0: must be at least 2"),
    ):
        assert kd.main([*command, *extra]) == 2
        assert named in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "widths", "convolutions"),
    [
        ({}, kd.EMBEDDED_RUN["widths"], kd.EMBEDDED_RUN["convolutions"]),
        ({"base_channels": 32}, (8, 16, 32, 64, 96), (2,) * 5),
        ({"widths": (4,) * 3}, (4,) * 3, (2,) * 3),
        ({"base_channels": 32, "widths": (4,) * 5, "convolutions": (1,)}, (4,) * 5, (1,) * 5),
    ],
)
def test_given_sizes_rule_the_embedded_runs(monkeypatch, tmp_path, given, widths, convolutions):
    monkeypatch.setattr(kd, "DATASET", tmp_path)
    config = kd.settle(kd.TrainConfig, {"data_root": tmp_path} | given)
    student = kd.StudentUNet(base_channels=config.base_channels, widths=config.widths, convolutions=config.convolutions)
    assert student.config["widths"] == widths
    assert student.config["convolutions"] == convolutions


def test_ablation_compares_the_terms_and_keeps_finished_runs(arguments, tmp_path, capsys):
    command = ["ablate", *arguments[1:], "--run-dir", str(tmp_path), "--epochs", "2", "--seeds", "0", "1"]
    command += ["--teacher-cache", str(tmp_path / "cache"), "--lambda-output", "1", "--degradation", "x2"]
    assert kd.main(command) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if " steps of" in line]
    assert [line[:20].strip() for line in table] == list(kd.ABLATION)
    logs = {path.parent.name: read_log(path.parent) for path in tmp_path.glob("*/log.csv")}
    assert len(logs) == 2 * len(kd.ABLATION)
    used = {
        name: {term for term in ("feature", "kl", "output", "ssim") if term in rows[0]} for name, rows in logs.items()
    }
    assert used["no_teacher_0"] == {"ssim"}
    assert used["KL_1"] == {"kl", "ssim"}
    assert used["all_0"] == {"feature", "kl", "output", "ssim"}
    # the same student and crops: before the first step only the terms differ
    assert len({logs[f"{name}_0"][0]["ssim"] for name in ("no_teacher", "features", "KL", "output", "all")}) == 1
    assert logs["no_teacher_0"][0]["ssim"] != logs["no_teacher_1"][0]["ssim"]
    scores = json.loads((tmp_path / "ablation.json").read_text())
    held_out = [torch.load(tmp_path / f"output_{seed}/best.pth", weights_only=True)["held_out"] for seed in (0, 1)]
    assert scores["output"]["held out"] == [[score["psnr"], score["ssim"]] for score in held_out]
    pairs = [pair.load() for pair in kd.find_pairs(Path(arguments[2]) / "test", "x2")]
    student = kd.load_student(tmp_path / "all_1/best.pth")[0]
    by_hand = np.mean([kd.score(kd.FrameSharpener(student, torch.device("cpu"))(b), s) for b, s in pairs], 0)
    assert scores["all"]["test"][1] == pytest.approx(by_hand.tolist())
    assert f"{np.mean(scores['all']['test'], 0)[0]:.2f} dB" in table[-2]
    assert (tmp_path / "ablation.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/best.pth")}
    assert kd.main([*command, "--resume"]) == 0  # which it does anyway
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/best.pth")}
    assert kd.main([*command, "--overwrite", "--epochs", "1", "--seeds", "0"]) == 0
    for path, time in before.items():  # of the seeds that are named
        assert (path.stat().st_mtime_ns > time) == path.parent.name.endswith("_0")
    assert len(read_log(tmp_path / "all_0")) == len(logs["all_0"]) / 2
    assert kd.main([*command, "--lambda-ssim", "0", "--lambda-reconstruction", "0"]) == 2
    with pytest.raises(SystemExit):  # flags that it would overrule
        kd.main([*command, "--validate-every", "3"])
