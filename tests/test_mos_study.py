"""The opinion study: `mos_study.py build`, its page in a real browser, and `score`."""

import csv
import importlib.util
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

SCRIPT = Path(__file__).resolve().parent.parent / "inference_samples/mos_study.py"
METHODS = ("sharp", "blurred", "student")
HOSTILE = "<img src=x onerror=alert(1)>\"'&</script><script>alert(2)</script>"


def load_script():
    spec = importlib.util.spec_from_file_location("mos_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["mos_study"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


mos = load_script()


def make_folders(root, methods=METHODS, items=("photo/a", "photo/b", "text/c"), size=(40, 30)):
    """A folder for each method; every picture has a colour of its own."""
    folders = []
    for row, method in enumerate(methods):
        for column, item in enumerate(items):
            file = root / method / f"{item}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (60 * row, 20 * column, 200)).save(file)
        folders.append(root / method)
    return folders


@pytest.fixture
def folders(tmp_path):
    return make_folders(tmp_path / "in")


def build(folders, study, *options):
    return mos.main(["build", *map(str, folders), "-o", str(study), *options])


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


def page_study(page):
    """The data that a built page carries."""
    text = re.search('<script type="application/json" id="study">(.*?)</script>', page, re.DOTALL)
    return json.loads(text[1])


def one_error(capsys):
    """The only line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mos_study: error: ")
    return line


# --- build ----------------------------------------------------------------------------------------


def test_a_study_holds_every_picture_once_and_its_training(folders, tmp_path, capsys):
    assert build(folders, tmp_path / "study") == 0
    assert "6 to rate after 3 for training" in capsys.readouterr().out
    key = read_json(tmp_path / "study_key.json")
    assert (key["reference"], key["methods"]) == ("sharp", ["sharp", "blurred", "student"])
    files = [*(tmp_path / "study/media").iterdir()]
    assert {file.stem for file in files} == set(key["stimuli"])
    for file in files:
        of = key["stimuli"][file.stem]
        source = tmp_path / "in" / of["method"] / of["category"] / f"{of['item']}.png"
        assert file.read_bytes() == source.read_bytes()
    counted = [tuple(each.values())[:3] for each in key["stimuli"].values() if not each["training"]]
    wanted = itertools.product(METHODS, (("photo", "b"), ("text", "c")))
    assert sorted(counted) == sorted((method, *source) for method, source in wanted)


def test_training_shows_each_method_of_a_source_that_is_not_rated_later(folders, tmp_path):
    # Of two categories photo has two sources, so its first can be spared.
    build(folders, tmp_path / "study")
    stimuli = read_json(tmp_path / "study_key.json")["stimuli"].values()
    training = [each for each in stimuli if each["training"]]
    assert sorted(each["method"] for each in training) == sorted(METHODS)
    assert {(each["category"], each["item"]) for each in training} == {("photo", "a")}


def test_training_without_spare_sources_is_rated_again_and_said_to_be(tmp_path, capsys):
    folders = make_folders(tmp_path / "in", items=("photo/a", "text/c"))
    assert build(folders, tmp_path / "study") == 0
    assert "rated again later" in capsys.readouterr().err
    stimuli = read_json(tmp_path / "study_key.json")["stimuli"].values()
    assert sum(each["training"] for each in stimuli) == 3
    assert sum(not each["training"] for each in stimuli) == 6


def test_nothing_that_participants_get_tells_methods_or_names(tmp_path):
    methods = ("sharp", "zz-blurred", "zz-student")
    folders = make_folders(tmp_path / "in", methods, ("zz-photo/zz-a", "zz-photo/zz-b"))
    build(folders, tmp_path / "study")
    page = (tmp_path / "study/index.html").read_text(encoding="utf-8")
    assert "zz-" not in page
    assert "sharp" not in page
    names = [file.name for file in (tmp_path / "study").rglob("*")]
    media = [name for name in names if name not in ("index.html", "media")]
    assert all(re.fullmatch("[0-9a-f]{16}\\.png", name) for name in media)
    stimuli = page_study(page)["stimuli"]
    assert set(stimuli[0]) == {"id", "file", "source", "clip", "training"}
    assert [each["id"] for each in stimuli] == sorted(each["id"] for each in stimuli)
    assert not (tmp_path / "study/study_key.json").exists()


def test_names_are_new_in_every_build_unless_seeded(folders, tmp_path):
    names = []
    for study, options in (("a", ()), ("b", ()), ("c", ("--seed", "1")), ("d", ("--seed", "1"))):
        build(folders, tmp_path / study, *options)
        names.append(set(read_json(tmp_path / f"{study}_key.json")["stimuli"]))
    assert not names[0] & names[1]
    assert names[2] == names[3]
    assert not names[0] & names[2]


def test_the_policy_names_the_pages_own_script_and_style(folders, tmp_path):
    build(folders, tmp_path / "study")
    page = (tmp_path / "study/index.html").read_text(encoding="utf-8")
    policy = re.search('Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashed = subprocess.run(
            ["openssl", "dgst", "-sha256", "-binary"], input=content.encode(), capture_output=True
        ).stdout
        encoded = subprocess.run(["base64"], input=hashed, capture_output=True).stdout.decode()
        assert f"{tag}-src 'sha256-{encoded.strip()}'" in policy
    assert not re.search("https?:", page)


def test_a_title_cannot_leave_the_data(folders, tmp_path):
    build(folders, tmp_path / "study", "--title", HOSTILE)
    page = (tmp_path / "study/index.html").read_text(encoding="utf-8")
    assert page_study(page)["title"] == HOSTILE
    assert "<img" not in page
    assert page.count("<script") == 2


def test_another_reference_and_folders_without_categories(tmp_path):
    folders = make_folders(tmp_path / "in", ("low", "original"), ("a", "b", "c"))
    options = ("--reference", "original", "--key", str(tmp_path / "keys/k.json"))
    assert build([f"{folders[0]}/", folders[1]], tmp_path / "new/study", *options) == 0
    key = read_json(tmp_path / "keys/k.json")
    assert key["methods"] == ["original", "low"]
    assert {each["category"] for each in key["stimuli"].values()} == {""}


def remove(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda i: (i / "student/text/c.png").unlink(), (), "student: lacks text/c; all folders"),
        (lambda i: remove(i / "student/photo"), (), "student: lacks photo/a and 1 more"),
        (lambda i: remove(i / "student"), (), "student: there is no such folder"),
        (lambda i: remove(i / "student/photo") or remove(i / "student/text"), (), "holds no pict"),
        (lambda i: (i / "student/text/c.png").write_bytes(b"\x89PNG"), (), "cannot be read as a p"),
        (lambda i: (i / "student/text/c.tif").touch(), (), "browsers do not show .tif"),
        (lambda i: (i / "student/text/c.jpg").touch(), (), "c.jpg has the same name"),
        (lambda i: (i / "blurred/text/c.png").rename(i / "blurred/text/c.mp4"), (), "not all pict"),
        (lambda i: (i / "sharp").rename(i / "x") and (i / "sharp").symlink_to(i / "blurred"), (),
         "two folders are named blurred"),
        (lambda i: None, ("--reference", "original"), "--reference original: none of the folders"),
        (lambda i: None, ("--training", "10"), "only 9 files for 10 training items; "),
        (lambda i: None, ("--training", "-1"), "'-1' is no whole number"),
        (lambda i: None, ("--key", ""), "an empty name"),
        (lambda i: None, ("--colour",), "unrecognized arguments: --colour"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_one_line_and_nothing_is_written(
    tmp_path, folders, capsys, damage, options, message
):
    damage(tmp_path / "in")
    assert build(folders, tmp_path / "study", *options) == 2
    assert message in one_error(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_study_and_its_key_are_never_replaced(folders, tmp_path, capsys):
    build(folders, tmp_path / "study")
    before = (tmp_path / "study_key.json").read_bytes()
    capsys.readouterr()
    assert build(folders, tmp_path / "study") == 2
    assert "study: is there already" in one_error(capsys)
    remove(tmp_path / "study")
    assert build(folders, tmp_path / "study") == 2
    assert "study_key.json: is there already" in one_error(capsys)
    assert (tmp_path / "study_key.json").read_bytes() == before
    inside = str(tmp_path / "other/key.json")
    assert build(folders, tmp_path / "other", "--key", inside) == 2
    assert "participants would get it" in one_error(capsys)


@pytest.mark.parametrize("output", [".", "/"])
def test_a_study_is_a_new_folder(folders, capsys, output):
    assert build(folders, output) == 2
    assert f"-o {output}: name a new folder" in one_error(capsys)


def test_one_folder_is_nothing_to_compare(folders, tmp_path, capsys):
    assert build(folders[:1], tmp_path / "study") == 2
    assert "the only folder" in one_error(capsys)


def test_unequal_sizes_are_named(folders, tmp_path, capsys):
    Image.new("RGB", (20, 15)).save(folders[1] / "text/c.png")
    assert build(folders, tmp_path / "study") == 0
    error = capsys.readouterr().err
    assert "text/c has several sizes" in error
    assert "20x15" in error


def test_an_empty_clip_is_refused(tmp_path, capsys):
    for method in METHODS:
        (tmp_path / method).mkdir()
        (tmp_path / method / "a.mp4").touch()
    assert build([tmp_path / method for method in METHODS], tmp_path / "study") == 2
    assert "is no .mp4 or .webm clip" in one_error(capsys)


def test_the_script_starts_without_pytorch(tmp_path):
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); "
    code += "assert not {'torch', 'sharpen_kd', 'scipy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(SCRIPT)], check=True, cwd=tmp_path)


# --- Formulas, worked by hand ---------------------------------------------------------------------


def test_a_confidence_interval_is_students():
    # 3, 4, 5: S = 1, and t at 2 degrees of freedom is 4.3027.
    mean = mos.mean_of(np.array([3.0, 4.0, math.nan, 5.0]))
    assert (mean.n, mean.value) == (3, 4.0)
    assert mean.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    low, high = scipy.stats.t.interval(0.95, 2, loc=4, scale=scipy.stats.sem([3, 4, 5]))
    assert (4 - mean.half, 4 + mean.half) == pytest.approx((low, high))


def test_one_rating_has_no_interval_and_none_no_mean():
    assert mos.mean_of(np.array([4.0])).value == 4
    assert math.isnan(mos.mean_of(np.array([4.0])).half)
    assert math.isnan(mos.mean_of(np.array([math.nan])).value)


def test_a_differential_rating_is_from_the_same_persons_reference():
    # One participant, two methods, two sources: 3 against 5 is 3; 5 against 4 is 6, not crushed.
    values = np.array([[[5.0, 4.0], [3.0, 5.0]]])
    assert mos.differential(values).tolist() == [[[5, 5], [3, 6]]]


def test_a_method_gains_nothing_by_a_source_that_another_lacks():
    # The second source counts for neither method: the second method was not rated there.
    values = np.array([[[2.0, 5.0, 4.0], [1.0, math.nan, 2.0]]])
    assert mos.participant_means(values).tolist() == [[3.0, 1.5]]
    assert np.isnan(mos.participant_means(values[:, :, 1:2])).all()


def test_holms_correction():
    # Sorted .01 * 3, .03 * 2, .04 * 1; the last may not be below the one before.
    assert mos.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert mos.holm([0.9, 0.8]) == [1.0, 1.0]
    assert mos.holm([]) == []


def test_wilcoxons_p_is_scipys_and_1_without_a_difference():
    differences = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert mos.wilcoxon_p(differences) == 2 / 2**6
    assert mos.wilcoxon_p(np.zeros(9)) == 1.0
    # 0.1 + 0.2 and 0.3 tie.
    noisy = np.array([0.1 + 0.2, -0.3, 0.5, 0.7, 0.9, -1.1, 1.3])
    plain = scipy.stats.wilcoxon([0.3, -0.3, 0.5, 0.7, 0.9, -1.1, 1.3]).pvalue
    assert mos.wilcoxon_p(noisy) == plain


def test_the_screening_counts_ratings_far_above_and_below():
    # 1, then 3 three times, 4 five times, 5: mean 3.5, sum of squares 6.25 + 0.75 + 1.25 + 2.25
    # = 10.5; m2 = 1.05, S = sqrt(10.5 / 9) = 1.080, m4 = (39.06 + 0.19 + 0.31 + 5.06) / 10 = 4.46,
    # kurtosis 4.05: more than 4, so "far" is sqrt(20) * 1.08 = 4.83, and nobody is.
    ratings = np.array([1, 3, 3, 3, 4, 4, 4, 4, 4, 5], float)[:, None]
    assert scipy.stats.kurtosis(ratings[:, 0], fisher=False) == pytest.approx(4.05, abs=0.01)
    assert [each.q for each in mos.screen(ratings)] == [0] * 10
    # 1, 2, then 4 five times, 5 three times: mean 3.8, m2 = 1.56, S = 1.317, kurtosis 3.21: far is
    # 2 * 1.317 = 2.63, and 3.8 - 2.63 = 1.17 is above 1 alone.
    ratings = np.array([1, 2, 4, 4, 4, 4, 4, 5, 5, 5], float)[:, None]
    assert scipy.stats.kurtosis(ratings[:, 0], fisher=False) == pytest.approx(3.21, abs=0.01)
    assert [each.q for each in mos.screen(ratings)] == [1] + [0] * 9
    assert [each.p for each in mos.screen(6 - ratings)] == [1] + [0] * 9


def test_a_participant_is_rejected_for_both_sides_and_not_for_a_bias():
    # 6 of 100 are more than 5 %; 4 above and 2 below are (4 - 2) / 6 = 0.33 apart.
    assert mos.Screening(3, 3, 100).rejected
    assert not mos.Screening(4, 2, 100).rejected
    assert not mos.Screening(6, 0, 100).rejected
    assert not mos.Screening(2, 3, 100).rejected
    assert not mos.Screening(0, 0, 100).rejected


def test_where_all_agree_nobody_is_far_away():
    values = np.full((8, 5), 4.0)
    assert [(each.p, each.q) for each in mos.screen(values)] == [(0, 0)] * 8


def test_five_participants_are_too_few_for_anybody_to_be_far_away():
    every = itertools.combinations_with_replacement(range(1, 6), 5)
    values = np.array(list(every), float).T
    assert not any(each.p or each.q for each in mos.screen(values))


def test_missing_ratings_are_neither_counted_nor_far_away(recwarn):
    ratings = np.array([1, 2, 4, 4, 4, 4, 4, 5, 5, 5, math.nan])[:, None]
    screened = mos.screen(np.hstack([ratings, np.full_like(ratings, math.nan)]))
    assert [each.q for each in screened] == [1] + [0] * 10
    assert [each.rated for each in screened] == [1] * 10 + [0]
    assert len(recwarn) == 0


def test_a_correlation_is_with_the_mean_of_the_others():
    values = np.array([[1, 2, 4, 5], [2, 3, 3, 5], [5, 4, 2, 1], [3, 3, 3, 3]], float)
    found = mos.correlations(values)
    assert found[0] == pytest.approx(np.corrcoef(values[0], values[1:].mean(0))[0, 1])
    assert found[2] < 0
    assert math.isnan(found[3])


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "'x", "''", "'=x", "'"])
def test_a_cell_that_begins_like_a_formula_is_defused_and_found_back(text):
    assert mos.defused(text) == "'" + text
    assert mos.original("'" + text) == text


@pytest.mark.parametrize("text", ["", "Ada", "a=b", "1", " =1"])
def test_another_cell_stays(text):
    assert mos.defused(text) == text
    assert mos.original(text) == text


# --- score ----------------------------------------------------------------------------------------


def write_ratings(file, key, participant, rate, **changes):
    """An exported file; `rate(method, category, item)` is the rating."""
    rows = []
    for position, (name, of) in enumerate(key["stimuli"].items(), 1):
        rating = rate(of["method"], of["category"], of["item"])
        row = dict(
            zip(mos.COLUMNS, (key["study"], participant, position, name, rating), strict=False)
        )
        row |= {"milliseconds": 900, "training": int(of["training"])} | changes
        rows.append(row)
    write_rows(file, rows)
    return file


def write_rows(file, rows):
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_rows(file):
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


@pytest.fixture
def study(tmp_path, folders, capsys):
    """The key of a study of two sources and three methods, and its file."""
    build(folders, tmp_path / "study")
    capsys.readouterr()
    return read_json(tmp_path / "study_key.json"), tmp_path / "study_key.json"


def score(files, key_file, *options):
    return mos.main(["score", *map(str, files), "--key", str(key_file), *map(str, options)])


def test_scores_worked_by_hand(study, tmp_path, capsys):
    key, key_file = study
    # Source b, then c. Ada: sharp 5 4, blurred 2 1. Ben: sharp 4 4, blurred 1 1. Both: student 3.
    given = {
        "Ada": {("sharp", "b"): 5, ("sharp", "c"): 4, ("blurred", "b"): 2, ("blurred", "c"): 1},
        "Ben": {("sharp", "b"): 4, ("sharp", "c"): 4, ("blurred", "b"): 1, ("blurred", "c"): 1},
    }
    files = []
    for name, ratings in given.items():
        rate = lambda method, category, item, ratings=ratings: ratings.get((method, item), 3)  # noqa: E731
        files.append(write_ratings(tmp_path / f"{name}.csv", key, name, rate))
    out = tmp_path / "scores.csv"
    assert score(files, key_file, "-o", out) == 0
    rows = {
        (row["scope"], row["category"], row["item"], row["method"]): row for row in read_rows(out)
    }

    # Participants' means: sharp 4.5 and 4: 4.25, S = 0.3536, half width 12.706 * S / sqrt(2).
    sharp = rows["all", "", "", "sharp"]
    assert float(sharp["mos"]) == 4.25
    assert float(sharp["mos_half_width"]) == pytest.approx(12.7062 * 0.25, rel=1e-5)
    assert (float(sharp["dmos"]), float(sharp["dmos_half_width"])) == (5, 0)
    # Blurred: 1.5 and 1, each 3 below the reference.
    blurred = rows["all", "", "", "blurred"]
    assert (float(blurred["mos"]), float(blurred["dmos"])) == (1.25, 2)
    assert float(rows["category", "photo", "", "blurred"]["mos"]) == 1.5
    assert float(rows["category", "text", "", "sharp"]["mos"]) == 4
    assert float(rows["stimulus", "photo", "b", "student"]["dmos"]) == 3.5
    assert len(rows) == 3 + 2 * 3 + 2 * 3
    printed = capsys.readouterr()
    assert re.search(r"sharp +2 +4.25 +± 3.18 +5.00 +± 0.00\n", printed.out)
    assert "2 participants are too few" in printed.err
    assert "P.910 asks for 15" in printed.err


def test_training_does_not_count(study, tmp_path):
    key, key_file = study
    file = write_ratings(tmp_path / "a.csv", key, "a", lambda m, c, item: 1 if item == "a" else 4)
    assert score([file], key_file, "-o", tmp_path / "scores.csv") == 0
    assert {float(row["mos"]) for row in read_rows(tmp_path / "scores.csv")} == {4}


TRUTH = {"sharp": 4.0, "student": 3.0, "blurred": 2.0}
CAREFUL = 24
# Seeds: by chance BT.500 finds the careless rater of one study, and misses that of another.
FOUND_BY_BT500 = 0
MISSED_BY_BT500 = 6


def simulate(seed):
    """Ratings (raters, methods, 16 sources) of known means; the last rater answers at random.

    Each careful rater has a bias of -0.4 to 0.4. Ratings are rounded up or down by chance, so that
    their means stay.
    """
    random = np.random.default_rng(seed)
    contents = random.uniform(-0.3, 0.3, 16)
    contents -= contents.mean()
    biases = np.linspace(-0.4, 0.4, CAREFUL)
    wanted = biases[:, None, None] + np.array([*TRUTH.values()])[:, None] + contents
    noisy = wanted + random.normal(0, 0.3, wanted.shape) + random.uniform(size=wanted.shape)
    careful = np.clip(np.floor(noisy), 1, 5)
    return np.concatenate([careful, random.integers(1, 6, (1, *careful.shape[1:]))])


@pytest.fixture
def simulated(tmp_path, capsys):
    """A function that makes the files of a simulated study, and the study's key."""
    items = [f"{category}/{number}" for category in ("photo", "text") for number in range(8)]
    folders = make_folders(tmp_path / "in", [*TRUTH], items, size=(2, 2))
    build(folders, tmp_path / "study", "--training", "0")
    capsys.readouterr()
    key_file = tmp_path / "study_key.json"

    def write(seed):
        files = []
        for number, ratings in enumerate(simulate(seed)):
            named = {}
            for method, row in zip(TRUTH, ratings, strict=True):
                for item, rating in zip(items, row, strict=True):
                    named[(method, *item.split("/"))] = int(rating)
            name = "careless" if number == CAREFUL else f"rater {number}"
            file = tmp_path / f"{number}.csv"
            rate = lambda *stimulus, named=named: named[stimulus]  # noqa: E731
            files.append(write_ratings(file, read_json(key_file), name, rate))
        return files

    return write, key_file


def assert_the_known_means_came_back(file):
    rows = [row for row in read_rows(file) if row["scope"] == "all"]
    assert [row["method"] for row in rows] == [*TRUTH]
    for row in rows:
        known = TRUTH[row["method"]]
        assert int(row["participants"]) == CAREFUL
        assert float(row["mos"]) == pytest.approx(known, abs=0.06)
        assert 0.05 < float(row["mos_half_width"]) < 0.2
        # A rater's bias is in the reference, too, and so leaves the difference.
        assert float(row["dmos"]) == pytest.approx(known - 4 + 5, abs=0.1)
        assert float(row["dmos_half_width"]) < 0.1


def test_known_means_of_simulated_raters_come_back_and_the_careless_one_is_left_out(
    simulated, tmp_path, capsys
):
    write, key_file = simulated
    out = tmp_path / "scores.csv"
    assert score(write(FOUND_BY_BT500), key_file, "-o", out) == 0
    printed = capsys.readouterr()
    rejected = [line for line in printed.out.splitlines() if line.endswith("rejected")]
    assert [line.split()[0] for line in rejected] == ["careless"]
    assert_the_known_means_came_back(out)
    pairs = [line for line in printed.out.splitlines() if " - " in line]
    assert len(pairs) == 3
    assert all(line.endswith("  differ") for line in pairs)

    assert score(write(FOUND_BY_BT500), key_file, "-o", out, "--no-screening") == 0
    assert {row["participants"] for row in read_rows(out)} == {"25"}


def test_a_careless_rater_whom_bt500_misses_is_warned_of_and_can_be_left_out(
    simulated, tmp_path, capsys
):
    write, key_file = simulated
    files = write(MISSED_BY_BT500)
    out = tmp_path / "scores.csv"
    assert score(files, key_file) == 0
    printed = capsys.readouterr()
    assert "rejected" not in printed.out
    (warning,) = printed.err.splitlines()
    assert "careless agrees little with the others" in warning
    assert score(files, key_file, "-o", out, "--leave-out", "careless") == 0
    assert capsys.readouterr().err == ""
    assert_the_known_means_came_back(out)
    assert score(files, key_file, "--leave-out", "nobody") == 2
    assert "--leave-out nobody: the files hold no such participant" in one_error(capsys)


def test_of_20_simulated_studies_the_correlation_finds_the_careless_rater_in_all():
    rejected = []
    for seed in range(20):
        values = simulate(seed).reshape(CAREFUL + 1, -1)
        found = mos.correlations(values)
        assert found[-1] < 0.5
        assert min(found[:-1]) > 0.7
        screened = mos.screen(values)
        assert not any(each.rejected for each in screened[:-1])
        rejected.append(screened[-1].rejected)
    assert sum(rejected) == 15


def test_equal_methods_are_not_said_to_differ(study, tmp_path, capsys):
    key, key_file = study
    random = np.random.default_rng(3)
    files = []
    for number in range(16):
        rate = lambda *stimulus: int(random.integers(2, 5))  # noqa: E731
        files.append(write_ratings(tmp_path / f"{number}.csv", key, f"{number}", rate))
    score(files, key_file)
    assert capsys.readouterr().out.count("not shown to differ") == 3


def test_what_is_not_complete_counts_and_is_named(study, tmp_path, capsys):
    key, key_file = study
    files = [write_ratings(tmp_path / f"{n}.csv", key, n, lambda *stimulus: 3) for n in "abc"]
    rows = read_rows(files[0])
    counted = [row for row in rows if row["training"] == "0"]
    counted[0]["rating"] = ""  # the browser could not show it
    write_rows(files[0], [row for row in rows if row is not counted[1]])
    assert score(files, key_file) == 0
    error = capsys.readouterr().err
    assert f"{files[0]}: a rated 4 of 6" in error
    assert str(files[1]) not in error


def test_the_training_alone_is_no_rating(study, tmp_path, capsys):
    key, key_file = study
    file = write_ratings(tmp_path / "a.csv", key, "a", lambda *stimulus: 3)
    write_rows(file, [row for row in read_rows(file) if row["training"] == "1"])
    assert score([file], key_file) == 2
    assert "ratings of the training alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("rating", "6", "a rating is 1, 2, 3, 4 or 5, not '6'"),
        ("rating", "3.0", "not '3.0'"),
        ("rating", "=1+2", "not '=1+2'"),
        ("rating", "٣", "a rating is 1, 2"),
        ("stimulus", "0123", "the study has no stimulus '0123'"),
        ("stimulus", "SECOND", "is rated twice"),
        ("study", "another", "is of study another, the key of"),
        ("training", "yes", "training is 'yes', not"),
        ("position", "-1", "position is no whole number"),
        ("milliseconds", "nan", "milliseconds is no whole number"),
        ("participant", " ", "the participant has no name"),
    ],
)
def test_a_row_that_the_page_did_not_write_is_named_by_file_and_line(
    study, tmp_path, capsys, column, value, message
):
    key, key_file = study
    file = write_ratings(tmp_path / "a.csv", key, "a", lambda *stimulus: 3)
    rows = read_rows(file)
    rows[2] = rows[1].copy() if value == "SECOND" else rows[2] | {column: value}
    write_rows(file, rows)
    assert score([file], key_file, "-o", tmp_path / "scores.csv") == 2
    line = one_error(capsys)
    assert f"{file}, line 4: " in line
    assert message in line
    assert not (tmp_path / "scores.csv").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no column study, participant"),
        (b"study,rating\n1,2\n", "has no column participant, position, stimulus"),
        (b"\xff\xfe\x00", "is no CSV file"),
        (",".join(mos.COLUMNS).encode(), "holds no ratings"),
        (",".join(mos.COLUMNS).encode() + b"\na,b\n", "line 2: has not 7 cells"),
        (",".join(mos.COLUMNS).encode() + b"\n\x00,b\n", "a.csv"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_the_page_did_not_write_is_named(study, tmp_path, capsys, content, message):
    _, key_file = study
    file = tmp_path / "a.csv"
    if content is not None:
        file.write_bytes(content)
    assert score([file], key_file) == 2
    assert message in one_error(capsys)


def test_one_name_in_two_files_is_an_error(study, tmp_path, capsys):
    key, key_file = study
    files = [write_ratings(tmp_path / f"{n}.csv", key, "Ada", lambda *each: 3) for n in "ab"]
    assert score(files, key_file) == 2
    assert f"{files[1]}: Ada is in {files[0]}, too" in one_error(capsys)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"methods": []}', '{"study": 1}', "null"])
def test_another_file_is_no_key(study, tmp_path, capsys, content):
    key, _ = study
    file = write_ratings(tmp_path / "a.csv", key, "a", lambda *stimulus: 3)
    (tmp_path / "k.json").write_text(content)
    assert score([file], tmp_path / "k.json") == 2
    assert "k.json: is no key that `build` wrote" in one_error(capsys)
    assert score([file], tmp_path / "none.json") == 2
    assert "none.json: cannot be read" in one_error(capsys)


def test_names_that_steer_terminals_spreadsheets_and_plots_stay_names(tmp_path, capsys):
    methods = ("sharp", "=1+1", "$\\frac$", "<b>\x1b[31m")
    items = ("@a/-1", "@a/x\ny", "$^$/_1")
    folders = make_folders(tmp_path / "in", methods, items)
    assert build(folders, tmp_path / "study", "--training", "0") == 0
    key_file = tmp_path / "study_key.json"
    rate = lambda method, *source: 1 + len(method) % 5  # noqa: E731
    name = "=HYPERLINK(1)"
    files = []
    for number in range(2):
        written = "'" + name if number else "\x1b[2J"
        file = tmp_path / f"{number}.csv"
        files.append(write_ratings(file, read_json(key_file), written, rate))
    write_rows(files[0], read_rows(files[0])[:-1])  # so that a warning names it
    out, plot = tmp_path / "scores.csv", tmp_path / "plot.png"
    assert score(files, key_file, "-o", out, "--plot", plot) == 0
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "\\x1b[2J" in printed.out
    assert "\\x1b[2J rated" in printed.err
    assert f"\n{name} " in printed.out
    rows = read_rows(out)
    assert {row["method"] for row in rows} == {"sharp", "'=1+1", "$\\frac$", "<b>\x1b[31m"}
    assert {mos.original(row["method"]) for row in rows} == set(methods)
    with Image.open(plot) as picture:
        assert picture.width > 300


def test_a_plot_needs_matplotlib_before_any_work(study, tmp_path, capsys, monkeypatch):
    _, key_file = study
    found = importlib.util.find_spec
    hide = lambda name: None if name == "matplotlib" else found(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    assert score([tmp_path / "none.csv"], key_file, "--plot", tmp_path / "p.png") == 2
    assert "pip install matplotlib" in one_error(capsys)


def test_an_output_that_cannot_be_written_is_said_before_any_work(study, tmp_path, capsys):
    _, key_file = study
    assert score([tmp_path / "none.csv"], key_file, "-o", tmp_path / "no/scores.csv") == 2
    assert "there is no folder" in one_error(capsys)
    assert score([tmp_path / "none.csv"], key_file, "--plot", tmp_path / "p.txt") == 2
    assert "p.txt: its ending is none of" in one_error(capsys)


# --- The page in a real browser -------------------------------------------------------------------

BROWSER_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking",
                 "--disable-component-update")  # fmt: skip
# Only the next item's grey pause is waited for, never a fixed time.
READY = "#grades button:enabled"


@pytest.fixture(scope="module")
def chromium():
    """Debian's chromium, without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=BROWSER_FLAGS)
        yield browser
        browser.close()


# The grey pause before each item, and all other waiting, in a twentieth of the time.
HURRY = """
const wait = window.setTimeout;
window.setTimeout = (then, milliseconds) => wait(then, milliseconds / 20);
"""


@pytest.fixture
def open_study(chromium):
    """A function that opens a study; afterwards nothing may have gone wrong in the page.

    No error, no dialog, and no request but for files.
    """
    contexts = []
    wrong = []

    def watch(page):
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: is_local(request.url) or wrong.append(request.url))

    def open_page(study, hurry=True, browser=chromium, profile=None, **options):
        options = {"viewport": {"width": 1280, "height": 800}} | options
        if profile:  # a browser with a folder to keep things in, as people's have
            start = chromium.browser_type.launch_persistent_context
            program = shutil.which("chromium")
            context = start(profile, executable_path=program, args=BROWSER_FLAGS, **options)
        else:
            context = browser.new_context(**options)
        contexts.append(context)
        contexts[-1].set_default_timeout(60000)  # on a busy machine
        if hurry:
            contexts[-1].add_init_script(HURRY)
        contexts[-1].on("page", watch)
        page = contexts[-1].new_page()
        page.goto((study / "index.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def is_local(address):
    return address.startswith(("file:", "blob:file:", "blob:null"))


PHONE = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 3,
    "is_mobile": True,
    "has_touch": True,
}


def enter(page, name):
    page.fill("#name", name)
    page.keyboard.press("Enter")


def where(page):
    return page.text_content("#where")


def rate(page, *keys):
    for key in keys:
        page.wait_for_selector(READY)
        page.keyboard.press(key)


def export(page, button, file):
    with page.expect_download() as download:
        page.click(button)
    download.value.save_as(file)
    return download.value.suggested_filename


def order_for(page, name):
    return page.evaluate("name => orderFor(name)", name)


def test_a_session_by_keys_and_clicks_is_exported_and_scored(folders, tmp_path, capsys, open_study):
    build(folders, tmp_path / "study")
    page = open_study(tmp_path / "study")
    assert page.text_content("#amount") == "9 pictures"
    enter(page, "  Ada   L. ")
    assert page.is_hidden("#start")
    assert where(page) == "Training 1 of 3"
    rate(page, "1", "2", "3")
    page.wait_for_selector("#trained:not([hidden])")
    page.click("#count")
    assert where(page) == "1 of 6"
    rate(page, "5", "4")
    page.wait_for_selector(READY)
    page.click("#grades button:nth-child(3)")
    rate(page, "6")  # no grade
    assert where(page) == "4 of 6"
    rate(page, "2", "1")
    page.wait_for_selector(READY)
    page.keyboard.press("Backspace")
    assert where(page) == "5 of 6"
    rate(page, "2", "5")
    page.wait_for_selector("#end:not([hidden])")
    assert page.text_content("#participant") == "Ada L."

    file = tmp_path / "ratings.csv"
    name = export(page, "#export-end", file)
    key = read_json(tmp_path / "study_key.json")
    assert name == f"ratings_{key['study'][:8]}_Ada_L_.csv"
    rows = read_rows(file)
    assert tuple(rows[0]) == mos.COLUMNS
    assert [row["rating"] for row in rows] == list("123543225")
    assert [row["position"] for row in rows] == list("123456789")
    assert [row["stimulus"] for row in rows] == [each["id"] for each in order_for(page, "Ada L.")]
    assert {row["participant"] for row in rows} == {"Ada L."}
    assert all(0 <= int(row["milliseconds"]) < 60000 for row in rows)
    capsys.readouterr()
    assert score([file], tmp_path / "study_key.json") == 0
    assert "Ada L." in capsys.readouterr().out


def test_no_key_counts_before_the_picture_is_there(folders, tmp_path, open_study):
    build(folders, tmp_path / "study")
    page = open_study(tmp_path / "study", hurry=False)
    enter(page, "Ada")
    page.keyboard.press("5")
    assert page.locator("#stage *").count() == 0
    assert page.locator(READY).count() == 0
    page.wait_for_selector(READY)
    assert where(page) == "Training 1 of 3"
    assert page.locator("#stage img").count() == 1
    page.keyboard.press("Control+5")
    page.keyboard.press("0")
    assert where(page) == "Training 1 of 3"
    page.keyboard.down("3")
    page.wait_for_function("document.getElementById('where').textContent.startsWith('Training 2')")
    page.wait_for_selector(READY)
    page.keyboard.down("3")  # held down, it repeats itself, and is no second answer
    assert where(page) == "Training 2 of 3"


def test_a_reload_goes_on_where_it_stopped_and_others_begin_anew(folders, tmp_path, open_study):
    build(folders, tmp_path / "study")
    page = open_study(tmp_path / "study", profile=tmp_path / "profile")
    enter(page, "Ada")
    rate(page, "1", "2", "3")
    page.click("#count")
    rate(page, "4", "5")
    page.wait_for_selector(READY)
    shown = page.get_attribute("#stage img", "src")
    page.reload()
    assert page.input_value("#name") == "Ada"
    assert page.text_content("#known") == "5 of 9 are answered in this browser."
    assert page.text_content("#begin") == "Continue"
    page.fill("#name", "Ben")
    assert page.text_content("#begin") == "Begin"
    enter(page, " Ada ")
    page.wait_for_selector(READY)
    assert where(page) == "3 of 6"
    assert page.get_attribute("#stage img", "src") == shown
    export(page, "#export", tmp_path / "part.csv")  # at any time
    assert [row["rating"] for row in read_rows(tmp_path / "part.csv")] == list("12345")
    page.reload()
    enter(page, "Ben")
    assert where(page) == "Training 1 of 3"


def test_answers_that_another_page_damaged_are_not_gone_on_with(folders, tmp_path, open_study):
    build(folders, tmp_path / "study")
    page = open_study(tmp_path / "study", profile=tmp_path / "profile")
    for damaged in ("{", "7", "[null]", '[{"stimulus": "other", "rating": 5}]'):
        page.evaluate("text => localStorage.setItem(placeOf('Ada'), text)", damaged)
        assert page.evaluate("recallAnswers('Ada')") == []


def test_a_second_window_of_one_participant_takes_over(folders, tmp_path, open_study):
    build(folders, tmp_path / "study")
    first = open_study(tmp_path / "study", profile=tmp_path / "profile")
    enter(first, "Ada")
    second = first.context.new_page()
    second.goto(first.url)
    enter(second, "Ada")
    rate(second, "4")
    first.wait_for_selector("#start:not([hidden])")
    assert first.text_content("#known") == "1 of 9 are answered in this browser."


def test_orders_differ_stay_and_keep_a_sources_versions_apart(tmp_path, open_study):
    items = [f"a/{number}" for number in range(6)]
    build(
        make_folders(tmp_path / "in", items=items, size=(2, 2)), tmp_path / "study", "--seed", "1"
    )
    page = open_study(tmp_path / "study")
    every = {each["id"] for each in order_for(page, "x")}
    assert len(every) == 18
    orders = set()
    first = []
    key = read_json(tmp_path / "study_key.json")["stimuli"]
    for number in range(60):
        order = order_for(page, f"p{number}")
        assert order == order_for(page, f"p{number}")
        assert {each["id"] for each in order} == every
        assert [each["training"] for each in order] == [True] * 3 + [False] * 15
        counted = order[3:]
        repeats = [a["source"] == b["source"] for a, b in itertools.pairwise(order[2:])]
        assert not any(repeats)
        orders.add(tuple(each["id"] for each in order))
        first.append(key[counted[0]["id"]]["method"])
    assert len(orders) == 60
    # Each of three methods comes first about 20 times of 60.
    assert min(first.count(method) for method in METHODS) >= 10


def test_the_last_of_the_training_is_not_repeated_at_once(tmp_path, open_study):
    build(make_folders(tmp_path / "in", items=("a/x", "b/y")), tmp_path / "study")
    page = open_study(tmp_path / "study")
    for number in range(20):
        last, first = order_for(page, f"p{number}")[2:4]
        assert last["source"] != first["source"]


def test_a_source_repeats_itself_only_where_it_must(folders, tmp_path, open_study):
    build(folders, tmp_path / "study")
    page = open_study(tmp_path / "study")
    script = """sources => {
        const pool = [...sources].map((source, id) => ({ source, id }));
        const orders = [];
        for (let seed = 0; seed < 50; seed += 1) {
            const order = shuffled(pool, seededRandom(String(seed)));
            orders.push(order.map(({ source }) => source).join(""));
        }
        return orders;
    }"""
    # Four of seven fit between the others in one way only; of four a's beside two b's, two meet.
    assert set(page.evaluate(script, "aaaabcd")) <= {
        "".join("a" + other for other in others) + "a" for others in itertools.permutations("bcd")
    }
    for order in page.evaluate(script, "aaaabb"):
        assert sum(a == b for a, b in itertools.pairwise(order)) == 1
    assert page.evaluate(script, "aaa") == ["aaa"] * 50


@pytest.mark.parametrize("scale", [1, 1.5])
def test_a_picture_has_its_own_pixels_on_mid_grey(
    tmp_path, random_frame, chromium, open_study, screenshot_of, scale
):
    frame = random_frame(150, 201)
    for method in METHODS:
        (tmp_path / method).mkdir()
        Image.fromarray(frame).save(tmp_path / method / "a.png")
    build([tmp_path / method for method in METHODS], tmp_path / "study", "--training", "0")
    # Not Playwright's own device_scale_factor, under which Chromium lays out by whole CSS pixels.
    flags = [*BROWSER_FLAGS, f"--force-device-scale-factor={scale}", "--window-size=1200,900"]
    launch = chromium.browser_type.launch
    with launch(executable_path=shutil.which("chromium"), args=flags) as browser:
        page = open_study(tmp_path / "study", browser=browser, viewport=None, no_viewport=True)
        assert page.is_hidden("#about-clips")
        enter(page, "Ada")
        page.wait_for_selector(READY)
        assert page.evaluate("devicePixelRatio") == scale
        screen = screenshot_of(page)
        height = page.locator("#stage").bounding_box()["height"]
    stage = screen[: int(height * scale)]
    other = (stage != 128).any(2)
    top, left = (np.flatnonzero(other.any(axis))[0] for axis in (1, 0))
    assert (stage[top : top + 150, left : left + 201] == frame).all()
    assert other.sum() == (frame != 128).any(2).sum()


def test_a_picture_larger_than_a_phone_is_scrolled_and_its_scale_stays(tmp_path, open_study):
    folders = make_folders(tmp_path / "in", items=("a/b",), size=(1800, 1800))
    build(folders, tmp_path / "study", "--training", "0")
    page = open_study(tmp_path / "study", **PHONE)
    page.fill("#name", "Ada")
    page.tap("#begin")
    page.wait_for_selector(READY)
    assert page.locator("#stage img").bounding_box()["width"] == 1800 / 3
    assert "scroll to see all" in page.text_content("#larger")
    stage = "document.getElementById('stage')"
    page.evaluate(f"{stage}.scrollTo(5000, 5000)")
    assert page.evaluate(f"{stage}.scrollLeft") == 600 - 390
    page.tap("#grades button:nth-child(5)")
    assert where(page) == "2 of 3"


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_controls_fit_the_width(tmp_path, folders, open_study, width):
    build(folders, tmp_path / "study")
    options = PHONE if width < 400 else {}
    page = open_study(tmp_path / "study", **options | {"viewport": {"width": width, "height": 640}})

    def assert_fits():
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for box in page.locator("button:visible, input:visible").all():
            side = box.bounding_box()
            assert side["x"] >= 0
            assert side["x"] + side["width"] <= width
            assert side["height"] >= 40
            assert box.evaluate("each => each.scrollWidth <= each.clientWidth + 1")

    assert_fits()
    enter(page, "W" * 60)
    page.wait_for_selector(READY)
    assert_fits()
    bar = page.locator("#bar").bounding_box()
    assert bar["y"] + bar["height"] <= 640
    rate(page, "1", "1", "1")
    page.wait_for_selector("#trained:not([hidden])")
    assert_fits()
    page.click("#count")
    rate(page, *"111111")
    page.wait_for_selector("#end:not([hidden])")
    assert_fits()


def luminance(colour):
    """WCAG's relative luminance of a computed colour."""
    parts = [int(part) / 255 for part in re.findall("[0-9]+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_is_legible_in_both_themes_and_the_surround_is_the_same(folders, tmp_path, open_study):
    build(folders, tmp_path / "study")
    style = "([element, name]) => getComputedStyle(document.querySelector(element))[name]"
    papers = []
    for theme in ("light", "dark"):
        page = open_study(tmp_path / "study", color_scheme=theme)
        paper = page.evaluate(style, ["body", "backgroundColor"])
        papers.append(luminance(paper))
        for name in ("body", ".faint"):
            ink = luminance(page.evaluate(style, [name, "color"]))
            high, low = sorted((ink, papers[-1]), reverse=True)
            assert (high + 0.05) / (low + 0.05) > 4.5
        assert page.evaluate(style, ["#rating", "backgroundColor"]) == "rgb(128, 128, 128)"
    assert papers[0] > 0.8
    assert papers[1] < 0.05


def test_markup_in_names_is_shown_as_text(tmp_path, open_study, capsys):
    methods = ("sharp", "<b>x", "'\"><img src=x onerror=alert(3)>")
    folders = make_folders(tmp_path / "in", methods, ("<script>alert(4)<", "b"))
    study = tmp_path / "study"
    build(folders, study, "--title", HOSTILE, "--training", "0")
    page = open_study(study)
    assert page.title() == HOSTILE
    assert page.text_content(".title") == HOSTILE
    scripts = page.locator("script").count()
    name = '=cmd|"/c calc"!A0<img src=x onerror=alert(5)>'
    enter(page, name)
    rate(page, *"111222")
    page.wait_for_selector("#end:not([hidden])")
    assert page.text_content("#participant") == name
    assert page.locator("script").count() == scripts
    assert page.locator("img[onerror], .title *, #participant *").count() == 0
    suggested = export(page, "#export-end", tmp_path / "ratings.csv")
    assert re.fullmatch("ratings_[0-9a-f]{8}_[a-zA-Z0-9_]+\\.csv", suggested)
    assert {row["participant"] for row in read_rows(tmp_path / "ratings.csv")} == {"'" + name}
    capsys.readouterr()
    assert score([tmp_path / "ratings.csv"], tmp_path / "study_key.json") == 0
    assert f"\n{name} " in capsys.readouterr().out


def test_the_policy_lets_no_other_script_run_and_nothing_be_fetched(folders, tmp_path, chromium):
    build(folders, tmp_path / "study")
    page = chromium.new_page()
    blocked = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto((tmp_path / "study/index.html").as_uri())
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.ran = true'>");
    }""")
    fetched = page.evaluate("fetch('http://localhost:9/').then(() => true, () => false)")
    page.wait_for_timeout(100)
    assert page.evaluate("window.ran") is None
    assert fetched is False
    assert any("connect-src" in line or "default-src" in line for line in blocked)
    page.close()


def make_clip(file, number, av):
    """A second of three frames, by PyAV."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=3)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for step in range(3):
            pixels = np.full((48, 64, 3), 80 * step + number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def test_a_clip_plays_once_and_is_rated_afterwards(tmp_path, open_study):
    av = pytest.importorskip("av", reason="needs pip install av")
    for number, method in enumerate(METHODS[:2]):
        make_clip(tmp_path / method / "a.webm", number, av)
    folders = [tmp_path / method for method in METHODS[:2]]
    build(folders, tmp_path / "study", "--training", "0")
    page = open_study(tmp_path / "study")
    assert page.text_content("#amount") == "2 clips"
    assert page.is_visible("#about-clips")
    enter(page, "Ada")
    page.wait_for_selector("#stage video", state="attached")
    assert page.evaluate("document.querySelector('video').muted")
    assert page.locator("#stage video").get_attribute("controls") is None
    page.keyboard.press("1")  # while it plays, so it is no answer
    assert where(page) == "1 of 2"
    page.wait_for_selector(READY)
    assert page.locator("#stage video").count() == 0  # it cannot be seen again
    page.keyboard.press("4")
    page.wait_for_selector(READY)
    page.keyboard.press("Backspace")  # the clip before is rated again, and not shown again
    assert where(page) == "1 of 2"
    assert page.locator("#stage video").count() == 0
    rate(page, "3", "2")
    page.wait_for_selector("#end:not([hidden])")
    export(page, "#export-end", tmp_path / "ratings.csv")
    assert [row["rating"] for row in read_rows(tmp_path / "ratings.csv")] == ["3", "2"]


def test_what_a_browser_cannot_show_stays_without_a_rating(
    folders, tmp_path, open_study, chromium, capsys
):
    build(folders, tmp_path / "study", "--training", "0")
    for file in (tmp_path / "study/media").iterdir():
        file.write_bytes(b"damaged")
        break
    page = open_study(tmp_path / "study")
    enter(page, "Ada")
    for _ in range(9):
        page.wait_for_selector(f"{READY}, #skip")
        if page.locator("#skip").count():
            page.keyboard.press("5")  # nothing was seen, so it is no answer
            page.click("#skip")
        else:
            page.keyboard.press("3")
    page.wait_for_selector("#end:not([hidden])")
    export(page, "#export-end", tmp_path / "ratings.csv")
    ratings = [row["rating"] for row in read_rows(tmp_path / "ratings.csv")]
    assert sorted(ratings) == [""] + ["3"] * 8
    capsys.readouterr()
    assert score([tmp_path / "ratings.csv"], tmp_path / "study_key.json") == 0
    assert "Ada rated 8 of 9" in capsys.readouterr().err
