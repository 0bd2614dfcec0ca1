"""Clips in calls: encoding as a live encoder does, and the measures of what arrives."""

import json
import os
import subprocess

import numpy as np
import pytest
from PIL import Image

import sharpen_kd as kd

av = pytest.importorskip("av", reason="pip install av")


def write_clip(path, frames):
    """Store frames without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def panning(photographs) -> list[np.ndarray]:
    """Eight frames of 320x256 that pan over a photograph."""
    photograph = np.array(photographs["astronaut"].convert("RGB"))
    return [np.ascontiguousarray(photograph[20:276, 2 * t : 2 * t + 320]) for t in range(8)]


@pytest.fixture
def clip_folder(tmp_path, panning):
    """A dataset of clips: two of one kind and one of another."""
    for name in ("talk_01", "talk_02", "room_01"):
        write_clip(tmp_path / "test" / f"{name}.mkv", panning)
    return tmp_path


def test_a_clip_is_read_as_it_was_stored(clip_folder, panning):
    clips = kd.find_clips(clip_folder / "test")
    assert [clip.kind for clip in clips] == ["room", "talk", "talk"]
    frames = clips[0].frames()
    assert len(frames) == len(panning)
    assert all(np.array_equal(a, b) for a, b in zip(frames, panning, strict=True))


def test_what_is_no_clip_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    (clip,) = kd.find_clips(tmp_path)
    with pytest.raises(kd.UserError, match=r"broken\.mp4: not a readable clip"):
        clip.frames()
    (tmp_path / "broken.mp4").unlink()
    monkeypatch.setattr(kd, "DATASET", tmp_path)
    config = kd.EvalConfig(protocol=("x2", "call"), data_root=tmp_path)
    with pytest.raises(kd.UserError, match="--protocol call: name a folder of sharp clips with"):
        kd.evaluation_data(config)
    with pytest.raises(kd.UserError, match="no clips in this folder"):
        kd.find_clips(tmp_path)


def test_small_frames_have_even_sides():
    assert kd.small_size(640, 360, 2) == (320, 180)
    assert kd.small_size(512, 384, 3) == (170, 128)
    assert kd.small_size(20, 500, 3) == (16, 166)


@pytest.mark.parametrize("protocol", kd.CALLS)
def test_every_call_returns_each_frame_at_its_size(panning, tmp_path, protocol):
    call = kd.CALLS[protocol]
    received, kilobits = kd.received_frames(panning, call, tmp_path)
    assert [frame.shape for frame in received] == [frame.shape for frame in panning]
    psnrs = [kd.frame_psnr(a, b) for a, b in zip(received, panning, strict=True)]
    assert min(psnrs) > 15
    assert max(psnrs) < 45
    assert kilobits > 1


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="as on Windows and macOS")
def test_no_encoder_makes_this_a_real_time_process(panning, tmp_path):
    """SVT-AV1 may do so as root only, so it is done here beside it, where that is allowed."""
    before = os.sched_getscheduler(0)
    for call in kd.CALLS.values():
        kd.received_frames(panning, call, tmp_path)
        assert os.sched_getscheduler(0) == before
    other = os.SCHED_BATCH if before != os.SCHED_BATCH else os.SCHED_OTHER
    with kd.same_scheduling():
        os.sched_setscheduler(0, other, os.sched_param(0))
    assert os.sched_getscheduler(0) == before


def test_an_encoder_that_refuses_is_named(panning, tmp_path):
    tiny = [frame[:32, :32] for frame in panning]
    with pytest.raises(kd.UserError, match="libsvtav1 cannot encode 16x16 frames"):
        kd.received_frames(tiny, kd.CALLS["call-av1"], tmp_path)


def test_more_bits_arrive_as_better_frames(panning, tmp_path):
    psnrs = {}
    rates = {}
    for bits in (0.1, 1.0):
        call = kd.Call(1, "libx264", bits)
        received, rates[bits] = kd.received_frames(panning, call, tmp_path)
        psnrs[bits] = kd.frame_psnr(received[-1], panning[-1])
    assert rates[1.0] > 2 * rates[0.1]
    assert psnrs[1.0] > psnrs[0.1] + 1


def test_flicker_is_the_mean_change_that_the_sharp_clip_does_not_have():
    sharp = [np.full((4, 4, 3), level, np.uint8) for level in (0, 50, 60, 70)]
    same_changes = [frame + 5 for frame in sharp]
    assert kd.flicker(same_changes, sharp) == 0
    # from the third frame on: the changes are 10 and 10 in the clip, 13 and 4 here
    output = [np.full((4, 4, 3), level, np.uint8) for level in (9, 50, 63, 67)]
    assert kd.flicker(output, sharp) == pytest.approx((3 + 6) / 2)


def test_a_clips_scores_begin_with_its_third_frame(panning):
    outputs = [np.zeros_like(panning[0])] * 2 + [frame // 2 for frame in panning[2:]]
    scores = kd.score_clip(outputs, panning)
    by_hand = [kd.frame_psnr(frame // 2, frame) for frame in panning[2:]]
    assert scores["psnr"] == pytest.approx(np.mean(by_hand))


def test_vmaf_prefers_the_sharp_clip_and_its_neg_does_not_reward_contrast(panning):
    pytest.importorskip("imageio_ffmpeg", reason="pip install imageio-ffmpeg")
    blurred = []
    for frame in panning:
        picture = kd.degrade(Image.fromarray(frame), kd.PROTOCOLS["x2"])
        blurred.append(np.array(picture))
    mask = kd.unsharp_mask(2, 150)
    same = kd.vmaf_scores(panning, panning)
    soft = kd.vmaf_scores(blurred, panning)
    boosted = kd.vmaf_scores([mask(frame) for frame in panning], panning)
    assert same["vmaf"] > 95
    assert soft["vmaf"] < same["vmaf"] - 5
    assert boosted["vmaf"] - boosted["vmaf_neg"] > same["vmaf"] - same["vmaf_neg"]


def test_frames_that_vmaf_cannot_score_are_named():
    pytest.importorskip("imageio_ffmpeg", reason="pip install imageio-ffmpeg")
    frames = [np.zeros((16, 16, 3), np.uint8)] * 4
    with pytest.raises(kd.UserError, match=r"libvmaf failed on 16x16 frames \(.+\)"):
        kd.vmaf_scores(frames, frames)


def test_an_error_leaves_the_scores_of_the_protocols_before(clip_folder, tmp_path, monkeypatch):
    received = kd.received_frames

    def fail(sharp, call, path):
        if call == kd.CALLS["call-vp9"]:
            raise kd.UserError("no VP9 here")
        return received(sharp, call, path)

    monkeypatch.setattr(kd, "received_frames", fail)
    monkeypatch.setattr(kd, "vmaf_scores", lambda outputs, sharp: {})
    command = ["eval", "--data-root", str(clip_folder), "--protocol", "call", "call-vp9"]
    assert kd.main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    assert (tmp_path / "out/scores.csv").read_text().count("\ncall,") == 3


def test_of_a_long_clip_the_first_frames_are_scored(tmp_path, monkeypatch, capsys):
    frames = [np.full((48, 64, 3), 9 * number, np.uint8) for number in range(12)]
    for side in ("low", "sharp"):
        write_clip(tmp_path / side / "talk.mkv", frames)
    (clip,) = kd.find_encoded_pairs(tmp_path)
    received, sharp, _ = kd.clip_sides(clip, None)
    assert (len(received), len(sharp)) == (12, 12)
    monkeypatch.setattr(kd, "SCORED_BYTES", 5 * 48 * 64 * 3 + 100)
    kd.frames_to_score.cache_clear()
    received, sharp, _ = kd.clip_sides(clip, None)
    assert [frame[0, 0, 0] for frame in sharp] == pytest.approx([0, 9, 18, 27, 36], abs=2)
    assert len(received) == 5
    assert len(kd.clip_sides(clip, kd.CALLS["call-x1"])[0]) == 5
    told = f"{clip.path}: the first 5 of its 12 frames are scored\n"
    assert capsys.readouterr().out == told


def test_a_clip_that_does_not_say_its_size_is_named(tmp_path, capsys):
    """A transport stream that is cut off before its only key frame."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="pip install imageio-ffmpeg")
    made = ["-f", "lavfi", "-i", "testsrc2=size=64x64:duration=4", "-c:v", "libx264", "-g", "999"]
    whole = tmp_path / "whole.bin"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *made, "-f", "mpegts", whole]
    subprocess.run(command, check=True)
    content = whole.read_bytes()
    whole.unlink()
    (tmp_path / "cut.ts").write_bytes(content[: 3 * 188] + content[len(content) // 376 * 188 :])
    command = ["eval", "--protocol", "call-x1", "--data-root", str(tmp_path)]
    assert kd.main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    assert "cut.ts: not a readable clip (it does not say its size)" in capsys.readouterr().err


def test_clips_average_to_kinds_and_kinds_to_all():
    rows = []
    for name, psnr in (("talk_01", 30.0), ("talk_02", 34.0), ("room_01", 20.0)):
        scores = {"input": {"psnr": psnr}}
        rows.append({"picture": name, "category": name.split("_")[0], "scores": scores})
    table = kd.clip_table(rows, ["input"])
    assert list(table) == ["all", "talk", "room", "talk/talk_01", "talk/talk_02", "room/room_01"]
    assert table["talk"]["input"]["psnr"] == 32
    assert table["all"]["input"]["psnr"] == 26


def test_a_kind_named_all_does_not_hide_the_mean():
    rows = []
    for kind, psnr in (("all", 30.0), ("room", 20.0)):
        scores = {"input": {"psnr": psnr}}
        rows.append({"picture": f"{kind}_1", "category": kind, "scores": scores})
    table = kd.clip_table(rows, ["input"])
    assert list(table) == ["all", "room", "all/all_1", "room/room_1"]
    assert table["all"]["input"]["psnr"] == 25


def test_clips_of_one_name_are_told_by_their_folders(tmp_path):
    for name in ("a/talk_1.mp4", "b/talk_1.mkv", "b/talk_2.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    titles = [clip.title for clip in kd.find_clips(tmp_path)]
    assert titles == ["a/talk_1.mp4", "b/talk_1.mkv", "talk_2"]


def test_eval_scores_clips_by_a_call(clip_folder, student_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kd, "vmaf_scores", lambda outputs, sharp: {})
    command = ["eval", "--data-root", str(clip_folder), "--protocol", "call", "--checkpoint"]
    command += [str(student_file), "--output-dir", str(tmp_path / "out")]
    assert kd.main([*command, "--json", str(tmp_path / "scores.json")]) == 0
    result = json.loads((tmp_path / "scores.json").read_text())["call"]
    assert result["clips"] == 3
    table = result["scores"]
    assert table["all"]["input"]["flicker"] == 1
    frames = kd.find_clips(clip_folder / "test")[0].frames()
    received, _ = kd.received_frames(frames, kd.CALLS["call"], tmp_path)
    by_hand = kd.score_clip(received, frames)
    assert table["room/room_01"]["input"]["psnr"] == pytest.approx(by_hand["psnr"])
    sharpener = kd.load_sharpener(student_file)
    outputs = [sharpener(frame) for frame in received]
    ratio = kd.flicker(outputs, frames) / by_hand["flicker"]
    assert table["room/room_01"]["student"]["flicker"] == pytest.approx(ratio)
    assert "kilobits a second: room_01 " in capsys.readouterr().out


def test_a_call_without_pyav_says_what_to_install(clip_folder, monkeypatch, capsys):
    monkeypatch.setitem(kd.sys.modules, "av", None)
    assert kd.main(["eval", "--data-root", str(clip_folder), "--protocol", "call"]) == 2
    assert "--protocol call needs more packages: pip install av" in capsys.readouterr().err


def test_frames_that_an_edit_list_hides_do_not_count(tmp_path, panning):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="pip install imageio-ffmpeg")
    write_clip(tmp_path / "whole.mkv", panning * 4)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    encode = ["-i", tmp_path / "whole.mkv", "-c:v", "libx264", "-bf", "0", tmp_path / "whole.mp4"]
    cut = ["-ss", "1.2", "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "cut/talk_1.mp4"]
    (tmp_path / "cut").mkdir()
    for arguments in (encode, cut):
        subprocess.run([*ffmpeg, *arguments], check=True)
    (clip,) = kd.find_clips(tmp_path / "cut")
    assert clip.count() == 2
    assert len(clip.frames()) == 2
    with pytest.raises(kd.UserError, match=r"talk_1\.mp4: a clip needs more than 2 frames"):
        kd.evaluate_clip(clip, kd.CALLS["call"], {"input": lambda frame: frame})


def test_only_sharp_clips_are_degraded(tmp_path, panning):
    """Not those that arrived, where both sides are there, and not what `sharpen` wrote."""
    for name in ("low/a", "sharp/a", "sharp/a_sharpened", "plain/b", "plain/b_sharpened"):
        write_clip(tmp_path / f"{name}.mkv", panning[:3])
    assert [clip.path for clip in kd.find_clips(tmp_path)] == [tmp_path / "sharp/a.mkv"]
    assert [clip.path.name for clip in kd.find_clips(tmp_path / "plain")] == ["b.mkv"]
    config = kd.PrepareConfig(sharp_dir=tmp_path, protocol=("calls", "low"), crop_size=64)
    sources = kd.Streams(config).sources
    assert [clip.path for clip in sources["calls"]] == [tmp_path / "sharp/a.mkv"]
    assert [clip.received for clip in sources["low"]] == [tmp_path / "low/a.mkv"]


def test_sides_of_which_one_cannot_be_decoded_whole_are_named(tmp_path, panning, monkeypatch):
    for side in ("low", "sharp"):
        write_clip(tmp_path / side / "a.mkv", panning)
    (pair,) = kd.find_encoded_pairs(tmp_path)
    read = kd.clip_frames
    monkeypatch.setattr(
        kd,
        "clip_frames",
        lambda path, wanted: read(path, wanted)[: -2 * ("low" in str(path)) or None],
    )
    with pytest.raises(kd.UserError, match=r"6 frames of .*low/a\.mkv, 8 of .*can be read"):
        kd.encoded_pair(pair)


def test_a_clip_that_is_too_short_is_named(tmp_path, panning):
    write_clip(tmp_path / "short.mkv", panning[:2])
    (clip,) = kd.find_clips(tmp_path)
    with pytest.raises(kd.UserError, match=r"short\.mkv: a clip needs more than 2 frames"):
        kd.evaluate_clip(clip, kd.CALLS["call"], {"input": lambda frame: frame})


def test_a_still_clip_has_no_ratio_of_flicker(tmp_path, monkeypatch):
    monkeypatch.setattr(kd, "vmaf_scores", lambda outputs, sharp: {})
    write_clip(tmp_path / "still.mkv", [np.full((64, 96, 3), 128, np.uint8)] * 4)
    (clip,) = kd.find_clips(tmp_path)
    row = kd.evaluate_clip(clip, kd.CALLS["call"], {"input": lambda frame: frame})
    assert np.isnan(row["scores"]["input"]["flicker"])
