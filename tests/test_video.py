"""`sharpen clip.mp4`: frames in time, sound and subtitles copied, nothing half-written."""

import re
import subprocess
import threading
from fractions import Fraction

import numpy as np
import pytest

import sharpen_kd as kd

av = pytest.importorskip("av", reason="pip install av")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="pip install imageio-ffmpeg")


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds of a moving pattern with sound, of 12 uneven frames, and with subtitles."""
    folder = tmp_path_factory.mktemp("clip")
    subtitles = folder / "a.srt"
    subtitles.write_text("1\n00:00:00,500 --> 00:00:01,500\nHello\n")
    path = folder / "call.mp4"
    ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=size=160x96:rate=25:duration=2"),
        *("-f", "lavfi", "-i", "sine=440:duration=2", "-i", subtitles),
        *("-vf", "select='not(mod(n,5))+eq(n,3)+eq(n,11)'", "-fps_mode", "vfr"),
        *("-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac", "-c:s", "mov_text", path),
    )
    return path


def frame_times(path):
    with av.open(str(path)) as container:
        return [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]


def packets(path, kind):
    with av.open(str(path)) as container:
        (stream,) = [stream for stream in container.streams if stream.type == kind]
        return [bytes(packet) for packet in container.demux(stream) if packet.size]


def test_pixels_that_are_not_square_and_languages_are_kept(clip, tmp_path):
    wide = tmp_path / "wide.mp4"
    ffmpeg("-i", clip, "-vf", "setsar=4/3", "-metadata:s:a:0", "language=ger", wide)
    kd.ClipSharpener(lambda frame: frame)(wide, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)
        assert container.streams.audio[0].metadata["language"] == "ger"


def negative(frame):
    return 255 - frame


def test_frames_that_stand_still_are_sharpened_once(tmp_path):
    still = tmp_path / "still.mkv"
    ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=size=160x96:rate=5:duration=2"),
        *("-vf", "loop=4:1:3", "-frames:v", "10", "-c:v", "ffv1", "-pix_fmt", "bgr0", still),
    )
    seen = []

    def sharpener(frame):
        seen.append(frame)
        return negative(frame)

    assert kd.ClipSharpener(sharpener, lossless=True)(still, tmp_path / "out.mkv") == 10
    assert len(seen) == 6
    given = kd.clip_frames(still)
    written = kd.clip_frames(tmp_path / "out.mkv")
    for before, after in zip(given, written, strict=True):
        assert np.array_equal(negative(before), after)


def test_frames_keep_their_times_and_sound_and_subtitles_are_copied(clip, tmp_path):
    out = tmp_path / "out.mp4"
    assert kd.ClipSharpener(negative)(clip, out) == 12
    times = frame_times(clip)
    assert len(set(np.diff(times).round(3))) > 1  # unevenly spaced
    assert frame_times(out) == pytest.approx(times, abs=1e-3)
    for kind in ("audio", "subtitle"):
        assert packets(out, kind) == packets(clip, kind)


def test_a_clip_that_was_cut_off_is_sharpened_and_said_to_be_short(clip, tmp_path, capsys):
    whole = tmp_path / "whole.mkv"
    ffmpeg("-stream_loop", "2", "-i", clip, "-map", "0:v", "-map", "0:a", "-c", "copy", whole)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 3])
    assert kd.ClipSharpener(negative)(whole, tmp_path / "a.mkv") == 36
    assert "cut off" not in capsys.readouterr().out
    assert 6 <= kd.ClipSharpener(negative)(cut, tmp_path / "b.mkv") <= 14
    ended, stated = re.search(
        r"cut\.mkv: ends after (\S+) of (\S+) seconds; was it cut off\?", capsys.readouterr().out
    ).groups()
    assert float(ended) == pytest.approx(2, abs=0.3)  # a third of it
    assert float(stated) == pytest.approx(6, abs=0.1)


WHOLE_CLIPS = {
    "slow": ("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=0.5:duration=6", "slow.mkv"),
    "one frame": ("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=0.2:duration=5", "one.mp4"),
    "late": ("-i", "CLIP", "-map", "0:v", "-c", "copy", "-output_ts_offset", "5", "late.mkv"),
    "long text": ("-i", "CLIP", "-i", "TEXT", "-map", "0:v", "-map", "1", "text.mkv"),
    "no duration": ("-i", "CLIP", "-map", "0:v", "-c", "copy", "-live", "1", "live.mkv"),
}


@pytest.mark.parametrize("kind", WHOLE_CLIPS)
def test_a_whole_clip_is_not_said_to_be_short(kind, clip, tmp_path, capsys):
    text = tmp_path / "text.srt"
    text.write_text("1\n00:00:00,500 --> 00:00:09,000\nHello\n")
    *arguments, name = WHOLE_CLIPS[kind]
    files = {"CLIP": clip, "TEXT": text}
    ffmpeg(*(files.get(argument, argument) for argument in arguments), tmp_path / name)
    assert kd.ClipSharpener(negative)(tmp_path / name, tmp_path / "out.mkv") > 0
    assert "cut off" not in capsys.readouterr().out


def test_every_frame_is_sharpened(clip, tmp_path):
    kd.ClipSharpener(negative)(clip, tmp_path / "out.mp4")
    given = kd.clip_frames(clip)
    made = kd.clip_frames(tmp_path / "out.mp4")
    for before, after in zip(given, made, strict=True):
        assert np.abs(after.astype(int) - negative(before)).mean() < 6  # encoded with loss


def test_without_loss_the_frames_are_the_sharpened_ones(clip, tmp_path):
    out = tmp_path / "out.mkv"
    kd.ClipSharpener(negative, lossless=True)(clip, out)
    pairs = zip(kd.clip_frames(clip), kd.clip_frames(out), strict=True)
    assert all(np.array_equal(negative(before), after) for before, after in pairs)


def test_frames_are_enlarged_before_they_are_sharpened(clip, tmp_path):
    seen = []

    def note(frame):
        seen.append(frame)
        return frame

    kd.ClipSharpener(note, size=(320, 180))(clip, tmp_path / "out.mkv")
    assert np.array_equal(seen[3], kd.window_sized(kd.clip_frames(clip)[3], (320, 180)))
    assert kd.clip_frames(tmp_path / "out.mkv")[0].shape == (180, 320, 3)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_turned_clip_is_stored_upright(clip, tmp_path, degrees):
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", degrees, "-i", clip, "-map", "0:v", "-c", "copy", turned)
    ffmpeg("-i", turned, "-frames:v", "1", tmp_path / "shown.png")  # as players turn it
    kd.ClipSharpener(lambda frame: frame, lossless=True)(turned, tmp_path / "out.mkv")
    shown = kd.frame_array(kd.open_picture(tmp_path / "shown.png"))
    stored = kd.clip_frames(tmp_path / "out.mkv")[0]
    assert stored.shape == shown.shape
    assert np.abs(stored.astype(int) - shown).mean() < 4  # another conversion from YUV


@pytest.mark.parametrize("flags", [["hflip"], ["vflip"], ["hflip", "vflip"]])
@pytest.mark.parametrize("degrees", [0, 90])
def test_a_mirrored_clip_is_stored_as_players_show_it(clip, tmp_path, flags, degrees):
    mirrored = tmp_path / "mirrored.mp4"
    options = [f"-display_{flag}" for flag in flags]
    turned = ["-display_rotation", degrees, *options, "-i", clip]
    ffmpeg(*turned, "-map", "0:v", "-c", "copy", mirrored)
    ffmpeg("-i", mirrored, "-frames:v", "1", tmp_path / "shown.png")
    shown = kd.frame_array(kd.open_picture(tmp_path / "shown.png"))
    frame = kd.clip_frames(mirrored)[0]
    assert frame.shape == shown.shape
    assert np.abs(frame.astype(int) - shown).mean() < 4


def test_a_clip_whose_size_changes_keeps_that_of_its_first_frame(tmp_path):
    """As a call's recording does where the network gets better."""
    for side in (64, 128):
        source = f"testsrc2=size={side}x{side}:rate=25:duration=0.4"
        ffmpeg(
            "-f", "lavfi", "-i", source, "-c:v", "libvpx", "-b:v", "1M", tmp_path / f"{side}.ivf"
        )
    parts = [(tmp_path / f"{side}.ivf").read_bytes() for side in (64, 128)]
    (tmp_path / "both.ivf").write_bytes(parts[0] + parts[1][32:])  # without its second header
    ffmpeg("-i", tmp_path / "both.ivf", "-c", "copy", tmp_path / "both.mkv")
    kd.ClipSharpener(lambda frame: frame, lossless=True)(tmp_path / "both.mkv", tmp_path / "o.mkv")
    made = kd.clip_frames(tmp_path / "o.mkv")
    with av.open(str(tmp_path / "both.mkv")) as container:
        given = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(made) == len(given) == 20
    assert np.array_equal(made[3], given[3])
    assert given[13].shape == (128, 128, 3)
    assert np.array_equal(made[13], kd.window_sized(given[13], (64, 64)))


def test_times_that_step_back_are_pushed_on_and_those_that_jump_back_moved():
    rising = kd.RisingTimes(Fraction(1, 25))
    assert [rising(time) for time in (1, 3, 2, 6, 5, 7)] == [1, 3, 4, 6, 7, 8]
    joined = kd.RisingTimes(Fraction(1, 25))
    assert [joined(time) for time in (50, 75, 100, 50, 75)] == [50, 75, 100, 101, 126]
    told = kd.RisingTimes(Fraction(1, 25), [3.0])
    assert [told(time) for time in (50, 75, 100, 50, 75)] == [50, 75, 100, 125, 150]


def test_a_clip_whose_times_step_back_is_sharpened(clip, tmp_path):
    """PyAV gives frames of H.264 in .avi the times 1, 3, 2, 6, 5, ..."""
    ffmpeg("-i", clip, "-r", "25", "-map", "0:v", "-c:v", "libx264", tmp_path / "a.avi")
    count = kd.frame_count(tmp_path / "a.avi")
    assert kd.ClipSharpener(lambda frame: frame)(tmp_path / "a.avi", tmp_path / "out.mkv") == count
    times = frame_times(tmp_path / "out.mkv")
    assert times == sorted(times)
    assert times[-1] - times[0] == pytest.approx((count - 1) / 25, abs=0.1)


def test_a_slow_clip_whose_times_step_back_keeps_its_length(tmp_path):
    slow = tmp_path / "slow.avi"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=1/3:duration=54", "-c:v", "libx264", slow)
    kd.ClipSharpener(lambda frame: frame)(slow, tmp_path / "out.mkv")
    assert frame_times(tmp_path / "out.mkv")[-1] == pytest.approx(54, abs=7)


def test_sound_that_is_damaged_in_places_costs_no_clip(clip, tmp_path, monkeypatch):
    ffmpeg("-i", clip, "-map", "0:v", "-map", "0:a", tmp_path / "a.wmv")
    decode = kd.decoded_sound
    seen = []

    class Damaged:
        def __init__(self, packet):
            self.packet = packet

        def decode(self):
            seen.append(self.packet)
            if len(seen) == 3:
                raise av.InvalidDataError(1094995529, "Invalid data found")
            return self.packet.decode()

    monkeypatch.setattr(kd, "decoded_sound", lambda packet: decode(Damaged(packet)))
    kd.ClipSharpener(lambda frame: frame)(tmp_path / "a.wmv", tmp_path / "out.mkv")
    assert tone(tmp_path / "out.mkv")[2] == pytest.approx(2, abs=0.2)


def test_joined_clips_go_on_behind_each_other(clip, tmp_path):
    ffmpeg("-i", clip, "-map", "0:v", "-map", "0:a", tmp_path / "a.mts")
    joined = tmp_path / "joined.mts"
    joined.write_bytes(4 * (tmp_path / "a.mts").read_bytes())
    kd.ClipSharpener(lambda frame: frame)(joined, tmp_path / "out.mkv")
    times = frame_times(tmp_path / "out.mkv")
    assert len(times) == 48
    assert packets(tmp_path / "out.mkv", "audio") == 4 * packets(tmp_path / "a.mts", "audio")
    starts = {}
    for kind in ("video", "audio"):
        with av.open(str(tmp_path / "out.mkv")) as made:
            coming = [packet for packet in made.demux(**{kind: 0}) if packet.pts is not None]
            times = [float(packet.pts * packet.time_base) for packet in coming]
        starts[kind] = times[:: len(times) // 4]
    apart = np.subtract(starts["video"], starts["audio"])
    assert np.abs(apart - apart[0]).max() < 0.002  # the sound does not drift away from the pictures
    assert np.diff(starts["video"]) == pytest.approx([np.diff(starts["video"])[0]] * 3, abs=0.002)
    assert np.diff(starts["video"])[0] == pytest.approx(2, abs=0.15)


def end_of(path, kind):
    """When the last frame of a clip's pictures or sound begins, in seconds."""
    with av.open(str(path)) as container:
        return [float(frame.time) for frame in container.decode(**{kind: 0})][-1]


def test_a_joined_part_without_sound_is_silent(tmp_path):
    """Four seconds with sound, three without, and five with."""
    joined = tmp_path / "joined.ts"
    for seconds, sound in ((4, True), (3, False), (5, True)):
        streams = ("-map", "0:v", "-map", "1:a") if sound else ("-map", "0:v")
        ffmpeg(
            *("-f", "lavfi", "-i", f"testsrc2=size=64x64:rate=25:duration={seconds}"),
            *("-f", "lavfi", "-i", f"sine=440:duration={seconds}", *streams),
            *("-c:v", "libx264", "-c:a", "aac", tmp_path / "part.ts"),
        )
        with joined.open("ab") as file:
            file.write((tmp_path / "part.ts").read_bytes())
    kd.ClipSharpener(lambda frame: frame)(joined, tmp_path / "out.mkv")
    begins = frame_times(tmp_path / "out.mkv")[0]
    assert end_of(tmp_path / "out.mkv", "video") - begins == pytest.approx(12, abs=0.2)
    assert end_of(tmp_path / "out.mkv", "audio") - begins == pytest.approx(12, abs=0.2)


def test_joined_clips_of_few_frames_a_second_keep_their_lengths(tmp_path):
    ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=5:duration=5"),
        *("-f", "lavfi", "-i", "sine=440:duration=5"),
        *("-c:v", "libx264", "-c:a", "aac", tmp_path / "part.ts"),
    )
    (tmp_path / "joined.ts").write_bytes(3 * (tmp_path / "part.ts").read_bytes())
    kd.ClipSharpener(lambda frame: frame)(tmp_path / "joined.ts", tmp_path / "out.mkv")
    begins = frame_times(tmp_path / "out.mkv")[0]
    assert end_of(tmp_path / "out.mkv", "video") - begins == pytest.approx(15, abs=0.5)
    assert end_of(tmp_path / "out.mkv", "audio") - begins == pytest.approx(15, abs=0.5)


def test_the_last_frame_is_shown_as_long_as_before(tmp_path):
    """A slide show: two frames of three seconds each."""
    slides = tmp_path / "slides.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=64x64:rate=1/3:duration=6", slides)
    kd.ClipSharpener(lambda frame: frame)(slides, tmp_path / "out.mp4")
    for path in (slides, tmp_path / "out.mp4"):
        with av.open(str(path)) as container:
            assert container.duration == pytest.approx(6e6, abs=1e5)


def test_the_sound_that_is_played_by_default_stays_so(clip, tmp_path):
    two = tmp_path / "two.mkv"
    ffmpeg(
        *("-i", clip, "-map", "0:v", "-map", "0:a", "-map", "0:a", "-c", "copy"),
        *("-disposition:a:0", "0", "-disposition:a:1", "default", two),
    )
    kd.ClipSharpener(lambda frame: frame)(two, tmp_path / "out.mkv")
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert [int(stream.disposition) & 1 for stream in container.streams.audio] == [0, 1]


def test_colours_keep_their_meaning(tmp_path):
    """A clip in the colours of HD video, which other players would take for those of SD."""
    clip = tmp_path / "hd.mp4"
    ffmpeg(
        *("-f", "lavfi", "-i", "color=c=0x2080e0:size=64x64:duration=0.4:rate=25"),
        *("-vf", "scale=out_color_matrix=bt709:out_range=tv", "-pix_fmt", "yuv420p"),
        *("-colorspace", "bt709", "-color_range", "tv", "-c:v", "libx264", clip),
    )
    kd.ClipSharpener(lambda frame: frame)(clip, tmp_path / "out.mp4")
    shown = []
    for path in (clip, tmp_path / "out.mp4"):
        ffmpeg("-i", path, "-frames:v", "1", tmp_path / "shown.png")
        shown.append(kd.frame_array(kd.open_picture(tmp_path / "shown.png")).astype(int))
    assert np.abs(shown[0] - shown[1]).max() <= 3


@pytest.mark.parametrize("suffix", sorted(set(kd.CLIP_SUFFIXES) - {".mp4"}))
def test_other_containers_are_read_and_the_common_ones_kept(clip, tmp_path, suffix, capsys):
    other = tmp_path / f"other{suffix}"
    codecs = ("-c:v", "libx264", "-c:a", "aac") if suffix in (".flv", ".3gp") else ()
    even = ("-r", "25") if suffix in (".mpg", ".mpeg", ".vob") else ()
    ffmpeg("-i", clip, "-map", "0:v", "-map", "0:a", *codecs, *even, other)
    assert kd.main(["sharpen", str(other), "--checkpoint", "fast"]) == 0
    kept = suffix in (".webm", ".mov", ".mkv")
    made = tmp_path / f"other_sharpened{suffix if kept else '.mkv'}"
    assert f"other{suffix} -> {made}" in capsys.readouterr().out
    # .avi and .mov know only even times: a frame may be shown twice there
    assert frame_times(made) == pytest.approx(frame_times(other), abs=0.05)
    if suffix not in (".wmv", ".asf"):  # its sound is encoded anew: the next test
        assert packets(made, "audio") == packets(other, "audio")


@pytest.mark.parametrize(
    ("size", "printed"),
    [("96x160", "160x96 is stretched to 96x160"), ("320x192", ""), ("320x190", "")],
)
def test_a_size_of_another_shape_is_told(clip, tmp_path, size, printed, capsys):
    command = ["sharpen", str(clip), "-o", str(tmp_path / "a.mp4"), "--checkpoint", "fast"]
    assert kd.main([*command, "--size", size]) == 0
    told = capsys.readouterr().out
    assert ("stretched" in told) == bool(printed)
    assert printed in told


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_a_clip_keeps_its_title_and_date(clip, tmp_path, suffix):
    known = {"title": "Standup", "artist": "Ann", "date": "2026", "comment": "At home"}
    told = [part for key, text in known.items() for part in ("-metadata", f"{key}={text}")]
    named = tmp_path / f"named{suffix}"
    ffmpeg("-i", clip, "-map", "0:v", *told, named)
    for flags, kept in (((), known), (("--no-metadata",), {})):
        out = tmp_path / f"out{len(flags)}{suffix}"
        command = ["sharpen", str(named), "-o", str(out), "--checkpoint", "fast"]
        assert kd.main([*command, *flags]) == 0
        with av.open(str(out)) as made:
            metadata = {key.lower(): text for key, text in made.metadata.items()}
        assert {key: metadata[key] for key in known if key in metadata} == kept


def test_sound_keeps_its_language_and_by_default_its_name(clip, tmp_path):
    named = tmp_path / "named.mkv"
    told = ("-metadata:s:a", "language=deu", "-metadata:s:a", "title=Ann at home")
    ffmpeg("-i", clip, "-map", "0:v", "-map", "0:a", *told, named)
    for metadata, kept in ((True, {"deu", "Ann at home"}), (False, {"deu"})):
        out = tmp_path / f"{metadata}.mkv"
        kd.ClipSharpener(lambda frame: frame, metadata=metadata)(named, out)
        with av.open(str(out)) as made:
            texts = set(made.streams.audio[0].metadata.values())
        assert texts & {"deu", "Ann at home"} == kept


def test_a_turned_clip_of_oblong_pixels_may_get_its_own_shape(tmp_path, capsys):
    """96x64 pixels of 4:3, turned upright: they look like 64x128."""
    flat = tmp_path / "flat.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=size=96x64:duration=0.2", "-vf", "setsar=4/3", flat)
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", "90", "-i", flat, "-c", "copy", turned)
    told = []
    for size in ("64x128", "128x144"):
        out = str(tmp_path / f"{size}.mp4")
        assert kd.main(["sharpen", str(turned), "-o", out, "--size", size]) == 0
        told.append("stretched" in capsys.readouterr().out)
    assert told == [False, True]


def test_a_program_in_typescript_is_no_clip(clip, tmp_path):
    (tmp_path / "program.ts").write_text("G" + 300 * " ")
    ffmpeg("-i", clip, "-map", "0:v", tmp_path / "b.ts")
    ffmpeg("-i", clip, "-map", "0:v", "-mpegts_m2ts_mode", "1", tmp_path / "c.ts")
    (tmp_path / "d.ts").write_bytes((tmp_path / "b.ts").read_bytes()[50:])
    assert kd.list_clips(tmp_path) == [tmp_path / f"{name}.ts" for name in "bcd"]


def tone(path):
    """(codec, when it begins and ends in seconds, its pitch in Hz) of a clip's sound."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
        codec = container.streams.audio[0].codec_context.name
    end = frames[-2].time + frames[-2].samples / frames[-2].sample_rate  # the last may have no time
    rate = frames[0].sample_rate
    samples = np.concatenate([frame.to_ndarray()[0] for frame in frames]).astype(float)
    second = samples[rate // 2 : rate // 2 + rate]
    return codec, frames[0].time, end, np.abs(np.fft.rfft(second)).argmax()


AMR = ("-c:a", "libopencore_amrnb", "-ac", "1", "-ar", "8000")


@pytest.mark.parametrize(
    ("name", "options", "codec", "made"),
    [
        ("a.wmv", ("-ac", "1"), "wmav2", ("a.mkv", "aac")),
        ("a.wmv", ("-ac", "2"), "wmav2", ("a.webm", "opus")),
        ("a.3gp", ("-c:v", "libx264", *AMR), "amrnb", ("a.mkv", "aac")),
    ],
)
def test_sound_that_does_not_fit_is_encoded_anew(clip, tmp_path, name, options, codec, made):
    ffmpeg("-i", clip, "-map", "0:v", "-map", "0:a", *options, tmp_path / name)
    target, new_codec = made
    kd.ClipSharpener(lambda frame: frame)(tmp_path / name, tmp_path / target)
    before = tone(tmp_path / name)
    after = tone(tmp_path / target)
    assert (before[0], after[0]) == (codec, new_codec)
    assert after[1:3] == pytest.approx(before[1:3], abs=0.15)  # seconds: a few packets
    assert before[3] == after[3] == 440


def test_sharpen_takes_the_clips_of_a_folder_and_its_pictures(clip, tmp_path, small_picture):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/call.mp4").write_bytes(clip.read_bytes())
    small_picture.save(tmp_path / "in/a.png")
    command = ["sharpen", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--size", "192x128"]
    assert kd.main([*command, "--lossless"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "call.mkv"]
    made = kd.clip_frames(tmp_path / "out/call.mkv")
    call = kd.load_sharpener("call")
    assert np.array_equal(made[2], call(kd.window_sized(kd.clip_frames(clip)[2], (192, 128))))


@pytest.fixture
def small_picture(photographs):
    return photographs["astronaut"].resize((40, 30))


def test_mistakes_are_named_and_leave_nothing(clip, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:300])
    sound = tmp_path / "sound.mp4"
    ffmpeg("-i", clip, "-map", "0:a", "-c", "copy", sound)
    before = sorted(tmp_path.iterdir())
    mistakes = {
        (broken,): "broken.mp4: Invalid data found when processing input; is it whole",
        (sound,): "sound.mp4: has no pictures in it",
        (clip, "--size", "1280"): "--size 1280: write it as WIDTHxHEIGHT",
        (clip, "--size", "8x8"): "--size 8x8: at least 16x16",
        (clip, "-o", tmp_path / "a.png"): "a clip's name ends in .mp4, .mov, .mkv, .webm",
        (clip, "-o", tmp_path / "a.mp4", "--lossless"): "--lossless needs a name that ends in .mkv",
    }
    for arguments, named in mistakes.items():
        assert kd.main(["sharpen", *map(str, arguments)]) == 2
        assert named in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before


def test_clips_need_pyav_before_any_work(clip, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(kd.sys.modules, "av", None)
    assert kd.main(["sharpen", str(clip), "-o", str(tmp_path / "a.mp4")]) == 2
    assert "pip install av" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, OSError, RuntimeError])  # the last is PyTorch's
def test_a_failing_sharpener_leaves_nothing_and_no_thread(clip, tmp_path, error):
    threads = threading.active_count()
    seen = []

    def fails_at_the_fifth(frame):
        seen.append(frame)
        if len(seen) == 5:
            raise error("five")
        return frame

    with pytest.raises(kd.UserError, match=r"call\.mp4: five"):
        kd.ClipSharpener(fails_at_the_fifth)(clip, tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())
    assert threading.active_count() == threads


def test_a_clip_without_the_wanted_frames_is_named(clip, tmp_path):
    with pytest.raises(kd.UserError, match=r"call\.mp4: no frame could be read"):
        kd.clip_frames(clip, slice(500, 501))
    with pytest.raises(kd.UserError, match="no frame could be read"):
        kd.clip_frames(tmp_path)


def test_ahead_keeps_the_order_and_stops_when_nobody_asks():
    made = []

    def count():
        for number in range(1000):
            made.append(number)
            yield number

    items = kd.ahead(count(), depth=3)
    assert [next(items) for _ in range(5)] == [0, 1, 2, 3, 4]
    items.close()
    assert len(made) <= 5 + 3 + 2


@pytest.mark.parametrize("size", [(192, 128), (131, 97), (64, 48)])
def test_a_window_is_as_large_as_pillow_makes_it(random_frame, size):
    frame = random_frame(64, 96)
    ours = kd.window_sized(frame, size)
    pillows = kd.resized(frame, size)
    assert ours.shape == pillows.shape == (size[1], size[0], 3)
    assert np.abs(ours.astype(int) - pillows).max() <= 2
    assert kd.window_sized(frame, (96, 64)) is frame
