"""sharpen_kd: distil a Restormer teacher into a student that sharpens video-call frames.

    python sharpen_kd.py train                       # GoPro_dataset/, or scikit-image's pictures
    python sharpen_kd.py eval --checkpoint CK        # PSNR and SSIM, for each category
    python sharpen_kd.py fps                         # milliseconds a frame, 512x512 to 1080p
    python sharpen_kd.py sharpen input.png           # also folders; any size, any Pillow format

`prepare` makes blurred/sharp pairs from sharp pictures, and `teacher` trains a compact Restormer where the
published weights do not suit the blur. Every flag is in `python sharpen_kd.py COMMAND --help`.

Pictures blurred at x2 (27.75 dB / 0.8605) become 29.82 dB / 0.9053 by model_checkpoints/student.pth and 29.13 dB /
0.8959 by student_fast.pth; in OpenVINO's int8 a 720p frame takes 56 and 20 ms on two cores of an AMD EPYC (AVX2).
"""

import argparse
import collections
import contextlib
import copy
import csv
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import struct
import sys
import time
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from einops import rearrange
from PIL import Image, ImageCms, ImageDraw, ImageFilter, ImageOps
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as TF
from tqdm import tqdm

from Restormer.basicsr.models.archs.restormer_arch import StemmedRestormer, restormer_dimensions

HERE = Path(__file__).resolve().parent
DATASET = HERE / "GoPro_dataset"
SAMPLES = HERE / "inference_samples"
OFFICIAL_TEACHER = HERE / "Restormer/Motion_Deblurring/pretrained_models/motion_deblurring.pth"
COMPACT_TEACHER = HERE / "model_checkpoints/teacher.pth"
SHIPPED = {"quality": HERE / "model_checkpoints/student.pth", "fast": HERE / "model_checkpoints/student_fast.pth"}
TILE = 2048  # pixels; one takes a 1080p frame whole, a 4K frame's hold a thirtieth more than it
SKIPS = ("concatenate", "add", "lateral")
BACKENDS = {"torch": "torch", "compile": "torch", "openvino": "openvino", "openvino-int8": "nncf openvino"}  # packages
FPS_SIZES = ((512, 512), (720, 1280), (1080, 1920))
RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun numbers them
FrameFunction = Callable[[np.ndarray], np.ndarray]  # 8-bit RGB (H, W, 3) in and out
Runner = Callable[..., Callable[[], np.ndarray]]  # starts a network; what it returns waits for the result

# --- Configuration: one dataclass a command; its fields are the command's flags (see `build_parser`) ------------------


class UserError(ValueError):
    """What the user can mend: one line that names the file or flag and the remedy, exit status 2."""


def require(condition: object, message: str) -> None:
    """UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def flag(default: object, text: str, at_least: float | None = None, above: float | None = None, **options):
    """A dataclass field that is also a command-line flag, with its meaning, bounds and argparse options."""
    return field(default=default, metadata={"bounds": (at_least, above), "options": {"help": text, **options}})


@dataclass
class DeviceConfig:
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps", "xpu"))
    threads: int = flag(0, "CPU threads; 0 leaves PyTorch's choice", at_least=0)
    precision: str = flag("auto", "auto: bf16 where it is native, else float32", choices=("auto", "float32", "bf16"))


@dataclass
class PrepareConfig:
    sharp_dir: Path = flag(Path(), "folder of sharp pictures; its sub-folders are categories", nargs=None)
    split: str = flag("train", "which half of the dataset to write", choices=("train", "test"))
    data_root: Path = flag(DATASET, "dataset folder to write into")
    scale: tuple[float, ...] = flag((2.0,), "down-scaling factors; each picture draws one", at_least=1)
    extra_blur: float = flag(0.0, "largest sigma of an extra Gaussian blur, drawn from 0 to this", at_least=0)
    seed: int = flag(0, "seed of the draws", at_least=0)


@dataclass
class FitConfig(DeviceConfig):  # what every training run needs, of the student or of the teacher
    data_root: Path | None = flag(DATASET, "dataset folder, with train/ in it")  # None: scikit-image's own pictures
    run_dir: Path = flag(HERE / "model_checkpoints/run", "folder for last.pth, best.pth and log.csv")
    resume: bool = flag(False, "continue the run in --run-dir with its settings (ablate: always, with those given)")
    overwrite: bool = flag(False, "start anew in a --run-dir that holds a run already")
    init: Path | None = flag(None, "checkpoint whose weights the run starts from")
    epochs: int = flag(50, "passes over the training pairs", at_least=1)
    max_steps: int = flag(0, "stop after this many optimiser steps; 0 for no limit", at_least=0)
    image_size: int = flag(512, "side of the random training crop in pixels, a multiple of 16", at_least=16)
    batch_size: int = flag(1, "crops a forward pass, for each process", at_least=1)
    gradient_accumulation_steps: int = flag(4, "forward passes an optimiser step", at_least=1)
    learning_rate: float = flag(2e-4, "Adam's peak learning rate", above=0)
    restart_epochs: int = flag(10, "T_0: epochs of the first cosine cycle; later ones double", at_least=1)
    min_learning_rate: float = flag(1e-6, "eta_min: where each cosine cycle ends", at_least=0)
    warmup_steps: int = flag(0, "steps over which the learning rate rises to its schedule", at_least=0)
    clip_norm: float = flag(1.0, "largest gradient norm; 0 for no clipping", at_least=0)
    ema_decay: float = flag(0.999, "decay of the averaged weights, reached after a warm-up", at_least=0)
    degradation: str = flag("pairs", "stored pairs, or sharp crops degraded anew", choices=("pairs", "x2", "mixed"))
    blur_probability: float = flag(1.0, "pairs: share of crops blurred further (3x3, sigma 0.1 to 2.0)", at_least=0)
    validation_fraction: float = flag(0.05, "share of the training pairs held out for validation", at_least=0)
    validate_every: int = flag(5, "epochs between validations", at_least=1)
    workers: int | None = flag(None, "loader processes (default: 2, or 0 on up to two CPU threads)", at_least=0)
    balance: bool = flag(False, "show every category as often as the largest, by repeating its pictures")
    cache: bool = flag(False, "decode every picture once and keep it in memory")
    seed: int = flag(0, "seed of the initial weights, order and crops", at_least=0)


@dataclass
class TrainConfig(FitConfig):
    base_channels: int = flag(256, "c of the stage widths c/4, c/2, c, 2c, 3c", at_least=8)
    stem_stride: int = flag(4, "space-to-depth factor before the first stage", choices=(1, 2, 4))
    widths: tuple[int, ...] = flag((), "two stage widths or more, instead of --base-channels")
    skips: str = flag("concatenate", "how a decoder stage takes its skip; the last is fastest", choices=SKIPS)
    convolutions: tuple[int, ...] = flag((2,), "3x3 convolutions a stage, or a number for each scale", at_least=1)
    expansion: int = flag(0, "rank of products added to 3x3 kernels in training, which speed it up", at_least=0)
    teacher_weights: Path | None = flag(None, "Restormer weight file (default: the official one)")
    lambda_reconstruction: float = flag(1.0, "weight of L1 to the sharp picture", at_least=0)
    lambda_perceptual: float = flag(0.01, "weight of VGG19 features against the teacher's output", at_least=0)
    lambda_feature: float = flag(1.0, "weight of L1 to the teacher's projected features", at_least=0)
    lambda_kl: float = flag(0.01, "weight of KL divergence to the teacher's soft output", at_least=0)
    lambda_ssim: float = flag(10.0, "weight of 1 - SSIM to the sharp picture", at_least=0)
    lambda_output: float = flag(0.0, "weight of L1 to the teacher's output, which the report has not", at_least=0)
    temperature: float = flag(4.0, "T of the soft outputs", above=0)
    teacher_cache: Path | None = flag(None, "folder for the teacher's results: computed once, then read")
    cache_variants: int = flag(4, "flips and degradations of each picture in the cache", at_least=1)
    log_gradients: int = flag(0, "log each term's share of the gradient every N steps; 0 for never", at_least=0)


@dataclass
class AblateConfig(TrainConfig):
    seeds: tuple[int, ...] = flag((0, 1, 2), "seeds of initial weights, order and crops; one run each", at_least=0)
    seed: int = 0  # no flags: it sets these three itself
    restart_epochs: int = 0
    validate_every: int = 0


@dataclass
class TeacherConfig(FitConfig):
    stem_stride: int = flag(2, "space-to-depth factor before the first level", choices=(1, 2, 4))
    dim: int = flag(24, "channels of the first level, an even number", at_least=2)
    num_blocks: tuple[int, ...] = flag((1, 2, 2, 3), "transformer blocks of the four levels", at_least=1)
    num_refinement_blocks: int = flag(2, "blocks of the last stage", at_least=1)
    heads: tuple[int, ...] = flag((1, 2, 4, 8), "attention heads of the four levels", at_least=1)
    ffn_expansion_factor: float = flag(2.0, "hidden width of the feed-forward layers", at_least=1)
    image_size: int = flag(128, "side of the random training crop in pixels, a multiple of 16", at_least=16)
    batch_size: int = flag(8, "crops a forward pass, for each process", at_least=1)
    gradient_accumulation_steps: int = flag(1, "forward passes an optimiser step", at_least=1)


@dataclass
class InferenceConfig(DeviceConfig):
    checkpoint: str = flag("quality", "quality, fast (both in model_checkpoints/), or a student checkpoint's file")
    backend: str = flag("torch", "what runs the student", choices=BACKENDS)
    tile: int = flag(TILE, "about the side of the tiles in pixels; 0 takes a picture whole", at_least=0)
    overlap: int | None = flag(None, "pixels that tiles share (default: by what the student sees)", at_least=0)


@dataclass
class SharpenConfig(InferenceConfig):
    inputs: tuple[Path, ...] = flag((), "pictures or folders", nargs="+")
    output: Path | None = flag(None, "file or folder (default: inference_samples/*_sharpened.png)", short=("-o",))
    strength: float = flag(1.0, "scale of the student's correction; 0 returns the input", at_least=0)


@dataclass
class EvalConfig(InferenceConfig):
    data_root: Path = flag(DATASET, "dataset folder")
    split: str = flag("test", "which half of the dataset to read", choices=("train", "test"))
    protocol: tuple[str, ...] = flag((), "degrade sharp pictures by these, read no blurred ones",
                                     choices=("x2", "x3", "x4", "x2-jpeg50", "sharp"))  # fmt: skip
    resize: int = flag(0, "first resize pairs to this square (the report: 512); 0: keep them whole", at_least=0)
    teacher: bool = flag(False, "score the teacher too")
    teacher_weights: Path | None = flag(None, "the teacher's weight file (default: as in train)")
    save_images: bool = flag(False, "write the student's pictures and a few side-by-side ones")
    output_dir: Path = flag(SAMPLES / "sharpened_test_outputs", "folder for scores.csv and the pictures")
    json: Path | None = flag(None, "write the averages to this file")


@dataclass
class FpsConfig(InferenceConfig):
    checkpoint: tuple[str, ...] = flag(("quality", "fast"), "students: quality, fast, or checkpoint files")
    backend: tuple[str, ...] = flag((), "what runs them (default: on a CPU all but compile)", choices=BACKENDS)
    base_channels: int = flag(0, "time an untrained student of this size instead (the report: 256)", at_least=0)
    stem_stride: int = flag(4, "its stem stride", choices=(1, 2, 4))
    warmup: int = flag(3, "frames before timing starts", at_least=0)
    frames: int = flag(20, "frames timed", at_least=1)
    json: Path | None = flag(None, "write the rows to this file")
    plot: Path | None = flag(None, "draw quality at x2 against milliseconds into this file")
    data_root: Path = flag(DATASET, "dataset folder whose test/ gives the quality (default: or the embedded sample)")


@dataclass
class ExportConfig:
    format: str = flag("onnx", "file format", choices=("onnx", "openvino"))
    checkpoint: str = flag("quality", "quality, fast, or a student checkpoint's file")
    output: Path = flag(HERE / "model_checkpoints/exported/student", "files to write, without ending", short=("-o",))


def keep_freed_memory() -> None:
    """glibc returns every freed map to the system, which clears it again for the next: a tenth of a frame or a step."""
    with contextlib.suppress(AttributeError, TypeError):  # another C library, or another system
        mallopt, m_mmap_max, m_trim_threshold = ctypes.CDLL(None).mallopt, -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def pick_device(config: DeviceConfig) -> torch.device:
    """The device a command computes on; `auto` takes an accelerator where PyTorch finds one."""
    if config.threads:
        torch.set_num_threads(config.threads)
    found = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    name = found if config.device == "auto" else config.device
    require(name in (found, "cpu"), f"--device {name}: PyTorch finds none here; use --device auto")
    if name == "cuda":
        rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        require(rank < count, f"torchrun --nproc_per_node: more processes than this machine's {count} GPUs")
        torch.cuda.set_device(rank)
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a network's arithmetic; `auto` is bf16 where the processor multiplies it natively."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.bfloat16 if name == "bf16" or (name == "auto" and native) else torch.float32


# --- Pictures and datasets --------------------------------------------------------------------------------------------

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".avif", ".jp2", ".tif", ".tiff",
                    ".tga", ".ppm", ".pgm"}  # fmt: skip
READABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises


def open_picture(path: Path) -> Image.Image:
    """The decoded picture at `path`, in its own mode; UserError if it cannot be read or holds floats above 1."""
    try:
        with Image.open(path) as image:
            image.load()
            if image.mode[0] in "IF":
                rgb_array(image)  # which checks the range
            return image
    except READABLE as error:
        raise UserError(f"{path}: not a readable picture ({error})") from error


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says; as it is where its EXIF is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except (*READABLE, struct.error):
        return image


def picture_size(path: Path) -> tuple[int, int] | None:
    """(width, height) from a file's header; None if that is unreadable."""
    with contextlib.suppress(*READABLE), Image.open(path) as image:
        return image.size


def rgb_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """RGB (H, W, 3), uint8 or else float32 in [0, 1], of a picture or an (H, W[, 1 to 4]) array; ValueError if none."""
    if isinstance(image, Image.Image):
        if image.mode[0] not in "IF":
            return np.array(image.convert("RGB"))
        image = np.asarray(image)
        if image.dtype.kind in "iu":  # 16-bit greyscale, which Pillow may widen to 32 bits
            image = image.clip(0, 65535).astype(np.uint16)
    if image.ndim not in (2, 3) or (image.ndim == 3 and not 1 <= image.shape[2] <= 4):
        raise ValueError(f"a picture has shape (H, W) or (H, W, 1 to 4), not {image.shape}")
    if image.dtype != np.uint8:
        image = image.astype(np.float32) / (65535 if image.dtype == np.uint16 else 1)
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError("pixels must be uint8, uint16, bool, or floats in [0, 1]")
    image = image.reshape(*image.shape[:2], -1)
    return image[..., :3] if image.shape[2] >= 3 else image[..., [0, 0, 0]]


def frame_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """`rgb_array` rounded to 8 bits, as frames are."""
    array = rgb_array(image)
    return array if array.dtype == np.uint8 else np.rint(array * 255).astype(np.uint8)


class CustomToTensor:
    """PIL image or array of any mode to a float RGB tensor (3, H, W) in [0, 1]."""

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        return TF.to_tensor(np.ascontiguousarray(rgb_array(image)))  # which divides 8-bit values by 255


@dataclass(frozen=True)
class Degradation:
    """What a poor call does to a picture: blurred, shrunk, enlarged again (both bicubic), compressed as JPEG."""

    scale: float = 2.0
    sigma: float = 0.0  # of a Gaussian blur before shrinking, in pixels
    quality: int = 0  # 0 is no JPEG
    early: bool = False  # compress the small picture, before it is enlarged

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Degradation":
        """One of the mixture to train on: x2 strong, every factor from 1.5 to 4, and untouched pictures."""
        if rng.random() < 0.08:
            return cls(scale=1)
        scale = 2.0 if rng.random() < 0.5 else rng.uniform(1.5, 4)
        sigma = rng.uniform(0.3, 1.2) if rng.random() < 0.1 else 0.0
        quality = int(rng.integers(30, 96)) if rng.random() < 0.2 else 0
        return cls(scale, sigma, quality, early=rng.random() < 0.5)

    def __call__(self, sharp: Image.Image) -> Image.Image:
        """The degraded copy of an 8-bit RGB picture, of the same size; the small size is rounded."""
        small = tuple(max(1, round(side / self.scale)) for side in sharp.size)
        image = sharp.filter(ImageFilter.GaussianBlur(self.sigma))
        for size, compress in ((small, self.early), (sharp.size, not self.early)):
            image = image.resize(size, Image.BICUBIC)
            if self.quality and compress:
                file = io.BytesIO()
                image.save(file, "JPEG", quality=self.quality)
                image = Image.open(file).convert("RGB")
        return image


# The degradations of the reported numbers; the xS protocol is also what `prepare` writes.
PROTOCOLS = {"x2": Degradation(2), "x3": Degradation(3), "x4": Degradation(4),
             "x2-jpeg50": Degradation(2, quality=50), "sharp": Degradation(1)}  # fmt: skip


def even_sized(image: Image.Image | np.ndarray) -> Image.Image:
    """8-bit RGB, cut to even width and height at the right and the bottom."""
    image = Image.fromarray(frame_array(image))
    return image.crop((0, 0, *(max(side - side % 2, 1) for side in image.size)))


@dataclass(frozen=True)
class Pair:
    """One training or test example. Without a blurred file, the sharp picture is degraded when it is read."""

    key: str  # relative path without extension, e.g. "text/page_003"
    sharp: Path
    blurred: Path | None = None
    degradation: Degradation = PROTOCOLS["x2"]

    @property
    def category(self) -> str:
        return self.key.split("/")[0] if "/" in self.key else "all"

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """(blurred, sharp), 8-bit RGB (H, W, 3); UserError for unreadable files, and for less than SSIM compares."""
        sharp = open_picture(self.sharp)
        if not self.blurred:
            sharp = even_sized(sharp)
        blurred = open_picture(self.blurred) if self.blurred else self.degradation(sharp)
        require(min(sharp.size) >= 7, f"{self.sharp}: SSIM needs at least 7x7 pixels")
        return frame_array(blurred), frame_array(sharp)


def list_pictures(folder: Path) -> list[Path]:
    """Every picture file below `folder` and the folders that it links to, sorted."""
    files = (Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(path for path in files if path.suffix.lower() in PICTURE_SUFFIXES)


# A file's side of a pair is a folder's name, wherever it stands; the rest is the pair's key: "text/a" for
# `blurred/text/a_blur.png`, "GOPR0372_07_00/000047" for GoPro's `GOPR0372_07_00/blur/000047.png` (not `blur_gamma`).
PAIR_FILE = re.compile(r"(|.*?/)(blurred|blur|sharp)/(.*?)(_blurred|_blur|_sharp)?", re.DOTALL)


def find_pairs(split_dir: Path, protocol: str = "") -> list[Pair]:
    """A folder's pairs by key, or with a `protocol` its sharp pictures, to be degraded. UserError for nothing, files
    without a partner, unequal sizes, unreadable files, two files for one side."""
    sides, problems = {"blurred": {}, "sharp": {}}, []
    names = {path: path.relative_to(split_dir).with_suffix("").as_posix() for path in list_pictures(split_dir)}
    matches = {path: PAIR_FILE.fullmatch(name) for path, name in names.items()}
    found = {path: ("sharp" if m[2] == "sharp" else "blurred", m[1] + m[3]) for path, m in matches.items() if m}
    if protocol and not found:  # all pictures are sharp ones
        found = {path: ("sharp", name) for path, name in names.items()}
    for path, (side, key) in found.items():
        if (other := sides[side].setdefault(key, path)) != path:
            problems.append(f"{path} and {other} are the {side} side of one pair")
    blurred, sharp = sides.values()
    if protocol:
        pairs = [Pair(key, path, degradation=PROTOCOLS[protocol]) for key, path in sorted(sharp.items())]
    else:
        problems += [f"{blurred[key]} has no sharp partner" for key in sorted(blurred.keys() - sharp.keys())]
        problems += [f"{sharp[key]} has no blurred partner" for key in sorted(sharp.keys() - blurred.keys())]
        pairs = [Pair(key, sharp[key], blurred[key]) for key in sorted(sharp.keys() & blurred.keys())]
        for pair in pairs:
            sizes = {path: picture_size(path) for path in (pair.blurred, pair.sharp)}
            problems += [f"{path} is unreadable" for path, size in sizes.items() if not size]
            if all(sizes.values()) and sizes[pair.blurred] != sizes[pair.sharp]:
                problems.append(f"{pair.blurred} has another size than {pair.sharp}")
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    require(not problems, "; ".join(problems[:5]) + more + ". Mend or remove them.")
    place = f"--data-root {split_dir.parent} --split {split_dir.name}"
    remedy = f"make them with `python sharpen_kd.py prepare FOLDER {place}`, or see README.md"
    require(pairs, f"{split_dir}: no blurred/sharp pairs; {remedy}")
    return pairs


def embedded_pairs() -> list[Pair]:
    """Pictures in scikit-image's wheel (sources: its data/README.txt), blurred when read; an error then if missing."""
    nature = ("coffee.png", "rocket.jpg", "moon.png", "grass.png", "gravel.png", "brick.png", "hubble_deep_field.jpg")
    names = {"animals": ("chelsea.png", "horse.png"), "people": ("astronaut.png", "camera.png"),
             "text": ("page.png", "text.png"), "nature": (*nature, "motorcycle_left.png")}  # fmt: skip
    paths = [(kind, Path(skimage.data.__file__).with_name(name)) for kind in names for name in names[kind]]
    return [Pair(f"{kind}/{path.stem}", path) for kind, path in paths]


def grouped(items: Iterable, key: Callable[[typing.Any], str]) -> dict[str, list]:
    """The items under their keys, both in the order of appearance."""
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def hold_out(pairs: list[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """(training, validation) pairs: GoPro's sequences whole, at least one unless `fraction` is 0."""
    groups = grouped(pairs, lambda pair: (re.search(r"GOPR\d+_\d+_\d+", pair.key) or [pair.key])[0])
    names, held = sorted(groups), []
    for index in np.random.default_rng(0).permutation(len(names))[:-1]:  # one draw for all runs, so that they compare
        held += groups[names[index]] if len(held) < fraction * len(pairs) else []
    return [pair for pair in pairs if pair not in held], held


def balanced(pairs: list[Pair]) -> list[Pair]:
    """Every category repeated to the size of the largest."""
    groups = grouped(pairs, lambda pair: pair.category).values()
    largest = max(map(len, groups))
    return [pair for group in groups for pair in itertools.islice(itertools.cycle(group), largest)]


class GoProSharpeningDataset(Dataset):
    """Blurred/sharp training crops as float RGB tensors, each (3, image_size, image_size).

    An item is drawn from (seed, epoch, index) alone, whatever the workers or interruptions. Crops start at even pixels:
    a frame enlarged by 2, and a student with a stem, repeat every two. "pairs" blurs the pair's own blur more; "x2" and
    "mixed" degrade the sharp crop anew. A student starts on "x2": from "mixed" alone it learns to do nothing."""

    def __init__(self, pairs: Sequence[Pair], image_size: int, blur_probability: float = 1.0,
                 seed: int = 0, cache: bool = False, degradation: str = "pairs") -> None:  # fmt: skip
        self.pairs, self.image_size, self.blur_probability, self.seed = pairs, image_size, blur_probability, seed
        self.degradation, self.to_tensor = degradation, CustomToTensor()
        if cache:  # from here on a look-up
            self.images = [self.images(index) for index in range(len(pairs))].__getitem__

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Tensor]:
        return {name: self.to_tensor(image) for name, image in self.crop(item).items()}

    def __getitems__(self, items: Sequence[tuple[int, int]]) -> list[dict[str, np.ndarray]]:
        """What a loader takes: (image_size, image_size, 3) in 8 bits, a quarter of the bytes to move."""
        return [self.crop(item) for item in items]

    def crop(self, item: int | tuple[int, int]) -> dict[str, np.ndarray]:
        """The item in 8 bits: {"blurred", "sharp"} of RGB (image_size, image_size, 3) each."""
        epoch, index = item if isinstance(item, tuple) else (0, item)
        images, rng = self.images(index), np.random.default_rng((self.seed, epoch, index))
        top, left = (2 * rng.integers((side - self.image_size) // 2 + 1) for side in images[0].shape[:2])
        return self.example([image[top:, left:][: self.image_size, : self.image_size] for image in images], rng)

    def images(self, index: int) -> list[np.ndarray]:
        """The pair's pictures, or the sharp one; enlarged where they are smaller than a crop."""
        pair = self.pairs[index]
        images = [*pair.load()] if self.degradation == "pairs" else [np.array(even_sized(open_picture(pair.sharp)))]
        if min(images[0].shape[:2]) >= self.image_size:
            return images
        return [np.array(ImageOps.cover(Image.fromarray(image), (self.image_size,) * 2)) for image in images]

    def example(self, images: Sequence[np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Flipped and blurred at random: {"blurred", "sharp"} of 8-bit RGB (H, W, 3) each."""
        if rng.random() < 0.5:
            images = [image[:, ::-1] for image in images]
        images = [np.ascontiguousarray(image) for image in images]
        if self.degradation != "pairs":
            degradation = PROTOCOLS["x2"] if self.degradation == "x2" else Degradation.draw(rng)
            images = [np.array(degradation(Image.fromarray(images[0]))), *images]
        blurred, sharp = images
        sigma = rng.uniform(0.1, 2.0)
        if self.degradation == "pairs" and rng.random() < self.blur_probability:
            planes = torch.from_numpy(blurred).permute(2, 0, 1)
            blurred = TF.gaussian_blur(planes, 3, sigma).permute(1, 2, 0).numpy()
        return {"blurred": blurred, "sharp": sharp}


def on_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """(B, C, H, W) floats, in channels_last, of a loader's (B, H, W, C), in which 8 bits stand for [0, 1]."""
    moved = {name: t.to(device, non_blocking=True).permute(0, 3, 1, 2) for name, t in batch.items()}
    return {name: t.float().div_(255) if t.dtype == torch.uint8 else t.float() for name, t in moved.items()}


def save_picture(image: Image.Image, path: Path) -> None:
    """Write with the metadata in `image.info`, to a temporary file that is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    kind = Image.registered_extensions()[path.suffix.lower()]
    best = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}.get(kind, {})
    try:
        image.save(temporary, format=kind, **image.info, **best)
        temporary.replace(path)
    except (OSError, ValueError) as error:
        hint = "; alpha needs .png, .webp or .tif" if image.mode in ("LA", "RGBA") else ""
        raise UserError(f"{path}: cannot be written ({error}){hint}") from error
    finally:
        temporary.unlink(missing_ok=True)


def plan_outputs(inputs: Sequence[Path], target: Callable[[Path], Path]) -> dict[Path, Path]:
    """{`target` of its path in its folder: picture} for files and folders; UserError for what cannot be written."""
    plan: dict[Path, Path] = {}
    for path in inputs:
        require(path.exists(), f"{path}: no such file or folder")
        folder, pictures = (path, list_pictures(path)) if path.is_dir() else (path.parent, [path])
        for source in pictures:
            file = target(source.relative_to(folder))
            first = plan.setdefault(file, source)
            require(first.samefile(source), f"{first} and {source} would both become {file}; rename one")
    require(plan, f"{inputs[0]}: no pictures in this folder")
    sources = {source.resolve() for source in plan.values()}
    for file in plan:
        require(file.resolve() not in sources, f"{file}: would be overwritten; choose another -o")
    return plan


def prepare(config: PrepareConfig) -> None:
    """Write blurred/sharp pairs of the xS protocol: shrink and enlarge each picture, both bicubic."""
    target = config.data_root / config.split
    inside = config.sharp_dir.resolve() in target.resolve().parents
    require(not inside, f"--data-root {config.data_root}: is in {config.sharp_dir}; choose another")
    require(not list_pictures(target), f"{target} holds pictures already; remove them or choose another --data-root")
    unfinished = target.with_name(f".{target.name}.unfinished")  # renamed once all pairs are in it
    plan = plan_outputs([config.sharp_dir], lambda name: unfinished / "sharp" / name.with_suffix(".png"))
    shutil.rmtree(unfinished, ignore_errors=True)
    rng = np.random.default_rng(config.seed)
    for file, source in tqdm(plan.items(), "prepare"):
        scale, sigma = rng.choice(config.scale), rng.uniform(0, config.extra_blur)
        sharp = even_sized(upright(open_picture(source)))
        save_picture(sharp, file)
        save_picture(Degradation(scale, sigma)(sharp), unfinished / "blurred" / file.relative_to(unfinished / "sharp"))
    find_pairs(unfinished)  # whose names may contradict each other
    target.mkdir(parents=True, exist_ok=True)
    for side in ("blurred", "sharp"):
        (unfinished / side).replace(target / side)
    unfinished.rmdir()
    print(f"{len(plan)} pairs in {target}")


# --- Teacher: a frozen Restormer, its features read by forward hooks --------------------------------------------------


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """(B, C, H, W) reflected at the right and the bottom to multiples of `multiple`; F.pad reflects once only."""
    if all(side % multiple == 0 for side in image.shape[-2:]):
        return image
    rows, columns = (np.pad(np.arange(side), (0, -side % multiple), "reflect") for side in image.shape[-2:])
    return image[..., torch.tensor(rows, device=image.device), :][..., torch.tensor(columns, device=image.device)]


def save_atomically(content: dict, path: Path) -> None:
    """Write to a temporary file and rename it: an interruption leaves the old file whole."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")  # processes may write the same file of a cache
    try:
        torch.save(content, temporary)
        temporary.replace(path)
    except RuntimeError as error:  # PyTorch's for a full disk or a folder that cannot be written into
        raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: Path, remedy: str) -> dict:
    """The dictionary in a PyTorch file, loaded without running code from it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except Exception as error:  # torch.load raises whatever a damaged archive happens to cause
        raise UserError(f"{path}: not a PyTorch weight file ({type(error).__name__}); {remedy}") from error
    require(isinstance(content, dict), f"{path}: holds no dictionary of weights; {remedy}")
    return content


def load_restormer(weights: Path | None) -> StemmedRestormer:
    """The RGB Restormer of a file, {"params": state dict} or a bare one, by default the official; UserError if none."""
    path = weights or OFFICIAL_TEACHER
    remedy = (f"get motion_deblurring.pth from the releases of github.com/swz30/Restormer and put it at "
              f"{OFFICIAL_TEACHER}, or name another file with --teacher-weights "
              f"({COMPACT_TEACHER.relative_to(HERE)} is a compact one)")  # fmt: skip
    content = read_checkpoint(path, remedy)
    state = content.get("params", content)
    try:
        dimensions = restormer_dimensions(state)
        restormer = StemmedRestormer(**dimensions)
        restormer.load_state_dict(state, strict=True)
    except (AttributeError, IndexError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: not the weights of a Restormer; {remedy}") from error
    if not dimensions["inp_channels"] == dimensions["out_channels"] == 3 * restormer.stem_stride**2:
        raise UserError(f"{path}: this Restormer does not map RGB to RGB; {remedy}")
    return restormer


class RestormerTeacherWrapper(nn.Module):
    """A frozen Restormer with feature taps and trainable 1x1 projections to the student's widths.

    `forward` restores (B, 3, H, W) of any size; `tapped` then holds features at 1/2, 1/4 and 1/8 of the folded size.
    AttributeError if a tap is missing: a hook that silently is not there would be a term that silently is 0."""

    TAPS: typing.ClassVar = {"e2": "encoder_level2", "e4": "encoder_level3", "b": "latent"}

    def __init__(self, restormer: StemmedRestormer, student_widths: dict[str, int] | None = None) -> None:
        super().__init__()
        self.restormer = restormer.requires_grad_(False).eval()
        self.alignment = 8 * restormer.stem_stride  # its multiples need no padding, and all feature grids begin there
        self.tapped: dict[str, Tensor] = {}
        for name, layer in self.TAPS.items():
            module = restormer.get_submodule(layer)
            module.register_forward_hook(lambda module, inputs, output, name=name: self.tapped.update({name: output}))
            if student_widths:
                width = module[0].norm1.body.weight.shape[0]
                self.add_module(f"proj_{name}", nn.Conv2d(width, student_widths[name], 1))

    def train(self, mode: bool = True) -> "RestormerTeacherWrapper":
        super().train(mode)
        self.restormer.eval()
        return self

    @torch.no_grad()
    def forward(self, blurred: Tensor) -> Tensor:
        height, width = blurred.shape[-2:]
        return self.restormer(pad_to_multiple(blurred, self.alignment))[..., :height, :width]

    def project(self, tapped: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tapped features, from this network or from a cache, at the student's widths."""
        return {name: self.get_submodule(f"proj_{name}")(tapped[name].float()) for name in self.TAPS}


class TeacherCache(Dataset):
    """Crops like `GoProSharpeningDataset`'s, with what the teacher made of the whole picture.

    A step with the teacher costs several without, so it runs once, over each picture in `variants` flips and blurs.
    A result is a file of half-precision (H, W, C) tensors, mapped into memory; crops start where the teacher's coarsest
    feature grid does. UserError for the cache of another teacher or data."""

    def __init__(self, folder: Path, dataset: GoProSharpeningDataset, teacher: RestormerTeacherWrapper,
                 variants: int, autocast: torch.autocast) -> None:  # fmt: skip
        self.folder, self.dataset, self.variants, self.alignment = folder, dataset, variants, teacher.alignment
        if dataset.image_size % self.alignment:
            raise UserError(f"--image-size {dataset.image_size}: the cache needs a multiple of {self.alignment}")
        settings = (variants, dataset.image_size, dataset.degradation, dataset.blur_probability)
        digest = hashlib.sha256(repr(settings).encode())
        for tensor in teacher.restormer.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        for path in (path for pair in dataset.pairs for path in (pair.sharp, pair.blurred) if path):
            digest.update(path.read_bytes())
        stamp = folder / "key"
        if not stamp.exists():  # it is written when all files are
            self.build(teacher, autocast)
            stamp.write_text(digest.hexdigest())
        elif stamp.read_text() != digest.hexdigest():
            raise UserError(f"--teacher-cache {folder} is another teacher's or other data's; remove it or name another")

    def file(self, index: int, variant: int) -> Path:
        return self.folder / f"{index:06}_{variant}.pt"

    def build(self, teacher: RestormerTeacherWrapper, autocast: torch.autocast) -> None:
        """Write every file; processes that train together share them out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        device = next(teacher.parameters()).device
        places = list(itertools.product(range(len(self.dataset.pairs)), range(self.variants)))[RANK::PROCESSES]
        for index, variant in tqdm(places, "teacher cache", disable=RANK > 0):
            rng = np.random.default_rng((variant, index))  # not the run's seed: runs of several seeds share a cache
            example = on_device(default_collate([self.dataset.example(self.dataset.images(index), rng)]), device)
            example = {name: pad_to_multiple(image, self.alignment) for name, image in example.items()}
            with autocast:
                example |= {"output": teacher(example["blurred"])} | teacher.tapped
            example = {name: t[0].permute(1, 2, 0).half().contiguous().cpu() for name, t in example.items()}
            save_atomically(example, self.file(index, variant))
        if PROCESSES > 1:
            dist.barrier()

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Tensor]:
        """{"blurred", "sharp", "output"} (size, size, 3) and the taps, all of one crop, in half precision."""
        (epoch, index), size = item, self.dataset.image_size
        rng = np.random.default_rng((self.dataset.seed, epoch, index))
        maps = torch.load(self.file(index, rng.integers(self.variants)), mmap=True, weights_only=True)
        height, width = maps["sharp"].shape[:2]
        top, left = (self.alignment * rng.integers((side - size) // self.alignment + 1) for side in (height, width))
        steps = {name: height // grid.shape[0] for name, grid in maps.items()}
        return {name: maps[name][top // n :, left // n :][: size // n, : size // n] for name, n in steps.items()}


# --- Student: a U-Net with squeeze-and-excitation, behind a space-to-depth stem ---------------------------------------


class SEBlock(nn.Module):
    """Squeeze-and-excitation gates (Hu et al., CVPR 2018): (B, C, H, W) to (B, C, 1, 1) in (0, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 8)
        self.squeeze, self.excite = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))[..., None, None]


LEAK = 0.1  # slope below zero. With plain ReLUs the deep stages die: 64 of 64 channels after 2,000 steps, and 0.08 dB


class Stage(nn.Module):
    """3x3 convolutions with leaky ReLUs, then a gate a channel: the SE block's, or (1, C, 1, 1) handed in. What comes
    from `below` is added to what the first convolution makes. Returns (the gated features, the gate or None)."""

    def __init__(self, in_channels: int, channels: int, convolutions: int = 2, stride: int = 1,
                 excited: bool = True) -> None:  # fmt: skip
        super().__init__()
        widths = itertools.pairwise((in_channels, *(channels,) * convolutions))
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in widths)
        self.layers[0].stride = (stride, stride)
        self.se = SEBlock(channels) if excited else None

    def forward(self, x: Tensor, gate: Tensor | None = None, below: Tensor | None = None):
        for layer in self.layers:
            x = layer(x) if below is None else layer(x).add_(below)
            x, below = F.leaky_relu_(x, LEAK), None
        gate = self.se(x) if self.se and gate is None else gate
        return x if gate is None else x * gate, gate

    def forward_in_one_pass(self, x: Tensor, gate: Tensor | None = None, below: Tensor | None = None):
        """The same for inference on a CPU, where a ReLU and a gate would each read and write the whole map again."""
        for layer in self.layers:
            weight, bias = layer.weight, layer.bias
            if gate is not None and layer is self.layers[-1]:  # the ReLU lets a gate, which is positive, through
                weight, bias = weight * gate.view(-1, 1, 1, 1), bias * gate.flatten()
                below = None if below is None else below * gate
            inputs = (x, weight, bias, layer.padding, layer.stride, layer.dilation, layer.groups)
            if below is None:
                x = torch.ops.mkldnn._convolution_pointwise(*inputs, "leaky_relu", [LEAK], "")
            else:  # into `below`; this kernel takes no leaky ReLU along
                torch.ops.mkldnn._convolution_pointwise_.binary(below, *inputs, "add", 1, None, [], "")
                x, below = F.leaky_relu_(below, LEAK), None
        own = self.se(x) if self.se and gate is None else None
        return x if own is None else x * own, own


class StudentUNet(nn.Module):
    """The report's student; (B, 3, H, W) in [0, 1] to the same shape, any size from 1x1.

    Stage widths are c/4, c/2, c, 2c and a bottleneck of 3c for c = `base_channels`, or `widths`, one a scale. With
    `stem_stride` r the stages see the picture folded to 1/r of its size; r = 1 is the report's network. It predicts a
    correction.

    A decoder stage takes its skip concatenated to what comes from below, or added to it. A `lateral` skip (Lin et al.,
    CVPR 2017) passes the stage's first convolution alone, which then takes the sum along. Such a student leaves next to
    nothing but convolutions: they also stride, instead of pooling, and the finest scale has no gates."""

    def __init__(self, in_channels: int = 3, out_channels: int = 3, base_channels: int = 256,
                 stem_stride: int = 4, widths: Sequence[int] | None = None, skips: str = "concatenate",
                 convolutions: Sequence[int] = (2,)) -> None:  # fmt: skip
        super().__init__()
        widths = tuple(widths or (base_channels * k // 4 for k in (1, 2, 4, 8, 12)))
        scales = len(widths)
        require(scales > 1 and min(widths) > 0, f"--widths {widths}: a student has two stages or more, each 1 or wider")
        convolutions = tuple(convolutions) * (scales if len(convolutions) == 1 else 1)
        counted = f"--convolutions {convolutions}: one number, or one for each of the {scales} scales"
        require(len(convolutions) == scales and min(convolutions) > 0, counted)
        if stem_stride not in (1, 2, 4) or in_channels != out_channels or skips not in SKIPS:
            raise ValueError(f"a student has in = out channels, a stem stride of 1, 2 or 4, and skips of {SKIPS}")
        self.config = {"stem_stride": stem_stride, "widths": widths, "skips": skips, "convolutions": convolutions}
        self.merge = Tensor.add_ if skips == "add" else lambda below, skip: torch.cat([below, skip], dim=1)
        self.stem_stride, folded = stem_stride, in_channels * stem_stride**2
        self.alignment = stem_stride * 2 ** (scales - 1)  # its multiples pass through every stage without padding
        lateral = self.lateral = skips == "lateral"
        depths = (*(2 * n - lateral for n in convolutions[:-1]), convolutions[-1])  # down and up again
        strided = lateral * (2 ** (scales - 1) - 1)  # which reach half as far
        self.reach = stem_stride * (sum(n * 2**scale for scale, n in enumerate(depths)) - strided)  # in pixels
        self.feature_widths = {"e2": widths[1], "e4": widths[-2], "b": widths[-1]}

        def stage_at(scale: int, in_channels: int, stride: int = 1) -> Stage:
            return Stage(in_channels, widths[scale], convolutions[scale], stride, excited=scale > 0 or not lateral)

        down = [stage_at(0, folded), *(stage_at(i, widths[i - 1], 2 if lateral else 1) for i in range(1, scales))]
        self.encoder, self.bottleneck = nn.ModuleList(down[:-1]), down[-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in itertools.pairwise(widths[::-1]))
        merged = [2 * width if skips == "concatenate" else width for width in widths]
        self.decoder = nn.ModuleList(stage_at(i, merged[i]) for i in range(scales - 2, -1, -1))
        self.output = nn.Conv2d(widths[0], folded, 1)
        self.gate_widths = [stage.layers[0].out_channels for stage in (*down, *self.decoder) if stage.se]
        self.ends = self.encoder[0].layers[0], self.output  # which read and write folded pixels
        self.initialise()

    def initialise(self) -> None:
        """He initialisation, gates nearly open, the last layer and what comes up from below near zero: a copy at first.

        With PyTorch's default the signal fades, for want of normalisation layers. Deep stages that are heard from the
        start are noise, which training first silences for good; so they come in as they learn (0.1 dB)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, 2.0 if name.endswith("excite.bias") else 0.0)
            elif name.startswith("up"):
                nn.init.normal_(parameter, std=0.03 * len(parameter) ** -0.5)
            else:
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        nn.init.normal_(self.output.weight, std=1e-3)

    def correct(self, folded: Tensor, gates: Iterable[Tensor] = ()) -> tuple[Tensor, dict, list[Tensor]]:
        """The correction of a folded picture, the features to be compared with the teacher's, every stage's gate."""
        gates, used, levels, x = iter(gates or [None] * len(self.gate_widths)), [], [], folded
        for stage in (*self.encoder, self.bottleneck):
            if levels and not self.lateral:
                x = F.max_pool2d(x, 2, ceil_mode=True)
            x, gate = stage(x, next(gates) if stage.se else None)
            levels.append(x)
            used.append(gate)
        for up, stage, skip in zip(self.up, self.decoder, levels[-2::-1], strict=True):
            below, gate = up(x), next(gates) if stage.se else None
            if below.shape[-2:] != skip.shape[-2:]:
                below = F.interpolate(below, skip.shape[-2:], mode="bilinear", align_corners=False)
            x, gate = stage(skip, gate, below) if self.lateral else stage(self.merge(below, skip), gate)
            used.append(gate)
        tapped = {"e2": levels[1], "e4": levels[-2], "b": levels[-1]}
        return self.output(x), tapped, [gate for gate in used if gate is not None]

    def forward(self, blurred: Tensor, features: bool = False) -> Tensor | tuple[Tensor, dict]:
        height, width = blurred.shape[-2:]
        folded = F.pixel_unshuffle(pad_to_multiple(blurred, self.stem_stride), self.stem_stride)
        correction, tapped, _ = self.correct(folded)
        restored = blurred + F.pixel_shuffle(correction, self.stem_stride)[..., :height, :width]
        return (restored, tapped) if features else restored


def load_student(name: str | Path) -> tuple[StudentUNet, dict]:
    """(student in evaluation mode and channels_last, the checkpoint's other entries), of a file or a shipped one."""
    path = SHIPPED.get(name) or Path(name)
    content = read_checkpoint(path, "train one with `python sharpen_kd.py train` or name another")
    try:
        student = StudentUNet(**content["network"])
        student.load_state_dict(content["params"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: not a student checkpoint of this script (best.pth of a run is one)") from error
    return student.eval().to(memory_format=torch.channels_last), content


# --- Losses -----------------------------------------------------------------------------------------------------------


@functools.lru_cache
def gaussian_windows(length: int, size: int = 11, sigma: float = 1.5) -> Tensor:
    """(length - size + 1, length): each row a normalised Gaussian window at the next position where it fits."""
    window = torch.softmax(-((torch.arange(size) - size // 2) ** 2) / (2 * sigma**2), 0)
    return torch.stack([F.pad(window, (start, length - size - start)) for start in range(length - size + 1)])


def ssim(first: Tensor, second: Tensor) -> Tensor:
    """Mean SSIM of two (B, C, H, W) batches in [0, 1], as a scalar (Wang et al., 2004).

    As scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`. The
    window is applied by two matrix products: as convolutions of single channels it took three quarters of a CPU's step.
    """
    down, across = (gaussian_windows(side).to(first) for side in first.shape[-2:])
    moments = torch.stack([first, second, first * first, second * second, first * second])
    mean1, mean2, square1, square2, product = down @ moments.contiguous() @ across.T
    variance1, variance2 = square1 - mean1**2, square2 - mean2**2
    covariance = product - mean1 * mean2
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean1 * mean2 + c1) / (mean1**2 + mean2**2 + c1)
    return (luminance * (2 * covariance + c2) / (variance1 + variance2 + c2)).mean()


def positional_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) over each channel's positions, of (B, C, H, W); Shu et al., ICCV 2021, eq. 4."""
    # a distribution over three colours, which the report's words would also allow, says nothing
    student, teacher = ((x.flatten(2) / temperature).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean() * temperature**2


def feature_loss(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """L1 between student features and projected teacher features, both (B, C, H, W), mean over the taps.

    The projections train too, so a plain L1 would be smallest with both sides at zero. Here each teacher channel is
    standardised, so that no projection can shrink it; the student's is only centred and has to come to that size.
    (Standardising both left plain ReLU channels free to die: 13 of 24 in e2 after 120 steps, against 4.)"""
    losses = []
    for name, features in student.items():
        features, target = features.float(), teacher[name].float()
        if target.shape[-2:] != features.shape[-2:]:  # antialias: average over what a position covers
            target = F.interpolate(target, features.shape[-2:], mode="bilinear", antialias=True)
        features, target = (x - x.mean((0, 2, 3), keepdim=True) for x in (features, target))
        target = target * torch.rsqrt(target.square().mean((0, 2, 3), keepdim=True) + 1e-8)
        losses.append(F.l1_loss(features, target))
    return torch.stack(losses).mean()


def vgg_features() -> nn.Sequential:
    """torchvision's VGG19 up to relu5_4, frozen, on RGB (B, 3, H, W) in [0, 1]; UserError without its weights."""
    weights = torchvision.models.VGG19_Weights.IMAGENET1K_V1
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    remedy = f"put {path.name} from {weights.url} there, or turn the term off with --lambda-perceptual 0"
    features = torchvision.models.vgg19(weights=None).features[:36]
    try:
        state = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
        state = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        features.load_state_dict(state)
    except Exception as error:  # no file and no download, or what a damaged file happens to cause
        raise UserError(f"{path}: no VGG19 weights ({type(error).__name__}: {error}); {remedy}") from error
    normalise = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return nn.Sequential(normalise, features).requires_grad_(False).eval()


class DistillationLoss(nn.Module):
    """The report's five terms, and L1 to the teacher's output, weighted, by name; one of weight 0 costs nothing."""

    def __init__(self, weights: dict[str, float], temperature: float = 4.0) -> None:
        super().__init__()
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.temperature = temperature
        self.needs_teacher = not self.weights.keys().isdisjoint({"perceptual", "feature", "kl", "output"})
        self.vgg = vgg_features() if "perceptual" in self.weights else None

    def forward(self, output: Tensor, sharp: Tensor, features: dict[str, Tensor] | None = None,
                teacher_output: Tensor | None = None, teacher_features: dict[str, Tensor] | None = None,
                ) -> dict[str, Tensor]:  # fmt: skip
        terms = {
            "reconstruction": lambda: F.l1_loss(output, sharp),
            "perceptual": lambda: F.l1_loss(self.vgg(output), self.vgg(teacher_output)),
            "feature": lambda: feature_loss(features, teacher_features),
            "kl": lambda: positional_kl(output, teacher_output, self.temperature),
            "ssim": lambda: 1 - ssim(output, sharp),
            "output": lambda: F.l1_loss(output, teacher_output),
        }
        return {name: weight * terms[name]() for name, weight in self.weights.items()}


# --- Inference: 8-bit frames in, 8-bit frames out ---------------------------------------------------------------------


class FrameNetwork(nn.Module):
    """A student between 8-bit frames (B, H, W, 3) whose sides are multiples of its stem stride: what a backend runs.

    `gates` are the whole frame's, a vector of every stage's in turn. Called without them it returns them, averaged over
    patches (N, h, w, 3) of the frame, about as large as training crops: plain SE blocks average over their whole input,
    so every tile would have other gates than its neighbours, and seams.

    Folds are never made: r neighbours of a row are a run of 3r values, which the first layer takes for channels, going
    down by r rows a step; the last layer, cut into one a row, writes such runs, each added to its row in one go."""

    def __init__(self, student: nn.Module, strength: float = 1.0) -> None:
        super().__init__()
        self.student, self.stride, scale = copy.deepcopy(student), student.stem_stride, 255 * strength
        first, last = self.student.ends
        fold = {"c": 3, "row": self.stride}
        weight = rearrange(first.weight.data, "o (c row column) y x -> o (column c) (y row) x", **fold)
        first.weight.data, first.stride, first.padding = weight / 255, (self.stride, 1), (self.stride, 1)
        rows = [rearrange(p.data, "(c row column) ... -> (row column c) ...", **fold) for p in last.parameters()]
        count = self.stride if last.kernel_size == (1, 1) else 1  # layers for the rows, where each costs little
        self.outputs = nn.ModuleList(copy.deepcopy(last) for _ in range(count))
        for layer, weight, bias in zip(self.outputs, *(parameter.chunk(count) for parameter in rows), strict=True):
            layer.weight.data, layer.bias.data = scale * weight, scale * bias
        self.student.output = nn.Identity()

    def forward(self, frames: Tensor, gates: Tensor | None = None) -> Tensor:
        widths, dtype = self.student.gate_widths, self.student.ends[0].weight.dtype
        split = () if gates is None else gates.to(dtype).view(1, -1, 1, 1).split(widths, dim=1)
        runs = frames.to(dtype).flatten(2).unflatten(2, (-1, 3 * self.stride))
        x, _, used = self.student.correct(runs.permute(0, 3, 1, 2), split)
        if gates is None:
            return torch.cat([gate.mean(0).flatten() for gate in used]).float()
        outputs = [layer(x).permute(0, 2, 3, 1) for layer in self.outputs]
        parts = outputs if len(outputs) > 1 else outputs[0].chunk(self.stride, dim=3)  # the rows of a fold
        rows = frames.flatten(2).unflatten(1, (-1, self.stride))  # (B, rows of folds, r, 3 W)
        sums = [rows[:, :, i] + part.flatten(2) for i, part in enumerate(parts)]
        restored = torch.stack([row.round_().clamp_(0, 255).to(torch.uint8) for row in sums], dim=2)
        return restored.flatten(1, 2).unflatten(2, (-1, 3))


def require_writable(*files: Path | None) -> None:
    """Makes the folders of files that are written later; UserError for what cannot be, before the work is done."""
    for file in filter(None, files):
        file.parent.mkdir(parents=True, exist_ok=True)
        writable = not file.is_dir() and os.access(file if file.exists() else file.parent, os.W_OK)
        require(writable, f"{file}: cannot be written; name another file")


def traced(network: FrameNetwork, library: str, gated: bool):
    """The network, with its gates handed in or returning them, for frames whose sides are multiples of its alignment:
    `openvino.Model`, or ONNX as bytes."""
    package, side, file = importlib.import_module(library), network.student.alignment, io.BytesIO()
    frames, gates = torch.zeros(1, side, side, 3, dtype=torch.uint8), torch.ones(sum(network.student.gate_widths))
    inputs = (frames, gates) if gated else (frames,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of branches that frames of aligned sides never take
        if library == "openvino":
            shapes = [[-1, -1, -1, 3], [len(gates)]][: len(inputs)]
            return package.convert_model(network, example_input=inputs, input=shapes)
        sizes = {name: {0: "batch", 1: "height", 2: "width"} for name in ("frames", "restored")}
        names = {"input_names": ["frames", "gates"][: len(inputs)], "output_names": ["restored" if gated else "gates"]}
        torch.onnx.export(network, inputs, file, **names, dynamic_axes=sizes, dynamo=False)
    return file.getvalue()


def torch_backend(network: nn.Module, device: torch.device, precision: torch.dtype, variant: str) -> Runner:
    """PyTorch as it is, or its compiler, with CUDA graphs on CUDA."""
    network, one_pass = network.to(precision), device.type == "cpu" and torch.backends.mkldnn.is_available()
    if variant == "compile":
        torch._dynamo.config.recompile_limit = 64  # networks and sizes share it; past 8 plain PyTorch would run
        if device.type == "cpu":
            compiler = os.environ.get("CXX", {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++"))
            require(shutil.which(compiler), f"--backend compile: needs a C++ compiler; install {compiler}")
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        network = torch.compile(network, mode=mode, dynamic=False)
    elif one_pass and (precision == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        for stage in network.modules():
            if isinstance(stage, Stage):
                stage.forward = stage.forward_in_one_pass

    uploads = torch.cuda.Stream() if device.type == "cuda" else None

    @torch.inference_mode()
    def start(*arrays: np.ndarray) -> Callable[[], np.ndarray]:
        tensors = [torch.from_numpy(array) for array in arrays]
        if not uploads:
            restored = network(*(tensor.to(device) for tensor in tensors))
            return lambda: restored.cpu().numpy()
        with torch.cuda.stream(uploads):  # while the batch before is computed; only from pinned memory
            tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
        stream = torch.cuda.current_stream()
        stream.wait_stream(uploads)
        for tensor in tensors:
            tensor.record_stream(stream)
        restored = network(*tensors)
        pinned = restored.to("cpu", non_blocking=True)  # which is pinned memory, filled when `done` is
        done = stream.record_event()
        return lambda: (done.synchronize(), pinned.numpy())[1]

    return start


def quantized(model, network: FrameNetwork):
    """The OpenVINO model with int8 convolutions, calibrated on pieces of scikit-image's pictures at x2."""
    import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(40)  # errors only
    pictures = [ImageOps.fit(even_sized(open_picture(pair.sharp)), (256, 256)) for pair in embedded_pairs()]
    frames = [np.array(PROTOCOLS["x2"](picture))[None] for picture in pictures]
    with torch.inference_mode():
        data = nncf.Dataset([(frame, network(torch.from_numpy(frame)).numpy()) for frame in frames])
    # By default a range ends at the pictures' mean extremes: black and white are cut off (0.1 to 0.2 dB).
    ranges = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX)
    settings = {"preset": nncf.QuantizationPreset.MIXED, "advanced_parameters": ranges, "subset_size": len(frames)}
    sums = nncf.IgnoredScope(types=["Add"])  # would take longer in int8
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars
        return nncf.quantize(model, data, ignored_scope=sums, **settings)


@functools.cache
def openvino_core():
    """The process's one Core: with a second, whichever goes last restores a signal stack that is gone (a crash)."""
    return importlib.import_module("openvino").Core()


def openvino_backend(network: nn.Module, device: torch.device, precision: torch.dtype, variant: str) -> Runner:
    """OpenVINO on the CPU; the gates are never in int8."""
    hints = {"INFERENCE_PRECISION_HINT": "bf16" if precision == torch.bfloat16 else "f32",
             "INFERENCE_NUM_THREADS": torch.get_num_threads()}  # fmt: skip
    models = [traced(network, "openvino", gated) for gated in (False, True)]
    if variant == "openvino-int8":
        models[1] = quantized(models[1], network)

    @functools.lru_cache(8)
    def compiled(*shapes: tuple[int, ...]):
        fixed = models[len(shapes) - 1].clone()
        fixed.reshape(dict(zip(fixed.inputs, shapes, strict=True)))
        return openvino_core().compile_model(fixed, "CPU", hints)

    def start(*arrays: np.ndarray) -> Callable[[], np.ndarray]:
        arrays = [np.ascontiguousarray(array) for array in arrays]  # computed when fetched, and kept until the next
        return lambda: compiled(*(array.shape for array in arrays))(arrays, share_outputs=True)[0]

    return start


# One tile along a side: what it takes of the padded frame, what it gives to the result, where it has that.
Part = collections.namedtuple("Part", "taken given inner")


def tile_side(length: int, tile: int, overlap: int, alignment: int) -> list[Part]:
    """How equal tiles of about `tile` pixels cover one side of a frame; 0 takes it whole.

    Tiles start on the whole frame's pooling grid and share `overlap` pixels or more; each gives the half off its edge.
    """
    padded, tile, overlap = (math.ceil(side / alignment) * alignment for side in (length, tile, overlap))
    count = max(1, round((padded - overlap) / max(tile - overlap, alignment))) if tile else 1
    size = math.ceil(((padded - overlap) / count + overlap) / alignment) * alignment if count > 1 else padded
    starts = sorted({min(i * (size - overlap), padded - size) for i in range(count)})
    cuts = [0, *((left + size + right) // 2 for left, right in itertools.pairwise(starts)), length]
    return [Part(slice(start, start + size), slice(a, b), slice(a - start, b - start))
            for start, (a, b) in zip(starts, itertools.pairwise(cuts), strict=True)]  # fmt: skip


def sample_patches(frame: np.ndarray, side: int, count: int = 2) -> np.ndarray:
    """(N, h, w, 3): a frame's most detailed patches, to take gates from; a small frame stands for itself.

    What gates make of flat patches is chance, since training crops without detail lose nothing by it: evenly spaced
    patches cost single pictures up to 3 dB. One patch would cost 0.01 dB; three, or larger ones, gain nothing."""
    h, w = (min(side, length) for length in frame.shape[:2])
    rows, columns = frame.shape[0] // h, frame.shape[1] // w
    if rows * columns <= count:
        return frame[None]
    green = frame[: rows * h : 16, : columns * w, 1].astype(np.int16)
    change = np.abs(np.diff(green, axis=1, prepend=green[:, :1])).reshape(rows, -1, columns * w)
    detail = change.sum(1, dtype=np.int32).reshape(rows, columns, w).sum(2)
    places = (divmod(place, columns) for place in np.argsort(detail, axis=None)[-count:])
    return np.stack([frame[h * i : h * (i + 1), w * j : w * (j + 1)] for i, j in places])


class FrameSharpener:
    """A student applied to 8-bit RGB frames (H, W, 3) of any size; returns frames alike.

    It holds two batches of tiles at a time: one is on its way while the other is computed. A frame's gates are taken
    once, so tiled and whole outputs agree. `strength` scales the correction."""

    def __init__(self, student: StudentUNet, device: torch.device, tile: int = TILE, overlap: int | None = None,
                 strength: float = 1.0, precision: str = "auto", backend: str = "torch") -> None:  # fmt: skip
        if overlap is None:  # the outer tenth of the reach changes 1/255 at most, but int8 rounds that up to 3
            overlap = min(2 * student.reach * (10 if "int8" in backend else 9) // 10, tile // 2)
        require(not tile or overlap < tile, f"--tile {tile} --overlap {overlap}: tiles must exceed their overlap")
        in_torch = BACKENDS[backend] == "torch"
        require(in_torch or device.type == "cpu", f"--backend {backend}: computes on the CPU; add --device cpu")
        network = FrameNetwork(student, strength).to(device, memory_format=torch.channels_last).eval()
        runner = torch_backend if in_torch else openvino_backend
        self.network = runner(network, device, pick_precision(precision, device), backend)
        self.side = functools.lru_cache(lambda length: tile_side(length, tile, overlap, student.alignment))
        self.patch = math.ceil(96 / student.alignment) * student.alignment
        # pixels at a time: two tiles leave a CPU's caches sooner than one, but PyTorch gains more by the call it saves
        self.batch = TILE**2 if in_torch else 0

    def tiles(self, frame: np.ndarray) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], Part, list[Part]]]:
        """What the network takes, tiles (B, h, w, 3) of the reflected frame and its gates, their row and columns."""
        padding = [(0, self.side(length)[-1].taken.stop - length) for length in frame.shape[:2]]
        padded = np.pad(frame, (*padding, (0, 0)), "reflect") if np.any(padding) else np.ascontiguousarray(frame)
        gates, (rows, columns) = self.network(sample_patches(padded, self.patch))(), map(self.side, frame.shape[:2])
        count = max(1, self.batch // (rows[0].taken.stop * columns[0].taken.stop))
        for row, start in itertools.product(rows, range(0, len(columns), count)):
            group = columns[start : start + count]
            tiles = [padded[None, row.taken, column.taken] for column in group]
            yield (tiles[0] if len(tiles) == 1 else np.concatenate(tiles), gates), row, group

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        result = np.empty_like(frame)
        started = ((self.network(*inputs), row, group) for inputs, row, group in self.tiles(frame))
        for (restore, row, group), _ in itertools.pairwise(itertools.chain(started, (None,))):  # the next is started
            for column, restored in zip(group, restore(), strict=True):
                result[row.given, column.given] = restored[row.inner, column.inner]
        return result


def student_frames(config: InferenceConfig, strength: float = 1.0) -> FrameSharpener:
    """The student that a command's flags name, run as they say."""
    student, device = load_student(config.checkpoint)[0], pick_device(config)
    return FrameSharpener(student, device, config.tile, config.overlap, strength, config.precision, config.backend)


def teacher_frames(restormer: StemmedRestormer, device: torch.device, precision: str = "auto") -> FrameFunction:
    """A function that applies a teacher to whole 8-bit RGB frames (H, W, 3)."""
    teacher = RestormerTeacherWrapper(restormer).to(device, memory_format=torch.channels_last)
    bf16 = pick_precision(precision, device) == torch.bfloat16

    def restore(frame: np.ndarray) -> np.ndarray:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            restored = teacher(torch.from_numpy(frame).to(device).permute(2, 0, 1)[None].float() / 255).float()
        return (restored[0].permute(1, 2, 0) * 255).round_().clamp_(0, 255).to(torch.uint8).cpu().numpy()

    return restore


def score(predicted: np.ndarray, sharp: np.ndarray) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of two 8-bit RGB frames, by scikit-image; infinite PSNR if they are equal."""
    with np.errstate(divide="ignore"):
        psnr = peak_signal_noise_ratio(sharp, predicted)
    return float(psnr), float(structural_similarity(sharp, predicted, channel_axis=2))


def mean_score(frames: Sequence[tuple[np.ndarray, np.ndarray]], sharpen: FrameFunction) -> list[float]:
    """Mean [PSNR, SSIM] of `sharpen` over (blurred, sharp) frames."""
    return np.mean([score(sharpen(blurred), sharp) for blurred, sharp in frames], axis=0).tolist()


TIFF_EXIF = (0x10E, 0x10F, 0x110, 0x131, 0x132, 0x13B, 0x8298)  # what a TIFF says of its picture, not of its storage


def kept_metadata(image: Image.Image) -> dict[str, object]:
    """EXIF but for the orientation, ICC profile and resolution of a picture as it was opened, where not damaged."""
    icc, dpi, kept = image.info.get("icc_profile"), image.info.get("dpi"), Image.Exif()
    try:
        ImageCms.ImageCmsProfile(io.BytesIO(icc or b""))
    except (OSError, ImageCms.PyCMSError):
        icc = None
    with contextlib.suppress(struct.error, *READABLE):
        exif = image.getexif()
        tags = {tag: exif[tag] for tag in exif if (tag in TIFF_EXIF if image.format == "TIFF" else tag != 0x112)}
        groups = {tag: dict(exif.get_ifd(tag)) for tag in (0x8769, 0x8825)}  # camera settings and place
        kept.update(tags | {tag: group for tag, group in groups.items() if group})
    dpi = dpi if dpi and all(0 < side < 1e6 for side in dpi) else None
    return {"exif": kept.tobytes() if kept else None, "icc_profile": icc, "dpi": dpi}


def sharpen_picture(sharpener: FrameSharpener, image: Image.Image) -> Image.Image:
    """A sharpened 8-bit copy, greyscale or RGB: oriented by EXIF; EXIF, ICC profile, resolution and alpha kept."""
    kept, image = kept_metadata(image), upright(image)
    grey, icc = image.mode[0] in "1LIF" and image.mode != "LAB", kept["icc_profile"]
    if image.mode in ("CMYK", "LAB"):
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc) if icc else ImageCms.createProfile("LAB"))
        kept["icc_profile"] = None  # it does not describe RGB
        if source.profile.xcolor_space.strip() == {"CMYK": "CMYK", "LAB": "Lab"}[image.mode]:
            srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
            image = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
            kept["icc_profile"] = srgb.tobytes()
    alpha = image.convert("RGBA") if image.has_transparency_data else None
    frame = frame_array(alpha if alpha and image.mode[0] != "I" else image)  # Pillow would cut 16 bits off at 255
    result = Image.fromarray(sharpener(frame)).convert("L" if grey else "RGB")
    if alpha:
        result.putalpha(alpha.getchannel("A"))
    result.info = {name: value for name, value in kept.items() if value}
    return result


def sharpen(config: SharpenConfig) -> None:
    """Sharpen pictures: files, or folders with everything in them."""
    output, ending = (config.output, ".png") if config.output else (SAMPLES, "_sharpened.png")
    one_file = output.suffix and not output.is_dir()
    if one_file and Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        raise UserError(f"-o {output}: Pillow cannot write the file type {output.suffix}")
    if one_file and (len(config.inputs) > 1 or config.inputs[0].is_dir()):
        raise UserError(f"-o {output}: a file can take one picture only; name a folder")
    folders = [path.resolve() if path.is_dir() else path.resolve().parent for path in config.inputs]
    own = config.output and not one_file and output.resolve() in folders
    require(not own, f"-o {output}: holds the pictures themselves, and perhaps others of their names; choose another")
    plan = plan_outputs(config.inputs, lambda name: output if one_file else output / name.with_name(name.stem + ending))
    sharpener, failed = student_frames(config, config.strength), []
    for target, source in tqdm(plan.items(), "sharpen", disable=len(plan) == 1):
        try:
            save_picture(sharpen_picture(sharpener, open_picture(source)), target)
            tqdm.write(f"{source} -> {target}")
        except (*READABLE, ImageCms.PyCMSError) as error:  # named at the end; a UserError is a ValueError
            failed.append(str(error) if str(source) in str(error) else f"{source}: {error}")
    require(not failed, "; ".join(failed))


def export(config: ExportConfig) -> None:
    """Write a student for other programs: 8-bit frames of any size in and out."""
    require(config.output.name, f"-o {config.output}: name a file")
    student, _ = load_student(config.checkpoint)
    require_writable(config.output)
    name, suffix = config.output.name, {"onnx": ".onnx", "openvino": ".xml"}[config.format]
    for ending, gated in (("", True), ("_gates", False)):  # the frame's network, and the one its gates come from
        path = config.output.with_name(name + ending + suffix)
        model = traced(FrameNetwork(student), config.format, gated)
        if config.format == "onnx":
            path.write_bytes(model)
        else:
            importlib.import_module("openvino").save_model(model, path, compress_to_fp16=False)
        print(path)
    print(f"frames (1, H, W, 3) and patches (N, h, w, 3) are 8-bit RGB, sides multiples of {student.alignment}")


# --- Training: one loop for the student and for the teacher -----------------------------------------------------------


class Distillation(nn.Module):
    """What a run minimises: `loss` of a network against the sharp pictures and a teacher, if there is one.

    With an `expansion` each 3x3 kernel is trained as itself plus a product of two matrices, zero at first, of that rank
    (after Bhardwaj et al., MLSys 2022). Adam moves all values of a kernel about equally; through the product it moves
    the kernel along its gradient. A thousand steps of a small student give 27.85 dB then, and 27.63 at best without."""

    def __init__(self, network: nn.Module, teacher: RestormerTeacherWrapper | None, loss: DistillationLoss,
                 expansion: int = 0) -> None:  # fmt: skip
        super().__init__()
        self.network, self.teacher, self.loss = network, teacher, loss
        kernels = {name: p for name, p in network.named_parameters() if expansion and p.shape[2:] == (3, 3)}
        self.expanded, rows = list(kernels), [kernel.flatten(1) for kernel in kernels.values()]
        self.inner = nn.ParameterList(torch.randn(expansion, row.shape[1]) * (2 / row.shape[1]) ** 0.5 for row in rows)
        self.outer = nn.ParameterList(torch.zeros(len(row), expansion) for row in rows)

    def weights(self) -> dict[str, Tensor]:
        """The network's parameters by name, with their expansions."""
        weights = dict(self.network.named_parameters())
        for name, outer, inner in zip(self.expanded, self.outer, self.inner, strict=True):
            weights[name] = weights[name] + (outer @ inner).view_as(weights[name])
        return weights

    def forward(self, batch: dict[str, Tensor], autocast: torch.autocast) -> dict[str, Tensor]:
        options = {"features": True} if "feature" in self.loss.weights else {}
        features, projected, weights = None, None, self.weights()
        with autocast:  # the networks only: SSIM's variances need float32
            if self.teacher and "output" not in batch:  # they are there where they come from a cache
                batch = batch | {"output": self.teacher(batch["blurred"])} | self.teacher.tapped
            output = torch.func.functional_call(self.network, weights, batch["blurred"], options)
            if options:
                output, features, projected = *output, self.teacher.project(batch)
        return self.loss(output, batch["sharp"], features, batch.get("output"), projected)


class CropOrder(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) batches of one process from `first_step` on; N processes see, step by step, what one would."""

    def __init__(self, count: int, config: FitConfig, rank: int = 0, processes: int = 1) -> None:
        self.count, self.config, self.rank, self.first_step = count, config, rank, 0
        self.group = config.gradient_accumulation_steps
        batches = math.ceil(count / (config.batch_size * processes))
        self.epoch_shape = (batches, config.batch_size, processes)
        self.steps_per_epoch = math.ceil(batches / self.group)

    def batches_in_step(self, step: int) -> int:
        """Batches of this optimiser step; the last group of an epoch may be smaller."""
        return min(self.group, self.epoch_shape[0] - step % self.steps_per_epoch * self.group)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_epoch, done = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.config.epochs):
            order = np.random.default_rng((self.config.seed, epoch)).permutation(self.count)
            batches = np.resize(order, self.epoch_shape)  # wrapped around to fill the last ones
            for batch in batches[done * self.group :, :, self.rank]:
                yield [(epoch, int(index)) for index in batch]
            done = 0


@torch.no_grad()
def update_ema(ema: nn.Module, weights: dict[str, Tensor], step: int, decay: float) -> None:
    """Move the averaged weights towards these, which `named_parameters` orders likewise."""
    decay = min(decay, (1 + step) / (10 + step))  # 0.1 at first: a short run must not return its initial weights
    torch._foreach_lerp_(list(ema.parameters()), list(weights.values()), 1 - decay)


def gradient_shares(terms: dict[str, Tensor], parameters: list[Tensor]) -> dict[str, float]:
    """Each weighted term's gradient norm over the student's weights, as a share of their sum."""
    gradient = functools.partial(torch.autograd.grad, inputs=parameters, retain_graph=True, materialize_grads=True)
    norms = {name: nn.utils.get_total_norm(gradient(term)).item() for name, term in terms.items()}
    return {f"gradient_{name}": norm / sum(norms.values()) for name, norm in norms.items()}


def write_csv(path: Path, rows: list[dict]) -> None:
    """One line a row, the columns in the order of their first appearance."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def plot(path: Path, *panels: tuple[dict, dict[str, tuple]]) -> None:
    """Panels of ({"title": ..., more settings}, curves {label: (x, y, style)}) as a picture file, by matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: `pip install matplotlib` would draw it")
        return
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, (settings, curves) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for label, (x, y, style) in curves.items():
            axes.plot(x, y, style, label=label, lw=0.8)
        axes.set(**settings)
        axes.legend()
    figure.savefig(path, dpi=110)


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """A list that a first Ctrl-C or termination signal is put into; a second one acts at once."""
    received: list[int] = []
    with contextlib.ExitStack() as former:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.signal(number, lambda number, frame: (received.append(number), former.close()))
            former.callback(signal.signal, number, handler)
        yield received


def ignore_interrupts(worker: int) -> None:
    """Loader processes leave Ctrl-C to the training process, which stops them in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in any process, so that all of them stop after the same step."""
    votes = torch.tensor(float(flag), device=device)
    if dist.is_initialized():
        dist.all_reduce(votes)
    return bool(votes)


RESTART = "start anew, with --overwrite instead of --resume"


def start_run(config: FitConfig) -> tuple[list[Pair], dict | None]:
    """Seeds the initial weights; (the pairs, what a resumed run goes on from); UserError for what cannot be done."""
    require(config.image_size % 16 == 0, f"--image-size {config.image_size}: must be a multiple of 16")
    require(max(config.ema_decay, config.validation_fraction) < 1, "--ema-decay, --validation-fraction must be below 1")
    kept = any((config.run_dir / name).exists() for name in ("last.pth", "best.pth"))
    require(not (config.resume and config.overwrite), "--resume, --overwrite: one goes on, the other starts anew")
    if kept and not config.resume and not config.overwrite:
        raise UserError(f"{config.run_dir} holds a run already: add --resume or --overwrite, or name another --run-dir")
    torch.manual_seed(config.seed)
    last = read_checkpoint(config.run_dir / "last.pth", RESTART) if config.resume else None
    if config.data_root:
        return find_pairs(config.data_root / "train", "" if config.degradation == "pairs" else "x2"), last
    missing = "" if config.resume else f"No pictures under {DATASET / 'train'}. "
    print(f"{missing}Training on the pictures that scikit-image carries.")
    print(f"--lambda-perceptual is {config.lambda_perceptual:g}, the teacher {config.teacher_weights}.")
    return embedded_pairs(), last


class Fit:
    """One training run: `objective.network`, its averaged copy, the optimiser, and where they stand."""

    def __init__(self, config: FitConfig, objective: Distillation, network_config: dict, pairs: list[Pair],
                 frame_function: Callable[..., FrameFunction], last: dict | None = None) -> None:  # fmt: skip
        self.config, self.network_config, self.frame_function = config, network_config, frame_function
        self.device = pick_device(config)
        if PROCESSES > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        training, held_out = hold_out(pairs, config.validation_fraction)
        training = balanced(training) if config.balance else training
        self.held_out = [pair.load() for pair in held_out if not RANK]
        settings = ("image_size", "blur_probability", "seed", "cache", "degradation")
        self.dataset = GoProSharpeningDataset(training, **{name: getattr(config, name) for name in settings})
        self.order = CropOrder(len(training), config, RANK, PROCESSES)
        self.objective = objective.to(self.device, memory_format=torch.channels_last)
        bf16 = pick_precision(config.precision, self.device) == torch.bfloat16
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)
        if folder := getattr(config, "teacher_cache", None):
            self.dataset = TeacherCache(folder, self.dataset, objective.teacher, config.cache_variants, self.autocast)
        self.ema = copy.deepcopy(objective.network).eval().requires_grad_(False)
        self.trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.optimiser = torch.optim.Adam(list(self.trained.values()), config.learning_rate)
        cycles = {"T_0": config.restart_epochs, "T_mult": 2, "eta_min": config.min_learning_rate}
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimiser, **cycles)
        self.step, self.best, self.rows = 0, -math.inf, []  # the rows of log.csv
        if last:
            self.continue_from(last)
        self.parallel = nn.parallel.DistributedDataParallel(self.objective) if PROCESSES > 1 else self.objective

    def continue_from(self, last: dict) -> None:
        """Take up the state that `save_last` wrote; UserError if it is another kind of run's."""
        try:
            for name, parameter in self.trained.items():  # the frozen ones are not in the file
                parameter.data.copy_(last["objective"][name])
            self.ema.load_state_dict(last["ema"])
            self.optimiser.load_state_dict(last["optimiser"])
            self.step, self.best, self.rows = last["step"], last["best"], last["rows"]
        except (KeyError, RuntimeError, ValueError) as error:
            path = self.config.run_dir / "last.pth"
            raise UserError(f"{path}: does not fit this run's network and loss terms ({error})") from error
        self.order.first_step = self.step

    def save_last(self) -> None:
        """Everything that continues the run to the same weights."""
        config = {name: str(v) if isinstance(v, Path) else v for name, v in vars(self.config).items()}
        content = {"config": config, "network": self.network_config, "ema": self.ema.state_dict(), "rows": self.rows,
                   "objective": {name: p.detach() for name, p in self.trained.items()}, "step": self.step,
                   "optimiser": self.optimiser.state_dict(), "best": self.best}  # fmt: skip
        save_atomically(content, self.config.run_dir / "last.pth")
        write_csv(self.config.run_dir / "log.csv", self.rows)

    def validate(self) -> dict[str, float]:
        """Score the averaged weights on the held-out pictures; keep them if they are the best so far."""
        psnr, similarity = math.nan, math.nan
        if self.held_out:
            network = copy.deepcopy(self.ema)  # which may be hooked or rewritten
            restore = self.frame_function(network, self.device, precision=self.config.precision)
            psnr, similarity = mean_score(self.held_out, restore)
            tqdm.write(f"step {self.step}: held-out {psnr:.2f} dB, SSIM {similarity:.4f}")
        if psnr > self.best or not self.held_out:
            self.best = max(self.best, psnr)
            content = {"network": self.network_config, "params": self.ema.state_dict(), "step": self.step,
                       "held_out": {"psnr": psnr, "ssim": similarity, "pictures": len(self.held_out)}}  # fmt: skip
            save_atomically(content, self.config.run_dir / "best.pth")
        return {"val_psnr": psnr, "val_ssim": similarity}

    def optimise(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
        """One optimiser step over a group of batches; returns the weighted terms' means."""
        group, means = self.order.batches_in_step(self.step), {}
        share_every = getattr(self.config, "log_gradients", 0)
        for remaining in reversed(range(group)):
            batch = on_device(next(batches), self.device)
            # What DistributedDataParallel.no_sync sets: gradients are averaged over the processes after the last batch.
            self.parallel.require_backward_grad_sync = not remaining
            terms = self.parallel(batch, self.autocast)
            if share_every and self.step % share_every == 0 and not remaining:
                means |= gradient_shares(terms, list(self.objective.network.parameters()))
            (sum(terms.values()) / group).backward()
            for name, term in terms.items():
                means[name] = means.get(name, 0.0) + term.item() / group
                require(math.isfinite(means[name]), f"step {self.step}: {name} is {means[name]}; lower --learning-rate")
        if self.config.clip_norm:
            nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip_norm)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        update_ema(self.ema, self.objective.weights(), self.step, self.config.ema_decay)
        self.step += 1
        return means

    def run(self) -> None:
        """Train to the end, or to the first interruption; writes last.pth, best.pth, log.csv, curves.png."""
        config, order, terms = self.config, self.order, self.objective.loss.weights
        total = min(config.epochs * order.steps_per_epoch, config.max_steps or sys.maxsize)
        options = {"pin_memory": self.device.type == "cuda", "worker_init_fn": ignore_interrupts}
        spare = self.device.type != "cpu" or torch.get_num_threads() > 2  # loaders take training's time
        workers = 2 * spare if config.workers is None else config.workers
        loader = DataLoader(self.dataset, batch_sampler=order, num_workers=workers, **options)
        require_writable(config.run_dir / "last.pth")
        for name in ("last.pth", "best.pth") if not self.step else ():  # of a run that --overwrite gives up
            (config.run_dir / name).unlink(missing_ok=True)
        bar = tqdm(total=total, initial=self.step, disable=RANK > 0, unit="step")
        with bar, deferred_interrupts() as interrupts:
            batches, saved = iter(loader), time.monotonic()
            while self.step < total and not any_process(bool(interrupts), self.device):
                self.schedule.step(epoch := self.step / order.steps_per_epoch)
                # warm up linearly: Adam's first steps are as large as any and on the worst gradients
                rate = self.optimiser.param_groups[0]["lr"] * min(1.0, (self.step + 1) / max(config.warmup_steps, 1))
                self.optimiser.param_groups[0]["lr"] = rate
                started = time.perf_counter()
                means = self.optimise(batches)
                bar.set_postfix({name: f"{means[name]:.4f}" for name in terms}, refresh=False)
                bar.update()
                if RANK:
                    continue
                row = {"step": self.step, "epoch": epoch, "learning_rate": rate}
                row |= {"loss": sum(means[name] for name in terms), **means, "seconds": time.perf_counter() - started}
                if self.step == total or self.step % (order.steps_per_epoch * config.validate_every) == 0:
                    row |= self.validate()
                self.rows.append(row)
                if time.monotonic() - saved > 60:
                    self.save_last()
                    saved = time.monotonic()
        if RANK == 0:
            if self.step >= total and not (config.run_dir / "best.pth").exists():
                self.validate()  # resumed where it ends
            self.save_last()
            steps, scored = [row["step"] for row in self.rows], [row for row in self.rows if "val_psnr" in row]
            losses = {name: (steps, [row.get(name) for row in self.rows], "-") for name in terms}
            psnr = {"averaged weights": ([row["step"] for row in scored], [row["val_psnr"] for row in scored], ".-")}
            plot(config.run_dir / "curves.png",
                 ({"title": "weighted loss terms", "xlabel": "step", "yscale": "log"}, losses),
                 ({"title": "held-out PSNR in dB", "xlabel": "step"}, psnr))  # fmt: skip
        if dist.is_initialized():
            dist.barrier()  # torchrun ends all processes with the first, which may still be writing
            dist.destroy_process_group()
        if self.step < total:  # a signal, perhaps to another process
            print(f"stopped after step {self.step}; continue with --resume --run-dir {config.run_dir}")
            raise KeyboardInterrupt


def train_teacher(config: TeacherConfig) -> None:
    """Train a Restormer of any size on the dataset (L1); best.pth is a --teacher-weights file."""
    require(len(config.num_blocks) == len(config.heads) == 4, "--num-blocks, --heads: four numbers each, one a level")
    if config.dim % 2 or any(config.dim * 2**level % heads for level, heads in enumerate(config.heads)):
        raise UserError(f"--dim {config.dim}: must be even, and every level's (it doubles) a multiple of its --heads")
    pairs, last = start_run(config)
    if last:
        restormer = StemmedRestormer(**last["network"])
    elif config.init:  # of whatever size it is
        restormer = load_restormer(config.init)
    else:
        sizes = ("dim", "num_blocks", "num_refinement_blocks", "heads", "ffn_expansion_factor")
        channels = [3 * config.stem_stride**2] * 2
        restormer = StemmedRestormer(*channels, **{name: getattr(config, name) for name in sizes})
    objective = Distillation(restormer, None, DistillationLoss({"reconstruction": 1.0}))
    Fit(config, objective, restormer_dimensions(restormer.state_dict()), pairs, teacher_frames, last).run()


# `train` without a dataset: small enough for two cores and ten minutes, on scikit-image's pictures.
EMBEDDED_RUN = {
    "run_dir": HERE / "model_checkpoints/embedded", "teacher_weights": COMPACT_TEACHER, "lambda_perceptual": 0.0,
    "stem_stride": 2, "widths": (16, 16, 32, 48), "skips": "lateral", "convolutions": (4, 3, 2, 1),
    "image_size": 128, "batch_size": 4, "gradient_accumulation_steps": 1, "cache": True, "workers": 0, "epochs": 240,
    "restart_epochs": 240, "validate_every": 40, "validation_fraction": 0.25, "learning_rate": 2e-3, "expansion": 64,
    "blur_probability": 0.0}  # fmt: skip


def train(config: TrainConfig) -> None:
    """Distil the teacher into a student; without a dataset, on scikit-image's pictures with a small run's defaults."""
    pairs, last = start_run(config)
    weights = {name.removeprefix("lambda_"): w for name, w in vars(config).items() if name.startswith("lambda_")}
    require(any(weights.values()), "--lambda-...: all are 0, which leaves nothing to learn")
    student = StudentUNet(3, 3, config.base_channels, config.stem_stride, config.widths, config.skips,
                          config.convolutions)  # fmt: skip
    if config.init and not last:
        source, _ = load_student(config.init)
        require(source.config == student.config, f"--init {config.init}: its student is another, {source.config}")
        student.load_state_dict(source.state_dict())
    loss, teacher = DistillationLoss(weights, config.temperature), None
    if loss.needs_teacher or config.teacher_cache:  # crops come from the cache, even if no term reads the teacher
        widths = student.feature_widths if "feature" in loss.weights else None
        teacher = RestormerTeacherWrapper(load_restormer(config.teacher_weights), widths)
    objective = Distillation(student, teacher, loss, config.expansion)
    run = Fit(config, objective, student.config, pairs, FrameSharpener, last)
    run.run()
    if RANK == 0 and run.held_out:
        before = mean_score(run.held_out, lambda frame: frame)
        after = load_student(config.run_dir / "best.pth")[1]["held_out"]
        print(f"{run.step} steps, {1000 * statistics.median(row['seconds'] for row in run.rows):.0f} ms each (median)")
        print(f"{len(run.held_out)} held-out pictures, {config.run_dir / 'best.pth'}")
        print(f"before: {before[0]:.2f} dB, SSIM {before[1]:.4f}")
        print(f"after:  {after['psnr']:.2f} dB, SSIM {after['ssim']:.4f}")


ABLATION = {"no teacher": (), "features": ("feature",), "KL": ("kl",), "output": ("output",),
            "all": ("perceptual", "feature", "kl", "output"), "no teacher, longer": ()}  # fmt: skip


def ablate(config: AblateConfig) -> None:
    """Train one student with each teacher term alone, with all and with none, and compare them.

    Runs are in --run-dir/VARIANT_SEED, beside ablation.json and ablation.png. A teacher term that a variant lacks has
    weight 0; the others have their --lambda. "No teacher, longer" has as many more epochs as a step of "all" takes
    longer. With a --teacher-cache all see the same crops. Runs that are there are kept or continued, so two processes
    can share out the seeds, and a third the table."""
    require(PROCESSES == 1, "ablate: run it without torchrun; processes may share out the --seeds")
    require(config.lambda_reconstruction or config.lambda_ssim, "--lambda-reconstruction, --lambda-ssim: both are 0")
    test = [p.load() for p in find_pairs(config.data_root / "test", "x2")] if config.data_root else []
    folders = {name: name.replace(",", "").replace(" ", "_") for name in ABLATION}
    runs = itertools.product(folders.values(), config.seeds, ("last.pth", "best.pth"))
    for folder, seed, file in runs if config.overwrite else ():  # all now: what is interrupted then goes on without
        (config.run_dir / f"{folder}_{seed}" / file).unlink(missing_ok=True)
    scores, seconds = {}, {}  # {variant: {"held out" or "test": [[PSNR, SSIM] of each seed]}}, {variant: of a step}
    for name, terms in ABLATION.items():
        changes = {f"lambda_{term}": 0.0 for term in ("perceptual", "feature", "kl", "output") if term not in terms}
        epochs = round(config.epochs * seconds["all"] / seconds["no teacher"]) if "longer" in name else config.epochs
        changes |= dict.fromkeys(("epochs", "restart_epochs", "validate_every"), epochs)
        scores[name], steps = {"held out": [], "test": []}, []
        for seed in config.seeds:
            folder = config.run_dir / f"{folders[name]}_{seed}"
            if not (folder / "best.pth").exists():  # it is written at the end
                started = (folder / "last.pth").exists()
                changes |= {"run_dir": folder, "seed": seed, "resume": started, "overwrite": False}
                train(dataclasses.replace(config, **changes))
            student, content = load_student(folder / "best.pth")
            steps += [float(row["seconds"]) for row in csv.DictReader((folder / "log.csv").read_text().splitlines())]
            scores[name]["held out"].append([content["held_out"]["psnr"], content["held_out"]["ssim"]])
            if test:
                sharpener = FrameSharpener(student, pick_device(config), precision=config.precision)
                scores[name]["test"].append(mean_score(test, sharpener))
        seconds[name] = statistics.median(steps)
        line = f"{name:<20}{len(steps) // len(config.seeds):>6} steps of{1000 * seconds[name]:>4.0f} ms"
        for where, values in scores[name].items():
            if values:
                (psnr, similarity), (low, _), (high, _) = np.mean(values, 0), min(values), max(values)
                line += f"   {where} {psnr:.2f} dB ({low:.2f} to {high:.2f}) / {similarity:.4f}"
        print(line, flush=True)
    (config.run_dir / "ablation.json").write_text(json.dumps(scores, indent=1) + "\n")
    panels = []  # a point for each run, a bar for their mean
    for where in ("held out", "test"):
        psnr = {name: [value[0] for value in values[where]] for name, values in reversed(scores.items())}
        curves = {name: (values, [name] * len(values), "o") for name, values in psnr.items()}
        curves["mean"] = [statistics.fmean(values or [math.nan]) for values in psnr.values()], list(psnr), "k|"
        panels.append(({"title": f"{where}, x2, PSNR in dB"}, curves))
    plot(config.run_dir / "ablation.png", *panels)


# --- Evaluation -------------------------------------------------------------------------------------------------------


def side_by_side(panels: dict[str, np.ndarray], detail: int = 48) -> Image.Image:
    """The frames under their names and above a magnified detail, the square where the first and last differ most."""
    first, *_, last = panels.values()
    height, width = first.shape[:2]
    side = min(detail, height, width)
    change = np.square(first.astype(float) - last).sum(2)
    blocks = change[: height // side * side, : width // side * side].reshape(height // side, side, -1, side).sum((1, 3))
    top, left = (side * int(index) for index in np.unravel_index(blocks.argmax(), blocks.shape))
    sheet = Image.new("RGB", (len(panels) * (width + 4) - 4, height + width + 28), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, frame) in enumerate(panels.items()):
        x = column * (width + 4)
        magnified = Image.fromarray(frame[top : top + side, left : left + side]).resize((width, width), Image.NEAREST)
        sheet.paste(Image.fromarray(frame), (x, 24))
        sheet.paste(magnified, (x, height + 28))
        draw.text((x + 4, 4), name, fill="black", font_size=15)
        draw.rectangle((x + left, 24 + top, x + left + side - 1, 24 + top + side - 1), outline="red")
    return sheet


def mean_psnr(values: Sequence[float]) -> float:
    """Mean of PSNRs in dB; where a picture equals its reference, which is infinite, that of the mean squared error."""
    mean, error = statistics.fmean(values), statistics.fmean(10 ** (-value / 10) for value in values)
    return mean if math.isfinite(mean) or not error else -10 * math.log10(error)


def score_pair(config: EvalConfig, pair: Pair, methods: dict[str, FrameFunction], pictures: Path, sheet: bool) -> dict:
    """A row of scores.csv: every method's PSNR and SSIM; on request the student's picture, and a sheet of all."""
    blurred, sharp = pair.load()
    if config.resize:
        size = (config.resize, config.resize)
        blurred, sharp = (np.array(Image.fromarray(x).resize(size, Image.BICUBIC)) for x in (blurred, sharp))
    outputs = {name: method(blurred) for name, method in methods.items()}
    row = {"picture": pair.key, "category": pair.category}
    for name, output in outputs.items():
        row[f"{name}_psnr"], row[f"{name}_ssim"] = score(output, sharp)
    if config.save_images:
        save_picture(Image.fromarray(outputs["student"]), pictures / f"{pair.key}.png")
    if config.save_images and sheet:
        panels = {"blurred": outputs.pop("input"), **outputs, "sharp": sharp}
        save_picture(side_by_side(panels), pictures / "side_by_side" / f"{pair.category}.png")
    return row


def evaluate(config: EvalConfig) -> None:
    """Average PSNR and SSIM of input, student and teacher over a split and for each category."""
    require(not 0 < config.resize < 7, f"--resize {config.resize}: SSIM needs at least 7x7 pixels")
    require_writable(config.json, config.output_dir / "scores.csv")
    data = {name: find_pairs(config.data_root / config.split, name) for name in config.protocol or ("",)}
    methods: dict[str, FrameFunction] = {"input": lambda frame: frame}
    if config.teacher or config.teacher_weights:
        restormer = load_restormer(config.teacher_weights)
        methods["teacher"] = teacher_frames(restormer, pick_device(config), config.precision)
    methods["student"] = student_frames(config)
    tables, rows = {}, []
    for protocol, pairs in data.items():
        firsts = [group[0] for group in grouped(pairs, lambda pair: pair.category).values()]  # which get a sheet
        pictures = config.output_dir / protocol
        scored = [score_pair(config, pair, methods, pictures, pair in firsts) for pair in tqdm(pairs, "eval")]
        rows += [{"protocol": protocol} | row if protocol else row for row in scored]
        tables[protocol] = {}
        print(f"{protocol or 'PSNR / SSIM':<12}" + "".join(f"{method:>18}" for method in methods))
        groups = {"all": []} | grouped(scored, lambda row: row["category"]) | {"all": scored}
        for category, members in groups.items():
            columns = {name: [row[name] for row in members] for name in scored[0]}
            means = {m: [mean_psnr(columns[f"{m}_psnr"]), statistics.fmean(columns[f"{m}_ssim"])] for m in methods}
            tables[protocol][category] = means
            print(f"{category:<12}" + "".join(f"{mean[0]:>9.2f} / {mean[1]:.4f}" for mean in means.values()))
        tables[protocol]["images"] = len(scored)
    write_csv(config.output_dir / "scores.csv", rows)
    if config.json:
        config.json.write_text(json.dumps(tables.get("", tables), indent=1) + "\n")


# --- Speed ------------------------------------------------------------------------------------------------------------


class PlainLayers(nn.Module):
    """The yardstick, in a student's place: six plain 3x3 layers of 24 channels at half the resolution."""

    stem_stride, alignment, reach, gate_widths = 2, 2, 12, (1,)

    def __init__(self) -> None:
        super().__init__()
        widths = (12, 24, 24, 24, 24, 24, 12)
        layers = [[nn.Conv2d(a, b, 3, padding=1), nn.ReLU(True)] for a, b in itertools.pairwise(widths)]
        *layers, self.output, _ = itertools.chain(*layers)
        self.layers = nn.Sequential(*layers)
        self.ends = self.layers[0], self.output

    def correct(self, folded: Tensor, gates: Iterable[Tensor] = ()) -> tuple[Tensor, dict, list[Tensor]]:
        return self.output(self.layers(folded)), {}, [folded[:, :1].mean((2, 3))]


@functools.lru_cache  # every backend asks again
def multiply_adds_per_pixel(student: nn.Module) -> float:
    """Multiply-adds of the convolutions for each pixel of a large frame."""
    side, stride = 16 * student.alignment, student.stem_stride
    with FlopCounterMode(display=False) as counter:
        folded = torch.empty(1, 3 * stride**2, side // stride, side // stride, device="meta")
        copy.deepcopy(student).to("meta").correct(folded)
    return counter.get_total_flops() / 2 / side**2


def sample_frames(height: int, width: int) -> list[np.ndarray]:
    """Three of scikit-image's photographs at this size, blurred by the x2 protocol."""
    sharp = [p.sharp for p in embedded_pairs() if p.sharp.stem in ("astronaut", "coffee", "chelsea")]
    frames = [ImageOps.fit(open_picture(path), (width, height)) for path in sharp]
    return [np.array(PROTOCOLS["x2"](even_sized(frame))) for frame in frames]


@torch.inference_mode()
def milliseconds(functions: Sequence[Callable[[], object]], device: torch.device, config: FpsConfig) -> np.ndarray:
    """(functions, 2): median and 95th percentile of each one's time, waiting for the device on both ends. They take
    turns, so that whatever else the machine does slows all of them alike."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    times = np.empty((config.warmup + config.frames, len(functions)))
    for turn, index in np.ndindex(times.shape):
        wait()
        start = time.perf_counter()
        functions[index]()
        wait()
        times[turn, index] = 1000 * (time.perf_counter() - start)
    return np.percentile(times[config.warmup :], (50, 95), axis=0).T


def best_convolution(precision: torch.dtype, device: torch.device, config: FpsConfig) -> tuple[Callable, float]:
    """(PyTorch's fastest 3x3 convolution at 270x480, its operations): what arithmetic could reach here."""
    layers, operations, widths = [], [], (16, 24, 32, 64, 128)
    for width in widths:
        layer = nn.Conv2d(width, width, 3, padding=1).to(device, precision, memory_format=torch.channels_last)
        maps = torch.rand(1, width, 270, 480, device=device, dtype=precision).to(memory_format=torch.channels_last)
        layers.append(functools.partial(layer, maps))
        operations.append(2 * 9 * width**2 * 270 * 480)
    speeds = np.array(operations) / milliseconds(layers, device, config)[:, 0] / 1e6
    reached = ", ".join(f"{speed:.0f} ({width} wide)" for width, speed in zip(widths, speeds, strict=True))
    print(f"PyTorch's 3x3 convolutions in {precision}: {reached} GFLOP/s; below the best takes turns with the networks")
    return layers[speeds.argmax()], operations[speeds.argmax()]


def draw_quality(config: FpsConfig, students: dict[str, nn.Module], backends: Sequence[str], device: torch.device):
    """`--plot`: PSNR and SSIM at x2 against the milliseconds of a 1280x720 frame, also printed."""
    found = list_pictures(config.data_root / "test")
    pairs = [pair.load() for pair in (find_pairs(config.data_root / "test", "x2") if found else embedded_pairs())]
    mask, frame = ImageFilter.UnsharpMask(2, 100), sample_frames(720, 1280)[0]
    methods = {"input": lambda frame: frame, "unsharp mask": lambda f: np.array(Image.fromarray(f).filter(mask))}
    for (name, student), backend in itertools.product(students.items(), backends):
        methods[f"{name}, {backend}"] = FrameSharpener(student, device, precision=config.precision, backend=backend)
    durations = milliseconds([functools.partial(method, frame) for method in methods.values()], device, config)[:, 0]
    psnrs, similarities, axis = {}, {}, {"xlabel": "ms for a 1280x720 frame, 8-bit to 8-bit"}
    for (label, method), ms, marker in zip(methods.items(), durations, itertools.cycle("os^vDPX"), strict=False):
        psnr, similarity = mean_score(pairs, method)
        print(f"{label:<24}{ms:>7.1f} ms   {psnr:.2f} dB / {similarity:.4f} at x2, {len(pairs)} pictures", flush=True)
        psnrs[label], similarities[label] = (ms, psnr, marker), (ms, similarity, marker)
    plot(config.plot, (axis | {"title": "PSNR at x2, dB"}, psnrs), (axis | {"title": "SSIM at x2"}, similarities))


def fps_rows(networks: dict[str, nn.Module], backend: str, device: torch.device, config: FpsConfig,
             best: tuple[Callable, float]) -> Iterator[dict]:  # fmt: skip
    """At every size each network with the whole frame and, where it takes several, with tiles; the first is plain."""
    precision = "int8" if "int8" in backend else str(pick_precision(config.precision, device)).removeprefix("torch.")
    common = {"backend": backend, "precision": precision, "device": str(device), "threads": torch.get_num_threads()}
    options = {"overlap": config.overlap, "precision": config.precision, "backend": backend}
    macs = {name: multiply_adds_per_pixel(network) for name, network in networks.items()}
    tiles = {0, config.tile if config.tile < max(map(max, FPS_SIZES)) else 0}  # a larger one takes all frames whole
    sharpeners = {(name, tile): FrameSharpener(network, device, tile, **options)
                  for name, network in networks.items() for tile in sorted(tiles)
                  if not tile or not isinstance(network, PlainLayers)}  # fmt: skip
    for height, width in FPS_SIZES:
        frames, functions = sample_frames(height, width), {}
        turns = itertools.cycle(frames)
        for key, sharpener in sharpeners.items():
            batches = [inputs for inputs, *_ in sharpener.tiles(frames[0])]
            if not key[1] or sum(len(batch) for batch, _ in batches) > 1:  # else one tile takes it whole
                functions[key] = (lambda s=sharpener, batches=batches: [s.network(*inputs)() for inputs in batches],
                                  lambda s=sharpener, turns=turns: s(next(turns)))  # fmt: skip
        timed = [*itertools.chain(*functions.values())]
        timed += [best[0], timed[0]]  # PyTorch's threads slow what comes next in OpenVINO: nothing that is shown
        *times, (best_ms, _), _ = milliseconds(timed, device, config).tolist()
        for (name, tile), (network, _), (median, late) in zip(functions, times[::2], times[1::2], strict=True):
            yield {"checkpoint": name, **common, "height": height, "width": width, "tiled": bool(tile),
                   "network_ms": network, "frame_ms": median, "frame_ms_p95": late, "fps": 1000 / median,
                   "plain_ms": times[1][0], "best_gflops": best[1] / best_ms / 1e6, "macs_per_pixel": macs[name],
                   "gflops": 2 * macs[name] * height * width / network / 1e6}  # fmt: skip


def measure_fps(config: FpsConfig) -> None:
    """Milliseconds a frame of 512x512, 1280x720 and 1920x1080, whole and in tiles, by every backend."""
    suffix = config.plot.suffix.lower() if config.plot else ".png"
    require(suffix in (".png", ".jpg", ".pdf", ".svg"), f"--plot {config.plot}: name a .png, .jpg, .pdf or .svg file")
    require_writable(config.json, config.plot)
    device, rows = pick_device(config), []
    students = {Path(name).stem: load_student(name)[0] for name in config.checkpoint if not config.base_channels}
    if config.base_channels:
        untrained = StudentUNet(base_channels=config.base_channels, stem_stride=config.stem_stride)
        students = {f"c={config.base_channels} r={config.stem_stride}": untrained}
    elif len(students) < len(config.checkpoint):
        raise UserError("--checkpoint: two files of one name, by which the table tells them apart; rename one")
    networks = {"plain layers": PlainLayers()} | students
    for name, network in networks.items():
        count = sum(p.numel() for p in network.parameters())
        print(f"{name}: {count:,} parameters, {multiply_adds_per_pixel(network):,.0f} multiply-adds a pixel")
    print(f"{device}, {torch.get_num_threads()} CPU threads, PyTorch {torch.__version__}")
    best = best_convolution(pick_precision(config.precision, device), device, config)
    print("network       backend       precision  frame             network  8-bit to 8-bit, ms     95 %    FPS"
          "  GFLOP/s  of best  x plain")  # fmt: skip
    installed = [name for name, packages in BACKENDS.items() if all(map(importlib.util.find_spec, packages.split()))]
    installed.remove("compile")  # minutes for a checkpoint and a size
    backends = config.backend or (installed if device.type == "cpu" else ["torch"])
    line = ("{checkpoint:<14}{backend:<14}{precision:<11}{size:<16}{network_ms:>9.1f}{frame_ms:>21.1f}"
            "{frame_ms_p95:>9.1f}{fps:>7.1f}{gflops:>9.0f}{of_best:>9.0%}{ratio:>9.2f}")  # fmt: skip
    for row in itertools.chain.from_iterable(fps_rows(networks, backend, device, config, best) for backend in backends):
        size = f"{row['width']}x{row['height']}{' tiled' if row['tiled'] else ''}"
        ratios = {"ratio": row["frame_ms"] / row["plain_ms"], "of_best": row["gflops"] / row["best_gflops"]}
        print(line.format(**row, **ratios, size=size), flush=True)
        rows.append(row)
    if config.json:
        config.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if config.plot:
        draw_quality(config, students, backends, device)


# --- Command line -----------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[type, Callable]] = {
    "prepare": (PrepareConfig, prepare), "teacher": (TeacherConfig, train_teacher), "train": (TrainConfig, train),
    "ablate": (AblateConfig, ablate), "eval": (EvalConfig, evaluate), "sharpen": (SharpenConfig, sharpen),
    "fps": (FpsConfig, measure_fps), "export": (ExportConfig, export)}  # fmt: skip


def flags(config: object) -> dict[str, dataclasses.Field]:
    """{"--learning-rate": its field, ...} of a configuration or its class."""
    return {"--" + item.name.replace("_", "-"): item for item in dataclasses.fields(config) if item.metadata}


def build_parser() -> argparse.ArgumentParser:
    """One argument a field: its type from the annotation, its meaning and options from the metadata."""
    parser = argparse.ArgumentParser(prog="sharpen_kd.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (config_class, function) in COMMANDS.items():
        about = function.__doc__.split("\n")[0]
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        for option, item in flags(config_class).items():
            options, default, many = dict(item.metadata["options"]), item.default, isinstance(item.default, tuple)
            kind, *_ = typing.get_args(item.type) or (item.type,)  # Path of `Path | None`
            if "nargs" in options:
                command.add_argument(item.name, type=kind, **options)
                continue
            names = [*options.pop("short", ()), option]
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                metavar = None if "choices" in options else kind.__name__.upper()
                options |= {"type": kind, "nargs": "+" if many else None, "metavar": metavar}
            if default is not None and default is not False and default != ():  # 0 is a default worth showing
                shown = default.relative_to(HERE) if kind is Path else default
                options["help"] += f" (default: {' '.join(map(str, shown)) if many else shown})"
            command.add_argument(*names, default=argparse.SUPPRESS, **options)
    return parser


def settle(config_class: type, given: dict) -> object:
    """The command's configuration: given flags over a resumed run's over the embedded run's; UserError off bounds."""
    config = config_class(**given)
    if isinstance(config, TrainConfig) and config.data_root == DATASET and not list_pictures(DATASET / "train"):
        sized = "base_channels" in given or "widths" in given  # which the embedded run's would overrule, or not fit
        sizes = {"widths": (), "convolutions": config.convolutions} if sized else {}
        config = config_class(**(EMBEDDED_RUN | sizes | given | {"data_root": None}))
    if isinstance(config, FitConfig) and config.resume and not isinstance(config, AblateConfig):
        last = read_checkpoint(config.run_dir / "last.pth", RESTART)
        try:
            saved, names = last["config"], [f.name for f in dataclasses.fields(config) if f.type in (Path, Path | None)]
            paths = {name: saved[name] and Path(saved[name]) for name in names}
            config = config_class(**(saved | paths | {"run_dir": config.run_dir} | given))  # it may have been moved
        except (KeyError, TypeError) as error:
            raise UserError(f"{config.run_dir / 'last.pth'}: another command's run ({error})") from error
    for name, item in flags(config).items():
        (at_least, above), value = item.metadata["bounds"], getattr(config, item.name)
        for number in value if isinstance(value, tuple) else (value,) if value is not None else ():
            fits = (at_least is None or number >= at_least) and (above is None or number > above)
            bound = f"at least {at_least}" if above is None else f"above {above}"
            require(fits and number != math.inf, f"{name} {number}: must be {bound}{', and finite' * fits}")
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    given = vars(build_parser().parse_args(arguments))
    (config_class, command), debug = COMMANDS[given.pop("command")], given.pop("debug")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    keep_freed_memory()
    try:
        command(settle(config_class, given))
    except (UserError, OSError, ModuleNotFoundError, torch.OutOfMemoryError) as error:
        if debug:
            raise
        message = str(error).rsplit("UserError: ", 1)[-1]  # a loader process wraps it in its own traceback
        if isinstance(error, ModuleNotFoundError):
            message = f"{error.name} is not installed: pip install {error.name}"
        print("sharpen_kd: error:", " ".join(message.split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
