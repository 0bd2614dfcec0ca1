"""Give the script damaged files until the time is up: python tests/fuzz.py --seconds 300 --seed 1

Each round damages a picture, a checkpoint or a clip at random and sharpens with it. Right is exit
status 0 with a picture that can be read, or exit status 2 with one line of error; nothing else may
be left behind. A file that led to anything else is kept in --keep, and the exit status is 1.
"""

import argparse
import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
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


def complaint(file: Path, folder: Path) -> str:
    """What is wrong with how `sharpen` takes a damaged file; "" if nothing is."""
    picture = folder / "whole.png"
    out = folder / "out"
    command = ["sharpen", str(file), "-o", f"{out}{os.sep}", "--checkpoint", "fast"]
    if file.suffix == ".pth":
        command = ["sharpen", str(picture), "-o", f"{out}{os.sep}", "--checkpoint", str(file)]
    printed, error = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(error):
            status = kd.main(command)
    except BaseException:
        return traceback.format_exc()
    made = sorted(out.glob("*")) + sorted(out.glob(".*"))
    if status == 2:
        one_line = error.getvalue().count("\n") == 1
        if made:
            return f"exit status 2, and {made} is left"
        return "" if one_line else f"not one line of error: {error.getvalue()}"
    if status != 0 or len(made) != 1:
        return f"exit status {status}, {made} written"
    if kd.is_clip(made[0]):
        kd.clip_frames(made[0])
    else:
        Image.open(made[0]).load()
    return ""


def give_up(*_: object) -> None:
    raise TimeoutError(f"not done after {SLOW} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz_failures"))
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    checkpoint = kd.SHIPPED["fast"].read_bytes()
    kinds = [whole_pictures(), {".pth": checkpoint}, whole_clips()]
    signal.signal(signal.SIGALRM, give_up)

    end = time.monotonic() + flags.seconds
    rounds = failures = 0
    while time.monotonic() < end:
        draw = np.random.default_rng((flags.seed, rounds))
        rounds += 1
        files = kinds[draw.choice(3, p=(0.7, 0.15, 0.15))] or kinds[0]
        ending = sorted(files)[draw.integers(len(files))]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            Image.fromarray(np.full((24, 32, 3), 90, np.uint8)).save(folder / "whole.png")
            file = folder / f"damaged{ending}"
            file.write_bytes(damaged(files[ending], draw))
            signal.alarm(SLOW)
            wrong = complaint(file, folder)
            signal.alarm(0)
            if wrong:
                failures += 1
                flags.keep.mkdir(parents=True, exist_ok=True)
                kept = flags.keep / f"{flags.seed}_{rounds}{ending}"
                shutil.copy(file, kept)
                print(f"{kept}: {wrong}")
    print(f"{rounds} damaged files, {failures} failures (seed {flags.seed})")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
