"""What takes minutes: python -m pytest -m endurance -q

Fifty runs killed, and 20,000 frames and 2,000 steps in constant memory. Without `-m endurance` all
of it is skipped.
"""

import contextlib
import multiprocessing
import os
import resource
import threading
import time

import numpy as np
import pytest
import torch

import sharpen_kd as kd

pytestmark = pytest.mark.endurance

# Processes are made by forking: a new Python would import PyTorch for seconds each time.
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


def small_run(data_root, run_dir, steps):
    """A `train` command that saves after every step."""
    return [
        *("train", "--data-root", str(data_root), "--run-dir", str(run_dir), "--network", "plain"),
        *("--stem-stride", "2", "--widths", "8", "--convolutions", "2", "--degradation", "x2"),
        *("--lambda-kl", "0", "--lambda-feature", "0", "--lambda-perceptual", "0"),
        *("--image-size", "32", "--batch-size", "4", "--workers", "0", "--device", "cpu"),
        *("--threads", "1", "--epochs", "5000", "--max-steps", str(steps), "--save-every", "0.01"),
        *("--precision", "float32", "--validate-every", "100"),
    ]


@pytest.mark.skipif(FORK is None, reason="needs fork")
def test_a_run_that_is_killed_fifty_times_ends_with_the_same_weights(data_root, tmp_path):
    whole = tmp_path / "whole"
    assert kd.main(small_run(data_root, whole, 300)) == 0

    killed = tmp_path / "killed"
    begin = small_run(data_root, killed, 300)
    resume = ["train", "--resume", "--run-dir", str(killed)]
    draw = np.random.default_rng(0)
    kills = 0
    while kills < 50:
        arguments = resume if (killed / "last.pth").exists() else [*begin, "--overwrite"]
        process = FORK.Process(target=lambda a: os._exit(kd.main(a)), args=(arguments,))
        process.start()
        process.join(draw.uniform(0.2, 1.0))
        if process.exitcode is not None:  # it came to its end before it was killed
            assert process.exitcode == 0
            assert kd.read_checkpoint(killed / "last.pth", "")["step"] == 300
            for file in killed.glob("*.*"):
                file.unlink()
            continue
        process.kill()
        process.join()
        kills += 1
    arguments = resume if (killed / "last.pth").exists() else [*begin, "--overwrite"]
    assert kd.main(arguments) == 0

    for name in ("best.pth", "last.pth"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (whole, killed))
        weights = "params" if name == "best.pth" else "objective"
        for key, values in first[weights].items():
            assert torch.equal(values, second[weights][key]), (name, key)
    assert not list(killed.glob(".sharpen_kd*"))


def memory() -> int:
    """This process's resident memory in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def open_files() -> int:
    """How many files are open, but for the fonts, which matplotlib keeps open."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one by which the folder is listed
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return sum(not name.endswith(".ttf") for name in names)


def running_threads() -> int:
    """How many threads run, but for tqdm's, which stays."""
    return sum(thread.name != "tqdm_monitor" for thread in threading.enumerate())


class Watch:
    """Takes the memory at every tenth of some work, and compares the last with the second."""

    def __init__(self, total: int) -> None:
        self.every = total // 10
        self.seen = 0
        self.levels: list[int] = []
        self.before = (open_files(), running_threads())

    def tick(self) -> None:
        self.seen += 1
        if self.seen % self.every == 0:
            self.levels.append(memory())

    def check(self) -> None:
        assert len(self.levels) == 10
        assert self.levels[-1] <= 1.02 * self.levels[1], [level >> 20 for level in self.levels]
        for _ in range(50):  # a thread may need a moment to end
            if (open_files(), running_threads()) == self.before:
                break
            time.sleep(0.1)
        assert (open_files(), running_threads()) == self.before


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_20_000_frames_leave_the_memory_as_it_was(random_frame, backend):
    if backend != "torch":
        pytest.importorskip(backend)
    frames = [random_frame(48 + 2 * number, 64) for number in range(4)]
    sharpener = kd.load_sharpener("fast", backend=backend)
    for frame in frames:
        sharpener(frame)
    watch = Watch(20_000)
    for number in range(20_000):
        sharpener(frames[number % 4])
        watch.tick()
    watch.check()


@needs_proc
def test_a_clip_of_20_000_frames_is_sharpened_in_constant_memory(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=64, height=48)
        stream.pix_fmt = "yuv420p"
        for number in range(20_000):
            level = 7 * number % 256  # no two frames in a row are equal
            pixels = np.full((48, 64, 3), level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    watch = Watch(20_000)

    def negative(frame):
        watch.tick()
        return 255 - frame

    assert kd.ClipSharpener(negative)(tmp_path / "a.mp4", tmp_path / "b.mp4") == 20_000
    watch.check()


@needs_proc
def test_2_000_steps_of_training_leave_the_memory_as_it_was(data_root, tmp_path, monkeypatch):
    watch = Watch(2_000)
    take_step = kd.TrainingRun.take_step

    def watched(run, rate):
        watch.tick()
        return take_step(run, rate)

    monkeypatch.setattr(kd.TrainingRun, "take_step", watched)
    arguments = small_run(data_root, tmp_path / "run", 2_000)
    arguments[arguments.index("--save-every") + 1] = "5"
    assert kd.main(arguments) == 0
    watch.check()
