"""Prepared crops: what `prepare --protocol` writes, and what training reads of it."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_clips import write_clip

import sharpen_kd as kd

av = pytest.importorskip("av", reason="pip install av")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, photographs):
    """Two pictures of two categories and a clip."""
    folder = tmp_path_factory.mktemp("sources")
    for category, name in (("people", "astronaut"), ("text", "page")):
        (folder / category).mkdir()
        photographs[name].convert("RGB").save(folder / category / f"{name}.png")
    photograph = np.array(photographs["coffee"].convert("RGB"))
    panning = [photograph[20:180, 2 * t : 2 * t + 224] for t in range(24)]
    write_clip(folder / "talk_01.mkv", panning)
    return folder


def prepare(sources, root, *more):
    command = ["prepare", str(sources), "--crop-size", "64", "--data-root", str(root)]
    return kd.main([*command, *map(str, more)])


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory):
    """A folder with 96 crops of calls."""
    root = tmp_path_factory.mktemp("prepared")
    assert prepare(sources, root, "--protocol", "calls", "--crops", 96) == 0
    return root


def crops_in(root):
    return np.load(root / "train" / kd.PREPARED_PIXELS)


def test_crops_of_calls_are_what_encoders_leave_of_the_sharp_ones(prepared):
    crops = crops_in(prepared)
    assert crops.shape == (96, 2, 64, 64, 3)
    assert crops.dtype == np.uint8
    psnrs = [kd.frame_psnr(received, sharp) for received, sharp in crops]
    assert 20 < np.median(psnrs) < 40
    sources = json.loads((prepared / "train" / kd.PREPARED_ABOUT).read_text())["sources"]
    assert set(sources) == {"people/astronaut", "text/page", "talk/talk_01"}
    assert sources.count("talk/talk_01") > 24  # half are clips


def test_the_sharp_side_is_a_part_of_a_picture_at_blocks(sources, tmp_path):
    (tmp_path / "one").mkdir()
    with Image.open(sources / "people/astronaut.png") as picture:
        picture.save(tmp_path / "one/a.png")
        pixels = np.array(picture)
    assert prepare(tmp_path / "one", tmp_path, "--protocol", "x2", "--crops", 12) == 0
    crops = crops_in(tmp_path)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (64, 64, 3))[::8, ::8, 0]
    as_they_were = 0
    for received, sharp in crops:
        expected = kd.degrade(Image.fromarray(sharp), kd.PROTOCOLS["x2"])
        as_they_were += np.array_equal(received, np.array(expected))
        likeness = (windows == sharp).mean((2, 3, 4))
        window = windows[np.unravel_index(likeness.argmax(), likeness.shape)]
        changed = (window != sharp).any(2)
        assert np.array_equal(received[changed], sharp[changed])  # a caption
    assert as_they_were >= 7


def test_an_interrupted_prepare_goes_on_to_the_same_crops(
    sources, prepared, tmp_path, monkeypatch, capsys
):
    seen = []
    make = kd.Streams.__getitem__

    def stops_at_the_fourth(self, stream):
        seen.append(stream)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return make(self, stream)

    monkeypatch.setattr(kd.Streams, "__getitem__", stops_at_the_fourth)
    arguments = ("--protocol", "calls", "--crops", 96)
    assert prepare(sources, tmp_path, *arguments) == 130
    about = json.loads((tmp_path / "train" / kd.PREPARED_ABOUT).read_text())
    assert len(about["sources"]) == 36  # saved when it was interrupted

    train = ["train", "--data-root", str(tmp_path), "--degradation", "crops", "--preset", "small"]
    assert kd.main([*train, "--run-dir", str(tmp_path / "run")]) == 2
    assert "its crops are not all written" in capsys.readouterr().err

    assert prepare(sources, tmp_path, *arguments) == 0
    assert seen == [0, 1, 2, 3, 3, 4, 5, 6, 7]
    assert np.array_equal(crops_in(tmp_path), crops_in(prepared))


@pytest.mark.parametrize("fault", ["small", "broken"])
def test_a_clip_that_gives_no_crops_is_named_before_any_is_written(tmp_path, capsys, fault):
    frame = np.zeros((48, 96, 3), np.uint8)
    write_clip(tmp_path / "in/large.mkv", [np.zeros((96, 96, 3), np.uint8)] * 3)
    if fault == "small":
        write_clip(tmp_path / "in/fault.mkv", [frame] * 3)
        said = "fault.mkv: 96x48 frames, smaller than --crop-size 64"
    else:
        (tmp_path / "in/fault.mkv").write_bytes(b"no clip")
        said = "fault.mkv: not a readable clip"
    assert prepare(tmp_path / "in", tmp_path / "out", "--protocol", "calls") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_loader_processes_do_not_wait_for_what_was_decoded_before_them(tmp_path, photographs):
    """FFmpeg's threads do not exist in a forked process; freed there, a decoder waits for ever."""
    frame = np.array(photographs["astronaut"].convert("RGB"))[20:276, :320]
    for name in ("talk_1", "talk_2"):
        write_clip(tmp_path / f"in/{name}.mkv", [np.ascontiguousarray(frame)] * 24)
    script = (
        "import sys, torch, sharpen_kd as kd\n"
        "torch.set_num_threads(2)\n"
        "class Cycle: pass\n"
        "cycle = Cycle()\n"
        "cycle.itself = cycle\n"
        "cycle.clip = kd.importlib.import_module('av').open(sys.argv[2] + '/talk_1.mkv')\n"
        "cycle.frames = [next(cycle.clip.decode(video=0))]\n"
        "cycle.pixels = cycle.frames[0].to_ndarray(format='rgb24')\n"
        "del cycle\n"
        "sys.exit(kd.main(['prepare', *sys.argv[2:]]))\n"
    )
    command = [sys.executable, "-c", script, "", str(tmp_path / "in"), "--protocol", "calls"]
    command += ["--crops", "96", "--crop-size", "64", "--data-root", str(tmp_path / "out")]
    subprocess.run(command, cwd=Path(kd.__file__).parent, check=True, timeout=120)
    assert len(crops_in(tmp_path / "out")) == 96


def test_a_disk_that_is_too_small_is_noticed_before_any_crop(
    sources, tmp_path, capsys, monkeypatch
):
    usage = kd.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(kd.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert prepare(sources, tmp_path / "out", "--protocol", "x2", "--crops", 12) == 2
    assert "0.0 GB of crops, and 0.0 GB are free; fewer --crops" in capsys.readouterr().err
    assert not (tmp_path / "out/train" / kd.PREPARED_PIXELS).exists()


def test_other_crops_are_not_written_over(sources, prepared, capsys):
    before = crops_in(prepared)
    assert prepare(sources, prepared, "--protocol", "calls", "--crops", 96, "--seed", 1) == 2
    assert "holds other crops; remove it or choose another --data-root" in capsys.readouterr().err
    assert np.array_equal(crops_in(prepared), before)


def test_a_cache_of_another_mixture_is_another(sources, monkeypatch):
    config = kd.PrepareConfig(sharp_dir=sources, protocol=("calls",))
    key = kd.Streams(config).key()
    assert kd.Streams(config).key() == key
    monkeypatch.setitem(kd.CODECS, "libx264", {"preset": "slow"})
    assert kd.Streams(config).key() != key
    monkeypatch.undo()
    monkeypatch.setattr(kd, "draw_mixture", lambda key: ())
    assert kd.Streams(config).key() != key


@pytest.mark.parametrize(
    ("protocol", "named"), [("calls", "nothing to degrade by calls"), ("low", "low: no such fold")]
)
def test_an_empty_folder_is_named(tmp_path, capsys, protocol, named):
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty", tmp_path, "--protocol", protocol) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "train").exists()


def test_a_still_picture_moves_by_whole_pixels(photographs):
    picture = np.array(photographs["astronaut"].convert("RGB"))
    zoomed = 0
    for index in range(20):
        frames = kd.moving_still(picture, (0, index))
        assert len(frames) == kd.STREAM_FRAMES
        assert {frame.shape for frame in frames} == {(288, 416, 3)}
        windows = np.lib.stride_tricks.sliding_window_view(picture[..., 0], (288, 416))
        inside = [(windows[:, :, :4, :4] == f[:4, :4, 0]).all((2, 3)).any() for f in frames]
        zoomed += not all(inside)
    assert zoomed < 10  # all others are parts of the picture as it is


def test_a_zoom_without_room_on_one_side_rests(random_frame):
    picture = random_frame(600, 416)
    for index in range(20):
        for frame in kd.moving_still(picture, (0, index)):
            tops = np.flatnonzero((picture[..., 0] == frame[0, :, 0]).all(1))
            assert any(np.array_equal(picture[top : top + 288], frame) for top in tops)


def test_a_part_of_a_clip_may_miss_every_second_frame(tmp_path):
    frames = [np.full((64, 64, 3), 5 * t, np.uint8) for t in range(50)]
    write_clip(tmp_path / "talk.mkv", frames)
    clip = kd.Clip(tmp_path / "talk.mkv")
    assert clip.count() == 50
    steps = set()
    for index in range(20):
        part = kd.part_of_clip(clip, (0, index))
        times = [int(frame[0, 0, 0]) // 5 for frame in part]
        assert len(times) == kd.STREAM_FRAMES
        steps.add(times[1] - times[0])
        assert set(np.diff(times)) == {times[1] - times[0]}
    assert steps == {1, 2}


def test_a_few_crops_have_a_sharp_part_and_keep_the_rest():
    received = np.zeros((64, 64, 3), np.uint8)
    sharp = np.full((64, 64, 3), 255, np.uint8)
    pairs = [kd.with_sharp_part(received, sharp, (0, index)) for index in range(1000)]
    shares = np.array([(pair[0] == pair[1]).mean() for pair in pairs])
    assert np.mean(shares > 0) == pytest.approx(0.2, abs=0.03)
    assert 0 < shares[shares > 0].min() < 0.05
    assert not received.any()
    assert (sharp == 255).all()
    captions = [pair[1] for pair in pairs if (pair[1] != 255).any()]
    assert len(captions) == pytest.approx(100, abs=30)
    assert np.mean([len(np.unique(caption)) > 3 for caption in captions]) > 0.8  # there are letters


def test_a_border_is_continued_as_frames_are():
    both = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), np.uint8)
    for top, left in np.ndindex(2, 2):
        moved = kd.with_border(torch.from_numpy(both), bool(top), bool(left)).numpy()
        assert moved.shape == both.shape
        for before, after in zip(both, moved, strict=True):
            frame = before[: 32 - kd.MARGIN * top, : 40 - kd.MARGIN * left]
            padded, _ = kd.FrameSharpener(kd.PlainStack()).cut(frame)
            first = kd.MARGIN * (1 - top), kd.MARGIN * (1 - left)  # what `cut` continues, too
            assert np.array_equal(after, padded[first[0] :, first[1] :][:32, :40])


def test_some_prepared_crops_begin_at_a_border(prepared, monkeypatch):
    drawn = []

    def note(both, at_the_top, at_the_left):
        drawn.append((at_the_top, at_the_left))
        return both

    monkeypatch.setattr(kd, "with_border", note)
    crops = kd.PreparedCrops(prepared / "train", image_size=48)
    for epoch in range(1000):
        crops[epoch, 0]
    assert np.mean(drawn, axis=0) == pytest.approx([0.2, 0.2], abs=0.04)


def test_a_prepared_crop_is_a_window_mirrored_and_turned_alike_on_both_sides(prepared, monkeypatch):
    monkeypatch.setattr(kd, "with_border", lambda both, *_: both)
    crops = kd.PreparedCrops(prepared / "train", image_size=48, seed=3)
    pixels = crops_in(prepared)
    forms = set()
    for epoch in range(40):
        crop = crops[epoch, 7]
        for number, turned in enumerate(symmetries(pixels[7])):
            for top, left in np.ndindex(3, 3):
                window = turned[:, 8 * top : 8 * top + 48, 8 * left : 8 * left + 48]
                if np.array_equal(window, np.stack([crop["blurred"], crop["sharp"]])):
                    forms.add(number)
    assert forms == set(range(8))
    again = kd.PreparedCrops(prepared / "train", image_size=48, seed=3)[5, 7]
    assert np.array_equal(again["blurred"], crops[5, 7]["blurred"])


def test_crops_in_the_devices_memory_are_those_of_the_file(prepared):
    of_file = kd.PreparedCrops(prepared / "train", image_size=48)
    copied = kd.PreparedCrops(prepared / "train", image_size=48, device=torch.device("cpu"))
    assert copied.pixels.data_ptr() != of_file.pixels.data_ptr()
    for epoch, index in np.ndindex(50, len(copied)):
        for name, pixels in copied[epoch, index].items():
            assert torch.equal(pixels, of_file[epoch, index][name])


def symmetries(both):
    """The eight ways to turn and mirror (2, S, S, 3)."""
    for turned in (both, both.transpose(0, 2, 1, 3)):
        for flipped in (turned, turned[:, ::-1]):
            yield flipped
            yield flipped[:, :, ::-1]


def test_a_process_that_is_not_forked_maps_the_crops_instead_of_a_copy(prepared):
    crops = kd.PreparedCrops(prepared / "train", image_size=48, seed=3)
    crops.leave_out(0.3)
    sent = pickle.dumps(crops)
    assert len(sent) < crops.stored.nbytes / 20
    again = pickle.loads(sent)
    assert isinstance(again.stored, np.memmap)
    assert len(again) == len(crops)
    for name, crop in crops[2, 5].items():
        assert torch.equal(crop, again[2, 5][name])


def test_whole_clips_and_pictures_are_held_out(prepared):
    crops = kd.PreparedCrops(prepared / "train", image_size=64)
    held_out = crops.leave_out(0.2, most=5)
    names = {crops.sources[index] for index in crops.used}
    assert 0 < len(names) < 3
    assert len(crops) == sum(source in names for source in crops.sources)
    assert 0 < len(held_out) <= 5
    blurred, sharp = held_out[0].load()
    assert blurred.shape == sharp.shape == (64, 64, 3)
    left_out = [i for i, source in enumerate(crops.sources) if source not in names]
    assert np.array_equal(crops_in(prepared)[left_out[0]], np.stack([blurred, sharp]))


def test_training_reads_prepared_crops(prepared, tmp_path, capsys):
    command = [
        "train",
        "--data-root",
        str(prepared),
        "--degradation",
        "crops",
        "--stem-stride",
        "2",
    ]
    command += ["--network", "plain", "--widths", "8", "--convolutions", "3", "--image-size", "48"]
    command += ["--lambda-perceptual", "0", "--lambda-feature", "0", "--lambda-kl", "0"]
    command += ["--batch-size", "8", "--epochs", "2", "--run-dir", str(tmp_path / "run")]
    assert kd.main(command) == 0
    student, content = kd.load_student(tmp_path / "run/best.pth")
    assert student.config["kind"] == "plain"
    assert content["held_out"]["pictures"] > 0
    assert kd.main([*command, "--overwrite", "--cache"]) == 0
    settings = {"degradation": "crops", "data_root": prepared, "image_size": 48, "device": "cpu"}
    for cache in (False, True):
        crops, _ = kd.training_data(kd.TrainConfig(cache=cache, **settings))
        assert crops.in_device_memory == cache
    copied, _ = kd.load_student(tmp_path / "run/best.pth")
    for name, weights in copied.state_dict().items():
        assert torch.equal(weights, student.state_dict()[name])
    assert kd.main([*command, "--overwrite", "--image-size", "96"]) == 2
    assert "the prepared crops have 64 pixels a side" in capsys.readouterr().err
    assert kd.main([*command, "--overwrite", "--data-root", str(tmp_path)]) == 2
    assert "holds no prepared crops" in capsys.readouterr().err


@pytest.mark.parametrize("spoil", ["crops.json", "crops.npy"])
def test_damaged_crops_are_named(sources, tmp_path, capsys, spoil):
    arguments = ("--protocol", "x2", "--crops", 12)
    assert prepare(sources, tmp_path, *arguments) == 0
    (tmp_path / "train" / spoil).write_bytes(b"damaged")
    assert prepare(sources, tmp_path, *arguments) == 2
    assert "its crops are damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoiled",
    [[], {}, {"sources": None}, {"sources": list(range(12))}, {"sources": ["a"] * 13}],
)
def test_crops_without_all_that_is_known_of_them_are_named(sources, tmp_path, capsys, spoiled):
    arguments = ("--protocol", "x2", "--crops", 12)
    assert prepare(sources, tmp_path, *arguments) == 0
    about = json.loads((tmp_path / "train/crops.json").read_text())
    content = about | spoiled if spoiled else spoiled
    (tmp_path / "train/crops.json").write_text(json.dumps(content))
    for command in (
        ["train", "--degradation", "crops", "--image-size", "48", "--data-root", str(tmp_path)],
        ["prepare", str(sources), "--data-root", str(tmp_path), *map(str, arguments)],
    ):
        capsys.readouterr()
        assert kd.main(command) == 2
        assert f"{tmp_path}/train: " in capsys.readouterr().err


def test_prepare_names_the_training_that_fits(sources, tmp_path, capsys):
    cases = {
        (): "`train --preset small --degradation crops --data-root {} --image-size 64` learns",
        ("--crop-size", 160): "--degradation crops --data-root {}` learns",
        ("--crop-size", 40): "--data-root {} --image-size 32` learns",
        ("--split", "test"): "12 crops in {}/test\n",
    }
    for number, (flags, expected) in enumerate(cases.items()):
        root = tmp_path / str(number)
        assert prepare(sources, root, "--protocol", "x2", "--crops", 12, *flags) == 0
        assert expected.format(root) in capsys.readouterr().out


def test_small_frames_are_sent_by_an_encoder_that_takes_them(sources, tmp_path):
    av1 = [key for key in ((0, i) for i in range(40)) if kd.draw_call(key).codec == "libsvtav1"]
    assert len(av1) > 1
    for key in av1:
        factor = kd.draw_call(key).factor
        call = kd.drawn_call(key, 160, 120)
        assert call.codec == ("libx264" if 120 / factor < 63 else "libsvtav1")
        assert (call.factor, call.bits) == (factor, kd.draw_call(key).bits)
        assert kd.drawn_call(key, 640, 360).codec == "libsvtav1"
        frames = [np.full((120, 160, 3), level, np.uint8) for level in (90, 100, 110)]
        kd.received_frames(frames, call, tmp_path)  # the encoder takes them


def test_crops_may_be_larger_than_the_usual_window(sources, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.png").write_bytes((sources / "people/astronaut.png").read_bytes())
    command = ["prepare", str(tmp_path / "one"), "--crop-size", "320", "--data-root", str(tmp_path)]
    assert kd.main([*command, "--protocol", "calls", "--crops", "12"]) == 0
    assert crops_in(tmp_path).shape == (12, 2, 320, 320, 3)


def test_calls_need_pyav_before_any_work(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(kd.sys.modules, "av", None)
    assert prepare(sources, tmp_path, "--protocol", "calls") == 2
    assert "pip install av" in capsys.readouterr().err
    assert not (tmp_path / "train").exists()


@pytest.fixture
def encoded_pairs(tmp_path, photographs):
    """A clip in low/ beside the sharp one in sharp/, as a user may have them."""
    photograph = np.array(photographs["coffee"].convert("RGB"))
    sharp = [photograph[20:148, 2 * t : 2 * t + 160] for t in range(6)]
    low = [np.array(kd.degrade(Image.fromarray(f), kd.PROTOCOLS["x2"])) for f in sharp]
    write_clip(tmp_path / "own/sharp/a.mkv", sharp)
    (tmp_path / "own/low/a").mkdir(parents=True)
    for number, frame in enumerate(low, start=7):
        Image.fromarray(frame).save(tmp_path / f"own/low/a/{number:05}.png")
    return tmp_path / "own"


def test_encoded_pairs_are_matched_in_order(encoded_pairs, tmp_path):
    (pair,) = kd.find_encoded_pairs(encoded_pairs)
    low, sharp = kd.encoded_pair(pair)
    assert len(low) == len(sharp) == 6
    for received, frame in zip(low, sharp, strict=True):
        expected = kd.degrade(Image.fromarray(frame), kd.PROTOCOLS["x2"])
        assert np.array_equal(received, np.array(expected))
    assert prepare(encoded_pairs, tmp_path, "--protocol", "low", "--crops", 12) == 0
    assert crops_in(tmp_path).shape == (12, 2, 64, 64, 3)


def test_eval_scores_encoded_pairs(encoded_pairs, student_file, tmp_path, monkeypatch):
    monkeypatch.setattr(kd, "vmaf_scores", lambda outputs, sharp: {})
    command = ["eval", "--data-root", str(encoded_pairs), "--protocol", "low", "--checkpoint"]
    command += [str(student_file), "--output-dir", str(tmp_path)]
    assert kd.main([*command, "--json", str(tmp_path / "scores.json")]) == 0
    table = json.loads((tmp_path / "scores.json").read_text())["low"]["scores"]
    (pair,) = kd.find_encoded_pairs(encoded_pairs)
    by_hand = kd.score_clip(*kd.encoded_pair(pair))
    assert table[f"{pair.kind}/a"]["input"]["psnr"] == pytest.approx(by_hand["psnr"])


def test_encoded_pairs_may_be_two_folders_of_numbered_frames(tmp_path, photographs):
    sharp = np.array(photographs["coffee"].convert("RGB"))[:64, :80]
    for side, shift in (("sharp", 0), ("low", 1)):
        (tmp_path / side).mkdir()
        for number in range(4):
            picture = Image.fromarray(np.roll(sharp, number, axis=1) // 2 + shift)
            picture.save(tmp_path / f"{side}/{number:06}.png")
    (pair,) = kd.find_encoded_pairs(tmp_path)
    low, frames = kd.encoded_pair(pair)
    assert len(low) == len(frames) == 4
    assert np.array_equal(low[3], frames[3] + 1)


def spoil_count(folder):
    (folder / "low/a/00012.png").unlink()


def spoil_sizes(folder):
    for file in (folder / "low/a").iterdir():
        with Image.open(file) as picture:
            small = picture.resize((80, 64))
        small.save(file)


def spoil_partner(folder):
    (folder / "sharp/a.mkv").rename(folder / "sharp/b.mkv")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_count, "has 5 frames, .* has 6; cut them"),
        (spoil_sizes, "has frames of 80x64, .* of 160x128 pixels; enlarge"),
        (spoil_partner, "low/a: has no partner in .*sharp"),
    ],
)
def test_pairs_that_do_not_match_are_named(encoded_pairs, spoil, named):
    spoil(encoded_pairs)
    with pytest.raises(kd.UserError, match=named):
        kd.encoded_pair(kd.find_encoded_pairs(encoded_pairs)[0])


def test_two_clips_of_one_name_on_a_side_are_named(encoded_pairs):
    for side in ("low", "sharp"):
        (encoded_pairs / side / "b.mkv").touch()
    assert [pair.title for pair in kd.find_encoded_pairs(encoded_pairs)] == ["a", "b"]
    (encoded_pairs / "low/b.mp4").touch()
    with pytest.raises(kd.UserError, match=r"b.mkv, .*b.mp4: two clips of one name; rename one"):
        kd.find_encoded_pairs(encoded_pairs)


def test_a_folder_of_frames_keeps_a_dot_in_its_name(encoded_pairs):
    (encoded_pairs / "low/a").rename(encoded_pairs / "low/a.v1")
    (encoded_pairs / "sharp/a.mkv").rename(encoded_pairs / "sharp/a.v1.mkv")
    assert [pair.title for pair in kd.find_encoded_pairs(encoded_pairs)] == ["a.v1"]


def test_a_folder_of_numbered_pictures_is_a_clip(tmp_path, photographs):
    frames = [np.array(photographs["coffee"].convert("RGB"))[t : t + 40, :60] for t in range(11)]
    (tmp_path / "room_02").mkdir()
    for number, frame in enumerate(frames, start=1):
        Image.fromarray(frame).save(tmp_path / f"room_02/{number}.png")
    (tmp_path / "photographs").mkdir()
    for number in (12003, 12077):  # numbers, but not those of frames
        Image.fromarray(frames[0]).save(tmp_path / f"photographs/{number}.png")
    (clip,) = kd.find_clips(tmp_path)
    assert (clip.kind, clip.count()) == ("room", 11)
    assert all(np.array_equal(a, b) for a, b in zip(clip.frames(), frames, strict=True))
    assert np.array_equal(clip.frames(slice(2, 7, 2))[1], frames[4])
    photographs["coffee"].convert("RGB").save(tmp_path / "room_02/12.png")
    with pytest.raises(kd.UserError, match="room_02: its frames have several sizes"):
        clip.frames()
