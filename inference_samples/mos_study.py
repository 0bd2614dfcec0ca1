"""mos_study: what people think of pictures and clips, asked blindly and counted.

    python inference_samples/mos_study.py build sharp blurred teacher student -o study/
    python inference_samples/mos_study.py score ratings/*.csv --key study_key.json

`build` writes one page that shows everything in study/ to one participant after the other: absolute
category rating with hidden reference, after Recommendation ITU-T P.910. Each folder is a method.
Files of one name belong together, sub-folders are categories, and the folder `sharp` is the hidden
reference. What participants get tells nothing of methods and names; that is in study_key.json,
which stays with you.

`score` reads the CSV files that participants exported, leaves out participants as Recommendation
ITU-R BT.500 does, and prints mean opinion scores (MOS), the same against the hidden reference
(DMOS), both with 95 % confidence intervals, and which methods differ. A hyphen stands for what
was not rated.

This script knows nothing of networks and imports neither PyTorch nor sharpen_kd.

Map of this file:

    Errors, files       one line for what the user can mend; writing whole or not at all
    Stimuli             from folders to what is shown
    The page            from stimuli to study/ and its key
    Ratings             from CSV files to an array
    Screening           who answered carelessly
    Scores              MOS, DMOS, confidence intervals
    Comparisons         which methods differ
    Reports             tables, a CSV file, a plot
    Command line
"""

import argparse
import base64
import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import re
import secrets
import shutil
import sys
import tempfile
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

TEMPLATE = Path(__file__).with_suffix(".html")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".avif")
CLIPS = (".mp4", ".webm")
# Media that people have, and that browsers do not show: an error says so.
NOT_IN_BROWSERS = (".tif", ".tiff", ".ppm", ".heic", ".jp2", ".mov", ".mkv", ".avi", ".y4m")

# What the page exports.
COLUMNS = ("study", "participant", "position", "stimulus", "rating", "milliseconds", "training")
GRADES = {"1", "2", "3", "4", "5"}

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
# A little above the 0.7 that all honest participants passed in the simulation of `correlations`. It
# only warns, so it may name somebody who answered well.
LOW_CORRELATION = 0.75
FEW_PARTICIPANTS = 15  # P.910 (2008), 7.2: at least 15 should take part

# --- Errors, files --------------------------------------------------------------------------------


class UserError(ValueError):
    """What the user can mend: one line that names the file or flag and the remedy."""


def require(condition: object, message: str) -> None:
    """UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def shown(name: object) -> str:
    """A name for the terminal and the plot: what could steer a terminal is written as an escape."""
    text = str(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def warn(message: str) -> None:
    """One line on standard error."""
    print("mos_study: warning:", shown(message), file=sys.stderr)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without a library's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write into, renamed to `path` when all is written."""
    temporary = path.with_name(f".mos_study-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def defused(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: an apostrophe before what begins like one.

    A text that begins with an apostrophe gets another one, so that `original` always finds back.
    """
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r", "'")) else text


def original(text: str) -> str:
    """What `defused` was given."""
    is_defused = text.startswith("'") and defused(text[1:]) == text
    return text[1:] if is_defused else text


# --- Stimuli: from folders to what is shown -------------------------------------------------------


@dataclass(frozen=True)
class Stimulus:
    """One file as participants see it. A source is what all methods show in their own way."""

    method: str
    category: str  # the sub-folder, "" for files outside of one
    item: str  # the file's name without ending
    file: Path
    training: bool = False

    @property
    def source(self) -> tuple[str, str]:
        return (self.category, self.item)


def find_files(folder: Path) -> dict[tuple[str, str], Path]:
    """A method's pictures and clips by (category, item); hidden and other files are left out."""
    require(folder.is_dir(), f"{folder}: there is no such folder")
    found = {}
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not file.is_file():
            continue
        ending = file.suffix.lower()
        message = f"{file}: browsers do not show {ending}; convert it to .png, .mp4 or .webm"
        require(ending not in NOT_IN_BROWSERS, message)
        if ending not in PICTURES + CLIPS:
            continue
        category = relative.parent.as_posix()
        key = ("" if category == "." else category, file.stem)
        require(key not in found, f"{file}: {found.get(key)} has the same name; keep one of them")
        found[key] = file
    require(found, f"{folder}: holds no pictures or clips ({' '.join(PICTURES + CLIPS)})")
    return found


def find_methods(folders: Sequence[Path], reference: str) -> dict[str, dict]:
    """Every method's files, the reference first. UserError unless all have the same sources."""
    methods = {}
    for folder in folders:
        name = folder.resolve().name
        require(name not in methods, f"{folder}: two folders are named {name}; rename one")
        methods[name] = find_files(folder)
    names = ", ".join(methods)
    require(reference in methods, f"--reference {reference}: none of the folders ({names}) is it")
    require(len(methods) > 1, f"{folders[0]}: the only folder; name those to compare it with")
    everything = sorted(set().union(*methods.values()))
    for name, files in methods.items():
        missing = ["/".join(filter(None, key)) for key in everything if key not in files]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise UserError(f"{name}: lacks {missing[0]}{more}; all folders need the same files")
    first = {reference: methods.pop(reference)}
    return first | methods


def require_comparable(source: tuple[str, str], files: Sequence[Path]) -> None:
    """UserError unless all are readable pictures, or all clips; a warning for unequal sizes."""
    are_clips = {file.suffix.lower() in CLIPS for file in files}
    kind = "clips" if files[0].suffix.lower() in CLIPS else "pictures"
    require(len(are_clips) == 1, f"{files[0]}: its counterparts are not all {kind}; make them so")
    if are_clips == {True}:
        for file in files:
            require_clip(file)
        return
    sizes = [picture_size(file) for file in files]
    if len(set(sizes)) > 1:
        name = "/".join(filter(None, source))
        listed = ", ".join(f"{file}: {w}x{h}" for file, (w, h) in zip(files, sizes, strict=True))
        warn(f"{name} has several sizes, which tell methods apart: {listed}")


def require_clip(file: Path) -> None:
    """UserError unless a clip begins as .mp4 and .webm do; what is in it only a browser knows."""
    with file.open("rb") as opened:
        start = opened.read(8)
    is_clip = start[4:] == b"ftyp" or start[:4] == b"\x1aE\xdf\xa3"
    require(is_clip, f"{file}: is no .mp4 or .webm clip; replace or remove it")


def picture_size(file: Path) -> tuple[int, int]:
    """(width, height) of a picture that Pillow can read."""
    try:
        with quietly(), Image.open(file) as picture:
            picture.verify()
            return picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: cannot be read as a picture; replace or remove it") from error


def choose_training(methods: dict[str, dict], count: int) -> tuple[list[Stimulus], bool]:
    """Training stimuli, the first sources by every method; and whether they are spare.

    Training is best done with sources that are not rated later (P.910). They come from the category
    with the most sources, if it has enough. Else the training's stimuli are rated again later.
    """
    sources = sorted(next(iter(methods.values())))
    by_category = {}
    for source in sources:
        by_category.setdefault(source[0], []).append(source)
    largest = max(by_category.values(), key=len)
    needed = math.ceil(count / len(methods))
    spare = len(largest) > needed
    pool = largest if spare else sources
    chosen = []
    for source, method in itertools.product(pool, methods):
        chosen.append(Stimulus(method, *source, methods[method][source], training=True))
    return chosen[:count], spare


def choose_stimuli(methods: dict[str, dict], training: int) -> list[Stimulus]:
    """Everything that is shown: the training's stimuli, and those that count."""
    chosen, spare = choose_training(methods, training)
    require(
        len(chosen) == training,
        f"only {len(chosen)} files for {training} training items; `--training 0` shows none",
    )
    if chosen and not spare:
        warn("training shows pictures that are rated again later: no category has any to spare")
    held_back = {stimulus.source for stimulus in chosen} if spare else set()
    counted = []
    for method, files in methods.items():
        for source, file in files.items():
            if source not in held_back:
                counted.append(Stimulus(method, *source, file))
    return chosen + counted


# --- The page: from stimuli to study/ and its key -------------------------------------------------


def opaque(salt: str, *parts: str) -> str:
    """16 hexadecimal digits that tell nothing to who does not know the salt."""
    text = "\0".join((salt, *parts))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def name_blindly(stimuli: Iterable[Stimulus], salt: str) -> dict[str, Stimulus]:
    """Stimuli by opaque names, in the names' order, which tells nothing of the folders' order."""
    named = {}
    for stimulus in stimuli:
        kind = "training" if stimulus.training else "counted"
        named[opaque(salt, kind, stimulus.method, *stimulus.source)] = stimulus
    return dict(sorted(named.items()))


def page_data(study: str, title: str, named: dict[str, Stimulus], salt: str) -> dict:
    """What the page knows. Sources are numbered blindly: it keeps their versions apart in time."""
    stimuli = []
    for name, stimulus in named.items():
        described = {
            "id": name,
            "file": f"media/{name}{stimulus.file.suffix.lower()}",
            "source": opaque(salt, "source", *stimulus.source),
            "clip": stimulus.file.suffix.lower() in CLIPS,
            "training": stimulus.training,
        }
        stimuli.append(described)
    return {"study": study, "title": title, "stimuli": stimuli}


def key_data(study: str, title: str, named: dict[str, Stimulus], methods: Iterable[str]) -> dict:
    """What `score` needs, and participants do not get. The first method is the reference."""
    stimuli = {}
    for name, stimulus in named.items():
        described = dataclasses.asdict(stimulus)
        del described["file"]
        stimuli[name] = described
    methods = list(methods)
    return {
        "study": study,
        "title": title,
        "reference": methods[0],
        "methods": methods,
        "stimuli": stimuli,
    }


def digest(template: str, tag: str) -> str:
    """A content security policy's name for the only element without attributes of this kind."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def fill_template(template: str, data: dict) -> str:
    """The page: the study's data, and a policy under which no other script or address is used.

    Chromium takes a page's own folder for 'self' when the page is a file; `file:` is for browsers
    that do not. On a server it allows nothing more: no page there may load files.
    """
    policy = [
        "default-src 'none'",
        "img-src 'self' file:",
        "media-src 'self' file:",
        f"script-src {digest(template, 'script')}",
        f"style-src {digest(template, 'style')}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    # In JSON every `<` may be written as an escape, so no text can end the element that holds it.
    text = json.dumps(data).replace("<", r"\u003c")
    page = template.replace("{{policy}}", "; ".join(policy))
    return page.replace("{{study}}", text)


def write_study(folder: Path, page: str, named: dict[str, Stimulus]) -> None:
    """The page and its media.

    Copies carry no times of the originals, which could tell methods. Their bytes and endings stay
    as they are: who searches within them may find a method there.
    """
    (folder / "media").mkdir()
    for name, stimulus in named.items():
        target = folder / "media" / (name + stimulus.file.suffix.lower())
        shutil.copyfile(stimulus.file, target)
    (folder / "index.html").write_text(page, encoding="utf-8", newline="\n")


def require_new(study: Path, key: Path) -> None:
    """UserError where the study or its key exist: without its key a study's ratings are lost."""
    message = "is there already; name another, or remove it if nobody rated it"
    is_taken = study.exists() and not (study.is_dir() and not any(study.iterdir()))
    require(not is_taken, f"-o {study}: {message}")
    require(not key.exists(), f"--key {key}: {message}")
    inside = study.resolve() in key.resolve().parents
    require(not inside, f"--key {key}: participants would get it; name a file outside of {study}")


def build(
    folders: Sequence[Path],
    output: Path,
    key: Path | None = None,
    reference: str = "sharp",
    title: str = "Picture quality study",
    training: int = 3,
    seed: int | None = None,
) -> None:
    """Write a study's folder and, beside it, its key.

    The salt of opaque names is random, or comes from `seed` where the same study is to be built
    again; who knows the seed can tell the names.
    """
    output = Path(os.path.normpath(output))
    require(output.name, f"-o {output}: name a new folder")
    key = key or output.with_name(output.name + "_key.json")
    require_new(output, key)
    methods = find_methods(folders, reference)
    for source in methods[reference]:
        require_comparable(source, [files[source] for files in methods.values()])
    salt = secrets.token_hex(16) if seed is None else random.Random(seed).randbytes(16).hex()
    named = name_blindly(choose_stimuli(methods, training), salt)
    study = opaque(salt, "study", title, *named)
    template = TEMPLATE.read_text(encoding="utf-8")
    page = fill_template(template, page_data(study, title, named, salt))
    key_text = json.dumps(key_data(study, title, named, methods), indent=1) + "\n"

    output.parent.mkdir(parents=True, exist_ok=True)
    key.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mos_study-", dir=output.parent) as temporary:
        whole = Path(temporary) / "study"
        whole.mkdir()
        write_study(whole, page, named)
        with replacing(key) as unfinished:
            unfinished.write_text(key_text, encoding="utf-8")
            if output.exists():  # and is empty
                output.rmdir()
            whole.rename(output)
    counted = sum(not stimulus.training for stimulus in named.values())
    print(f"{shown(output / 'index.html')}: {counted} to rate after {training} for training")
    print(f"{shown(key)}: keep this; it tells what participants must not know")


# --- Ratings: from CSV files to an array ----------------------------------------------------------


@dataclass
class Ratings:
    """Ratings of one study; values are (participants, methods, sources), NaN where not rated."""

    participants: list[str]
    methods: list[str]  # the hidden reference first
    sources: list[tuple[str, str]]  # (category, item)
    values: np.ndarray

    def of(self, participants: Sequence[bool]) -> "Ratings":
        """The same of some participants."""
        names = list(itertools.compress(self.participants, participants))
        return Ratings(names, self.methods, self.sources, self.values[np.array(participants)])

    def in_category(self, category: str) -> "Ratings":
        """The same of one category's sources."""
        wanted = [source[0] == category for source in self.sources]
        sources = list(itertools.compress(self.sources, wanted))
        return Ratings(self.participants, self.methods, sources, self.values[:, :, wanted])

    @property
    def categories(self) -> list[str]:
        return sorted({category for category, _ in self.sources})

    def flat(self) -> np.ndarray:
        """(participants, stimuli)."""
        return self.values.reshape(len(self.participants), -1)


def read_key(file: Path) -> dict:
    """What `build` wrote beside a study."""
    message = f"{file}: is no key that `build` wrote; name the study's with --key"
    try:
        key = json.loads(file.read_text(encoding="utf-8"))
        is_key = fits_key(key)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); name the study's") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(message) from error
    require(is_key, message)
    return key


def fits_key(key: dict) -> bool:
    """Whether a file's content is what `key_data` makes; any error means no, too."""
    methods = key["methods"]
    is_whole = isinstance(key["study"], str) and key["reference"] == methods[0]
    for stimulus in key["stimuli"].values():
        names = (stimulus["method"], stimulus["category"], stimulus["item"])
        is_whole &= all(isinstance(name, str) for name in names)
        is_whole &= stimulus["method"] in methods
        is_whole &= isinstance(stimulus["training"], bool)
    return is_whole


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of an exported file, with the numbers of their last lines."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened, strict=True)
            names = reader.fieldnames or []
            missing = [column for column in COLUMNS if column not in names]
            message = f"{file}: has no column {', '.join(missing)}; give it as the page exported it"
            require(not missing, message)
            for row in reader:
                whole = None not in row and None not in row.values()
                line = f"{file}, line {reader.line_num}"
                require(whole, f"{line}: has not {len(names)} cells; export again")
                yield reader.line_num, row
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: is no CSV file that the page exported ({error})") from error


def check_row(row: dict[str, str], key: dict) -> None:
    """UserError that says what is wrong in a row, and nothing of where."""
    study = row["study"]
    require(study == key["study"], f"is of study {study}, the key of {key['study']}; name its key")
    stimulus = row["stimulus"]
    require(stimulus in key["stimuli"], f"the study has no stimulus {stimulus!r}")
    training = "1" if key["stimuli"][stimulus]["training"] else "0"
    require(row["training"] == training, f"training is {row['training']!r}, not {training}")
    rating = row["rating"]
    require(not rating or rating in GRADES, f"a rating is 1, 2, 3, 4 or 5, not {rating!r}")
    for column in ("position", "milliseconds"):
        is_count = re.fullmatch("[0-9]{1,12}", row[column])
        require(is_count, f"{column} is no whole number: {row[column]!r}")
    require(original(row["participant"]).strip(), "the participant has no name")


def read_ratings(files: Sequence[Path], key: dict) -> Ratings:
    """Everything rated in these files, training left out. UserError names file and line."""
    given: dict[str, dict[str, float]] = {}
    origins: dict[str, Path] = {}
    for file in files:
        for line, row in read_rows(file):
            try:
                check_row(row, key)
            except UserError as error:
                raise UserError(f"{file}, line {line}: {error}") from error
            name = original(row["participant"])
            before = origins.setdefault(name, file)
            message = f"{file}: {name} is in {before}, too; keep the later export, or rename one"
            require(before == file, message)
            ratings = given.setdefault(name, {})
            stimulus = row["stimulus"]
            require(stimulus not in ratings, f"{file}, line {line}: {stimulus} is rated twice")
            ratings[stimulus] = float(row["rating"] or "nan")
    require(given, f"{files[0]}: holds no ratings")
    ratings = arrange(given, key)
    warn_of_gaps(ratings, origins)
    has_any = ~np.isnan(ratings.flat()).all(1)
    require(has_any.any(), f"{files[0]}: holds ratings of the training alone")
    return ratings.of(has_any)


def arrange(given: dict[str, dict[str, float]], key: dict) -> Ratings:
    """Ratings by participant and opaque name as an array."""
    counted = {name: each for name, each in key["stimuli"].items() if not each["training"]}
    sources = sorted({(each["category"], each["item"]) for each in counted.values()})
    methods = key["methods"]
    values = np.full((len(given), len(methods), len(sources)), np.nan)
    for row, ratings in enumerate(given.values()):
        for name, stimulus in counted.items():
            method = methods.index(stimulus["method"])
            source = sources.index((stimulus["category"], stimulus["item"]))
            values[row, method, source] = ratings.get(name, math.nan)
    return Ratings(list(given), methods, sources, values)


def warn_of_gaps(ratings: Ratings, origins: dict[str, Path]) -> None:
    """A line for each participant who did not rate everything."""
    for name, values in zip(ratings.participants, ratings.flat(), strict=True):
        rated = int((~np.isnan(values)).sum())
        if rated < values.size:
            warn(f"{origins[name]}: {name} rated {rated} of {values.size}; what is there counts")


# --- Screening: who answered carelessly -----------------------------------------------------------


@dataclass
class Screening:
    """How often a participant rated far above (p) and below (q) the others, of how many ratings."""

    p: int
    q: int
    rated: int

    @property
    def rejected(self) -> bool:
        """BT.500's rule: often far away, and on both sides; a steady bias does no harm."""
        outside = self.p + self.q
        if not outside:
            return False
        return outside / self.rated > 0.05 and abs(self.p - self.q) / outside < 0.3


def screen(values: np.ndarray) -> list[Screening]:
    """Screening of participants after Recommendation ITU-R BT.500-13, annex 2, 2.3.1.

    `values` are (participants, stimuli), NaN where not rated. A stimulus's ratings count as normal
    where their kurtosis is from 2 to 4; then "far" is 2 standard deviations, else the square root
    of 20. A stimulus on which all agree tells nothing. It is applied once, as BT.500 demands.

    Among n ratings none is further away than (n - 1) / sqrt(n) standard deviations: with fewer than
    six participants this rule never finds anybody.
    """
    rated = (~np.isnan(values)).sum(0)
    divisor = np.maximum(rated, 1)
    deviation = values - np.nansum(values, 0) / divisor
    second = np.nansum(deviation**2, 0) / divisor
    fourth = np.nansum(deviation**4, 0) / divisor
    useful = second > 1e-12
    safe = np.where(useful, second, 1.0)
    kurtosis = fourth / safe**2
    spread = np.sqrt(safe * rated / np.maximum(rated - 1, 1))
    limit = np.where((kurtosis >= 2) & (kurtosis <= 4), 2.0, math.sqrt(20)) * spread
    above = useful & (deviation >= limit)
    below = useful & (deviation <= -limit)
    counts = zip(above.sum(1), below.sum(1), (~np.isnan(values)).sum(1), strict=True)
    return [Screening(int(p), int(q), int(n)) for p, q, n in counts]


def correlations(values: np.ndarray) -> list[float]:
    """Pearson's correlation of each participant with the mean of the others; NaN where undefined.

    `values` are (participants, stimuli). P.913 screens participants by such a correlation. Here a
    low one is a warning, and `--leave-out` the answer to it. It finds what BT.500 misses. In 20
    simulated studies 24 participants were honest and the 25th answered at random. BT.500 rejected
    the 25th in 15 of them. The 25th's correlation was below 0.5 in all 20, everybody else's above
    0.7.
    """
    result = []
    for row, own in enumerate(values):
        others = np.delete(values, row, 0)
        both = ~np.isnan(own) & (~np.isnan(others)).any(0)
        correlation = math.nan
        if both.any():
            correlation = pearson(own[both], np.nanmean(others[:, both], 0))
        result.append(correlation)
    return result


def pearson(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation; NaN where one of the two does not vary."""
    first = first - first.mean()
    second = second - second.mean()
    norm = math.sqrt((first @ first) * (second @ second))
    return float(first @ second) / norm if norm > 1e-12 else math.nan


# --- Scores: MOS, DMOS, confidence intervals ------------------------------------------------------


@dataclass
class Mean:
    """A mean over n participants, and half the width of its 95 % confidence interval."""

    n: int
    value: float
    half: float


def mean_of(values: np.ndarray) -> Mean:
    """Mean and confidence interval t * S / sqrt(n) by Student's t (P.910, BT.500); NaNs left out.

    One value has no interval: its half width is NaN.
    """
    from scipy.stats import t

    values = values[~np.isnan(values)]
    n = len(values)
    if n == 0:
        return Mean(0, math.nan, math.nan)
    if n == 1:
        return Mean(1, float(values[0]), math.nan)
    factor = t.ppf((1 + CONFIDENCE) / 2, n - 1)
    return Mean(n, float(values.mean()), float(factor * values.std(ddof=1) / math.sqrt(n)))


def differential(values: np.ndarray) -> np.ndarray:
    """P.910's differential ratings: rating - the hidden reference's + 5, by one participant.

    `values` are (participants, methods, sources), the reference first. What looks better than the
    reference gets more than 5; it is not crushed.
    """
    return values - values[:, :1] + 5


def participant_means(values: np.ndarray) -> np.ndarray:
    """Each participant's mean for each method, (participants, methods).

    The unit is the participant, not the rating: ratings by one person resemble each other, and an
    interval over all ratings would be too narrow. So each person gives one number, and the interval
    tells what other people would say of these pictures. Only sources of which a participant rated
    every method count, or a method would gain by being seen on easy pictures.
    """
    whole = ~np.isnan(values).any(1, keepdims=True)
    total = np.where(whole, values, 0).sum(2)
    count = whole.sum(2)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def score_rows(ratings: Ratings) -> list[dict]:
    """MOS and DMOS for each method: of all sources, of each category, and of each stimulus."""
    rows = method_rows(ratings, "all", "")
    for category in ratings.categories:
        rows += method_rows(ratings.in_category(category), "category", category)
    difference = differential(ratings.values)
    for column, (category, item) in enumerate(ratings.sources):
        for index, method in enumerate(ratings.methods):
            mos = mean_of(ratings.values[:, index, column])
            dmos = mean_of(difference[:, index, column])
            rows.append(score_row("stimulus", category, item, method, mos, dmos))
    return rows


def method_rows(ratings: Ratings, scope: str, category: str) -> list[dict]:
    """One row for each method, over all sources that these ratings hold."""
    means = participant_means(ratings.values)
    differences = participant_means(differential(ratings.values))
    rows = []
    for index, method in enumerate(ratings.methods):
        mos = mean_of(means[:, index])
        dmos = mean_of(differences[:, index])
        rows.append(score_row(scope, category, "", method, mos, dmos))
    return rows


def score_row(
    scope: str, category: str, item: str, method: str, mos: Mean, dmos: Mean
) -> dict[str, object]:
    """One line of scores.csv; the half widths are those of 95 % confidence intervals."""
    return {
        "scope": scope,
        "category": category,
        "item": item,
        "method": method,
        "participants": mos.n,
        "mos": mos.value,
        "mos_half_width": mos.half,
        "dmos": dmos.value,
        "dmos_half_width": dmos.half,
    }


# --- Comparisons: which methods differ ------------------------------------------------------------


@dataclass
class Comparison:
    """Two methods: how much better the first is, and the corrected p of no difference."""

    first: str
    second: str
    participants: int
    difference: float
    p: float


def wilcoxon_p(differences: np.ndarray) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; 1 where nothing differs.

    Not the paired t test: means of a five-grade scale are skewed near its ends (nearly everybody
    gives the sharp picture a 5), and a few participants do not average that away. Below six
    participants this test cannot reach 0.05.
    """
    from scipy.stats import wilcoxon

    # Means of whole numbers: 1e-9 joins what differs by rounding alone, and must tie.
    differences = np.round(differences, 9)
    if not differences.any():
        return 1.0
    with quietly():  # SciPy warns of few participants, and of ties
        return float(wilcoxon(differences).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p of the whole family, each at most 1."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected


def compare(ratings: Ratings) -> list[Comparison]:
    """Every pair of methods, paired by participant."""
    means = participant_means(ratings.values)
    means = means[~np.isnan(means).any(1)]
    if not len(means):
        return []
    pairs = list(itertools.combinations(range(len(ratings.methods)), 2))
    differences = [means[:, first] - means[:, second] for first, second in pairs]
    corrected = holm([wilcoxon_p(each) for each in differences])
    result = []
    for (first, second), each, p in zip(pairs, differences, corrected, strict=True):
        names = (ratings.methods[first], ratings.methods[second])
        result.append(Comparison(*names, len(means), float(each.mean()), p))
    return result


# --- Reports: tables, a CSV file, a plot ----------------------------------------------------------


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, two spaces apart: the first to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
    print()


def decimals(number: float) -> str:
    """A number with two digits behind the point, or a hyphen where there is none."""
    return "-" if math.isnan(number) else f"{number:.2f}"


def print_screening(
    names: Sequence[str], screened: Sequence[Screening], values: np.ndarray
) -> None:
    """Who is rejected by BT.500, and who agrees little with the others."""
    found = correlations(values)
    rows = [("participant", "rated", "P", "Q", "correlation", "BT.500")]
    for name, each, correlation in zip(names, screened, found, strict=True):
        verdict = "rejected" if each.rejected else "kept"
        counts = (str(each.rated), str(each.p), str(each.q))
        rows.append((shown(name), *counts, decimals(correlation), verdict))
    print_table(rows)
    kept = [not each.rejected for each in screened]
    for name, is_kept, correlation in zip(names, kept, found, strict=True):
        agrees = correlation >= LOW_CORRELATION  # no, where it is NaN
        if is_kept and not agrees and len(names) > 1:
            message = f"{name} agrees little with the others (correlation {decimals(correlation)})"
            warn(f"{message}; look at the ratings, --leave-out leaves them out")


def print_scores(rows: Sequence[dict], title: str) -> None:
    """One table of MOS and DMOS."""
    table = [(title, "n", "MOS", "95 % CI", "DMOS", "95 % CI")]
    for row in rows:
        mos = (decimals(row["mos"]), "± " + decimals(row["mos_half_width"]))
        dmos = (decimals(row["dmos"]), "± " + decimals(row["dmos_half_width"]))
        table.append((shown(row["method"]), str(row["participants"]), *mos, *dmos))
    print_table(table)


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    """Every pair of methods, and whether they differ."""
    if not comparisons:
        warn("nobody rated every method of any source: methods cannot be compared")
        return
    table = [("pair", "difference", "p (Wilcoxon, Holm)", "")]
    for each in comparisons:
        pair = f"{shown(each.first)} - {shown(each.second)}"
        verdict = "differ" if each.p < SIGNIFICANCE else "not shown to differ"
        p = format(each.p, ".4f") if each.p >= 0.0001 else "< 0.0001"
        table.append((pair, f"{each.difference:+.2f}", p, verdict))
    print_table(table)
    # The smallest p of all is that of equal signs everywhere.
    participants = comparisons[0].participants
    smallest = 2 * 0.5**participants * len(comparisons)
    if smallest >= SIGNIFICANCE:
        warn(f"{participants} participants are too few for any difference to be significant")


def category_title(category: str) -> str:
    """How a category is called in tables and plots."""
    return shown(category) or "(no category)"


def print_report(rows: Sequence[dict], ratings: Ratings) -> None:
    """All tables of scores and comparisons."""
    print_scores([row for row in rows if row["scope"] == "all"], "all")
    if len(ratings.categories) > 1:
        for category in ratings.categories:
            chosen = [row for row in rows if is_of_category(row, category)]
            print_scores(chosen, category_title(category))
    print_comparisons(compare(ratings))


def is_of_category(row: dict, category: str) -> bool:
    return row["scope"] == "category" and row["category"] == category


def write_scores(rows: Sequence[dict], file: Path) -> None:
    """scores.csv: texts defused, numbers as they are, nothing where there is no number."""
    options = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
    with replacing(file) as temporary, temporary.open("w", **options) as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({column: plain_cell(value) for column, value in row.items()})


def plain_cell(value: object) -> object:
    """A value for a CSV file."""
    if isinstance(value, str):
        return defused(value)
    if isinstance(value, float):
        return "" if math.isnan(value) else round(value, 6)
    return value


def draw(rows: Sequence[dict], ratings: Ratings, file: Path) -> None:
    """A panel for all, and one for each category if there are several: MOS with error bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("all", [row for row in rows if row["scope"] == "all"])]
    if len(ratings.categories) > 1:
        for category in ratings.categories:
            chosen = [row for row in rows if is_of_category(row, category)]
            panels.append((category_title(category), chosen))
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    size = (columns * max(2.6, 0.8 * len(ratings.methods)) + 0.6, 3.0 * lines)
    figure, axes = pyplot.subplots(lines, columns, sharey=True, squeeze=False, figsize=size)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, chosen) in zip(axes.flat, panels, strict=False):
        draw_panel(axis, title, chosen)
    for axis in axes[:, 0]:
        axis.set_ylabel("MOS, 95 % CI")
    figure.tight_layout()
    ending = file.suffix.lstrip(".").lower() or "png"
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=150, format=ending)
    pyplot.close(figure)


def draw_panel(axis, title: str, rows: Sequence[dict]) -> None:
    """One point and error bar for each method. Names are texts, never mathematics."""
    places = range(len(rows))
    means = [row["mos"] for row in rows]
    halves = [row["mos_half_width"] for row in rows]
    halves = [0 if math.isnan(half) else half for half in halves]
    axis.errorbar(places, means, yerr=halves, fmt="o", color="#1f5fae", capsize=4)
    names = [shown(row["method"]) for row in rows]
    labels = [name if len(name) <= 16 else name[:15] + "…" for name in names]
    axis.set_xticks(places, labels, rotation=30, ha="right", parse_math=False)
    axis.set_title(title if len(title) <= 30 else title[:29] + "…", parse_math=False)
    axis.set_xlim(-0.5, len(rows) - 0.5)
    axis.set_ylim(0.9, 5.1)
    axis.set_yticks(range(1, 6))
    axis.grid(axis="y", alpha=0.3)


def require_package(name: str, pip_name: str, wanted_by: str) -> None:
    """UserError with the pip command, before any work, unless the package is installed."""
    message = f"{wanted_by} needs another package: pip install {pip_name}"
    require(importlib.util.find_spec(name), message)


def require_plot(file: Path) -> None:
    """UserError for a plot that cannot be drawn."""
    require_package("matplotlib", "matplotlib", "--plot")
    endings = (".png", ".svg", ".pdf")
    require(file.suffix.lower() in endings, f"--plot {file}: its ending is none of {endings}")


def without(ratings: Ratings, names: Sequence[str]) -> Ratings:
    """The ratings without those of these participants."""
    for name in names:
        message = f"--leave-out {name}: the files hold no such participant"
        require(name in ratings.participants, message)
    kept = [name not in names for name in ratings.participants]
    require(any(kept), f"--leave-out {' '.join(names)}: nobody is left")
    return ratings.of(kept)


def score(
    files: Sequence[Path],
    key: Path,
    output: Path | None = None,
    plot: Path | None = None,
    screening: bool = True,
    leave_out: Sequence[str] = (),
) -> None:
    """Print MOS, DMOS and comparisons of exported ratings; write them as CSV and as a plot."""
    require_package("scipy", "scipy", "score")
    if plot:
        require_plot(plot)
    for file in filter(None, (output, plot)):
        require(file.parent.is_dir(), f"{file}: there is no folder {file.parent}; make it first")
        require(not file.is_dir(), f"{file}: is a folder; name a file")
    ratings = without(read_ratings(files, read_key(key)), leave_out)
    print(f"{len(ratings.participants)} participants, ", end="")
    print(f"{len(ratings.methods)} methods, {len(ratings.sources)} sources\n")
    screened = screen(ratings.flat())
    print_screening(ratings.participants, screened, ratings.flat())
    if screening:
        kept = [not each.rejected for each in screened]
        require(any(kept), "BT.500 rejects every participant; --no-screening keeps them")
        ratings = ratings.of(kept)
    if len(ratings.participants) < FEW_PARTICIPANTS:
        warn(
            f"{len(ratings.participants)} participants; P.910 asks for {FEW_PARTICIPANTS} at least"
        )
    rows = score_rows(ratings)
    print_report(rows, ratings)
    if output:
        write_scores(rows, output)
    if plot:
        draw(rows, ratings, plot)


# --- Command line ---------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose errors are one line like all others of this script."""

    def __init__(self, **options) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (python {self.prog} --help explains the flags)")


def named_path(text: str) -> Path:
    """A path; an empty text, as of a shell's variable that is not set, would be this folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return Path(text)


def count(text: str) -> int:
    """A whole number from 0."""
    if not re.fullmatch("[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


def make_parser() -> Parser:
    """Both commands and their flags."""
    parser = Parser(prog="mos_study.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    about = "write a blind study page, and its key beside it"
    build_parser = commands.add_parser("build", help=about, description=about)
    build_parser.add_argument("folders", nargs="+", type=named_path, help="one folder a method")
    build_parser.add_argument(
        "-o", "--output", type=named_path, required=True, help="the study's folder"
    )
    build_parser.add_argument(
        "--key", type=named_path, help="the key's file (default: OUTPUT_key.json)"
    )
    build_parser.add_argument(
        "--reference", default="sharp", help="the hidden reference (default: sharp)"
    )
    build_parser.add_argument("--title", default="Picture quality study", help="the page's title")
    build_parser.add_argument(
        "--training", type=count, default=3, help="training items first (default: 3)"
    )
    build_parser.add_argument(
        "--seed", type=count, help="build the same names again (default: random)"
    )

    about = "print MOS, DMOS and comparisons of exported ratings"
    score_parser = commands.add_parser("score", help=about, description=about)
    score_parser.add_argument(
        "files", nargs="+", type=named_path, help="CSV files that the page exported"
    )
    score_parser.add_argument("--key", type=named_path, required=True, help="what `build` wrote")
    score_parser.add_argument("-o", "--output", type=named_path, help="write all scores as CSV")
    score_parser.add_argument("--plot", type=named_path, help="draw MOS as .png, .svg or .pdf")
    score_parser.add_argument(
        "--no-screening", dest="screening", action="store_false", help="leave nobody out by BT.500"
    )
    score_parser.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="NAME",
        help="a participant whose ratings do not count; may be given several times",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for what the user can mend, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # which may be unable to show a file's name
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="backslashreplace")
    try:
        given = vars(make_parser().parse_args(arguments))
        command = {"build": build, "score": score}[given.pop("command")]
        command(**given)
    except (UserError, OSError) as error:
        print("mos_study: error:", shown(" ".join(str(error).split())), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
