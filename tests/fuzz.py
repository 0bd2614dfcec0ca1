"""Give the script damaged files until the time is up: python tests/fuzz.py --seconds 300 --seed 1

Each round damages a picture, a checkpoint or a clip at random and sharpens with it. Right is a
result that can be read, or a UserError with nothing left behind. A file that led to anything else
is kept in --keep, and the exit status is 1. (It needs a system with alarm signals, not Windows.)
"""

import argparse
import contextlib
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sharpen_kd as kd

SLOW = 60  # seconds after which a round counts as hanging
FORMATS = {
    "AVIF": ".avif",
    "BMP": ".bmp",
    "GIF": ".gif",
    "ICO": ".ico",
    "JPEG": ".jpg",
    "JPEG2000": ".jp2",
    "PCX": ".pcx",
    "PNG": ".png",
    "PPM": ".ppm",
    "SGI": ".sgi",
    "TGA": ".tga",
    "TIFF": ".tif",
    "WEBP": ".webp",
}
CLIPS = {".mp4": "libx264", ".webm": "libvpx-vp9"}


def whole_pictures() -> dict[str, bytes]:
    """One small picture in each format that this Pillow writes, with EXIF where that is stored."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    picture = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x010F] = "camera"
    exif[0x0112] = 6
    exif[0x8769] = {0x829A: 0.25, 0xA002: 56}
    files = {}
    for kind, ending in FORMATS.items():
        file = io.BytesIO()
        with contextlib.suppress(OSError, KeyError):  # a Pillow without this encoder
            options = {"exif": exif.tobytes()} if kind in ("JPEG", "PNG", "WEBP", "AVIF") else {}
            picture.save(file, kind, **options)
            files[ending] = file.getvalue()
    return files


def whole_clips() -> dict[str, bytes]:
    """A few frames in each container; none where PyAV is not installed."""
    files = {}
    with contextlib.suppress(ImportError):
        import av

        pixels = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), np.uint8)
        for ending, codec in CLIPS.items():
            file = io.BytesIO()
            with av.open(file, "w", format=ending[1:]) as container:
                stream = container.add_stream(codec, rate=25, width=64, height=48)
                stream.pix_fmt = "yuv420p"
                for frame in pixels:
                    picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                    container.mux(stream.encode(picture))
                container.mux(stream.encode(None))
            files[ending] = file.getvalue()
    return files


def damaged(content: bytes, draw: np.random.Generator) -> bytes:
    """Some bits flipped and bytes replaced, most of them near the start; now and then cut off."""
    changed = bytearray(content)
    for _ in range(draw.integers(1, 5)):
        reach = len(changed) if draw.random() < 0.5 else min(len(changed), 300)
        place = draw.integers(reach)
        if draw.random() < 0.5:
            changed[place] ^= 1 << draw.integers(8)
        else:
            changed[place] = draw.integers(256)
    if draw.random() < 0.1:
        changed = changed[: draw.integers(len(changed))]
    return bytes(changed)


def damaged_checkpoint(content: bytes, draw: np.random.Generator) -> bytes:
    """Half of them damaged as they are; in the others an entry, under its true checksum."""
    if draw.random() < 0.5:
        return damaged(content, draw)
    changed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        zipfile.ZipFile(changed, "w") as copy,
    ):
        names = archive.namelist()
        chosen = names[draw.integers(len(names))] if draw.random() < 0.5 else names[0]
        for name in names:
            data = archive.read(name)
            copy.writestr(name, damaged(data, draw) if name == chosen and data else data)
    return changed.getvalue()


def complaint(file: Path, folder: Path, sharpener: kd.FrameSharpener) -> str:
    """What is wrong with how the script takes a damaged file; "" if nothing is."""
    output = folder / "out"
    try:
        if file.suffix == ".pth":
            restored = kd.load_sharpener(file)(np.full((24, 32, 3), 90, np.uint8))
            return "" if restored.shape == (24, 32, 3) else f"a frame of shape {restored.shape}"
        config = kd.SharpenConfig(inputs=(file,), output=output)
        (job,), _ = kd.plan_jobs(config)
        kd.sharpen_file(config, job, sharpener)
        made = [*output.iterdir()]
        if made != [job.target]:
            return f"{made} was written instead of {job.target}"
        if job.is_clip:
            kd.clip_frames(job.target)
        else:
            Image.open(job.target).load()
    except kd.UserError:
        left = [*output.iterdir()] if output.exists() else []
        return f"{left} is left behind an error" if left else ""
    except BaseException:
        return traceback.format_exc()
    return ""


class HangsError(BaseException):
    """Not an Exception, which the script might take for one of Pillow's."""


def give_up(*_: object) -> None:
    raise HangsError(f"not done after {SLOW} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"))
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    sharpener = kd.load_sharpener("fast")
    kinds = [whole_pictures(), {".pth": kd.SHIPPED["fast"].read_bytes()}, whole_clips()]
    signal.signal(signal.SIGALRM, give_up)

    end = time.monotonic() + flags.seconds
    number = failures = 0
    while time.monotonic() < end:
        draw = np.random.default_rng((flags.seed, number))
        files = kinds[draw.choice(3, p=(0.7, 0.15, 0.15))] or kinds[0]
        ending = sorted(files)[draw.integers(len(files))]
        damage = damaged_checkpoint if ending == ".pth" else damaged
        with tempfile.TemporaryDirectory() as name:
            file = Path(name, f"damaged{ending}")
            file.write_bytes(damage(files[ending], draw))
            signal.alarm(SLOW)
            with contextlib.redirect_stdout(io.StringIO()):
                wrong = complaint(file, Path(name), sharpener)
            signal.alarm(0)
            if wrong:
                failures += 1
                flags.keep.mkdir(parents=True, exist_ok=True)
                kept = flags.keep / f"{flags.seed}_{number}{ending}"
                shutil.copy(file, kept)
                print(f"{kept}: {wrong}")
        number += 1
    print(f"{number} damaged files, {failures} failures (seed {flags.seed})")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
