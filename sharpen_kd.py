"""sharpen_kd: distil a Restormer teacher into a student that sharpens video-call frames.

    python sharpen_kd.py sharpen input.png           # also clips, and folders with both
    python sharpen_kd.py train                       # on GoPro_dataset/, or a small demonstration
    python sharpen_kd.py eval --checkpoint CK        # PSNR and SSIM, for each category
    python sharpen_kd.py fps                         # milliseconds a frame, 512x512 to 1080p

`prepare` makes blurred/sharp pairs from sharp pictures, `teacher` trains a compact Restormer where
the published weights do not suit the blur, `ablate` compares the loss terms, `export` writes ONNX
or OpenVINO files. Every flag is explained by `python sharpen_kd.py COMMAND --help`.

"The report" below is the training report that this script implements: a U-Net with squeeze-and-
excitation blocks, distilled from Restormer by five loss terms. "x2" is its blur: a picture shrunk
to half its sides and enlarged again.

What it reached: 110 test pictures at x2 (27.75 dB / 0.8605) become 30.47 dB / 0.9094 by
model_checkpoints/student.pth and 29.85 dB / 0.9040 by student_fast.pth. Six talking clips in calls
gain 0.72 dB by student_call.pth and 0.66 dB by student_call_fast.pth. README.md has the speeds.

Map of this file. The story is read from top to bottom, and needs hardly anything from the workshop:

    Degradations      what a poor call does to a picture
    Settings          every command's flags, as plain data
    Flags             from those settings to argparse, before PyTorch is imported
    Files, devices    reading, writing, where to compute
    Pictures          from files to arrays and tensors
    Pairs             blurred and sharp pictures that belong together
    Crops             what training draws from the pairs
    Teacher           a frozen Restormer, its features read by forward hooks
    Student           what a student must have; the report's U-Net; a plain stack
    Losses            the report's five terms, and two more
    Evaluation        PSNR and SSIM
    Training          one loop for the student and for the teacher
    Command: train    all of this put together
    --- here the story ends; the workshop makes it fast and usable ---
    Teacher cache     the teacher's results, computed once
    Frames            a student between 8-bit frames
    Engines           PyTorch, its compiler, OpenVINO, int8
    Tiles             large frames in pieces that fit together again
    Sharpeners        a student on frames of any size; `load_sharpener`
    Clips             what real encoders do to frames, and how clips are scored
    Prepared crops    what training on calls reads
    Clips, sharpened  from one file to another
    Live              a camera, a screen or a stream, as it comes
    Commands          sharpen, with its plans and metadata; prepare, teacher, ablate, eval, export,
                      fps
    Report            eval's results as a page, between eval and export
    Plots             curves, scores and speeds as pictures
    Command line      from the arguments to one of those commands
"""

import abc
import argparse
import base64
import collections
import contextlib
import copy
import csv
import ctypes
import dataclasses
import errno
import functools
import gc
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import typing
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

if __name__ == "__main__":  # before the imports below would end in a traceback
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # `main` puts it back
    for package in ("numpy", "PIL", "torch", "torchvision", "skimage", "einops", "tqdm"):
        if importlib.util.find_spec(package) is None:
            remedy = f"pip install -r {Path(__file__).with_name('requirements.txt')}"
            print(f"sharpen_kd: error: {package} is not installed; {remedy}", file=sys.stderr)
            sys.exit(2)

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__version__ = "1.0"

# --- Degradations: what a poor call does to a picture ---------------------------------------------
#
# A degradation is a sequence of steps. Each step takes a Pillow picture and the size of the sharp
# one, and returns a picture. A new kind of damage is one small class here; naming it in PROTOCOLS
# makes it a condition of `eval` and of `train --degradation`, and a few lines in `draw_mixture`
# show it to a student in training.

Size = tuple[int, int]  # (width, height), as in Pillow


@dataclass(frozen=True)
class GaussianBlur:
    """A camera out of focus; sigma in pixels."""

    sigma: float

    def __call__(self, picture: Image.Image, sharp_size: Size) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(self.sigma))


@dataclass(frozen=True)
class Shrink:
    """A call's software sends fewer pixels: 1/factor of each side, rounded, bicubic."""

    factor: float

    def __call__(self, picture: Image.Image, sharp_size: Size) -> Image.Image:
        width, height = sharp_size
        small = (max(1, round(width / self.factor)), max(1, round(height / self.factor)))
        return picture.resize(small, Image.Resampling.BICUBIC)


@dataclass(frozen=True)
class Enlarge:
    """The receiver's window shows the picture at its old size."""

    filter: str = "bicubic"  # or bilinear, nearest

    def __call__(self, picture: Image.Image, sharp_size: Size) -> Image.Image:
        return picture.resize(sharp_size, Image.Resampling[self.filter.upper()])


@dataclass(frozen=True)
class Jpeg:
    """Compression by Pillow's JPEG encoder; quality from 1 to 95."""

    quality: int

    def __call__(self, picture: Image.Image, sharp_size: Size) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=self.quality)
        return Image.open(file).convert("RGB")


@dataclass(frozen=True)
class Noise:
    """A camera in the dark: Gaussian noise; sigma in 8-bit levels. One seed is one pattern."""

    sigma: float
    seed: int = 0

    def __call__(self, picture: Image.Image, sharp_size: Size) -> Image.Image:
        pixels = np.asarray(picture, np.float32)
        noise = np.random.default_rng(self.seed).normal(0, self.sigma, pixels.shape)
        return Image.fromarray(np.rint(pixels + noise).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True)
class MotionBlur:
    """A camera that moves sideways: the mean over `length` neighbours of a row, an odd number."""

    length: int

    def __call__(self, picture: Image.Image, sharp_size: Size) -> Image.Image:
        half = self.length // 2
        pixels = np.asarray(picture, np.float32)
        width = pixels.shape[1]
        padded = np.pad(pixels, ((0, 0), (half, half), (0, 0)), "edge")
        shifted = [padded[:, start : start + width] for start in range(self.length)]
        return Image.fromarray(np.rint(np.mean(shifted, axis=0)).astype(np.uint8))


Degradation = tuple[Callable[[Image.Image, Size], Image.Image], ...]

# The degradations of the reported numbers. A student should leave noise and motion blur alone: it
# cannot undo them, and sharpening would only show them better. "noise5" and "motion9" test that.
PROTOCOLS: dict[str, Degradation] = {
    "x2": (Shrink(2), Enlarge()),
    "x3": (Shrink(3), Enlarge()),
    "x4": (Shrink(4), Enlarge()),
    "x1.3": (Shrink(1.3), Enlarge()),
    "x2-bilinear": (Shrink(2), Enlarge("bilinear")),
    "x2-nearest": (Shrink(2), Enlarge("nearest")),
    "x2-jpeg50": (Shrink(2), Enlarge(), Jpeg(50)),
    "jpeg50-x2": (Shrink(2), Jpeg(50), Enlarge()),
    "jpeg15": (Jpeg(15),),
    "jpeg40": (Jpeg(40),),
    "jpeg75": (Jpeg(75),),
    "noise5": (Noise(5),),
    "motion9": (MotionBlur(9),),
    "sharp": (),
}


@dataclass(frozen=True)
class Call:
    """How a clip arrives in a call: frames shrunk, encoded as a live stream, decoded, enlarged."""

    factor: float
    codec: str
    bits: float  # aimed at, for each pixel of a small frame


# What FFmpeg's encoders are told, to work as they do in a call: fast, without looking ahead, and
# for SVT-AV1 with references to the past only (pred-struct) at a constant bit rate (rc).
CODECS = {
    "libx264": {"preset": "veryfast", "tune": "zerolatency"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "7", "lag-in-frames": "0"},
    "libvpx": {"deadline": "realtime", "cpu-used": "6", "lag-in-frames": "0"},
    "libsvtav1": {"preset": "10", "svtav1-params": "pred-struct=1:rc=2"},
}

# The calls of the reported numbers; "call" is the one that is meant where no other is named.
CALLS = {
    "call": Call(2, "libx264", 0.10),
    "call-low": Call(2, "libx264", 0.05),
    "call-high": Call(2, "libx264", 0.20),
    "call-x1": Call(1, "libx264", 0.10),
    "call-x1.5": Call(1.5, "libx264", 0.10),
    "call-x3": Call(3, "libx264", 0.10),
    "call-vp9": Call(2, "libvpx-vp9", 0.10),
    "call-vp8": Call(2, "libvpx", 0.15),
    "call-av1": Call(2, "libsvtav1", 0.08),
}


def cut_at_odd_pixels(frame: np.ndarray) -> np.ndarray:
    """Without its first row and column, as a window of a screenshot may begin anywhere."""
    return frame[1:, 1:]


def caption(sentence: str, size: Size, text_size: int, colours: Sequence) -> Image.Image:
    """A box of one colour with a sentence of another in it."""
    box = Image.new("RGB", size, colours[0])
    place = (text_size // 2, text_size // 8)
    ImageDraw.Draw(box).text(place, sentence, fill=colours[1], font_size=text_size)
    return box


def with_caption(frame: np.ndarray) -> np.ndarray:
    """With a sharp sentence in a black box over its lower part.

    The sentence fits into the box where the frame is 200 pixels wide or more; in a narrower one it
    ends with the box.
    """
    picture = Image.fromarray(frame)
    width, height = picture.size
    left = width // 8
    right = width - left
    # A letter is about half as wide as it is high, and the sentence has 42.
    text_size = max(6, min(height // 18, (right - left) // 22))
    sentence = "One sharp caption must not change the rest"
    size = (right - left, 3 * text_size // 2)
    box = caption(sentence, size, text_size, ("black", "white"))
    picture.paste(box, (left, height - 2 * box.height))
    return np.array(picture)


def as_grey(frame: np.ndarray) -> np.ndarray:
    """Its luma, stored as RGB."""
    return np.array(Image.fromarray(frame).convert("L").convert("RGB"))


def outer_rows(frame: np.ndarray) -> np.ndarray:
    """The first 8 rows and the last 8, (16, W, 3). SSIM's windows cross the seam between them."""
    return np.concatenate([frame[:8], frame[-8:]])


def whole(frame: np.ndarray) -> np.ndarray:
    return frame


@dataclass(frozen=True)
class Condition:
    """A degradation under which both frames are changed alike, or a part of them is scored."""

    degradation: Degradation
    change: Callable[[np.ndarray], np.ndarray] = whole  # of the blurred and the sharp frame
    scored: Callable[[np.ndarray], np.ndarray] = whole  # of the output and the sharp frame


# Where a student that does well on whole pictures may yet fail; `eval --protocol` takes these, too.
CONDITIONS = {
    "x2-cut": Condition(PROTOCOLS["x2"], change=cut_at_odd_pixels),
    "x2-caption": Condition(PROTOCOLS["x2"], change=with_caption),
    "x2-grey": Condition(PROTOCOLS["x2"], change=as_grey),
    "x2-border": Condition(PROTOCOLS["x2"], scored=outer_rows),
}
PLAIN = Condition(())  # of all other protocols: whole frames as they are


def degrade(sharp: Image.Image, degradation: Degradation) -> Image.Image:
    """The degraded copy of an 8-bit RGB picture."""
    picture = sharp
    for step in degradation:
        picture = step(picture, sharp.size)
    return picture


def generator(key: Sequence[int], purpose: str) -> np.random.Generator:
    """Random numbers for one purpose, from a key such as (seed, epoch, index) alone.

    Every purpose has numbers of its own, so that a new kind of damage does not shift the draws of
    all others, and a training run does not depend on its workers or interruptions.
    """
    return np.random.default_rng((*key, zlib.crc32(purpose.encode())))


def reseeded(degradation: Degradation, key: Sequence[int]) -> Degradation:
    """The degradation with a noise seed drawn from the key: one pattern would be memorised."""
    steps = []
    for step in degradation:
        if isinstance(step, Noise):
            step = dataclasses.replace(step, seed=int(generator(key, "noise").integers(2**32)))
        steps.append(step)
    return tuple(steps)


def draw_mixture(key: Sequence[int]) -> Degradation:
    """One degradation of the mixture that a student for pictures must meet.

    A student trained on x2 alone ruins what is sharp already, and what was damaged in other ways.
    So 8 % stay untouched, 22 % are compressed only, 4 % get noise and 4 % motion blur. The rest is
    shrunk and enlarged.
    """
    kind = generator(key, "kind").random()
    if kind < 0.08:
        return ()
    if kind < 0.30:
        return (draw_jpeg(generator(key, "jpeg")),)
    if kind < 0.34:
        noise = generator(key, "noise")
        return (Noise(noise.uniform(1, 8), int(noise.integers(2**32))),)
    if kind < 0.38:
        return (MotionBlur(2 * int(generator(key, "motion").integers(2, 8)) + 1),)
    return draw_shrunk(key)


def draw_jpeg(draw: np.random.Generator) -> Jpeg:
    return Jpeg(int(draw.integers(15, 96)))


def draw_shrunk(key: Sequence[int]) -> Degradation:
    """One degradation that shrinks and enlarges.

    Two thirds by 2, one third by a factor drawn from 1.2 to 4. A tenth is blurred as well, a fifth
    compressed, a fifth enlarged by another filter than bicubic.
    """
    at_the_camera = []
    while_small = []
    at_the_receiver = []

    shrinking = generator(key, "shrink")
    factor = 2.0
    if shrinking.random() < 1 / 3:
        factor = shrinking.uniform(1.2, 4)

    blurring = generator(key, "blur")
    if blurring.random() < 0.1:
        at_the_camera.append(GaussianBlur(blurring.uniform(0.3, 1.2)))

    compressing = generator(key, "jpeg")
    jpeg = draw_jpeg(compressing)
    if compressing.random() < 0.2:
        if compressing.random() < 0.5:
            while_small.append(jpeg)
        else:
            at_the_receiver.append(jpeg)

    enlarging = generator(key, "enlarge").random()
    enlarge = Enlarge()
    if enlarging < 0.12:
        enlarge = Enlarge("bilinear")
    elif enlarging < 0.2:
        enlarge = Enlarge("nearest")

    return (*at_the_camera, Shrink(factor), *while_small, enlarge, *at_the_receiver)


def draw_call(key: Sequence[int]) -> Call:
    """One call of the mixture that a student for calls must meet.

    Half are H.264, as most calls are. A quarter are not shrunk, since a student that never met such
    frames sharpens the encoder's artefacts in them. The others are shrunk by 2, or by a factor
    drawn from 1 to 3.
    """
    encoding = generator(key, "codec")
    codec = encoding.choice(list(CODECS), p=(0.5, 0.25, 0.13, 0.12))

    shrinking = generator(key, "shrink")
    kind = shrinking.random()
    factor = shrinking.uniform(1, 3)
    if kind < 0.25:
        factor = 1.0
    elif kind < 0.6:
        factor = 2.0

    bits = math.exp(generator(key, "bits").uniform(math.log(0.03), math.log(0.4)))
    return Call(factor, str(codec), bits)


# --- Settings: every command's flags, as plain data -----------------------------------------------

HERE = Path(__file__).resolve().parent
DATASET = HERE / "GoPro_dataset"
SAMPLES = HERE / "inference_samples"
CHECKPOINTS = HERE / "model_checkpoints"
OFFICIAL_TEACHER = HERE / "Restormer/Motion_Deblurring/pretrained_models/motion_deblurring.pth"
COMPACT_TEACHER = CHECKPOINTS / "teacher.pth"
SHIPPED = {
    "quality": CHECKPOINTS / "student.pth",
    "fast": CHECKPOINTS / "student_fast.pth",
    "call": CHECKPOINTS / "student_call.pth",
    "call-fast": CHECKPOINTS / "student_call_fast.pth",
    "unet": CHECKPOINTS / "student_unet.pth",
}
FOR_PICTURES = "quality"
FOR_CLIPS = "call"
FASTER_FOR_CLIPS = "call-fast"

# The backends of inference, and the packages that each one needs beyond requirements.txt.
BACKENDS = {
    "torch": (),
    "compile": (),
    "openvino": ("openvino",),
    "openvino-int8": ("openvino", "nncf"),
}


@dataclass(frozen=True)
class LossTerm:
    """A term of the distillation loss: its weight in the report, and what its flag says."""

    weight: float
    needs_teacher: bool
    about: str


# Each row is a flag --lambda-NAME, and `DistillationLoss` has a method NAME_term.
LOSS_TERMS = {
    "reconstruction": LossTerm(1.0, False, "L1 to the sharp picture"),
    "perceptual": LossTerm(0.01, True, "L1 of VGG19 features to those of the teacher's output"),
    "feature": LossTerm(1.0, True, "L1 to the teacher's projected features"),
    "kl": LossTerm(0.01, True, "KL divergence to the teacher's soft output"),
    "ssim": LossTerm(10.0, False, "1 - SSIM to the sharp picture"),
    "output": LossTerm(0.0, True, "L1 to the teacher's output (not in the report)"),
    "psnr": LossTerm(
        0.0, False, "about the decibels that each crop lacks to 50 (not in the report)"
    ),
}


class UserError(ValueError):
    """What the user can mend: one line that names the file or flag and the remedy."""


def require(condition: object, message: str) -> None:
    """UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def flag(
    default: object,
    about: str,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    short: str = "",
    positional: bool = False,
    **options,
):
    """A dataclass field that is also a command-line flag, for `add_flag`.

    `short` is a second name such as -o. A `positional` argument is given by its place, without a
    name. Other options go to argparse as they are.
    """
    metadata = {
        "about": about,
        "bounds": (at_least, at_most),
        "short": short,
        "positional": positional,
        "options": options,
    }
    return field(default=default, metadata=metadata)


def same_flag(config_class: type, name: str, default: object):
    """Another command's flag with another default."""
    return field(default=default, metadata=config_class.__dataclass_fields__[name].metadata)


# Bounds that several settings share.
ABOVE_ZERO = 1e-12
LARGEST_COUNT = 10**9
LARGEST_SEED = 2**32 - 1


@dataclass
class DeviceConfig:
    """Where to compute."""

    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps", "xpu"))
    threads: int = flag(0, "CPU threads; 0 leaves PyTorch's choice", at_least=0, at_most=1024)
    precision: str = flag(
        "auto", "auto: bf16 where it is native, else float32", choices=("auto", "float32", "bf16")
    )


@dataclass
class InferenceConfig(DeviceConfig):
    """Which student to run, and how."""

    checkpoint: str = flag(
        "auto",
        f"{', '.join(SHIPPED)}, or a student checkpoint's file; auto: {FOR_PICTURES} for pictures,"
        f" {FOR_CLIPS} for clips",
    )
    backend: str = flag("torch", "what runs the student", choices=tuple(BACKENDS))
    tile: int = flag(
        2048,
        "approximate side of a tile in pixels; 0 takes a picture whole",
        at_least=0,
        at_most=LARGEST_COUNT,
    )
    overlap: int | None = flag(
        None,
        "pixels that tiles share (default: as the student needs)",
        at_least=0,
        at_most=LARGEST_COUNT,
    )


@dataclass
class SharpenConfig(InferenceConfig):
    """Sharpen pictures and clips: files, or folders with everything in them."""

    inputs: tuple[Path, ...] = flag((), "pictures, clips or folders", positional=True, nargs="*")
    output: Path | None = flag(
        None, "file or folder (default: NAME_sharpened beside each input)", short="-o"
    )
    live: str | None = flag(
        None,
        "sharpen what comes from a camera (/dev/video0), a screen (:0.0), a stream's address or a"
        " file at its own rate into -o: camera (a virtual one), window, an address or a file",
    )
    live_format: str = flag(
        "", "--live: FFmpeg's name of what it is (x11grab, gdigrab, avfoundation, dshow, v4l2)"
    )
    live_size: str = flag("", "--live: WIDTHxHEIGHT to ask a camera or screen for")
    fps: float = flag(
        0.0, "--live: frames a second to ask a camera or screen for", at_least=0, at_most=1000
    )
    strength: float = flag(
        1.0, "scale of the student's correction; 0 returns the input", at_least=0, at_most=100
    )
    overwrite: bool = flag(False, "replace files that -o names")
    skip_existing: bool = flag(False, "do only what has no result yet, as after an interruption")
    before_after: bool = flag(False, "pictures: also write NAME_before_after.png, side by side")
    metadata: bool = flag(
        True,
        "keep a picture's EXIF (camera, place), texts and XMP, and a clip's title, date and place,"
        " where the format takes them; colour profiles stay anyway",
    )
    max_megapixels: int = flag(
        179, "pictures: refuse larger ones, which may be made to fill the memory", at_least=1,
        at_most=10**5,
    )  # fmt: skip
    size: str = flag(
        "", "clips, --live: enlarge frames to WIDTHxHEIGHT first, as a call's window does"
    )
    lossless: bool = flag(False, "clips: store them without loss (FFV1 in .mkv)")


# What commands take beside the protocols.
MIXED = "mixed"  # train, prepare: by `draw_mixture`
CALL_MIXTURE = "calls"  # prepare: by `draw_call`
ENCODED_PAIRS = "low"  # prepare, eval: clips that came through a call, in low/ beside sharp/

# What `eval` scores clips by.
CLIP_PROTOCOLS = (*CALLS, ENCODED_PAIRS)


@dataclass
class PrepareConfig:
    """Write blurred/sharp pairs of pictures; with --protocol training crops of pictures and clips.

    Without --protocol each picture is shrunk and enlarged again, both bicubic.
    """

    sharp_dir: Path = flag(
        Path(), "folder of sharp pictures or clips; sub-folders are categories", positional=True
    )
    protocol: tuple[str, ...] = flag(
        (),
        f"write crops for `train --degradation crops`, degraded by one of these each: {MIXED}"
        f" (pictures), {CALL_MIXTURE} (real encoders; needs PyAV), {ENCODED_PAIRS} (your own clips"
        " in low/ beside sharp/), or a protocol of `eval`",
        choices=(MIXED, CALL_MIXTURE, ENCODED_PAIRS, *PROTOCOLS, *CALLS), metavar="PROTOCOL",
    )  # fmt: skip
    crops: int = flag(
        24000,
        "--protocol: crops to write, rounded up to a multiple of 12",
        at_least=1,
        at_most=10**7,
    )
    crop_size: int = flag(128, "--protocol: side of the crops in pixels", at_least=16, at_most=2048)
    split: str = flag("train", "which half of the dataset to write", choices=("train", "test"))
    data_root: Path = flag(DATASET, "dataset folder to write into")
    scale: tuple[float, ...] = flag(
        (2.0,),
        "without --protocol: shrinking factors; each picture draws one",
        at_least=1,
        at_most=64,
    )
    extra_blur: float = flag(
        0.0,
        "without --protocol: largest sigma of a blur before shrinking, drawn from 0 to this",
        at_least=0,
        at_most=100,
    )
    seed: int = flag(0, "seed of the draws", at_least=0, at_most=LARGEST_SEED)


@dataclass
class RunConfig(DeviceConfig):
    """What every training run needs, the student's and the teacher's."""

    data_root: Path | None = flag(
        DATASET, "dataset folder with train/ in it, or a folder of sharp pictures"
    )  # None stands for scikit-image's own pictures
    run_dir: Path = flag(CHECKPOINTS / "run", "folder for last.pth, best.pth and log.csv")
    resume: bool = flag(False, "continue the run in --run-dir with its settings")
    overwrite: bool = flag(False, "start anew in a --run-dir that holds a run already")
    init: str = flag("", f"start from the weights of a file, or of {' or '.join(SHIPPED)}")
    epochs: int = flag(50, "passes over the training pairs", at_least=1, at_most=LARGEST_COUNT)
    max_steps: int = flag(
        0, "stop after so many steps; 0: no limit", at_least=0, at_most=LARGEST_COUNT
    )
    image_size: int = flag(
        512, "side of a training crop in pixels, a multiple of 16", at_least=16, at_most=8192
    )
    batch_size: int = flag(
        1, "crops per forward pass, in each process of torchrun", at_least=1, at_most=65536
    )
    gradient_accumulation_steps: int = flag(
        4, "forward passes per optimiser step", at_least=1, at_most=65536
    )
    learning_rate: float = flag(2e-4, "Adam's peak learning rate", at_least=ABOVE_ZERO, at_most=10)
    restart_epochs: int = flag(
        10,
        "T_0: epochs of the first cosine cycle; later ones double, and the last is cut off where"
        " --epochs ends (with as many as --epochs there is one whole cycle)",
        at_least=1,
        at_most=LARGEST_COUNT,
    )
    min_learning_rate: float = flag(1e-6, "eta_min: where each cycle ends", at_least=0, at_most=10)
    warmup_steps: int = flag(
        0, "steps over which the rate rises", at_least=0, at_most=LARGEST_COUNT
    )
    clip_norm: float = flag(1.0, "largest gradient norm; 0 clips nothing", at_least=0, at_most=1e9)
    ema_decay: float = flag(
        0.999,
        "decay of the averaged weights, reached after a warm-up",
        at_least=0,
        at_most=0.999999,
    )
    degradation: str = flag(
        "pairs",
        "stored pairs, crops that `prepare --protocol` wrote, or sharp crops degraded anew by a"
        " protocol or by the mixture (a student from scratch needs x2 first, or with it: on the"
        " mixture alone it learns to do nothing)",
        choices=("pairs", "crops", MIXED, *PROTOCOLS),
    )
    blur_probability: float = flag(
        1.0, "pairs: share of crops blurred further (3x3, sigma 0.1 to 2)", at_least=0, at_most=1
    )
    validation_fraction: float = flag(
        0.05, "share of the training pairs held out", at_least=0, at_most=0.99
    )
    validate_every: int = flag(5, "epochs between validations", at_least=1, at_most=LARGEST_COUNT)
    save_every: float = flag(
        60.0, "seconds between saves of last.pth", at_least=0, at_most=LARGEST_COUNT
    )
    workers: int | None = flag(
        None,
        "loader processes (default: 2, or 0 on up to two CPU threads)",
        at_least=0,
        at_most=256,
    )
    balance: bool = flag(
        False, "show every category as often as the largest (not of crops, which are drawn so)"
    )
    cache: bool = flag(
        False, "decode every picture once and keep it in memory; prepared crops on the device"
    )
    seed: int = flag(
        0, "seed of initial weights, order and crops", at_least=0, at_most=LARGEST_SEED
    )


@dataclass
class StudentConfig:
    """The student's shape."""

    # No choices here: the names are those of the classes in STUDENTS, which need PyTorch.
    network: str = flag(
        "unet",
        "unet: the report's; plain: 3x3 layers at one scale",
    )
    luma: bool = flag(False, "unet: see and correct luma and averaged colours instead of RGB")
    stem_stride: int = flag(
        4,
        "space-to-depth factor before the first layer; 1 is the report's network",
        choices=(1, 2, 4),
    )
    base_channels: int = flag(
        256, "unet: c of the stage widths c/4, c/2, c, 2c, 3c", at_least=8, at_most=4096
    )
    widths: tuple[int, ...] = flag(
        (), "unet: a width for each scale instead; plain: one width", at_least=1, at_most=4096
    )
    convolutions: tuple[int, ...] = flag(
        (), "number of 3x3 layers. unet: in each stage, one number or one for each scale (default:"
        " 2); plain: in all (default: 6)",
        at_least=1, at_most=64,
    )  # fmt: skip
    skips: str = flag(
        "concatenate", "unet: how a decoder stage takes its skip; lateral is faster",
        choices=("concatenate", "lateral"),
    )  # fmt: skip


# One field for each row of LOSS_TERMS: lambda_reconstruction, lambda_perceptual and so on.
LossConfig = dataclasses.make_dataclass(
    "LossConfig",
    [
        (
            f"lambda_{name}",
            float,
            flag(term.weight, f"weight of {term.about}", at_least=0, at_most=1e9),
        )
        for name, term in LOSS_TERMS.items()
    ],
)


@dataclass
class Preset:
    """Settings of `train` that belong together; given flags overrule them."""

    about: str
    settings: dict[str, object]


# What the presets for two CPU cores share.
TWO_CORES = {
    "stem_stride": 2,
    "teacher_weights": COMPACT_TEACHER,
    "lambda_reconstruction": 10.0,
    "lambda_perceptual": 0.0,
    "lambda_feature": 0.0,
    "lambda_kl": 100.0,
    "lambda_ssim": 1.0,
    "image_size": 128,
    "gradient_accumulation_steps": 1,
    "blur_probability": 0.0,
    "workers": 0,
}

# The shape of the faster students that ship.
FAST_SHAPE = {
    "stem_stride": 2,
    "luma": True,
    "widths": (12, 16, 16, 24),
    "convolutions": (2, 1, 1, 1),
    "skips": "lateral",
}

# Settings of `TrainConfig` below, by their names there.
PRESETS = {
    "report": Preset(
        "the report's training: 25.5 M parameters, 512-pixel crops, 50 epochs; needs pairs, the"
        " official teacher, VGG19 and a GPU (10 s a step on two CPU cores). The student sees the"
        " picture folded by 4; --stem-stride 1 is the report's, at 16 times the arithmetic",
        {},
    ),
    "small": Preset(
        "fine-tunes the shipped fast student on sharp pictures of your own, degraded by the"
        " mixture, with the compact teacher; 0.1 to 0.5 s a step on two CPU cores."
        " Not the report's: a smaller network, smaller crops and no VGG19, because those need a"
        " GPU; KL weighs more and SSIM less, since at the report's weights KL does nothing",
        TWO_CORES
        | {
            **FAST_SHAPE,
            "init": "fast",
            "run_dir": CHECKPOINTS / "small",
            "degradation": "mixed",
            "batch_size": 8,
            "balance": True,
            "learning_rate": 5e-4,
            "warmup_steps": 50,
            "epochs": 60,
            "restart_epochs": 60,
            "validate_every": 5,
        },
    ),
    "call": Preset(
        "a student for calls from scratch, on the crops that `prepare --protocol calls` has written"
        " into --data-root; 0.05 s a step on one CPU core. Not the report's: a smaller network,"
        " on the luma, and no teacher (--teacher-checkpoint call --lambda-output 1 gives one)",
        {
            **FAST_SHAPE,
            "expansion": 64,
            "run_dir": CHECKPOINTS / "call",
            "degradation": "crops",
            "image_size": 96,
            "batch_size": 16,
            "gradient_accumulation_steps": 1,
            "lambda_reconstruction": 1.0,
            "lambda_perceptual": 0.0,
            "lambda_feature": 0.0,
            "lambda_kl": 0.0,
            "lambda_ssim": 0.1,
            "ema_decay": 0.998,
            "learning_rate": 3e-3,
            "warmup_steps": 300,
            "epochs": 7,
            "restart_epochs": 7,
            "validate_every": 1,
            "workers": 0,
        },
    ),
    "demo": Preset(
        "a small U-Net of the report's kind from scratch, on ten of scikit-image's pictures at x2,"
        " with four others held out; about three minutes on two CPU cores. Not the report's: a"
        " smaller network, smaller crops and no VGG19, since those need a GPU; far fewer pictures"
        " than the shipped weights saw, so theirs are better",
        TWO_CORES
        | {
            "data_root": None,
            "widths": (16, 16, 32, 48),
            "convolutions": (4, 3, 2, 1),
            "skips": "lateral",
            "expansion": 64,
            "run_dir": CHECKPOINTS / "demo",
            "batch_size": 4,
            "cache": True,
            "learning_rate": 2e-3,
            "epochs": 240,
            "restart_epochs": 240,
            "validate_every": 40,
        },
    ),
}


@dataclass
class TrainConfig(RunConfig, StudentConfig, LossConfig):
    """Distil the teacher into a student; without a dataset, on scikit-image's pictures."""

    preset: str = flag(
        "", "settings that belong together (default: report, or demo without a dataset)",
        choices=tuple(PRESETS),
    )  # fmt: skip
    expansion: int = flag(
        0,
        "rank of a matrix product that is added to each 3x3 kernel in training, by which it learns"
        " faster (64 is good; 0: none); the student that is saved has only the sum",
        at_least=0,
        at_most=4096,
    )
    teacher_weights: Path | None = flag(None, "Restormer weight file (default: the official one)")
    teacher_checkpoint: str = flag(
        "", "learn from a larger student instead: a shipped one's name, or a checkpoint"
    )
    temperature: float = flag(4.0, "T of the soft outputs", at_least=ABOVE_ZERO, at_most=1e6)
    teacher_cache: Path | None = flag(
        None, "folder for the teacher's results: computed once, then read"
    )
    cache_variants: int = flag(
        4,
        "how many differently flipped and degraded versions of each picture",
        at_least=1,
        at_most=1000,
    )
    log_gradients: int = flag(
        0,
        "log each term's share of the gradient every N steps; 0: never",
        at_least=0,
        at_most=LARGEST_COUNT,
    )


@dataclass
class AblateConfig(TrainConfig):
    """Train one student with each teacher term alone, with all and with none, and compare them."""

    seeds: tuple[int, ...] = flag(
        (0, 1, 2),
        "every variant is trained once with each of these seeds",
        at_least=0,
        at_most=LARGEST_SEED,
    )
    run_dir: Path = flag(CHECKPOINTS / "ablation", "folder for the runs and the comparison")
    # `ablate` sets these itself, so they are no flags.
    seed: int = 0
    restart_epochs: int = 0
    validate_every: int = 0
    resume: bool = False


@dataclass
class TeacherConfig(RunConfig):
    """Train a Restormer of any size on the dataset (L1); best.pth is a --teacher-weights file."""

    stem_stride: int = flag(2, "space-to-depth factor before the first level", choices=(1, 2, 4))
    dim: int = flag(24, "channels of the first level, an even number", at_least=2, at_most=1024)
    num_blocks: tuple[int, ...] = flag(
        (1, 2, 2, 3), "transformer blocks of the four levels", at_least=1, at_most=64
    )
    num_refinement_blocks: int = flag(2, "blocks of the last stage", at_least=1, at_most=64)
    heads: tuple[int, ...] = flag(
        (1, 2, 4, 8), "attention heads of the four levels", at_least=1, at_most=1024
    )
    ffn_expansion_factor: float = flag(
        2.0, "hidden width of the feed-forward layers", at_least=1, at_most=16
    )
    run_dir: Path = same_flag(RunConfig, "run_dir", CHECKPOINTS / "teacher_run")
    init: str = flag("", "start from the weights of a Restormer's file, of whatever size that is")
    image_size: int = same_flag(RunConfig, "image_size", 128)
    batch_size: int = same_flag(RunConfig, "batch_size", 8)
    gradient_accumulation_steps: int = same_flag(RunConfig, "gradient_accumulation_steps", 1)


@dataclass
class EvalConfig(InferenceConfig):
    """Average PSNR and SSIM of input, student and teacher, over a split and for each category."""

    data_root: Path = flag(DATASET, "dataset folder, or a folder of sharp pictures")
    split: str = flag("test", "which half of the dataset to read", choices=("train", "test"))
    protocol: tuple[str, ...] = flag(
        (),
        "degrade sharp pictures (call…: sharp clips) instead of reading blurred ones;"
        f" {ENCODED_PAIRS}: your own clips in low/ beside sharp/",
        choices=(*PROTOCOLS, *CONDITIONS, *CLIP_PROTOCOLS),
    )
    resize: int = flag(
        0,
        "first resize pairs to this square (the report: 512); 0: keep them",
        at_least=0,
        at_most=16384,
    )
    teacher: bool = flag(False, "score the teacher too")
    teacher_weights: Path | None = same_flag(TrainConfig, "teacher_weights", None)
    strength: float = same_flag(SharpenConfig, "strength", 1.0)
    save_images: bool = flag(False, "write the student's pictures and a few side-by-side ones")
    output_dir: Path = flag(
        SAMPLES / "sharpened_test_outputs", "folder for scores.csv and pictures"
    )
    json: Path | None = flag(None, "write the averages to this file")
    report: Path | None = flag(None, "write the scores and a gallery as one HTML page")


@dataclass
class ExportConfig:
    """Write a student as a file for other programs; it takes and returns 8-bit frames."""

    format: str = flag("onnx", "file format", choices=("onnx", "openvino"))
    checkpoint: str = flag(FOR_PICTURES, f"{', '.join(SHIPPED)}, or a student checkpoint's file")
    output: Path = flag(CHECKPOINTS / "exported/student", "file to write", short="-o")


@dataclass
class FpsConfig(InferenceConfig):
    """Milliseconds a frame of 512x512, 1280x720 and 1920x1080, by one backend or several.

    "network" is the network alone, "8-bit to 8-bit" a whole frame, and 95 % of these are faster
    than the next column. "of best" is the share of what the fastest convolution above the table
    reaches, and "x plain" how long a frame takes where plain 3x3 layers, timed in turns with the
    students, take 1.
    """

    checkpoint: tuple[str, ...] = flag(
        tuple(SHIPPED), "students: shipped ones, or checkpoint files"
    )
    backend: tuple[str, ...] = flag(
        (), "what runs them (default: on a CPU all but compile)", choices=tuple(BACKENDS)
    )
    base_channels: int = flag(
        0,
        "time an untrained U-Net of this size, 4 or more, instead (the report: 256)",
        at_least=0,
        at_most=4096,
    )
    stem_stride: int = flag(4, "its stem stride", choices=(1, 2, 4))
    clip: Path | None = flag(
        None,
        "time `sharpen` on this clip instead: decoding, enlarging, sharpening and encoding, which"
        " overlap",
    )
    size: str = same_flag(SharpenConfig, "size", "")
    warmup: int = flag(
        3, "frames before timing starts; --clip: one", at_least=0, at_most=LARGEST_COUNT
    )
    frames: int = flag(20, "frames timed; --clip: all of them", at_least=1, at_most=LARGEST_COUNT)
    json: Path | None = flag(None, "write the rows to this file")
    plot: Path | None = flag(
        None, "draw quality at x2 against milliseconds (.png, .jpg, .pdf, .svg)"
    )
    data_root: Path | None = flag(
        None,
        "--plot: dataset folder whose test/ gives the quality (default: scikit-image's pictures)",
    )


# A new command is a class above, a row here, a function below, and a row in COMMANDS at the end.
CONFIGS = {
    "sharpen": SharpenConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "fps": FpsConfig,
    "prepare": PrepareConfig,
    "teacher": TeacherConfig,
    "ablate": AblateConfig,
    "export": ExportConfig,
}

# --- Flags: from settings to argparse, before PyTorch is imported ---------------------------------
#
# Who reads for distillation can skip from here to "Pictures".


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line like all others of this script.

    Flags cannot be abbreviated: else `ablate --seed` would silently be its --seeds.
    """

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (python {self.prog} --help explains the flags)")


def named_path(text: str) -> Path:
    """A path; an empty text, as of a shell's variable that is not set, would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return Path(text)


def bounded(kind: type, bounds: tuple[float, float]) -> Callable[[str], object]:
    """What reads a flag's value: for a number a function that checks the bounds, else the type."""
    if kind is Path:
        return named_path
    if kind not in (int, float):
        return kind

    def read(text: str) -> float:
        low, high = bounds
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}") from None
        if not value >= low:  # so NaN is refused, too
            above = "above 0" if low == ABOVE_ZERO else f"at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {above}")
        if value > high:
            raise argparse.ArgumentTypeError(f"{text} must be at most {high:.10g}")
        return value

    return read


def shown_default(default: object) -> str:
    """How `--help` shows a default; nothing for one that says nothing."""
    if default is None or default is False or default in ((), ""):
        return ""
    values = default if isinstance(default, tuple) else (default,)
    words = [str(v.relative_to(HERE)) if isinstance(v, Path) else str(v) for v in values]
    return f" (default: {' '.join(words)})"


def flag_of(item: dataclasses.Field) -> str:
    """The flag of a setting: `--learning-rate` for `learning_rate`."""
    return "--" + item.name.replace("_", "-")


def arguments_of(item: dataclasses.Field, value: object) -> list[str]:
    """A setting as it is given on a command line: its flag, then its values."""
    name = flag_of(item)
    if item.type is bool:
        return [name if value else name.replace("--", "--no-", 1)]
    if isinstance(value, tuple):
        return [name, *map(str, value)]
    if str(value).startswith("-"):  # which argparse would take for a flag
        return [f"{name}={value}"]
    return [name, str(value)]


def add_flag(parser: Parser, item: dataclasses.Field) -> None:
    """Add one setting's argument; its type comes from the annotation, the rest from `flag`."""
    options = dict(item.metadata["options"])
    parts = typing.get_args(item.type)  # (Path, NoneType) of `Path | None`
    kind = parts[0] if parts else item.type  # of a tuple, what it holds
    read = bounded(kind, item.metadata["bounds"])
    if item.metadata["positional"]:
        parser.add_argument(item.name, type=read, help=item.metadata["about"], **options)
        return

    names = [flag_of(item)]
    if item.metadata["short"]:
        names.insert(0, item.metadata["short"])
    options["help"] = item.metadata["about"] + shown_default(item.default)
    options["default"] = argparse.SUPPRESS  # what is not given is not in the result
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = read
    if "choices" not in options and kind is not bool:
        options["metavar"] = kind.__name__.upper()
    if isinstance(item.default, tuple):
        options["nargs"] = "+"
    parser.add_argument(*names, **options)


def build_parser() -> Parser:
    """A sub-command for each entry of CONFIGS, a flag for each of its settings."""
    parser = Parser(prog="sharpen_kd.py", description=__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=f"sharpen_kd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, config_class in CONFIGS.items():
        about = config_class.__doc__
        command = commands.add_parser(name, help=about.split("\n")[0], description=about)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == "train":
            lines = [f"--preset {key}: {preset.about}." for key, preset in PRESETS.items()]
            command.epilog = " ".join(lines)
        for item in dataclasses.fields(config_class):
            if item.metadata:
                add_flag(command, item)
    return parser


def parse_command_line(arguments: Sequence[str] | None) -> dict[str, object]:
    """The command, and the flags that were given; UserError for what is wrong with them."""
    parsed, unknown = build_parser().parse_known_args(arguments)
    given = vars(parsed)
    if unknown:  # argparse itself would point to the help of the whole script
        hint = f"python sharpen_kd.py {given['command']} --help explains the flags"
        raise UserError(f"unrecognized arguments: {' '.join(unknown)} ({hint})")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def print_error(error: BaseException) -> None:
    """One line on standard error."""
    # An error in a loader process arrives with that process's traceback before it.
    message = str(error).rsplit("UserError: ", 1)[-1]
    print("sharpen_kd: error:", " ".join(message.split()), file=sys.stderr)


if __name__ == "__main__":
    # The imports below take seconds, PyTorch's above all. Help and mistyped arguments are answered
    # here; `main` reads the arguments again.
    try:
        parse_command_line(sys.argv[1:])
    except UserError as error:
        print_error(error)
        sys.exit(2)

import skimage.data
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import ExifTags, ImageCms, ImageOps, PngImagePlugin
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF
from tqdm import tqdm

from Restormer.basicsr.models.archs.restormer_arch import StemmedRestormer, restormer_dimensions

# --- Files, devices -------------------------------------------------------------------------------

# torchrun numbers its processes; alone, this is process 0 of 1.
RANK = int(os.environ.get("RANK", 0))
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def temporary_name(process: object, thread: object) -> str:
    """The name of a file that this computer's process and thread are writing."""
    computer = zlib.crc32(platform.node().encode())
    return f".sharpen_kd-{computer:08x}-{process}-{thread}"


@functools.cache
def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have left half-written in a folder."""
    if os.name == "nt":  # where os.kill would end a process instead of asking for it
        return
    for file in folder.glob(temporary_name("*", "*")):
        if not is_process(file.name.split("-")[2]):
            with contextlib.suppress(OSError):  # another user's, in a folder for all
                file.unlink()


def is_process(number: str) -> bool:
    """Whether a process of this number runs, or may do so."""
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError, ValueError):  # another user's process; no number of one
        return True
    return True


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write into, renamed to `path` when all is written.

    An interruption leaves the old file whole. UserError where the file cannot be written.
    """
    temporary = path.with_name(temporary_name(os.getpid(), threading.get_ident()) + path.suffix)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # RuntimeError is PyTorch's, for a full disk
        cause = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{path}: cannot be written ({cause})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(text: str, path: Path) -> None:
    """Write a small text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def without_infinities(content: dict) -> dict:
    """The content as JSON can hold it: infinite numbers and those that are none become None."""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


def write_json(content: dict, path: Path) -> None:
    """Write a JSON file; JSON knows no infinite numbers, which become null."""
    write_text(json.dumps(without_infinities(content), indent=1) + "\n", path)


def write_csv(rows: list[dict], path: Path) -> None:
    """One line a row; the columns are in the order of their first appearance."""
    columns: dict[str, None] = {}  # as a set that keeps its order
    for row in rows:
        columns.update(dict.fromkeys(row))
    # Names of files need not be UTF-8.
    options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with replacing(path) as temporary, temporary.open("w", **options) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_checkpoint(content: dict, path: Path) -> None:
    """Write what `read_checkpoint` reads, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def read_checkpoint(path: Path, remedy: str) -> dict:
    """The dictionary in a PyTorch file, loaded without running code from it; UserError if none."""
    try:
        if zipfile.is_zipfile(path):  # older files are none
            check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except Exception as error:  # torch.load raises whatever a damaged archive happens to cause
        cause = type(error).__name__
        if isinstance(error, ValueError):
            cause = error
        raise UserError(f"{path}: not a PyTorch weight file ({cause}); {remedy}") from error
    require(isinstance(content, dict), f"{path}: holds no dictionary of weights; {remedy}")
    return content


def check_archive(path: Path) -> None:
    """ValueError for a damaged archive, and for one that would fill the memory.

    PyTorch stores weights uncompressed, and does not look at their checksums.
    """
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.file_size > entry.compress_size:
                raise ValueError(f"its entry {entry.filename} is compressed")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"its entry {damaged} is damaged")


def weights_in(content: dict) -> dict[str, Tensor]:
    """The weights in a checkpoint; ValueError unless they are finite floats.

    BasicSR stores them as "params" or, averaged, as "params_ema", others as "state_dict" or bare.
    DistributedDataParallel begins each name with "module.".
    """
    weights = content
    for key in ("params_ema", "params", "state_dict"):
        if key in content:
            weights = content[key]
            break
    if not isinstance(weights, dict):
        raise ValueError(f"its weights are a {type(weights).__name__}")
    found = {}
    for name, values in weights.items():
        is_float = isinstance(values, Tensor) and values.is_floating_point()
        # A few numbers could stand for many that are never stored.
        is_stored = is_float and values.nbytes <= values.untyped_storage().nbytes()
        if not (is_stored and values.isfinite().all()):
            raise ValueError(f"its {name} is no tensor of finite numbers")
        found[str(name).removeprefix("module.")] = values
    return found


def require_writable(*files: Path | None) -> None:
    """Make the folders of files that are written later; UserError now for what cannot be."""
    for file in files:
        if file is None:
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{file.parent}: cannot be made ({error.strerror})") from error
        place = file if file.exists() else file.parent
        writable = not file.is_dir() and os.access(place, os.W_OK)
        require(writable, f"{file}: cannot be written; name another file")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder; UserError with the number of the one in there.

    The system unlocks it when this process and its loaders end, however that happens. On Windows
    and on file systems without locks nothing is kept out.
    """
    if not importlib.util.find_spec("fcntl"):
        yield
        return
    fcntl = importlib.import_module("fcntl")
    path = folder / ".lock"
    require_writable(path)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            busy = f"{folder}: process {file.read()} is training there"
            raise UserError(f"{busy}; wait for it, or name another --run-dir") from None
        except OSError:  # no locks here
            pass
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            # If the run did not begin, leave nothing. The folder may be gone by now.
            with contextlib.suppress(FileNotFoundError):
                if [*folder.iterdir()] == [path]:
                    path.unlink()
                    folder.rmdir()


def require_packages(names: Iterable[str], wanted_by: str) -> None:
    """UserError with the pip command, before any work, unless these packages are installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    require(not missing, f"{wanted_by} needs more packages: pip install {' '.join(missing)}")


def pick_device(config: DeviceConfig) -> torch.device:
    """The device a command computes on; `auto` takes an accelerator where PyTorch finds one."""
    if config.threads:
        torch.set_num_threads(config.threads)
    found = "cpu"
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator().type
    name = found if config.device == "auto" else config.device
    require(name in (found, "cpu"), f"--device {name}: PyTorch finds none here; use --device auto")
    if name == "cuda":
        number = int(os.environ.get("LOCAL_RANK", 0))
        count = torch.cuda.device_count()
        require(number < count, f"torchrun --nproc_per_node: more processes than the {count} GPUs")
        torch.cuda.set_device(number)
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of a network's arithmetic; `auto` is bf16 where the processor multiplies it."""
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    if name == "bf16" or (name == "auto" and native):
        return torch.bfloat16
    return torch.float32


def autocast_for(precision: str, device: torch.device) -> torch.autocast:
    """bf16 arithmetic if it is asked for, or for `auto` where it is native."""
    bf16 = pick_precision(precision, device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def progress(items: Iterable | None = None, about: str = "", **options) -> tqdm:
    """A progress bar on a terminal; nothing in a file, or from other processes than the first."""
    return tqdm(items, about, disable=True if RANK > 0 else None, **options)


# --- Pictures: from files to arrays and tensors ---------------------------------------------------

# Formats that Pillow names but reads only with other programs' help, or not as pictures.
NO_PICTURES = {"BUFR", "EPS", "FPX", "GRIB", "HDF5", "MPEG", "WMF"}


@functools.cache
def picture_formats() -> dict[str, str]:
    """{".jpg": "JPEG", ...}: what Pillow reads; this registers pillow-heif, if it is installed."""
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    formats = Image.registered_extensions()
    return {s: f for s, f in formats.items() if f in Image.OPEN and f not in NO_PICTURES}


def picture_format(path: Path) -> str | None:
    """Pillow's name of the format that a file's name ends in; None if it knows none."""
    picture_formats()  # registers HEIC
    return Image.registered_extensions().get(path.suffix.lower())


def open_picture(path: Path) -> Image.Image:
    """The decoded picture at `path`, upright, in its own mode; UserError if it cannot be read."""
    picture_formats()  # registers HEIC
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about size and metadata
            with Image.open(path) as image:
                image.load()
                if is_deep_grey(image):
                    rgb_array(image)  # floats outside [0, 1] raise here, where the file is named
                turn_upright(image)
                return image
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: {error}; sharpen takes it with --max-megapixels") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file happens to cause
        raise UserError(f"{path}: not a readable picture ({error})") from error


def turn_upright(image: Image.Image) -> None:
    """Turn a picture as its EXIF orientation says, as far as its EXIF can be read."""
    # Pillow's EXIF reader raises whatever a damaged tag happens to cause.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def lies_on_its_side(image: Image.Image) -> bool:
    """Whether `turn_upright` will exchange the width and height of a picture's header."""
    if image.format == "TIFF":  # Pillow gives the size of the upright picture
        return False
    if image.format == "PNG" and "exif" not in image.info:  # else Pillow would read its end for it
        return False
    with contextlib.suppress(Exception):
        return image.getexif()[ExifTags.Base.Orientation] > 4
    return False


def is_deep_grey(image: Image.Image) -> bool:
    """Whether a picture is greyscale of more than 8 bits: Pillow's modes I, I;16, F and others."""
    return image.mode[0] in "IF"


def rgb_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """RGB (H, W, 3), uint8 or float32 in [0, 1], of a picture or an (H, W[, 1 to 4]) array.

    ValueError for other shapes and for pixels outside their range.
    """
    if isinstance(image, Image.Image):
        if not is_deep_grey(image):
            return np.array(image.convert("RGB"))
        image = np.asarray(image)
        if image.dtype.kind in "iu":  # 16-bit greyscale, which Pillow may widen to 32 bits
            image = image.clip(0, 65535).astype(np.uint16)

    if image.ndim not in (2, 3) or (image.ndim == 3 and not 1 <= image.shape[2] <= 4):
        raise ValueError(f"a picture has shape (H, W) or (H, W, 1 to 4), not {image.shape}")
    if image.dtype == np.uint16:
        image = image.astype(np.float32) / 65535
    elif image.dtype != np.uint8:
        image = image.astype(np.float32)
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError("pixels must be uint8, uint16, bool, or floats in [0, 1]")

    image = image.reshape(*image.shape[:2], -1)
    if image.shape[2] < 3:  # grey, perhaps with alpha
        return image[..., [0, 0, 0]]
    return image[..., :3]


def frame_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """`rgb_array` rounded to 8 bits, as frames are."""
    array = rgb_array(image)
    if array.dtype == np.uint8:
        return array
    return np.rint(array * 255).astype(np.uint8)


FrameFunction = Callable[[np.ndarray], np.ndarray]  # 8-bit RGB (H, W, 3) in and out


class CustomToTensor:
    """Picture or array of any mode to a float RGB tensor (3, H, W) in [0, 1]; the report's name."""

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        return TF.to_tensor(np.ascontiguousarray(rgb_array(image)))  # divides 8-bit values by 255


def even_sized(image: Image.Image | np.ndarray) -> Image.Image:
    """8-bit RGB without an odd last row or column, so that shrinking by 2 halves it exactly."""
    image = Image.fromarray(frame_array(image))
    width, height = image.size
    return image.crop((0, 0, max(width - width % 2, 1), max(height - height % 2, 1)))


def list_files(folder: Path, unreadable: list[Path] | None = None) -> list[Path]:
    """Every regular file below `folder` and the folders that it links to, sorted.

    Hidden files and folders are left out, and a folder that links to itself is entered once. A link
    to nowhere is listed: who opens it will name it. A folder that cannot be read is put into
    `unreadable`; without that it is a UserError.
    """

    def refuse(error: OSError) -> None:
        if unreadable is not None:
            unreadable.append(Path(error.filename))
            return
        missing = isinstance(error, FileNotFoundError)
        require(missing, f"{error.filename}: cannot be read ({error.strerror})")

    files = []
    entered = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if not os.access(place, os.X_OK):  # it can be listed, but nothing in it opened
            refuse(PermissionError(errno.EACCES, os.strerror(errno.EACCES), place))
            folders.clear()
            continue
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()  # os.walk then goes no deeper
            continue
        entered.add((status.st_dev, status.st_ino))
        # Sorted, so that of two links to one folder it is always the same that is entered.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names if not name.startswith(".")]
    to_nowhere = [file for file in files if file.is_symlink() and not file.exists()]
    return sorted([*(file for file in files if file.is_file()), *to_nowhere])


def list_pictures(folder: Path) -> list[Path]:
    """The pictures among `list_files`, by their endings."""
    return [path for path in list_files(folder) if path.suffix.lower() in picture_formats()]


LONGEST_IN_JPEG = {"exif": 65533, "xmp": 65504}  # bytes


# How each format compresses. Where it can be had, colour is kept at its full size: the student has
# just sharpened its edges.
COMPRESSION = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
    "HEIF": {"quality": 95},
    "TIFF": {"compression": "tiff_lzw"},
}


def png_info(
    text: dict[str, str], chunks: dict[bytes, bytes], xmp: bytes | None
) -> PngImagePlugin.PngInfo:
    """What a PNG says about its picture, as Pillow takes it."""
    info = PngImagePlugin.PngInfo()
    for name, value in text.items():
        info.add_text(name, value)
    for name, value in chunks.items():
        info.add(name, value)
    if xmp is not None:
        info.add_itxt("XML:com.adobe.xmp", xmp.decode(errors="replace"))
    return info


def has_exif_groups(data: bytes) -> bool:
    """Whether EXIF has camera settings or a place, which lie in directories of their own."""
    exif = Image.Exif()
    exif.load(data)
    return any(group in exif for group in EXIF_GROUPS)


def save_picture(image: Image.Image, path: Path) -> None:
    """Write a picture with the metadata in `image.info`, whole or not at all.

    "text" and "chunks", of names to values, are for PNG; the others are Pillow's options.
    """
    kind = picture_format(path)
    options = dict(image.info)
    text = options.pop("text", {})
    chunks = options.pop("chunks", {})
    if kind == "PNG":
        options["pnginfo"] = png_info(text, chunks, options.get("xmp"))
    for name, longest in LONGEST_IN_JPEG.items():
        if kind == "JPEG" and len(options.get(name, b"")) > longest:
            del options[name]
            tqdm.write(f"{path}: a JPEG cannot hold {name.upper()} of that length; it is left out")
    options.update(COMPRESSION.get(kind, {}))
    if kind == "TIFF" and has_exif_groups(options.get("exif", b"")):
        options["compression"] = "raw"  # Pillow compresses by libtiff, which refuses them
    with replacing(path) as temporary:
        try:
            image.save(temporary, format=kind, **options)
        except ValueError as error:  # `replacing` makes a UserError of an OSError
            remedy = "; transparency needs .png, .webp or .tif" if "A" in image.mode else ""
            raise OSError(f"{error}{remedy}") from error


# --- Pairs: blurred and sharp pictures that belong together ---------------------------------------


@dataclass(frozen=True)
class Pair:
    """One example. Without a blurred file, the sharp picture is degraded when it is read."""

    key: str  # relative path without ending, e.g. "text/page_003"
    sharp: Path
    blurred: Path | None = None
    degradation: Degradation = PROTOCOLS["x2"]

    @property
    def category(self) -> str:
        """The first folder of the key."""
        if "/" in self.key:
            return self.key.split("/")[0]
        return "all"

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """(blurred, sharp), 8-bit RGB (H, W, 3); UserError for unreadable or tiny files."""
        sharp = open_picture(self.sharp)
        if self.blurred:
            blurred = open_picture(self.blurred)
        else:
            sharp = even_sized(sharp)
            blurred = degrade(sharp, self.degradation)
        require(min(sharp.size) >= 7, f"{self.sharp}: SSIM needs at least 7x7 pixels")
        return frame_array(blurred), frame_array(sharp)


# A folder named blurred, blur or sharp, anywhere in a path, says which side of a pair a file is.
# The pair's key is the rest of the path: "text/a" for `blurred/text/a_blur.png`, and
# "GOPR0372_07_00/000047" for GoPro's `GOPR0372_07_00/blur/000047.png`. GoPro's `blur_gamma` is no
# side.
PAIR_FILE = re.compile(
    r"""
    (?P<before> (.*?/)?)             # the folders above, if any
    (?P<side> blurred | blur | sharp) /
    (?P<after> .*?)
    (_blurred | _blur | _sharp)?     # a suffix of the file's name
    """,
    re.DOTALL | re.VERBOSE,
)


def picture_size(path: Path) -> Size | None:
    """(width, height) of the upright picture from a file's header; None if that is unreadable."""
    try:
        with Image.open(path) as image:
            return image.size[::-1] if lies_on_its_side(image) else image.size
    except Exception:  # as in `open_picture`
        return None


def list_of(problems: list[str]) -> str:
    """The first five, and how many more."""
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def side_and_key(file: Path) -> tuple[str, str] | None:
    """("blurred" or "sharp", key) of a dataset's file by its relative path; None for another."""
    match = PAIR_FILE.fullmatch(file.with_suffix("").as_posix())
    if not match:
        return None
    side = "sharp" if match["side"] == "sharp" else "blurred"
    return side, match["before"] + match["after"]


def find_sides(folder: Path) -> dict[str, dict[str, Path]]:
    """{"blurred": {key: path}, "sharp": {key: path}}; UserError for two files of one side."""
    sides = {"blurred": {}, "sharp": {}}
    problems = []
    for path in list_pictures(folder):
        found = side_and_key(path.relative_to(folder))
        if found is None:
            continue
        side, key = found
        other = sides[side].setdefault(key, path)
        if other != path:
            problems.append(f"{other} and {path} are the {side} side of one pair")
    require(not problems, f"{list_of(problems)}. Rename or remove one.")
    return sides


def find_pairs(folder: Path) -> list[Pair]:
    """A folder's blurred/sharp pairs by key.

    UserError for no pairs, files without a partner, unequal sizes and unreadable files: an example
    that is dropped silently would be missed by nobody.
    """
    sides = find_sides(folder)
    blurred = sides["blurred"]
    sharp = sides["sharp"]
    problems = []
    for key in sorted(blurred.keys() - sharp.keys()):
        problems.append(f"{blurred[key]} has no sharp partner")
    for key in sorted(sharp.keys() - blurred.keys()):
        problems.append(f"{sharp[key]} has no blurred partner")
    pairs = [Pair(key, sharp[key], blurred[key]) for key in sorted(sharp.keys() & blurred.keys())]
    for pair in pairs:
        sizes = [picture_size(pair.blurred), picture_size(pair.sharp)]
        if None in sizes:
            unreadable = pair.blurred if sizes[0] is None else pair.sharp
            problems.append(f"{unreadable} is unreadable")
        elif sizes[0] != sizes[1]:
            problems.append(f"{pair.blurred} has another size than {pair.sharp}")
    if not blurred and not sharp and list_pictures(folder):  # all are sharp then
        raise UserError(
            f"{folder} holds sharp pictures without blurred ones: `eval --protocol x2`,"
            " `train --preset small` or `--degradation mixed` take them"
        )
    require(not problems, f"{list_of(problems)}. Mend or remove them.")
    require(pairs, f"{folder}: no blurred/sharp pairs; `prepare FOLDER` makes them, see README.md")
    return pairs


def find_sharp(folder: Path, degradation: Degradation) -> list[Pair]:
    """A folder's sharp pictures, to be degraded when they are read.

    They are those on the sharp side of pairs, or all where the folder has no sides. UserError for
    no pictures, and for two of one name.
    """
    sides = find_sides(folder)
    sharp = sides["sharp"]
    if not any(sides.values()):
        for path in without_own_outputs(list_pictures(folder)):
            key = path.relative_to(folder).with_suffix("").as_posix()
            other = sharp.setdefault(key, path)
            require(other == path, f"{other} and {path} are the sharp side of one pair; rename one")
    require(sharp, f"{folder}: no sharp pictures in this folder; name one that holds some")
    return [Pair(key, path, degradation=degradation) for key, path in sorted(sharp.items())]


def split_folder(data_root: Path, split: str) -> Path:
    """data_root/split; or data_root itself, if it is a plain folder without splits."""
    require(data_root.exists(), f"--data-root {data_root}: no such folder")
    has_splits = any((data_root / name).is_dir() for name in ("train", "test"))
    if has_splits or not data_root.is_dir():
        return data_root / split
    return data_root


def embedded_pairs() -> list[Pair]:
    """Pictures in scikit-image's wheel; its data/README.txt names their sources."""
    names = {
        "animals": ("chelsea.png", "horse.png"),
        "people": ("astronaut.png", "camera.png"),
        "text": ("page.png", "text.png"),
        "nature": (
            "coffee.png",
            "rocket.jpg",
            "moon.png",
            "grass.png",
            "gravel.png",
            "brick.png",
            "hubble_deep_field.jpg",
            "motorcycle_left.png",
        ),
    }
    folder = Path(skimage.data.__file__).parent
    pairs = []
    for category, files in names.items():
        for name in files:
            pairs.append(Pair(f"{category}/{Path(name).stem}", folder / name))
    return pairs


# What the demo run holds out: a cat, a face, a page of text and a still life.
EMBEDDED_HELD_OUT = ("animals/chelsea", "people/astronaut", "text/page", "nature/coffee")


def grouped(items: Iterable, key: Callable[[typing.Any], str]) -> dict[str, list]:
    """The items under their keys, both in the order of appearance."""
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def sequence_of(pair: Pair) -> str:
    """The sequence of a GoPro frame, whose neighbours look alike; else the pair stands alone."""
    match = re.search(r"GOPR\d+_\d+_\d+", pair.key)
    if match:
        return match[0]
    return pair.key


def hold_out(pairs: list[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """(training, validation) pairs: whole sequences, until `fraction` is reached or one is left.

    The draw is the same for all runs, so that their scores compare.
    """
    sequences = grouped(pairs, sequence_of)
    names = sorted(sequences)
    held_out = []
    for index in np.random.default_rng(0).permutation(len(names))[:-1]:  # one is left to train on
        if len(held_out) >= fraction * len(pairs):
            break
        held_out += sequences[names[index]]
    left_out = set(held_out)
    training = [pair for pair in pairs if pair not in left_out]
    return training, held_out


def balanced(pairs: list[Pair]) -> list[Pair]:
    """Every category repeated to the size of the largest."""
    categories = grouped(pairs, lambda pair: pair.category).values()
    largest = max(len(category) for category in categories)
    repeated = []
    for category in categories:
        repeated += itertools.islice(itertools.cycle(category), largest)
    return repeated


def training_pairs(config: RunConfig) -> tuple[list[Pair], list[Pair]]:
    """(to train on, held out)."""
    # "mixed" is scored at x2, so that its runs compare with those on x2 alone. scikit-image's
    # pictures have no stored pairs: for "pairs" they are degraded at x2, too.
    degradation = PROTOCOLS.get(config.degradation, PROTOCOLS["x2"])
    if config.data_root is None:
        pairs = [dataclasses.replace(p, degradation=degradation) for p in embedded_pairs()]
        held_out = [pair for pair in pairs if pair.key in EMBEDDED_HELD_OUT]
        training = [pair for pair in pairs if pair not in held_out]
    else:
        folder = split_folder(config.data_root, "train")
        if config.degradation == "pairs":
            pairs = find_pairs(folder)
        else:
            pairs = find_sharp(folder, degradation)
        training, held_out = hold_out(pairs, config.validation_fraction)
    if config.balance:
        training = balanced(training)
    return training, held_out


# --- Crops: what training draws from the pairs ----------------------------------------------------

# The files that `prepare --protocol` writes.
PREPARED_PIXELS = "crops.npy"  # 8-bit (N, 2, S, S, 3): blurred and sharp
PREPARED_ABOUT = "crops.json"

BLOCK = 8  # pixels of the side of the blocks in which JPEG and video encoders work
MARGIN = 8  # pixels by which a frame is continued on each side to be sharpened, an even number


class GoProSharpeningDataset(Dataset):
    """Blurred/sharp training crops: 8-bit RGB (image_size, image_size, 3) for the loader.

    `on_device` makes tensors of them. A crop is drawn from (seed, epoch, index) alone. It starts at
    even pixels, where the pattern of a frame enlarged by 2 begins. "pairs" blurs the pair's own
    blur further, as the report does; a protocol or "mixed" degrades the sharp crop anew.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        image_size: int,
        blur_probability: float = 1.0,
        seed: int = 0,
        cache: bool = False,
        degradation: str = "pairs",
    ) -> None:
        self.pairs = pairs
        self.image_size = image_size
        self.blur_probability = blur_probability
        self.seed = seed
        self.degradation = degradation
        self.decoded: dict[Pair, list[np.ndarray]] = {}
        if cache:
            self.decoded = {pair: self.decode(pair) for pair in dict.fromkeys(pairs)}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        """Crop (epoch, index) as floats (3, H, W): {"blurred", "sharp"}.

        It is for people to look at; the loader asks for whole batches, by `__getitems__`.
        """
        to_tensor = CustomToTensor()
        return {name: to_tensor(image) for name, image in self.crop(*item).items()}

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
        """A batch as PyTorch's loader asks for it; 8 bits are a quarter of the bytes to move."""
        return [self.crop(*item) for item in items]

    def crop(self, epoch: int, index: int) -> dict[str, np.ndarray]:
        """{"blurred", "sharp"} of 8-bit RGB (image_size, image_size, 3) each."""
        key = (self.seed, epoch, index)
        images = self.images(index)
        height, width = images[0].shape[:2]
        place = generator(key, "place")
        top = 2 * place.integers((height - self.image_size) // 2 + 1)
        left = 2 * place.integers((width - self.image_size) // 2 + 1)
        rows = slice(top, top + self.image_size)
        columns = slice(left, left + self.image_size)
        return self.example([image[rows, columns] for image in images], key)

    def images(self, index: int) -> list[np.ndarray]:
        """[blurred, sharp], or [sharp] where it is degraded anew."""
        pair = self.pairs[index]
        if pair in self.decoded:
            return self.decoded[pair]
        return self.decode(pair)

    def decode(self, pair: Pair) -> list[np.ndarray]:
        """`images` from a pair's files; enlarged where they are smaller than a crop."""
        if self.degradation == "pairs":
            images = list(pair.load())
        else:
            images = [np.array(even_sized(open_picture(pair.sharp)))]
        if min(images[0].shape[:2]) >= self.image_size:
            return images
        smallest = (self.image_size, self.image_size)
        return [np.array(ImageOps.cover(Image.fromarray(image), smallest)) for image in images]

    def example(self, images: Sequence[np.ndarray], key: Sequence[int]) -> dict[str, np.ndarray]:
        """Flipped and blurred at random: {"blurred", "sharp"} of 8-bit RGB (H, W, 3) each."""
        if generator(key, "flip").random() < 0.5:
            images = [image[:, ::-1] for image in images]
        sharp = np.ascontiguousarray(images[-1])
        if self.degradation == "pairs":
            blurred = self.blur_further(np.ascontiguousarray(images[0]), key)
        else:
            degraded = degrade(Image.fromarray(sharp), self.degradation_of(key))
            blurred = np.array(degraded)
        return {"blurred": blurred, "sharp": sharp}

    def degradation_of(self, key: Sequence[int]) -> Degradation:
        """How the sharp crop with this key is degraded anew."""
        if self.degradation == MIXED:
            return draw_mixture(key)
        return reseeded(PROTOCOLS[self.degradation], key)

    def blur_further(self, blurred: np.ndarray, key: Sequence[int]) -> np.ndarray:
        """The report's augmentation: 3x3 Gaussian blur of sigma 0.1 to 2.0."""
        draw = generator(key, "blur further")
        if draw.random() >= self.blur_probability:
            return blurred
        planes = torch.from_numpy(blurred).permute(2, 0, 1)
        return TF.gaussian_blur(planes, 3, draw.uniform(0.1, 2.0)).permute(1, 2, 0).numpy()


class PreparedCrops(Dataset):
    """Training crops that `prepare --protocol` wrote, from a file that is mapped into memory.

    What a video encoder does to a frame takes longer than a training step, so it is done once. A
    crop is a window of a stored one, mirrored and turned at random; it is drawn from
    (seed, epoch, index) alone. UserError for a folder that holds no finished crops.

    With a `device` they are all copied to its memory, and cut and turned there.
    """

    def __init__(
        self, folder: Path, image_size: int, seed: int = 0, device: torch.device | None = None
    ) -> None:
        self.image_size = image_size
        self.seed = seed
        self.folder = folder
        self.stored, self.sources = read_prepared(folder)
        side = self.stored.shape[2]
        fits = image_size <= side
        require(fits, f"--image-size {image_size}: the prepared crops have {side} pixels a side")
        self.used = range(len(self.stored))
        self.pixels = torch.from_numpy(self.stored)
        self.in_device_memory = device is not None
        if device:
            self.pixels = self.pixels.to(device, copy=True)

    def __getstate__(self) -> dict[str, object]:
        """All but the crops: a process that is not forked maps them anew, instead of a copy."""
        return {n: v for n, v in vars(self).items() if n not in ("stored", "pixels")}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.stored, _ = read_prepared(self.folder)
        self.pixels = torch.from_numpy(self.stored)

    def __len__(self) -> int:
        return len(self.used)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        """{"blurred", "sharp"} of 8-bit RGB (image_size, image_size, 3) each; item (epoch, index).

        The window starts at a multiple of BLOCK: at an even pixel, where the pattern of a frame
        enlarged by 2 begins, and with an encoder's block where nothing was enlarged.
        """
        epoch, index = item
        draw = generator((self.seed, epoch, index), "prepared crop")
        positions = (self.pixels.shape[2] - self.image_size) // BLOCK + 1
        top, left = BLOCK * draw.integers(positions, size=2)
        mirror, flip, turn = draw.random(3) < 0.5
        both = self.pixels[self.used[index]]
        both = both[:, top : top + self.image_size, left : left + self.image_size]
        # With a tenth each a student gained 74, 94 and 69 % at the borders of three pictures of
        # what it gained inside; trained on with a fifth 96, 97 and 78 %.
        at_the_top, at_the_left = draw.random(2) < 0.2
        both = with_border(both, at_the_top, at_the_left)
        # After the borders, which thus come to lie on all four sides.
        if mirror:
            both = both.flip(2)
        if flip:
            both = both.flip(1)
        if turn:
            both = both.transpose(1, 2)
        blurred, sharp = both
        return {"blurred": blurred, "sharp": sharp}

    def leave_out(self, fraction: float, most: int = 200) -> list["PreparedCrop"]:
        """Leave out the crops of whole clips and pictures; at most so many of them are returned."""
        # As pairs, so that sources are drawn as `training_pairs` draws pictures.
        sources = [Pair(source, Path(source)) for source in sorted(set(self.sources))]
        held_out = {pair.key for pair in hold_out(sources, fraction)[1]}
        left_out = [i for i in self.used if self.sources[i] in held_out]
        self.used = [i for i in self.used if self.sources[i] not in held_out]
        every = math.ceil(len(left_out) / most) or 1
        crops = [PreparedCrop(*self.stored[i]) for i in left_out[::every]]
        # A crop that arrived as it was sent, as one of a single colour does, has nothing to gain.
        return [crop for crop in crops if frame_psnr(*crop.load()) < PSNR_CAP]


def read_prepared(folder: Path) -> tuple[np.ndarray, list[str]]:
    """(crops (N, 2, S, S, 3), of each the clip or picture it shows), mapped into memory.

    UserError unless all are there. The mapping can be written into, as PyTorch wishes, and the file
    stays as it is.
    """
    root = folder.parent if folder.name in ("train", "test") else folder
    remedy = f"`prepare SHARP --protocol calls --data-root {root}` writes them"
    try:
        _, sources = read_about(folder)
        stored = np.load(folder / PREPARED_PIXELS, mmap_mode="c")
        if stored.ndim != 5 or len(sources) > len(stored):
            raise ValueError(f"{len(sources)} names of crops, and pixels of shape {stored.shape}")
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: holds no prepared crops ({error}); {remedy}") from error
    unfinished = f"{folder}: its crops are not all written; run the same `prepare` again"
    require(len(sources) == len(stored), unfinished)
    return stored, sources


def read_about(folder: Path) -> tuple[str, list[str]]:
    """(key, sources so far) of prepared crops; KeyError, TypeError or ValueError for other JSON."""
    about = json.loads((folder / PREPARED_ABOUT).read_text())
    sources = about["sources"]
    if not (isinstance(sources, list) and all(isinstance(name, str) for name in sources)):
        raise ValueError("its sources are no names")
    return about["key"], sources


def with_border(both: Tensor, at_the_top: bool, at_the_left: bool) -> Tensor:
    """(..., H, W, C) moved down or to the right by MARGIN, and continued as frames are there.

    So a student learns what it will see at a frame's borders.
    """
    if at_the_top:
        first_rows = both[..., :MARGIN, :, :].flip(-3)
        both = torch.cat([first_rows, both[..., :-MARGIN, :, :]], dim=-3)
    if at_the_left:
        first_columns = both[..., :MARGIN, :].flip(-2)
        both = torch.cat([first_columns, both[..., :-MARGIN, :]], dim=-2)
    return both


@dataclass(frozen=True)
class PreparedCrop:
    """A held-out crop, for `TrainingRun` to score on like a Pair."""

    blurred: np.ndarray
    sharp: np.ndarray

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """(blurred, sharp), 8-bit RGB (H, W, 3)."""
        return np.array(self.blurred), np.array(self.sharp)


def on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """(B, C, H, W) floats in channels_last, of a loader's (B, H, W, C); 8 bits stand for [0, 1]."""
    moved = {}
    for name, tensor in batch.items():
        tensor = tensor.to(device, non_blocking=True).permute(0, 3, 1, 2)
        if tensor.dtype == torch.uint8:
            moved[name] = tensor.float() / 255
        else:
            moved[name] = tensor.float()
    return moved


# --- Teacher: a frozen Restormer, its features read by forward hooks ------------------------------
#
# A StemmedRestormer is a Restormer that sees the picture folded by its stem stride r: r x r pixels
# of 3 colours become one position of 3 r^2 channels. Its output is unfolded again. The published
# Restormer has r = 1.


def load_restormer(weights: Path | None, flag: str = "--teacher-weights") -> StemmedRestormer:
    """The RGB Restormer of the weight file that a flag names, by default the official one.

    UserError for a file that is none.

    The file holds {"params": state dict}, as published, or a bare state dict. The network's
    dimensions are read from the weights' shapes.
    """
    path = weights or OFFICIAL_TEACHER
    compact = COMPACT_TEACHER.relative_to(HERE)
    remedy = f"name another file with {flag} ({compact} is a compact one)"
    if flag == "--teacher-weights":
        official = "get motion_deblurring.pth from the releases of github.com/swz30/Restormer"
        remedy = f"{official} and put it at {OFFICIAL_TEACHER}, or {remedy}"
    content = read_checkpoint(path, remedy)
    try:
        state = weights_in(content)
        dimensions = restormer_dimensions(state)
        restormer = StemmedRestormer(**dimensions)
        restormer.load_state_dict(state, strict=True)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        cause = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not the weights of a Restormer ({cause}); {remedy}") from error
    channels = 3 * restormer.stem_stride**2
    if dimensions["inp_channels"] != channels or dimensions["out_channels"] != channels:
        raise UserError(f"{path}: this Restormer does not map RGB to RGB; {remedy}")
    return restormer


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) reflected at the right and the bottom to multiples of `multiple`.

    Not by F.pad, which cannot reflect a picture that is narrower than the padding.
    """
    height, width = image.shape[-2:]
    if height % multiple == 0 and width % multiple == 0:
        return image
    rows = np.pad(np.arange(height), (0, -height % multiple), "reflect")
    columns = np.pad(np.arange(width), (0, -width % multiple), "reflect")
    image = image[..., torch.tensor(rows, device=image.device), :]
    return image[..., torch.tensor(columns, device=image.device)]


class RestormerTeacherWrapper(nn.Module):
    """A frozen Restormer with feature taps and trainable 1x1 projections to the student's widths.

    `forward` restores (B, 3, H, W) of any size; `tapped` then holds the features at 1/2, 1/4 and
    1/8 of the size that the Restormer sees. AttributeError if a tap is missing: a hook that is not
    there would be a loss term that silently is 0.
    """

    # The keys are the report's names. The report hooks an "encoder_level4" for e4, which no
    # Restormer has; here it is level 3.
    TAPS: typing.ClassVar = {"e2": "encoder_level2", "e4": "encoder_level3", "b": "latent"}

    def __init__(
        self, restormer: StemmedRestormer, student_widths: dict[str, int] | None = None
    ) -> None:
        super().__init__()
        self.restormer = restormer.requires_grad_(False).eval()
        # The sides of the Restormer's input must be multiples of this. (The workshop's cache cuts
        # crops out of stored taps; those start at multiples of it, too.)
        self.alignment = 8 * restormer.stem_stride
        self.tapped: dict[str, Tensor] = {}
        for name, layer in self.TAPS.items():
            module = restormer.get_submodule(layer)
            module.register_forward_hook(self.keep_as(name))
            if student_widths:
                # A level's first transformer block begins with a LayerNorm: one weight a channel.
                first_block = module[0]
                teacher_width = len(first_block.norm1.body.weight)
                projection = nn.Conv2d(teacher_width, student_widths[name], 1)
                self.add_module(f"proj_{name}", projection)

    def keep_as(self, name: str) -> Callable:
        """A forward hook that keeps its module's output under this name."""

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.tapped[name] = output

        return hook

    def train(self, mode: bool = True) -> "RestormerTeacherWrapper":
        super().train(mode)
        self.restormer.eval()
        return self

    @torch.no_grad()
    def forward(self, blurred: Tensor) -> Tensor:
        height, width = blurred.shape[-2:]
        restored = self.restormer(pad_to_multiple(blurred, self.alignment))
        return restored[..., :height, :width]

    def project(self, tapped: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tapped features, from this network or from a cache, at the student's widths."""
        return {
            name: self.get_submodule(f"proj_{name}")(tapped[name].float()) for name in self.TAPS
        }


def teacher_frames(
    restormer: StemmedRestormer, device: torch.device, precision: str = "auto"
) -> FrameFunction:
    """A function that applies a teacher to whole 8-bit RGB frames (H, W, 3)."""
    teacher = RestormerTeacherWrapper(restormer).to(device, memory_format=torch.channels_last)
    autocast = autocast_for(precision, device)

    def restore(frame: np.ndarray) -> np.ndarray:
        blurred = torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 255
        with autocast:
            restored = teacher(blurred).float()
        rounded = (restored[0].permute(1, 2, 0) * 255).round_().clamp_(0, 255)
        return rounded.to(torch.uint8).cpu().numpy()

    return restore


# --- Student: what a student must have; the report's U-Net; a plain stack -------------------------
#
# A student, too, sees the picture folded by its stem stride r, as a map of 1/r of the sides with
# 3 r^2 channels. All arithmetic is then done on 1/r^2 as many positions.


@dataclass
class Features:
    """What a student makes of a folded picture before its last layer."""

    last: Tensor  # (B, C, H/r, W/r), which `output` turns into the correction
    taps: dict[str, Tensor]  # to be compared with the teacher's taps of the same names


class Student(nn.Module, abc.ABC):
    """The contract of a student: what training, frames, export and `fps` need of a network.

    A student predicts a correction, so that it starts as a copy of its input and need not learn to
    be one. A new student is one class with these members, and an entry in STUDENTS.
    """

    config: dict[str, object]  # {"kind": its name in STUDENTS, ...}: what `build_student` takes
    stem_stride: int  # r
    alignment: int  # `features` takes sides that are multiples of it; tiles begin at such, too
    reach: int  # about how far away, in pixels, an input can change an output
    feature_widths: dict[str, int]  # channels of each tap; {} if there is nothing to compare
    output: nn.Conv2d  # the last layer, 1x1 or 3x3, which writes 3 r^2 channels of folded pixels

    @classmethod
    @abc.abstractmethod
    def from_flags(cls, config: StudentConfig) -> "Student":
        """A new student as `train`'s flags describe it."""

    @property
    @abc.abstractmethod
    def first_layer(self) -> nn.Conv2d:
        """The layer that reads 3 r^2 channels of folded pixels; 1x1, or 3x3 padded by 1."""

    @abc.abstractmethod
    def features(self, folded: Tensor) -> Features:
        """All layers but the last, on (B, 3 r^2, H/r, W/r)."""

    def forward(self, blurred: Tensor, taps: bool = False) -> Tensor | tuple[Tensor, dict]:
        """Restore (B, 3, H, W) in [0, 1] of any size; on request with the taps."""
        height, width = blurred.shape[-2:]
        padded = pad_to_multiple(blurred, self.alignment)
        features = self.features(F.pixel_unshuffle(padded, self.stem_stride))
        correction = F.pixel_shuffle(self.output(features.last), self.stem_stride)
        restored = blurred + correction[..., :height, :width]
        if taps:
            return restored, features.taps
        return restored


# The slope below zero of the ReLUs after 3x3 convolutions. With plain ReLUs the deep stages die:
# all 64 channels of one were zero after 2,000 steps, which cost 0.08 dB.
LEAK = 0.1


def initialise(network: nn.Module, output: nn.Conv2d) -> None:
    """He initialisation, and a last layer near zero: the network is a copy of its input at first.

    With PyTorch's default the signal fades, for want of normalisation layers: after six minutes of
    training the output still equalled the input.
    """
    for module in network.modules():
        is_trained = isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.requires_grad
        if is_trained:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    nn.init.normal_(output.weight, std=1e-3)


def haar() -> Tensor:
    """(4, 4): from 2x2 pixels, row by row, to twice their mean and three differences.

    It is its own inverse.
    """
    signs = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    return torch.tensor(signs, dtype=torch.float32) / 2


def luma_layers() -> tuple[nn.Conv2d, nn.Conv2d]:
    """(from folded RGB to planes, from planes to folded RGB), with fixed kernels.

    The planes of 2x2 pixels are their luma, as its mean and three differences (`haar`), and their
    two colour differences averaged, as video has them: half as many as RGB has, and most of the
    arithmetic goes where most of the error is.
    """
    from_rgb = torch.tensor(  # luma, blue - luma, red - luma (ITU-R BT.601)
        [[0.299, 0.587, 0.114], [-0.169, -0.331, 0.5], [0.5, -0.419, -0.081]]
    )
    to_rgb = torch.tensor([[1, 0, 1.402], [1, -0.344, -0.714], [1, 1.772, 0]])
    of_each = haar()  # the mean and the differences of a fold's lumas
    of_all = torch.full((1, 4), 1 / 4)  # averages a colour difference over the fold's pixels
    to_each = torch.ones(4, 1)  # gives the same to all four
    # `pixel_unshuffle` orders the 12 channels of a fold by colour and pixel: R00 R01 R10 R11 G00.
    # The six planes are the lumas' mean and three differences, then blue - luma and red - luma.
    into = [torch.kron(from_rgb[:1], of_each), torch.kron(from_rgb[1:], of_all)]
    back = [torch.kron(to_rgb[:, :1], of_each), torch.kron(to_rgb[:, 1:], to_each)]

    planes = nn.Conv2d(12, 6, 1)
    planes.weight.data = torch.cat(into)[:, :, None, None]
    nn.init.zeros_(planes.bias)
    planes.requires_grad_(False)
    output = nn.Conv2d(6, 12, 1)
    output.weight.data = torch.cat(back, dim=1)[:, :, None, None]
    nn.init.zeros_(output.bias)
    # The bias is trained, and may move whole frames by a part of a level; the kernels are not.
    output.weight.requires_grad_(False)
    return planes, output


class KeepGrey(nn.Module):
    """Scales colour corrections by how colourful 2x2 pixels are: 0 on grey, near 1 on colour."""

    def __init__(self) -> None:
        super().__init__()
        of_colours = torch.tensor([0.0, 0, 0, 0, 1, 1]).view(1, 6, 1, 1)
        self.register_buffer("of_colours", of_colours, persistent=False)

    def forward(self, correction: Tensor, planes: Tensor) -> Tensor:
        """Both (B, 6, H/2, W/2), of the planes of `luma_layers`."""
        energy = planes[:, 4:].square().sum(1, keepdim=True)  # of the two colour differences
        colourful = energy / (energy + 1e-4)  # 0.5 at 2.5 levels of 255
        return correction * (1 - self.of_colours + self.of_colours * colourful)


class SEBlock(nn.Module):
    """Squeeze-and-excitation gates (Hu et al., CVPR 2018), one for each channel and neighbourhood.

    In the paper and in the report a gate comes from the mean over the whole input. Then one sharp
    caption closes the gates of a whole frame, and the tiles of a large one differ. Here it comes
    from the mean over 3x3 cells of `cell` positions a side, and from cell to cell it changes
    smoothly. With cells of 32 pixels that is what a training crop of 96 pixels shows.
    """

    CELL = 32  # pixels of the side of a cell, at least; as many at every scale of a U-Net

    def __init__(self, channels: int, cell: int) -> None:
        super().__init__()
        hidden = max(1, channels // 8)
        self.cell = cell
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Gates (B, C, H, W) in (0, 1) for features of that shape; sides are multiples of cells."""
        means = F.avg_pool2d(x, self.cell)
        means = F.avg_pool2d(means, 3, stride=1, padding=1, count_include_pad=False)
        hidden = F.relu(self.squeeze(means.permute(0, 2, 3, 1)))  # channels last: layers see them
        gates = torch.sigmoid(self.excite(hidden)).permute(0, 3, 1, 2)
        return F.interpolate(gates, scale_factor=self.cell, mode="bilinear")


class Stage(nn.Module):
    """3x3 convolutions with leaky ReLUs, then gates from an SE block, if it has one.

    `from_below`, for lateral skips, is what comes up from the coarser scale; it is added after the
    first convolution. A stage without `cell` has no SE block.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        convolutions: int,
        stride: int = 1,
        cell: int | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(in_channels, channels, 3, stride, padding=1)])
        for _ in range(convolutions - 1):
            self.layers.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.se = SEBlock(channels, cell) if cell else None

    def forward(self, x: Tensor, from_below: Tensor | None = None) -> Tensor:
        x = self.layers[0](x)
        if from_below is not None:
            x = x + from_below
        x = F.leaky_relu(x, LEAK, inplace=True)
        for layer in self.layers[1:]:
            x = F.leaky_relu(layer(x), LEAK, inplace=True)
        if self.se is None:
            return x
        return x * self.se(x)


def unet_shape(
    base_channels: int, widths: Sequence[int], convolutions: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(stage widths, 3x3 layers in a stage), one each for every scale of a U-Net.

    UserError for numbers that do not fit together.
    """
    c = base_channels
    widths = tuple(widths) or (c // 4, c // 2, c, 2 * c, 3 * c)
    scales = len(widths)
    require(scales > 1, f"--widths {widths}: a U-Net has two scales or more")
    convolutions = tuple(convolutions)
    if len(convolutions) == 1:
        convolutions *= scales
    one_each = f"one for each of the {scales} scales"
    wanted = f"--convolutions {convolutions}: one number, or {one_each}"
    require(len(convolutions) == scales, wanted)
    require(min(*widths, *convolutions) > 0, "--widths, --convolutions: 1 or more each")
    return widths, convolutions


class StudentUNet(Student):
    """The report's student: a U-Net with SE blocks.

    Stage widths are c/4, c/2, c, 2c and a bottleneck of 3c for c = `base_channels`, or `widths`,
    one for each scale. A stem stride of 1 is the report's network.

    A decoder stage gets what comes up from the coarser scale, and the encoder's result at its own
    scale, the skip. In the report it takes both concatenated. A `lateral` skip (Lin et al., CVPR
    2017) goes through the stage's first convolution alone, and what comes up is added to the
    result. A student with lateral skips is built for speed: it also shrinks by strided convolutions
    instead of pooling, and has no gates at its finest scale.

    With `luma` it sees and corrects the planes of `luma_layers`; the report's sees RGB.
    """

    def __init__(
        self,
        base_channels: int = 256,
        stem_stride: int = 4,
        widths: Sequence[int] = (),
        skips: str = "concatenate",
        convolutions: Sequence[int] = (2,),
        luma: bool = False,
    ) -> None:
        super().__init__()
        widths, convolutions = unet_shape(base_channels, widths, convolutions)
        require(skips in ("concatenate", "lateral"), f"--skips {skips}: concatenate or lateral")
        require(stem_stride == 2 or not luma, "--luma: takes --stem-stride 2; add --no-luma")

        self.config = {
            "kind": "unet",
            "stem_stride": stem_stride,
            "widths": widths,
            "skips": skips,
            "convolutions": convolutions,
            "luma": luma,
        }
        self.stem_stride = stem_stride
        self.luma = luma
        self.lateral = skips == "lateral"
        self.alignment = max(SEBlock.CELL, stem_stride * 2 ** (len(widths) - 1))
        # Gates see two cells more. (Those of several stages add up, but hardly matter so far away.)
        of_layers = stem_stride * self.reach_in_folds(convolutions)
        self.reach = of_layers + 2 * self.alignment
        self.feature_widths = {"e2": widths[1], "e4": widths[-2], "b": widths[-1]}

        self.plane_count = 6 if luma else 3 * stem_stride**2
        self.add_way_down()
        self.add_way_up()
        self.add_output()
        self.begin_as_a_copy()

    def add_way_down(self) -> None:
        """The encoder's stages, and the bottleneck, which is the last of them."""
        widths = self.config["widths"]
        stride = 2 if self.lateral else 1  # else max-pooling halves the size
        stages = [self.stage(0, self.plane_count)]
        for scale in range(1, len(widths)):
            stages.append(self.stage(scale, widths[scale - 1], stride))
        self.encoder = nn.ModuleList(stages[:-1])
        self.bottleneck = stages[-1]

    def add_way_up(self) -> None:
        """The decoder's stages, and what enlarges before each."""
        widths = self.config["widths"]
        self.up = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for scale in reversed(range(len(widths) - 1)):
            self.up.append(nn.ConvTranspose2d(widths[scale + 1], widths[scale], 2, stride=2))
            merged = widths[scale] if self.lateral else 2 * widths[scale]
            self.decoder.append(self.stage(scale, merged))

    def add_output(self) -> None:
        """The layer that makes folded RGB, and with `luma` those around the corrected planes."""
        width = self.config["widths"][0]
        if self.luma:
            self.planes, self.output = luma_layers()
            self.correction = nn.Conv2d(width, self.plane_count, 1)
            self.keep_grey = KeepGrey()
        else:
            self.output = nn.Conv2d(width, self.plane_count, 1)

    def stage(self, scale: int, in_channels: int, stride: int = 1) -> Stage:
        """The layers of one scale, and their gates where it has some."""
        width = self.config["widths"][scale]
        depth = self.config["convolutions"][scale]
        has_gates = scale > 0 or not self.lateral
        cell = self.alignment // (self.stem_stride * 2**scale) if has_gates else None
        return Stage(in_channels, width, depth, stride, cell)

    @classmethod
    def from_flags(cls, config: StudentConfig) -> "StudentUNet":
        convolutions = config.convolutions or (2,)
        return cls(
            config.base_channels,
            config.stem_stride,
            config.widths,
            config.skips,
            convolutions,
            config.luma,
        )

    @property
    def first_layer(self) -> nn.Conv2d:
        return self.planes if self.luma else self.encoder[0].layers[0]

    def reach_in_folds(self, convolutions: Sequence[int]) -> int:
        """How far the layers see in the folded picture: the 3x3 ones on the longest path, added up.

        It goes down the encoder, through the bottleneck and up the decoder. A layer at scale s
        reaches 2^s positions. (Enlarging can add up to 2^s - 1; inputs so far away hardly matter.)

        With two layers in each of three stages it is 4 x 1 (scale 0, down and up) + 4 x 2 + 2 x 4
        (the bottleneck, passed once) = 20 positions.
        """
        reach = 0
        for scale, count in enumerate(convolutions):
            coarsest = scale == len(convolutions) - 1
            on_the_way_up = 0 if coarsest else count
            if on_the_way_up and self.lateral:  # what comes up misses the first convolution
                on_the_way_up -= 1
            reach += (count + on_the_way_up) * 2**scale
            if scale > 0 and self.lateral:  # a strided layer reads the finer scale: 2^(s-1) only
                reach -= 2 ** (scale - 1)
        return reach

    def begin_as_a_copy(self) -> None:
        """`initialise`, with gates nearly open and what comes up from below near zero.

        Untrained deep stages add noise. If they start at full strength, training switches them off
        and they never recover. From near zero they grow as they learn (0.1 dB better).
        """
        initialise(self, self.correction if self.luma else self.output)
        for module in self.modules():
            if isinstance(module, SEBlock):
                nn.init.constant_(module.excite.bias, 2.0)
        for up in self.up:
            nn.init.normal_(up.weight, std=0.03 * up.in_channels**-0.5)
            nn.init.zeros_(up.bias)

    def features(self, folded: Tensor) -> Features:
        levels = []  # the encoder's results, finest first, each half as high and wide as the last
        planes = self.planes(folded) if self.luma else folded
        x = planes
        for stage in (*self.encoder, self.bottleneck):
            if levels and not self.lateral:
                x = F.max_pool2d(x, 2)
            x = stage(x)
            levels.append(x)

        for up, stage, skip in zip(self.up, self.decoder, reversed(levels[:-1]), strict=True):
            below = up(x)
            if self.lateral:
                x = stage(skip, below)
            else:
                x = stage(torch.cat([below, skip], dim=1))

        # The student's stem and scales need not be the teacher's, so maps of one name may differ in
        # size; `feature_loss` resizes the teacher's.
        taps = {"e2": levels[1], "e4": levels[-2], "b": levels[-1]}
        if self.luma:
            x = self.keep_grey(self.correction(x), planes)
        return Features(x, taps)


class PlainStack(Student):
    """3x3 convolutions of one width at the stem's resolution: nothing to pool, skip or gate.

    With six layers of 16 channels it learns clean x2 faster than a U-Net of twice its cost, but it
    sees few pixels around each and cannot tell an enlarged frame from one that was not. Six layers
    of 24 channels are the yardstick of `fps`.
    """

    def __init__(self, stem_stride: int = 2, width: int = 16, layers: int = 6) -> None:
        super().__init__()
        require(layers > 1, f"--convolutions {layers}: a plain stack has two layers or more")
        self.config = {
            "kind": "plain",
            "stem_stride": stem_stride,
            "width": width,
            "layers": layers,
        }
        self.stem_stride = stem_stride
        self.alignment = stem_stride
        self.reach = stem_stride * layers
        self.feature_widths = {}
        folded = 3 * stem_stride**2
        self.layers = nn.ModuleList([nn.Conv2d(folded, width, 3, padding=1)])
        for _ in range(layers - 2):
            self.layers.append(nn.Conv2d(width, width, 3, padding=1))
        self.output = nn.Conv2d(width, folded, 3, padding=1)
        initialise(self, self.output)

    @classmethod
    def from_flags(cls, config: StudentConfig) -> "PlainStack":
        one_each = len(config.widths) < 2 and len(config.convolutions) < 2
        require(one_each, "--widths, --convolutions: a plain stack takes one number of each")
        options = {}
        if config.widths:
            options["width"] = config.widths[0]
        if config.convolutions:
            options["layers"] = config.convolutions[0]
        return cls(config.stem_stride, **options)

    @property
    def first_layer(self) -> nn.Conv2d:
        return self.layers[0]

    def features(self, folded: Tensor) -> Features:
        x = folded
        for layer in self.layers:
            x = F.leaky_relu(layer(x), LEAK, inplace=True)
        return Features(x, {})


STUDENTS: dict[str, type[Student]] = {
    "unet": StudentUNet,
    "plain": PlainStack,
}


def student_class(kind: str) -> type[Student]:
    """The class of this name; UserError if there is none."""
    choices = f"choose from {', '.join(STUDENTS)}"
    remedy = "a checkpoint of another network needs the version of this script that trained it"
    require(kind in STUDENTS, f"--network {kind}: {choices}; {remedy}")
    return STUDENTS[kind]


def require_likely(config: dict[str, object], weights: dict[str, Tensor]) -> None:
    """ValueError for a network that is larger than its weights, before it is built.

    No side of a network and no number of layers exceeds the longest side of its weights, or their
    number.
    """
    largest = len(weights)
    for weight in weights.values():
        for side in weight.shape:
            largest = max(largest, side)
    for name, value in config.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, str | bool):
                continue
            if not (isinstance(number, int) and 0 < number <= largest):
                raise ValueError(f"its {name} is {value}, which does not fit its weights")


def build_student(config: dict[str, object]) -> Student:
    """The student that a checkpoint's "network" describes, with new weights."""
    options = dict(config)
    kind = options.pop("kind", "unet")  # the first checkpoints knew no other
    return student_class(kind)(**options)


def load_student(name: str | Path) -> tuple[Student, dict]:
    """(student, all that the checkpoint holds) of a shipped student's name or a file.

    The student is in evaluation mode and channels_last. UserError if the file is no student's.
    """
    path = SHIPPED.get(name) or Path(name)
    names = ", ".join(SHIPPED)
    content = read_checkpoint(path, f"name one of {names}, or a file that `train` wrote")
    is_state = "optimiser" in content
    require(not is_state, f"{path}: is a run's state, for --resume; name its best.pth")
    try:
        weights = weights_in(content)
        require_likely(content["network"], weights)
        student = build_student(content["network"])
        student.load_state_dict(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        remedy = "a run's best.pth is one, if this version of the script trained it"
        cause = " ".join(str(error).split())[:300]
        if isinstance(error, KeyError):
            cause = f"it has no {error}"
        raise UserError(f"{path}: not a student of this script ({cause}); {remedy}") from error
    return student.eval().to(memory_format=torch.channels_last), content


class StudentTeacher(nn.Module):
    """A frozen student that teaches a smaller one by its output, as a Restormer would."""

    tapped: typing.ClassVar[dict[str, Tensor]] = {}  # no features to compare

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student.requires_grad_(False)

    @torch.no_grad()
    def forward(self, blurred: Tensor) -> Tensor:
        return self.student(blurred)


# --- Losses: the report's five terms, and two more ------------------------------------------------


@functools.lru_cache
def gaussian_windows(length: int, every: int, size: int = 11, sigma: float = 1.5) -> Tensor:
    """(places, length): each row a normalised Gaussian window, `every` places behind the last."""
    distance = torch.arange(size) - size // 2
    window = torch.exp(-(distance**2) / (2 * sigma**2))
    window = window / window.sum()
    starts = range(0, length - size + 1, every)
    return torch.stack([F.pad(window, (start, length - size - start)) for start in starts])


def ssim(output: Tensor, sharp: Tensor, every: int = 1) -> Tensor:
    """Mean SSIM of two (B, C, H, W) batches in [0, 1], as a scalar (Wang et al., 2004).

    As scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False)`; with `every=2` only at every second place of both directions.
    The window is applied by two matrix products: convolutions of single channels took three
    quarters of a training step on a CPU.
    """
    down = gaussian_windows(output.shape[-2], every).to(output)
    across = gaussian_windows(output.shape[-1], every).to(output).T
    mean, square, product = down @ torch.stack([output, output * output, output * sharp]) @ across
    sharp_mean, sharp_square = down @ torch.stack([sharp, sharp * sharp]) @ across
    means = mean * sharp_mean
    squared_means = mean**2 + sharp_mean**2
    c1 = 0.01**2
    c2 = 0.03**2
    luminance = (2 * means + c1) / (squared_means + c1)
    structure = (2 * (product - means) + c2) / (square + sharp_square - squared_means + c2)
    return (luminance * structure).mean()


def positional_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) over each channel's positions, of (B, C, H, W).

    Shu et al., ICCV 2021, eq. 4. The report's words would also allow a distribution over the three
    colours, which says nothing about a picture.
    """
    student = (student.flatten(2) / temperature).log_softmax(-1)
    teacher = (teacher.flatten(2) / temperature).log_softmax(-1)
    divergence = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    return divergence.mean() * temperature**2


def feature_loss(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """L1 between student features and projected teacher features, (B, C, H, W); mean over taps.

    For each channel |(s - mean of s) - (t - mean of t) / (standard deviation of t)|.

    The projections train too, so a plain L1 would be smallest with both sides at zero. Here each
    teacher channel is standardised to variance 1, so that no projection can shrink it; the
    student's is only centred, and has to reach that variance itself. (With both standardised, 13 of
    24 plain ReLU channels of e2 were dead after 120 steps; with the student's only centred, 4.)
    """
    losses = []
    for name, features in student.items():
        features = features.float()
        target = teacher[name].float()
        if target.shape[-2:] != features.shape[-2:]:
            # With antialias a coarser position is the average over what it covers.
            target = F.interpolate(target, features.shape[-2:], mode="bilinear", antialias=True)
        features = features - features.mean((0, 2, 3), keepdim=True)
        target = target - target.mean((0, 2, 3), keepdim=True)
        variance = target.square().mean((0, 2, 3), keepdim=True)
        losses.append(F.l1_loss(features, target * torch.rsqrt(variance + 1e-8)))
    return torch.stack(losses).mean()


def vgg_features() -> nn.Sequential:
    """torchvision's VGG19 up to relu5_4, frozen, on RGB (B, 3, H, W) in [0, 1].

    Downloads the weights at the first use; UserError where that fails.
    """
    weights = torchvision.models.VGG19_Weights.IMAGENET1K_V1
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not path.exists():
        print(f"Downloading VGG19 (548 MB) to {path}; --lambda-perceptual 0 does without.")
    features = torchvision.models.vgg19(weights=None).features[:36]
    try:
        state = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
        prefix = "features."
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        features.load_state_dict(state)
    except Exception as error:  # no network, or whatever a damaged file happens to cause
        raise UserError(
            f"{path}: no VGG19 weights ({type(error).__name__}: {error}); put {path.name} from"
            f" {weights.url} there, or turn the term off with --lambda-perceptual 0"
        ) from error
    normalise = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return nn.Sequential(normalise, features).requires_grad_(False).eval()


@dataclass
class Comparison:
    """What the loss terms compare: pictures (B, 3, H, W) in [0, 1], features by tap."""

    output: Tensor
    sharp: Tensor
    teacher_output: Tensor | None = None
    features: dict[str, Tensor] | None = None
    teacher_features: dict[str, Tensor] | None = None  # projected to the student's widths


def needs_teacher(weights: dict[str, float]) -> bool:
    """Whether a term with a weight compares with the teacher."""
    return any(weight > 0 and LOSS_TERMS[name].needs_teacher for name, weight in weights.items())


def missing_decibels(output: Tensor, sharp: Tensor, enough: float = 50.0) -> Tensor:
    """About the decibels of PSNR that each crop lacks to `enough`; mean over a batch (B, C, H, W).

    That is 10 log10(1 + MSE / MSE at `enough`). The 1 keeps the gradient finite where a crop came
    back exactly; a crop that has `enough` lacks 3 dB by it.

    To L1 a crop counts as much as its error is large, so that a student learns from the hardest
    ones. Here a tenth less error is worth the same in every crop, just as a mean PSNR counts it.
    """
    squared_errors = (output.float() - sharp.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(1 + squared_errors / 10 ** (-enough / 10)).mean()


class DistillationLoss(nn.Module):
    """The weighted terms, by name; a term of weight 0 is not computed.

    There is a method NAME_term for each row of LOSS_TERMS. To add a term, add a row and a method.
    """

    def __init__(self, weights: dict[str, float], temperature: float = 4.0) -> None:
        super().__init__()
        self.lambdas = {name: weight for name, weight in weights.items() if weight > 0}
        self.temperature = temperature
        self.vgg = vgg_features() if "perceptual" in self.lambdas else None

    def forward(self, seen: Comparison) -> dict[str, Tensor]:
        terms = {}
        for name, weight in self.lambdas.items():
            compute = getattr(self, f"{name}_term")
            terms[name] = weight * compute(seen)
        return terms

    def reconstruction_term(self, seen: Comparison) -> Tensor:
        return F.l1_loss(seen.output, seen.sharp)

    def perceptual_term(self, seen: Comparison) -> Tensor:
        return F.l1_loss(self.vgg(seen.output), self.vgg(seen.teacher_output))

    def feature_term(self, seen: Comparison) -> Tensor:
        return feature_loss(seen.features, seen.teacher_features)

    def kl_term(self, seen: Comparison) -> Tensor:
        return positional_kl(seen.output, seen.teacher_output, self.temperature)

    def ssim_term(self, seen: Comparison) -> Tensor:
        # Neighbouring windows share most of their pixels, and all of them take thrice the time.
        return 1 - ssim(seen.output, seen.sharp, every=2)

    def output_term(self, seen: Comparison) -> Tensor:
        return F.l1_loss(seen.output, seen.teacher_output)

    def psnr_term(self, seen: Comparison) -> Tensor:
        return missing_decibels(seen.output, seen.sharp)


# --- Evaluation: PSNR and SSIM --------------------------------------------------------------------


def frame_psnr(output: np.ndarray, sharp: np.ndarray) -> float:
    """PSNR in dB of two 8-bit RGB frames, by scikit-image; infinite if they are equal."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(sharp, output))


def frame_ssim(output: np.ndarray, sharp: np.ndarray) -> float:
    """SSIM of two 8-bit RGB frames, by scikit-image with its default 7x7 window."""
    return float(structural_similarity(sharp, output, channel_axis=2))


def mean_psnr(values: Sequence[float]) -> float:
    """Mean of PSNRs in dB.

    A picture that equals its reference has an infinite PSNR; then the result is the PSNR of the
    mean squared error over the pictures.
    """
    mean = statistics.fmean(values)
    error = statistics.fmean(10 ** (-value / 10) for value in values)
    if math.isinf(mean) and error > 0:
        return -10 * math.log10(error)
    return mean


FrameMeasure = Callable[[np.ndarray, np.ndarray], float]  # (output, sharp)


@dataclass(frozen=True)
class Metric:
    """A measure of an output against the sharp frame, and how tables average and show it."""

    measure: FrameMeasure
    mean: Callable[[Sequence[float]], float]
    digits: int


# A row here is a figure in every table of `eval` over pictures and clips.
METRICS = {
    "psnr": Metric(frame_psnr, mean_psnr, 2),
    "ssim": Metric(frame_ssim, statistics.fmean, 4),
}


def score(output: np.ndarray, sharp: np.ndarray) -> dict[str, float]:
    """{"psnr", "ssim"} of an 8-bit RGB frame (H, W, 3)."""
    return {name: metric.measure(output, sharp) for name, metric in METRICS.items()}


def mean_scores(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over frames of each metric that all of them have.

    Scores that are read out of a run's best.pth may be older than a metric.
    """
    means = {}
    for name, metric in METRICS.items():
        if all(name in each for each in scores):
            means[name] = metric.mean([each[name] for each in scores])
    return means


def score_method(method: FrameFunction, frames: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict:
    """Mean scores of a function of frames over (blurred, sharp) frames."""
    return mean_scores([score(method(blurred), sharp) for blurred, sharp in frames])


def format_scores(means: dict[str, float]) -> str:
    """The means in the order of METRICS, as in 29.82 / 0.9053."""
    shown = {name: metric.digits for name, metric in METRICS.items() if name in means}
    return " / ".join(f"{means[name]:.{digits}f}" for name, digits in shown.items())


def scores_by_category(
    rows: list[dict], methods: Iterable[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """{category: {method: mean scores}}, "all" first; a category of that name has no row.

    A row is {"category": its name, "scores": {method: {"psnr", "ssim"}}}.
    """
    groups = {"all": rows}
    for category, members in grouped(rows, lambda row: row["category"]).items():
        if category != "all":
            groups[category] = members
    table = {}
    for category, members in groups.items():
        table[category] = {}
        for method in methods:
            table[category][method] = mean_scores([row["scores"][method] for row in members])
    return table


def print_table(
    title: str,
    table: dict[str, dict[str, dict[str, float]]],
    form: Callable[[dict[str, float]], str] = format_scores,
) -> None:
    """A line a category, a column a method; `form` makes a text of a method's scores."""
    methods = next(iter(table.values()))
    texts = {}
    width = 18
    for category, means in table.items():
        texts[category] = [form(scores) for scores in means.values()]
        longest = max(len(text) for text in texts[category])
        width = max(width, longest + 2)
    print(f"{title:<12}" + "".join(f"{method:>{width}}" for method in methods))
    for category, row in texts.items():
        print(f"{category:<12}" + "".join(f"{text:>{width}}" for text in row))


# --- Training: one loop for the student and for the teacher ---------------------------------------


class Expansion(nn.Module):
    """A product of two matrices that is added to a 3x3 kernel in training; zero at first.

    Adam scales the step of each value separately, so that all values of a kernel move about
    equally. Where the two matrices are trained beside it, the kernel moves in a direction closer to
    its gradient (after Bhardwaj et al., MLSys 2022).
    A thousand steps of a small student gave 27.85 dB with a rank of 128, and 27.63 at best without.
    The student that is saved has only the sum.
    """

    def __init__(self, kernel: Tensor, rank: int) -> None:
        super().__init__()
        rows = kernel.flatten(1)
        inputs = rows.shape[1]
        self.inner = nn.Parameter(torch.randn(rank, inputs) * (2 / inputs) ** 0.5)
        self.outer = nn.Parameter(torch.zeros(len(rows), rank))

    def forward(self, kernel: Tensor) -> Tensor:
        return kernel + (self.outer @ self.inner).view_as(kernel)


class Objective(nn.Module):
    """What a run minimises: the loss of a network against sharp pictures and, if any, a teacher."""

    def __init__(
        self,
        network: nn.Module,
        teacher: RestormerTeacherWrapper | StudentTeacher | None,
        loss: DistillationLoss,
        expansion: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.teacher = teacher
        self.loss = loss
        self.expanded: list[str] = []  # names of the kernels that have an expansion
        self.expansions = nn.ModuleList()
        if expansion:
            for name, parameter in network.named_parameters():
                if parameter.shape[2:] == (3, 3):
                    self.expanded.append(name)
                    self.expansions.append(Expansion(parameter, expansion))

    def weights(self) -> dict[str, Tensor]:
        """The network's parameters by name, with their expansions.

        `functional_call` runs the network with these sums in the parameters' places, so gradients
        reach both the parameters and the expansions; and the sums are what the EMA averages.
        """
        weights = dict(self.network.named_parameters())
        for name, expansion in zip(self.expanded, self.expansions, strict=True):
            weights[name] = expansion(weights[name])
        return weights

    def forward(self, batch: dict[str, Tensor], autocast: torch.autocast) -> dict[str, Tensor]:
        """The weighted loss terms of a batch {"blurred", "sharp"} of (B, 3, H, W).

        A batch may already hold what the teacher makes of it: "teacher_output" and its taps.
        """
        features = None
        teacher_features = None
        weights = self.weights()
        call = functools.partial(torch.func.functional_call, self.network, weights)
        with autocast:  # the networks only: SSIM's variances and expansions need float32
            from_teacher = self.teacher_results(batch)
            if "feature" in self.loss.lambdas:
                output, features = call(batch["blurred"], {"taps": True})
                teacher_features = self.teacher.project(from_teacher)
            else:
                output = call(batch["blurred"])
        teacher_output = from_teacher.get("teacher_output")
        return self.loss(
            Comparison(output, batch["sharp"], teacher_output, features, teacher_features)
        )

    def teacher_results(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """{"teacher_output", taps}: in a cache's batch, or the teacher's now; {} without one."""
        if "teacher_output" in batch:
            return batch
        if self.teacher is None:
            return {}
        output = self.teacher(batch["blurred"])
        return self.teacher.tapped | {"teacher_output": output}


class CropOrder(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) batches of one process, from `first_step` on.

    Two processes that accumulate over one batch each see in a step what one process sees that
    accumulates over two: the same crops, shared out. (In an epoch's last step two may see more: it
    is filled up to a whole batch for each.) Eight crops in batches of two are dealt out like cards:
    the first process gets 0 2 and 4 6, the second 1 3 and 5 7 of an epoch's order.
    """

    def __init__(self, count: int, config: RunConfig, rank: int = 0, processes: int = 1) -> None:
        self.count = count
        self.config = config
        self.rank = rank
        self.first_step = 0
        self.group = config.gradient_accumulation_steps
        self.batches_per_epoch = math.ceil(count / (config.batch_size * processes))
        self.processes = processes
        self.steps_per_epoch = math.ceil(self.batches_per_epoch / self.group)

    def batches_in_step(self, step: int) -> int:
        """Batches of this optimiser step; the last group of an epoch may be smaller."""
        seen = (step % self.steps_per_epoch) * self.group
        return min(self.group, self.batches_per_epoch - seen)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, steps_done = divmod(self.first_step, self.steps_per_epoch)
        skipped = steps_done * self.group
        for epoch in range(first_epoch, self.config.epochs):
            order = np.random.default_rng((self.config.seed, epoch)).permutation(self.count)
            shape = (self.batches_per_epoch, self.config.batch_size, self.processes)
            batches = np.resize(order, shape)  # wrapped around to fill the last ones
            for batch in batches[skipped:, :, self.rank]:
                yield [(epoch, int(index)) for index in batch]
            skipped = 0


def learning_rate(step: int, steps_per_epoch: int, config: RunConfig) -> float:
    """A cosine with warm restarts (Loshchilov and Hutter, ICLR 2017) behind a linear warm-up.

    The first cycle has `restart_epochs`, and each has twice as many as the one before. Adam's first
    steps are as large as any and on the worst gradients, hence the warm-up.
    """
    epoch = step / steps_per_epoch
    cycle = config.restart_epochs
    while epoch >= cycle:
        epoch -= cycle
        cycle *= 2
    cosine = (1 + math.cos(math.pi * epoch / cycle)) / 2
    lowest = min(config.min_learning_rate, config.learning_rate)
    rate = lowest + (config.learning_rate - lowest) * cosine
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    return rate


@torch.no_grad()
def update_ema(ema: nn.Module, weights: dict[str, Tensor], step: int, decay: float) -> None:
    """Move the averaged weights towards these."""
    decay = min(decay, (1 + step) / (10 + step))  # 0.1 at first: a short run must forget its start
    for name, average in ema.named_parameters():
        average.lerp_(weights[name], 1 - decay)


def gradient_shares(terms: dict[str, Tensor], parameters: list[Tensor]) -> dict[str, float]:
    """Each weighted term's gradient norm over the student's weights, as a share of their sum."""
    norms = {}
    for name, term in terms.items():
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        norms[name] = nn.utils.get_total_norm(gradients).item()
    total = sum(norms.values()) or 1.0
    return {f"gradient_{name}": norm / total for name, norm in norms.items()}


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """A list that a first Ctrl-C or termination signal is put into; a second one acts at once."""
    received: list[int] = []
    former = {}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        former[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()


def ignore_interrupts(worker: int) -> None:
    """Loader processes leave signals to the training process, which stops them in order.

    Ctrl-C goes to a whole process group, so each loader gets a group of its own. A SIGTERM from the
    training process still ends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


def start_processes(device: torch.device) -> None:
    """Join the other processes of torchrun, if any."""
    if PROCESSES > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def wait_for_all_processes() -> None:
    """Return when all processes of torchrun have come here; alone, at once."""
    if dist.is_initialized():
        dist.barrier()


def any_process(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds in any process, so that all stop after the same step."""
    votes = torch.tensor(float(condition), device=device)
    if dist.is_initialized():
        dist.all_reduce(votes)
    return bool(votes)


MOST_SKIPPED = 10  # steps in a row whose gradients are not finite

HELD_OUT_SIDE = 1024  # pixels; more of a held-out picture would take memory and time

# A held-out picture counts as at most so many dB: a blank one may be restored exactly, and its
# PSNR is infinite.
PSNR_CAP = 60.0


def middle_of(pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """The middle of pictures (H, W, 3), HELD_OUT_SIDE a side at most; it begins with a block."""
    height, width = pictures[0].shape[:2]
    top = max(height - HELD_OUT_SIDE, 0) // 2 // BLOCK * BLOCK
    left = max(width - HELD_OUT_SIDE, 0) // 2 // BLOCK * BLOCK
    place = (slice(top, top + HELD_OUT_SIDE), slice(left, left + HELD_OUT_SIDE))
    return tuple(picture[place].copy() for picture in pictures)


RUN_FILES = ("last.pth", "best.pth", "log.csv", "curves.png")

# Settings that are not saved with a run: they are for one start of the script.
FLAGS_OF_ONE_START = ("resume", "overwrite", "preset")


class TrainingRun:
    """One training run: the network, its averaged copy, the optimiser, and where they stand.

    The run's folder gets last.pth, which continues it to the same weights, best.pth, the averaged
    weights with the best held-out PSNR, and log.csv. `as_frame_function(network)` is the function
    of 8-bit frames that is scored on the held-out pairs; students and teachers need different ones.
    """

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        network_config: dict,
        dataset: Dataset,
        held_out: Sequence[Pair | PreparedCrop],
        as_frame_function: Callable[[nn.Module], FrameFunction],
    ) -> None:
        self.config = config
        self.network_config = network_config
        self.dataset = dataset
        self.held_out = [middle_of(pair.load()) for pair in held_out if RANK == 0]
        self.as_frame_function = as_frame_function
        self.device = pick_device(config)
        self.autocast = autocast_for(config.precision, self.device)
        self.objective = objective.to(self.device, memory_format=torch.channels_last)
        self.ema = copy.deepcopy(objective.network).eval().requires_grad_(False)
        self.trained = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.Adam(list(self.trained.values()), config.learning_rate)
        self.order = CropOrder(len(dataset), config, RANK, PROCESSES)
        self.step = 0
        self.best = -math.inf  # held-out PSNR
        self.rows: list[dict] = []  # of log.csv
        self.skipped = 0  # steps in a row
        self.parallel: nn.Module = self.objective
        if PROCESSES > 1:
            self.parallel = nn.parallel.DistributedDataParallel(self.objective)

    @property
    def total_steps(self) -> int:
        total = self.config.epochs * self.order.steps_per_epoch
        if self.config.max_steps:
            total = min(total, self.config.max_steps)
        return total

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def train(self) -> None:
        """Train to the end, or to the first interruption."""
        if not self.config.resume:
            self.clear_folder()
        with deferred_interrupts() as interrupts, self.progress_bar() as bar:
            batches = iter(self.loader())
            saved = time.monotonic()
            while not self.finished and not any_process(bool(interrupts), self.device):
                started = time.perf_counter()
                rate = learning_rate(self.step, self.order.steps_per_epoch, self.config)
                terms = self.accumulate_gradients(batches)
                norm = self.take_step(rate)
                if math.isfinite(norm):
                    update_ema(self.ema, self.objective.weights(), self.step, self.config.ema_decay)
                self.step += 1
                if RANK > 0:
                    continue
                row = self.log_row(terms, rate, norm, time.perf_counter() - started)
                if self.validation_is_due():
                    row |= self.validate()
                self.rows.append(row)
                self.show(row, bar)
                if time.monotonic() - saved > self.config.save_every:
                    self.save_last()
                    saved = time.monotonic()
            if RANK == 0:
                self.finish()
        # When one process ends, torchrun ends the others; one may still be writing its files.
        wait_for_all_processes()
        if dist.is_initialized():
            dist.destroy_process_group()

    def loader(self) -> DataLoader:
        """Batches from where the run stands."""
        workers = self.config.workers
        if workers is None:  # on few CPU threads loader processes take training's time
            workers = 2 if self.device.type != "cpu" or torch.get_num_threads() > 2 else 0
        on_device = getattr(self.dataset, "in_device_memory", False)
        if on_device:
            workers = 0  # other processes would copy what need not move
        self.order.first_step = self.step
        return DataLoader(
            self.dataset,
            batch_sampler=self.order,
            num_workers=workers,
            pin_memory=self.device.type == "cuda" and not on_device,
            worker_init_fn=ignore_interrupts,
        )

    def accumulate_gradients(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """Gradients of one step's group of batches; returns the weighted terms' means."""
        group = self.order.batches_in_step(self.step)
        log_shares = getattr(self.config, "log_gradients", 0)  # a teacher's run has no such flag
        means: dict[str, float] = dict.fromkeys(self.objective.loss.lambdas, 0.0)
        for number in range(group):
            last = number == group - 1
            batch = on_device(next(batches), self.device)
            # Several processes average their gradients after the last batch only. (One alone makes
            # nothing of this.)
            self.parallel.require_backward_grad_sync = last
            terms = self.parallel(batch, self.autocast)
            if last and log_shares and self.step % log_shares == 0:
                trained = [p for p in self.objective.network.parameters() if p.requires_grad]
                means |= gradient_shares(terms, trained)
            (sum(terms.values()) / group).backward()
            for name, term in terms.items():
                means[name] += term.item() / group
        return means

    def take_step(self, rate: float) -> float:
        """One step of Adam along the clipped gradients; returns their norm before.

        A step whose gradients are not finite is skipped: it would spoil the weights for good.
        UserError after ten in a row, with the last good state saved.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        limit = self.config.clip_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), limit))
        if math.isfinite(norm):
            self.optimiser.step()
            self.skipped = 0
        else:
            self.skipped += 1
        self.optimiser.zero_grad(set_to_none=True)
        if self.skipped >= MOST_SKIPPED:
            self.stop_at_last_good_state()
        return norm

    def stop_at_last_good_state(self) -> typing.NoReturn:
        """Save the state before the skipped steps.

        `self.step` counts all of them but the last, since `train` counts after `take_step`.
        """
        self.step -= MOST_SKIPPED - 1
        self.rows = self.rows[: self.step]
        if RANK == 0:
            self.save_last()
        wait_for_all_processes()  # a process that ends early would have the others killed
        raise UserError(
            f"step {self.step}: the gradients of {MOST_SKIPPED} steps in a row are not finite; the"
            f" state before them is in {self.config.run_dir / 'last.pth'}: go on with --resume and"
            " a lower --learning-rate or another --seed"
        )

    def log_row(self, terms: dict, rate: float, norm: float, seconds: float) -> dict:
        """A row of log.csv."""
        row = {"step": self.step, "epoch": (self.step - 1) / self.order.steps_per_epoch}
        row |= {"learning_rate": rate, "gradient_norm": norm}
        row["loss"] = sum(terms[name] for name in self.objective.loss.lambdas)
        row |= terms
        row["seconds"] = seconds
        return row

    def show(self, row: dict, bar: tqdm) -> None:
        """The terms beside the bar; on no terminal, a line at the first and at the last step."""
        shown = {name: f"{row[name]:.3g}" for name in self.objective.loss.lambdas}
        bar.set_postfix(shown, refresh=False)
        bar.update()
        if bar.disable and self.step in (1, self.total_steps):
            print(f"step {self.step} of {self.total_steps}: loss {row['loss']:.4g}", flush=True)

    def progress_bar(self) -> tqdm:
        return progress(total=self.total_steps, initial=self.step, unit="step")

    def validation_is_due(self) -> bool:
        every = self.order.steps_per_epoch * self.config.validate_every
        return self.finished or self.step % every == 0

    def validate(self) -> dict[str, float]:
        """Score the averaged weights on the held-out pairs; keep them if they are the best."""
        if not self.held_out:
            self.save_best({"psnr": math.nan, "ssim": math.nan})
            return {}
        network = copy.deepcopy(self.ema)  # since its layers may be rewritten for 8-bit frames
        means = self.score_held_out(self.as_frame_function(network))
        tqdm.write(f"step {self.step}: held out {format_scores(means)}")
        if means["psnr"] > self.best or not (self.config.run_dir / "best.pth").exists():
            self.best = means["psnr"]
            self.save_best(means)
        return {f"val_{name}": value for name, value in means.items()}

    def score_held_out(self, method: FrameFunction) -> dict[str, float]:
        """Mean scores on the held-out pairs, each PSNR of at most PSNR_CAP."""
        scores = [score(method(blurred), sharp) for blurred, sharp in self.held_out]
        for each in scores:
            each["psnr"] = min(each["psnr"], PSNR_CAP)
        return mean_scores(scores)

    def save_best(self, means: dict[str, float]) -> None:
        content = {
            "network": self.network_config,
            "params": self.ema.state_dict(),
            "step": self.step,
            "held_out": means | {"pictures": len(self.held_out)},
        }
        write_checkpoint(content, self.config.run_dir / "best.pth")

    def save_last(self) -> None:
        """Everything that continues the run to the same weights."""
        content = {
            "config": settings_to_save(self.config),
            "network": self.network_config,
            "objective": {name: p.detach() for name, p in self.trained.items()},
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "steps_per_epoch": self.order.steps_per_epoch,
            "best": self.best,
            "rows": self.rows,
        }
        write_checkpoint(content, self.config.run_dir / "last.pth")
        write_csv(self.rows, self.config.run_dir / "log.csv")

    def continue_from(self, last: dict) -> None:
        """Take up the state that `save_last` wrote.

        UserError if it is another kind of run's, or one whose epochs have another length: the
        schedule would be at another place.
        """
        now = self.order.steps_per_epoch
        then = last.get("steps_per_epoch", now)  # older runs do not say it
        remedy = "the pictures, --batch-size times accumulation times processes must be the same"
        require(then == now, f"--resume: epochs had {then} steps and would have {now}; {remedy}")
        try:
            for name, parameter in self.trained.items():  # the frozen ones are not in the file
                parameter.data.copy_(last["objective"][name])
            self.ema.load_state_dict(last["ema"])
            self.optimiser.load_state_dict(last["optimiser"])
            self.step = last["step"]
            self.best = last["best"]
            self.rows = last["rows"]
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            path = self.config.run_dir / "last.pth"
            raise UserError(
                f"{path}: does not fit this run's network and loss ({error})"
            ) from error

    def clear_folder(self) -> None:
        """Make the run's folder, and delete an earlier run's files (--overwrite allowed it)."""
        require_writable(self.config.run_dir / "last.pth")
        if RANK == 0:
            remove_run(self.config.run_dir)

    def finish(self) -> None:
        """Save where the run stands; it may have been resumed at its very end."""
        if self.finished and not (self.config.run_dir / "best.pth").exists():
            self.validate()
        self.save_last()


def settings_to_save(config: RunConfig) -> dict[str, object]:
    """A run's settings by name, as last.pth holds them."""
    settings = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name not in FLAGS_OF_ONE_START:
            settings[item.name] = as_saved(value)
    return settings


def as_saved(value: object) -> object:
    """A setting as last.pth holds it."""
    return str(value) if isinstance(value, Path) else value


def remove_run(folder: Path) -> None:
    """Delete a run's files, and nothing else that its folder holds."""
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)


def make_objective(config: TrainConfig, resumed: bool) -> Objective:
    """The student, the teacher that it learns from, and the loss between them, by train's flags."""
    weights = {name: getattr(config, f"lambda_{name}") for name in LOSS_TERMS}
    require(any(weights.values()), "--lambda-...: all are 0, which leaves nothing to learn")
    student = student_class(config.network).from_flags(config)
    if config.init and not resumed:
        source, _ = load_student(config.init)
        same = source.config == student.config
        another = f"--init {config.init}: its student is another, {source.config}"
        require(same, f'{another}; --init "" begins from scratch')
        student.load_state_dict(source.state_dict())

    with_features = weights["feature"] > 0
    comparable = student.feature_widths or not with_features
    require(comparable, f"--network {config.network}: has no features; add --lambda-feature 0")
    # The maps of a padded crop would show more of a picture than the teacher's.
    aligned = not with_features or config.image_size % student.alignment == 0
    wanted = f"--image-size {config.image_size}: with --lambda-feature, a multiple of"
    require(aligned, f"{wanted} {student.alignment}")
    teacher = None
    # With --teacher-cache even a run without teacher terms loads the teacher: the cache is checked
    # against it, and all runs of a comparison see the same crops.
    if config.teacher_checkpoint:
        asked = f"--teacher-checkpoint {config.teacher_checkpoint}"
        require(needs_teacher(weights), f"{asked}: no term compares with it; add --lambda-output 1")
        require(not with_features, f"{asked}: gives no features; add --lambda-feature 0")
        require(not config.teacher_cache, f"{asked}: --teacher-cache holds a Restormer's results")
        teacher = StudentTeacher(load_student(config.teacher_checkpoint)[0])
    elif needs_teacher(weights) or config.teacher_cache:
        widths = student.feature_widths if with_features else None
        teacher = RestormerTeacherWrapper(load_restormer(config.teacher_weights), widths)
    loss = DistillationLoss(weights, config.temperature)  # last, since it may download VGG19
    return Objective(student, teacher, loss, config.expansion)


# --- Command: train -------------------------------------------------------------------------------

RESTART = "start anew, with --overwrite instead of --resume"


def in_its_folder(command: Callable) -> Callable:
    """The command of a run, while no other process can use the run's folder."""

    @functools.wraps(command)
    def alone(config: RunConfig) -> None:
        with locked(config.run_dir) if RANK == 0 else contextlib.nullcontext():
            command(config)

    return alone


@in_its_folder
def train(config: TrainConfig) -> None:
    """Distil the teacher into a student; without a dataset, on scikit-image's pictures."""
    cached = config.teacher_cache and config.degradation == "crops"
    require(not cached, "--teacher-cache: not with --degradation crops; leave it out")
    last = read_last(config)
    torch.manual_seed(config.seed)
    dataset, held_out = training_data(config)
    device = pick_device(config)
    objective = make_objective(config, resumed=last is not None)
    start_processes(device)
    if RANK == 0 and config.preset and not config.resume:
        print(f"--preset {config.preset}: {PRESETS[config.preset].about}.")

    if config.teacher_cache:
        teacher = objective.teacher.to(device)
        autocast = autocast_for(config.precision, device)
        dataset = TeacherCache(
            config.teacher_cache, dataset, teacher, config.cache_variants, autocast
        )

    def as_frame_function(network: Student) -> FrameFunction:
        return FrameSharpener(network, device, precision=config.precision)

    shape = objective.network.config
    run = TrainingRun(config, objective, shape, dataset, held_out, as_frame_function)
    carry_out(run, last)
    if RANK == 0 and run.held_out:
        report_gain(run)


def read_last(config: RunConfig) -> dict | None:
    """What a resumed run goes on from; UserError for a run in the way, or a wrong crop size."""
    size = config.image_size
    require(size % 16 == 0, f"--image-size {size}: must be a multiple of 16")
    contradiction = "--resume, --overwrite: one goes on, the other starts anew"
    require(not (config.resume and config.overwrite), contradiction)
    if config.resume:
        return read_checkpoint(config.run_dir / "last.pth", RESTART)
    kept = any((config.run_dir / name).exists() for name in RUN_FILES)  # none is lost unasked
    remedy = "add --resume or --overwrite, or name another --run-dir"
    require(config.overwrite or not kept, f"{config.run_dir} holds a run already: {remedy}")
    return None


def training_data(config: RunConfig) -> tuple[Dataset, Sequence[Pair | PreparedCrop]]:
    """(the crops to train on, what is held out), as a run's flags ask for them."""
    if config.degradation == "crops":
        require(config.data_root, "--degradation crops: name their folder with --data-root")
        folder = split_folder(config.data_root, "train")
        device = pick_device(config) if config.cache else None
        prepared = PreparedCrops(folder, config.image_size, config.seed, device)
        return prepared, prepared.leave_out(config.validation_fraction)
    training, held_out = training_pairs(config)
    return training_crops(config, training), held_out


def training_crops(config: RunConfig, pairs: list[Pair]) -> GoProSharpeningDataset:
    """The crops of these pairs, as a run's flags ask for them."""
    return GoProSharpeningDataset(
        pairs,
        config.image_size,
        config.blur_probability,
        config.seed,
        config.cache,
        config.degradation,
    )


def carry_out(run: TrainingRun, last: dict | None) -> None:
    """Train, from the state of a resumed run if there is one, and draw the curves.

    Ends as an interrupted command does if the run is not finished.
    """
    if last:
        run.continue_from(last)
    if RANK == 0:
        pictures = f"{len(run.dataset)} crops an epoch, {len(run.held_out)} pictures held out"
        if not run.held_out:
            pictures += " (--validation-fraction), so that the last weights count as the best"
        where = f"results in {run.config.run_dir}"
        print(f"{pictures}; {run.total_steps} steps; {where}", flush=True)
    run.train()
    if RANK == 0:
        plot_curves(run)
    if not run.finished:
        if RANK == 0:
            remedy = f"continue with --resume --run-dir {run.config.run_dir}"
            print(f"stopped after step {run.step}; {remedy}")
        raise KeyboardInterrupt


def report_gain(run: TrainingRun) -> None:
    """What the student gains on the held-out pictures, and where a shipped one stood before."""
    best = load_student(run.config.run_dir / "best.pth")[1]["held_out"]
    of_input = run.score_held_out(lambda frame: frame)
    seconds = statistics.median(row["seconds"] for row in run.rows)
    print(f"{run.step} steps, {1000 * seconds:.0f} ms each (median)")
    metrics = " / ".join(METRICS).upper()
    held_out = f"{len(run.held_out)} held-out pictures (each at most {PSNR_CAP:g} dB)"
    print(f"{held_out}, {run.config.run_dir / 'best.pth'}, {metrics}")
    print(f"blurred:   {format_scores(of_input)}")
    if run.config.init in SHIPPED:
        began = run.score_held_out(load_sharpener(run.config.init))
        print(f"{run.config.init}'s:   {format_scores(began)}")
    print(f"sharpened: {format_scores(best)}")


# ==================================================================================================
# The story ends here. What follows is the workshop: the same things fast, and for people to use.
# ==================================================================================================

# --- Teacher cache: the teacher's results, computed once ------------------------------------------


class TeacherCache(Dataset):
    """Crops like `GoProSharpeningDataset`'s, with what the teacher made of the whole picture.

    A step with the teacher costs several without. So the teacher runs once over each picture, in
    `variants` flips and degradations (as often over one that --balance repeats). A result is a file
    of half-precision (H, W, C) tensors, mapped into memory; crops start where the teacher's
    coarsest feature grid does.

    UserError for the cache of another teacher or of other data.
    """

    def __init__(
        self,
        folder: Path,
        dataset: GoProSharpeningDataset,
        teacher: RestormerTeacherWrapper,
        variants: int,
        autocast: torch.autocast,
    ) -> None:
        self.folder = folder
        self.dataset = dataset
        self.variants = variants
        self.alignment = teacher.alignment
        size = dataset.image_size
        fits = size % self.alignment == 0
        require(fits, f"--image-size {size}: the cache needs a multiple of {self.alignment}")

        key = self.fingerprint(teacher, autocast)
        key_file = folder / "key"  # it is written when all other files are
        if not key_file.exists():
            self.begin(key)
            self.build(teacher, autocast)
            wait_for_all_processes()
            if RANK == 0:
                write_text(key, key_file)
                (folder / "key.unfinished").unlink(missing_ok=True)
            wait_for_all_processes()
        mismatch = f"--teacher-cache {folder} is another teacher's or other data's"
        require(key_file.read_text() == key, f"{mismatch}; remove it or name another")

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self, teacher: RestormerTeacherWrapper, autocast: torch.autocast) -> str:
        """A hash of all that the files depend on."""
        with autocast:
            device_type = next(teacher.parameters()).device.type
            precision = "float32"
            if torch.is_autocast_enabled(device_type):
                precision = str(torch.get_autocast_dtype(device_type))
        settings = (
            self.variants,
            self.dataset.image_size,
            self.dataset.degradation,
            self.dataset.blur_probability,
            precision,
        )
        digest = hashlib.sha256(repr(settings).encode())
        for tensor in teacher.restormer.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        for pair in self.dataset.pairs:
            digest.update(pair.sharp.read_bytes())
            digest.update(repr(pair.degradation).encode())
            if pair.blurred:
                digest.update(pair.blurred.read_bytes())
        # What the degradations do is seen on a small picture: the mixture may have changed.
        noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
        for item in self.items():
            digest.update(self.dataset.example([noise, noise], item)["blurred"].tobytes())
        return digest.hexdigest()

    def items(self) -> list[tuple[int, int]]:
        """(variant, index) of every file; runs of several seeds share them."""
        return list(itertools.product(range(self.variants), range(len(self.dataset.pairs))))

    def file(self, variant: int, index: int) -> Path:
        return self.folder / f"{index:06}_{variant}.pt"

    def begin(self, key: str) -> None:
        """Keep what an interrupted build of the same key has written, and nothing else."""
        begun = self.folder / "key.unfinished"
        if RANK == 0 and not (begun.exists() and begun.read_text() == key):
            for item in self.items():
                self.file(*item).unlink(missing_ok=True)
            write_text(key, begun)
        wait_for_all_processes()

    def build(self, teacher: RestormerTeacherWrapper, autocast: torch.autocast) -> None:
        """Write every file that is missing; processes that train together share them out."""
        device = next(teacher.parameters()).device
        missing = [item for item in self.items() if not self.file(*item).exists()]
        wait_for_all_processes()  # before one of them writes what others would find
        own = missing[RANK::PROCESSES]
        for variant, index in progress(own, "teacher cache"):
            example = self.dataset.example(self.dataset.images(index), (variant, index))
            batch = on_device(default_collate([example]), device)
            batch = {name: pad_to_multiple(t, self.alignment) for name, t in batch.items()}
            with autocast:
                batch["teacher_output"] = teacher(batch["blurred"])
                batch |= teacher.tapped
            maps = {name: t[0].permute(1, 2, 0).half().contiguous() for name, t in batch.items()}
            content = {name: t.cpu() for name, t in maps.items()}
            write_checkpoint(content, self.file(variant, index))

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        """One crop, as float16: {"blurred", "sharp", "teacher_output"} (size, size, 3), taps."""
        epoch, index = item
        size = self.dataset.image_size
        draw = generator((self.dataset.seed, epoch, index), "cached crop")
        file = self.file(int(draw.integers(self.variants)), index)
        try:
            maps = torch.load(file, mmap=True, weights_only=True)
            height, width = maps["sharp"].shape[:2]
            top = self.alignment * draw.integers((height - size) // self.alignment + 1)
            left = self.alignment * draw.integers((width - size) // self.alignment + 1)
            crop = {}
            for name, grid in maps.items():
                step = height // len(grid)  # pixels a position of this map stands for
                rows = slice(top // step, (top + size) // step)
                columns = slice(left // step, (left + size) // step)
                crop[name] = grid[rows, columns]
            return crop
        except Exception as error:  # whatever a damaged archive happens to cause
            remedy = f"remove --teacher-cache {self.folder} to build it anew"
            raise UserError(f"{file}: damaged ({type(error).__name__}); {remedy}") from error


# --- Frames: a student between 8-bit frames -------------------------------------------------------


class FrameNetwork(nn.Module):
    """A student between 8-bit frames (B, H, W, 3) whose sides are multiples of its alignment.

    The picture is folded without being moved. Pixels of 8-bit RGB lie in memory as

        R G B R G B R G B R G B ...

    so r neighbours of a row are a run of 3r numbers, and a frame (H, W, 3) is at no cost a map
    (H, W/r) of 3r channels. The first layer reads r rows of runs where it read one row of folds:
    its kernel is r times as high, and it goes down by r rows a step. A last layer of 1x1 is cut
    into r, one for each row of a fold; a 3x3 one stays whole, and its result is cut. What comes out
    is added to the rows of the frame. Folding and unfolding by pixel_unshuffle and pixel_shuffle
    would take a quarter more time.
    """

    def __init__(self, student: Student, strength: float = 1.0) -> None:
        super().__init__()
        self.student = copy.deepcopy(student)
        self.stride = student.stem_stride
        last = self.student.output
        self.student.output = nn.Identity()
        self.read_runs(self.student.first_layer)
        self.outputs = self.write_runs(last, 255 * strength)

    def read_runs(self, layer: nn.Conv2d) -> None:
        """Change the first layer, which reads folds in [0, 1], to read runs of 8-bit numbers.

        `pixel_unshuffle` orders the channels of a fold by colour, row and column.
        """
        around = layer.kernel_size[0] // 2  # positions on each side that the layer sees
        side = 2 * around + 1
        shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        plain = shape == ((side, side), (1, 1), (around, around), (1, 1))
        wanted = "a student's first layer must be 1x1, or 3x3 padded by 1, without stride"
        require(plain and side <= 3, f"{wanted} or dilation")
        pattern = "out (color row column) y x -> out (column color) (y row) x"
        kernel = rearrange(layer.weight.data, pattern, color=3, row=self.stride)
        layer.weight.data = kernel / 255
        layer.stride = (self.stride, 1)
        layer.padding = (around * self.stride, around)

    def keep_grey_in_bf16(self) -> None:
        """Round the kernels of colour differences so that those of a grey pixel stay zero.

        bf16 rounds each weight for itself, to 8 bits: they no longer add up to zero, grey seems to
        have a colour, and comes back up to 4 levels apart. As multiples of what the last of 8 bits
        is worth in the larger of red and blue they are held exactly; green becomes minus their sum.

        A number m * 2^e with m in [0.5, 1), as `frexp` gives it, has a last bit of 2^(e - 8). In
        blue - luma and in red - luma the two have opposite signs, so green is smaller than the
        larger of them, and as a multiple of the same 2^(e - 8) it needs no more bits.
        """
        layer = self.student.first_layer
        pattern = "out (column color) y x -> color out column y x"
        red, green, blue = rearrange(layer.weight.data, pattern, color=3)
        largest = torch.maximum(red.abs(), blue.abs())
        step = 2.0 ** (torch.frexp(largest).exponent - 8)
        red_rounded, blue_rounded = (torch.round(each / step) * step for each in (red, blue))
        is_difference = (red + green + blue).abs() < 1e-3 * largest
        rounded = torch.stack([red_rounded, -red_rounded - blue_rounded, blue_rounded])
        kernel = torch.where(is_difference, rounded, torch.stack([red, green, blue]))
        layer.weight.data = rearrange(kernel, "color out column y x -> out (column color) y x")

    def write_runs(self, layer: nn.Conv2d, scale: float) -> nn.ModuleList:
        """The last layer, in 8-bit units, as one layer for each row of a fold.

        A 3x3 layer stays whole and its result is cut: several layers would each read all maps.
        """
        pattern = "(color row column) ... -> (row column color) ..."
        weight = scale * rearrange(layer.weight.data, pattern, color=3, row=self.stride)
        bias = scale * rearrange(layer.bias.data, pattern, color=3, row=self.stride)
        parts = self.stride if layer.kernel_size == (1, 1) else 1
        layers = nn.ModuleList()
        for part_weight, part_bias in zip(weight.chunk(parts), bias.chunk(parts), strict=True):
            part = copy.deepcopy(layer)
            part.weight.data = part_weight
            part.bias.data = part_bias
            layers.append(part)
        return layers

    def forward(self, frames: Tensor) -> Tensor:
        dtype = self.outputs[0].weight.dtype
        runs = frames.to(dtype).flatten(2).unflatten(2, (-1, 3 * self.stride))  # (B, H, W/r, 3r)
        x = self.student.features(runs.permute(0, 3, 1, 2)).last  # (B, C, H/r, W/r)

        corrections = [layer(x).permute(0, 2, 3, 1) for layer in self.outputs]
        if len(corrections) == 1:
            corrections = corrections[0].chunk(self.stride, dim=3)
        # One for each row of a fold now: r times (B, H/r, W/r, 3r), which flattens to (.., 3 W).
        rows = frames.flatten(2).unflatten(1, (-1, self.stride))  # (B, H/r, r, 3 W)
        restored = []
        for number, correction in enumerate(corrections):
            # Rounded before it is added: bf16 has all whole numbers up to 256, but no 100.25.
            row = rows[:, :, number] + correction.flatten(2).round()
            restored.append(row.clamp_(0, 255).to(torch.uint8))
        return torch.stack(restored, dim=2).flatten(1, 2).unflatten(2, (-1, 3))

    def example(self) -> Tensor:
        """Frames to trace it with."""
        side = self.student.alignment
        return torch.zeros(1, side, side, 3, dtype=torch.uint8)


# --- Engines: what runs a network on arrays -------------------------------------------------------

Engine = Callable[[np.ndarray], np.ndarray]  # uint8 frames (B, H, W, 3) to such frames


class TorchEngine:
    """PyTorch as it is, or its compiler.

    Not by the compiler's mode that records CUDA graphs: PyTorch before 2.14 ties them to the thread
    that made them, and frames of clips and calls are sharpened by another.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, precision: torch.dtype, compiled: bool
    ) -> None:
        self.device = device
        self.network = network.to(device, precision, memory_format=torch.channels_last).eval()
        if compiled:
            # Networks and sizes share this limit; past the default of 8, plain PyTorch would run.
            torch._dynamo.config.recompile_limit = 64
            self.network = torch.compile(self.network, dynamic=False)

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(frames)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return self.network(tensor.to(self.device, non_blocking=True)).cpu().numpy()


def require_compiler() -> None:
    """UserError unless there is the C++ compiler that torch.compile calls on a CPU."""
    usual = {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or usual
    first_word = compiler.split()[0]  # of "ccache g++"; a path may have a space in it
    found = shutil.which(compiler) or shutil.which(first_word)
    require(found, f"--backend compile: needs a C++ compiler; install {compiler}")


def require_backend(backend: str, device: torch.device) -> None:
    """UserError unless a backend can compute on this device, with what is installed."""
    require_packages(BACKENDS[backend], f"--backend {backend}")
    on_cpu = device.type == "cpu"
    if backend == "compile" and on_cpu:
        require_compiler()
    elsewhere = backend in ("torch", "compile")
    require(on_cpu or elsewhere, f"--backend {backend}: computes on the CPU; add --device cpu")


class OpenVinoEngine:
    """OpenVINO on the CPU, compiled for each size of input; in 8 bits on request."""

    def __init__(self, network: nn.Module, precision: torch.dtype) -> None:
        self.model = openvino_model(network)
        self.hints = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.compiled = functools.lru_cache(8)(self.compile)

    def compile(self, shape: tuple[int, ...]):
        model = self.model.clone()
        model.reshape(shape)
        return openvino_core().compile_model(model, "CPU", self.hints)

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        return self.compiled(frames.shape)([np.ascontiguousarray(frames)])[0]


@functools.cache
def openvino_core():
    """The process's one Core: of two, the one destroyed last restores a signal stack that is
    gone, and the process crashes."""
    return importlib.import_module("openvino").Core()


def openvino_model(network: FrameNetwork):
    """The `openvino.Model` of a network for frames of any aligned size."""
    openvino = importlib.import_module("openvino")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: that it is deprecated, and of constants
        return openvino.convert_model(
            network, example_input=network.example(), input=[[-1, -1, -1, 3]]
        )


def left_in_float(student: Student) -> list[str]:
    """Patterns for the names of the operations that need more than 8 bits."""
    # Gates are made of means, and how grey a place is of the squares of colours. (A gate's last
    # values, from 0 to 1, are in 8 bits, like what they multiply.)
    patterns = [r".*\.se[./].*", r".*\.keep_grey[./].*"]
    if getattr(student, "luma", False):
        # The planes' mean goes up to 2 and most of their differences to 0.1, so that one step for
        # all is too long; and a call is corrected by few levels, which steps of 0.8 would spoil.
        # "call-fast" gains 0.51 dB so, and 0.38 if these layers are in 8 bits, too.
        patterns += [r".*\.encoder\.0\.layers\.0/.*", r".*\.correction/.*", r".*\.outputs\..*"]
    return patterns


def quantized(model, student: Student):
    """A student's OpenVINO model in int8, calibrated on scikit-image's pictures at x2."""
    nncf = importlib.import_module("nncf")
    nncf.set_log_level(40)  # errors only
    samples = []
    for pair in embedded_pairs():
        sharp = ImageOps.fit(even_sized(open_picture(pair.sharp)), (256, 256))
        samples.append(np.array(degrade(sharp, PROTOCOLS["x2"]))[None])

    # By default a range ends at the pictures' mean extremes, and black and white are cut off, which
    # costs 0.1 to 0.2 dB.
    estimators = importlib.import_module("nncf.quantization.range_estimator")
    extremes = estimators.RangeEstimatorParametersSet.MINMAX
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars
        return nncf.quantize(
            model,
            nncf.Dataset(samples),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(
                types=["Add"],  # sums would take longer in int8
                patterns=left_in_float(student),
                validate=False,  # a student need not have all of them
            ),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                activations_range_estimator_params=extremes
            ),
        )


def make_engine(
    student: Student, device: torch.device, precision: torch.dtype, backend: str, strength: float
) -> Engine:
    """What a backend makes of a student's FrameNetwork."""
    require_backend(backend, device)
    network = FrameNetwork(student, strength).eval()
    if precision == torch.bfloat16 and getattr(student, "luma", False):
        network.keep_grey_in_bf16()
    if backend in ("torch", "compile"):
        return TorchEngine(network, device, precision, compiled=backend == "compile")

    engine = OpenVinoEngine(network, precision)
    if backend == "openvino-int8":
        engine.model = quantized(engine.model, student)
    return engine


# --- Tiles: large frames in pieces that fit together again ----------------------------------------


@dataclass(frozen=True)
class Span:
    """One tile along one side of a frame, in pixels."""

    taken: slice  # what it sees of the padded frame
    given: slice  # what it contributes to the result
    inner: slice  # the same pixels, counted from the tile's start


def round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def cut_side(length: int, phase: int = 0, *, tile: int, overlap: int, alignment: int) -> list[Span]:
    """How equal tiles of about `tile` pixels cover one side of a frame; with 0, one tile does.

    The side is first continued by MARGIN at both ends, and by `phase` more at the first end. A tile
    starts at a multiple of `alignment`, and shares at least `overlap` pixels with the next. Where
    two tiles share pixels, the first gives the first half of them and the second the other half, so
    that neither tile's own edge is seen.

    With a MARGIN of 8, 200 pixels are continued to 224 (8 before, 16 after, for an alignment of
    32). Tiles of 128 that share 32 start at 0 and 96: the first gives pixels 0 to 104, from its
    position 8 on; the second pixels 104 to 200, from its position 16 on.
    """
    before = MARGIN + phase
    after = before + length
    padded = round_up(after + MARGIN, alignment)
    starts, size = tile_starts(padded, tile, overlap, alignment)
    middles = [(left + size + right) // 2 for left, right in itertools.pairwise(starts)]
    borders = [before, *(min(max(m, before), after) for m in middles), after]
    spans = []
    for start, (begin, end) in zip(starts, itertools.pairwise(borders), strict=True):
        if begin == end:  # a small tile may lie in what the side was continued by
            continue
        taken = slice(start, start + size)
        given = slice(begin - before, end - before)
        spans.append(Span(taken, given, slice(begin - start, end - start)))
    return spans


def tile_starts(padded: int, tile: int, overlap: int, alignment: int) -> tuple[list[int], int]:
    """(where the tiles of a side begin, their size), all multiples of `alignment`."""
    if tile == 0:
        return [0], padded
    tile = round_up(tile, alignment)
    overlap = round_up(overlap, alignment)
    count = round((padded - overlap) / max(tile - overlap, alignment))
    if count <= 1:
        return [0], padded
    # `count` tiles that each bring `size - overlap` new pixels reach the end; the last may overlap
    # more, because it ends with the side.
    size = round_up((padded - overlap) / count + overlap, alignment)
    starts = {min(number * (size - overlap), padded - size) for number in range(count)}
    return sorted(starts), size


# --- Sharpeners: a student on frames of any size --------------------------------------------------


def grid_phase(frame: np.ndarray) -> tuple[int, int]:
    """(row, column), 0 or 1 each, at which the pattern of a frame enlarged by 2 begins.

    Enlarging by 2 makes two pixels of one, and two that come from one differ less than neighbours
    that do not: their squared differences are smaller by a third or more, on every picture that was
    tried. On other photographs the two differ by less than a tenth, and 0 is returned; a drawing of
    few edges may have any phase, and is not harmed by it. A student has learned from crops that
    begin with the pattern, and gains half as much on a frame that does not.
    """
    green = frame[..., 1]
    phases = []
    for lines in (green[:, ::8], green[::8].T):  # every 8th column or row says enough
        changes = np.square(np.diff(lines.astype(np.int32), axis=0))
        phase = 0
        if len(changes) > 1:
            from_even = changes[0::2].mean()  # to the line after; small if the two are one pixel's
            from_odd = changes[1::2].mean()
            phase = int(from_even > 1.25 * from_odd)
        phases.append(phase)
    return phases[0], phases[1]


class FrameSharpener:
    """A student applied to 8-bit RGB frames, uint8 (H, W, 3) of any size; returns frames alike.

    `strength` scales the correction. Several threads may share one; they take turns.
    """

    def __init__(
        self,
        student: Student,
        device: torch.device | str = "cpu",
        tile: int = InferenceConfig.tile,
        overlap: int | None = None,
        strength: float = 1.0,
        precision: str = "auto",
        backend: str = "torch",
    ) -> None:
        device = torch.device(device)
        if overlap is None:
            overlap = min(2 * student.reach, tile // 2)  # each sees `reach` pixels beyond the seam
        fits = not tile or overlap < tile
        require(fits, f"--tile {tile} --overlap {overlap}: tiles must exceed their overlap")
        dtype = pick_precision(precision, device)
        self.engine = make_engine(student, device, dtype, backend, strength)
        self.spans = functools.lru_cache(
            functools.partial(cut_side, tile=tile, overlap=overlap, alignment=student.alignment)
        )
        self.lock = threading.Lock()  # engines keep buffers of their own

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        self.check(frame)
        result = np.empty_like(frame)
        padded, tiles = self.cut(frame)
        with self.lock:
            for row, column in tiles:
                restored = self.engine(padded[None, row.taken, column.taken])[0]
                result[row.given, column.given] = restored[row.inner, column.inner]
        return result

    @staticmethod
    def check(frame: np.ndarray) -> None:
        """UserError for anything but a frame."""
        wanted = "a frame is a NumPy array, uint8, of shape (height, width, 3), RGB"
        require(isinstance(frame, np.ndarray), f"{wanted}, not {type(frame).__name__}")
        is_frame = frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
        require(is_frame and frame.size, f"{wanted}, not {frame.dtype} {frame.shape}")

    def cut(self, frame: np.ndarray) -> tuple[np.ndarray, list[tuple[Span, Span]]]:
        """(the frame continued by its mirror image to where its tiles end, each tile's spans).

        Continued, a frame is as good at its borders as inside. The mirror image begins with the
        last pixel, which keeps the pattern of a frame enlarged by 2.
        """
        sides = []
        padding = []
        for length, phase in zip(frame.shape[:2], grid_phase(frame), strict=True):
            spans = self.spans(length, phase)
            before = MARGIN + phase
            sides.append(spans)
            padding.append((before, spans[-1].taken.stop - length - before))
        padded = np.pad(frame, (*padding, (0, 0)), "symmetric")
        return padded, list(itertools.product(*sides))


class SteadySharpener:
    """Sharpens the frames of one clip or call; a frame that is the last one again costs nothing.

    A shared screen often stands still, and an encoder then repeats it to the last bit. (Parts that
    stand still cost what the others do: gates see so far, 500 pixels and more, that hardly a pixel
    of a frame would be left whose result is known to be the same.)
    """

    def __init__(self, sharpener: FrameFunction) -> None:
        self.sharpener = sharpener
        self.frame: np.ndarray | None = None  # the last one, and what became of it
        self.result: np.ndarray | None = None
        self.frames = 0  # so far
        self.computed = 0  # of these

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) to uint8 (H, W, 3); the caller must not write into either."""
        self.frames += 1
        if self.frame is None or not np.array_equal(frame, self.frame):
            self.result = self.sharpener(frame)
            self.frame = frame
            self.computed += 1
        return self.result


def load_sharpener(name: str | Path = FOR_PICTURES, **options) -> FrameSharpener:
    """A FrameSharpener of a shipped student ("quality", "call", ...) or a checkpoint file.

    Options are FrameSharpener's: `backend="openvino"`, `strength=0.5` and so on.
    """
    student, _ = load_student(name)
    return FrameSharpener(student, **options)


def chosen_checkpoint(config: InferenceConfig, for_clips: bool) -> str:
    """--checkpoint; "auto" is the student for clips or the one for pictures."""
    if config.checkpoint != "auto":
        return config.checkpoint
    return FOR_CLIPS if for_clips else FOR_PICTURES


def sharpener_of(config: SharpenConfig | EvalConfig, checkpoint: str) -> FrameSharpener:
    """A student as the flags say, as a function of frames."""
    return load_sharpener(
        checkpoint,
        device=pick_device(config),
        tile=config.tile,
        overlap=config.overlap,
        strength=config.strength,
        precision=config.precision,
        backend=config.backend,
    )


def sharpeners_for(
    config: SharpenConfig | EvalConfig, uses: set[bool]
) -> dict[bool, FrameSharpener]:
    """{whether it is for clips: the student of --checkpoint}; one for both is loaded once."""
    by_name: dict[str, FrameSharpener] = {}
    chosen = {}
    for for_clips in uses:
        name = chosen_checkpoint(config, for_clips)
        if name not in by_name:
            by_name[name] = sharpener_of(config, name)
        chosen[for_clips] = by_name[name]
    return chosen


# --- Clips: what real encoders do to frames -------------------------------------------------------

# Whatever FFmpeg reads may be in them.
CLIP_SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".3gp", ".flv", ".wmv",
    ".asf", ".mpg", ".mpeg", ".vob", ".ts", ".mts", ".m2ts",
)  # fmt: skip
FRAMES_A_SECOND = 25
ALL_FRAMES = slice(None)
FIRST_SCORED = 2  # the third frame: a stream's first ones are better than those that follow
SHOWN_FRAMES = 60  # of a clip, in a report
SCORED_BYTES = 2**30  # of a clip's frames, which `eval` holds three times: 15 seconds of 1280x720


@dataclass(frozen=True)
class Clip:
    """A clip: a video file, or a folder of pictures with numbers for names (000001.png, ...).

    Its kind is what its name begins with: "talk" for talk_03.mp4.
    """

    path: Path
    received: Path | None = None  # the same clip as it arrived, where the user has it
    name: str = ""  # in tables, where the file's own would not do

    @property
    def title(self) -> str:
        own = self.path.name if self.path.is_dir() else self.path.stem
        return self.name or own

    @property
    def kind(self) -> str:
        return self.path.stem.split("_")[0]

    def frames(self, wanted: slice = ALL_FRAMES) -> list[np.ndarray]:
        """8-bit RGB (H, W, 3), as PyAV gives them; UserError if it cannot be read."""
        return clip_frames(self.path, wanted)

    def count(self) -> int:
        """How many frames it has."""
        return frame_count(self.path)


@contextlib.contextmanager
def reading_clip(path: Path) -> Iterator[None]:
    """PyAV's errors in here say that this clip cannot be read."""
    try:
        yield
    except (OSError, LookupError, ValueError) as error:  # they are of these kinds
        raise UserError(f"{path}: not a readable clip ({error})") from error


@functools.cache
def frame_count(path: Path) -> int:
    """The frames of a video file, whose packets are counted, or of a folder of pictures.

    What an edit list hides, as a telephone's trimming does, is not decoded and not counted.
    """
    if path.is_dir():
        return len(numbered_pictures(path))
    av = importlib.import_module("av")
    with reading_clip(path), av.open(path) as container:
        shown = (p for p in container.demux(video=0) if p.size > 0 and not p.is_discard)
        return sum(1 for _ in shown)


def clip_frame_size(path: Path) -> Size:
    """(width, height) by the file's header, perhaps of a turned clip; UserError if unreadable.

    Nothing is decoded: what FFmpeg's threads belong to must not be freed in a process that is
    forked later, which would wait for them for ever.
    """
    if path.is_dir():
        return open_picture(numbered_pictures(path)[0]).size
    av = importlib.import_module("av")
    with reading_clip(path), av.open(path) as container:
        video = container.streams.video[0]
        require(video.width > 0, f"{path}: not a readable clip (it does not say its size)")
        return video.width, video.height


def clip_frames(path: Path, wanted: slice = ALL_FRAMES) -> list[np.ndarray]:
    """Frames of a video file or of a folder of numbered pictures.

    UserError for pictures of several sizes, and where there is no such frame.
    """
    if path.is_dir():
        frames = [frame_array(open_picture(file)) for file in numbered_pictures(path)[wanted]]
    else:
        frames = decoded_frames(path, path, wanted)
    require(frames, f"{path}: no frame could be read; is it a whole clip?")
    sizes = {frame.shape for frame in frames}
    require(len(sizes) == 1, f"{path}: its frames have several sizes; a clip has one")
    return frames


# Three packets of a transport stream, of 188 or 192 bytes each, which begin with G.
TRANSPORT_STREAM = re.compile(rb"G(.{187}G){2}|G(.{191}G){2}", re.DOTALL)


def is_clip(path: Path) -> bool:
    """Whether a file is a clip by its ending; programs in TypeScript end in .ts, too."""
    suffix = path.suffix.lower()
    if suffix == ".ts":
        with contextlib.suppress(OSError), path.open("rb") as file:  # who opens it will name it
            return bool(TRANSPORT_STREAM.search(file.read(600)))
    return suffix in CLIP_SUFFIXES


def numbered_pictures(folder: Path) -> list[Path]:
    """The pictures in a folder whose names are numbers, in their order."""
    files = [path for path in folder.iterdir() if path.stem.isdecimal()]
    files = [path for path in files if path.suffix.lower() in picture_formats()]
    return sorted(files, key=lambda path: int(path.stem))


def list_clips(folder: Path) -> list[Path]:
    """The video files in a folder, and the folders in it that hold numbered pictures."""
    found = set()
    for path in list_files(folder):
        if is_clip(path):
            found.add(path)
        elif path.parent not in found and holds_frames(path.parent):
            found.add(path.parent)
    return sorted(found)


def list_sharp_clips(folder: Path) -> list[Path]:
    """The clips in a folder that may count as sharp.

    What `sharpen` wrote may not. Of encoded pairs (`low/`, `sharp/`) the sharp side may.
    """
    has_sides = all((folder / side).is_dir() for side in ("low", "sharp"))
    return without_own_outputs(list_clips(folder / "sharp" if has_sides else folder))


@functools.cache
def holds_frames(folder: Path) -> bool:
    """Whether a folder's pictures are a clip: two or more, numbered without a gap.

    The names of photographs may be numbers, too.
    """
    numbers = [int(path.stem) for path in numbered_pictures(folder)]
    return len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1


def find_clips(folder: Path) -> list[Clip]:
    """The sharp clips in a folder; UserError if there are none."""
    paths = list_sharp_clips(folder)
    require(paths, f"{folder}: no clips in this folder; call protocols need sharp ones")
    stems = collections.Counter(path.stem for path in paths)
    clips = []
    for path in paths:
        is_unique = stems[path.stem] == 1
        clips.append(Clip(path, name="" if is_unique else str(path.relative_to(folder))))
    return clips


def find_encoded_pairs(folder: Path) -> list[Clip]:
    """The clips in folder/sharp, each with the one of its name in folder/low.

    UserError for a clip without partner; `encoded_pair` compares their frames.
    """
    sides: dict[str, dict[str, Path]] = {}
    for side in ("low", "sharp"):
        place = folder / side
        require(place.is_dir(), f"{place}: no such folder; encoded pairs are in low/ and sharp/")
        sides[side] = {}
        for path in without_own_outputs(list_clips(place)):
            key = path.relative_to(place)
            if path.is_file():  # a folder's name has no ending
                key = key.with_suffix("")
            other = sides[side].setdefault(str(key), path)
            require(other == path, f"{other}, {path}: two clips of one name; rename one")
    alone = sorted(sides["low"].keys() ^ sides["sharp"].keys())
    if alone:
        have, lack = ("low", "sharp") if alone[0] in sides["low"] else ("sharp", "low")
        path = sides[have][alone[0]]
        raise UserError(f"{path}: has no partner in {folder / lack}; add or remove it")
    require(sides["sharp"], f"{folder / 'sharp'}: no clips in this folder")
    pairs = []
    for key, path in sorted(sides["sharp"].items()):
        name = "" if key == "." else key  # it is the folder itself that holds the frames
        pairs.append(Clip(path, sides["low"][key], name))
    return pairs


def encoded_pair(
    clip: Clip, wanted: slice = ALL_FRAMES
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(received frames, sharp frames), matched in order; UserError if they do not match."""
    count = frame_count(clip.received)
    counts = f"{clip.received} has {count} frames, {clip.path} has {clip.count()}"
    require(count == clip.count(), f"{counts}; cut them to the same frames")
    received = clip_frames(clip.received, wanted)
    sharp = clip.frames(wanted)
    decoded = f"{len(received)} frames of {clip.received}, {len(sharp)} of {clip.path} can be read"
    require(len(received) == len(sharp), f"{decoded}; does each begin with a key frame?")
    sizes = (
        f"{clip.received} has frames of {pixels_of(received)}, {clip.path} of {pixels_of(sharp)}"
    )
    same = received[0].shape == sharp[0].shape
    require(same, f"{sizes} pixels; enlarge the first as your call does")
    return received, sharp


def pixels_of(frames: list[np.ndarray]) -> str:
    """The size of a clip's frames in words."""
    height, width = frames[0].shape[:2]
    return f"{width}x{height}"


def decoded_frames(
    file: Path | io.BytesIO, path: Path, wanted: slice = ALL_FRAMES
) -> list[np.ndarray]:
    """Frames of a video file; `path` is what an error names."""
    av = importlib.import_module("av")
    with reading_clip(path), av.open(file) as container:
        decoded = container.decode(video=0)
        frames = itertools.islice(decoded, wanted.start, wanted.stop, wanted.step)
        return [upright(frame) for frame in frames]


def small_size(width: int, height: int, factor: float) -> Size:
    """1/factor of both sides, even as encoders want them, and at least 16."""
    small_width = max(2 * round(width / factor / 2), 16)
    small_height = max(2 * round(height / factor / 2), 16)
    return small_width, small_height


def resized(frame: np.ndarray, size: Size) -> np.ndarray:
    """A frame at (width, height), bicubic."""
    height, width = frame.shape[:2]
    if (width, height) == size:
        return frame
    return np.array(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))


def window_sized(frame: np.ndarray, size: Size) -> np.ndarray:
    """`resized`, to within 2 levels where it enlarges, in a quarter of the time.

    640x360 to 1280x720 takes 2.4 instead of 10.4 ms. With `antialias` the kernel is Pillow's.
    """
    height, width = frame.shape[:2]
    if (width, height) == size:
        return frame
    planes = torch.from_numpy(frame).permute(2, 0, 1)[None]
    planes = F.interpolate(planes, size[::-1], mode="bicubic", antialias=True)
    return planes[0].permute(1, 2, 0).contiguous().numpy()


def clip_size(text: str, name: str = "--size") -> Size | None:
    """(width, height) of --size 1280x720; UserError for another form."""
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    require(match, f"{name} {text}: write it as WIDTHxHEIGHT, such as 1280x720")
    size = (int(match[1]), int(match[2]))
    require(min(size) >= 16, f"{name} {text}: at least 16x16")
    return size


@contextlib.contextmanager
def same_scheduling() -> Iterator[None]:
    """Schedule this process afterwards as before.

    SVT-AV1 makes it a real-time one where it may (as root): other programs get no time beside it,
    and a browser that it starts keeps nothing in its storage.
    """
    if not hasattr(os, "sched_getscheduler"):  # as on Windows and macOS
        yield
        return
    policy = os.sched_getscheduler(0)
    parameters = os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


@same_scheduling()
def encoded(frames: list[np.ndarray], call: Call) -> tuple[io.BytesIO, float]:
    """(a stream as a live encoder makes it, its kilobits a second) of frames with even sides.

    UserError if the encoder refuses, as SVT-AV1 does for small frames.
    """
    os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 would print its settings for every stream
    av = importlib.import_module("av")
    height, width = frames[0].shape[:2]
    file = io.BytesIO()
    sent = 0
    try:
        with av.open(file, "w", format="matroska") as container:
            options = dict(CODECS[call.codec])
            stream = container.add_stream(call.codec, rate=FRAMES_A_SECOND, options=options)
            stream.width = width
            stream.height = height
            stream.pix_fmt = "yuv420p"
            wanted = int(call.bits * width * height * FRAMES_A_SECOND)
            stream.bit_rate = max(8000, wanted)  # a floor for tiny frames
            stream.codec_context.gop_size = 300  # so only the first frame is whole, as in a call
            if call.codec == "libvpx":
                stream.codec_context.thread_count = 1  # with more it sometimes waits for ever
            for frame in (*frames, None):  # None: what the encoder still holds
                picture = None
                if frame is not None:
                    picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                for packet in stream.encode(picture):
                    sent += packet.size
                    container.mux(packet)
    except (OSError, ValueError) as error:  # PyAV's errors are of these kinds
        raise UserError(f"{call.codec} cannot encode {width}x{height} frames ({error})") from error
    file.seek(0)
    seconds = len(frames) / FRAMES_A_SECOND
    return file, sent * 8 / seconds / 1000


def received_frames(sharp: list[np.ndarray], call: Call, path: Path) -> tuple[list, float]:
    """(frames as they arrive in a call, at the size of the sharp ones; kilobits a second)."""
    height, width = sharp[0].shape[:2]
    size = small_size(width, height, call.factor)
    file, kilobits = encoded([resized(frame, size) for frame in sharp], call)
    arrived = decoded_frames(file, path)
    require(len(arrived) == len(sharp), f"{path}: {call.codec} lost frames")
    return [resized(frame, (width, height)) for frame in arrived], kilobits


def flicker(outputs: list[np.ndarray], sharp: list[np.ndarray]) -> float:
    """Mean of |(o_t - o_t-1) - (g_t - g_t-1)| over pixels and scored frames, in 8-bit levels."""
    changes = []
    for t in range(FIRST_SCORED, len(sharp)):
        output_change = outputs[t].astype(np.int16) - outputs[t - 1]
        sharp_change = sharp[t].astype(np.int16) - sharp[t - 1]
        changes.append(np.abs(output_change - sharp_change).mean())
    return float(np.mean(changes))


def vmaf_scores(outputs: list[np.ndarray], sharp: list[np.ndarray]) -> dict[str, float]:
    """{"vmaf", "vmaf_neg"} over the scored frames, by the FFmpeg in imageio-ffmpeg; {} without it.

    VMAF-NEG does not reward mere contrast.
    """
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return {}
    ffmpeg = importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    height, width = sharp[0].shape[:2]
    # Without these flags the conversion shifts the brightness by a level.
    convert = "scale=flags=accurate_rnd+full_chroma_int,format=yuv444p"
    # In FFmpeg's graphs "|" separates the models, and a colon within an option is written "\\:".
    models = "version=vmaf_v0.6.1\\:name=vmaf|version=vmaf_v0.6.1neg\\:name=vmaf_neg"
    with tempfile.TemporaryDirectory() as folder:
        inputs = []
        for name, frames in (("output", outputs), ("sharp", sharp)):
            file = Path(folder, f"{name}.rgb")
            with file.open("wb") as raw_frames:
                raw_frames.writelines(frame.tobytes() for frame in frames[FIRST_SCORED:])
            raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
            inputs += [*raw, "-r", str(FRAMES_A_SECOND), "-i", str(file)]
        log = "scores.json"  # in the folder that FFmpeg runs in: a path would need escaping
        graph = f"[0:v]{convert}[a];[1:v]{convert}[b];"
        graph += f"[a][b]libvmaf=model='{models}':log_fmt=json:log_path={log}"
        command = [ffmpeg, "-v", "error", *inputs, "-lavfi", graph, "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        reason = done.stderr.strip().split("\n")[0] or f"exit status {done.returncode}"
        failed = f"imageio-ffmpeg: libvmaf failed on {width}x{height} frames ({reason})"
        require(done.returncode == 0, failed)
        pooled = json.loads(Path(folder, log).read_text())["pooled_metrics"]
    return {name: pooled[name]["mean"] for name in ("vmaf", "vmaf_neg")}


# What the tables of clips show, and with how many digits. Flicker is a ratio to the input's.
CLIP_DIGITS = {"flicker": 2, "vmaf": 1, "vmaf_neg": 1}


def score_clip(outputs: list[np.ndarray], sharp: list[np.ndarray]) -> dict[str, float]:
    """Scores of a clip from its third frame on; flicker in 8-bit levels."""
    frames = zip(outputs[FIRST_SCORED:], sharp[FIRST_SCORED:], strict=True)
    scores = mean_scores([score(output, frame) for output, frame in frames])
    scores["flicker"] = flicker(outputs, sharp)
    return scores | vmaf_scores(outputs, sharp)


@functools.cache  # so that it is told once
def frames_to_score(path: Path) -> int:
    """A clip's frames, or as many of the first as fit into SCORED_BYTES, which is printed."""
    width, height = clip_frame_size(path)
    fit = max(SCORED_BYTES // (3 * width * height), FIRST_SCORED + 1)
    count = frame_count(path)
    if count > fit:
        tqdm.write(f"{path}: the first {fit} of its {count} frames are scored")
    return min(count, fit)


def clip_sides(clip: Clip, call: Call | None) -> tuple[list, list, float]:
    """(received frames, sharp frames, kilobits a second) of a clip in a call.

    Without a call the clip has a received side of its own, of unknown kilobits.
    """
    too_short = f"{clip.path}: a clip needs more than {FIRST_SCORED} frames"
    wanted = slice(0, frames_to_score(clip.path))
    if call is None:
        received, sharp = encoded_pair(clip, wanted)
        require(len(sharp) > FIRST_SCORED, too_short)
        return received, sharp, math.nan
    sharp = clip.frames(wanted)
    require(len(sharp) > FIRST_SCORED, too_short)
    received, kilobits = received_frames(sharp, call, clip.path)
    return received, sharp, kilobits


def evaluate_clip(
    clip: Clip,
    call: Call | None,
    methods: dict[str, FrameFunction],
    gallery: "Gallery | None" = None,
) -> dict:
    """{"picture", "category", "kilobits", "scores": {method: scores}} of a clip in a call.

    Flicker is the ratio to the input's; of an input without any it is not a number, and neither is
    a mean with it. The gallery, which `--report` shows, is offered the first frames.
    """
    received, sharp, kilobits = clip_sides(clip, call)
    scores = {}
    first_frames = {}
    for name, method in methods.items():
        outputs = [method(frame) for frame in received]
        scores[name] = score_clip(outputs, sharp)
        first_frames[name] = outputs[:SHOWN_FRAMES]
    first_frames["sharp"] = sharp[:SHOWN_FRAMES]
    of_input = scores["input"]["flicker"]
    for method_scores in scores.values():
        method_scores["flicker"] = method_scores["flicker"] / of_input if of_input else math.nan
    row = {"picture": clip.title, "category": clip.kind, "kilobits": kilobits, "scores": scores}
    if gallery:
        gallery.offer(row, first_frames)
    return row


def mean_of_clips(rows: list[dict], methods: Iterable[str]) -> dict[str, dict[str, float]]:
    """{method: mean scores} over clips."""
    means = {}
    for method in methods:
        scores = [row["scores"][method] for row in rows]
        means[method] = mean_scores(scores)
        for name in CLIP_DIGITS:
            if name in scores[0]:
                means[method][name] = statistics.fmean(each[name] for each in scores)
    return means


def clip_table(rows: list[dict], methods: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    """{"all", each kind (but one of the name all), each "kind/clip": {method: means}}.

    A kind's means are those of its clips, and the means of "all" those of the kinds.
    """
    kinds = grouped(rows, lambda row: row["category"])
    by_kind = {kind: mean_of_clips(members, methods) for kind, members in kinds.items()}
    total = mean_of_clips([{"scores": means} for means in by_kind.values()], methods)
    table = {"all": total}
    for kind, means in by_kind.items():
        if kind != "all":
            table[kind] = means
    for row in rows:
        table[f"{row['category']}/{row['picture']}"] = row["scores"]
    return table


def format_clip_scores(scores: dict[str, float]) -> str:
    """Frame metrics, then those of clips that were measured, as in 31.02 / 0.9012 / 1.05."""
    texts = [format_scores(scores)]
    for name, digits in CLIP_DIGITS.items():
        if name in scores:
            texts.append(f"{scores[name]:.{digits}f}")
    return " / ".join(texts)


# --- Prepared crops: what training on calls reads -------------------------------------------------
#
# Twelve crops come from one stream: draw a clip or a picture, take 20 frames of it (a picture is
# moved about), send them through an encoder, and cut crops from what was received and the same
# crops from what was sent. `Streams` does this, `write_crops` stores them.

STREAM_FRAMES = 20  # frames that are encoded for a few crops; 2 of them are the stream's beginning
CROPS_A_STREAM = 12
LARGEST_VIEW = (416, 288)  # the largest part of a still picture that moves through a stream


class Streams(Dataset):
    """The crops of short streams, for `write_crops`.

    Each stream is drawn from (seed, its number) alone.
    """

    def __init__(self, config: PrepareConfig) -> None:
        self.config = config
        self.sources = self.find_sources()

    def find_sources(self) -> dict[str, list[Pair | Clip]]:
        """{protocol: what it can degrade}; UserError where there is nothing."""
        place = self.config.sharp_dir
        sources: dict[str, list[Pair | Clip]] = {}
        for protocol in self.config.protocol:
            if protocol == ENCODED_PAIRS:
                sources[protocol] = find_encoded_pairs(place)
                continue
            sources[protocol] = []
            if list_pictures(place):
                pairs = find_sharp(place, ())
                sources[protocol] += [p for p in pairs if not holds_frames(p.sharp.parent)]
            if protocol == CALL_MIXTURE or protocol in CALLS:
                sources[protocol] += [Clip(path) for path in list_sharp_clips(place)]
            require(sources[protocol], f"{place}: nothing to degrade by {protocol} in this folder")
        for source in itertools.chain(*sources.values()):
            if isinstance(source, Clip):
                self.require_large_enough(source)
        return sources

    def require_large_enough(self, clip: Clip) -> None:
        """UserError, now and not after an hour, for a clip that gives no crops."""
        side = self.config.crop_size
        width, height = clip_frame_size(clip.path)
        fits = min(width, height) >= side
        require(fits, f"{clip.path}: {width}x{height} frames, smaller than --crop-size {side}")

    def __len__(self) -> int:
        return math.ceil(self.config.crops / CROPS_A_STREAM)

    def key(self) -> str:
        """A hash of all that the crops depend on."""
        options = (self.config.protocol, len(self), self.config.crop_size, self.config.seed)
        digest = hashlib.sha256(repr(options).encode())
        examples = range(16)  # of the mixtures, which may have changed
        digest.update(repr([draw_call((0, i)) for i in examples]).encode())
        digest.update(repr([draw_mixture((0, i)) for i in examples]).encode())
        noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
        large = noise[0].repeat(16, axis=0).repeat(16, axis=1)
        for number in examples:
            digest.update(np.stack(with_sharp_part(*noise, (0, number))).tobytes())
            digest.update(moving_still(large, (0, number))[-1].tobytes())
        digest.update(repr((CODECS, CALLS, PROTOCOLS)).encode())
        digest.update(repr((STREAM_FRAMES, LARGEST_VIEW, FIRST_SCORED, BLOCK)).encode())
        files: set[Path] = set()
        for sources in self.sources.values():
            for source in sources:
                files.update(files_of(source))
        for path in sorted(files):
            digest.update(os.fsencode(path.relative_to(self.config.sharp_dir)))  # has its category
            with path.open("rb") as file:
                while block := file.read(2**20):  # clips may be larger than the memory
                    digest.update(block)
        return digest.hexdigest()

    def __getitem__(self, stream: int) -> tuple[str, np.ndarray]:
        """(the name of the clip or picture, its crops).

        They are 8-bit (N, 2, S, S, 3), received and sharp.
        """
        key = (self.config.seed, stream)
        protocols = self.config.protocol
        protocol = protocols[int(generator(key, "protocol").integers(len(protocols)))]
        source = draw_source(self.sources[protocol], key)
        if protocol == MIXED or protocol in PROTOCOLS:
            pairs = self.degraded_crops(source, protocol, key)
        else:
            pairs = self.crops_of_frames(*self.stream_frames(source, protocol, key), key)
        crops = [with_sharp_part(*pair, (*key, number)) for number, pair in enumerate(pairs)]
        name = source.key if isinstance(source, Pair) else f"{source.kind}/{source.path.stem}"
        return name, np.stack(crops)

    def stream_frames(
        self, source: Pair | Clip, protocol: str, key: Sequence[int]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(frames as they arrive, sharp frames) of a few moments."""
        if protocol == ENCODED_PAIRS:
            return encoded_pair(source, some_frames(source, 1, key))
        if isinstance(source, Clip):
            sharp = part_of_clip(source, key)
            path = source.path
        else:
            sharp = moving_still(self.large_enough(source), key, self.config.crop_size)
            path = source.sharp
        height, width = sharp[0].shape[:2]
        call = drawn_call(key, width, height) if protocol == CALL_MIXTURE else CALLS[protocol]
        received, _ = received_frames(sharp, call, path)
        return received, sharp

    def crops_of_frames(
        self, received: list[np.ndarray], sharp: list[np.ndarray], key: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(received, sharp) crops whose corners are those of an encoder's blocks.

        They are of the third frame or later. A picture that is not encoded is a stream of one
        frame, and they are of that.
        """
        side = self.config.crop_size
        height, width = sharp[0].shape[:2]
        draw = generator(key, "crops")
        for _ in range(CROPS_A_STREAM):
            frame = draw.integers(min(FIRST_SCORED, len(sharp) - 1), len(sharp))
            top = BLOCK * draw.integers((height - side) // BLOCK + 1)
            left = BLOCK * draw.integers((width - side) // BLOCK + 1)
            place = (slice(top, top + side), slice(left, left + side))
            yield received[frame][place], sharp[frame][place]

    def degraded_crops(
        self, source: Pair, protocol: str, key: Sequence[int]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(degraded, sharp) crops of a picture, each degraded by a draw of its own."""
        picture = self.large_enough(source)
        for number, (_, sharp) in enumerate(self.crops_of_frames([picture], [picture], key)):
            crop_key = (*key, number)
            if protocol == MIXED:
                degradation = draw_mixture(crop_key)
            else:
                degradation = reseeded(PROTOCOLS[protocol], crop_key)
            yield np.array(degrade(Image.fromarray(sharp), degradation)), sharp

    def large_enough(self, source: Pair) -> np.ndarray:
        """A picture, enlarged where it is smaller than a crop."""
        picture = even_sized(open_picture(source.sharp))
        side = round_up(self.config.crop_size, 16)
        if min(picture.size) < side:
            picture = ImageOps.cover(picture, (side, side))
        return np.array(picture)


def draw_source(sources: Sequence[Pair | Clip], key: Sequence[int]) -> Pair | Clip:
    """A clip or a picture, equally often where there are both, and each category equally often."""
    draw = generator(key, "source")
    by_type = list(grouped(sources, lambda source: type(source).__name__).values())
    of_type = by_type[draw.integers(len(by_type))]
    by_kind = list(grouped(of_type, source_kind).values())
    of_kind = by_kind[draw.integers(len(by_kind))]
    return of_kind[draw.integers(len(of_kind))]


SMALLEST_AV1 = 64  # pixels of a side that SVT-AV1 takes


def drawn_call(key: Sequence[int], width: int, height: int) -> Call:
    """`draw_call`, for frames of this size: those too small for AV1 are sent as H.264."""
    call = draw_call(key)
    too_small = min(small_size(width, height, call.factor)) < SMALLEST_AV1
    if call.codec == "libsvtav1" and too_small:
        return dataclasses.replace(call, codec="libx264")
    return call


def source_kind(source: Pair | Clip) -> str:
    return source.kind if isinstance(source, Clip) else source.category


def some_frames(clip: Clip, every: int, key: Sequence[int]) -> slice:
    """Which frames of a clip make a stream."""
    length = every * STREAM_FRAMES
    last_start = max(clip.count() - length, 0)
    start = int(generator(key, "part of clip").integers(last_start + 1))
    return slice(start, start + length, every)


def part_of_clip(clip: Clip, key: Sequence[int]) -> list[np.ndarray]:
    """Some frames of a clip; a fifth of the senders drops every second frame."""
    every = 2 if generator(key, "drops").random() < 0.2 else 1
    frames = clip.frames(some_frames(clip, every, key))
    height, width = frames[0].shape[:2]
    even = (slice(height // 2 * 2), slice(width // 2 * 2))
    return [frame[even] for frame in frames]


def moving_still(picture: np.ndarray, key: Sequence[int], crop_size: int = 0) -> list[np.ndarray]:
    """A still picture as a clip: a window of it that rests, pans, zooms or scrolls.

    The window is as large as LARGEST_VIEW, or as `crop_size` where that is larger. It moves by
    whole pixels, since a fraction of one would blur what is to be sharp; and a zoom only shrinks.
    """
    draw = generator(key, "motion")
    height, width = picture.shape[:2]
    least = round_up(crop_size, 16)
    view_width = min(max(LARGEST_VIEW[0], least), width) // 16 * 16
    view_height = min(max(LARGEST_VIEW[1], least), height) // 16 * 16
    kind = draw.choice(["pan", "zoom", "rest", "scroll"], p=(0.45, 0.2, 0.15, 0.2))
    spare_x = width - view_width
    spare_y = height - view_height
    x = draw.integers(spare_x + 1)
    y = draw.integers(spare_y + 1)
    step_x, step_y = draw.integers(-5, 6, size=2)
    zoom = draw.uniform(1.0, 1.02)  # from frame to frame
    room = min((width - x) / view_width, (height - y) / view_height)  # for both sides to grow in
    frames = []
    for number in range(STREAM_FRAMES):
        if kind == "pan":
            x = int(np.clip(x + step_x, 0, spare_x))
            y = int(np.clip(y + step_y, 0, spare_y))
        elif kind == "scroll" and number % 6 < 3:  # and rests in between
            y = int(np.clip(y + 4 * step_y, 0, spare_y))
        scale = 1.0
        if kind == "zoom":
            scale = min(zoom**number, room)
        right = x + int(view_width * scale)
        bottom = y + int(view_height * scale)
        view = picture[y:bottom, x:right]
        frames.append(resized(view, (view_width, view_height)))
    return frames


def with_sharp_part(
    received: np.ndarray, sharp: np.ndarray, key: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """A crop; in a fifth, a rectangle of both sides is the same and sharp.

    Half of these rectangles are captions, drawn into both; the others have the sharp side's own
    pixels. From these crops the student learns to leave one thing alone and to sharpen what is
    beside it.
    """
    draw = generator(key, "sharp part")
    if draw.random() >= 0.2:
        return received, sharp
    side = len(sharp)
    top, left = draw.integers(0, side * 3 // 4, size=2)
    height, width = draw.integers(side // 8, side, size=2)
    place = (slice(top, top + height), slice(left, left + width))
    received = received.copy()
    if draw.random() < 0.5:
        letters = "".join(draw.choice(list("aaabcdeeefghiiklmnoooprsttuuvwy   "), 60))
        colours = [tuple(colour) for colour in draw.integers(0, 256, size=(2, 3)).tolist()]
        if draw.random() < 0.5:
            colours = ["black", "white"]
        box = np.array(caption(letters, (side, side), int(draw.integers(8, 40)), colours))
        sharp = sharp.copy()
        sharp[place] = box[:height, :width][: side - top, : side - left]
    received[place] = sharp[place]
    return received, sharp


def files_of(source: Pair | Clip) -> list[Path]:
    """The files that a picture or a clip consists of."""
    if isinstance(source, Pair):
        return [source.sharp]
    files = []
    for path in (source.path, source.received):
        if path is not None:
            files += numbered_pictures(path) if path.is_dir() else [path]
    return files


class CropsFile:
    """The crops of streams on the disk, which `PreparedCrops` reads.

    They are new, or those that an interruption left. UserError for a folder with other crops.
    """

    SECONDS_BETWEEN_SAVES = 10

    def __init__(self, folder: Path, key: str, shape: tuple) -> None:
        self.about_file = folder / PREPARED_ABOUT
        self.key = key
        self.pixels, self.names = open_crops(folder, key, shape)
        self.save()

    def add(self, name: str, crops: np.ndarray) -> None:
        """Write a stream's crops, from a picture or a clip of that name."""
        written = len(self.names)
        self.pixels[written : written + len(crops)] = crops
        self.names += [name] * len(crops)
        if time.monotonic() - self.saved > self.SECONDS_BETWEEN_SAVES:
            self.save()

    def save(self) -> None:
        """Let what is written so far survive whatever comes."""
        self.pixels.flush()
        write_json({"key": self.key, "sources": self.names}, self.about_file)
        self.saved = time.monotonic()


def open_crops(folder: Path, key: str, shape: tuple) -> tuple[np.ndarray, list[str]]:
    """(a folder's crops as a mapped file, the names of those that are written already).

    They are new where there were none. UserError for damaged ones, and for those of another key.
    """
    pixels_file = folder / PREPARED_PIXELS
    about_file = folder / PREPARED_ABOUT
    if not about_file.exists():
        require_writable(pixels_file)
        needed = math.prod(shape)
        free = shutil.disk_usage(folder).free
        sizes = f"{needed / 1e9:.1f} GB of crops, and {free / 1e9:.1f} GB are free"
        require(needed < free, f"{folder}: {sizes}; fewer --crops, or another --data-root")
        pixels = np.lib.format.open_memmap(pixels_file, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):  # else the file has holes, and a full disk is fatal
            with pixels_file.open("r+b") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, pixels_file.stat().st_size)
                except OSError as error:  # some file systems do not know it
                    require(error.errno != errno.ENOSPC, f"{folder}: the disk is full")
        return pixels, []
    remedy = "remove it or choose another --data-root"
    try:
        found, names = read_about(folder)
        pixels = np.lib.format.open_memmap(pixels_file, "r+")
        if len(names) > len(pixels) or len(names) % CROPS_A_STREAM:
            raise ValueError(f"{len(names)} names of {len(pixels)} crops")
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: its crops are damaged ({error}); {remedy}") from error
    require(found == key, f"{folder} holds other crops; {remedy}")
    return pixels, names


def write_crops(streams: Streams, folder: Path) -> int:
    """Write what `PreparedCrops` reads, or what is still missing of it; returns the number.

    UserError for a folder that holds other crops.
    """
    side = streams.config.crop_size
    total = len(streams) * CROPS_A_STREAM
    file = CropsFile(folder, streams.key(), (total, 2, side, side, 3))
    written = len(file.names)
    size = f"{file.pixels.nbytes / 1e9:.1f} GB"
    print(f"{total - written} crops to write into {folder} ({size} in all)", flush=True)
    threads = torch.get_num_threads()
    loader = DataLoader(
        streams,
        sampler=range(written // CROPS_A_STREAM, len(streams)),
        batch_size=None,
        collate_fn=as_it_is,
        num_workers=threads if threads > 1 else 0,
        worker_init_fn=ignore_interrupts,
    )
    # No loader process may free what was decoded here: it would wait for FFmpeg's threads for ever.
    gc.collect()
    gc.freeze()
    try:
        with progress(total=total, initial=written, unit="crop") as bar:
            for name, crops in loader:
                file.add(name, crops)
                bar.update(len(crops))
    finally:
        gc.unfreeze()
        file.save()
    return len(file.names)


def as_it_is(item: object) -> object:
    """A collate function, by name, since a lambda cannot be sent to a new process."""
    return item


# --- Clips: sharpened, from one file to another ---------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """How sharpened frames are stored."""

    codec: str
    pixel_format: str
    options: dict[str, str]


X264 = Encoder("libx264", "yuv420p", {"crf": "16", "preset": "veryfast"})
VP9 = Encoder("libvpx-vp9", "yuv420p", {"crf": "20", "deadline": "realtime", "cpu-used": "6"})
LOSSLESS = Encoder("ffv1", "bgr0", {})

BT709 = 1  # FFmpeg's number for the colours of high-definition video
LIMITED_RANGE = 1  # and for black at 16, white at 235


def say_colours(context) -> None:
    """State in a stream how its colours are to be read."""
    context.color_range = LIMITED_RANGE
    for name in ("colorspace", "color_primaries", "color_trc"):
        setattr(context, name, BT709)


def as_bt709(pixels: np.ndarray, pixel_format: str):
    """8-bit RGB (H, W, 3) as an av.VideoFrame of the colours that `say_colours` states."""
    av = importlib.import_module("av")
    picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return picture.reformat(
        format=pixel_format, dst_colorspace=BT709, dst_color_range=LIMITED_RANGE
    )


# The containers that are kept. Others and lossless clips become .mkv.
CLIP_ENCODERS = {".mp4": X264, ".mov": X264, ".mkv": X264, ".webm": VP9}


def clip_suffix(path: Path, lossless: bool) -> str:
    """The ending of a clip's output."""
    suffix = path.suffix.lower()
    return suffix if suffix in CLIP_ENCODERS and not lossless else ".mkv"


def ahead(items: Generator, depth: int = 4) -> Generator:
    """The items, made by a thread of their own, a few before they are asked for.

    Decoding, sharpening and encoding then overlap, since all three let go of Python's lock. Closing
    it closes `items` too, and waits for the thread: it may be reading a file that is closed next.
    """
    made: queue.Queue = queue.Queue(depth)
    stopped = threading.Event()
    end = object()

    def put(item: object) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
                return

    def make() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    put(item)
                    if stopped.is_set():
                        return
            put(end)
        except BaseException as error:  # raised again where the items are used
            put(error)

    def take() -> object:
        while True:
            with contextlib.suppress(queue.Empty):
                return made.get(timeout=0.2)  # Ctrl-C is noticed between two waits

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        item = take()
        while item is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
            item = take()
    finally:
        stopped.set()
        thread.join()


@dataclass
class TimedFrame:
    """An 8-bit RGB frame (H, W, 3), and when it is shown in units of its stream's time base."""

    pixels: np.ndarray
    pts: int
    duration: int


def longest_step_back(stream) -> float:
    """Seconds by which a stream's times may step back; more is a jump, as to the next of two files.

    It is as long as the most frames that H.264 reorders.
    """
    rate = getattr(stream, "average_rate", None)
    return max(1.0, 16 / float(rate)) if rate else 1.0


class JoinedParts:
    """The parts of a source whose clock begins anew in each, as that of joined files does.

    So that pictures and sound stay together, all streams of a part are moved by one `shift`: to
    where everything before has `ended`. All numbers are seconds.
    """

    def __init__(self, video) -> None:
        self.longest_step = longest_step_back(video)
        self.shift = 0.0
        self.ended = 0.0

    def shift_at_jump(self, begins: float) -> float:
        """By how much to move a stream from now on whose times have jumped back to this one."""
        fits = begins + self.shift > self.ended - self.longest_step
        if not fits:  # it is the first of another part
            self.shift = self.ended - begins
        return self.shift

    def add(self, moved: float, lasts: float) -> None:
        """Something came that begins at this moved time."""
        self.ended = max(self.ended, moved + lasts)


def part_shifts(source: Path) -> dict[int, list[float]]:
    """Seconds by which streams are moved where their times jump back, for each jump, by stream."""
    av = importlib.import_module("av")
    shifts: dict[int, list[float]] = collections.defaultdict(list)
    with errors_about(str(source)), av.open(source) as given:
        if given.format.name not in ("mpegts", "mpeg"):  # others cannot be joined byte by byte
            return shifts
        parts = JoinedParts(given.streams.video[0])
        last: dict[int, float] = {}  # by stream: when its last packet is decoded
        for packet in given.demux():
            if packet.dts is None:
                continue
            stream = packet.stream.index
            decoded = float(packet.dts * packet.time_base)
            shown = decoded if packet.pts is None else float(packet.pts * packet.time_base)
            if decoded < last.get(stream, decoded) - longest_step_back(packet.stream):
                shifts[stream].append(parts.shift_at_jump(shown))
            last[stream] = decoded
            shift = shifts[stream][-1] if shifts[stream] else 0.0
            parts.add(shown + shift, float((packet.duration or 0) * packet.time_base))
    return shifts


class RisingTimes:
    """A stream's times, made to rise, as every container wants them.

    Some step back a little, as those of B-frames in .avi do: they are pushed on. Where they jump
    back they are moved by the next of `shifts`, in seconds, or else to right behind the last.
    """

    def __init__(
        self, time_base: Fraction, shifts: Sequence[float] = (), longest_step: float = 1.0
    ) -> None:
        self.shifts = [round(shift / time_base) for shift in shifts]
        self.longest_step = longest_step / time_base
        self.given: int | None = None  # the last time, as it was and as it became
        self.last: int | None = None
        self.shift = 0

    def jumps_back(self, time: int) -> bool:
        return self.given is not None and time < self.given - self.longest_step

    def __call__(self, time: int) -> int:
        if self.jumps_back(time):
            self.shift = self.shifts.pop(0) if self.shifts else self.last + 1 - time
        self.given = time
        time += self.shift
        if self.last is not None:
            time = max(time, self.last + 1)
        self.last = time
        return time


class OtherStreams:
    """The sound and the subtitles of a clip, copied as they are.

    Sound that does not fit into the new file, such as a .wmv's into Matroska, is encoded anew.
    """

    def __init__(self, given, made, shifts: dict[int, list[float]], metadata: bool) -> None:
        self.given = given
        self.made = made
        self.shifts = shifts  # see `part_shifts`
        self.metadata = metadata
        self.copied = {}  # each new stream, by the index of the one that it copies
        self.encoded = {}
        self.times = {}
        for stream in given.streams:
            if stream.type in ("audio", "subtitle"):
                self.add(stream)
        self.ended = 0.0  # seconds; when the last packet read so far, of any stream, is over
        self.packets = self.read()
        self.next = next(self.packets, None)

    def add(self, stream) -> None:
        """Open what this stream becomes in the new file."""
        self.times[stream.index] = RisingTimes(stream.time_base, self.shifts.get(stream.index, ()))
        name = stream.codec_context.name if stream.codec_context else "unknown"
        try:
            new = self.copied[stream.index] = self.made.add_stream_from_template(stream)
        except (OSError, ValueError):
            if stream.type == "subtitle" or not stream.codec_context:
                print(f"{self.given.name}: its {stream.type} ({name}) does not fit here, left out")
                return
            codec = "libopus" if self.made.format.name == "webm" else "aac"
            rate = 48_000 if codec == "libopus" else min(stream.rate, 48_000)
            layout = "mono" if stream.channels == 1 else "stereo"
            new = self.made.add_stream(codec, rate=rate, layout=layout)
            self.encoded[stream.index] = new
        for key, text in stream.metadata.items():
            if self.metadata or key.lower() == "language":
                new.metadata[key] = text
        if hasattr(new, "disposition"):  # such as: the one to play by default; not in PyAV 14
            given = stream.disposition
            new.disposition = getattr(given, "value", given)  # a Flag before PyAV 17.1

    def read(self) -> Iterator:
        """The packets of the new streams, in the order of the file."""
        with errors_about(self.given.name):
            for packet in self.given.demux():
                if packet.pts is not None:
                    over = packet.pts + (packet.duration or 0)
                    self.ended = max(self.ended, float(over * packet.time_base))
                index = packet.stream.index
                marks_the_end = packet.dts is None
                if index in self.times and not marks_the_end:
                    moved = self.times[index](packet.dts) - packet.dts
                    packet.dts += moved
                    packet.pts = packet.dts if packet.pts is None else packet.pts + moved
                if index in self.copied and not marks_the_end:
                    packet.stream = self.copied[index]
                    yield packet
                elif index in self.encoded:
                    for frame in decoded_sound(packet):
                        yield from self.encoded[index].encode(frame)
            for stream in self.encoded.values():
                yield from stream.encode(None)

    def copy_until(self, seconds: float) -> None:
        """Write what belongs before this moment."""
        while self.next is not None and self.next.dts * self.next.time_base <= seconds:
            self.made.mux(self.next)
            self.next = next(self.packets, None)


def decoded_sound(packet) -> list:
    """A packet's frames, but for one without a time, as the last may be; none if it is damaged."""
    try:
        return [frame for frame in packet.decode() if frame.pts is not None]
    except (OSError, ValueError):  # PyAV's errors are of these kinds; the rest can be heard
        return []


def note_missing_end(given, ended: float) -> None:
    """Say so where an open clip ends long before its header says: FFmpeg finds no fault in it.

    To Matroska a duration begins at 0, to others with the first frame: so it is no later than this.
    """
    stated = (given.duration or 0) / 1e6  # from microseconds
    last_frame = float(1 / (given.streams.video[0].average_rate or 1))  # not every file says it
    if ended + last_frame < stated - 1:
        tqdm.write(f"{given.name}: ends after {ended:.1f} of {stated:.1f} seconds; was it cut off?")


def note_stretching(name: str, first: np.ndarray, size: Size, video) -> None:
    """Say so where --size has another shape than the first frame, by more than 2 %.

    That is (H, W, 3), upright; its stream knows the shape of its pixels, and how it lay.
    """
    height, width = first.shape[:2]
    pixel = float(video.sample_aspect_ratio or 1)
    if (height > width) != (video.height > video.width):
        pixel = 1 / pixel
    shapes = (width / height, width * pixel / height)
    if all(abs(shape * size[1] / size[0] - 1) > 0.02 for shape in shapes):
        tqdm.write(f"{name}: {width}x{height} is stretched to {size[0]}x{size[1]}")


@contextlib.contextmanager
def errors_about(what: str) -> Iterator[None]:
    """Errors in here are about this, although a target is being written."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # PyAV and PyTorch have errors of many kinds
        cause = getattr(error, "strerror", None) or str(error)  # without FFmpeg's numbers
        cause = cause or type(error).__name__
        remedy = "; is it whole, and a clip?" if type(error).__name__ == "InvalidDataError" else ""
        raise UserError(f"{what}: {cause}{remedy}") from error


def upright(frame) -> np.ndarray:
    """An av.VideoFrame as 8-bit RGB (H, W, 3), turned and mirrored as its stream says."""
    pixels = frame.to_ndarray(format="rgb24")
    try:
        matrices = [data for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    except ValueError:  # PyAV does not know a type that this frame has, such as EXIF
        matrices = []
    for matrix in matrices:
        (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3) / 2**16
        if a * d < b * c:  # its rotation says where rows go; columns then go the other way
            pixels = pixels[::-1]
    if frame.rotation:
        pixels = np.rot90(pixels, round(frame.rotation / 90))
    return np.ascontiguousarray(pixels)


# What is known of a whole clip, by FFmpeg's names; it may say who, when and where.
CLIP_METADATA = (
    "title", "artist", "album", "genre", "date", "creation_time", "location",
    "comment", "description", "copyright",
)  # fmt: skip


def clip_metadata(given) -> dict[str, str]:
    """The CLIP_METADATA that an open clip has. Matroska's names are in capitals."""
    metadata = {name.lower(): text for name, text in given.metadata.items()}
    place = metadata.get("com.apple.quicktime.location.iso6709")  # an iPhone's
    if place:
        metadata.setdefault("location", place)
    return {name: metadata[name] for name in CLIP_METADATA if metadata.get(name)}


class ClipSharpener:
    """Sharpens a clip file; sound, subtitles and the times of the frames stay as they are.

    So do its title, date and place with `metadata`. `size` (width, height) enlarges frames first,
    as a call's window does; without it a clip whose size changes gets that of its first frame. A
    turned clip, such as a telephone's, is stored upright. The result appears under its name only
    when it is whole.
    """

    def __init__(
        self,
        sharpener: FrameFunction,
        size: Size | None = None,
        lossless: bool = False,
        metadata: bool = True,
    ) -> None:
        self.sharpener = SteadySharpener(sharpener)
        self.size = size
        self.lossless = lossless
        self.metadata = metadata

    def __call__(self, source: Path, target: Path) -> int:
        """Write the sharpened clip; returns its number of frames. UserError for unreadable ones."""
        av = importlib.import_module("av")
        encoder = LOSSLESS if self.lossless else CLIP_ENCODERS[target.suffix.lower()]
        # The file is opened twice: once for its pictures, once for all else.
        with errors_about(str(source)), av.open(source) as given, av.open(source) as again:
            require(given.streams.video, f"{source}: has no pictures in it")
            with replacing(target) as temporary, av.open(temporary, "w") as made:
                return self.convert(given, again, made, encoder, part_shifts(source))

    def convert(self, given, again, made, encoder: Encoder, shifts: dict[int, list[float]]) -> int:
        """Write every frame and every other stream of an open clip into another."""
        video = given.streams.video[0]
        count = 0
        decoded = ahead(self.decoded(given, shifts.get(video.index, ())))
        with contextlib.closing(ahead(self.sharpened(decoded, given.name))) as frames:
            first = next(frames, None)
            require(first, f"{given.name}: has no frame that can be decoded")
            stream = self.video_stream(made, encoder, video, first.pixels)
            others = OtherStreams(again, made, shifts, self.metadata)
            if self.metadata:
                made.metadata.update(clip_metadata(given))
            bar = progress(frames, "sharpen", total=video.frames or None, initial=1, unit="frame")
            for frame in itertools.chain([first], bar):
                made.mux(stream.encode(self.picture(frame, stream)))
                others.copy_until(frame.pts * video.time_base)
                count += 1
        made.mux(stream.encode(None))
        others.copy_until(math.inf)
        note_missing_end(given, others.ended)
        return count

    def decoded(self, given, shifts: Sequence[float]) -> Generator[TimedFrame, None, None]:
        """The frames of an open clip, upright and at the wanted size."""
        size = self.size
        video = given.streams.video[0]
        rising = RisingTimes(video.time_base, shifts, longest_step_back(video))
        next_pts = 0
        with errors_about(given.name):
            for frame in given.decode(video=0):
                pixels = upright(frame)
                size = size or (pixels.shape[1], pixels.shape[0])
                if rising.last is None:
                    note_stretching(given.name, pixels, size, video)
                given_pts = next_pts if frame.pts is None else frame.pts
                next_pts = given_pts + (frame.duration or 1)
                duration = frame.duration or 0
                yield TimedFrame(window_sized(pixels, size), rising(given_pts), duration)

    def sharpened(
        self, frames: Generator[TimedFrame, None, None], source: str
    ) -> Generator[TimedFrame, None, None]:
        with contextlib.closing(frames), errors_about(source):
            for frame in frames:
                yield dataclasses.replace(frame, pixels=self.sharpener(frame.pixels))

    def video_stream(self, made, encoder: Encoder, video, first: np.ndarray):
        """The new file's video stream: as large as the first frame, timed and coloured as `video`.

        Most encoders want even sides, so an odd last row or column is left out.
        """
        stream = made.add_stream(encoder.codec, rate=video.average_rate or FRAMES_A_SECOND)
        height, width = first.shape[:2]
        stream.width = width // 2 * 2
        stream.height = height // 2 * 2
        stream.pix_fmt = encoder.pixel_format
        stream.options = encoder.options
        stream.time_base = video.time_base
        context = stream.codec_context
        context.time_base = video.time_base
        turned = (height > width) != (video.height > video.width)
        if video.sample_aspect_ratio and not (self.size or turned):
            context.sample_aspect_ratio = video.sample_aspect_ratio  # pixels need not be square
        if encoder is not LOSSLESS:
            for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
                setattr(context, name, getattr(video.codec_context, name))
        return stream

    def picture(self, frame: TimedFrame, stream):
        """A frame as the encoder takes it."""
        av = importlib.import_module("av")
        pixels = np.ascontiguousarray(frame.pixels[: stream.height, : stream.width])
        picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        context = stream.codec_context
        picture = picture.reformat(
            format=stream.pix_fmt,
            dst_colorspace=context.colorspace,
            dst_color_range=context.color_range,
        )
        picture.pts = frame.pts
        picture.duration = frame.duration  # without it the last frame would be short
        picture.time_base = stream.codec_context.time_base
        return picture


# --- Live: frames as they come --------------------------------------------------------------------
#
# A frame that is late is worth nothing, so none ever waits for its turn. One thread reads the
# source and leaves its newest frame in a place of its own. A second takes what is there, sharpens
# it and leaves it in another place. The main thread takes what is there and shows it.


@dataclass
class LiveFrame:
    """A decoded frame, as PyAV has it."""

    picture: object  # av.VideoFrame
    seconds: float  # its time in the source, from the first frame on
    arrived: float  # time.perf_counter() then


@dataclass
class SharpenedFrame:
    """What a sink is given of a frame."""

    pixels: np.ndarray  # 8-bit RGB (H, W, 3)
    seconds: float
    arrived: float
    level: "Level"  # at which it was sharpened


class LatestFrame:
    """One frame's place between two threads: a newer frame replaces one that was not taken."""

    def __init__(self) -> None:
        self.frame: LiveFrame | SharpenedFrame | None = None
        self.closed = False
        self.received = 0
        self.dropped = 0
        self.changed = threading.Condition()

    def put(self, frame: LiveFrame | SharpenedFrame) -> None:
        with self.changed:
            if self.closed:
                return
            self.received += 1
            if self.frame is not None:
                self.dropped += 1
            self.frame = frame
            self.changed.notify()

    def take(self, longest: float = math.inf) -> LiveFrame | SharpenedFrame | None:
        """The newest frame, as soon as there is one.

        None after the last, and where none has come for `longest` seconds.
        """
        end = time.perf_counter() + longest
        with self.changed:
            while self.frame is None and not self.closed and time.perf_counter() < end:
                self.changed.wait(timeout=0.2)  # Ctrl-C is noticed between two waits
            frame = self.frame
            self.frame = None
            return frame

    def is_over(self) -> bool:
        """Whether no frame waits here and none will."""
        with self.changed:
            return self.closed and self.frame is None

    def close(self) -> None:
        """Say that no more frames come; one that waits here is still taken."""
        with self.changed:
            self.closed = True
            self.changed.notify()

    def stop(self) -> None:
        """Say that nobody wants more frames, not even the one that waits here."""
        with self.changed:
            self.frame = None
            self.closed = True
            self.changed.notify()


LONGEST_WAIT = 20.0  # seconds for a stream to begin
MOST_FRAMES_A_SECOND = 240  # what states more states the rate of its clock

# FFmpeg's names of what a source is, by how it begins. Others are named by --live-format.
LIVE_FORMATS = {"/dev/video": "v4l2", ":": "x11grab", "desktop": "gdigrab", "title=": "gdigrab"}


class LiveSource:
    """A camera, a screen, a stream or a file, read by a thread of its own.

    A file comes at its own rate. `sound` are the packets of its first audio stream, in order, if
    they are wanted.
    """

    def __init__(
        self,
        name: str,
        kind: str = "",
        rate: float = 0,
        size: Size | None = None,
        with_sound: bool = False,
    ) -> None:
        self.av = importlib.import_module("av")
        self.is_file = Path(name).is_file()
        self.kind = kind or self.known_kind(name)
        options = {}
        if self.kind and not self.is_file:  # what FFmpeg asks a device for
            if rate:
                options["framerate"] = f"{rate:g}"
            if size:
                options["video_size"] = f"{size[0]}x{size[1]}"
        with opening_errors_about(name, self.kind):
            self.container = interruptible(lambda: self.open(name, options))
        is_picture = self.is_file and re.search("_pipe$|^image2$", self.container.format.name)
        require(not is_picture, f"--live {name}: a picture; `sharpen {name}` sharpens it")
        require(self.container.streams.video, f"--live {name}: has no pictures in it")
        self.name = name
        self.video = self.container.streams.video[0]
        self.audio = None
        if with_sound and self.container.streams.audio:
            self.audio = self.container.streams.audio[0]
        self.times = RisingTimes(self.video.time_base)  # a clock may begin anew
        self.sound_times = RisingTimes(self.audio.time_base) if self.audio else None
        self.parts = JoinedParts(self.video)
        stated = float(self.video.average_rate or FRAMES_A_SECOND)
        self.rate = rate or (stated if stated <= MOST_FRAMES_A_SECOND else FRAMES_A_SECOND)
        self.latest = LatestFrame()
        self.sound: queue.SimpleQueue = queue.SimpleQueue()
        self.first_pts: float | None = None  # of the first frame, in seconds
        self.error: Exception | None = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def known_kind(self, name: str) -> str:
        """FFmpeg's name of what a source is, by how it begins; "" leaves it to FFmpeg."""
        if self.is_file:
            return ""
        for beginning, kind in LIVE_FORMATS.items():
            if name.startswith(beginning):
                return kind
        return ""

    def open(self, name: str, options: dict[str, str]):
        timeout = (LONGEST_WAIT, None)  # to open it, and then for each packet
        return self.av.open(name, format=self.kind or None, options=options, timeout=timeout)

    def frame_size(self) -> Size:
        """(width, height) of the frames, upright. A source that can be read again is asked."""
        width = self.video.width
        height = self.video.height
        if self.is_file:
            with errors_about(f"--live {self.name}"), self.open(self.name, {}) as again:
                first = next(again.decode(video=0), None)
            if first is not None and round((first.rotation or 0) / 90) % 2:
                return height, width
        return width, height

    def run(self) -> None:
        """Read until the end, an error or `close`."""
        try:
            self.read()
        except Exception as error:  # PyAV has errors of many kinds; raised again by `close`
            if not self.stopped.is_set():
                self.error = error
        finally:
            self.latest.close()

    def packets(self) -> Iterator:
        """What the source sends, until its end or `close`."""
        streams = [stream for stream in (self.video, self.audio) if stream is not None]
        while not self.stopped.is_set():
            try:
                for packet in self.container.demux(streams):
                    if self.stopped.is_set():
                        return
                    yield packet
                return
            except BlockingIOError:  # a camera of macOS has no frame yet
                self.stopped.wait(0.005)

    def seconds_of(self, picture, begin: float) -> float:
        """When a frame is to be seen; raw streams do not say it."""
        if picture.pts is not None:
            return self.moved(self.times, picture.pts, picture.duration, self.video.time_base)
        if self.is_file:
            return self.latest.received / self.rate
        return time.perf_counter() - begin

    def read(self) -> None:
        begin = time.perf_counter()
        for packet in self.packets():
            if packet.stream is self.audio:
                if packet.dts is not None:  # else it marks the end
                    self.put_sound(packet)
                continue
            for picture in packet.decode():
                seconds = self.seconds_of(picture, begin)
                if self.first_pts is None:
                    self.first_pts = seconds
                seconds -= self.first_pts
                if self.is_file:
                    self.stopped.wait(begin + seconds - time.perf_counter())
                self.latest.put(LiveFrame(picture, seconds, time.perf_counter()))

    def moved(
        self, times: RisingTimes, pts: int, duration: int | None, time_base: Fraction
    ) -> float:
        """When this begins, in seconds; a clock may begin anew."""
        if times.jumps_back(pts):
            shift = self.parts.shift_at_jump(float(pts * time_base))
            times.shifts = [round(shift / time_base)]
        begins = float(times(pts) * time_base)
        self.parts.add(begins, float((duration or 0) * time_base))
        return begins

    def put_sound(self, packet) -> None:
        self.moved(self.sound_times, packet.dts, packet.duration, packet.time_base)
        packet.dts += self.sound_times.shift
        if packet.pts is not None:
            packet.pts += self.sound_times.shift
        self.sound.put(packet)

    def close(self) -> None:
        """Stop reading; UserError if reading failed."""
        self.stopped.set()
        if self.thread.is_alive():
            self.thread.join(timeout=5)  # a camera may be waiting for a frame
        if not self.thread.is_alive():
            self.container.close()
        if self.error:
            raise UserError(f"--live {self.name}: {self.error}") from self.error


def interruptible(call: Callable[[], object]):
    """What a call returns, or its error; Ctrl-C ends the wait, which FFmpeg would go on with."""
    outcome: dict[str, object] = {}

    def run() -> None:
        try:
            outcome["result"] = call()
        except Exception as error:  # raised again below
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)  # Ctrl-C is noticed between two waits
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


@contextlib.contextmanager
def opening_errors_about(name: str, kind: str) -> Iterator[None]:
    """Errors in here are about what --live names."""
    try:
        yield
    except Exception as error:  # PyAV has errors of many kinds
        remedy = "name a file, an address, or a camera or screen and its --live-format"
        if "container format" in str(error):
            remedy = "see --live-format in `sharpen --help`"
        elif "://" in name:
            remedy = "check the address, and that something sends there"
        elif os.path.isdir(name):
            remedy = "name a file in it"
        elif os.path.isfile(name):
            remedy = "is it a clip? `ffmpeg -i` shows what FFmpeg makes of it"
        elif kind == "x11grab":
            remedy = "`echo $DISPLAY` says which screen you have"
        elif kind:
            remedy = f"see `ffmpeg -sources {kind}` for what there is, and whether you may read it"
        gave_up = type(error).__name__ == "ExitError"
        cause = f"nothing came within {LONGEST_WAIT:g} s" if gave_up else error
        raise UserError(f"--live {name}: cannot be opened ({cause}); {remedy}") from error


class LiveSink(typing.Protocol):
    """Where sharpened frames go."""

    def show(self, pixels: np.ndarray, seconds: float) -> None:
        """Take a frame, 8-bit RGB (H, W, 3), and its time."""

    def is_seen(self) -> bool:
        """Whether there is anybody to see more frames; asked five times a second and more."""

    def close(self) -> None:
        """Finish what was begun."""


class CameraSink:
    """A virtual camera that call programs offer beside real ones (v4l2loopback, OBS)."""

    def __init__(self, size: Size, rate: float) -> None:
        camera = importlib.import_module("pyvirtualcam")
        try:
            self.camera = camera.Camera(*size, fps=rate, fmt=camera.PixelFormat.RGB)
        except RuntimeError as error:
            remedy = "on Linux `modprobe v4l2loopback`, elsewhere install OBS"
            raise UserError(f"-o camera: no virtual camera ({error}); {remedy}") from error
        print(f"the camera is {self.camera.device}")

    def show(self, pixels: np.ndarray, seconds: float) -> None:
        self.camera.send(pixels)

    def is_seen(self) -> bool:
        return True

    def close(self) -> None:
        self.camera.close()


class WindowSink:
    """A window that shows the frames; closing it ends the call."""

    def __init__(self, size: Size) -> None:
        try:
            tkinter = importlib.import_module("tkinter")
        except ImportError as error:
            remedy = "`apt install python3-tk`, or a Python from python.org"
            raise UserError(f"-o window: this Python has no Tk; {remedy}") from error
        try:
            self.root = tkinter.Tk()
        except tkinter.TclError as error:
            raise UserError(f"-o window: no screen to open one on ({error})") from error
        self.root.title("sharpen_kd")
        self.root.protocol("WM_DELETE_WINDOW", self.leave)
        self.picture = tkinter.PhotoImage(width=size[0], height=size[1])
        tkinter.Label(self.root, image=self.picture, borderwidth=0).pack()
        self.is_open = True

    def leave(self) -> None:
        self.is_open = False

    def show(self, pixels: np.ndarray, seconds: float) -> None:
        height, width = pixels.shape[:2]
        header = f"P6 {width} {height} 255 ".encode()  # a PPM picture, which Tk reads fastest
        self.picture.configure(data=header + pixels.tobytes())

    def is_seen(self) -> bool:
        self.root.update()
        return self.is_open

    def close(self) -> None:
        self.root.destroy()


# The containers of streams, by how an address begins.
STREAM_FORMATS = {
    "rtmp": "flv",
    "rtmps": "flv",
    "rtsp": "rtsp",
    "udp": "mpegts",
    "tcp": "mpegts",
    "srt": "mpegts",
}
LIVE_X264 = Encoder(
    "libx264", "yuv420p", {"crf": "18", "preset": "ultrafast", "tune": "zerolatency"}
)


class StreamSink:
    """A file, a named pipe or a stream's address, with the source's sound as it is.

    UserError where it cannot be written, or where its container does not take that sound.
    """

    def __init__(self, path: str, size: Size, source: LiveSource, name: str = "") -> None:
        name = name or path  # a file is written under another name until it is whole
        scheme = re.match(r"(\w+)://", name)
        kind = STREAM_FORMATS.get(scheme[1]) if scheme else None
        if kind is None and Path(name).suffix.lower() not in CLIP_ENCODERS:
            kind = "mpegts"
        self.container = None
        try:
            self.container = source.av.open(path, "w", format=kind)
            self.video = self.video_stream(size, source.rate)
            self.sound = source.sound
            self.audio = None
            if source.audio is not None:
                self.audio = self.container.add_stream_from_template(source.audio)
        except Exception as error:  # PyAV has errors of many kinds
            if self.container is not None:
                self.container.close()  # Windows removes no open file
            raise UserError(f"-o {name}: cannot be written ({error})") from error
        self.name = name
        self.source = source
        self.last_pts = -1
        self.last_sound = -math.inf
        self.begun = False  # whether a frame is in the container
        self.error: UserError | None = None

    def video_stream(self, size: Size, rate: float):
        stream = self.container.add_stream(LIVE_X264.codec, rate=round(rate) or FRAMES_A_SECOND)
        stream.width = size[0] // 2 * 2
        stream.height = size[1] // 2 * 2
        stream.pix_fmt = LIVE_X264.pixel_format
        stream.options = LIVE_X264.options
        stream.codec_context.time_base = Fraction(1, 90000)
        say_colours(stream.codec_context)
        return stream

    def show(self, pixels: np.ndarray, seconds: float) -> None:
        cut = np.ascontiguousarray(pixels[: self.video.height, : self.video.width])
        picture = as_bt709(cut, self.video.pix_fmt)
        picture.time_base = self.video.codec_context.time_base
        picture.pts = max(round(seconds * 90000), self.last_pts + 1)
        self.last_pts = picture.pts
        try:
            with self.telling_errors():
                self.container.mux(self.video.encode(picture))
                self.copy_sound()
            self.begun = True
        except UserError as error:
            if not self.begun:
                raise  # there is nothing to save, and perhaps an older file to keep
            self.error = error  # for `open_sink`, when what came before has been saved

    def is_seen(self) -> bool:
        return self.error is None

    def copy_sound(self) -> None:
        """Write the sound that has come so far, on the clock of the frames."""
        while self.audio is not None and not self.sound.empty():
            packet = self.sound.get()
            if packet.dts <= self.last_sound:
                continue  # a stream that stumbled; no container takes it
            self.last_sound = packet.dts
            shift = round((self.source.first_pts or 0) / packet.time_base)
            packet.pts = (packet.dts if packet.pts is None else packet.pts) - shift
            packet.dts -= shift
            packet.stream = self.audio
            self.container.mux(packet)

    @contextlib.contextmanager
    def telling_errors(self) -> Iterator[None]:
        """Errors in here are about what -o names: a listener has gone, or the disk is full."""
        try:
            yield
        except (OSError, ValueError) as error:  # PyAV's are of these kinds
            cause = getattr(error, "strerror", None) or error
            raise UserError(f"-o {self.name}: {cause}") from error

    def close(self) -> None:
        try:
            with self.telling_errors():
                if self.error is None:
                    self.copy_sound()
                    self.container.mux(self.video.encode(None))
                self.container.close()  # an .mp4 gets its index here
        finally:
            with contextlib.suppress(OSError, ValueError):  # it has been told
                self.container.close()


LIVE_SUFFIXES = (".mp4", ".mkv", ".mov", ".ts")  # of files that hold H.264


def is_plain_file(name: str) -> bool:
    """Whether a sink is a file or will be one: no address, no named pipe, no device."""
    return "://" not in name and (os.path.isfile(name) or not os.path.lexists(name))


@contextlib.contextmanager
def open_sink(name: str, size: Size, source: LiveSource) -> Iterator[LiveSink]:
    """The sink that -o names.

    A file appears under its name when it is whole. If an error ends it after its first frame, it
    appears with what came before, where that can still be finished, and the error is raised.
    """
    sink: LiveSink
    with contextlib.ExitStack() as stack:
        if name == "camera":
            sink = CameraSink(size, source.rate)
        elif name == "window":
            sink = WindowSink(size)
        else:
            if is_plain_file(name):
                temporary = str(stack.enter_context(replacing(Path(name))))
                sink = StreamSink(temporary, size, source, name)
            else:
                sink = StreamSink(name, size, source)
        with contextlib.closing(sink):
            yield sink
    if isinstance(sink, StreamSink) and sink.error:
        raise sink.error


@dataclass(frozen=True)
class Level:
    """A way to sharpen live: which student, and at which part of the size."""

    checkpoint: str  # "" lets frames through as they are
    scale: float = 1.0

    def __str__(self) -> str:
        if not self.checkpoint:
            return "frames as they are"
        if self.scale == 1:
            return self.checkpoint
        return f"{self.checkpoint} at {self.scale:.0%} of the size"


def live_levels(checkpoint: str) -> list[Level]:
    """What to try, best first: --checkpoint's student, or `call` and then `call-fast` for auto."""
    students = [FOR_CLIPS, FASTER_FOR_CLIPS] if checkpoint == "auto" else [checkpoint]
    levels = [Level(student) for student in students]
    return [*levels, Level(students[-1], 0.75), Level(students[-1], 0.5), Level("")]


class Governor:
    """Chooses the level at which frames are ready in time.

    The budget is the time between two frames. When the median of the last 25 frames is above 1.2
    times the budget, it goes one level down: at that speed one frame in six is dropped. Where
    frames are slow, five or more that took 3 seconds are enough. After 300 frames in a row below
    half of the budget it goes one level up. If it must go down again within 300 frames, the next
    rise needs twice as many.
    """

    FRAMES_JUDGED = 25
    FEWEST_JUDGED = 5
    SECONDS_JUDGED = 3.0
    TOLERANCE = 1.2
    PATIENCE = 300

    def __init__(self, levels: list[Level], budget: float) -> None:
        self.levels = levels
        self.budget = budget  # seconds between two frames
        self.index = 0
        self.times: collections.deque = collections.deque(maxlen=self.FRAMES_JUDGED)
        self.calm = 0  # frames in a row that took little
        self.patience = self.PATIENCE
        self.since_rise: int | None = None  # frames since it went up; None after it went down

    @property
    def level(self) -> Level:
        return self.levels[self.index]

    def note(self, seconds: float) -> None:
        """Note how long a frame took."""
        self.times.append(seconds)
        if self.since_rise is not None:
            self.since_rise += 1
        self.calm = self.calm + 1 if seconds < self.budget / 2 else 0
        slow = len(self.times) >= self.FEWEST_JUDGED and sum(self.times) > self.SECONDS_JUDGED
        can_judge = slow or len(self.times) == self.FRAMES_JUDGED
        if can_judge and statistics.median(self.times) > self.TOLERANCE * self.budget:
            self.go_down()
        elif self.calm >= self.patience and self.index > 0:
            self.since_rise = 0
            self.change(-1)

    def go_down(self) -> None:
        if self.index == len(self.levels) - 1:
            return
        if self.since_rise is not None:
            was_wrong = self.since_rise < self.PATIENCE
            self.patience = 2 * self.patience if was_wrong else self.PATIENCE
            self.since_rise = None
        self.change(1)

    def change(self, by: int) -> None:
        self.index += by
        self.times.clear()
        self.calm = 0


class LiveSharpener:
    """Sharpens live frames at one of several levels; students are loaded when they are needed."""

    def __init__(self, config: SharpenConfig, size: Size) -> None:
        self.config = config
        self.size = size  # (width, height) of all that it returns
        self.loaded: dict[str, SteadySharpener] = {}

    def student(self, checkpoint: str) -> SteadySharpener:
        if checkpoint not in self.loaded:
            self.loaded[checkpoint] = SteadySharpener(sharpener_of(self.config, checkpoint))
        return self.loaded[checkpoint]

    def warm_up(self, checkpoint: str) -> None:
        """Load a student, and let its engine do what it does at its first frame of a size."""
        width, height = self.size
        self.student(checkpoint).sharpener(np.zeros((height, width, 3), np.uint8))

    @property
    def repeated(self) -> int:
        """Frames so far that were the last one again."""
        return sum(each.frames - each.computed for each in self.loaded.values())

    def __call__(self, picture, level: Level) -> np.ndarray:
        """An av.VideoFrame to upright 8-bit RGB (H, W, 3) of the call's size."""
        pixels = upright(picture)
        height, width = pixels.shape[:2]
        small = tuple(max(16, round(side * level.scale)) for side in self.size)
        if small != (width, height):
            pixels = window_sized(pixels, small)
        if level.checkpoint:
            pixels = self.student(level.checkpoint)(pixels)
        return window_sized(pixels, self.size)


class LiveSharpening:
    """A thread that sharpens the source's newest frame, again and again.

    So the next frame is sharpened while the last one is encoded or drawn. The governor is told how
    long the sharpening takes, and nothing of the sink, whose frames are as large at every level.
    """

    def __init__(self, source: LiveSource, sharpener: LiveSharpener, governor: Governor) -> None:
        self.source = source
        self.sharpener = sharpener
        self.governor = governor
        self.finished = LatestFrame()
        self.error: UserError | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)

    @property
    def level(self) -> Level:
        return self.governor.level

    def run(self) -> None:
        """Sharpen until the source ends, or an error."""
        try:
            with errors_about(f"{self.source.name}, while sharpening"):
                while (frame := self.source.latest.take()) is not None:
                    self.finished.put(self.sharpened(frame))
        except UserError as error:  # `sharpen_live` raises it again
            self.error = error
        finally:
            self.finished.close()

    def sharpened(self, frame: LiveFrame) -> SharpenedFrame:
        level = self.level
        repeated = self.sharpener.repeated
        begin = time.perf_counter()
        pixels = self.sharpener(frame.picture, level)
        if self.sharpener.repeated == repeated:  # else it stood still
            self.governor.note(time.perf_counter() - begin)
        return SharpenedFrame(pixels, frame.seconds, frame.arrived, level)

    def close(self) -> None:
        """Stop sharpening."""
        self.source.latest.stop()
        while self.thread.is_alive():
            self.thread.join(timeout=0.2)  # Ctrl-C is noticed between two waits


class LiveReport:
    """What is printed while a call runs, and at its end."""

    def __init__(self, places: list[LatestFrame]) -> None:
        self.places = places  # the source's first
        self.begin = time.perf_counter()
        self.busy = time.process_time()
        self.shown = 0
        self.latencies: collections.deque = collections.deque(maxlen=1000)
        self.printed = 0.0

    def note(self, arrived: float) -> None:
        """Note that a frame which arrived then is shown now."""
        self.shown += 1
        self.latencies.append(time.perf_counter() - arrived)

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.begin
        cores = (time.process_time() - self.busy) / seconds
        latencies = np.array(self.latencies or [0.0]) * 1000
        received = self.places[0].received
        dropped = sum(place.dropped for place in self.places)
        return (
            f"{received / seconds:.1f} frames/s in, {self.shown / seconds:.1f} out,"
            f" {dropped} dropped; latency {np.median(latencies):.0f} ms"
            f" (95 %: {np.percentile(latencies, 95):.0f}); {cores:.1f} of {os.cpu_count()} cores"
        )

    def show_line(self, level: Level) -> None:
        """Print it once a second, always on the same line of the screen."""
        now = time.perf_counter()
        if now - self.printed > 1 and sys.stderr.isatty():
            self.printed = now
            print(f"\r{self}; {level}\x1b[K", end="", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self.printed:
            print(file=sys.stderr)
        print(text, flush=True)


def sharpen_live(config: SharpenConfig) -> None:
    """Sharpen what comes from --live into -o, until it ends, its window is closed, or Ctrl-C."""
    sink_name = sink_of(config)
    with_sound = sink_name not in ("camera", "window")
    asked = clip_size(config.live_size, "--live-size")
    source = LiveSource(config.live, config.live_format, config.fps, asked, with_sound)
    governor = Governor(live_levels(config.checkpoint), 1 / source.rate)
    with contextlib.closing(source):
        size = clip_size(config.size) or source.frame_size()
        sharpener = LiveSharpener(config, size)
        sharpener.warm_up(governor.level.checkpoint)  # now, while nobody waits for frames
        sharpening = LiveSharpening(source, sharpener, governor)
        with open_sink(sink_name, size, source) as sink:
            hold_call(source, sharpening, sink)
        if sharpening.error:  # now, so that the sink has finished what it was given
            raise sharpening.error


def hold_call(source: LiveSource, sharpening: LiveSharpening, sink: LiveSink) -> None:
    """Show frames until the end, and say how it went."""
    report = LiveReport([source.latest, sharpening.finished])
    level = sharpening.level
    with contextlib.suppress(KeyboardInterrupt), ended_by_signals(), contextlib.closing(sharpening):
        report.say(f"{source.name}: {source.rate:g} frames/s; {level}; Ctrl-C ends it")
        source.thread.start()
        sharpening.thread.start()
        show_frames(sharpening.finished, level, sink, report)
    report.say(f"{report}; {sharpening.sharpener.repeated} frames stood still")


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, also where a shell has turned Ctrl-C off."""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def show_frames(finished: LatestFrame, level: Level, sink: LiveSink, report: LiveReport) -> None:
    """Show the newest sharpened frame, as long as there are any and somebody sees them.

    A change from the level at the beginning is said when it is seen.
    """
    while sink.is_seen() and not finished.is_over():
        frame = finished.take(longest=0.2)  # a window is closed while nothing comes, too
        if frame is None:
            continue
        sink.show(frame.pixels, frame.seconds)
        report.note(frame.arrived)
        if frame.level != level:
            level = frame.level
            report.say(f"from {frame.seconds:.1f} s on: {level}")
        report.show_line(level)


def sink_of(config: SharpenConfig) -> str:
    """-o as --live takes it; UserError for what it cannot take."""
    require(config.output, "--live: name with -o where it goes: camera, window, an address, a file")
    require(config.live, "--live: name a camera, a screen, an address or a file")
    require(not config.inputs, "--live: takes no other input")
    require(not config.lossless, "--lossless: does not go with --live")
    require(not config.before_after, "--before-after: does not go with --live")
    require(not config.skip_existing, "--skip-existing: does not go with --live")
    # Path drops a slash of an address (and Windows turns the others); C: is a drive.
    name = re.sub(r"^(\w\w+):/+", r"\1://", config.output.as_posix())
    packages = ["av", "pyvirtualcam"] if name == "camera" else ["av"]
    require_packages(packages, f"--live into {name}")
    if name not in ("camera", "window"):
        require_free(name, config)
    return name


def require_free(name: str, config: SharpenConfig) -> None:
    """UserError for a sink that is a folder, of the wrong ending, the source, or there already."""
    require(not os.path.isdir(name), f"-o {name}: is a folder; name a file in it")
    if is_plain_file(name):
        fits = Path(name).suffix.lower() in LIVE_SUFFIXES
        require(fits, f"-o {name}: its ending is none of {', '.join(LIVE_SUFFIXES)}")
    if os.path.exists(name) and os.path.exists(config.live):
        is_input = os.path.samefile(name, config.live)
        require(not is_input, f"-o {name}: would be overwritten; choose another -o")
    if os.path.isfile(name) and not config.overwrite:
        raise UserError(f"-o {name}: exists; add --overwrite, or choose another -o")


# --- Command: sharpen -----------------------------------------------------------------------------

# What would read the files that a folder holds beside pictures.
OTHER_READERS = {
    ".heic": "pip install pillow-heif",
    ".heif": "pip install pillow-heif",
    ".svg": "export it as PNG first",
    ".pdf": "export its pages as PNG first",
}

# Formats that hold an ICC profile when Pillow writes them.
WITH_PROFILE = ("AVIF", "HEIF", "JPEG", "PNG", "TIFF", "WEBP")

# Formats whose further pictures are as good as the first. (Those of others are layers or depths.)
WITH_PAGES = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")

# What `--no-metadata` leaves out: it may say who, when and where.
PERSONAL = ("exif", "text", "xmp")


@dataclass
class Job:
    """A picture or a clip to sharpen, and the files that it becomes."""

    source: Path
    target: Path
    before_after: Path  # written on request, of a picture

    @property
    def is_clip(self) -> bool:
        return is_clip(self.source)

    def targets(self, config: SharpenConfig) -> list[Path]:
        """What is to be written."""
        if config.before_after and not self.is_clip:
            return [self.target, self.before_after]
        return [self.target]


def sharpen(config: SharpenConfig) -> None:
    """Sharpen pictures and clips: files, or folders with everything in them."""
    clip_size(config.size)  # UserError now
    both = config.overwrite and config.skip_existing
    require(not both, "--overwrite, --skip-existing: name one of them")
    if config.live is not None:
        sharpen_live(config)
        return
    require(config.inputs, "name a picture, a clip or a folder to sharpen")
    Image.MAX_IMAGE_PIXELS = 500_000 * config.max_megapixels  # Pillow refuses twice as many
    jobs, others = plan_jobs(config)
    clips = [job for job in jobs if job.is_clip]
    if clips:
        require_packages(["av"], f"{clips[0].source}: sharpening clips")
    sharpeners = sharpeners_for(config, {job.is_clip for job in jobs})
    failed: list[str] = []
    first_error = None  # for --debug
    for number, job in enumerate(progress(jobs, "sharpen")):
        try:
            sharpen_file(config, job, sharpeners[job.is_clip])
        except KeyboardInterrupt:
            say_how_far(config, number - len(failed), len(jobs))
            raise
        except Exception as error:  # one picture must not stop the others; all are named at the end
            failed.append(failure(job.source, error))
            first_error = first_error or error
    if others:
        sharpened = len(jobs) - len(failed)
        print(f"{sharpened} sharpened; {len(others)} skipped: {with_readers(others)}")
    if failed:
        raise UserError(f"{len(failed)} not sharpened: {list_of(failed)}") from first_error


def say_how_far(config: SharpenConfig, done: int, total: int) -> None:
    """What an interruption left, and how to go on where old results cannot be taken for new."""
    remedy = ""
    if config.output and not config.overwrite:
        remedy = "; the same with --skip-existing does the others"
    print(f"{done} of {total} done{remedy}")


def failure(source: Path, error: Exception) -> str:
    """What went wrong with a file, which is named."""
    text = str(error) or type(error).__name__
    return text if str(source) in text else f"{source}: {text}"


def with_readers(others: Sequence[Path]) -> str:
    """The names of files that are no pictures to us, some with what would read them."""
    named = []
    for file in others:
        reader = OTHER_READERS.get(file.suffix.lower())
        named.append(f"{file.name} ({reader})" if reader else file.name)
    return list_of(named)


def sharpen_file(config: SharpenConfig, job: Job, sharpener: FrameFunction) -> None:
    """Sharpen one picture or clip, and say what was written."""
    if job.is_clip:
        clips = ClipSharpener(sharpener, clip_size(config.size), config.lossless, config.metadata)
        count = clips(job.source, job.target)
        frames = "1 frame" if count == 1 else f"{count} frames"
        tqdm.write(f"{job.source} -> {job.target} ({frames})")
        return
    image = open_picture(job.source)
    pages = pages_in(job.source)
    result = sharpen_picture(sharpener, image)
    if not config.metadata:
        result.info = {name: v for name, v in result.info.items() if name not in PERSONAL}
    converting = picture_format(job.target) not in WITH_PROFILE and "icc_profile" in result.info
    save_picture(as_srgb(result) if converting else result, job.target)
    only = f" (the first of {pages} pictures in it)" if pages > 1 else ""
    tqdm.write(f"{job.source} -> {job.target}{only}")
    if config.before_after:
        save_picture(before_and_after(image, result), job.before_after)
        tqdm.write(f"before and after: {job.before_after}")


def pages_in(path: Path) -> int:
    """How many pictures a file holds, as far as it can be read: frames of an animation, pages."""
    with contextlib.suppress(Exception), warnings.catch_warnings():  # as in `open_picture`
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            if image.format in WITH_PAGES:
                return image.n_frames
    return 1


def sharpen_picture(sharpener: FrameFunction, image: Image.Image) -> Image.Image:
    """A sharpened 8-bit copy, greyscale or RGB.

    Alpha and what `kept_metadata` finds are kept.
    """
    kept = kept_metadata(image)
    grey = image.mode in ("1", "L", "LA") or is_deep_grey(image)
    alpha, opaque = split_alpha(converted_to_srgb(image, kept))
    result = Image.fromarray(sharpener(frame_array(opaque))).convert("L" if grey else "RGB")
    if alpha:
        result.putalpha(alpha)
    result.info = kept
    return result


def split_alpha(image: Image.Image) -> tuple[Image.Image | None, Image.Image]:
    """(alpha, if there is any; the picture, whose alpha `frame_array` leaves out)."""
    if not image.has_transparency_data:
        return None, image
    with_alpha = image.convert("RGBA")
    alpha = with_alpha.getchannel("A")
    if is_deep_grey(image):  # the conversion to RGBA would clip it at 255
        return alpha, image
    return alpha, with_alpha


def before_and_after(image: Image.Image, result: Image.Image) -> Image.Image:
    """Both side by side, a small picture enlarged to be looked at."""
    converted = converted_to_srgb(image, {"icc_profile": kept_profile(image)})
    before = Image.fromarray(frame_array(converted))
    after = result.convert("RGB")
    times = max(1, 480 // max(before.size))
    size = (before.width * times, before.height * times)
    sheet = Image.new("RGB", (2 * size[0] + 8, size[1]), "white")
    sheet.paste(before.resize(size, Image.Resampling.NEAREST), (0, 0))
    sheet.paste(after.resize(size, Image.Resampling.NEAREST), (size[0] + 8, 0))
    profile = result.info.get("icc_profile")
    if profile:
        sheet.info["icc_profile"] = profile  # both halves are in its colours
    return sheet


# --- Plans: what sharpen is to write, and under which names ---------------------------------------

# Formats that hold 8-bit colour, and that Pillow writes. Others (GIF, ICO, ...) become PNG.
KEPT_FORMATS = ("AVIF", "BMP", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

LONGEST_NAME = 255  # bytes, on all usual file systems


def plan_jobs(config: SharpenConfig) -> tuple[list[Job], list[Path]]:
    """(the jobs, what else the folders hold); UserError before anything is written."""
    to_file = output_is_file(config)
    jobs: list[Job] = []
    planned: set[str] = set()  # sources; one may be named twice
    taken: set[str] = set()  # the names of outputs
    others: list[Path] = []
    results = None if to_file else config.output
    for given in config.inputs:
        sources, more = find_sources(given, results)
        others += more
        folder = given if given.is_dir() else given.parent
        for source in sources:
            real = name_on_disk(source)
            if real in planned:
                continue
            planned.add(real)
            stem, target = output_of(config, source, folder, to_file)
            target = numbered(target, taken)
            sheet = numbered(with_ending(stem, "_before_after.png"), taken)
            jobs.append(Job(source, target, sheet))
    inputs = ", ".join(map(str, config.inputs))
    instead = f", only {with_readers(others)}" if others else ""
    require(jobs, f"{inputs}: no pictures or clips in there{instead}")
    require_uses(config, jobs)
    keep_inputs(config, jobs, planned)
    return still_to_do(config, jobs), others


def require_uses(config: SharpenConfig, jobs: list[Job]) -> None:
    """UserError for a flag that would change nothing."""
    some_clip = any(job.is_clip for job in jobs)
    some_picture = not all(job.is_clip for job in jobs)
    require(some_clip or not config.size, "--size: enlarges clips, and these are pictures")
    compares = some_picture or not config.before_after
    require(compares, "--before-after: compares pictures, and these are clips")


def still_to_do(config: SharpenConfig, jobs: list[Job]) -> list[Job]:
    """The jobs, with --skip-existing those without a result; UserError for results in the way."""
    if config.skip_existing:
        missing = [job for job in jobs if not all(map(os.path.lexists, job.targets(config)))]
        print(f"{len(jobs) - len(missing)} of {len(jobs)} results exist already")
        return missing
    named_by_user = config.output is not None  # else it is this input's own output, replaced
    if named_by_user and not config.overwrite:
        keep_existing(config, jobs)
    return jobs


def output_is_file(config: SharpenConfig) -> bool:
    """Whether -o names a file; UserError for a format that cannot be written.

    A name that ends like no picture's is a folder, which is printed if the input is one picture.
    """
    output = config.output
    if output is None or output.is_dir():
        return False
    one_file = len(config.inputs) == 1 and not config.inputs[0].is_dir()
    if one_file and is_clip(config.inputs[0]):
        return is_clip_output(output, config.lossless)
    kind = picture_format(output)
    names_file = kind is not None or is_clip(output)
    if not names_file:
        if one_file:
            print(f"-o {output}: taken for a folder, since no picture's name ends so")
        return False
    require(one_file, f"-o {output}: a file can take one input only; name a folder")
    require(kind in Image.SAVE, f"-o {output}: Pillow cannot write the file type {output.suffix}")
    return True


def is_clip_output(output: Path, lossless: bool) -> bool:
    """Whether -o names a clip, and not a folder; UserError for a name that cannot be written."""
    suffix = output.suffix.lower()
    if not suffix:
        return False
    known = suffix in CLIP_ENCODERS
    require(known, f"-o {output}: a clip's name ends in {', '.join(CLIP_ENCODERS)}")
    fits = suffix == ".mkv" or not lossless
    require(fits, f"-o {output}: --lossless needs a name that ends in .mkv")
    return True


def find_sources(given: Path, results: Path | None) -> tuple[list[Path], list[Path]]:
    """(pictures and clips, other files) of an input: itself, or a folder's without our outputs.

    `results` is the folder that -o names; what it holds is not read, which is printed.
    """
    require(given.exists(), f"{given}: no such file or folder")
    if not given.is_dir():
        return [given], []
    sources = []
    others: list[Path] = []
    files = list_files(given, unreadable=others)
    if results and is_inside(results, given):
        read = [file for file in files if not is_inside(file, results)]
        if len(read) < len(files):
            print(f"{len(files) - len(read)} files in {results}, which -o names, are not read")
        files = read
    for file in without_own_outputs(files):
        if file.suffix.lower() in picture_formats() or is_clip(file):
            sources.append(file)
        else:
            others.append(file)
    return sources, others


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file, folder or link lies in a folder, or in one within it."""
    place = path.absolute().parent.resolve()
    return folder.resolve() in (place, *place.parents)


def without_own_outputs(files: list[Path]) -> list[Path]:
    """The files but for those that an earlier `sharpen` of the same folder wrote."""
    stems = collections.defaultdict(set)
    for file in files:
        stems[file.parent] |= {file.stem, shortened(file.stem)}

    def is_own(file: Path) -> bool:
        match = re.fullmatch(r"(.+)_(sharpened|before_after)(_\d+)?", file.stem)
        return bool(match) and match[1] in stems[file.parent]

    return [file for file in files if not is_own(file)]


def output_of(
    config: SharpenConfig, source: Path, folder: Path, to_file: bool
) -> tuple[Path, Path]:
    """(what the outputs' names begin with, the output) of a source in a folder that was given."""
    if is_clip(source):
        suffix = clip_suffix(source, config.lossless)
    else:
        suffix = writable_suffix(source)
    if config.output is None:
        stem = source.with_suffix("")
        return stem, with_ending(stem, f"_sharpened{suffix}")
    if to_file:
        return config.output.with_suffix(""), config.output
    stem = config.output / source.relative_to(folder).with_suffix("")
    return stem, with_ending(stem, suffix)


def writable_suffix(path: Path) -> str:
    """The ending of a picture's output: its own where Pillow writes that format well, else .png."""
    kind = picture_format(path)
    if kind in KEPT_FORMATS and kind in Image.SAVE:
        return path.suffix
    return ".png"


CASE_MATTERS = sys.platform not in ("darwin", "win32")


def name_on_disk(path: Path) -> str:
    """What two paths of one file have in common: links followed, and capitals where they matter."""
    real = os.path.realpath(path)
    return real if CASE_MATTERS else unicodedata.normalize("NFC", real).casefold()


def numbered(target: Path, taken: set[str]) -> Path:
    """The target, or target_2, target_3, ... where inputs of one name meet; takes the name."""
    free = target
    number = 1
    while name_on_disk(free) in taken:
        number += 1
        free = target.with_stem(f"{target.stem}_{number}")
    taken.add(name_on_disk(free))
    return free


def with_ending(stem: Path, ending: str) -> Path:
    """A path with this ending, shortened where file systems would not take its name."""
    longest = LONGEST_NAME - len("_9999")  # which `numbered` may add
    name = stem.name + ending
    if len(os.fsencode(name)) > longest:
        name = shortened(stem.name) + ending
    return stem.with_name(name)


def shortened(stem: str) -> str:
    """The beginning of a name, and a number that tells it from others that begin so."""
    name = os.fsencode(stem)
    beginning = name[: LONGEST_NAME - 40]
    try:
        name.decode()
        text = beginning.decode(errors="ignore")  # without a half letter at its end
    except UnicodeDecodeError:
        text = os.fsdecode(beginning)
    return f"{text}-{zlib.crc32(name):08x}"


def keep_inputs(config: SharpenConfig, jobs: list[Job], sources: set[str]) -> None:
    """UserError for an output that would replace an input."""
    for job in jobs:
        for target in job.targets(config):
            is_input = name_on_disk(target) in sources
            require(not is_input, f"{target}: would be overwritten; choose another -o")


def keep_existing(config: SharpenConfig, jobs: list[Job]) -> None:
    """UserError for an output that would replace any file."""
    remedy = "--overwrite replaces it, --skip-existing keeps it and does the others"
    for job in jobs:
        for target in job.targets(config):
            exists = os.path.lexists(target)
            require(not exists, f"{target}: exists; {remedy}; or choose another -o")


# --- Metadata and colours: what a sharpened copy keeps --------------------------------------------

# What says what a picture shows and how it was taken. Other EXIF may describe how the input was
# stored (its size, its strips), which would be wrong in the output.
EXIF_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
EXIF_GROUPS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)  # camera settings; the place
EXIF_OFFSETS = (ExifTags.Base.MakerNote, ExifTags.IFD.Interop)  # they point into the input
EXIF_SIZE = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)

# What says how a PNG's numbers are to be shown, beside an ICC profile.
PNG_COLOUR = (b"gAMA", b"cHRM", b"cICP", b"sRGB")


def kept_metadata(image: Image.Image) -> dict[str, object]:
    """EXIF, ICC profile, resolution and texts of a picture as opened, for `save_picture`."""
    kept = {
        "exif": kept_exif(image),
        "icc_profile": kept_profile(image),
        "xmp": kept_xmp(image),
        "text": kept_text(image),
    }
    with contextlib.suppress(AttributeError, OSError):  # made in memory, or its file is gone
        kept["chunks"] = colour_chunks(image.filename)
    dpi = image.info.get("dpi")
    if dpi and all(0 < side < 1e6 for side in dpi):
        kept["dpi"] = dpi
    return {name: value for name, value in kept.items() if value}


def kept_exif(image: Image.Image) -> bytes | None:
    """The EXIF that stays true of the sharpened copy; None if there is none, or it is damaged."""
    kept = Image.Exif()
    try:
        exif = image.getexif()
        for tag in EXIF_TAGS:
            if tag in exif:
                kept[tag] = exif[tag]
        for tag in EXIF_GROUPS:
            group = {t: value for t, value in exif.get_ifd(tag).items() if t not in EXIF_OFFSETS}
            for size_tag, length in zip(EXIF_SIZE, image.size, strict=True):
                if size_tag in group:
                    group[size_tag] = length  # the picture may have been turned
            if group:
                kept[tag] = group
        return kept.tobytes() if kept else None
    except Exception:  # Pillow's EXIF code raises whatever a wrong type or offset happens to cause
        tqdm.write(f"{getattr(image, 'filename', 'picture')}: its EXIF is damaged and is left out")
        return None


def kept_profile(image: Image.Image) -> bytes | None:
    """The ICC profile; None if there is none, or it is damaged."""
    icc = image.info.get("icc_profile")
    if not icc:
        return None
    try:
        ImageCms.ImageCmsProfile(io.BytesIO(icc))
    except (OSError, ImageCms.PyCMSError):
        return None
    return icc


def kept_xmp(image: Image.Image) -> bytes | None:
    """The XMP without its orientation, since the picture is upright now; None if there is none."""
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")  # of JPEG, WebP; of PNG
    if not xmp:
        return None
    if isinstance(xmp, str):
        xmp = xmp.encode()
    xmp = re.sub(rb"""\s+tiff:Orientation\s*=\s*("\d*"|'\d*')""", b"", xmp)
    return re.sub(rb"<tiff:Orientation>\s*\d*\s*</tiff:Orientation>", b"", xmp)


def kept_text(image: Image.Image) -> dict[str, str]:
    """A PNG's texts, but for metadata that is kept as such."""
    text = getattr(image, "text", {})
    others = ("XML:com.adobe.xmp", "Raw profile type")
    return {name: value for name, value in text.items() if not name.startswith(others)}


def colour_chunks(path: str) -> dict[bytes, bytes]:
    """The PNG_COLOUR chunks of a PNG file, as they are; none of another."""
    chunks = {}
    with open(path, "rb") as file:
        if file.read(8) != b"\x89PNG\r\n\x1a\n":
            return {}
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == b"IDAT":  # the pixels, which these come before
                break
            data = file.read(length)
            file.read(4)  # the checksum, which Pillow has looked at
            if name in PNG_COLOUR:
                chunks[name] = data
    return chunks


def as_srgb(image: Image.Image) -> Image.Image:
    """A picture's colours as sRGB, for formats without a profile.

    Unchanged if its profile does not fit.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    srgb = ImageCms.createProfile("sRGB")
    others = {name: value for name, value in image.info.items() if name != "icc_profile"}
    with contextlib.suppress(ImageCms.PyCMSError):
        image = ImageCms.profileToProfile(image, source, srgb, outputMode=image.mode)
        image.info = others
    return image


def converted_to_srgb(image: Image.Image, kept: dict[str, object]) -> Image.Image:
    """A CMYK or LAB picture as sRGB by its colour profile, which sRGB's then replaces in `kept`.

    Others, and those without a profile that fits, are returned as they are. (LAB needs no profile:
    it is defined without a device.)
    """
    if image.mode not in ("CMYK", "LAB"):
        return image
    icc = kept.pop("icc_profile", None)
    if icc is not None:
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    elif image.mode == "LAB":
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    else:
        return image
    own_space = {"CMYK": "CMYK", "LAB": "Lab"}[image.mode]  # as profiles name it
    if source.profile.xcolor_space.strip() != own_space:
        return image
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    kept["icc_profile"] = srgb.tobytes()
    return ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")


# --- Command: prepare -----------------------------------------------------------------------------


def prepare(config: PrepareConfig) -> None:
    """Write blurred/sharp pairs of pictures; with --protocol training crops."""
    target = config.data_root / config.split
    require(config.sharp_dir.is_dir(), f"{config.sharp_dir}: no such folder")
    inside = is_inside(target, config.sharp_dir)
    require(not inside, f"--data-root {config.data_root}: is in {config.sharp_dir}; choose another")
    if not config.protocol:
        prepare_pairs(config, target)
        return
    if {CALL_MIXTURE, *CLIP_PROTOCOLS} & set(config.protocol):
        require_packages(["av"], f"--protocol {' '.join(config.protocol)}")
    count = write_crops(Streams(config), target)
    print(f"{count} crops in {target}{what_learns_from(config)}")


def what_learns_from(config: PrepareConfig) -> str:
    """The end of a sentence about crops that `train` can read."""
    if config.split != "train":
        return ""
    for_calls = {CALL_MIXTURE, *CLIP_PROTOCOLS} & set(config.protocol)
    preset = "call" if for_calls else "small"
    flags = f"--preset {preset}"
    if not for_calls:
        flags += " --degradation crops"
    flags += f" --data-root {shlex.quote(str(config.data_root))}"
    if config.crop_size < PRESETS[preset].settings["image_size"]:
        flags += f" --image-size {config.crop_size // 16 * 16}"
    return f"; `train {flags}` learns from them"


def prepare_pairs(config: PrepareConfig, target: Path) -> None:
    """Write blurred/sharp pairs; nothing appears in the dataset until all are written."""
    require(not list_pictures(target), f"{target} holds pictures; choose another --data-root")
    for side in ("blurred", "sharp"):
        place = target / side
        is_free = not place.exists() or (place.is_dir() and not any(place.iterdir()))
        require(is_free, f"{place} is in the way; remove it or choose another --data-root")
    sources = pictures_to_pair(config.sharp_dir)

    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write_pairs(config, sources, unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    target.mkdir(parents=True, exist_ok=True)
    for side in ("blurred", "sharp"):
        if (target / side).exists():
            (target / side).rmdir()  # it is empty; Windows replaces no folder
        (unfinished / side).replace(target / side)
    unfinished.rmdir()
    print(f"{len(sources)} pairs in {target}")


def pictures_to_pair(folder: Path) -> dict[Path, Path]:
    """{name in the dataset: a folder's picture}; UserError for two that would be one pair."""
    sources: dict[Path, Path] = {}
    by_key: dict[str, Path] = {}
    for source in list_pictures(folder):
        name = source.relative_to(folder).with_suffix(".png")
        _, key = side_and_key("sharp" / name)
        other = by_key.setdefault(key, source)
        require(other == source, f"{other} and {source} would both become {key}; rename one")
        sources[name] = source
    require(sources, f"{folder}: no pictures in this folder")
    return sources


def write_pairs(config: PrepareConfig, sources: dict[Path, Path], folder: Path) -> None:
    """Write the pairs of pictures, each degraded by a draw of its own."""
    for index, (name, source) in enumerate(progress(sources.items(), "prepare")):
        draw = generator((config.seed, index), "prepare")
        degradation = (Shrink(draw.choice(config.scale)), Enlarge())
        if config.extra_blur:
            degradation = (GaussianBlur(draw.uniform(0, config.extra_blur)), *degradation)
        sharp = even_sized(open_picture(source))
        save_picture(sharp, folder / "sharp" / name)
        save_picture(degrade(sharp, degradation), folder / "blurred" / name)


# --- Command: teacher -----------------------------------------------------------------------------


@in_its_folder
def train_teacher(config: TeacherConfig) -> None:
    """Train a Restormer of any size on the dataset (L1); best.pth is a --teacher-weights file."""
    require_levels(config)
    last = read_last(config)
    torch.manual_seed(config.seed)
    restormer = restormer_to_train(config, last)
    multiple = 8 * restormer.stem_stride
    wanted = f"--image-size {config.image_size}: must be a multiple of {multiple}"
    aligned = config.image_size % multiple == 0
    require(aligned, f"{wanted} with a stem stride of {restormer.stem_stride}")
    dataset, held_out = training_data(config)
    device = pick_device(config)
    start_processes(device)
    objective = Objective(restormer, None, DistillationLoss({"reconstruction": 1.0}))
    shape = restormer_dimensions(restormer.state_dict())

    def as_frame_function(network: StemmedRestormer) -> FrameFunction:
        return teacher_frames(network, device, config.precision)

    run = TrainingRun(config, objective, shape, dataset, held_out, as_frame_function)
    carry_out(run, last)


def require_levels(config: TeacherConfig) -> None:
    """UserError unless a Restormer can have these levels."""
    four = len(config.num_blocks) == len(config.heads) == 4
    require(four, "--num-blocks, --heads: four numbers each, one a level")
    fits = all((config.dim * 2**level) % heads == 0 for level, heads in enumerate(config.heads))
    wanted = f"--dim {config.dim}: must be even, and at level i, from 0, dim * 2^i a multiple of"
    require(config.dim % 2 == 0 and fits, f"{wanted} that level's --heads")


def restormer_to_train(config: TeacherConfig, last: dict | None) -> StemmedRestormer:
    """That of the last.pth which is resumed, that of --init, or a new one."""
    if last:
        try:
            return StemmedRestormer(**last["network"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            wrong = f"{config.run_dir / 'last.pth'}: its network cannot be built ({error})"
            raise UserError(f"{wrong}; {RESTART}") from error
    if config.init:  # of whatever size it is
        return load_restormer(Path(config.init), "--init")
    channels = 3 * config.stem_stride**2
    return StemmedRestormer(
        channels,
        channels,
        dim=config.dim,
        num_blocks=config.num_blocks,
        num_refinement_blocks=config.num_refinement_blocks,
        heads=config.heads,
        ffn_expansion_factor=config.ffn_expansion_factor,
    )


# --- Command: ablate ------------------------------------------------------------------------------


@dataclass
class Variant:
    """One row of the ablation: its terms that need the teacher, and what its runs gave."""

    name: str
    terms: Sequence[str]
    longer: bool = False  # as much time as "all", without a teacher
    steps: int = 0
    seconds: float = math.nan  # of a step, median
    held_out: list[dict] = field(default_factory=list)  # scores, one for each seed
    test: list[dict] = field(default_factory=list)

    @property
    def folder(self) -> str:
        return self.name.replace(",", "").replace(" ", "_")


def ablation_variants(config: AblateConfig) -> list[Variant]:
    """No teacher, each of its terms that has a weight, all of them, and none for longer."""
    terms = []
    for name, term in LOSS_TERMS.items():
        if term.needs_teacher and getattr(config, f"lambda_{name}") > 0:
            terms.append(name)
    variants = [Variant("no teacher", ()), *(Variant(name, (name,)) for name in terms)]
    return [*variants, Variant("all", terms), Variant("no teacher, longer", (), longer=True)]


# Settings that leave an ablation's scores as they are, or are each process's own.
FREE_IN_ABLATION = {
    "cache",
    "log_gradients",
    "run_dir",
    "save_every",
    "seeds",
    "threads",
    "workers",
}

# These follow from measured times where a run is to take as long as another.
LENGTH_OF_A_RUN = {"epochs", "max_steps", "restart_epochs", "validate_every"}


def variant_config(config: AblateConfig, variant: Variant, seed: int) -> AblateConfig:
    """The settings of one run: teacher terms that the variant lacks have weight 0."""
    changes: dict[str, object] = {}
    for name, term in LOSS_TERMS.items():
        if term.needs_teacher and name not in variant.terms:
            changes[f"lambda_{name}"] = 0.0
    if not variant.terms:
        changes["teacher_checkpoint"] = ""
    epochs = config.epochs
    changes |= {"restart_epochs": epochs, "validate_every": epochs, "seed": seed}
    run_dir = config.run_dir / f"{variant.folder}_{seed}"
    resume = (run_dir / "last.pth").exists()
    changes |= {"run_dir": run_dir, "resume": resume, "overwrite": not resume, "preset": ""}
    return dataclasses.replace(config, **changes)


def require_same_settings(config: AblateConfig, variants: Sequence[Variant]) -> None:
    """UserError if runs that would be kept or continued were begun with other settings."""
    for variant, seed in itertools.product(variants, config.seeds):
        wanted = variant_config(config, variant, seed)
        if not wanted.run_dir.is_dir():
            continue
        anew = f"{wanted.run_dir}: --overwrite trains the runs of these --seeds anew"
        if not wanted.resume:
            kept = run_is_complete(wanted.run_dir)
            require(not kept, f"{anew}; of this one last.pth is missing, with its settings")
            continue
        before = read_checkpoint(wanted.run_dir / "last.pth", anew).get("config")
        require(isinstance(before, dict), f"{anew}; this one's last.pth holds no settings")
        free = FREE_IN_ABLATION | (LENGTH_OF_A_RUN if variant.longer else set())
        for item in dataclasses.fields(wanted):
            if item.name in free or item.name in FLAGS_OF_ONE_START:
                continue
            now = as_saved(getattr(wanted, item.name))
            then = before.get(item.name, as_saved(item.default))  # an older run may lack it
            same = then == now
            require(same, f"{anew}; this one was begun with {flag_of(item)} {then}, not {now}")


def run_is_complete(run_dir: Path) -> bool:
    """Whether a run came to its end.

    best.pth is written at the last step, the only one that is validated, and log.csv after it.
    """
    best = run_dir / "best.pth"
    log = run_dir / "log.csv"
    if not (best.exists() and log.exists()):
        return False
    return len(read_csv(log)) >= read_checkpoint(best, RESTART)["step"]


def read_csv(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run_variant(config: AblateConfig, variant: Variant, test: list) -> None:
    """Train a variant with every seed, as far as that is not done, and collect its scores."""
    seconds = []
    for seed in config.seeds:
        run_config = variant_config(config, variant, seed)
        if not run_is_complete(run_config.run_dir):
            train(run_config)
        student, content = load_student(run_config.run_dir / "best.pth")
        rows = read_csv(run_config.run_dir / "log.csv")
        seconds += [float(row["seconds"]) for row in rows]
        variant.steps = len(rows)
        # Of what best.pth holds, the metrics that today's tables have.
        variant.held_out.append(mean_scores([content["held_out"]]))
        if test:
            sharpener = FrameSharpener(student, pick_device(config), precision=config.precision)
            variant.test.append(score_method(sharpener, test))
    variant.seconds = statistics.median(seconds)


def spread(scores: list[dict]) -> str:
    """Mean scores and the range of PSNR over the seeds."""
    psnrs = [each["psnr"] for each in scores]
    return f"{format_scores(mean_scores(scores))} (PSNR {min(psnrs):.2f} to {max(psnrs):.2f})"


def ablate(config: AblateConfig) -> None:
    """Train one student with each teacher term alone, with all and with none, and compare them.

    Runs are in --run-dir/VARIANT_SEED, beside ablation.json and ablation.png. With a
    --teacher-cache all see the same crops. Runs that are there are kept or continued, so two
    processes can share out the seeds, and a third print the table. UserError where one was begun
    with other settings: --overwrite makes them anew.
    """
    require(PROCESSES == 1, "ablate: run it without torchrun; processes may share out the --seeds")
    require_own_term(config)
    test = []
    if config.data_root and (config.data_root / "test").is_dir():  # a plain folder has no test half
        test = [pair.load() for pair in find_sharp(config.data_root / "test", PROTOCOLS["x2"])]
    variants = ablation_variants(config)
    if config.overwrite:
        remove_runs(config, variants)
    require_same_settings(config, variants)
    runs = len(variants) * len(config.seeds)
    print(f"{runs} runs one after the other, as many as variants times --seeds: {config.run_dir}")

    for variant in variants:
        of_this = as_long_as_all(config, variants) if variant.longer else config
        run_variant(of_this, variant, test)
        line = f"{variant.name:<20}{variant.steps:>6} steps of{1000 * variant.seconds:>4.0f} ms"
        line += f"   held out {spread(variant.held_out)}"
        if test:
            line += f"   test {spread(variant.test)}"
        print(line, flush=True)

    content = {v.name: {"held out": v.held_out, "test": v.test} for v in variants}
    write_json(content, config.run_dir / "ablation.json")
    plot_ablation(config.run_dir / "ablation.png", variants)


def require_own_term(config: AblateConfig) -> None:
    """UserError unless a student without a teacher has something to learn."""
    own_terms = [name for name, term in LOSS_TERMS.items() if not term.needs_teacher]
    flags = ", ".join(f"--lambda-{name}" for name in own_terms)
    weighted = any(getattr(config, f"lambda_{name}") for name in own_terms)
    require(weighted, f"{flags}: all are 0, which leaves nothing to learn without a teacher")


def remove_runs(config: AblateConfig, variants: Sequence[Variant]) -> None:
    """Remove what earlier runs left: all at once, since a run that is found is resumed."""
    for variant, seed in itertools.product(variants, config.seeds):
        folder = config.run_dir / f"{variant.folder}_{seed}"
        if folder.exists():
            with locked(folder):
                remove_run(folder)


def as_long_as_all(config: AblateConfig, variants: Sequence[Variant]) -> AblateConfig:
    """Settings with which a run without a teacher takes the time that all terms took."""
    seconds = {variant.name: variant.seconds for variant in variants}
    ratio = seconds["all"] / seconds["no teacher"]
    epochs = max(1, round(config.epochs * ratio))
    max_steps = math.ceil(config.max_steps * ratio)
    return dataclasses.replace(config, epochs=epochs, max_steps=max_steps)


# --- Command: eval --------------------------------------------------------------------------------


def side_by_side(panels: dict[str, np.ndarray], detail: int = 48) -> Image.Image:
    """The frames under their names, each above a magnified square of it.

    The square is where the first and the last frame differ most.
    """
    frames = list(panels.values())
    first = frames[0]
    last = frames[-1]
    height, width = first.shape[:2]
    side = min(detail, height, width)
    change = np.square(first.astype(float) - last).sum(2)
    whole = change[: height // side * side, : width // side * side]
    blocks = whole.reshape(height // side, side, width // side, side).sum((1, 3))
    row, column = np.unravel_index(blocks.argmax(), blocks.shape)
    top = side * int(row)
    left = side * int(column)

    sheet = Image.new("RGB", (len(panels) * (width + 4) - 4, height + width + 28), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, frame) in enumerate(panels.items()):
        x = number * (width + 4)
        square = Image.fromarray(frame[top : top + side, left : left + side])
        sheet.paste(Image.fromarray(frame), (x, 24))
        sheet.paste(square.resize((width, width), Image.Resampling.NEAREST), (x, height + 28))
        draw.text((x + 4, 4), name, fill="black", font_size=15)
        corners = (x + left, 24 + top, x + left + side - 1, 24 + top + side - 1)
        draw.rectangle(corners, outline="red")
    return sheet


STORED_PAIRS = ""  # the protocol of pairs that are read as they are


def protocol_title(protocol: str) -> str:
    return "pairs" if protocol == STORED_PAIRS else protocol


def evaluation_data(config: EvalConfig) -> dict[str, list[Pair] | list[Clip]]:
    """{protocol: pairs, or clips for a call}.

    Without a dataset, the samples at x2.
    """
    data_root = config.data_root
    protocols = config.protocol
    if data_root == DATASET and not list_pictures(DATASET):
        for name in protocols:
            remedy = "name a folder of sharp clips with --data-root"
            require(name not in CLIP_PROTOCOLS, f"--protocol {name}: {remedy}")
        data_root = SAMPLES / "originals"
        protocols = protocols or ("x2",)
        print(f"No pictures in {DATASET}: scoring the five in {data_root}; see --data-root.")
    folder = split_folder(data_root, config.split)
    if not protocols:
        return {STORED_PAIRS: find_pairs(folder)}
    data: dict[str, list] = {}
    for name in protocols:
        if name in CLIP_PROTOCOLS:
            require_packages(["av"], f"--protocol {name}")
            data[name] = find_encoded_pairs(folder) if name == ENCODED_PAIRS else find_clips(folder)
        elif name in CONDITIONS:
            data[name] = find_sharp(folder, CONDITIONS[name].degradation)
        else:
            data[name] = find_sharp(folder, PROTOCOLS[name])
    return data


def load_pair(config: EvalConfig, condition: Condition, pair: Pair) -> tuple:
    """(blurred, sharp) of a pair as 8-bit arrays (H, W, 3), at --resize and in a condition."""
    sides = pair.load()
    if config.resize:
        size = (config.resize, config.resize)
        sides = [resized(side, size) for side in sides]
    blurred, sharp = (condition.change(side) for side in sides)
    return blurred, sharp


def score_pair(
    config: EvalConfig,
    protocol: str,
    pair: Pair,
    methods: dict[str, FrameFunction],
    with_sheet: bool,
    gallery: "Gallery | None",
) -> dict:
    """{"picture", "category", "scores": {method: scores}}; writes the pictures that are wanted."""
    condition = CONDITIONS.get(protocol, PLAIN)
    blurred, sharp = load_pair(config, condition, pair)
    outputs = {name: method(blurred) for name, method in methods.items()}
    if config.save_images:
        folder = config.output_dir / protocol
        save_picture(Image.fromarray(outputs["student"]), folder / f"{pair.key}.png")
        if with_sheet:
            restored = {name: output for name, output in outputs.items() if name != "input"}
            panels = {"blurred": blurred} | restored | {"sharp": sharp}
            save_picture(side_by_side(panels), folder / "side_by_side" / f"{pair.category}.png")
    wanted = condition.scored(sharp)
    scores = {name: score(condition.scored(output), wanted) for name, output in outputs.items()}
    row = {"picture": pair.key, "category": pair.category, "scores": scores}
    if gallery:
        sides = {name: [frame] for name, frame in outputs.items()}
        gallery.offer(row, sides | {"sharp": [sharp]})
    return row


def evaluate_pairs(
    config: EvalConfig,
    protocol: str,
    pairs: list[Pair],
    methods: dict[str, FrameFunction],
    gallery: "Gallery | None",
) -> tuple[dict, list[dict]]:
    """({"images": their number, "scores": the table}, the rows of a protocol); prints the table."""
    first_ones = [group[0] for group in grouped(pairs, lambda pair: pair.category).values()]
    rows = []
    for pair in progress(pairs, protocol_title(protocol)):
        rows.append(score_pair(config, protocol, pair, methods, pair in first_ones, gallery))
    table = scores_by_category(rows, methods)
    print_table(protocol_title(protocol), table)
    return {"images": len(rows), "scores": table}, rows


def evaluate_clips(
    protocol: str,
    clips: list[Clip],
    methods: dict[str, FrameFunction],
    gallery: "Gallery | None",
) -> tuple[dict, list[dict]]:
    """({"clips": their number, "scores": the table}, the rows of a call); prints the table."""
    rows = []
    for clip in progress(clips, protocol):
        rows.append(evaluate_clip(clip, CALLS.get(protocol), methods, gallery))
    table = clip_table(rows, methods)
    print_table(protocol, table, format_clip_scores)
    print(f"each: {' / '.join(table['all']['input'])}; flicker against the input's")
    if protocol in CALLS:
        kilobits = ", ".join(f"{row['picture']} {row['kilobits']:.0f}" for row in rows)
        print(f"kilobits a second: {kilobits}")
    return {"clips": len(rows), "scores": table}, rows


def evaluate(config: EvalConfig) -> None:
    """Average PSNR and SSIM of input, student and teacher, over a split and for each category."""
    require(not 0 < config.resize < 7, f"--resize {config.resize}: SSIM needs at least 7x7 pixels")
    require_writable(config.json, config.report, config.output_dir / "scores.csv")
    data = evaluation_data(config)
    methods: dict[str, FrameFunction] = {"input": lambda frame: frame}
    if config.teacher or config.teacher_weights:
        restormer = load_restormer(config.teacher_weights)
        methods["teacher"] = teacher_frames(restormer, pick_device(config), config.precision)
    students = sharpeners_for(config, {protocol in CLIP_PROTOCOLS for protocol in data})

    galleries = {}
    if config.report:
        counts = {protocol: len(examples) for protocol, examples in data.items()}
        galleries = empty_galleries(counts)

    results: dict[str, dict] = {}
    lines = []
    for protocol, examples in data.items():
        for_clips = protocol in CLIP_PROTOCOLS
        methods["student"] = students[for_clips]
        gallery = galleries.get(protocol)
        if for_clips:
            result, rows = evaluate_clips(protocol, examples, methods, gallery)
        else:
            result, rows = evaluate_pairs(config, protocol, examples, methods, gallery)
        results[protocol] = result
        lines += [csv_line(protocol, row) for row in rows]
        write_csv(lines, config.output_dir / "scores.csv")  # what is done is not lost by an error
    if config.json:
        write_json(results.get(STORED_PAIRS, results), config.json)
    if config.report:
        write_report(config, results, galleries)


def csv_line(protocol: str, row: dict) -> dict:
    """A row of scores.csv: a column for each method's metric."""
    line = {}
    if protocol != STORED_PAIRS:
        line["protocol"] = protocol
    line |= {name: value for name, value in row.items() if name != "scores"}
    for method, scores in row["scores"].items():
        line |= {f"{method}_{metric}": value for metric, value in scores.items()}
    return line


# --- Report: eval's results as a page -------------------------------------------------------------
#
# One HTML file holds everything, pictures and clips as well, and opens without a network. The page
# itself is inference_samples/report.html; here its data is gathered and put into it.

REPORT_PAGE = SAMPLES / "report.html"
MOST_WORST = 5  # of each protocol, those that gained least
MOST_OTHERS = 12  # spread evenly over all others
PAGE_BYTES = 21_000_000  # all pictures and clips; as base64 they are 28 MB
LONGEST_SIDE = 1280  # in pixels; larger pictures are cut, and so are those with too many bytes
SHORTEST_SIDE = 96  # which is not cut further

# A clip in a page: a format that every browser plays, close to the frames that were scored. Frames
# refer to earlier ones only, and every eighth to none, so stepping through them is quick.
PAGE_CLIP = Encoder("libx264", "yuv420p", {"crf": "12", "preset": "veryfast", "bf": "0", "g": "8"})
CLIP_BORDER = 8  # rows around each side in the stack, so that no side colours its neighbour

# {"input", each method, "sharp"}: the frames of a clip; one frame of a picture
Sides = dict[str, list[np.ndarray]]


def psnr_gain(row: dict) -> float:
    """What the student adds to the input's PSNR in dB; 0 where both are without any error."""
    gain = row["scores"]["student"]["psnr"] - row["scores"]["input"]["psnr"]
    return 0.0 if math.isnan(gain) else gain


class Gallery:
    """What the report shows of a protocol: those that gained least, and others spread evenly.

    Of all that is offered it keeps only what may still be shown: encoded, and each within
    `item_bytes`.
    """

    def __init__(self, count: int, others: int, item_bytes: float) -> None:
        self.item_bytes = item_bytes
        self.spread = {index * count // others for index in range(others)}
        self.gains: list[float] = []
        self.items: dict[int, dict] = {}  # by their number among all that were offered

    def worst(self) -> list[int]:
        """The numbers of those that gained least so far, the worst first."""
        numbers = range(len(self.gains))
        return sorted(numbers, key=lambda number: self.gains[number])[:MOST_WORST]

    def offer(self, row: dict, sides: Sides) -> None:
        """Keep an example if it may be shown, and drop what a worse one has displaced."""
        number = len(self.gains)
        self.gains.append(psnr_gain(row))
        shown = self.spread.union(self.worst())
        if number in shown:
            self.items[number] = gallery_item(row, sides, self.item_bytes)
        self.items = {n: item for n, item in self.items.items() if n in shown}

    def shown(self) -> tuple[list[dict], list[dict]]:
        """(the worst, the others)."""
        worst = self.worst()
        others = [item for number, item in self.items.items() if number not in worst]
        return [self.items[number] for number in worst], others


def empty_galleries(counts: dict[str, int]) -> dict[str, Gallery]:
    """A gallery for each protocol with so many examples; all share the page's bytes."""
    others = max(1, MOST_OTHERS // len(counts))
    items = sum(min(count, MOST_WORST + others) for count in counts.values())
    item_bytes = PAGE_BYTES / items
    return {protocol: Gallery(count, others, item_bytes) for protocol, count in counts.items()}


def gallery_item(row: dict, sides: Sides, most_bytes: float) -> dict:
    """An example as the page shows it: its scores, and its sides in the largest window that fits.

    A clip is one video with its sides stacked, so that both halves of a slider always show the same
    frame. Pictures are stored without loss.
    """
    whole = sides["input"][0].shape
    window = min(LONGEST_SIDE, max(whole))
    while True:
        seen = cropped_sides(sides, window)
        media, size = encoded_sides(seen)
        if size <= most_bytes or window <= SHORTEST_SIDE:
            break
        wanted = 0.95 * window * math.sqrt(most_bytes / size)  # bytes fall slower than the area
        window = max(SHORTEST_SIDE, int(wanted))
    height, width = seen["input"][0].shape[:2]
    item = {"name": row["picture"], "scores": row["scores"], "sides": list(seen)}
    item |= {"width": width, "height": height}
    item["note"] = size_note(whole, seen["input"][0].shape)
    return item | media


def encoded_sides(sides: Sides) -> tuple[dict, int]:
    """(pictures or a clip as addresses, their bytes before base64)."""
    count = len(sides["input"])
    if count > 1:
        clip = stacked_clip(sides)
        media = {"clip": data_url("video/mp4", clip), "border": CLIP_BORDER, "frames": count}
        return media, len(clip)
    pictures = [lossless(picture) for (picture,) in sides.values()]
    media = {"pictures": [data_url("image/webp", picture) for picture in pictures]}
    return media, sum(map(len, pictures))


def size_note(whole_shape: tuple, seen_shape: tuple) -> str:
    """The size that is shown, and what of."""
    height, width = whole_shape[:2]
    seen_height, seen_width = seen_shape[:2]
    if (height, width) == (seen_height, seen_width):
        return f"{width} by {height} pixels"
    part = f"{seen_width} by {seen_height} of {width} by {height} pixels"
    return f"{part}, where the student changed most; the scores are of all"


def cropped_sides(sides: Sides, window: int) -> Sides:
    """The same part of every frame, where the student changed the middle one most.

    No side of it is above `window`, and a clip's are even.
    """
    frames = sides["input"]
    height, width = (min(side, window) for side in frames[0].shape[:2])
    if len(frames) > 1:
        height -= height % 2
        width -= width % 2
    middle = len(frames) // 2
    top, left = most_changed(frames[middle], sides["student"][middle], height, width)
    part = (slice(top, top + height), slice(left, left + width))
    seen = {}
    for name, each in sides.items():
        seen[name] = [frame[part] for frame in each]
    return seen


def most_changed(before: np.ndarray, after: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """(top, left) of the part of this size in which two frames differ most."""
    change = np.square(before.astype(np.int64) - after).sum(2)
    # sums[i, j] is the change above row i and left of column j, and any part's follows from four:
    # sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left].
    sums = np.pad(change.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    above = sums[:-height]
    below = sums[height:]
    inside = (below - above)[:, width:] - (below - above)[:, :-width]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return int(top), int(left)


def data_url(kind: str, content: bytes) -> str:
    """A file's content as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def lossless(picture: np.ndarray) -> bytes:
    """A frame as a WebP file without loss."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", lossless=True, exact=True, method=3)
    return file.getvalue()


def stacked_clip(sides: Sides) -> bytes:
    """A video file of all sides, one below the other with a border around each."""
    av = importlib.import_module("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = None
        for frames in zip(*sides.values(), strict=True):
            border = ((CLIP_BORDER, CLIP_BORDER), (0, 0), (0, 0))
            stack = np.concatenate([np.pad(frame, border, "edge") for frame in frames])
            stream = stream or page_stream(container, stack)
            container.mux(stream.encode(as_bt709(stack, PAGE_CLIP.pixel_format)))
        container.mux(stream.encode(None))
    return file.getvalue()


def page_stream(container, first: np.ndarray):
    """A page's video stream, as large as the first frame."""
    stream = container.add_stream(PAGE_CLIP.codec, rate=FRAMES_A_SECOND, options=PAGE_CLIP.options)
    stream.height, stream.width = first.shape[:2]
    stream.pix_fmt = PAGE_CLIP.pixel_format
    say_colours(stream.codec_context)
    return stream


def table_for_page(protocol: str, result: dict) -> dict:
    """A protocol's scores in the page: a row for all, for each category, and for each clip."""
    if "clips" in result:
        examples = f"{result['clips']} clips"
    else:
        examples = f"{result['images']} pictures"
    rows = []
    for name, scores in result["scores"].items():
        rows.append({"name": name, "scores": scores})
    return {"protocol": protocol_title(protocol), "examples": examples, "rows": rows}


def gallery_for_page(galleries: dict[str, Gallery]) -> list[dict]:
    """[{"title", "items"}]: the worst of every protocol, then some of the others."""
    worst = []
    others = []
    for protocol, gallery in galleries.items():
        name = protocol_title(protocol)
        least, more = gallery.shown()
        title = f"{name}: all {len(least)}, those that gained least first"
        if more:
            title = f"{name}: the {len(least)} that gained least"
            others.append({"title": f"{name}: {len(more)} others, spread evenly", "items": more})
        worst.append({"title": title, "items": least})
    return worst + others


def command_line(config: EvalConfig) -> str:
    """The command with these settings; what is by default is not named."""
    words = ["python", "sharpen_kd.py", "eval"]
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value != item.default:
            words += arguments_of(item, value)
    return shlex.join(words)


def describe_weights(path: Path) -> str:
    """A weight file by its name and what it holds."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{path.name}, SHA-256 {digest[:16]}…"


def describe_student(name: str) -> str:
    """A student's checkpoint: its file, its network and how long it was trained."""
    student, content = load_student(name)
    parameters = sum(weights.numel() for weights in student.parameters())
    kind = student.config.get("kind", "unet")
    text = describe_weights(SHIPPED.get(name) or Path(name))
    text += f", {kind} with {parameters:,} parameters"
    if isinstance(content.get("step"), int):
        text += f", {content['step']:,} training steps"
    return text


def processor_name() -> str:
    """The processor as its maker calls it, where Linux says so."""
    with contextlib.suppress(OSError):
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def machine_name(device: torch.device) -> str:
    """What computed, and under which system."""
    name = f"{processor_name()}, threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}; {name}"
    return f"{name}; {platform.system()} {platform.release()}"


def report_facts(config: EvalConfig, protocols: Iterable[str]) -> dict[str, str]:
    """What was run, where and when: {what: text}."""
    facts = {"command": command_line(config)}
    names = {chosen_checkpoint(config, protocol in CLIP_PROTOCOLS) for protocol in protocols}
    facts["student"] = "; ".join(describe_student(name) for name in sorted(names))
    if config.teacher or config.teacher_weights:
        facts["teacher"] = describe_weights(config.teacher_weights or OFFICIAL_TEACHER)
    device = pick_device(config)
    precision = str(pick_precision(config.precision, device)).removeprefix("torch.")
    facts["computed by"] = f"{config.backend} in {precision} on {device}"
    facts["machine"] = machine_name(device)
    facts["date"] = time.strftime("%Y-%m-%d %H:%M %z")
    python = platform.python_version()
    facts["versions"] = f"sharpen_kd {__version__}, PyTorch {torch.__version__}, Python {python}"
    return facts


def json_in_html(content: dict) -> str:
    """JSON for a script element: no text in it can end that element or begin a comment."""
    text = json.dumps(without_infinities(content))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page_with(content: dict) -> str:
    """The report's page with its data, and with the hashes of the only code that it may run."""
    page = REPORT_PAGE.read_text(encoding="utf-8")
    for element in ("style", "script"):
        (code,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        page = page.replace(f"HASH_OF_{element.upper()}", f"sha256-{digest}")
    before, after = page.split("DATA_OF_REPORT")
    return before + json_in_html(content) + after


def write_report(config: EvalConfig, results: dict, galleries: dict[str, Gallery]) -> None:
    """Write `eval`'s results by protocol, and its galleries, as one HTML page."""
    digits = {name: metric.digits for name, metric in METRICS.items()} | CLIP_DIGITS
    content = {
        "facts": report_facts(config, results),
        "digits": digits,
        "tables": [table_for_page(protocol, result) for protocol, result in results.items()],
        "gallery": gallery_for_page(galleries),
        "frames_a_second": FRAMES_A_SECOND,
    }
    write_text(page_with(content), config.report)
    print(config.report)


# --- Command: export ------------------------------------------------------------------------------


def onnx_bytes(network: FrameNetwork) -> bytes:
    """An ONNX model of a network for frames of any aligned size."""
    file = io.BytesIO()
    axes = {0: "batch", 1: "height", 2: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: that it is deprecated, and of constants
        torch.onnx.export(
            network,
            (network.example(),),
            file,
            input_names=["frames"],
            output_names=["restored"],
            dynamic_axes={"frames": axes, "restored": axes},
            dynamo=False,
        )
    return file.getvalue()


def export(config: ExportConfig) -> None:
    """Write a student as a file for other programs; it takes and returns 8-bit frames."""
    require(config.output.name not in ("", ".."), f"-o {config.output}: name a file")
    suffixes = {"onnx": ".onnx", "openvino": ".xml"}
    suffix = suffixes[config.format]
    path = config.output
    for other, its_suffix in suffixes.items():
        is_wrong = other != config.format and path.suffix.lower() == its_suffix
        require(not is_wrong, f"-o {path}: is a name for another format; add --format {other}")
    require_packages([config.format], f"export --format {config.format}")
    student, _ = load_student(config.checkpoint)
    if not path.suffix:
        path = path.with_name(path.name + suffix)
    is_right = path.suffix.lower() == suffix
    require(is_right, f"-o {path}: a name for --format {config.format} ends in {suffix}")
    if config.format == "openvino":
        path = path.with_suffix(suffix)  # it takes no .XML
    require_writable(path)
    network = FrameNetwork(student).eval()
    if config.format == "onnx":
        content = onnx_bytes(network)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    else:
        save_openvino(openvino_model(network), path)
    print(path)
    sides = f"sides multiples of {student.alignment}"
    print(f"frames (N, H, W, 3) in and out are 8-bit RGB, {sides}")
    print("`sharpen` also continues frames at their borders (class FrameSharpener); this does not")


def save_openvino(model, path: Path) -> None:
    """Write an OpenVINO model's .xml and the .bin beside it, which `save_model` writes together."""
    openvino = importlib.import_module("openvino")
    # The two temporary names differ in their endings only, and `save_model` writes both.
    with replacing(path) as temporary, replacing(path.with_suffix(".bin")) as weights:
        openvino.save_model(model, temporary, compress_to_fp16=False)
        require(weights.exists(), f"{path}: OpenVINO wrote no {weights.name}")


# --- Command: fps ---------------------------------------------------------------------------------

FPS_SIZES = ((512, 512), (720, 1280), (1080, 1920))  # height and width
YARDSTICK = "plain layers"  # six plain 24-channel layers at half the resolution


def measure_fps(config: FpsConfig) -> None:
    """Milliseconds a frame of 512x512, 1280x720 and 1920x1080, by one backend or several."""
    if config.clip:
        measure_clip(config)
        return
    require(not config.size, "--size: is for --clip")
    if config.plot:
        drawn = config.plot.suffix.lower() in (".png", ".jpg", ".pdf", ".svg")
        require(drawn, f"--plot {config.plot}: name a .png, .jpg, .pdf or .svg file")
        require_packages(["matplotlib"], "--plot")
        quality_pairs(config)  # UserError now for what it would not find after the timing
    require_writable(config.json, config.plot)
    device = pick_device(config)
    backends = fps_backends(config, device)
    students = fps_students(config)
    for name, student in students.items():
        count = sum(p.numel() for p in student.parameters())
        macs = multiply_adds_per_pixel(student)
        print(f"{name}: {count:,} parameters, {macs:,.0f} multiply-adds a pixel")
    print(f"{device}, {torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}")
    best = best_convolution(pick_precision(config.precision, device), device, config)
    print(FPS_HEADER)
    rows = []
    for backend in backends:
        for row in fps_rows(students, backend, device, config, best):
            print_fps_row(row)
            rows.append(row)
    if config.json:
        write_json({"rows": rows}, config.json)
    if config.plot:
        del students[YARDSTICK]
        draw_quality(config, students, backends, device)


def fps_students(config: FpsConfig) -> dict[str, Student]:
    """The networks to time, by name; the yardstick first."""
    students: dict[str, Student] = {YARDSTICK: PlainStack(stem_stride=2, width=24, layers=6)}
    if config.base_channels:
        large_enough = config.base_channels >= 4
        require(large_enough, f"--base-channels {config.base_channels}: at least 4")
        name = f"c={config.base_channels} r={config.stem_stride}"
        students[name] = StudentUNet(config.base_channels, config.stem_stride)
        return students
    for checkpoint in config.checkpoint:
        name = Path(checkpoint).stem
        twice = "--checkpoint: two files of one name, by which the table tells them apart"
        require(name not in students, f"{twice}; rename one")
        students[name], _ = load_student(checkpoint)
    return students


def fps_backends(config: FpsConfig, device: torch.device) -> Sequence[str]:
    """The given backends, which must all be able to run, or those that are installed."""
    for backend in config.backend:
        require_backend(backend, device)
    if config.backend:
        return config.backend
    if device.type != "cpu":
        return ["torch"]
    installed = []
    for backend, packages in BACKENDS.items():
        slow_to_start = backend == "compile"  # minutes for a checkpoint and a size
        if not slow_to_start and all(importlib.util.find_spec(p) for p in packages):
            installed.append(backend)
    return installed


FPS_HEADER = (
    "network       backend       precision  frame             network  8-bit to 8-bit, ms     95 %"
    "    FPS  GFLOP/s  of best  x plain"
)


def print_fps_row(row: dict) -> None:
    size = f"{row['width']}x{row['height']}{' tiled' if row['tiled'] else ''}"
    print(
        f"{row['checkpoint']:<14}{row['backend']:<14}{row['precision']:<11}{size:<16}"
        f"{row['network_ms']:>9.1f}{row['frame_ms']:>21.1f}{row['frame_ms_p95']:>9.1f}"
        f"{row['fps']:>7.1f}{row['gflops']:>9.0f}{row['gflops'] / row['best_gflops']:>9.0%}"
        f"{row['frame_ms'] / row['plain_ms']:>9.2f}",
        flush=True,
    )


@dataclass
class Timing:
    """Milliseconds of a function."""

    median: float
    late: float  # 95th percentile


@torch.inference_mode()
def time_in_turns(
    functions: dict[object, Callable[[], object]], device: torch.device, config: FpsConfig
) -> dict[object, Timing]:
    """The timing of each function. They take turns, so that whatever else the machine does slows
    all of them alike; a call begins and ends when the accelerator is idle."""
    milliseconds = {key: [] for key in functions}
    for turn in range(config.warmup + config.frames):
        for key, function in functions.items():
            synchronise(device)
            start = time.perf_counter()
            function()
            synchronise(device)
            if turn >= config.warmup:
                milliseconds[key].append(1000 * (time.perf_counter() - start))
    timings = {}
    for key, values in milliseconds.items():
        median, late = np.percentile(values, (50, 95))
        timings[key] = Timing(float(median), float(late))
    return timings


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


@dataclass
class Convolution:
    """A 3x3 convolution in PyTorch, to be timed; the fastest says what arithmetic could reach."""

    run: Callable[[], Tensor]
    operations: int

    def gflops(self, milliseconds: float) -> float:
        return self.operations / milliseconds / 1e6


def best_convolution(
    precision: torch.dtype, device: torch.device, config: FpsConfig
) -> Convolution:
    """Of five widths, on maps of 270x480, the one with the most operations a second; prints all."""
    candidates = {}
    for width in (16, 24, 32, 64, 128):
        layer = nn.Conv2d(width, width, 3, padding=1).to(device, precision)
        layer = layer.to(memory_format=torch.channels_last)
        maps = torch.rand(1, width, 270, 480, device=device, dtype=precision)
        maps = maps.to(memory_format=torch.channels_last)
        run = functools.partial(layer, maps)
        candidates[width] = Convolution(run, 2 * 9 * width**2 * 270 * 480)
    timings = time_in_turns({width: c.run for width, c in candidates.items()}, device, config)
    speeds = {width: c.gflops(timings[width].median) for width, c in candidates.items()}
    shown = ", ".join(f"{speed:.0f} ({width} wide)" for width, speed in speeds.items())
    print(f"PyTorch's 3x3 convolutions in {precision}: {shown} GFLOP/s")
    return candidates[max(speeds, key=speeds.get)]


@dataclass
class Contestant:
    """A network as `fps` times it: whole frames, or tiles of about this many pixels."""

    name: str
    student: Student
    tile: int
    sharpener: FrameSharpener

    def on_frames(self, frames: list[np.ndarray]) -> Callable[[], np.ndarray]:
        """The whole path from 8 bits to 8 bits, on these frames in turn."""
        turns = itertools.cycle(frames)
        return lambda: self.sharpener(next(turns))

    def network_alone(self, frame: np.ndarray) -> Callable[[], None]:
        """The network on all tiles of a frame, without cutting and joining."""
        sharpener = self.sharpener
        padded, spans = sharpener.cut(frame)
        tiles = [padded[None, row.taken, column.taken] for row, column in spans]

        def run() -> None:
            for tile in tiles:
                sharpener.engine(tile)

        return run

    def is_cut(self, frame: np.ndarray) -> bool:
        """Whether this frame takes several tiles."""
        return len(self.sharpener.cut(frame)[1]) > 1


def contestants_of(
    students: dict[str, Student], backend: str, device: torch.device, config: FpsConfig
) -> list[Contestant]:
    """Every network for whole frames, and in tiles where --tile is smaller than a frame."""
    tiles = [0]
    if 0 < config.tile < max(max(size) for size in FPS_SIZES):
        tiles.append(config.tile)
    contestants = []
    for name, student in students.items():
        own_tiles = [0] if name == YARDSTICK else tiles
        for tile in own_tiles:
            sharpener = timed_sharpener(student, tile, backend, device, config)
            contestants.append(Contestant(name, student, tile, sharpener))
    return contestants


def timed_sharpener(
    student: Student, tile: int, backend: str, device: torch.device, config: FpsConfig
) -> FrameSharpener:
    """A student as `fps` is to time it."""
    return FrameSharpener(
        student,
        device,
        tile=tile,
        overlap=config.overlap,
        precision=config.precision,
        backend=backend,
    )


def fps_rows(
    students: dict[str, Student],
    backend: str,
    device: torch.device,
    config: FpsConfig,
    best: Convolution,
) -> Iterator[dict]:
    """A row of the table for each size and contestant; the yardstick comes first."""
    precision = str(pick_precision(config.precision, device)).removeprefix("torch.")
    if backend == "openvino-int8":
        precision = "int8"
    setting = {
        "backend": backend,
        "precision": precision,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }
    contestants = contestants_of(students, backend, device, config)
    for height, width in FPS_SIZES:
        frames = sample_frames(height, width)
        racing = [c for c in contestants if not c.tile or c.is_cut(frames[0])]
        race = race_on(frames, racing, best, device, config)
        yardsticks = {
            "plain_ms": race[0, "frame"].median,
            "best_gflops": best.gflops(race["best convolution"].median),
        }
        for number, contestant in enumerate(racing):
            size = {"height": height, "width": width, "tiled": contestant.tile > 0}
            macs = multiply_adds_per_pixel(contestant.student)
            speed = speeds(race[number, "network"], race[number, "frame"], macs, height * width)
            yield {"checkpoint": contestant.name} | setting | size | speed | yardsticks


def speeds(network: Timing, frame: Timing, macs: float, pixels: int) -> dict[str, float]:
    """What `fps` prints of a network of `macs` multiply-adds a pixel."""
    return {
        "network_ms": network.median,
        "frame_ms": frame.median,
        "frame_ms_p95": frame.late,
        "fps": 1000 / frame.median,
        "macs_per_pixel": macs,
        "gflops": 2 * macs * pixels / network.median / 1e6,
    }


def race_on(
    frames: list[np.ndarray],
    racing: Sequence[Contestant],
    best: Convolution,
    device: torch.device,
    config: FpsConfig,
) -> dict[object, Timing]:
    """Timings on frames of one size: {(number, "network" or "frame"): of a contestant, ...}."""
    functions: dict[object, Callable[[], object]] = {}
    for number, contestant in enumerate(racing):
        functions[number, "network"] = contestant.network_alone(frames[0])
        functions[number, "frame"] = contestant.on_frames(frames)
    functions["best convolution"] = best.run
    # PyTorch's threads slow down the OpenVINO call that comes next. The convolution runs in
    # PyTorch; so a call whose time is not shown follows it.
    functions["not shown"] = functions[0, "network"]
    return time_in_turns(functions, device, config)


@functools.lru_cache  # every backend asks again
def multiply_adds_per_pixel(student: Student) -> float:
    """Multiply-adds of the convolutions for each pixel of a large frame."""
    side = 16 * student.alignment
    stride = student.stem_stride
    folded = torch.empty(1, 3 * stride**2, side // stride, side // stride, device="meta")
    on_meta = copy.deepcopy(student).to("meta")
    with FlopCounterMode(display=False) as counter:
        on_meta.output(on_meta.features(folded).last)
    return counter.get_total_flops() / 2 / side**2


def sample_frames(height: int, width: int) -> list[np.ndarray]:
    """Three of scikit-image's photographs at this size, blurred by the x2 protocol."""
    frames = []
    for pair in embedded_pairs():
        if pair.sharp.stem in ("astronaut", "coffee", "chelsea"):
            sharp = even_sized(ImageOps.fit(open_picture(pair.sharp), (width, height)))
            frames.append(np.array(degrade(sharp, PROTOCOLS["x2"])))
    return frames


def measure_clip(config: FpsConfig) -> None:
    """Frames a second of `sharpen` on a clip, by every student and backend."""
    require_packages(["av"], "--clip")
    require(config.clip.exists(), f"--clip {config.clip}: no such file")
    is_file = config.clip.is_file() and is_clip(config.clip)
    require(is_file, f"--clip {config.clip}: no clip's file ({' '.join(CLIP_SUFFIXES)})")
    clip_size(config.size)  # UserError now for a size of another form
    require(not config.plot, "--clip, --plot: the plot is of single frames")
    require_writable(config.json)
    device = pick_device(config)
    backends = fps_backends(config, device)
    students = fps_students(config)
    del students[YARDSTICK]
    print(f"{device}, {torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}")
    rows = []
    for row in clip_rows(students, backends, device, config):
        size = f"{row['width']}x{row['height']}"
        named = f"{row['checkpoint']:<14}{row['backend']:<14}{size:<12}"
        print(f"{named}{row['frames']:>6} frames, {row['fps']:>6.1f} a second", flush=True)
        rows.append(row)
    if config.json:
        write_json({"rows": rows}, config.json)


def clip_rows(
    students: dict[str, Student], backends: Sequence[str], device: torch.device, config: FpsConfig
) -> Iterator[dict]:
    """A row for each student and backend: frames a second of `sharpen` on a clip.

    The clip's first frame is sharpened before, so that nothing is compiled while time is taken.
    """
    size = clip_size(config.size)
    (first,) = clip_frames(config.clip, slice(0, 1))
    if size:
        first = window_sized(first, size)
    height, width = first.shape[:2]
    for backend in backends:
        for name, student in students.items():
            sharpener = timed_sharpener(student, config.tile, backend, device, config)
            sharpener(first)
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                target = Path(folder, f"sharpened{clip_suffix(config.clip, lossless=False)}")
                frames = ClipSharpener(sharpener, size)(config.clip, target)
                seconds = time.perf_counter() - start
            yield {
                "checkpoint": name,
                "backend": backend,
                "clip": str(config.clip),
                "height": height,
                "width": width,
                "frames": frames,
                "fps": frames / seconds,
            }


def draw_quality(
    config: FpsConfig, students: dict[str, Student], backends: Sequence[str], device: torch.device
) -> None:
    """`--plot`: PSNR and SSIM at x2 against the milliseconds of a 1280x720 frame, also printed."""
    pairs, others = quality_pairs(config)
    mask = best_unsharp_mask([pair.load() for pair in others])
    methods: dict[str, FrameFunction] = {"input": lambda frame: frame, "unsharp mask": mask}
    for (name, student), backend in itertools.product(students.items(), backends):
        methods[f"{name}, {backend}"] = FrameSharpener(
            student, device, precision=config.precision, backend=backend
        )
    frame = sample_frames(720, 1280)[0]
    calls = {label: functools.partial(method, frame) for label, method in methods.items()}
    timings = time_in_turns(calls, device, config)
    frames = [pair.load() for pair in pairs]
    points = {}
    for label, method in methods.items():
        milliseconds = timings[label].median
        means = score_method(method, frames)
        points[label] = (milliseconds, means)
        result = f"{format_scores(means)} at x2, {len(frames)} pictures"
        print(f"{label:<24}{milliseconds:>7.1f} ms   {result}", flush=True)
    plot_quality(config.plot, points)


def quality_pairs(config: FpsConfig) -> tuple[list[Pair], list[Pair]]:
    """(pairs at x2 to score on, others to tune the unsharp mask on)."""
    if config.data_root is None:
        embedded = grouped(embedded_pairs(), lambda pair: pair.key in EMBEDDED_HELD_OUT)
        return embedded[True], embedded[False]
    x2 = PROTOCOLS["x2"]
    test = find_sharp(config.data_root / "test", x2)
    training = find_sharp(config.data_root / "train", x2)
    _, held_out = hold_out(training, RunConfig.validation_fraction)
    return test, held_out or training


def best_unsharp_mask(frames: Sequence[tuple[np.ndarray, np.ndarray]]) -> FrameFunction:
    """The mask with the best PSNR on these (blurred, sharp) frames."""
    best_psnr = -math.inf
    for radius, percent in itertools.product((0.5, 1, 1.5, 2, 3), (25, 50, 100, 150)):
        mask = unsharp_mask(radius, percent)
        psnr = mean_psnr([frame_psnr(mask(blurred), sharp) for blurred, sharp in frames])
        if psnr > best_psnr:
            best_psnr = psnr
            best = mask
            chosen = f"radius {radius:g}, {percent} %"
    print(f"unsharp mask: {chosen} is best on {len(frames)} other pictures")
    return best


def unsharp_mask(radius: float, percent: int) -> FrameFunction:
    """Pillow's, as a function of frames: what a photo editor offers."""
    mask = ImageFilter.UnsharpMask(radius, percent, threshold=0)
    return lambda frame: np.array(Image.fromarray(frame).filter(mask))


# --- Plots ----------------------------------------------------------------------------------------


MOST_INSIDE = 8  # names in a panel; more would hide the points
BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1), "fontsize": "small"}


def plot(path: Path, panels: list[tuple[dict, dict[str, tuple]]]) -> None:
    """Panels of ({"title": ..., more settings}, {label: (x, y, style)}) as a picture file.

    Where matplotlib is missing it says so: a training run must not fail for its curves.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: `pip install matplotlib` would draw it")
        return
    rows = 1 if len(panels) <= 3 else 2
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(5.5 * columns, 4 * rows), layout="constrained")
    for number, (settings, curves) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.grid(alpha=0.3)
        for label, (x, y, style) in curves.items():
            axes.plot(x, y, style, label=label, lw=0.8)
        axes.set(**settings)
        axes.legend(**(BESIDE if len(curves) > MOST_INSIDE else {}))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


MOST_POINTS = 200  # of a loss term's curve, about


def plot_curves(run: TrainingRun) -> None:
    """curves.png: the loss terms, the held-out scores and the learning rate of a run."""
    if not run.rows:
        return
    every = max(1, len(run.rows) // MOST_POINTS)  # single steps would hide the course
    terms = {name: term_curve(run.rows, name, every) for name in run.objective.loss.lambdas}
    title = "weighted loss terms"
    if every > 1:
        title += f", means of {every} steps"
    panels = [({"title": title, "xlabel": "step", "yscale": "log"}, terms)]
    for metric in METRICS:
        scored = [row for row in run.rows if f"val_{metric}" in row]
        at = [row["step"] for row in scored]
        scores = [row[f"val_{metric}"] for row in scored]
        unit = " in dB" if metric == "psnr" else ""
        settings = {"title": f"held-out {metric.upper()}{unit}", "xlabel": "step"}
        panels.append((settings, {"averaged weights": (at, scores, ".-")}))
    rates = rate_curves(run.rows, run.config.restart_epochs)
    panels.append(({"title": "learning rate", "xlabel": "step"}, rates))
    plot(run.config.run_dir / "curves.png", panels)


def term_curve(rows: list[dict], name: str, every: int) -> tuple:
    """(steps, means, style) of a loss term over every so many steps.

    A run that was resumed with another term has none of it in its first rows.
    """
    having = [row for row in rows if row.get(name) is not None]
    steps = []
    means = []
    for start in range(0, len(having), every):
        some = having[start : start + every]
        steps.append(some[-1]["step"])
        means.append(statistics.fmean(row[name] for row in some))
    return steps, means, "-"


def rate_curves(rows: list[dict], restart_epochs: int) -> dict[str, tuple]:
    """The learning rate over the steps, and a mark where each cycle but the first begins."""
    restarts = []
    cycle = restart_epochs
    end = cycle
    for row in rows:
        if row["epoch"] >= end:
            restarts.append(row)
            cycle *= 2
            end += cycle
    curves = {}
    for label, some, style in (("Adam", rows, "-"), ("restart", restarts, "^")):
        if some:
            steps = [row["step"] for row in some]
            curves[label] = (steps, [row["learning_rate"] for row in some], style)
    return curves


def plot_ablation(path: Path, variants: list[Variant]) -> None:
    """A point for each run, a bar for their mean."""
    panels = []
    for where in ("held_out", "test"):
        curves = {}
        means = []
        names = []
        for variant in reversed(variants):
            psnrs = [scores["psnr"] for scores in getattr(variant, where)]
            if psnrs:
                curves[variant.name] = (psnrs, [variant.name] * len(psnrs), "o")
                means.append(statistics.fmean(psnrs))
                names.append(variant.name)
        curves["mean"] = (means, names, "k|")
        if names:
            panels.append(({"title": f"{where.replace('_', ' ')}, x2, PSNR in dB"}, curves))
    plot(path, panels)


def plot_quality(path: Path, points: dict[str, tuple[float, dict[str, float]]]) -> None:
    """Each metric against milliseconds."""
    markers = itertools.cycle("os^vDPX")
    styles = dict(zip(points, markers, strict=False))
    panels = []
    for metric in METRICS:
        settings = {"title": f"{metric.upper()} at x2", "xlabel": "ms for a 1280x720 frame"}
        curves = {
            label: (ms, means[metric], styles[label]) for label, (ms, means) in points.items()
        }
        panels.append((settings, curves))
    plot(path, panels)


# --- Command line: from the arguments to one of those commands ------------------------------------

COMMANDS: dict[str, Callable] = {
    "sharpen": sharpen,
    "train": train,
    "eval": evaluate,
    "fps": measure_fps,
    "prepare": prepare,
    "teacher": train_teacher,
    "ablate": ablate,
    "export": export,
}


def resolve_config(config_class: type, given: dict[str, object]) -> object:
    """The command's settings: given flags, else a resumed run's or a preset's, else defaults."""
    if given.get("resume"):
        return resumed_config(config_class, given)
    if issubclass(config_class, TrainConfig):
        return preset_config(config_class, given)
    return config_class(**given)


def preset_config(config_class: type[TrainConfig], given: dict[str, object]) -> TrainConfig:
    """Given flags over a preset's settings; without a dataset the preset is the demo."""
    no_dataset = "data_root" not in given and not list_pictures(DATASET / "train")
    preset = given.get("preset") or ("demo" if no_dataset else "report")
    settings = dict(PRESETS[preset].settings)
    if config_class is AblateConfig:
        settings.pop("run_dir", None)  # it has a folder of its own
    if given.keys() & {"network", "base_channels", "widths"}:
        # The user's student has another shape, which these settings of the preset would not fit.
        for name in ("widths", "convolutions", "skips", "init"):
            settings.pop(name, None)
    one_cycle = settings.get("restart_epochs") == settings.get("epochs") is not None
    if one_cycle and "epochs" in given:
        settings["restart_epochs"] = given["epochs"]  # so that the rate falls to the end as before
    config = config_class(**(settings | given | {"preset": preset}))
    require_used(config, given)
    return config


def require_used(config: TrainConfig, given: dict[str, object]) -> None:
    """UserError for a given flag about a student's shape that this student would not have."""
    unused = {"luma", "skips", "base_channels"} if config.network == "plain" else set()
    if config.widths:
        unused.add("base_channels")
    for name, value in given.items():
        is_asked_for = bool(value)  # --no-luma asks for nothing
        if is_asked_for and name in unused:
            raise UserError(f"--{name.replace('_', '-')}: not used by this student; leave it out")


def resumed_config(config_class: type[RunConfig], given: dict[str, object]) -> RunConfig:
    """Given flags over the settings that a run was begun with, in the folder where it is now."""
    run_dir = given.get("run_dir")
    if run_dir is None:
        settings = config_class()
        if config_class is TrainConfig:  # presets have folders of their own
            settings = preset_config(config_class, given)
        run_dir = settings.run_dir
    file = run_dir / "last.pth"
    last = read_checkpoint(file, RESTART)
    try:
        saved = checked_settings(config_class, last["config"])
    except (IndexError, KeyError, TypeError, ValueError) as error:
        wrong = f"{file}: another command's run, or an older one's ({error})"
        raise UserError(f"{wrong}; {RESTART}") from error
    return config_class(**(saved | given | {"run_dir": run_dir}))


def checked_settings(config_class: type[RunConfig], saved: dict[str, object]) -> dict[str, object]:
    """A run's saved settings, read again as if they had been given as flags.

    KeyError, TypeError or UserError for what no command line could have given.
    """
    (command,) = [name for name, each in CONFIGS.items() if each is config_class]
    arguments = [command]
    left_out = {}  # what no flag can say
    for item in dataclasses.fields(config_class):
        if item.name in FLAGS_OF_ONE_START:
            continue
        value = saved[item.name]
        may_be_none = type(None) in typing.get_args(item.type)
        if value in ((), "") or (value is None and may_be_none):
            left_out[item.name] = value
            continue
        values = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(each, int | float | str) for each in values):
            raise TypeError(f"{flag_of(item)} is {value}")
        arguments += arguments_of(item, value)
    given = parse_command_line(arguments)
    names = {item.name for item in dataclasses.fields(config_class)}
    return left_out | {name: value for name, value in given.items() if name in names}


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory.

    By default it returns large blocks to the system, and the system clears them before it gives
    them out again. That takes a tenth of a frame's or a step's time.
    """
    with contextlib.suppress(AttributeError, TypeError):  # another C library, or another system
        mallopt = ctypes.CDLL(None).mallopt
        m_mmap_max = -4
        m_trim_threshold = -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    debug = False
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # Pillow logs what it raises, too
    for stream in (sys.stdout, sys.stderr):  # which may be unable to show a file's name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        given = parse_command_line(arguments)
        command = given.pop("command")
        debug = given.pop("debug")
        keep_freed_memory()
        COMMANDS[command](resolve_config(CONFIGS[command], given))
    except (UserError, OSError, torch.OutOfMemoryError, MemoryError) as error:
        if debug:
            raise
        print_error(error)
        return 2
    except RuntimeError as error:
        if debug or "can't allocate memory" not in str(error):  # PyTorch's words, on a CPU
            raise
        print_error(UserError("there is not enough memory for this"))
        return 2
    except ModuleNotFoundError as error:  # a package that an optional package needs
        if debug:
            raise
        print_error(UserError(f"{error.name} is not installed: pip install {error.name}"))
        return 2
    except KeyboardInterrupt:
        print("sharpen_kd: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
