"""The `sharpen` command: names of outputs, modes, formats and metadata of pictures."""

import io
import os
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, features

import sharpen_kd as kd


@pytest.fixture
def run_sharpen(student_file, capsys):
    """`sharpen` with the small student; returns (exit status, standard error, standard output)."""

    def run(*arguments):
        command = ["sharpen", *map(str, arguments), "--checkpoint", str(student_file)]
        status = kd.main(command)
        printed = capsys.readouterr()
        return status, printed.err, printed.out

    return run


@pytest.fixture
def small(photographs):
    """A photograph of 40x30 pixels."""
    return photographs["astronaut"].resize((40, 30))


def names_in(folder):
    """The files below a folder, as sorted relative paths."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- Names of outputs -----------------------------------------------------------------------------


def test_the_result_lies_beside_the_input_in_its_format(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.jpg")
    status, error, output = run_sharpen(tmp_path / "a.jpg")
    assert (status, error) == (0, "")
    assert output == f"{tmp_path / 'a.jpg'} -> {tmp_path / 'a_sharpened.jpg'}\n"
    assert names_in(tmp_path) == ["a.jpg", "a_sharpened.jpg"]
    result = Image.open(tmp_path / "a_sharpened.jpg")
    assert (result.format, result.size) == ("JPEG", (40, 30))


def test_the_result_is_what_the_sharpener_makes(tmp_path, run_sharpen, small, student_file):
    small.save(tmp_path / "a.png")
    assert run_sharpen(tmp_path / "a.png", "--strength", "0.7")[0] == 0
    expected = kd.load_sharpener(student_file, strength=0.7)(np.array(small))
    assert np.array_equal(Image.open(tmp_path / "a_sharpened.png"), expected)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_precision_is_the_one_that_is_asked_for(
    tmp_path, run_sharpen, small, student_file, precision
):
    small.save(tmp_path / "a.png")
    command = (tmp_path / "a.png", "--precision", precision, "--device", "cpu")
    assert run_sharpen(*command)[0] == 0
    result = np.array(Image.open(tmp_path / "a_sharpened.png"))
    outputs = {
        name: kd.load_sharpener(student_file, precision=name)(np.array(small))
        for name in ("float32", "bf16")
    }
    assert np.array_equal(result, outputs[precision])
    assert not np.array_equal(outputs["float32"], outputs["bf16"])


def test_a_second_run_replaces_its_own_output(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.jpg")
    for given in (tmp_path / "a.jpg", tmp_path):  # the picture, and the folder that it is in
        (tmp_path / "a_sharpened.jpg").write_bytes(b"of a run before")
        assert run_sharpen(given)[0] == 0
        assert names_in(tmp_path) == ["a.jpg", "a_sharpened.jpg"]
        assert Image.open(tmp_path / "a_sharpened.jpg").size == (40, 30)


def test_outputs_that_meet_by_default_are_numbered_and_replaced(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.gif")
    small.save(tmp_path / "a.png")
    sheets = ["a_before_after.png", "a_before_after_2.png"]
    results = ["a_sharpened.png", "a_sharpened_2.png"]
    for _ in range(2):
        assert run_sharpen(tmp_path, "--before-after")[:2] == (0, "")
        assert names_in(tmp_path) == ["a.gif", "a.png", *sheets, *results]


def test_a_named_file_is_replaced_only_on_request(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.png")
    target = tmp_path / "b.png"
    target.write_bytes(b"of another program")
    status, error, _ = run_sharpen(tmp_path / "a.png", "-o", target)
    assert status == 2
    assert f"{target}: exists; --overwrite replaces it" in error
    assert target.read_bytes() == b"of another program"
    assert run_sharpen(tmp_path / "a.png", "-o", target, "--overwrite")[0] == 0
    assert Image.open(target).size == (40, 30)


def test_an_interrupted_folder_is_gone_on_with(tmp_path, run_sharpen, small):
    pictures, out = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    for name in ("a.png", "b.png"):
        small.save(pictures / name)
    assert run_sharpen(pictures, "-o", out)[0] == 0
    (out / "a.png").write_bytes(b"kept")
    (out / "b.png").unlink()
    assert run_sharpen(pictures, "-o", out)[0] == 2
    status, _, printed = run_sharpen(pictures, "-o", out, "--skip-existing")
    line = f"{pictures / 'b.png'} -> {out / 'b.png'}\n"
    assert (status, printed) == (0, f"1 of 2 results exist already\n{line}")
    assert (out / "a.png").read_bytes() == b"kept"
    assert Image.open(out / "b.png").size == (40, 30)
    _, _, printed = run_sharpen(pictures, "-o", out, "--skip-existing")
    assert printed == "2 of 2 results exist already\n"
    status, error, _ = run_sharpen(pictures, "-o", out, "--skip-existing", "--overwrite")
    assert status == 2
    assert "--overwrite, --skip-existing: name one of them" in error

    status, error, _ = run_sharpen(pictures, "-o", pictures, "--skip-existing")
    assert status == 2
    assert "a.png: would be overwritten" in error

    assert run_sharpen(pictures, "-o", out, "--overwrite", "--before-after")[0] == 0
    (out / "a.png").unlink()
    (out / "b_before_after.png").unlink()
    sheets = run_sharpen(pictures, "-o", out, "--before-after", "--skip-existing")
    assert (sheets[0], sheets[2].splitlines()[0]) == (0, "0 of 2 results exist already")
    assert names_in(out) == ["a.png", "a_before_after.png", "b.png", "b_before_after.png"]


def test_a_sheet_replaces_no_file_in_a_named_folder(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.png")
    sheet = tmp_path / "out/a_before_after.png"
    sheet.parent.mkdir()
    sheet.write_bytes(b"of another program")
    status, error, _ = run_sharpen(tmp_path / "a.png", "-o", tmp_path / "out", "--before-after")
    assert status == 2
    assert f"{sheet}: exists" in error
    assert names_in(tmp_path / "out") == ["a_before_after.png"]
    assert sheet.read_bytes() == b"of another program"


def test_pictures_of_one_name_and_several_formats_keep_theirs(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.jpg")
    small.save(tmp_path / "a.png")
    inputs = (tmp_path / "a.jpg", tmp_path / "a.png")
    assert run_sharpen(*inputs, "-o", tmp_path / "out", "--before-after")[0] == 0
    sheets = ["a_before_after.png", "a_before_after_2.png"]
    assert names_in(tmp_path / "out") == ["a.jpg", "a.png", *sheets]
    assert Image.open(tmp_path / "out/a.jpg").format == "JPEG"
    assert Image.open(tmp_path / "out/a.png").format == "PNG"


def test_pictures_of_one_name_are_numbered_in_a_folder(tmp_path, run_sharpen, photographs):
    for folder, name in (("x", "camera"), ("y", "coffee")):
        (tmp_path / folder).mkdir()
        photographs[name].resize((40, 30)).save(tmp_path / folder / "a.jpg")
    inputs = (tmp_path / "x/a.jpg", tmp_path / "y/a.jpg")
    assert run_sharpen(*inputs, "-o", tmp_path / "out", "--strength", "0")[0] == 0
    assert names_in(tmp_path / "out") == ["a.jpg", "a_2.jpg"]
    assert Image.open(tmp_path / "out/a.jpg").mode == "L"
    assert Image.open(tmp_path / "out/a_2.jpg").mode == "RGB"


def test_a_name_without_an_ending_is_a_folder_and_that_is_said(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.png")
    status, _, output = run_sharpen(tmp_path / "a.png", "-o", tmp_path / "noext")
    assert status == 0
    assert f"-o {tmp_path / 'noext'}: taken for a folder" in output
    assert names_in(tmp_path / "noext") == ["a.png"]


def test_a_name_with_dots_keeps_them(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.b.png")
    assert run_sharpen(tmp_path / "a.b.png")[0] == 0
    assert run_sharpen(tmp_path / "a.b.png", "-o", tmp_path / "out")[0] == 0
    assert names_in(tmp_path) == ["a.b.png", "a.b_sharpened.png", "out/a.b.png"]


def test_folders_keep_their_relative_paths(tmp_path, run_sharpen, sharp_folder):
    assert run_sharpen(sharp_folder, "-o", tmp_path / "out")[0] == 0
    assert names_in(tmp_path / "out") == names_in(sharp_folder)


def test_no_picture_that_is_read_is_written(tmp_path, run_sharpen, photographs):
    (tmp_path / "in/sub").mkdir(parents=True)
    photographs["astronaut"].resize((40, 30)).save(tmp_path / "in/a.png")
    photographs["camera"].resize((40, 30)).save(tmp_path / "in/sub/a.png")
    before = (tmp_path / "in/sub/a.png").read_bytes()
    inputs = (tmp_path / "in/a.png", tmp_path / "in/sub")
    status, error, _ = run_sharpen(*inputs, "-o", tmp_path / "in/sub", "--overwrite")
    assert status == 2
    assert f"{tmp_path}/in/sub/a.png: would be overwritten" in error
    assert (tmp_path / "in/sub/a.png").read_bytes() == before
    assert names_in(tmp_path) == ["in/a.png", "in/sub/a.png"]


def test_results_in_a_folder_of_the_input_are_not_sharpened_again(tmp_path, run_sharpen, small):
    for name in ("a.png", "b.png"):
        small.save(tmp_path / name)
    results = tmp_path / "results"
    assert run_sharpen(tmp_path, "-o", results)[0] == 0
    (results / "b.png").unlink()
    before = (results / "a.png").read_bytes()
    status, error, output = run_sharpen(tmp_path, "-o", results, "--skip-existing")
    assert (status, error) == (0, "")
    assert output.splitlines()[:2] == [
        f"1 files in {results}, which -o names, are not read",
        "1 of 2 results exist already",
    ]
    assert names_in(results) == ["a.png", "b.png"]
    assert (results / "a.png").read_bytes() == before


def test_a_sheet_is_not_written_over_an_input(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.png")
    small.save(tmp_path / "a_before_after.png")
    before = (tmp_path / "a_before_after.png").read_bytes()
    inputs = (tmp_path / "a.png", tmp_path / "a_before_after.png")
    status, error, _ = run_sharpen(*inputs, "--before-after")
    assert status == 2
    assert "a_before_after.png: would be overwritten" in error
    assert (tmp_path / "a_before_after.png").read_bytes() == before


def test_a_picture_that_is_named_twice_is_sharpened_once(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.png")
    inputs = (tmp_path / "a.png", tmp_path, tmp_path / "a.png")
    assert run_sharpen(*inputs, "-o", tmp_path / "out")[0] == 0
    assert names_in(tmp_path / "out") == ["a.png"]


def test_the_first_picture_of_a_file_is_sharpened_and_the_others_are_told(
    tmp_path, run_sharpen, small
):
    more = [small.rotate(90 * turns, expand=True).resize(small.size) for turns in (1, 2)]
    for name in ("a.webp", "b.tif", "c.gif"):
        small.save(tmp_path / name, save_all=True, append_images=more)
        status, _, output = run_sharpen(tmp_path / name)
        assert (status, output.count("(the first of 3 pictures in it)")) == (0, 1)
    small.save(tmp_path / "d.jpg", format="MPO", save_all=True, append_images=more)
    small.save(tmp_path / "e.png")
    cut = (tmp_path / "b.tif").read_bytes()
    (tmp_path / "f.tif").write_bytes(cut[: len(cut) // 2])  # in its second page
    for name in ("d.jpg", "e.png", "f.tif"):
        status, error, output = run_sharpen(tmp_path / name)
        assert (status, error, "the first of" in output) == (0, "", False)


def test_a_sheet_of_print_colours_shows_both_sides_by_their_profile(tmp_path, small, monkeypatch):
    print_colours = small.convert("CMYK")
    converted = small.rotate(180)

    def by_its_profile(image, kept):
        return converted if image.mode == "CMYK" else image

    monkeypatch.setattr(kd, "converted_to_srgb", by_its_profile)
    sheet = kd.before_and_after(print_colours, converted)
    left = sheet.crop((0, 0, sheet.width // 2 - 4, sheet.height))
    right = sheet.crop((sheet.width // 2 + 4, 0, sheet.width, sheet.height))
    assert np.array_equal(np.array(left), np.array(right))


def test_a_sheet_has_the_profile_of_its_halves(small):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    small.info["icc_profile"] = profile
    assert kd.before_and_after(small, small).info["icc_profile"] == profile


def test_where_capitals_do_not_matter_two_names_are_one(tmp_path, run_sharpen, small, monkeypatch):
    monkeypatch.setattr(kd, "CASE_MATTERS", False)  # as on Windows and macOS
    for name in ("x/A.png", "y/a.png"):
        (tmp_path / name).parent.mkdir()
        small.save(tmp_path / name)
    out = tmp_path / "out"
    assert run_sharpen(tmp_path / "x", tmp_path / "y", "-o", out)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["A.png", "a_2.png"]
    status, error, _ = run_sharpen(tmp_path / "y/a.png", "-o", tmp_path / "y/A.png", "--overwrite")
    assert status == 2
    assert "A.png: would be overwritten" in error


def test_a_sheet_shows_both_side_by_side_and_enlarged(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.png")
    status, _, output = run_sharpen(tmp_path / "a.png", "--before-after")
    assert status == 0
    assert f"before and after: {tmp_path / 'a_before_after.png'}" in output
    sheet = np.array(Image.open(tmp_path / "a_before_after.png"))
    result = np.array(Image.open(tmp_path / "a_sharpened.png"))
    assert sheet.shape == (12 * 30, 2 * 12 * 40 + 8, 3)  # 480 pixels wide each
    assert np.array_equal(sheet[::12, :480:12], np.array(small))
    assert np.array_equal(sheet[5::12, 488 + 5 :: 12], result)


# --- What a folder holds --------------------------------------------------------------------------


def test_what_a_folder_holds_beside_pictures_is_named_and_counted(
    tmp_path, run_sharpen, small, monkeypatch
):
    without_heif = {s: f for s, f in kd.picture_formats().items() if f != "HEIF"}
    monkeypatch.setattr(kd, "picture_formats", lambda: without_heif)
    small.save(tmp_path / "a.png")
    for name in ("b.heic", "c.svg", "d.pdf", "e.txt"):
        (tmp_path / name).write_bytes(b"no picture")
    status, error, output = run_sharpen(tmp_path, "-o", tmp_path / "out")
    assert (status, error) == (0, "")
    assert "1 sharpened; 4 skipped: " in output
    assert "b.heic (pip install pillow-heif); " in output
    assert "c.svg (export it as PNG first); " in output
    assert "d.pdf (export its pages as PNG first); " in output
    assert output.endswith("e.txt\n")
    assert names_in(tmp_path / "out") == ["a.png"]
    (tmp_path / "a.png").unlink()
    status, error, _ = run_sharpen(tmp_path, "-o", tmp_path / "out")
    assert status == 2
    assert "no pictures or clips in there, only b.heic (pip install pillow-heif); " in error


def test_hidden_files_are_left_out(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"what macOS writes beside a picture")
    status, error, output = run_sharpen(tmp_path, "-o", tmp_path / "out")
    assert (status, error) == (0, "")
    assert "skipped" not in output
    assert names_in(tmp_path / "out") == ["a.png"]


def test_a_folder_may_be_linked_and_hold_pictures_of_many_kinds(tmp_path, run_sharpen, small):
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.gif", "b.png", "c.jp2"):
        small.save(tmp_path / "elsewhere" / name)
    (tmp_path / "in/folder.png").mkdir(parents=True)  # a folder, whatever its name
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere")
    assert run_sharpen(tmp_path / "in", "-o", tmp_path / "out")[0] == 0
    assert names_in(tmp_path / "out") == ["linked/a.png", "linked/b.png", "linked/c.jp2"]
    formats = [Image.open(tmp_path / "out/linked" / n).format for n in ("a.png", "c.jp2")]
    assert formats == ["PNG", "JPEG2000"]


def test_a_gif_becomes_a_png(tmp_path, run_sharpen, small):
    small.save(tmp_path / "a.gif")
    assert run_sharpen(tmp_path / "a.gif")[0] == 0
    result = Image.open(tmp_path / "a_sharpened.png")
    assert (result.format, result.mode, result.size) == ("PNG", "RGB", (40, 30))


# --- Modes and metadata ---------------------------------------------------------------------------


def in_mode(image, mode):
    """The picture in any of Pillow's modes."""
    if mode == "I;16":
        return Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(np.array(image.convert("L")).astype(np.float32) / 255)
    if mode == "LAB":
        srgb = ImageCms.createProfile("sRGB")
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("1", "L"),
        ("L", "L"),
        ("I;16", "L"),
        ("F", "L"),
        ("LA", "LA"),
        ("P", "RGB"),
        ("RGB", "RGB"),
        ("RGBA", "RGBA"),
        ("CMYK", "RGB"),
        ("YCbCr", "RGB"),
        ("LAB", "RGB"),
    ],
)
def test_every_mode_is_sharpened(tmp_path, run_sharpen, small, mode, expected):
    image = in_mode(small, mode)
    packing = "tiff_lzw" if mode == "YCbCr" else None  # Pillow 12.3 cannot read it unpacked
    image.save(tmp_path / "in.tif", compression=packing)
    target = tmp_path / "out.png"
    assert run_sharpen(tmp_path / "in.tif", "-o", target, "--strength", "0")[:2] == (0, "")
    result = Image.open(target)
    assert result.mode == expected

    wanted = kd.frame_array(small if mode == "LAB" else image)
    tolerance = 6 if mode == "LAB" else 1
    assert np.abs(kd.frame_array(result).astype(int) - wanted).max() <= tolerance


def test_orientation_exif_profile_alpha_and_resolution_are_kept(tmp_path, run_sharpen, small):
    image = small.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((40, 30)))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees
    exif[0x010F] = "camera"
    exif[0x8769] = {0x829A: 0.25}  # camera settings: exposure time
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "in.png", exif=exif, icc_profile=profile, dpi=(300, 300))

    assert run_sharpen(tmp_path / "in.png", "-o", tmp_path / "out.png")[0] == 0
    result = Image.open(tmp_path / "out.png")
    assert (result.size, result.mode) == ((30, 40), "RGBA")
    turned = image.getchannel("A").rotate(-90, expand=True)
    assert np.array_equal(result.getchannel("A"), turned)
    assert result.getexif().get(0x010F) == "camera"
    assert result.getexif().get_ifd(0x8769) == {0x829A: 0.25}
    assert result.getexif().get(0x0112, 1) == 1
    assert result.info["icc_profile"] == profile
    assert result.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_what_exif_says_of_sizes_and_places_in_the_file_stays_true(tmp_path, run_sharpen, small):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    exif[0x8769] = {0xA002: 40, 0xA003: 30, 0xA005: 1234, 0x927C: b"offsets", 0x829A: 0.25}
    small.save(tmp_path / "in.jpg", exif=exif)
    assert run_sharpen(tmp_path / "in.jpg")[0] == 0
    result = Image.open(tmp_path / "in_sharpened.jpg")
    assert result.size == (30, 40)
    assert result.getexif().get_ifd(0x8769) == {0xA002: 30, 0xA003: 40, 0x829A: 0.25}


def png_chunks(path):
    """{name: data} of a PNG file's chunks that come once."""
    content = path.read_bytes()
    chunks = {}
    start = 8
    while start < len(content):
        length, name = struct.unpack_from(">I4s", content, start)
        chunks[name] = content[start + 8 : start + 8 + length]
        start += length + 12
    return chunks


@pytest.fixture
def told(tmp_path, small):
    """A PNG with colours, texts and EXIF."""
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", struct.pack(">I", 100000))
    info.add(b"cICP", bytes([9, 16, 0, 1]))
    info.add_text("Author", "someone")
    info.add_itxt("Titel", "Käse", lang="de")
    info.add_itxt("XML:com.adobe.xmp", "<x/>")
    exif = Image.Exif()
    exif[0x010F] = "camera"
    small.save(tmp_path / "in.png", pnginfo=info, exif=exif)
    return tmp_path / "in.png"


def test_a_pngs_colours_and_texts_are_kept(tmp_path, run_sharpen, told):
    assert run_sharpen(told)[0] == 0
    out = tmp_path / "in_sharpened.png"
    before, after = png_chunks(told), png_chunks(out)
    assert {n: after.get(n) for n in (b"gAMA", b"cICP")} == {
        n: before[n] for n in (b"gAMA", b"cICP")
    }
    texts = {"Author": "someone", "Titel": "Käse", "XML:com.adobe.xmp": "<x/>"}
    assert Image.open(out).text == texts
    assert Image.open(out).getexif()[0x010F] == "camera"


def test_without_metadata_colours_stay(tmp_path, run_sharpen, told):
    assert run_sharpen(told, "--no-metadata")[0] == 0
    out = tmp_path / "in_sharpened.png"
    assert png_chunks(out)[b"gAMA"] == png_chunks(told)[b"gAMA"]
    assert Image.open(out).text == {}
    assert dict(Image.open(out).getexif()) == {}
    assert b"someone" not in out.read_bytes()


def test_xmp_is_kept_from_png_to_webp(tmp_path, run_sharpen, told):
    assert run_sharpen(told, "-o", tmp_path / "out.webp")[0] == 0
    assert Image.open(tmp_path / "out.webp").info["xmp"] == b"<x/>"


def profile_with_red_and_green_exchanged():
    """sRGB's ICC profile, in which the tags of red and green have exchanged their names."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"xXYZ").replace(b"gXYZ", b"rXYZ").replace(b"xXYZ", b"gXYZ")


@pytest.mark.parametrize("ending", ["bmp", "tga", "ppm", "jp2"])
def test_where_no_profile_can_be_stored_colours_become_srgb(tmp_path, run_sharpen, ending):
    red = Image.new("RGB", (32, 32), (200, 20, 20))
    red.save(tmp_path / "in.png", icc_profile=profile_with_red_and_green_exchanged())
    out = tmp_path / f"out.{ending}"
    assert run_sharpen(tmp_path / "in.png", "-o", out, "--strength", "0")[0] == 0
    colour = np.array(Image.open(out)).mean((0, 1))
    assert colour == pytest.approx([20, 200, 20], abs=6)


def test_the_size_that_is_refused_can_be_chosen(tmp_path, run_sharpen):
    Image.new("L", (1100, 1000)).save(tmp_path / "in.png")
    status, error, _ = run_sharpen(tmp_path / "in.png", "--max-megapixels", "1")
    assert status == 2
    assert "in.png: Image size (1100000 pixels) exceeds limit of 1000000 pixels" in error
    assert "--max-megapixels" in error
    assert run_sharpen(tmp_path / "in.png", "--max-megapixels", "2")[0] == 0


def test_a_name_may_be_as_long_as_file_systems_allow(tmp_path, run_sharpen, small):
    long = "ä" * 125 + "a.png"
    assert len(os.fsencode(long)) == 255
    (tmp_path / "in").mkdir()
    small.save(tmp_path / "in" / long)
    small.save(tmp_path / "in" / long.replace("a.png", "b.png"))
    assert run_sharpen(tmp_path / "in", "-o", tmp_path / "out")[0] == 0
    assert len(names_in(tmp_path / "out")) == 2
    assert run_sharpen(tmp_path / "in")[0] == 0
    assert len([name for name in names_in(tmp_path / "in") if "_sharpened" in name]) == 2


def test_a_name_that_the_screen_cannot_show_is_escaped(tmp_path, student_file, small, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(kd.sys, "stdout", screen)
    small.save(tmp_path / "写真.png")
    command = ["sharpen", str(tmp_path / "写真.png"), "--checkpoint", str(student_file)]
    assert kd.main(command) == 0
    screen.flush()
    assert b"\\u5199\\u771f_sharpened.png" in screen.buffer.getvalue()
    assert (tmp_path / "写真_sharpened.png").exists()


TURNED = b'<x:xmpmeta xmlns:tiff="t" tiff:Orientation="6" tiff:Make="camera"/>'


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_xmp_does_not_turn_the_upright_picture_again(tmp_path, run_sharpen, small, ending):
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", TURNED.decode())
    small.save(tmp_path / "in.png", exif=exif, pnginfo=info)
    out = tmp_path / f"out.{ending}"
    assert run_sharpen(tmp_path / "in.png", "-o", out)[0] == 0
    assert kd.open_picture(out).size == (30, 40)
    with Image.open(out) as result:
        result.load()
        xmp = result.info.get("xmp") or result.info["XML:com.adobe.xmp"].encode()
    assert b"Orientation" not in xmp
    assert b'tiff:Make="camera"' in xmp


def test_xmp_that_a_jpeg_cannot_hold_is_left_out_and_said(tmp_path, run_sharpen, small):
    small.save(tmp_path / "in.webp", xmp=b"<x>" + bytes(70_000) + b"</x>")
    status, _, output = run_sharpen(tmp_path / "in.webp", "-o", tmp_path / "out.jpg")
    assert status == 0
    assert "out.jpg: a JPEG cannot hold XMP of that length" in output
    assert Image.open(tmp_path / "out.jpg").size == (40, 30)


def test_a_tiff_keeps_camera_settings_and_place(tmp_path, run_sharpen, small):
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.DateTimeOriginal: "2020:01:01 00:00:00"}
    exif[ExifTags.IFD.GPSInfo] = {ExifTags.GPS.GPSLatitudeRef: "N"}
    small.save(tmp_path / "in.jpg", exif=exif)
    assert run_sharpen(tmp_path / "in.jpg", "-o", tmp_path / "out.tif")[0] == 0
    with Image.open(tmp_path / "out.tif") as made:
        kept = made.getexif()
        settings = kept.get_ifd(ExifTags.IFD.Exif)
        assert settings[ExifTags.Base.DateTimeOriginal] == "2020:01:01 00:00:00"
        assert kept.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] == "N"


def test_exif_that_a_jpeg_cannot_hold_is_left_out_and_said(tmp_path, run_sharpen, small):
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "x" * 70_000
    small.save(tmp_path / "in.png", exif=exif)
    status, _, output = run_sharpen(tmp_path / "in.png", "-o", tmp_path / "out.jpg")
    assert status == 0
    assert "out.jpg: a JPEG cannot hold EXIF of that length" in output
    assert not Image.open(tmp_path / "out.jpg").getexif()


def test_two_long_names_that_begin_alike_have_results_of_their_own(tmp_path, run_sharpen):
    colours = {"1": (200, 0, 0), "2": (0, 0, 200)}
    for number, colour in colours.items():
        path = tmp_path / f"{'a' * 248}{number}.png"
        Image.new("RGB", (32, 32), colour).save(path)
        assert run_sharpen(path, "--strength", "0")[0] == 0
    results = sorted(tmp_path.glob("*_sharpened.png"))
    found = {Image.open(path).getpixel((5, 5)) for path in results}
    assert found == set(colours.values())
    before = names_in(tmp_path)
    assert run_sharpen(tmp_path)[0] == 0  # takes no result of before for a picture
    assert names_in(tmp_path) == before


def test_a_converted_profile_leaves_resolution_and_comparison_as_they_are(tmp_path, run_sharpen):
    red = Image.new("RGB", (32, 32), (200, 20, 20))
    profile = profile_with_red_and_green_exchanged()
    red.save(tmp_path / "in.png", icc_profile=profile, dpi=(300, 300))
    out = tmp_path / "out.bmp"
    assert run_sharpen(tmp_path / "in.png", "-o", out, "--strength", "0", "--before-after")[0] == 0
    assert Image.open(out).info["dpi"] == pytest.approx((300, 300), abs=0.1)
    sheet = np.array(Image.open(tmp_path / "out_before_after.png"))
    assert np.array_equal(sheet[:, :100], sheet[:, -100:])


def test_a_folder_that_cannot_be_read_does_not_stop_the_others(
    tmp_path, run_sharpen, small, monkeypatch
):
    (tmp_path / "in/closed").mkdir(parents=True)
    small.save(tmp_path / "in/a.png")
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    status, _, output = run_sharpen(tmp_path / "in", "-o", tmp_path / "out")
    assert status == 0
    assert "1 sharpened; 1 skipped: closed" in output
    with pytest.raises(kd.UserError, match="closed: cannot be read"):
        kd.list_files(tmp_path / "in")


def test_links_to_nowhere_are_named_and_the_rest_is_done(tmp_path, run_sharpen, small):
    (tmp_path / "in").mkdir()
    small.save(tmp_path / "in/a.png")
    (tmp_path / "in/gone.png").symlink_to("nowhere.png")
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    status, error, _ = run_sharpen(tmp_path / "in", "-o", tmp_path / "out")
    assert status == 2
    assert "2 not sharpened" in error
    assert "gone.png: not a readable picture" in error
    assert "loop.png: not a readable picture" in error
    assert names_in(tmp_path / "out") == ["a.png"]
    status, error, _ = run_sharpen(tmp_path / "in/a.png", "-o", tmp_path / "in/loop.png")
    assert status == 2
    assert "loop.png: exists; --overwrite replaces it" in error


def test_of_a_tiffs_tags_those_about_the_picture_are_kept(tmp_path, run_sharpen, small):
    exif = Image.Exif()
    exif[0x010F] = "camera"
    exif[0x0112] = 6
    small.save(tmp_path / "in.tif", exif=exif)
    assert run_sharpen(tmp_path / "in.tif", "-o", tmp_path / "out.png")[0] == 0
    result = Image.open(tmp_path / "out.png")
    assert dict(result.getexif()) == {0x010F: "camera"}
    assert result.size == (30, 40)


def test_an_exif_that_names_another_size_does_not_reach_a_tiff(tmp_path, run_sharpen, small):
    exif = Image.Exif()
    exif[0x0100] = 4000  # ImageWidth
    exif[0x0101] = 3000  # ImageLength
    exif[0x0111] = 8  # StripOffsets
    exif[0x010F] = "camera"
    small.save(tmp_path / "in.jpg", exif=exif)
    status, error, _ = run_sharpen(tmp_path / "in.jpg", "-o", tmp_path / "out.tif")
    assert (status, error) == (0, "")
    result = Image.open(tmp_path / "out.tif")
    result.load()
    assert result.size == (40, 30)
    assert result.getexif()[0x010F] == "camera"


@pytest.mark.parametrize("ending", [".jpg", ".png", ".tif", ".webp"])
def test_an_empty_gps_group_is_left_out(tmp_path, run_sharpen, small, ending):
    exif = Image.Exif()
    exif[0x010F] = "camera"
    exif[0x8825] = {}
    small.save(tmp_path / "in.jpg", exif=exif)
    assert 0x8825 in Image.open(tmp_path / "in.jpg").getexif()
    status, error, _ = run_sharpen(tmp_path / "in.jpg", "-o", tmp_path / f"out{ending}")
    assert (status, error) == (0, "")
    result = Image.open(tmp_path / f"out{ending}")
    result.load()
    assert result.size == (40, 30)
    assert result.getexif()[0x010F] == "camera"
    assert 0x8825 not in result.getexif()


@pytest.mark.parametrize(("ending", "at_least"), [(".jpg", 39), (".avif", 42), (".webp", 35)])
def test_compression_costs_little(tmp_path, run_sharpen, photographs, ending, at_least):
    """Pillow's defaults give 29.9, 33.5 and 32.6 dB; WebP always halves the colours."""
    if ending == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    coloured = photographs["astronaut"].resize((160, 120))
    coloured.save(tmp_path / "in.png")
    target = tmp_path / f"out{ending}"
    assert run_sharpen(tmp_path / "in.png", "-o", target, "--strength", "0")[0] == 0
    assert kd.frame_psnr(np.array(Image.open(target)), np.array(coloured)) > at_least


def test_a_tiff_is_packed(tmp_path, run_sharpen, small):
    small.save(tmp_path / "in.png")
    assert run_sharpen(tmp_path / "in.png", "-o", tmp_path / "out.tif")[0] == 0
    assert Image.open(tmp_path / "out.tif").info["compression"] == "tiff_lzw"


def test_damaged_metadata_costs_no_picture(tmp_path, run_sharpen, small):
    small.save(tmp_path / "exif.jpg", exif=b"Exif\0\0garbage!")
    small.convert("CMYK").save(tmp_path / "profile.jpg", icc_profile=b"garbage")
    small.save(tmp_path / "size.tif", dpi=(0, 0))
    for name in ("exif.jpg", "profile.jpg", "size.tif"):
        target = tmp_path / f"{name}.png"
        status, error, _ = run_sharpen(tmp_path / name, "-o", target, "--strength", "0")
        assert (status, error) == (0, "")
        expected = kd.frame_array(kd.open_picture(tmp_path / name))
        assert np.array_equal(kd.frame_array(Image.open(target)), expected)


def test_a_profile_that_does_not_describe_rgb_is_replaced(tmp_path, run_sharpen, small):
    small.convert("CMYK").save(tmp_path / "in.jpg")
    assert run_sharpen(tmp_path / "in.jpg", "-o", tmp_path / "out.png")[0] == 0
    assert "icc_profile" not in Image.open(tmp_path / "out.png").info

    in_mode(small, "LAB").save(tmp_path / "in.tif")
    assert run_sharpen(tmp_path / "in.tif", "-o", tmp_path / "lab.png")[0] == 0
    profile = io.BytesIO(Image.open(tmp_path / "lab.png").info["icc_profile"])
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(profile))


def test_sixteen_bits_and_a_transparent_grey(tmp_path, run_sharpen):
    values = np.linspace(0, 65535, 1024).astype(np.uint16).reshape(16, 64)
    transparent = int(values[0, 0])
    Image.fromarray(values).save(tmp_path / "in.png", transparency=transparent)
    target = tmp_path / "out.png"
    assert run_sharpen(tmp_path / "in.png", "-o", target, "--strength", "0")[:2] == (0, "")
    result = Image.open(target)
    assert np.array_equal(np.array(result.getchannel("L")), np.rint(values / 257))
    assert np.array_equal(np.array(result.getchannel("A")) == 0, values == 0)


# --- Mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_named_and_nothing_is_written(tmp_path, run_sharpen, small):
    picture = tmp_path / "a.png"
    small.convert("LA").save(picture)
    broken = tmp_path / "a.jpg"
    broken.write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"no clip")
    before = sorted(tmp_path.iterdir())
    mistakes = {
        (tmp_path / "none.png",): "none.png: no such file or folder",
        (tmp_path / "empty",): "empty: no pictures or clips in there",
        (broken, "-o", tmp_path / "b.png"): "a.jpg: not a readable picture",
        (picture, "-o", picture): "a.png: would be overwritten",
        (picture, broken, "-o", tmp_path / "b.png"): "a file can take one input only",
        (tmp_path, "-o", tmp_path / "b.png"): "a file can take one input only",
        (tmp_path, "-o", tmp_path / "b.mp4"): "b.mp4: a file can take one input only",
        (picture, "-o", tmp_path / "b.avi"): "cannot write the file type .avi",
        (picture, "--size", "640x480"): "--size: enlarges clips, and these are pictures",
        (tmp_path / "a.mp4", "--before-after"): "--before-after: compares pictures",
        (picture, "-o", tmp_path / "a.psd"): "cannot write the file type .psd",
        (picture, "-o", tmp_path / "b.jpg"): "b.jpg: cannot be written",
        (picture, "--tile", "64", "--overlap", "64"): "--tile 64 --overlap 64",
        (picture, "--tile", "-1"): "--tile: -1 must be at least 0",
        (picture, "--strength", "nan"): "--strength: nan must be at least 0",
        (picture, "--strength", "inf"): "--strength: inf must be at most 100",
        (picture, "--strength", "much"): "--strength: much is not a number",
    }
    for arguments, named in mistakes.items():
        status, error, _ = run_sharpen(*arguments)
        assert status == 2
        assert named in error
        assert error.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before


def test_debug_shows_where_an_error_came_from(tmp_path):
    with pytest.raises(kd.UserError, match="no such file"):
        kd.main(["sharpen", str(tmp_path / "none.png"), "--debug"])
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(kd.UserError, match="1 not sharpened") as caught:
        kd.main(["sharpen", str(tmp_path / "a.png"), "--debug"])
    assert "a.png: not a readable picture" in str(caught.value.__cause__)


def test_an_interruption_says_how_to_go_on(tmp_path, run_sharpen, small, monkeypatch):
    pictures = tmp_path / "in"
    pictures.mkdir()
    for name in ("a.png", "b.png"):
        small.save(pictures / name)
    sharpen_file = kd.sharpen_file

    def interrupted(config, job, sharpener):
        if job.source.stem == "b":
            raise KeyboardInterrupt
        sharpen_file(config, job, sharpener)

    monkeypatch.setattr(kd, "sharpen_file", interrupted)
    hint = "; the same with --skip-existing does the others"
    # Beside the inputs, and with --overwrite, results of an earlier run would be taken for new.
    cases = {(): "", ("-o", tmp_path / "out"): hint, ("-o", tmp_path / "out", "--overwrite"): ""}
    for flags, remedy in cases.items():
        status, _, output = run_sharpen(pictures, *flags)
        assert status == 130
        assert output.splitlines()[-1] == f"1 of 2 done{remedy}"


def test_a_broken_picture_does_not_stop_the_others(tmp_path, run_sharpen, photographs):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"no picture")
    grey = photographs["camera"].resize((20, 20))
    grey.save(tmp_path / "in/b.png")
    grey.convert("F").save(tmp_path / "in/aa.tif")  # floats above 1
    status, error, _ = run_sharpen(tmp_path / "in", "-o", tmp_path / "out")
    assert status == 2
    assert "2 not sharpened" in error
    assert "a.png: not a readable picture" in error
    assert "aa.tif: not a readable picture (pixels must be" in error
    assert names_in(tmp_path / "out") == ["b.png"]


def test_a_network_that_fails_is_told_with_the_picture(tmp_path, run_sharpen, small, monkeypatch):
    small.save(tmp_path / "a.png")

    def out_of_memory(sharpener, frame):
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(kd.FrameSharpener, "__call__", out_of_memory)
    status, error, _ = run_sharpen(tmp_path / "a.png")
    assert status == 2
    assert f"1 not sharpened: {tmp_path / 'a.png'}: not enough memory" in error
