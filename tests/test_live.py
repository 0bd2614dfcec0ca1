"""`sharpen --live`: the newest frame wins, sound is whole, and what stands still costs nothing."""

import contextlib
import gc
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest

import sharpen_kd as kd

av = pytest.importorskip("av", reason="pip install av")
imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="pip install imageio-ffmpeg")

ROOT = Path(__file__).resolve().parent.parent

# --- What stands still ----------------------------------------------------------------------------


def test_a_repeated_frame_costs_nothing(random_frame):
    first, other = random_frame(64, 96), random_frame(64, 96, seed=1)
    sharpener = kd.load_sharpener("call-fast", precision="float32")
    steady = kd.SteadySharpener(sharpener)
    result = steady(first)
    assert np.array_equal(result, sharpener(first))
    assert steady(first.copy()) is result
    assert (steady.frames, steady.computed) == (2, 1)
    assert np.array_equal(steady(other), sharpener(other))
    assert np.array_equal(steady(first), sharpener(first))  # only the last one is kept
    smaller = np.ascontiguousarray(first[:, :-1])
    assert np.array_equal(steady(smaller), sharpener(smaller))
    assert (steady.frames, steady.computed) == (5, 4)
    assert np.array_equal(result, sharpener(first))  # results that were given away stay


# --- The newest frame, and the level --------------------------------------------------------------


def test_the_newest_frame_wins_and_the_others_are_counted():
    latest = kd.LatestFrame()
    for number in range(3):
        latest.put(kd.LiveFrame(number, 0.0, 0.0))
    assert latest.take().picture == 2
    latest.put(kd.LiveFrame(3, 0.0, 0.0))
    latest.close()
    assert latest.take().picture == 3
    assert latest.take() is None
    assert (latest.received, latest.dropped) == (4, 2)


def test_a_frame_is_taken_as_soon_as_it_comes():
    latest = kd.LatestFrame()
    taken = []
    thread = threading.Thread(target=lambda: taken.append(latest.take()))
    thread.start()
    latest.put(kd.LiveFrame("frame", 0.0, 0.0))
    thread.join(timeout=10)
    assert taken[0].picture == "frame"


def test_levels_begin_with_the_best_student_and_end_without_one():
    assert [str(level) for level in kd.live_levels("auto")] == [
        "call",
        "call-fast",
        "call-fast at 75% of the size",
        "call-fast at 50% of the size",
        "frames as they are",
    ]
    assert [level.checkpoint for level in kd.live_levels("fast")] == ["fast"] * 3 + [""]


def changes(governor, seconds):
    """Whether the level is another one after a frame that took so long."""
    before = governor.level
    governor.note(seconds)
    return governor.level != before


def test_the_governor_goes_down_when_half_of_the_frames_are_late():
    governor = kd.Governor(kd.live_levels("auto"), budget=0.04)
    for late in (0.01, 0.05) * 12:
        assert not changes(governor, late)
    assert changes(governor, 0.05)  # 13 of 25
    assert str(governor.level) == "call-fast"
    for _ in range(24):
        assert not changes(governor, 0.05)  # the window has begun anew
    assert changes(governor, 0.05)


def test_the_governor_needs_fewer_frames_where_they_are_slow():
    governor = kd.Governor(kd.live_levels("auto"), budget=0.04)
    assert [changes(governor, 0.8) for _ in range(5)] == [False, False, False, False, True]
    assert [changes(governor, 0.5) for _ in range(7)] == [False] * 6 + [True]


def test_the_governor_ends_with_frames_as_they_are():
    governor = kd.Governor(kd.live_levels("fast"), budget=0.04)
    falls = [changes(governor, 1.0) for _ in range(200)]
    assert sum(falls) == 3
    assert str(governor.level) == "frames as they are"


def test_the_governor_goes_up_after_calm_and_waits_twice_as_long_the_next_time():
    governor = kd.Governor(kd.live_levels("auto"), budget=0.03)
    for _ in range(25):
        governor.note(0.1)
    calm = [changes(governor, 0.009) for _ in range(300)]
    assert calm.index(True) == 299
    assert str(governor.level) == "call"
    for _ in range(25):
        governor.note(0.1)
    calm = [changes(governor, 0.009) for _ in range(600)]
    assert calm.index(True) == 599


def test_a_rise_that_held_is_no_reason_to_wait_longer():
    governor = kd.Governor(kd.live_levels("auto"), budget=0.03)
    for _ in range(2):
        for _ in range(25):
            governor.note(0.1)
        assert str(governor.level) == "call-fast"
        calm = [changes(governor, 0.009) for _ in range(300)]
        assert calm.index(True) == 299
        assert not any(governor.note(0.02) for _ in range(300))


def test_the_steps_down_after_a_wrong_rise_are_one_mistake():
    governor = kd.Governor(kd.live_levels("auto"), budget=0.03)
    for seconds, frames in ((0.1, 25), (0.009, 300), (0.1, 100)):
        for _ in range(frames):
            governor.note(seconds)
    assert str(governor.level) == "frames as they are"
    assert governor.patience == 600


def test_frames_that_stood_still_are_not_counted(camera, tmp_path, monkeypatch, capsys):
    noted = []
    monkeypatch.setattr(kd.Governor, "note", lambda self, seconds: noted.append(seconds))
    sharpened = []
    compute = kd.LiveSharpener.__call__

    def counted(sharpener, picture, level):
        sharpened.append(level)
        return compute(sharpener, picture, level)

    monkeypatch.setattr(kd.LiveSharpener, "__call__", counted)
    still = tmp_path / "still.mp4"
    loop = ("-vf", "select=eq(n\\,0),loop=19:1,setpts=N/10/TB", "-c:v", "libx264", "-qp", "0")
    ffmpeg("-i", camera, *loop, "-an", still)
    options = ["--checkpoint", "call-fast", "--backend", "torch"]
    assert live("--live", still, "-o", tmp_path / "out.mp4", *options) == 0
    repeated = int(re.search(r"; (\d+) frames stood still", capsys.readouterr().out)[1])
    assert repeated == len(sharpened) - 1 > 0
    assert len(noted) == 1


class FakeSharpener:
    """Gives frames back; says by an event that it has begun with number 1."""

    repeated = 0

    def __init__(self):
        self.second_begun = threading.Event()

    def __call__(self, picture, level):
        if picture == 1:
            self.second_begun.set()
        return picture


def hold_call(latest, show, sharpener=None, is_seen=lambda: True):
    """`kd.hold_call` with a source and a sink of the test's own; the times that were noted."""
    noted = []
    governor = types.SimpleNamespace(level=kd.Level(""), note=noted.append)
    source = types.SimpleNamespace(latest=latest, name="test", rate=30, thread=threading.Thread())
    sharpening = kd.LiveSharpening(source, sharpener or FakeSharpener(), governor)
    sink = types.SimpleNamespace(show=show, is_seen=is_seen)
    kd.hold_call(source, sharpening, sink)
    assert not sharpening.thread.is_alive()
    return noted


def live_frame(number, seconds=0.0):
    return kd.LiveFrame(number, seconds, time.perf_counter())


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_next_frame_is_sharpened_while_one_is_shown():
    latest = kd.LatestFrame()
    sharpener = FakeSharpener()
    shown = []

    def show(pixels, seconds):
        shown.append((pixels, seconds))
        if pixels == 0:
            latest.put(live_frame(1, 0.1))
            assert sharpener.second_begun.wait(timeout=20)
        else:
            latest.close()

    latest.put(live_frame(0))
    assert len(hold_call(latest, show, sharpener)) == 2
    assert shown == [(0, 0.0), (1, 0.1)]


def test_a_slow_sink_drops_frames_and_is_no_reason_for_another_level(capsys):
    latest = kd.LatestFrame()
    shown = []

    def show(pixels, seconds):
        shown.append(pixels)
        if pixels == 0:
            for number in (1, 2, 3):
                latest.put(live_frame(number))
                wait_until(lambda: latest.frame is None)  # it is being sharpened
            latest.close()
            time.sleep(0.2)

    latest.put(live_frame(0))
    noted = hold_call(latest, show)
    assert len(noted) == 4
    assert max(noted) < 0.2
    assert shown == [0, 3]
    assert " 2 dropped;" in capsys.readouterr().out


def fail(pixels, seconds):
    raise kd.UserError("the listener has gone")


@pytest.mark.parametrize("show", [lambda pixels, seconds: None, fail])
@pytest.mark.parametrize("more", [False, True])
def test_a_sink_that_ends_ends_the_call(show, more):
    """Though no more frames come, or though they come faster than they are sharpened."""
    latest = kd.LatestFrame()
    latest.put(live_frame(0))
    seen = [True, True, False]  # it is closed while the second frame is waited for

    class Slow(FakeSharpener):
        def __call__(self, picture, level):
            if more:
                for number in range(9):
                    latest.put(live_frame(number))
            return picture

    outcome = []

    def call():
        try:
            outcome.append(hold_call(latest, show, Slow(), lambda: seen.pop(0)))
        except kd.UserError as error:
            outcome.append(str(error))

    thread = threading.Thread(target=call, daemon=True)
    # Signals are handled in the main thread only, and this is another, which may hang.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kd, "ended_by_signals", contextlib.nullcontext)
        thread.start()
        thread.join(timeout=20)
    assert not thread.is_alive()
    assert outcome[0] == "the listener has gone" if show is fail else len(outcome[0]) >= 1


def test_what_fails_while_sharpening_leaves_a_whole_file(camera, tmp_path, capsys, monkeypatch):
    compute = kd.FrameSharpener.__call__
    frames = []

    def failing(sharpener, frame):
        frames.append(frame)
        if len(frames) == 8:
            raise RuntimeError("out of memory")
        return compute(sharpener, frame)

    monkeypatch.setattr(kd.FrameSharpener, "__call__", failing)
    out = tmp_path / "out.mp4"
    assert live("--live", camera, "-o", out) == 2
    message = f"sharpen_kd: error: {camera}, while sharpening: out of memory\n"
    assert capsys.readouterr().err == message
    assert 0 < len(frames_of(out)[1]) < 8


def test_a_frame_that_takes_some_time_ends_the_calm():
    governor = kd.Governor(kd.live_levels("auto"), budget=0.03)
    for _ in range(25):
        governor.note(0.1)
    for _ in range(10):
        assert not any(changes(governor, 0.009) for _ in range(299))
        assert not changes(governor, 0.016)


# --- From a file as the camera --------------------------------------------------------------------


def ffmpeg(*arguments):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def camera(tmp_path_factory):
    """Two seconds of 96x64 at 10 frames/s, with sound; the first frame is at 0.5 s."""
    path = tmp_path_factory.mktemp("camera") / "camera.mp4"
    ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=size=96x64:rate=10:duration=2"),
        *("-f", "lavfi", "-i", "sine=440:duration=2", "-output_ts_offset", "0.5"),
        *("-c:v", "libx264", "-crf", "10", "-pix_fmt", "yuv420p", "-c:a", "aac", path),
    )
    return path


def frames_of(path):
    """(times, frames) of a clip."""
    with av.open(str(path)) as container:
        decoded = list(container.decode(video=0))
    return [frame.time for frame in decoded], [f.to_ndarray(format="rgb24") for f in decoded]


def sound_of(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def live(*arguments):
    return kd.main(["sharpen", "--checkpoint", "call-fast", *map(str, arguments)])


def test_a_file_is_a_camera_and_another_takes_what_it_shows(camera, tmp_path, capsys):
    begin = time.perf_counter()
    assert live("--live", camera, "-o", tmp_path / "out.mp4") == 0
    assert time.perf_counter() - begin > 1.8  # at its own rate
    times, frames = frames_of(tmp_path / "out.mp4")
    given_times, given = frames_of(camera)
    given_times = np.array(given_times) - given_times[0]
    assert 0 < len(frames) <= len(given) == 20
    sharpener = kd.load_sharpener("call-fast")
    for moment, frame in zip(times, frames, strict=True):
        number = np.abs(given_times - moment).argmin()
        assert given_times[number] == pytest.approx(moment, abs=0.002)
        wanted = sharpener(given[number]).astype(int)
        assert np.abs(frame.astype(int) - wanted).mean() < 8  # encoded with loss
    assert sound_of(tmp_path / "out.mp4") == sound_of(camera)
    printed = capsys.readouterr().out
    assert f" out, {20 - len(frames)} dropped; latency " in printed


def test_a_turned_source_is_shown_upright_and_its_colours_are_said(camera, tmp_path):
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", "90", "-i", camera, "-c", "copy", turned)
    assert live("--live", turned, "-o", tmp_path / "out.mp4", "--strength", "0") == 0
    given = kd.clip_frames(turned)
    _, frames = frames_of(tmp_path / "out.mp4")
    with av.open(str(turned)) as container:
        wanted = kd.upright(next(container.decode(video=0)))
    assert frames[0].shape == wanted.shape == (96, 64, 3)
    assert np.abs(frames[0].astype(int) - wanted).mean() < 8
    assert len(given) == 20
    with av.open(str(tmp_path / "out.mp4")) as container:
        context = container.streams.video[0].codec_context
    assert (context.colorspace, context.color_primaries, context.color_range) == (1, 1, 1)


def test_a_source_may_change_its_size(camera, tmp_path):
    parts = []
    for size in ("96x64", "48x32"):
        parts.append(tmp_path / f"{size}.ts")
        ffmpeg("-f", "lavfi", "-i", f"testsrc2=size={size}:rate=10:duration=1", parts[-1])
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert live("--live", both, "-o", tmp_path / "out.mp4") == 0
    _, frames = frames_of(tmp_path / "out.mp4")
    assert {frame.shape for frame in frames} == {(64, 96, 3)}


def test_a_pipe_takes_a_stream_of_the_wanted_size(camera, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    assert live("--live", camera, "-o", pipe, "--size", "192x128") == 0
    reader.join(timeout=20)
    (tmp_path / "stream.ts").write_bytes(received[0])
    _, frames = frames_of(tmp_path / "stream.ts")
    assert {frame.shape for frame in frames} == {(128, 192, 3)}
    assert len(sound_of(tmp_path / "stream.ts")) == len(sound_of(camera))


def test_a_slow_network_drops_frames_and_the_level_falls(camera, tmp_path, capsys, monkeypatch):
    long = tmp_path / "long.mp4"
    ffmpeg("-stream_loop", "2", "-i", camera, "-c", "copy", long)
    compute = kd.FrameSharpener.__call__

    def slow(sharpener, frame):
        time.sleep(0.25)  # two and a half frames
        return compute(sharpener, frame)

    monkeypatch.setattr(kd.FrameSharpener, "__call__", slow)
    monkeypatch.setattr(kd.Governor, "FRAMES_JUDGED", 3)
    assert live("--live", long, "-o", tmp_path / "out.mp4") == 0
    printed = capsys.readouterr().out
    levels = [line.split(": ")[1] for line in printed.splitlines() if line.startswith("from ")]
    assert levels == [str(level) for level in kd.live_levels("call-fast")[1:]]
    summary = printed.splitlines()[-1]
    dropped = int(summary.split(" dropped")[0].split()[-1])
    shown = len(frames_of(tmp_path / "out.mp4")[1])
    assert dropped >= 9
    assert dropped + shown == 60
    late = float(summary.split("(95 %: ")[1].split(")")[0])
    assert late < 1000  # no queue: a frame waits once to be sharpened, once to be shown
    assert len(sound_of(tmp_path / "out.mp4")) == len(sound_of(long))


def test_a_full_disk_is_told_at_the_end_too(camera, tmp_path):
    """All of a short file is written as it is closed."""

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))

    out = tmp_path / "out.mp4"
    out.write_bytes(b"an earlier one")
    command = [sys.executable, "-B", kd.__file__, "sharpen", "--checkpoint", "call-fast"]
    command += ["--live", str(camera), "-o", str(out), "--overwrite"]
    options = {"capture_output": True, "text": True, "preexec_fn": limit_files, "check": False}
    done = subprocess.run(command, **options)
    assert done.returncode == 2, done.stdout
    assert done.stderr == f"sharpen_kd: error: -o {out}: File too large\n"
    assert out.read_bytes() == b"an earlier one"
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_an_error_leaves_what_was_recorded_before(camera, tmp_path, capsys, monkeypatch):
    mux = kd.StreamSink.copy_sound
    shown = []

    def fail_at_the_eighth(sink):
        shown.append(sink)
        if len(shown) == 8:
            raise ValueError("no more")
        mux(sink)

    monkeypatch.setattr(kd.StreamSink, "copy_sound", fail_at_the_eighth)
    out = tmp_path / "out.mp4"
    assert live("--live", camera, "-o", out) == 2
    assert capsys.readouterr().err.endswith(f"sharpen_kd: error: -o {out}: no more\n")
    assert 5 <= len(frames_of(out)[0]) <= 8
    assert list(tmp_path.iterdir()) == [out]


def test_an_error_before_the_first_frame_keeps_the_older_file(camera, tmp_path, monkeypatch):
    def fail(sink):
        raise ValueError("no header")

    monkeypatch.setattr(kd.StreamSink, "copy_sound", fail)
    out = tmp_path / "out.mp4"
    out.write_bytes(b"an earlier one")
    assert live("--live", camera, "-o", out, "--overwrite") == 2
    assert out.read_bytes() == b"an earlier one"


def test_sound_that_stumbles_is_left_out(camera, tmp_path, monkeypatch):
    """A packet that comes twice, as from a camera that starts anew."""
    packets = kd.LiveSource.packets

    def twice(source):
        for packet in packets(source):
            yield packet
            if packet.stream is source.audio and packet.dts is not None:
                yield packet

    monkeypatch.setattr(kd.LiveSource, "packets", twice)
    assert live("--live", camera, "-o", tmp_path / "out.mp4") == 0
    assert sound_of(tmp_path / "out.mp4") == sound_of(camera)


def test_a_clock_that_begins_anew_goes_on(tmp_path):
    """Three times a second of pictures and one and a half of sound."""
    once = tmp_path / "once.ts"
    ffmpeg(
        *("-f", "lavfi", "-i", "testsrc2=size=96x64:rate=10:duration=1.2"),
        *("-f", "lavfi", "-i", "sine=440:duration=2"),
        *("-c:v", "libx264", "-g", "5", "-bf", "0", "-c:a", "aac", once),
    )
    source = tmp_path / "anew.ts"
    source.write_bytes(3 * once.read_bytes())
    made = tmp_path / "anew.mkv"
    assert live("--live", source, "-o", made) == 0
    times = frames_of(made)[0]
    steps = np.diff(times)
    begins = np.flatnonzero(steps > 0.5) + 1
    assert len(begins) == 2
    with av.open(str(made)) as container:
        sound = [float(frame.time) for frame in container.decode(audio=0)]
    assert sound[-1] == pytest.approx(3 * 2, abs=0.3)
    assert [times[place] for place in begins] == pytest.approx([2, 4], abs=0.3)


def test_a_camera_without_a_frame_as_yet_is_asked_again(camera):
    """As FFmpeg's for macOS answers."""
    source = kd.LiveSource(str(camera))
    demux = source.container.demux
    answers = [BlockingIOError(35, "Resource temporarily unavailable"), None]

    def not_at_once(streams):
        error = answers.pop(0)
        if error:
            raise error
        yield from demux(streams)

    source.container = types.SimpleNamespace(demux=not_at_once, close=source.container.close)
    with contextlib.closing(source):
        assert sum(packet.size > 0 for packet in source.packets()) == 20
    assert not answers


def test_a_raw_file_comes_at_its_own_rate(camera, tmp_path):
    """Its frames have no times."""
    raw = tmp_path / "raw.h264"
    ffmpeg("-i", camera, "-map", "0:v", "-c", "copy", "-bsf:v", "h264_mp4toannexb", raw)
    begin = time.perf_counter()
    assert live("--live", raw, "-o", tmp_path / "out.mp4", "--fps", "10") == 0
    assert time.perf_counter() - begin > 1.8
    times, _ = frames_of(tmp_path / "out.mp4")
    assert times[-1] == pytest.approx(1.9, abs=0.11)


def test_a_damaged_source_costs_a_line(camera, tmp_path, capsys):
    content = bytearray(camera.read_bytes())
    begin = content.index(b"mdat") + 4
    content[begin : begin + 20_000] = bytes(20_000)
    (tmp_path / "damaged.mp4").write_bytes(content)
    assert live("--live", tmp_path / "damaged.mp4", "-o", tmp_path / "out.mp4") == 2
    assert f"error: --live {tmp_path / 'damaged.mp4'}: " in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_whole_file(camera, tmp_path, number):
    command = [sys.executable, kd.__file__, "sharpen", "--checkpoint", "call-fast"]
    looped = tmp_path / "looped.mp4"
    ffmpeg("-stream_loop", "30", "-i", camera, "-c", "copy", looped)
    command += ["--live", str(looped), "-o", str(tmp_path / "out.mp4")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert "Ctrl-C ends it" in process.stdout.readline()
        time.sleep(2)
        process.send_signal(number)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0, printed
    assert "frames/s in" in printed
    assert len(frames_of(tmp_path / "out.mp4")[1]) > 0


# --- Other sinks ----------------------------------------------------------------------------------


def test_a_virtual_camera_gets_the_frames(camera, monkeypatch):
    sent = []

    class Camera:
        device = "/dev/video9"

        def __init__(self, width, height, fps, fmt):
            self.about = (width, height, fps, fmt)

        def send(self, pixels):
            sent.append((self.about, pixels.shape, pixels.dtype))

        def close(self):
            sent.append("closed")

    module = types.ModuleType("pyvirtualcam")
    module.Camera = Camera
    module.PixelFormat = types.SimpleNamespace(RGB="RGB")
    module.__spec__ = types.SimpleNamespace(name="pyvirtualcam")
    monkeypatch.setitem(sys.modules, "pyvirtualcam", module)
    assert live("--live", camera, "-o", "camera", "--size", "192x128") == 0
    assert sent[-1] == "closed"
    assert set(sent[:-1]) == {((192, 128, 10.0, "RGB"), (128, 192, 3), np.dtype(np.uint8))}


def test_mistakes_are_named_before_any_work(camera, tmp_path, capsys, monkeypatch):
    taken = tmp_path / "taken.mp4"
    taken.write_bytes(b"mine")
    folder = tmp_path / "none"
    still = ROOT / "inference_samples/blurred_face.png"
    monkeypatch.delenv("DISPLAY", raising=False)
    for arguments, named in (
        (["--live", camera], "name with -o where it goes"),
        (["--live", camera, "-o", taken], f"{taken}: exists; add --overwrite"),
        (["--live", camera, "-o", camera, "--overwrite"], f"{camera}: would be overwritten"),
        (["--live", camera, "-o", tmp_path], f"{tmp_path}: is a folder"),
        (["--live", camera, "-o", "a.webm"], "a.webm: its ending is none of .mp4"),
        (["--live", camera, "-o", "a.png"], "a.png: its ending is none of .mp4"),
        (["--live", camera, "-o", "a.mkv", "--lossless"], "--lossless: does not go with --live"),
        (["--live", camera, "-o", "a.mkv", "--skip-existing"], "--skip-existing: does not go with"),
        (["--live", folder, "-o", tmp_path / "out.mp4"], f"--live {folder}: cannot be opened"),
        (["--live", camera, camera, "-o", "window"], "--live: takes no other input"),
        (["--live", camera, "-o", "camera"], "pip install pyvirtualcam"),
        (["--live", camera, "-o", "window"], "-o window: no screen"),
        (["--live", camera, "-o", "out.mp4", "--live-format", "nonsense"], "see --live-format in"),
        (["--live", ":99", "-o", "out.mp4"], "`echo $DISPLAY` says"),
        (["--live", folder, "-o", "out.mp4"], "name a file, an address, or a camera"),
        (["--live", tmp_path, "-o", "out.mp4"], f"{tmp_path}: cannot be opened"),
        (["--live", "tcp://127.0.0.1:1", "-o", "out.mp4"], "check the address"),
        (["--live", "/dev/video77", "-o", "out.mp4"], "see `ffmpeg -sources v4l2`"),
        (["--live", still, "-o", "out.mp4"], f"{still}: a picture; `sharpen {still}`"),
        (["--live", "", "-o", "out.mp4"], "--live: name a camera, a screen"),
        ([], "name a picture, a clip or a folder to sharpen"),
    ):
        assert live(*arguments) == 2
        printed = capsys.readouterr().err
        assert named in printed
        assert printed.count("\n") == 1
    assert taken.read_bytes() == b"mine"
    assert sorted(tmp_path.iterdir()) == [taken]


def test_an_address_keeps_its_slashes():
    for path in (kd.named_path, PureWindowsPath):
        config = kd.SharpenConfig(live="x", output=path("udp://127.0.0.1:5000"))
        assert kd.sink_of(config) == "udp://127.0.0.1:5000"
    config = kd.SharpenConfig(live="x", output=PureWindowsPath("C:/calls/a.mp4"))
    assert kd.sink_of(config) == "C:/calls/a.mp4"


def test_a_clocks_rate_is_not_taken_for_the_frames(camera, tmp_path):
    screen = tmp_path / "screen.mp4"
    ffmpeg("-i", camera, "-vf", "setpts=N/1000/TB", "-r", "1000", "-an", screen)
    with contextlib.closing(kd.LiveSource(str(screen))) as source:
        assert source.video.average_rate == 1000
        assert source.rate == 25
    with contextlib.closing(kd.LiveSource(str(screen), rate=100)) as source:
        assert source.rate == 100


def test_a_stream_that_does_not_begin_is_given_up(monkeypatch):
    monkeypatch.setattr(kd, "LONGEST_WAIT", 0.5)
    named = "nothing came within 0.5 s.; check the address, and that something sends there"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(kd.UserError, match=named):
        kd.LiveSource(f"udp://127.0.0.1:{port}")


def test_ctrl_c_is_noticed_while_a_call_waits():
    gc.collect()  # an interrupt within another test's destructor would be lost
    timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
    timer.start()
    begun = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        kd.interruptible(lambda: begun.set() or time.sleep(20))
    assert begun.is_set()
    assert kd.interruptible(lambda: 5) == 5
    with pytest.raises(ValueError, match="x"):
        kd.interruptible(lambda: int("x"))


def test_devices_are_known_by_their_names(monkeypatch):
    opened = []

    def note(name, format=None, options=None, timeout=None):
        opened.append((name, format, options))
        raise OSError("there is none")

    monkeypatch.setattr(av, "open", note)
    for name in ("/dev/video7", ":0.0", "rtsp://127.0.0.1/call"):
        with pytest.raises(kd.UserError, match="cannot be opened"):
            kd.LiveSource(name, rate=15, size=(640, 360))
    with pytest.raises(kd.UserError, match="cannot be opened"):
        kd.LiveSource("0", "avfoundation")
    asked = {"framerate": "15", "video_size": "640x360"}
    assert opened == [
        ("/dev/video7", "v4l2", asked),
        (":0.0", "x11grab", asked),
        ("rtsp://127.0.0.1/call", None, {}),
        ("0", "avfoundation", {}),
    ]
