"""The training loop: order, accumulation, averaging, resuming, interruption, several processes."""

import csv
import itertools
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

import sharpen_kd as kd

SCRIPT = kd.__file__
STUDENT = ["--stem-stride", "2", "--widths", "4", "6", "8", "8", "8"]
WITHOUT_TEACHER = ["--lambda-perceptual", "0", "--lambda-feature", "0", "--lambda-kl", "0"]


@pytest.fixture
def arguments(data_root, tiny_teacher):
    """A `train` command of a dozen steps a second, without its --run-dir."""
    return [
        *("train", "--data-root", str(data_root), "--teacher-weights", str(tiny_teacher), *STUDENT),
        *("--image-size", "32", "--lambda-perceptual", "0", "--workers", "0"),
        *("--validation-fraction", "0.1", "--device", "cpu"),
    ]


@pytest.fixture
def make_run(data_root, tmp_path):
    """A function that makes a TrainingRun without a teacher on three pictures, for its methods."""

    def make(**settings):
        usual = {
            "run_dir": tmp_path / "run",
            "image_size": 32,
            "device": "cpu",
            "precision": "float32",
            "blur_probability": 0.0,
            "epochs": 1,
            "workers": 0,
        }
        config = kd.TrainConfig(**(usual | settings))
        torch.manual_seed(0)
        student = kd.StudentUNet(stem_stride=2, widths=(4, 4, 4))
        loss = kd.DistillationLoss({"reconstruction": 1.0, "ssim": 10.0})
        objective = kd.Objective(student, None, loss)
        pairs = kd.find_pairs(data_root / "train")
        dataset = kd.training_crops(config, pairs[:3])
        return kd.TrainingRun(
            config, objective, student.config, dataset, pairs[3:5], kd.FrameSharpener
        )

    return make


def weights_in(run, file="last.pth"):
    """Every trained and averaged weight of a run's file."""
    content = torch.load(run / file, weights_only=True)
    if "params" in content:
        return content["params"]
    averaged = {f"averaged {name}": tensor for name, tensor in content["ema"].items()}
    return content["objective"] | averaged


def equal(first, second):
    """Whether two dictionaries of tensors are the same."""
    assert first.keys() == second.keys()
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def read_log(run):
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- Order ----------------------------------------------------------------------------------------


def test_every_epoch_sees_every_pair_and_counts_its_last_group():
    config = kd.RunConfig(epochs=3, batch_size=1, gradient_accumulation_steps=4)
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


def test_the_last_batch_of_an_epoch_is_filled():
    config = kd.RunConfig(epochs=1, batch_size=4, gradient_accumulation_steps=1)
    batches = list(kd.CropOrder(10, config))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert {index for batch in batches for _, index in batch} == set(range(10))


def test_processes_share_out_what_one_process_sees():
    alone = kd.CropOrder(8, kd.RunConfig(epochs=2, batch_size=1, gradient_accumulation_steps=4))
    config = kd.RunConfig(epochs=2, batch_size=1, gradient_accumulation_steps=2)
    shares = [kd.CropOrder(8, config, rank, processes=2) for rank in (0, 1)]
    assert shares[0].steps_per_epoch == alone.steps_per_epoch
    one = np.array(list(alone))
    two = np.array([list(share) for share in shares])
    for step in range(4):
        expected = {tuple(item) for item in one[4 * step : 4 * step + 4, 0]}
        seen = two[:, 2 * step : 2 * step + 2, 0].reshape(-1, 2)
        assert {tuple(item) for item in seen} == expected


# --- One step -------------------------------------------------------------------------------------


def test_the_averaged_weights_follow_their_formula():
    average = nn.Linear(1, 1, bias=False)
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(average.weight, 1.0)
    by_hand = 1.0
    for step, value in enumerate([2.0, -3.0, 5.0]):
        nn.init.constant_(network.weight, value)
        kd.update_ema(average, dict(network.named_parameters()), step, decay=0.2)
        decay = min(0.2, (1 + step) / (10 + step))
        by_hand = decay * by_hand + (1 - decay) * value
        assert average.weight.item() == pytest.approx(by_hand)


def test_a_short_runs_average_forgets_its_start():
    average = nn.Linear(1, 1, bias=False)
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(average.weight, 1.0)
    nn.init.constant_(network.weight, 0.0)
    for step in range(100):
        kd.update_ema(average, dict(network.named_parameters()), step, decay=0.999)
    assert average.weight.item() < 1e-6  # a plain 0.999 leaves 0.9


def test_an_expansion_adds_a_product_to_every_3x3_kernel():
    torch.manual_seed(0)
    shape = {"stem_stride": 2, "widths": (4, 6), "skips": "lateral"}
    student = kd.StudentUNet(**shape)
    expected = kd.StudentUNet(**shape)
    loss = kd.DistillationLoss({"reconstruction": 1.0})
    objective = kd.Objective(student, None, loss, expansion=5)
    assert equal(objective.weights(), dict(student.named_parameters()))  # at first

    expected.load_state_dict(student.state_dict())
    expansions = iter(objective.expansions)
    for weight in expected.parameters():
        if weight.shape[2:] == (3, 3):
            expansion = next(expansions)
            nn.init.normal_(expansion.outer)
            inner = expansion.inner.unflatten(1, weight.shape[1:])
            weight.data += torch.einsum("or,rixy->oixy", expansion.outer, inner).data
    assert next(expansions, None) is None

    batch = {"blurred": torch.rand(2, 3, 16, 16), "sharp": torch.rand(2, 3, 16, 16)}
    found = objective(batch, torch.autocast("cpu", enabled=False))["reconstruction"]
    assert torch.allclose(found, (expected(batch["blurred"]) - batch["sharp"]).abs().mean())
    kd.update_ema(student, objective.weights(), step=0, decay=0.0)
    assert all(map(torch.allclose, student.parameters(), expected.parameters()))


def test_expansions_are_multiplied_in_float32(monkeypatch):
    student = kd.StudentUNet(stem_stride=2, widths=(4, 6), skips="lateral")
    objective = kd.Objective(student, None, kd.DistillationLoss({"ssim": 1.0}), expansion=5)
    expand = kd.Expansion.forward
    products = []

    def seen(expansion, kernel):
        products.append(torch.is_autocast_enabled("cpu"))
        return expand(expansion, kernel)

    monkeypatch.setattr(kd.Expansion, "forward", seen)
    batch = {"blurred": torch.rand(1, 3, 32, 32), "sharp": torch.rand(1, 3, 32, 32)}
    objective(batch, torch.autocast("cpu", torch.bfloat16))
    assert products == [False] * len(objective.expansions)


def test_a_runs_files_are_removed_and_no_others(tmp_path):
    for name in ("last.pth", "best.pth", "log.csv", "curves.png", "notes.txt", "other/best.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("something")
    kd.remove_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "other"]
    assert (tmp_path / "other/best.pth").exists()


def test_an_accumulated_gradient_is_the_mean_over_its_group(make_run):
    run = make_run(gradient_accumulation_steps=2, clip_norm=0.0)
    student = run.objective.network
    items = [item for batch in run.order for item in batch]
    batches = iter([default_collate(run.dataset.__getitems__([item])) for item in items])
    found = []
    run.optimiser.step = lambda: found.append(student.output.weight.grad.clone())
    for _ in range(2):
        run.accumulate_gradients(batches)
        run.take_step(rate=0.1)
        run.step += 1

    expected = []
    for item in items:
        example = run.dataset[item]
        output = student(example["blurred"][None])
        sharp = example["sharp"][None]
        student.zero_grad()
        ((output - sharp).abs().mean() + 10 * (1 - kd.ssim(output, sharp, every=2))).backward()
        expected.append(student.output.weight.grad.clone())
    assert torch.allclose(found[0], (expected[0] + expected[1]) / 2, atol=1e-5)
    assert torch.allclose(found[1], expected[2], atol=1e-5)  # the last, partial group


def test_the_logged_terms_are_means_over_the_group(make_run):
    run = make_run(gradient_accumulation_steps=3)
    items = [item for batch in run.order for item in batch]
    batches = iter([default_collate(run.dataset.__getitems__([item])) for item in items])
    terms = run.accumulate_gradients(batches)
    errors = []
    for item in items:
        example = run.dataset[item]
        output = run.objective.network(example["blurred"][None])[0]
        errors.append((output - example["sharp"]).abs().mean().item())
    assert terms["reconstruction"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_a_step_has_its_rate_and_its_largest_gradient(make_run):
    run = make_run(clip_norm=0.5)
    parameters = list(run.trained.values())
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    count = sum(parameter.numel() for parameter in parameters)
    taken = []

    def step():
        squares = [parameter.grad.square().sum() for parameter in parameters]
        taken.append(float(torch.stack(squares).sum().sqrt()))

    run.optimiser.step = step
    assert run.take_step(rate=0.125) == pytest.approx(3 * math.sqrt(count), rel=1e-4)
    assert taken == [pytest.approx(0.5, rel=1e-4)]
    assert run.optimiser.param_groups[0]["lr"] == 0.125
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_the_rate_is_pytorchs_warm_restarts_behind_a_linear_warm_up(warmup_steps):
    steps_per_epoch = 7
    config = kd.RunConfig(
        learning_rate=1e-3,
        min_learning_rate=1e-5,
        restart_epochs=3,
        warmup_steps=warmup_steps,
    )
    optimiser = torch.optim.Adam([nn.Parameter(torch.zeros(1))], config.learning_rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimiser, T_0=3, T_mult=2, eta_min=1e-5
    )
    cycles = 3 + 6 + 12 + 24
    for step in range(cycles * steps_per_epoch):
        scheduler.step(step / steps_per_epoch)
        warm_up = min(1, (step + 1) / warmup_steps) if warmup_steps else 1
        expected = warm_up * scheduler.get_last_lr()[0]
        assert kd.learning_rate(step, steps_per_epoch, config) == pytest.approx(expected)


def test_the_shares_of_the_gradient_are_norms_by_hand():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    unused = torch.tensor([5.0], requires_grad=True)
    terms = {"a": (3 * weight[0] + 4 * weight[1]), "b": 15 * weight[1]}
    shares = kd.gradient_shares(terms, [weight, unused])
    assert shares == pytest.approx({"gradient_a": 5 / 20, "gradient_b": 15 / 20})


# --- Gradients that are not finite ----------------------------------------------------------------


@pytest.fixture
def spoil_gradients(monkeypatch):
    """A function that makes some steps' gradients NaN, and returns the weights before each step."""
    accumulate = kd.TrainingRun.accumulate_gradients

    def spoil(steps):
        before = []

        def accumulate_and_spoil(run, batches):
            before.append({name: p.detach().clone() for name, p in run.trained.items()})
            terms = accumulate(run, batches)
            if run.step in steps:
                next(iter(run.trained.values())).grad[0] = math.nan
            return terms

        monkeypatch.setattr(kd.TrainingRun, "accumulate_gradients", accumulate_and_spoil)
        return before

    return spoil


def test_a_step_whose_gradient_is_not_finite_is_skipped(arguments, tmp_path, spoil_gradients):
    before = spoil_gradients(steps=(1,))
    assert kd.main([*arguments, "--run-dir", str(tmp_path), "--max-steps", "4"]) == 0
    changed = [not equal(first, second) for first, second in itertools.pairwise(before)]
    assert changed == [True, False, True]
    assert all(tensor.isfinite().all() for tensor in weights_in(tmp_path).values())
    norms = [row["gradient_norm"] for row in read_log(tmp_path)]
    assert norms[1] == "nan"
    assert all(math.isfinite(float(norms[step])) for step in (0, 2, 3))


def test_ten_in_a_row_stop_the_run_at_its_last_good_state(
    arguments, tmp_path, spoil_gradients, capsys
):
    # Nine in a row are forgiven, and do not count for the ten after them.
    before = spoil_gradients(steps=(*range(1, 10), *range(12, 30)))
    assert kd.main([*arguments, "--run-dir", str(tmp_path), "--max-steps", "30"]) == 2
    assert len(before) == 12 + 10
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "step 12: the gradients of 10 steps in a row are not finite" in error
    assert f"{tmp_path / 'last.pth'}: go on with --resume" in error

    last = torch.load(tmp_path / "last.pth", weights_only=True)
    assert last["step"] == 12
    assert equal(last["objective"], before[12])
    assert all(tensor.isfinite().all() for tensor in weights_in(tmp_path).values())
    assert [row["step"] for row in read_log(tmp_path)] == [str(1 + i) for i in range(12)]


def test_a_run_that_was_stopped_so_goes_on(arguments, tmp_path, spoil_gradients):
    spoil_gradients(steps=range(2, 30))
    assert kd.main([*arguments, "--run-dir", str(tmp_path), "--max-steps", "30"]) == 2
    spoil_gradients(steps=())
    again = ["train", "--resume", "--run-dir", str(tmp_path), "--max-steps", "4"]
    assert kd.main(again) == 0
    assert [row["step"] for row in read_log(tmp_path)] == ["1", "2", "3", "4"]


# --- What a run leaves ----------------------------------------------------------------------------


def test_gradient_shares_leave_out_what_is_frozen():
    torch.manual_seed(0)
    student = kd.StudentUNet(stem_stride=2, widths=(4, 4), skips="lateral", luma=True)
    objective = kd.Objective(student, None, kd.DistillationLoss({"reconstruction": 1.0}, 1.0))
    frozen = [name for name, p in objective.network.named_parameters() if not p.requires_grad]
    assert "output.weight" in frozen
    blurred = torch.rand(2, 3, 32, 32)
    term = (student(blurred) - blurred.flip(0)).abs().mean()
    trained = [p for p in objective.network.parameters() if p.requires_grad]
    assert kd.gradient_shares({"reconstruction": term}, trained) == {"gradient_reconstruction": 1.0}

    # What is said of the best weights is what they reach.


def test_the_log_holds_terms_shares_and_scores(arguments, tmp_path):
    command = [*arguments, "--run-dir", str(tmp_path), "--max-steps", "3", "--log-gradients", "2"]
    assert kd.main(command) == 0
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [row["epoch"] for row in rows] == ["0.0", "0.5", "1.0"]
    assert float(rows[0]["learning_rate"]) == 2e-4
    assert all(float(row["seconds"]) > 0 for row in rows)
    terms = ("reconstruction", "feature", "kl", "ssim")
    for row in rows:
        total = sum(float(row[name]) for name in terms)
        assert float(row["loss"]) == pytest.approx(total, rel=1e-4)
    shares = [float(rows[0][f"gradient_{name}"]) for name in terms]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert rows[1]["gradient_ssim"] == ""
    assert rows[2]["gradient_ssim"] != ""
    assert rows[1]["val_psnr"] == ""
    assert (tmp_path / "curves.png").stat().st_size > 1000

    best = torch.load(tmp_path / "best.pth", weights_only=True)
    assert best["step"] == 3
    assert best["held_out"]["psnr"] == float(rows[2]["val_psnr"])
    _, held_out = kd.hold_out(kd.find_pairs(Path(arguments[2]) / "train"), 0.1)
    sharpener = kd.load_sharpener(tmp_path / "best.pth")
    scores = kd.score_method(sharpener, [pair.load() for pair in held_out])
    assert best["held_out"] == scores | {"pictures": len(held_out)}


def test_the_best_weights_are_the_averaged_ones(arguments, tmp_path):
    command = [*arguments, *WITHOUT_TEACHER, "--learning-rate", "0.01", "--expansion", "3"]
    assert kd.main([*command, "--run-dir", str(tmp_path), "--max-steps", "3"]) == 0
    best = torch.load(tmp_path / "best.pth", weights_only=True)["params"]
    last = torch.load(tmp_path / "last.pth", weights_only=True)
    assert equal(best, last["ema"])
    trained = last["objective"]["network.output.weight"]
    assert not torch.allclose(best["output.weight"], trained, atol=1e-4)


def test_the_average_moves_with_the_weights(make_run):
    run = make_run(max_steps=1, learning_rate=0.01)
    network = run.objective.network
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    run.train()
    assert not torch.allclose(network.output.weight, start["output.weight"], atol=1e-3)
    for name, average in run.ema.named_parameters():
        trained = network.get_parameter(name)
        assert torch.allclose(average, 0.1 * start[name] + 0.9 * trained, atol=1e-6)


@pytest.fixture
def scripted_scores(monkeypatch):
    """A function that sets the PSNR of the frames that are scored next, one after another."""

    def script(*values):
        left = iter(values)
        monkeypatch.setattr(kd, "score", lambda *frames: {"psnr": next(left), "ssim": 0.5})

    return script


def test_the_best_weights_are_those_of_the_best_validation(arguments, tmp_path, scripted_scores):
    command = [*arguments, *WITHOUT_TEACHER, "--validate-every", "1", "--epochs", "4"]
    scripted_scores(20.0, 30.0, 25.0, 29.0, 10.0)  # four validations, and the blurred frame
    assert kd.main([*command, "--run-dir", str(tmp_path)]) == 0
    rows = read_log(tmp_path)
    scores = {row["step"]: row["val_psnr"] for row in rows if row["val_psnr"]}
    assert scores == {"2": "20.0", "4": "30.0", "6": "25.0", "8": "29.0"}
    best = torch.load(tmp_path / "best.pth", weights_only=True)
    assert best["step"] == 4
    assert best["held_out"] == {"psnr": 30.0, "ssim": 0.5, "pictures": 1}
    assert torch.load(tmp_path / "last.pth", weights_only=True)["best"] == 30.0


def test_a_resumed_run_remembers_its_best_score(arguments, tmp_path, scripted_scores):
    command = [*arguments, *WITHOUT_TEACHER, "--validate-every", "1"]
    scripted_scores(30.0, 10.0)
    assert kd.main([*command, "--run-dir", str(tmp_path), "--epochs", "1"]) == 0
    before = (tmp_path / "best.pth").read_bytes()
    again = ["train", "--resume", "--run-dir", str(tmp_path), "--epochs"]
    scripted_scores(29.0, 10.0)
    assert kd.main([*again, "2"]) == 0
    assert (tmp_path / "best.pth").read_bytes() == before
    scripted_scores(31.0, 10.0)
    assert kd.main([*again, "3"]) == 0
    assert torch.load(tmp_path / "best.pth", weights_only=True)["step"] == 6


def test_a_picture_that_is_restored_exactly_counts_as_60_decibels(make_run, scripted_scores):
    run = make_run()
    run.config.run_dir.mkdir()
    cases = (
        ((math.inf, 20.0), 40.0, 40.0),
        ((70.0, 21.0), 40.5, 40.5),
        ((70.0, 20.0), 40.0, 40.5),
    )
    for psnrs, mean, best in cases:
        scripted_scores(*psnrs)
        assert run.validate() == {"val_psnr": mean, "val_ssim": 0.5}
        assert run.best == best


def test_training_improves_held_out_pictures(data_root, tmp_path, capsys):
    command = [
        *("train", "--data-root", str(data_root), "--run-dir", str(tmp_path), *STUDENT, "--cache"),
        *("--epochs", "120", "--restart-epochs", "120", "--validate-every", "120"),
        *("--batch-size", "3", "--gradient-accumulation-steps", "1", "--image-size", "64"),
        *("--learning-rate", "3e-3", "--blur-probability", "0", "--workers", "0"),
        *(*WITHOUT_TEACHER, "--lambda-ssim", "1", "--lambda-reconstruction", "10"),
        *("--validation-fraction", "0.25"),
    ]
    assert kd.main(command) == 0
    before, after = capsys.readouterr().out.strip().splitlines()[-2:]
    psnr_before, ssim_before = re.fullmatch(r"blurred:   (\S+) / (\S+)", before).groups()
    psnr_after, ssim_after = re.fullmatch(r"sharpened: (\S+) / (\S+)", after).groups()
    assert float(psnr_after) > float(psnr_before) + 0.1
    assert float(ssim_after) > float(ssim_before) + 0.01


def test_bf16_training_stays_close_to_float32(arguments, tmp_path):
    losses = []
    for precision in ("float32", "bf16"):
        command = [*arguments, "--run-dir", str(tmp_path / precision), "--precision", precision]
        assert kd.main([*command, "--max-steps", "2"]) == 0
        losses.append([float(row["loss"]) for row in read_log(tmp_path / precision)])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_validation_computes_in_the_precision_of_the_run(arguments, tmp_path, monkeypatch):
    precisions = []
    sharpener = kd.FrameSharpener

    def make(*positional, **options):
        precisions.append(options["precision"])
        return sharpener(*positional, **options)

    monkeypatch.setattr(kd, "FrameSharpener", make)
    command = [*arguments, "--run-dir", str(tmp_path), "--max-steps", "1"]
    assert kd.main([*command, "--precision", "float32"]) == 0
    assert precisions == ["float32"]


# --- Resuming -------------------------------------------------------------------------------------


def test_a_resumed_run_reaches_the_same_weights(arguments, tmp_path):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    arguments = [*arguments, "--expansion", "3"]
    assert kd.main([*arguments, "--run-dir", str(whole), "--max-steps", "5"]) == 0
    assert kd.main([*arguments, "--run-dir", str(parts), "--max-steps", "3"]) == 0
    assert not equal(weights_in(whole), weights_in(parts))
    # Nothing but the folder is named: the run's settings are in last.pth.
    assert kd.main(["train", "--resume", "--run-dir", str(parts), "--max-steps", "5"]) == 0
    weights = weights_in(whole)
    assert equal(weights, weights_in(parts))
    assert any(name.startswith("teacher.proj_e2") for name in weights)
    assert any(weights[name].any() for name in weights if name.endswith("outer"))
    assert kd.load_student(whole / "best.pth")[0].config["widths"] == (4, 6, 8, 8, 8)

    def reproducible(row):
        return {k: v for k, v in row.items() if k != "seconds" and not k.startswith("val_")}

    logs = [[reproducible(row) for row in read_log(run)] for run in (whole, parts)]
    assert logs[0] == logs[1]


def test_what_is_said_for_one_call_is_not_saved_with_the_run(arguments, tmp_path):
    command = [*arguments, "--run-dir", str(tmp_path), "--max-steps", "1", "--overwrite"]
    assert kd.main([*command, "--preset", "report"]) == 0
    saved = torch.load(tmp_path / "last.pth", weights_only=True)["config"]
    assert not {"overwrite", "resume", "preset"} & saved.keys()
    for steps in ("2", "3"):
        again = ["train", "--resume", "--run-dir", str(tmp_path), "--max-steps", steps]
        assert kd.main(again) == 0
    assert [row["step"] for row in read_log(tmp_path)] == ["1", "2", "3"]


def test_a_run_of_another_command_is_not_resumed(tmp_path, capsys):
    torch.save({"config": {"dim": 24, "run_dir": str(tmp_path)}}, tmp_path / "last.pth")
    for command in ("train", "teacher"):
        assert kd.main([command, "--resume", "--run-dir", str(tmp_path)]) == 2
        assert "last.pth: another command's run" in capsys.readouterr().err


def test_a_run_of_another_network_is_not_resumed(arguments, tmp_path, capsys):
    assert kd.main([*arguments, "--run-dir", str(tmp_path), "--max-steps", "1"]) == 0
    before = (tmp_path / "last.pth").read_bytes()
    again = ["train", "--resume", "--run-dir", str(tmp_path), "--widths", "4", "4", "4", "4", "8"]
    assert kd.main(again) == 2
    assert "last.pth: does not fit this run's network" in capsys.readouterr().err
    assert (tmp_path / "last.pth").read_bytes() == before


def test_overwrite_leaves_nothing_of_the_run_before(arguments, tmp_path, monkeypatch):
    command = [*arguments, "--run-dir", str(tmp_path), "--max-steps", "2"]
    assert kd.main(command) == 0
    found = []

    def stop(run, batches):
        found.append(sorted(path.name for path in tmp_path.glob("[!.]*")))
        raise KeyboardInterrupt

    monkeypatch.setattr(kd.TrainingRun, "accumulate_gradients", stop)
    again = ["train", "--resume", "--run-dir", str(tmp_path), "--max-steps", "3"]
    assert kd.main(again) == 130
    assert kd.main([*command, "--overwrite"]) == 130
    assert found == [["best.pth", "curves.png", "last.pth", "log.csv"], []]


def test_a_folder_belongs_to_one_run_at_a_time(arguments, tmp_path, capsys, monkeypatch):
    pytest.importorskip("fcntl")
    command = [*arguments, "--run-dir", str(tmp_path), "--max-steps", "1"]
    seen = []

    def a_second_run_begins(run):
        before = sorted(tmp_path.glob("[!.]*"))
        seen.append(kd.main([*command, "--overwrite"]))
        assert sorted(tmp_path.glob("[!.]*")) == before

    with monkeypatch.context() as patch:
        patch.setattr(kd.TrainingRun, "train", a_second_run_begins)
        kd.main(command)
    assert seen[0] == 2
    assert f"{tmp_path}: process {os.getpid()} is training there" in capsys.readouterr().err
    assert kd.main(command) == 0  # the first has ended


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / (kd.temporary_name(ended.pid, 1) + ".pth")
    being_written = tmp_path / (kd.temporary_name(os.getppid(), 1) + ".pth")
    no_process = tmp_path / (kd.temporary_name(10**30, 1) + ".pth")
    of_another_computer = tmp_path / f".sharpen_kd-00000000-{ended.pid}-1.pth"
    for file in (left, being_written, no_process, of_another_computer):
        file.write_bytes(b"half")
    kd.write_checkpoint({"step": 1}, tmp_path / "last.pth")
    files = {tmp_path / "last.pth", being_written, no_process, of_another_computer}
    assert set(tmp_path.iterdir()) == files


def test_what_another_user_left_half_written_stops_nobody(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / (kd.temporary_name(ended.pid, 1) + ".pth")
    left.write_bytes(b"half")
    unlink = Path.unlink

    def in_a_folder_for_all(path, **options):
        if path == left:
            raise PermissionError(1, "Operation not permitted")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", in_a_folder_for_all)
    kd.write_checkpoint({"step": 1}, tmp_path / "last.pth")
    assert set(tmp_path.iterdir()) == {left, tmp_path / "last.pth"}


BAD_SETTINGS = {
    "epochs": "many",
    "learning_rate": -1.0,
    "degradation": "rain",
    "widths": (3, "x"),
    "image_size": 10**30,
    "seed": None,
    "network": ["unet"],
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_resumed_runs_settings_are_checked_as_flags_are(arguments, tmp_path, capsys, name):
    command = [*arguments, "--run-dir", str(tmp_path), "--max-steps", "1"]
    assert kd.main(command) == 0
    last = torch.load(tmp_path / "last.pth", weights_only=True)
    last["config"][name] = BAD_SETTINGS[name]
    torch.save(last, tmp_path / "last.pth")
    capsys.readouterr()
    assert kd.main(["train", "--resume", "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'last.pth'}: " in error
    assert name.replace("_", "-") in error
    assert error.count("\n") == 1


def test_a_run_is_kept_without_its_last_state_and_continues_where_it_was_moved(
    arguments, tmp_path, capsys
):
    run = tmp_path / "run"
    moved = tmp_path / "moved"
    assert kd.main([*arguments, "--run-dir", str(run), "--max-steps", "1"]) == 0
    run.rename(moved)
    assert kd.main(["train", "--resume", "--run-dir", str(moved), "--max-steps", "2"]) == 0
    assert not run.exists()
    assert [row["step"] for row in read_log(moved)] == ["1", "2"]

    for name in ("last.pth", "best.pth"):
        (moved / name).unlink()
        assert kd.main([*arguments, "--run-dir", str(moved)]) == 2
        assert "holds a run already" in capsys.readouterr().err
    assert (moved / "log.csv").exists()


def test_a_run_goes_on_with_epochs_of_the_same_length(arguments, tmp_path, capsys):
    assert kd.main([*arguments, "--run-dir", str(tmp_path), "--max-steps", "1"]) == 0
    before = (tmp_path / "last.pth").read_bytes()
    resume = ["train", "--resume", "--run-dir", str(tmp_path), "--max-steps", "2"]
    assert kd.main([*resume, "--batch-size", "2"]) == 2
    assert "--resume: epochs had" in capsys.readouterr().err
    assert (tmp_path / "last.pth").read_bytes() == before
    # Half as many accumulated crops of twice the size of a batch are the same step.
    halves = ["--batch-size", "2", "--gradient-accumulation-steps", "2"]
    assert kd.main([*resume, *halves]) == 0


def test_of_a_large_held_out_picture_the_middle_is_scored():
    pictures = [np.arange(1100 * 1400 * 3).reshape(1100, 1400, 3)] * 2
    for middle in kd.middle_of(pictures):
        assert middle.shape == (1024, 1024, 3)
        assert middle[0, 0, 0] == (32 * 1400 + 184) * 3  # 38 and 188, at the block before
    small = kd.middle_of([picture[:50, :2000] for picture in pictures])
    assert small[1].shape == (50, 1024, 3)


def test_a_rate_below_the_lowest_one_stays_as_it_is():
    config = kd.TrainConfig(learning_rate=1e-7, min_learning_rate=1e-6, warmup_steps=0)
    assert {kd.learning_rate(step, 2, config) for step in range(40)} == {1e-7}


def test_a_run_that_is_resumed_where_it_ends_is_validated(arguments, tmp_path):
    assert kd.main([*arguments, "--run-dir", str(tmp_path), "--max-steps", "2"]) == 0
    last = torch.load(tmp_path / "last.pth", weights_only=True)
    torch.save(last | {"best": -math.inf}, tmp_path / "last.pth")  # before the first validation
    (tmp_path / "best.pth").unlink()
    again = ["train", "--resume", "--run-dir", str(tmp_path), "--max-steps", "1"]
    assert kd.main(again) == 0
    assert torch.load(tmp_path / "best.pth", weights_only=True)["step"] == 2


def test_the_state_is_saved_as_often_as_is_asked(arguments, tmp_path, monkeypatch):
    saves = []
    save = kd.TrainingRun.save_last

    def note(run):
        saves.append(run.step)
        save(run)

    monkeypatch.setattr(kd.TrainingRun, "save_last", note)
    command = [*arguments, *WITHOUT_TEACHER, "--max-steps", "3"]
    assert kd.main([*command, "--run-dir", str(tmp_path / "a"), "--save-every", "0"]) == 0
    assert kd.main([*command, "--run-dir", str(tmp_path / "b"), "--save-every", "999"]) == 0
    assert saves == [1, 2, 3, 3, 3]


# --- Interruption ---------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "last.pth"
    kd.write_checkpoint({"step": 1}, file)

    def broken(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] disk full")  # as PyTorch does

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(kd.UserError, match=r"last.pth: cannot be written .*disk full"):
        kd.write_checkpoint({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_signal_during_the_final_save_does_not_spoil_it(arguments, tmp_path, monkeypatch):
    save = torch.save

    def interrupted_save(content, path):
        if "optimiser" in content:  # last.pth
            os.kill(os.getpid(), signal.SIGINT)
        save(content, path)

    monkeypatch.setattr(torch, "save", interrupted_save)
    assert kd.main([*arguments, "--run-dir", str(tmp_path), "--max-steps", "2"]) == 0
    assert torch.load(tmp_path / "last.pth", weights_only=True)["step"] == 2
    assert len(read_log(tmp_path)) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was before


def test_a_first_signal_is_noted_and_a_second_acts():
    def interrupt_twice():
        with kd.deferred_interrupts() as received:
            os.kill(os.getpid(), signal.SIGINT)
            assert received == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_loader_processes_leave_signals_to_the_training_process(make_run):
    run = make_run(workers=1, epochs=10)
    batches = iter(run.loader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGINT)
    assert os.getpgid(worker.pid) != os.getpgid(0)  # a signal to the group does not reach it
    assert len(list(batches)) == 10 * 3 - 1


def test_ctrl_c_saves_and_the_run_continues_to_the_same_weights(arguments, tmp_path):
    run = tmp_path / "run"
    whole = tmp_path / "whole"
    arguments = [*arguments, "--threads", "1", "--epochs", "100000"]
    command = [sys.executable, SCRIPT, *arguments, "--run-dir", str(run), "--workers", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        seen = ""
        while "step 1 of " not in seen:
            line = process.stdout.readline()
            assert line, f"ended before its first step: {seen}"
            seen += line
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the loader process gets it too
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "Traceback" not in output
    steps = torch.load(run / "last.pth", weights_only=True)["step"]
    assert f"stopped after step {steps}; continue with --resume --run-dir {run}" in output

    limit = ["--max-steps", str(steps + 2)]
    threads = torch.get_num_threads()
    assert kd.main(["train", "--resume", "--run-dir", str(run), "--workers", "0", *limit]) == 0
    assert kd.main([*arguments, "--run-dir", str(whole), *limit]) == 0
    torch.set_num_threads(threads)
    assert equal(weights_in(whole), weights_in(run))


# --- Several processes ----------------------------------------------------------------------------


def test_two_processes_match_one(arguments, tmp_path):
    one = tmp_path / "one"
    two = tmp_path / "two"
    common = [*arguments, "--max-steps", "3", "--threads", "1", "--precision", "float32"]
    common += ["--validation-fraction", "0", "--lambda-ssim", "1"]
    threads = torch.get_num_threads()
    command = [*common, "--gradient-accumulation-steps", "4", "--run-dir", str(one)]
    assert kd.main(command) == 0
    torch.set_num_threads(threads)

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*common, "--gradient-accumulation-steps", "2", "--run-dir", str(two)]
    done = subprocess.run(
        [*torchrun, SCRIPT, *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first = weights_in(one, "best.pth")
    second = weights_in(two, "best.pth")
    start = kd.StudentUNet(stem_stride=2, widths=(4, 6, 8, 8, 8))
    assert not torch.allclose(first["output.weight"], start.output.weight, atol=1e-4)
    for name in first:
        assert torch.allclose(first[name], second[name], atol=2e-5), name


def test_a_signal_to_one_process_stops_all_after_the_same_step(arguments, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SCRIPT, *arguments, "--epochs", "100000", "--threads", "1"]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    processes = []
    for rank in (0, 1):
        environment = os.environ | meeting | {"RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        run = [*command, "--run-dir", str(tmp_path)]
        processes.append(subprocess.Popen(run, env=environment, **pipes))
    try:
        first, second = processes
        assert any("step 1 of " in line for line in first.stdout)
        second.send_signal(signal.SIGINT)
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [130, 130], outputs
    steps = torch.load(tmp_path / "last.pth", weights_only=True)["step"]
    assert f"stopped after step {steps}" in outputs[0]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_picture_that_breaks_off_is_named(arguments, data_root, tmp_path, capfd, workers):
    root = tmp_path / "data"
    shutil.copytree(data_root, root)
    for broken in (root / "train/sharp").rglob("*_[0-3].png"):
        broken.write_bytes(broken.read_bytes()[:2000])  # the header, and so the size, is whole
    command = [*arguments, "--run-dir", str(tmp_path / "run"), "--validation-fraction", "0"]
    assert kd.main([*command, "--data-root", str(root), "--workers", workers]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    start = r"sharpen_kd: error: \S+/train/sharp/\w+/\w+_\d.png: not a readable picture"
    assert re.match(start, error)
