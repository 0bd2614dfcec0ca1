"""What must hold for every input of a kind; Hypothesis looks for one for which it does not."""

import contextlib
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sharpen_kd as kd

# The same examples in each run, so that a test that passes here passes elsewhere.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def sharpener_of(engine, alignment, tile, overlap):
    """A FrameSharpener whose network is a function of frames."""
    student = kd.PlainStack()
    sharpener = kd.FrameSharpener(student, tile=0)
    sharpener.engine = engine
    sharpener.spans = lambda length, phase: kd.cut_side(
        length, phase, tile=tile, overlap=overlap, alignment=alignment
    )
    return sharpener


@settings(max_examples=300)
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    tile=st.integers(0, 90),
    alignment=st.sampled_from([2, 4, 16, 32]),
    data=st.data(),
)
def test_tiles_of_a_network_that_changes_nothing_are_the_frame(
    height, width, tile, alignment, data
):
    overlap = data.draw(st.integers(0, max(tile - 1, 0)), label="overlap")
    frame = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    sides = []

    def identity(tiles):
        sides.append(tiles.shape[1:3])
        return tiles

    sharpener = sharpener_of(identity, alignment, tile, overlap)
    assert np.array_equal(sharpener(frame), frame)
    assert all(side % alignment == 0 for shape in sides for side in shape)


NAMES = st.text("abcdefghij0123456789-", min_size=1, max_size=8)


@settings(max_examples=40)
@given(
    keys=st.sets(st.tuples(NAMES, NAMES), min_size=1, max_size=5),
    with_suffix=st.booleans(),
    endings=st.sampled_from([(".png", ".png"), (".bmp", ".png")]),
)
def test_what_lies_beside_each_other_is_paired(keys, with_suffix, endings):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for category, stem in keys:
            for side, suffix, ending in zip(
                ("blurred", "sharp"), ("_blur", "_sharp"), endings, strict=True
            ):
                file = folder / side / category / f"{stem}{suffix if with_suffix else ''}{ending}"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8)).save(file)
        pairs = kd.find_pairs(folder)
    assert {pair.key for pair in pairs} == {f"{category}/{stem}" for category, stem in keys}
    assert all("blurred" in pair.blurred.parts and "sharp" in pair.sharp.parts for pair in pairs)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.tuples(st.integers(8, 40), st.integers(8, 40)), min_size=1, max_size=4),
    scale=st.sampled_from(["1", "1.3", "2", "3", "64"]),
)
def test_prepared_pairs_are_the_pictures_at_even_sizes(sizes, scale):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        for number, size in enumerate(sizes):
            pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"in/{number}.png")
        command = ["prepare", str(folder / "in"), "--data-root", str(folder / "out")]
        assert kd.main([*command, "--scale", scale]) == 0
        pairs = kd.find_pairs(folder / "out/train")
        assert len(pairs) == len(sizes)
        for pair in pairs:
            blurred, sharp = pair.load()
            height, width = sizes[int(pair.key)]
            assert blurred.shape == sharp.shape == (height // 2 * 2, width // 2 * 2, 3)
            pixels = np.random.default_rng(int(pair.key)).integers(
                0, 256, (height, width, 3), np.uint8
            )
            assert np.array_equal(sharp, pixels[: len(sharp), : sharp.shape[1]])


FLAGS = [
    kd.flag_of(item) for config in kd.CONFIGS.values() for item in kd.dataclasses.fields(config)
]
WORDS = st.one_of(
    st.sampled_from(sorted(set(FLAGS))),
    st.sampled_from(
        ["x2", "call", "0", "1", "-1", "1e999", "nan", "", "--", "-o", "@a", "--no-cache"]
    ),
    st.text(max_size=5),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(max_examples=200)
@given(command=st.sampled_from([*kd.CONFIGS, "nothing"]), words=st.lists(WORDS, max_size=6))
def test_whatever_is_typed_is_understood_or_refused(command, words):
    # -h and --version end the process.
    with contextlib.suppress(kd.UserError, SystemExit):
        given = kd.parse_command_line([command, *words])
        given.pop("debug")
        config_class = kd.CONFIGS[given.pop("command")]
        assert isinstance(kd.resolve_config(config_class, given), config_class)


OPTIONS = st.fixed_dictionaries(
    {
        "protocol": st.sampled_from([("x2",), ("x2", "x2"), ("x3",), ("mixed",)]),
        "crops": st.sampled_from([12, 24, 36]),
        "crop_size": st.sampled_from([16, 32]),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=60)
@given(first=OPTIONS, second=OPTIONS, other_picture=st.booleans())
def test_crops_have_one_key_for_the_same_options_and_pictures(first, second, other_picture):
    with tempfile.TemporaryDirectory() as name:
        keys = []
        for options, color in ((first, 0), (second, 200 if other_picture else 0)):
            Image.new("RGB", (32, 32), (color, 0, 0)).save(Path(name, "a.png"))
            config = kd.PrepareConfig(sharp_dir=Path(name), **options)
            keys.append(kd.Streams(config).key())
    assert (keys[0] == keys[1]) == (first == second and not other_picture)
