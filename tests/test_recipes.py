"""Presets, mistakes in a run's settings, the teacher's command, and the ablation."""

import csv
import dataclasses
import json
import os
import statistics
from pathlib import Path

import pytest
import torch

import sharpen_kd as kd

STUDENT = ["--stem-stride", "2", "--widths", "4", "6", "8", "8", "8"]


@pytest.fixture
def arguments(data_root, tiny_teacher):
    """What a `train` or `ablate` of a few seconds needs, without a --run-dir."""
    return [
        *("--data-root", str(data_root), "--teacher-weights", str(tiny_teacher), *STUDENT),
        *("--image-size", "32", "--lambda-perceptual", "0", "--workers", "0"),
        *("--validation-fraction", "0.1", "--device", "cpu"),
    ]


@pytest.fixture
def no_dataset(tmp_path, monkeypatch):
    """An empty folder in the place of GoPro_dataset/."""
    folder = tmp_path / "no_dataset"
    folder.mkdir()
    monkeypatch.setattr(kd, "DATASET", folder)
    return folder


def read_log(run):
    with (run / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def names_in(folder):
    return sorted(path.name for path in folder.glob("[!.]*"))


# --- Presets --------------------------------------------------------------------------------------


def save_settings(config, run_dir):
    """What resuming needs of a last.pth."""
    saved = {name: str(v) if isinstance(v, Path) else v for name, v in vars(config).items()}
    torch.save({"config": saved}, run_dir / "last.pth")


def test_without_a_dataset_the_demo_is_trained_and_goes_on_as_such(
    tmp_path, no_dataset, monkeypatch
):
    config = kd.resolve_config(kd.TrainConfig, {"run_dir": tmp_path, "epochs": 3})
    assert config.preset == "demo"
    assert config.data_root is None
    assert (config.epochs, config.stem_stride) == (3, 2)  # what is given rules the preset's

    save_settings(config, tmp_path)
    monkeypatch.setattr(kd, "list_pictures", lambda folder: [folder / "a.png"])  # came later
    assert kd.resolve_config(kd.TrainConfig, {}).preset == "report"
    resumed = kd.resolve_config(kd.TrainConfig, {"run_dir": tmp_path, "resume": True})
    assert resumed == dataclasses.replace(config, resume=True, preset="")  # which is said once


def test_a_run_without_a_named_folder_is_resumed_in_its_presets(tmp_path, monkeypatch):
    monkeypatch.setitem(kd.PRESETS, "small", kd.Preset("small", {"run_dir": tmp_path}))
    save_settings(kd.TrainConfig(epochs=7, run_dir=Path("where/it/began")), tmp_path)
    resumed = kd.resolve_config(kd.TrainConfig, {"resume": True, "preset": "small", "seed": 3})
    assert resumed.run_dir == tmp_path
    assert (resumed.epochs, resumed.seed) == (7, 3)


def test_the_reports_preset_is_the_defaults():
    config = kd.resolve_config(kd.TrainConfig, {"preset": "report"})
    assert config == kd.TrainConfig(preset="report")
    weights = {name: getattr(config, f"lambda_{name}") for name in kd.LOSS_TERMS}
    assert list(weights.values()) == [1.0, 0.01, 1.0, 0.01, 10.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("given", "kind", "sizes"),
    [
        (
            {},
            "unet",
            {"widths": (16, 16, 32, 48), "convolutions": (4, 3, 2, 1), "skips": "lateral"},
        ),
        (
            {"base_channels": 32},
            "unet",
            {"widths": (8, 16, 32, 64, 96), "convolutions": (2,) * 5, "skips": "concatenate"},
        ),
        (
            {"widths": (4,) * 3, "skips": "lateral", "convolutions": (1,)},
            "unet",
            {"widths": (4,) * 3, "convolutions": (1,) * 3, "skips": "lateral"},
        ),
        ({"preset": "small"}, "unet", {"widths": (12, 16, 16, 24), "luma": True}),
        (
            {"preset": "call", "widths": (8,) * 4},
            "unet",
            {"widths": (8,) * 4, "convolutions": (2,) * 4, "luma": True},
        ),
        ({"network": "plain"}, "plain", {"width": 16, "layers": 6}),
    ],
)
def test_given_sizes_rule_the_presets(given, kind, sizes):
    config = kd.resolve_config(kd.TrainConfig, {"preset": "demo"} | given)
    student = kd.student_class(config.network).from_flags(config)
    assert student.config["kind"] == kind
    assert {name: student.config[name] for name in sizes} == sizes


def test_the_rate_falls_to_the_end_of_as_many_epochs_as_are_given():
    def epochs(**given):
        config = kd.resolve_config(kd.TrainConfig, given)
        return config.epochs, config.restart_epochs

    assert epochs(preset="small", epochs=5) == (5, 5)  # in one cycle, as the preset has it
    assert epochs(preset="small", epochs=5, restart_epochs=2) == (5, 2)
    assert epochs(preset="report", epochs=5) == (5, 10)  # the report's schedule has cycles


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        ({"network": "plain", "widths": (8,), "luma": True}, "--luma"),
        ({"network": "plain", "widths": (8,), "skips": "lateral"}, "--skips"),
        ({"widths": (8, 8), "base_channels": 512}, "--base-channels"),
    ],
)
def test_flags_that_a_student_would_not_use_are_refused(given, unused):
    with pytest.raises(kd.UserError, match=f"{unused}: not used by this student"):
        kd.resolve_config(kd.TrainConfig, {"preset": "demo"} | given)


def test_the_small_preset_starts_from_the_shipped_fast_student():
    config = kd.resolve_config(kd.TrainConfig, {"preset": "small", "device": "cpu"})
    objective = kd.make_objective(config, resumed=False)
    shipped, _ = kd.load_student("fast")
    assert objective.network.config == shipped.config
    weights = objective.network.state_dict()
    for name, tensor in shipped.state_dict().items():
        assert torch.equal(weights[name], tensor)
    assert objective.loss.lambdas == {"reconstruction": 10.0, "kl": 100.0, "ssim": 1.0}

    kept = kd.make_objective(config, resumed=True).network.state_dict()
    assert not torch.equal(kept["correction.weight"], weights["correction.weight"])


def test_an_ablation_takes_a_presets_settings_but_not_its_folder():
    config = kd.resolve_config(kd.AblateConfig, {"preset": "small"})
    assert config.batch_size == kd.PRESETS["small"].settings["batch_size"]
    assert config.run_dir == kd.AblateConfig.run_dir != kd.RunConfig.run_dir


@pytest.mark.parametrize("preset", ["small", "demo"])
def test_the_presets_for_two_cores_have_what_they_need(preset):
    config = kd.resolve_config(kd.TrainConfig, {"preset": preset})
    objective = kd.make_objective(config, resumed=False)
    assert objective.teacher is not None
    assert objective.loss.vgg is None  # no download
    assert {"kl", "reconstruction", "ssim"} == objective.loss.lambdas.keys()


def test_the_small_preset_trains_on_a_plain_folder_of_photos(sharp_folder, tmp_path, capsys):
    command = ["train", "--data-root", str(sharp_folder), "--preset", "small", "--max-steps", "2"]
    assert kd.main([*command, "--device", "cpu", "--run-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "--preset small: fine-tunes the shipped fast student" in printed
    assert "8 crops an epoch, 1 pictures held out" in printed  # 7, balanced
    assert "\nsharpened: " in printed
    student, _ = kd.load_student(tmp_path / "best.pth")
    assert student.config == kd.load_student("fast")[0].config


def test_the_demo_runs_on_the_pictures_in_scikit_image(tmp_path, no_dataset, capsys):
    command = ["train", "--max-steps", "1", "--device", "cpu", "--run-dir", str(tmp_path / "run")]
    assert kd.main(command) == 0
    printed = capsys.readouterr().out
    assert "--preset demo: " in printed
    assert "10 crops an epoch, 4 pictures held out; 1 steps; " in printed
    saved = torch.load(tmp_path / "run/last.pth", weights_only=True)["config"]
    assert saved["data_root"] is None


def test_the_demo_takes_a_plain_stack(tmp_path, no_dataset):
    command = ["train", "--network", "plain", "--max-steps", "1", "--device", "cpu"]
    assert kd.main([*command, "--run-dir", str(tmp_path / "run")]) == 0
    student, _ = kd.load_student(tmp_path / "run/best.pth")
    assert student.config == kd.PlainStack(stem_stride=2).config


# --- A run's settings -----------------------------------------------------------------------------


def test_a_run_follows_its_flags(data_root, tiny_teacher, monkeypatch):
    settings = {
        "data_root": data_root,
        "teacher_weights": tiny_teacher,
        "widths": (4, 6, 8),
        "stem_stride": 2,
        "temperature": 2.0,
        "lambda_perceptual": 0.0,
        "lambda_output": 0.5,
        "expansion": 3,
        "image_size": 64,
        "degradation": "x3",
        "seed": 5,
        "cache": True,
    }
    config = kd.TrainConfig(**settings)
    objective = kd.make_objective(config, resumed=False)
    assert objective.loss.temperature == 2.0
    assert objective.loss.lambdas["output"] == 0.5
    assert objective.network.config["widths"] == (4, 6, 8)
    assert objective.expansions[0].inner.shape[0] == 3

    training, held_out = kd.training_pairs(config)
    assert len(held_out) == 1
    assert {pair.degradation for pair in held_out} == {kd.PROTOCOLS["x3"]}
    crops = kd.training_crops(config, training)
    assert (crops.image_size, crops.seed, crops.degradation) == (64, 5, "x3")
    assert len(crops.decoded) == len(training) == 7


def test_a_student_of_another_shape_than_the_presets_says_what_to_add(sharp_folder, capsys):
    command = ["train", "--preset", "small", "--data-root", str(sharp_folder)]
    assert kd.main([*command, "--skips", "concatenate"]) == 2
    assert '--init "" begins from scratch' in capsys.readouterr().err
    assert kd.main([*command, "--stem-stride", "4"]) == 2
    assert "--luma: takes --stem-stride 2; add --no-luma" in capsys.readouterr().err
    config = kd.preset_config(kd.TrainConfig, {"preset": "small", "skips": "lateral", "init": ""})
    objective = kd.make_objective(dataclasses.replace(config, lambda_kl=0.0), resumed=False)
    assert objective.network.config["widths"] == kd.PRESETS["small"].settings["widths"]


def test_a_balanced_run_shows_its_categories_alike(sharp_folder, tmp_path):
    for file in sharp_folder.rglob("*.png"):
        if file.name not in ("page_0.png", "page_1.png"):
            target = tmp_path / "train" / file.relative_to(sharp_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    settings = {"data_root": tmp_path, "degradation": "mixed", "validation_fraction": 0.0}
    for balance, counts in ((False, [4, 2]), (True, [4, 4])):
        config = kd.TrainConfig(**settings, balance=balance)
        training, _ = kd.training_pairs(config)
        categories = [pair.category for pair in training]
        assert [categories.count("photo"), categories.count("text")] == counts


def test_a_teacher_names_its_own_flag_where_there_are_no_weights(data_root, tmp_path, capsys):
    command = ["teacher", "--data-root", str(data_root), "--run-dir", str(tmp_path / "run")]
    assert kd.main([*command, "--init", str(tmp_path / "none.pth")]) == 2
    error = capsys.readouterr().err
    assert "none.pth: no such file" in error
    assert "another file with --init" in error


def test_a_run_may_start_from_another_students_weights(arguments, tmp_path):
    first = tmp_path / "first"
    second = tmp_path / "second"
    command = ["train", *arguments]
    assert kd.main([*command, "--run-dir", str(first), "--max-steps", "3"]) == 0
    start = [*command, "--run-dir", str(second), "--init", str(first / "best.pth")]
    assert kd.main([*start, "--max-steps", "1", "--learning-rate", "1e-9"]) == 0
    before, after = (kd.load_student(run / "best.pth")[0].state_dict() for run in (first, second))
    assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)

    assert kd.main([*start, "--overwrite", "--widths", "4", "4", "4", "4", "8"]) == 2
    assert (second / "best.pth").exists()  # a mistake gives up no run


def test_a_larger_student_teaches_by_its_output_alone(arguments, tmp_path, capsys):
    command = ["train", *arguments, "--lambda-feature", "0", "--lambda-kl", "0"]
    first = tmp_path / "first"
    assert kd.main([*command, "--run-dir", str(first), "--max-steps", "3"]) == 0
    itself = str(first / "best.pth")
    run = tmp_path / "run"
    command += ["--run-dir", str(run), "--overwrite", "--max-steps", "1", "--lambda-output", "1"]
    outputs = {}
    for teacher in (itself, "quality"):
        assert kd.main([*command, "--init", itself, "--teacher-checkpoint", teacher]) == 0
        (row,) = read_log(run)
        outputs[teacher] = float(row["output"])
    assert outputs[itself] == 0  # it is as good as itself
    assert outputs["quality"] > 0.001
    capsys.readouterr()
    for extra, named in (
        (["--lambda-output", "0"], "no term compares with it"),
        (["--lambda-feature", "1"], "gives no features"),
        (["--teacher-cache", str(tmp_path / "cache")], "--teacher-cache holds"),
    ):
        assert kd.main([*command, "--teacher-checkpoint", "quality", *extra]) == 2
        assert f"--teacher-checkpoint quality: {named}" in capsys.readouterr().err


def test_mistakes_are_named_before_anything_is_written(arguments, tmp_path, capsys):
    none = ["--lambda-reconstruction", "0", "--lambda-feature", "0", "--lambda-kl", "0"]
    none += ["--lambda-ssim", "0"]
    mistakes = (
        (["--image-size", "40"], "--image-size 40: must be a multiple of 16"),
        (["--widths", "4"], "--widths (4,): a U-Net has two scales or more"),
        (["--convolutions", "1", "2"], "one for each of the 5 scales"),
        (["--teacher-weights", str(tmp_path / "none.pth")], "none.pth: no such file; get motion"),
        (["--data-root", str(tmp_path)], "no blurred/sharp pairs"),
        (["--degradation", "x2", "--data-root", str(tmp_path)], "no sharp pictures in this"),
        (["--init", str(tmp_path / "none.pth")], "none.pth: no such file"),
        (["--init", "fast"], "--init fast: its student is another"),
        (["--resume"], "last.pth: no such file"),
        (none, "all are 0"),
    )
    run = tmp_path / "run"
    for extra, named in mistakes:
        assert kd.main(["train", *arguments, "--run-dir", str(run), *extra]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
        assert not run.exists()


def test_a_run_is_not_replaced_by_mistake(arguments, tmp_path, capsys):
    command = ["train", *arguments, "--run-dir", str(tmp_path)]
    assert kd.main([*command, "--max-steps", "1"]) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert kd.main([*command, "--max-steps", "2"]) == 2
    assert "holds a run already: add --resume or --overwrite" in capsys.readouterr().err
    assert kd.main([*command, "--resume", "--overwrite"]) == 2
    assert "--resume, --overwrite: one goes on" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_teacher_is_looked_for_before_vgg19_is_downloaded(
    data_root, tmp_path, monkeypatch, denied, capsys
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    command = ["train", "--preset", "report", "--data-root", str(data_root)]
    command += ["--base-channels", "8", "--run-dir", str(tmp_path / "run")]
    none = ["--teacher-weights", str(tmp_path / "none.pth")]
    assert kd.main([*command, *none]) == 2
    assert "none.pth: no such file; get motion_deblurring.pth" in capsys.readouterr().err
    assert denied == []


def test_a_missing_vgg19_is_told_with_what_to_do(
    data_root, tiny_teacher, tmp_path, monkeypatch, denied, capsys
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    command = ["train", "--preset", "report", "--data-root", str(data_root)]
    command += ["--base-channels", "8", "--run-dir", str(tmp_path / "run")]
    assert kd.main([*command, "--teacher-weights", str(tiny_teacher)]) == 2
    assert denied == ["download.pytorch.org"]
    denied.clear()
    printed = capsys.readouterr()
    assert "Downloading VGG19 (548 MB)" in printed.out
    assert "--lambda-perceptual 0" in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- The teacher's command ------------------------------------------------------------------------

SMALL_TEACHER = ["--dim", "8", "--num-blocks", "1", "1", "1", "2", "--heads", "1", "1", "2", "2"]


@pytest.fixture
def teacher_arguments(data_root):
    """A `teacher` command of a small network, without its --run-dir."""
    command = ["teacher", "--data-root", str(data_root), *SMALL_TEACHER, "--image-size", "32"]
    return [*command, "--batch-size", "2", "--workers", "0", "--device", "cpu"]


def test_a_teachers_best_file_is_one_that_train_accepts(teacher_arguments, tmp_path):
    assert kd.main([*teacher_arguments, "--max-steps", "2", "--run-dir", str(tmp_path)]) == 0
    restormer = kd.load_restormer(tmp_path / "best.pth")
    assert len(restormer.latent) == 2
    assert restormer.stem_stride == 2
    rows = read_log(tmp_path)
    assert len(rows) == 2
    assert all(row["loss"] == row["reconstruction"] for row in rows)
    assert all(float(row["loss"]) > 0 for row in rows)


def test_a_teacher_continues_and_its_hooks_do_not_pile_up(teacher_arguments, tmp_path, monkeypatch):
    wrapped = []
    wrap = kd.RestormerTeacherWrapper

    def note(network):
        wrapped.append(network)
        return wrap(network)

    command = [*teacher_arguments, "--run-dir", str(tmp_path), "--validate-every", "1"]
    assert kd.main([*command, "--batch-size", "8", "--max-steps", "1"]) == 0
    monkeypatch.setattr(kd, "RestormerTeacherWrapper", note)
    assert kd.main(["teacher", "--run-dir", str(tmp_path), "--resume", "--max-steps", "3"]) == 0
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["val_psnr"]) > 10 for row in rows)
    assert len(wrapped) == 2  # a validation each
    assert all(len(network.latent._forward_hooks) == 1 for network in wrapped)


def test_a_teacher_may_start_from_another_of_any_size(teacher_arguments, tiny_teacher, tmp_path):
    command = [*teacher_arguments, "--init", str(tiny_teacher), "--learning-rate", "1e-9"]
    assert kd.main([*command, "--max-steps", "1", "--run-dir", str(tmp_path)]) == 0
    before = kd.load_restormer(tiny_teacher).state_dict()
    after = kd.load_restormer(tmp_path / "best.pth").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_a_teachers_dimensions_fit_each_other(data_root, tmp_path, capsys):
    command = ["teacher", "--data-root", str(data_root), "--run-dir", str(tmp_path / "run")]
    mistakes = (
        (["--heads", "1", "2"], "four numbers each"),
        (["--num-blocks", "1", "1", "1", "1", "1"], "four numbers each"),
        (["--dim", "9", "--heads", "1", "1", "1", "1"], "--dim 9: must be even"),
        (["--dim", "10", "--heads", "1", "3", "4", "8"], "a multiple of that level's --heads"),
        (["--dim", "0"], "--dim: 0 must be at least 2"),
        (
            ["--image-size", "48", "--stem-stride", "4"],
            "--image-size 48: must be a multiple of 32 with",
        ),
    )
    for extra, named in mistakes:
        assert kd.main([*command, *extra]) == 2
        assert named in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# --- The ablation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        {"feature": 1.0, "kl": 0.5, "perceptual": 0.0, "output": 0.0},
        {"feature": 0.0, "kl": 0.0, "perceptual": 0.1, "output": 0.1},
        {"feature": 0.0, "kl": 0.0, "perceptual": 0.0, "output": 0.0},
    ],
)
def test_each_teacher_term_with_a_weight_has_one_variant(weights):
    config = kd.AblateConfig(**{f"lambda_{name}": w for name, w in weights.items()}, epochs=4)
    variants = kd.ablation_variants(config)
    used = [name for name in kd.LOSS_TERMS if weights.get(name)]
    names = [variant.name for variant in variants]
    assert names == ["no teacher", *used, "all", "no teacher, longer"]
    assert [list(variant.terms) for variant in variants] == [[], *([n] for n in used), used, []]

    for variant in variants:
        run = kd.variant_config(config, variant, seed=3)
        for name in weights:
            expected = weights[name] if name in variant.terms else 0.0
            assert getattr(run, f"lambda_{name}") == expected
        assert run.lambda_ssim == config.lambda_ssim
        assert run.lambda_reconstruction == config.lambda_reconstruction
        assert (run.seed, run.epochs, run.restart_epochs, run.validate_every) == (3, 4, 4, 4)


def test_the_ablation_compares_the_terms(arguments, tmp_path, data_root, capsys):
    command = ["ablate", *arguments, "--run-dir", str(tmp_path), "--epochs", "2"]
    command += ["--seeds", "0", "1", "--teacher-cache", str(tmp_path / "cache")]
    assert kd.main([*command, "--degradation", "x2", "--lambda-output", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("12 runs one after the other")  # six variants, two seeds
    table = [line for line in lines if " steps of" in line]
    variants = ["no teacher", "feature", "kl", "output", "all", "no teacher, longer"]
    assert [line[:20].strip() for line in table] == variants

    logs = {path.parent.name: read_log(path.parent) for path in tmp_path.glob("*/log.csv")}
    assert len(logs) == 2 * len(variants)
    teachers = {"feature", "kl", "output"}
    used = {
        name: teachers & {key for key in rows[0] if rows[0][key]} for name, rows in logs.items()
    }
    assert used["no_teacher_0"] == set()
    assert used["no_teacher_longer_1"] == set()
    assert used["kl_1"] == {"kl"}
    assert used["all_0"] == teachers

    # The same student and the same crops: before the first step only the terms differ.
    same = ("no_teacher", "feature", "kl", "output", "all")
    assert len({logs[f"{name}_0"][0]["ssim"] for name in same}) == 1
    assert logs["no_teacher_0"][0]["ssim"] != logs["no_teacher_1"][0]["ssim"]

    scores = json.loads((tmp_path / "ablation.json").read_text())
    assert list(scores) == variants
    for seed in (0, 1):
        best = torch.load(tmp_path / f"output_{seed}/best.pth", weights_only=True)["held_out"]
        assert scores["output"]["held out"][seed] == {n: best[n] for n in ("psnr", "ssim")}
    pairs = kd.find_sharp(data_root / "test", kd.PROTOCOLS["x2"])
    sharpener = kd.load_sharpener(tmp_path / "all_1/best.pth")
    by_hand = kd.score_method(sharpener, [pair.load() for pair in pairs])
    assert scores["all"]["test"][1] == pytest.approx(by_hand)
    psnrs = [each["psnr"] for each in scores["all"]["test"]]
    shown = f"(PSNR {min(psnrs):.2f} to {max(psnrs):.2f})"
    assert f"test {statistics.fmean(psnrs):.2f} / " in table[4]
    assert table[4].endswith(shown)
    assert (tmp_path / "ablation.png").stat().st_size > 1000


def test_the_longer_run_takes_as_much_time_as_all(monkeypatch, tmp_path):
    config = kd.AblateConfig(
        data_root=None, run_dir=tmp_path, epochs=10, max_steps=80, lambda_perceptual=0.0
    )
    lengths = {}

    def run_variant(config, variant, test):
        lengths[variant.name] = (config.epochs, config.max_steps)
        variant.seconds = {"no teacher": 0.2, "all": 0.5}.get(variant.name, 0.3)
        variant.held_out = [{"psnr": 30.0, "ssim": 0.9}]

    monkeypatch.setattr(kd, "run_variant", run_variant)
    kd.ablate(config)
    assert lengths.pop("no teacher, longer") == (25, 200)
    assert set(lengths.values()) == {(10, 80)}


@pytest.fixture
def short_ablation(arguments, tmp_path):
    """An `ablate` command of three runs without a teacher."""
    command = ["ablate", *arguments, "--run-dir", str(tmp_path), "--epochs", "2"]
    return [*command, "--lambda-feature", "0", "--lambda-kl", "0", "--seeds"]


def test_finished_runs_are_kept_and_overwrite_gives_up_those_of_the_named_seeds(
    short_ablation, tmp_path, capsys
):
    assert kd.main([*short_ablation, "0", "1"]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/best.pth")}
    assert len(before) == 6
    assert kd.main([*short_ablation, "0", "1"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/best.pth")}

    capsys.readouterr()
    assert kd.main([*short_ablation, "0", "--epochs", "1"]) == 2
    refused = f"{tmp_path / 'no_teacher_0'}: --overwrite trains the runs of these --seeds anew"
    assert f"{refused}; this one was begun with --epochs 2, not 1" in capsys.readouterr().err
    assert kd.main([*short_ablation, "0", "--save-every", "1", "--threads", "1"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/best.pth")}

    assert kd.main([*short_ablation, "0", "--overwrite", "--epochs", "1"]) == 0
    for path, time in before.items():
        assert (path.stat().st_mtime_ns > time) == path.parent.name.endswith("_0")
    assert len(read_log(tmp_path / "all_0")) == len(read_log(tmp_path / "all_1")) / 2


@pytest.fixture
def begun(tmp_path):
    """Runs of an ablation of two variants, of which only the settings are there."""
    config = kd.AblateConfig(run_dir=tmp_path, seeds=(0,), epochs=4)
    variants = [kd.Variant("no teacher", ()), kd.Variant("longer", (), longer=True)]
    for variant in variants:
        run = kd.variant_config(config, variant, 0)
        run.run_dir.mkdir()
        torch.save({"config": kd.settings_to_save(run)}, run.run_dir / "last.pth")
    kd.require_same_settings(config, variants)
    return config, variants


def test_only_the_run_that_is_to_be_longer_may_have_another_length(begun):
    config, (plain, longer) = begun
    shorter = dataclasses.replace(config, epochs=3)
    kd.require_same_settings(shorter, [longer])
    with pytest.raises(kd.UserError, match=r"no_teacher_0: .*begun with --epochs 4, not 3"):
        kd.require_same_settings(shorter, [longer, plain])


@pytest.mark.parametrize("changed", [{"threads": 1}, {"workers": 3}, {"save_every": 1.0}])
def test_settings_that_leave_the_scores_alone_may_change(begun, changed):
    config, variants = begun
    kd.require_same_settings(dataclasses.replace(config, **changed), variants)


def test_a_setting_that_an_older_run_lacks_counts_as_its_default(begun):
    config, (plain, _) = begun
    file = config.run_dir / "no_teacher_0/last.pth"
    settings = torch.load(file, weights_only=True)["config"]
    del settings["lambda_psnr"]
    torch.save({"config": settings}, file)
    kd.require_same_settings(config, [plain])
    with pytest.raises(kd.UserError, match=r"begun with --lambda-psnr 0.0, not 1.0"):
        kd.require_same_settings(dataclasses.replace(config, lambda_psnr=1.0), [plain])


def test_a_run_whose_settings_are_not_there_is_not_kept(begun):
    config, (plain, _) = begun
    run_dir = config.run_dir / "no_teacher_0"
    torch.save({"config": None}, run_dir / "last.pth")
    with pytest.raises(kd.UserError, match=r"no_teacher_0: .*last.pth holds no settings"):
        kd.require_same_settings(config, [plain])
    (run_dir / "last.pth").unlink()
    torch.save({"step": 1}, run_dir / "best.pth")
    (run_dir / "log.csv").write_text("step,loss\n1,0.5\n")
    with pytest.raises(kd.UserError, match=r"no_teacher_0: .*last.pth is missing"):
        kd.require_same_settings(config, [plain])


def test_a_run_belongs_to_one_ablation_at_a_time(short_ablation, tmp_path, capsys, monkeypatch):
    pytest.importorskip("fcntl")
    seen = []

    def a_second_ablation_begins(run):
        seen.append(kd.main([*short_ablation, "0"]))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kd.TrainingRun, "train", a_second_ablation_begins)
        assert kd.main([*short_ablation, "0"]) == 130
    assert seen == [2]
    assert f"process {os.getpid()} is training there" in capsys.readouterr().err
    assert kd.main([*short_ablation, "0"]) == 0


def test_a_run_that_was_killed_after_its_best_file_is_continued(
    short_ablation, tmp_path, monkeypatch
):
    """best.pth is a run's first file of its last step, log.csv the last."""
    save = kd.TrainingRun.save_last

    def killed(run):
        if run.finished:
            raise KeyboardInterrupt
        save(run)

    with monkeypatch.context() as patch:
        patch.setattr(kd.TrainingRun, "save_last", killed)
        assert kd.main([*short_ablation, "0", "--save-every", "0"]) == 130
    run = tmp_path / "no_teacher_0"
    assert names_in(run) == ["best.pth", "last.pth", "log.csv"]
    before = read_log(run)
    assert [row["step"] for row in before] == ["1", "2", "3"]

    assert kd.main([*short_ablation, "0"]) == 0
    rows = read_log(run)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    seconds = [row["seconds"] for row in rows]
    assert seconds[:3] == [row["seconds"] for row in before]  # continued, not repeated


def test_a_run_that_was_killed_before_its_first_state_is_repeated(short_ablation, tmp_path):
    run = tmp_path / "no_teacher_0"
    run.mkdir()
    (run / "best.pth").write_bytes(b"of a run without last.pth")
    assert kd.main([*short_ablation, "0"]) == 0
    assert len(read_log(run)) == 4
    kd.load_student(run / "best.pth")


def test_an_ablation_without_held_out_pictures_writes_json_all_the_same(short_ablation, tmp_path):
    assert kd.main([*short_ablation, "0", "--validation-fraction", "0"]) == 0
    text = (tmp_path / "ablation.json").read_text()

    def refuse(name):
        pytest.fail(f"ablation.json holds {name}")

    scores = json.loads(text, parse_constant=refuse)
    assert scores["all"]["held out"] == [{"psnr": None, "ssim": None}]
    assert 10 < scores["all"]["test"][0]["psnr"] < 60


def test_an_ablation_needs_a_term_of_its_own_and_one_process(short_ablation, monkeypatch, capsys):
    none = ["--lambda-ssim", "0", "--lambda-reconstruction", "0"]
    assert kd.main([*short_ablation, "0", *none]) == 2
    assert (
        "--lambda-reconstruction, --lambda-ssim, --lambda-psnr: all are 0"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(kd, "PROCESSES", 2)
    assert kd.main([*short_ablation, "0"]) == 2
    assert "ablate: run it without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "folder"), [("teacher", "teacher_run"), ("train", "demo"), ("ablate", None)]
)
def test_a_run_is_resumed_where_its_command_writes_it(monkeypatch, capsys, command, folder):
    def stop(path, remedy):
        raise kd.UserError(f"looked for {path}")

    monkeypatch.setattr(kd, "read_checkpoint", stop)
    assert kd.main([command, "--resume"]) == 2
    error = capsys.readouterr().err
    if folder is None:  # it always continues what is there, and has no such flag
        assert "unrecognized arguments: --resume" in error
    else:
        assert f"looked for {kd.CHECKPOINTS / folder / 'last.pth'}" in error
