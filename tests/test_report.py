"""`eval --report`: one page with the scores and a gallery, in a real browser."""

import base64
import csv
import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import sharpen_kd as kd

# Names that would be markup if they were not shown as text. The second one's slash is a folder's.
HOSTILE = [
    'quotes"\'/"><img src=x onerror=alert(1)>',
    "tags</script><script>alert(2)<",
    "comments/<!--<script>",
]


def data_in(page):
    """The data of a page, as a browser finds it: up to the first end of a script."""
    found = re.search('<script type="application/json" id="data">(.*?)</script', page, re.DOTALL)
    return json.loads(found[1])


def gallery_of(data):
    return [item for part in data["gallery"] for item in part["items"]]


def pixels(url):
    """The picture in an address."""
    content = base64.b64decode(url.split(",")[1])
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory, photographs):
    """Nine crops of 96x96: three with hostile names, six with others."""
    folder = tmp_path_factory.mktemp("pictures")
    names = [*HOSTILE, *[f"plain/{number}" for number in range(6)]]
    photograph = photographs["astronaut"].convert("RGB")
    for number, name in enumerate(names):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        left = 40 * number
        photograph.crop((left, 60, left + 96, 156)).save(path)
    return folder


@pytest.fixture(scope="session")
def report(tmp_path_factory, picture_folder, student_file, tiny_teacher):
    """The folder with a report of pictures, its scores.csv and its scores.json."""
    folder = tmp_path_factory.mktemp("report")
    command = ["eval", "--data-root", str(picture_folder), "--checkpoint", str(student_file)]
    command += ["--protocol", "x2", "--teacher-weights", str(tiny_teacher)]
    command += ["--output-dir", str(folder), "--json", str(folder / "scores.json")]
    assert kd.main([*command, "--report", str(folder / "report.html")]) == 0
    return folder


def input_level(frame):
    """The clip's frames are grey: 10, 18, 26, ..."""
    return 10 + 8 * frame


@pytest.fixture(scope="session")
def clip_report(tmp_path_factory, student_file):
    """A report of a clip whose frames are told by their grey; the sharp one is lighter by 40."""
    pytest.importorskip("av", reason="pip install av")
    folder = tmp_path_factory.mktemp("clip_report")
    for side, more in (("low", 0), ("sharp", 40)):
        frames = folder / side / "talk_01"
        frames.mkdir(parents=True)
        for number in range(20):
            grey = np.full((64, 96, 3), input_level(number) + more, np.uint8)
            Image.fromarray(grey).save(frames / f"{number}.png")
    command = ["eval", "--data-root", str(folder), "--checkpoint", str(student_file)]
    command += ["--protocol", "low", "--output-dir", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd, "vmaf_scores", lambda outputs, sharp: {})
        assert kd.main([*command, "--report", str(folder / "report.html")]) == 0
    return folder / "report.html"


# --- The file -------------------------------------------------------------------------------------


def test_the_pages_scores_are_those_of_the_other_results(report):
    data = data_in((report / "report.html").read_text())
    scores = json.loads((report / "scores.json").read_text())["x2"]["scores"]
    (table,) = data["tables"]
    assert table["protocol"] == "x2"
    assert table["examples"] == "9 pictures"
    assert [row["name"] for row in table["rows"]] == list(scores)
    for row in table["rows"]:
        assert list(row["scores"]) == ["input", "teacher", "student"]
        assert row["scores"] == scores[row["name"]]

    with (report / "scores.csv").open(newline="") as file:
        lines = {line["picture"]: line for line in csv.DictReader(file)}
    for item in gallery_of(data):
        line = lines[item["name"]]
        assert item["scores"]["student"]["psnr"] == float(line["student_psnr"])
        assert item["scores"]["input"]["ssim"] == float(line["input_ssim"])


def test_the_gallery_begins_with_the_five_that_gained_least(report):
    data = data_in((report / "report.html").read_text())
    with (report / "scores.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    lines.sort(key=lambda line: float(line["student_psnr"]) - float(line["input_psnr"]))
    assert data["gallery"][0]["title"] == "x2: the 5 that gained least"
    worst = [item["name"] for item in data["gallery"][0]["items"]]
    assert worst == [line["picture"] for line in lines[:5]]
    others = {item["name"] for item in data["gallery"][1]["items"]}
    assert others == {line["picture"] for line in lines[5:]}


def test_pictures_in_the_page_are_those_that_were_scored(report, picture_folder, student_file):
    sharpener = kd.load_sharpener(student_file)
    items = {
        item["name"]: item for item in gallery_of(data_in((report / "report.html").read_text()))
    }
    for pair in kd.find_sharp(picture_folder, kd.PROTOCOLS["x2"])[:3]:
        blurred, sharp = pair.load()
        item = items[pair.key]
        assert item["sides"] == ["input", "teacher", "student", "sharp"]
        shown = dict(zip(item["sides"], map(pixels, item["pictures"]), strict=True))
        assert np.array_equal(shown["input"], blurred)
        assert np.array_equal(shown["student"], sharpener(blurred))
        assert np.array_equal(shown["sharp"], sharp)


def test_the_page_names_what_was_run(report, student_file):
    facts = data_in((report / "report.html").read_text())["facts"]
    words = kd.shlex.split(facts["command"])
    assert words[:3] == ["python", "sharpen_kd.py", "eval"]
    given = kd.parse_command_line(words[2:])
    assert given["checkpoint"] == str(student_file)
    assert given["protocol"] == ("x2",)
    assert "--split" not in words  # the default
    digest = kd.hashlib.sha256(student_file.read_bytes()).hexdigest()
    assert digest[:16] in facts["student"]
    assert "tiny.pth" in facts["teacher"]
    assert "training steps" not in facts["student"]  # this checkpoint does not say
    steps = kd.load_student("fast")[1]["step"]
    assert f"{steps:,} training steps" in kd.describe_student("fast")
    assert steps > 10000
    assert kd.__version__ in facts["versions"]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d", facts["date"])
    assert {"machine", "computed by"} <= facts.keys()


def test_names_of_files_cannot_end_the_data(report):
    page = (report / "report.html").read_text()
    names = {item["name"] for item in gallery_of(data_in(page))}
    assert set(HOSTILE) <= names
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    assert "alert(1)>" not in page


def test_the_page_needs_nothing_beside_it(report):
    page = (report / "report.html").read_text()
    assert [path.name for path in report.glob("*.html")] == ["report.html"]
    assert not re.search("https?://|@import|url\\(", page)
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", page)
    assert sources == ["data:,"]


def test_only_the_pages_own_code_may_run(report):
    page = (report / "report.html").read_text()
    (policy,) = re.findall('http-equiv="Content-Security-Policy"\\s+content="([^"]*)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == rules["media-src"] == "data:"
    for element in ("script", "style"):
        (code,) = re.findall(f"<{element}>(.*?)</{element}>", page, re.DOTALL)
        digest = base64.b64encode(kd.hashlib.sha256(code.encode()).digest()).decode()
        assert rules[f"{element}-src"] == f"'sha256-{digest}'"


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    tmp_path, picture_folder, student_file, capsys
):
    command = ["eval", "--data-root", str(picture_folder), "--protocol", "x2"]
    command += ["--checkpoint", str(student_file), "--output-dir", str(tmp_path / "out")]
    assert kd.main([*command, "--report", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert f"{tmp_path}: cannot be written" in printed.err
    assert printed.out == ""
    assert not (tmp_path / "out/scores.csv").exists()


def row_with_gain(gain, name="a"):
    scores = {"input": {"psnr": 20.0, "ssim": 0.5}, "student": {"psnr": 20.0 + gain, "ssim": 0.5}}
    return {"picture": name, "category": "all", "scores": scores}


def test_a_gallery_keeps_the_worst_and_some_spread_evenly(random_frame):
    frame = random_frame(16, 16)
    sides = {"input": [frame], "student": [frame], "sharp": [frame]}
    gallery = kd.Gallery(count=40, others=4, item_bytes=1e6)
    most_kept = 0
    for number in range(40):
        gallery.offer(row_with_gain(40 - number, str(number)), sides)  # each worse than all before
        most_kept = max(most_kept, len(gallery.items))
    worst, others = gallery.shown()
    assert [item["name"] for item in worst] == ["39", "38", "37", "36", "35"]
    assert [item["name"] for item in others] == ["0", "10", "20", "30"]
    assert most_kept == 9


def test_without_any_error_there_is_no_gain():
    assert kd.psnr_gain(row_with_gain(1.5)) == 1.5
    perfect = {"input": {"psnr": np.inf}, "student": {"psnr": np.inf}}
    assert kd.psnr_gain({"scores": perfect}) == 0
    spoilt = {"input": {"psnr": np.inf}, "student": {"psnr": 50.0}}
    assert kd.psnr_gain({"scores": spoilt}) == -np.inf


def test_a_large_picture_is_cut_to_where_the_student_changed_most():
    before = np.zeros((40, 2000, 3), np.uint8)
    after = before.copy()
    after[5, 1500:1510] = 255  # most
    after[30, 10:14] = 255
    assert kd.most_changed(before, after, 40, 10) == (0, 1500)
    assert kd.most_changed(before, after, 1, 10) == (5, 1500)
    item = kd.gallery_item(row_with_gain(0), {"input": [before], "student": [after]}, 1e6)
    assert (item["width"], item["height"]) == (1280, 40)
    assert item["note"].startswith(
        "1280 by 40 of 2000 by 40 pixels, where the student changed most"
    )
    assert np.array_equal(pixels(item["pictures"][1]).max((1, 2)).nonzero()[0], [5])


def test_pictures_share_the_bytes_of_a_page():
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    sides = {"input": [noise], "student": [noise]}
    # Noise takes its three bytes a pixel, so a million are for two sides of 408x408.
    item = kd.gallery_item(row_with_gain(0), sides, 1_000_000)
    assert item["width"] == item["height"]
    assert 380 < item["width"] <= 408
    galleries = kd.empty_galleries({"x2": 110, "x3": 110})
    shown = sum(5 + len(gallery.spread) for gallery in galleries.values())
    assert shown == 2 * (5 + 6)
    assert galleries["x2"].item_bytes * shown == pytest.approx(kd.PAGE_BYTES)


def test_a_pages_clip_is_all_sides_in_one_video(tmp_path, photographs):
    av = pytest.importorskip("av", reason="pip install av")
    photograph = np.array(photographs["astronaut"].convert("RGB"))
    sharp = [np.ascontiguousarray(photograph[20:148, 2 * t : 2 * t + 161]) for t in range(70)]
    sides = {"input": [frame // 2 for frame in sharp], "student": sharp, "sharp": sharp}
    item = kd.gallery_item(row_with_gain(0), sides, 1e7)
    assert (item["width"], item["height"], item["frames"]) == (160, 128, 70)  # even sides
    (tmp_path / "a.mp4").write_bytes(base64.b64decode(item["clip"].split(",")[1]))
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 70
    assert frames[0].shape == (3 * (128 + 2 * item["border"]), 160, 3)
    for index, side in enumerate(sides):
        top = item["border"] + index * (128 + 2 * item["border"])
        shown = frames[41][top : top + 128]
        assert kd.frame_psnr(shown, np.ascontiguousarray(sides[side][41][:, :160])) > 30


# --- In a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")  # two of these cannot be open at once
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("apt-get install chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    arguments.append("--disable-component-update")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=arguments)
        yield started
        started.close()


@pytest.fixture
def show(browser):
    """A function that opens a page; afterwards none may have complained or asked the network."""
    contexts = []
    problems = []

    def note_request(request):
        if not request.url.startswith(("file:", "data:")):
            problems.append(request.url)

    def note_message(message):
        if message.type == "error":
            problems.append(message.text)

    def note_dialog(dialog):
        problems.append(dialog.message)
        dialog.dismiss()

    def show(path, width=1280, height=800, **options):
        viewport = {"width": width, "height": height}
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", note_request)
        page.on("console", note_message)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", note_dialog)
        page.goto(path.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="session")
def first_item(report):
    """(left, right): the pictures of the first item, which the page shows at twice their size."""
    item = gallery_of(data_in((report / "report.html").read_text()))[0]
    return pixels(item["pictures"][0]), pixels(item["pictures"][2])


def stage_of(page):
    """The first stage, in the middle of the window, with its pictures decoded."""
    stage = page.locator(".stage").first
    stage.evaluate(
        "async (stage) => { for (const i of stage.querySelectorAll('img')) await i.decode(); }"
    )
    stage.evaluate("stage => stage.scrollIntoView({block: 'center'})")
    return stage


def drag(page, stage, start, end):
    """Drag on a stage from one place to another, both as shares of its sides."""
    box = stage.bounding_box()
    (x, y), (to_x, to_y) = [
        (box["x"] + px * box["width"], box["y"] + py * box["height"]) for px, py in (start, end)
    ]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move((x + to_x) / 2, (y + to_y) / 2)
    page.mouse.move(to_x, to_y)
    page.mouse.up()


def assert_divided(shown, left, right, column):
    """The left picture is seen up to this column, the right one from there, at twice the size.

    The divider itself covers a few columns.
    """
    doubled = [side.repeat(2, 0).repeat(2, 1) for side in (left, right)]
    assert shown.shape == doubled[0].shape
    before = max(0, column - 20)
    after = column + 20
    assert np.array_equal(shown[:, :before], doubled[0][:, :before])
    assert np.array_equal(shown[:, after:], doubled[1][:, after:])


def test_dragging_the_divider_changes_what_is_seen(show, report, first_item, screenshot_of):
    page = show(report / "report.html")
    stage = stage_of(page)
    assert stage.bounding_box()["width"] == 192
    assert not np.array_equal(*first_item)
    assert_divided(screenshot_of(stage), *first_item, 96)
    drag(page, stage, (0.5, 0.3), (0.25, 0.6))
    assert_divided(screenshot_of(stage), *first_item, 48)
    drag(page, stage, (0.1, 0.3), (0.75, 0.3))  # from anywhere
    assert_divided(screenshot_of(stage), *first_item, 144)


def test_keys_move_the_divider(show, report, first_item, screenshot_of):
    page = show(report / "report.html")
    stage = stage_of(page)
    handle = stage.get_by_role("slider")
    handle.focus()
    for keys, percent in (
        (["ArrowRight"] * 5, 60),
        (["ArrowLeft"], 58),
        (["Shift+ArrowLeft"], 48),
        (["PageUp"], 58),
        (["End"], 100),
        (["Home"], 0),
    ):
        for key in keys:
            page.keyboard.press(key)
        assert handle.get_attribute("aria-valuenow") == str(percent)
    assert_divided(screenshot_of(stage), *first_item, 0)
    assert "between input and student of " in handle.get_attribute("aria-label")


def test_the_first_tab_in_the_gallery_reaches_a_choice_and_the_next_the_divider(show, report):
    page = show(report / "report.html")
    page.locator("select").first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "slider"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel") == "zoom out"


def corner(stage, pane):
    """Where a pane's picture has its corner, in pixels of the stage."""
    script = """(stage, pane) => {
        const picture = stage.querySelector(`.${pane} > *`).getBoundingClientRect();
        const box = stage.getBoundingClientRect();
        return [picture.x - box.x, picture.y - box.y];
    }"""
    return stage.evaluate(script, pane)


def assert_single_pixels(stage, shown, left, right):
    """Every block of 16x16 that is seen whole has one colour: its pixel's, left and right."""
    x, y = corner(stage, "left")
    assert corner(stage, "right") == [x, y]
    assert (
        stage.evaluate("stage => stage.querySelector('.left > *').getBoundingClientRect().width")
        == 96 * 16
    )
    blocks = 0
    for row in range(96):
        for column in range(96):
            top, start = round(y) + 16 * row, round(x) + 16 * column
            if top < 0 or start < 0 or top + 16 > 192 or start + 16 > 192:
                continue
            if abs(start + 8 - 96) < 32:  # under the divider
                continue
            wanted = left if start < 96 else right
            assert (shown[top : top + 16, start : start + 16] == wanted[row, column]).all()
            blocks += 1
    assert blocks > 50


def test_zoomed_to_single_pixels_both_sides_move_together(show, report, first_item, screenshot_of):
    page = show(report / "report.html")
    stage = stage_of(page)
    handle = stage.get_by_role("slider")
    handle.focus()
    for _ in range(6):
        page.keyboard.press("+")
    assert page.locator("output").first.text_content() == "1600 %"
    assert_single_pixels(stage, screenshot_of(stage), *first_item)

    before = corner(stage, "left")
    drag(page, stage, (0.2, 0.2), (0.7, 0.45))
    after = corner(stage, "left")
    assert after == pytest.approx([before[0] + 96, before[1] + 48], abs=1)
    assert handle.get_attribute("aria-valuenow") == "50"  # the picture was dragged, not the divider
    assert_single_pixels(stage, screenshot_of(stage), *first_item)
    page.keyboard.press("d")
    assert corner(stage, "left")[0] == pytest.approx(after[0] - 48, abs=1)

    page.keyboard.press("0")
    assert corner(stage, "left") == [0, 0]
    assert_divided(screenshot_of(stage), *first_item, 96)


def test_the_wheel_zooms_after_a_click_and_else_scrolls(show, report):
    page = show(report / "report.html")
    stage = stage_of(page)
    box = stage.bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + 30)
    before = page.evaluate("scrollY")
    assert before > 60
    page.mouse.wheel(0, -60)  # upwards, which would zoom in
    page.wait_for_function("before => scrollY < before", arg=before)
    page.wait_for_timeout(300)
    assert page.locator("output").first.text_content() == "200 %"

    box = stage_of(page).bounding_box()
    page.mouse.click(box["x"] + 30, box["y"] + 30)
    x, y = corner(stage, "left")
    page.mouse.wheel(0, -208)  # twice as large: e ** (208 / 300)
    page.wait_for_function("document.querySelector('output').textContent === '400 %'")
    # what is under the mouse stays there
    assert corner(stage, "left") == pytest.approx([30 - 2 * (30 - x), 30 - 2 * (30 - y)], abs=1)


def test_two_fingers_zoom(show, report):
    page = show(report / "report.html", 390, 844, has_touch=True, is_mobile=True)
    stage = stage_of(page)
    box = stage.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    session = page.context.new_cdp_session(page)

    def touch(kind, apart):
        points = [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
        points = [] if kind == "touchEnd" else points
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 20)
    for apart in range(20, 65, 5):
        touch("touchMove", apart)
    touch("touchEnd", 0)
    width = stage.evaluate(
        "stage => stage.querySelector('.left > *').getBoundingClientRect().width"
    )
    assert width / box["width"] == pytest.approx(3, rel=0.05)
    assert page.evaluate("visualViewport.scale") == 1  # of the picture, not of the page


def test_each_side_can_be_chosen(show, report, screenshot_of):
    item = gallery_of(data_in((report / "report.html").read_text()))[0]
    page = show(report / "report.html")
    page.locator("select").nth(0).select_option("teacher")
    page.locator("select").nth(1).select_option("sharp")
    assert_divided(
        screenshot_of(stage_of(page)), pixels(item["pictures"][1]), pixels(item["pictures"][3]), 96
    )


def grey_levels(page):
    """What the two panes of a clip show."""
    script = """() => [...document.querySelectorAll('.left canvas, .right canvas')].map(
        (canvas) => canvas.getContext('2d').getImageData(48, 32, 1, 1).data[0])"""
    right, left = page.evaluate(script)  # the left pane lies above
    return left, right


def frames_shown(page):
    """The numbers of the frames in the left and the right pane, by their grey."""
    left, right = grey_levels(page)
    return (left - input_level(0)) / 8, (right - 40 - input_level(0)) / 8


def test_a_clip_plays_with_both_sides_in_step(show, clip_report):
    page = show(clip_report)
    page.locator("select").nth(1).select_option("sharp")
    page.wait_for_function("document.querySelectorAll('output')[1].textContent === '1 of 20'")
    assert frames_shown(page) == pytest.approx((0, 0), abs=0.3)
    page.get_by_role("button", name="play").click()
    numbers = set()
    for _ in range(25):
        left, right = frames_shown(page)
        assert left == pytest.approx(right, abs=0.4)
        numbers.add(round(left))
        page.wait_for_timeout(30)
    assert len(numbers) > 4
    assert numbers <= set(range(20))
    page.get_by_role("button", name="pause").click()
    assert page.evaluate("document.querySelector('video').paused")


def test_a_clip_goes_by_single_frames(show, clip_report):
    page = show(clip_report)
    page.locator("select").nth(1).select_option("sharp")
    page.wait_for_function("document.querySelectorAll('output')[1].textContent === '1 of 20'")
    page.get_by_role("slider").focus()
    for key, frame in ((".", 1), (".", 2), (".", 3), (",", 2), (",", 1), (",", 0), (",", 19)):
        page.keyboard.press(key)
        text = f"{frame + 1} of 20"
        page.wait_for_function(
            "text => document.querySelectorAll('output')[1].textContent === text", arg=text
        )
        for _ in range(100):  # the panes are drawn a moment later
            if frames_shown(page) == pytest.approx((frame, frame), abs=0.3):
                break
            page.wait_for_timeout(100)
        assert frames_shown(page) == pytest.approx((frame, frame), abs=0.3)
    page.keyboard.press("Space")
    page.wait_for_function("!document.querySelector('video').paused")


def test_hostile_names_are_shown_as_text(show, report):
    page = show(report / "report.html")
    titles = page.locator("figure h3").all_text_contents()
    assert set(HOSTILE) <= set(titles)
    categories = page.locator("tr.category th").all_text_contents()
    assert {name.split("/")[0] for name in HOSTILE} <= set(categories)
    assert page.locator("[onerror]").count() == 0
    assert page.locator("script").count() == 2


def test_code_that_is_not_the_pages_does_not_run(browser, report):
    page = browser.new_page()  # its complaint is wanted here
    messages = []
    page.on("console", lambda message: messages.append(message.text))
    page.goto((report / "report.html").as_uri())
    page.evaluate("""() => {
        const script = document.createElement('script');
        script.textContent = 'window.foreign = true';
        document.body.append(script);
    }""")
    assert page.evaluate("window.foreign") is None
    assert any("Content Security Policy" in message for message in messages)
    page.close()


def test_the_table_folds_and_has_the_scores(show, report):
    page = show(report / "report.html")
    scores = json.loads((report / "scores.json").read_text())["x2"]["scores"]
    cells = page.locator("tr.all td").all_text_contents()
    student = scores["all"]["student"]
    assert cells[2] == f"{student['psnr']:.2f}{student['ssim']:.4f}"
    gain = student["psnr"] - scores["all"]["input"]["psnr"]
    assert cells[3] == f"{gain:+.2f}".replace("-", "\N{MINUS SIGN}")
    assert page.locator("tr.category").first.is_visible()
    page.get_by_role("button", name="x2").click()
    assert not page.locator("tr.category").first.is_visible()


def test_the_chart_has_a_mark_for_every_method_at_its_psnr(show, report):
    page = show(report / "report.html")
    scores = json.loads((report / "scores.json").read_text())["x2"]["scores"]
    names = list(scores)
    page.wait_for_selector("#chart circle")
    centres = page.locator("#chart circle").evaluate_all(
        "all => all.map((mark) => mark.cx.baseVal.value)"
    )
    psnrs = [scores[name]["student"]["psnr"] for name in names]
    assert len(centres) == len(names) + 1  # and the legend's
    slope, start = np.polyfit(psnrs, centres[:-1], 1)
    assert slope > 0
    assert np.array(psnrs) * slope + start == pytest.approx(centres[:-1], abs=0.5)
    assert page.locator("#chart polygon.teacher").count() == len(names) + 1
    assert page.locator("#chart rect.input").count() == len(names) + 1


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_it_fits_a_phone_in_both_themes(show, report, clip_report, colours):
    for path in (report / "report.html", clip_report):
        page = show(path, 360, 740, color_scheme=colours)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        ink, paper = page.evaluate("""() => {
            const style = getComputedStyle(document.body);
            return [style.color, style.backgroundColor];
        }""")
        brightness = [int(re.search(r"\d+", colour)[0]) for colour in (ink, paper)]
        assert (brightness[0] < brightness[1]) == (colours == "light")


# --- curves.png -----------------------------------------------------------------------------------


def test_the_curve_of_the_learning_rate_marks_where_cycles_begin():
    config = kd.RunConfig(restart_epochs=2)
    rows = []
    for step in range(16):  # two steps an epoch: cycles begin at epochs 0, 2 and 6
        rate = kd.learning_rate(step, 2, config)
        rows.append({"step": step + 1, "epoch": step / 2, "learning_rate": rate})
    curves = kd.rate_curves(rows, 2)
    assert curves["restart"] == ([5, 13], [config.learning_rate] * 2, "^")
    assert curves["Adam"][0] == list(range(1, 17))
    assert list(kd.rate_curves(rows[:4], 2)) == ["Adam"]


def test_the_curves_are_every_term_every_score_and_the_rate(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(kd, "plot", lambda path, panels: drawn.update({path: panels}))
    terms = {"reconstruction": 0.1, "ssim": 2.0}
    rows = [
        {"step": step, "epoch": step - 1, "learning_rate": 1e-4, **terms} for step in range(1, 4)
    ]
    rows[1] |= {"val_psnr": 30.5, "val_ssim": 0.91}

    objective = SimpleNamespace(loss=SimpleNamespace(lambdas=terms))
    config = kd.RunConfig(run_dir=tmp_path)
    kd.plot_curves(SimpleNamespace(rows=rows, config=config, objective=objective))
    curves = {settings["title"]: lines for settings, lines in drawn[tmp_path / "curves.png"]}
    assert list(curves["weighted loss terms"]) == ["reconstruction", "ssim"]
    assert curves["held-out PSNR in dB"]["averaged weights"][:2] == ([2], [30.5])
    assert curves["held-out SSIM"]["averaged weights"][:2] == ([2], [0.91])
    assert curves["learning rate"]["Adam"][0] == [1, 2, 3]


def test_a_long_runs_loss_terms_are_drawn_as_means():
    rows = [{"step": step, "ssim": float(step % 3)} for step in range(1, 8)]
    # (1 + 2 + 0) / 3, (1 + 2 + 0) / 3, and the last one alone
    assert kd.term_curve(rows, "ssim", 3) == ([3, 6, 7], [1, 1, 1], "-")
    assert kd.term_curve(rows, "ssim", 1)[1] == [1, 2, 0, 1, 2, 0, 1]
    rows[5]["kl"] = 3.0  # a term that the run was resumed with
    assert kd.term_curve(rows, "kl", 3) == ([6], [3], "-")
