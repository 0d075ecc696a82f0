"""Pictures as people have them: transparent, deep, with damaged beginnings or ends."""

import io
import itertools
import re
import struct

import numpy as np
import pytest
from conftest import draw
from PIL import Image, PngImagePlugin

import baseline

DARK, LIGHT = (20, 40, 60), (250, 10, 90)


def saved(image, kind="PNG", **options):
    """Return the bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def read(tmp_path, content):
    """Return the pixels of a file of these bytes, as the program reads them."""
    (tmp_path / "picture").write_bytes(content)
    image = baseline.load_image(tmp_path / "picture")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refusal(tmp_path, content):
    """Return why a file of these bytes is refused."""
    with pytest.raises(baseline.ImageError) as stop:
        read(tmp_path, content)
    return str(stop.value)


def half_hidden(mode, hidden):
    """Return a picture whose left half is hidden, and holds the colour `hidden` there."""
    image = Image.new("RGBA", (20, 12), (200, 30, 90, 255))
    image.paste((*hidden, 0), (0, 0, 10, 12))
    if mode in ("P", "PA"):  # a palette of which one colour is hidden
        flat = Image.new("P", (20, 12), 1)
        flat.putpalette([*hidden, 200, 30, 90])
        flat.paste(0, (0, 0, 10, 12))
        if mode == "P":
            flat.info["transparency"] = 0
            return flat
        flat = flat.convert("PA")
        flat.putalpha(image.getchannel("A"))
        return flat
    if mode in ("L key", "RGB key"):  # one value that stands for nothing
        flat = image.convert(mode[:-4])
        flat.info["transparency"] = flat.getpixel((0, 0))
        return flat
    return image.convert(mode)


@pytest.mark.parametrize("mode, kind", [
    ("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"),
    ("PA", "TIFF"), ("L key", "PNG"), ("RGB key", "PNG")])
def test_what_is_transparent_is_white(tmp_path, mode, kind):
    """Two files that look alike are alike, whatever lies hidden in them; half hidden is blended."""
    options = {"lossless": True} if kind == "WEBP" else {}
    first, second = (read(tmp_path, saved(half_hidden(mode, hidden), kind, **options))
                     for hidden in (DARK, LIGHT))
    assert (first == second).all() and (first[:, :10] == 255).all()
    seen = np.array([200, 30, 90]) if mode[0] in "RP" else 87  # 0.299 R + 0.587 G + 0.114 B
    assert np.abs(first[:, 10:] - seen).max() <= 1
    half = Image.new("RGBA", (4, 4), (0, 100, 255, 128))
    assert np.abs(read(tmp_path, saved(half))[0, 0] - [127, 177, 255]).max() <= 1


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
DEEP = {  # values, mode and file kind, and the grey that they are
    "16 bits": (GREY.astype(np.uint16) * 257, "PNG", GREY),
    "16 bits tiff": (GREY.astype(np.uint16) * 257, "TIFF", GREY),
    "big-endian": (GREY.astype(">u2") * 257, "TIFF", GREY),
    "8 of 16 bits": (GREY.astype(np.uint16), "PNG", GREY),
    "32 bits": (GREY.astype(np.int32) * 257, "TIFF", GREY),
    "float to 1": (GREY.astype(np.float32) / 255, "TIFF", GREY),
    "float to 255": (GREY.astype(np.float32), "TIFF", GREY),
    "float to 65535": (GREY.astype(np.float32) * 257, "TIFF", GREY),
    "mask": ((GREY > 127).astype(np.int32), "TIFF", (GREY > 127) * 255),
    "black": (np.zeros((16, 16), np.uint16), "PNG", GREY * 0)}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_keeps_its_range(tmp_path, name):
    """White is the least of 1, 255 and 65535 that is not below the largest value."""
    values, kind, want = DEEP[name]
    got = read(tmp_path, saved(Image.fromarray(values), kind))
    assert np.abs(got - want[:, :, None]).max() <= (0 if kind == "PNG" else 1)


@pytest.mark.parametrize("value", [-1.0, 70_000.0, 2e9, float("nan"), float("inf")])
def test_a_range_that_nobody_knows_is_refused(tmp_path, value):
    """Negative, very large and missing values are no grey: the reason names the range."""
    values = np.full((4, 4), 0.5, np.float32)
    values[1, 1] = value
    assert "save it with 8 bits" in refusal(tmp_path, saved(Image.fromarray(values), "TIFF"))


def test_a_hidden_value_of_16_bits_is_white(tmp_path):
    """A deep grey PNG may say which value stands for nothing, too."""
    values = np.full((4, 4), 257, np.uint16)
    values[0] = 65535 - 257
    content = saved(Image.fromarray(values))
    chunk = b"tRNS" + struct.pack(">H", 257)
    chunk = struct.pack(">I", 2) + chunk + struct.pack(">I", PngImagePlugin._crc32(chunk))
    at = content.index(b"IDAT") - 4
    got = read(tmp_path, content[:at] + chunk + content[at:])
    assert (got[1:] == 255).all() and (got[0] == 254).all()


def bulky(kind, what, size):
    """Return a picture and its file with a profile or a text of so many bytes."""
    image = draw(np.random.default_rng(0), 40, 24)
    blob = np.random.default_rng(1).bytes(size)
    if what == "profile":
        return image, saved(image, kind, icc_profile=blob)
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", blob.decode("latin-1") if what == "text" else "a" * size,
                  zip=what == "packed")
    return image, saved(image, kind, pnginfo=info)


@pytest.mark.parametrize("kind, what, size", [
    ("PNG", "profile", 3_000_000), ("PNG", "text", 2_000_000), ("PNG", "packed", 90_000_000),
    ("JPEG", "profile", 1_500_000)])
def test_what_lies_beside_the_pixels_may_be_large(tmp_path, kind, what, size):
    """A profile or a workflow of any usual size is no reason to lose the picture."""
    image, content = bulky(kind, what, size)
    assert np.abs(read(tmp_path, content) - np.asarray(image, int)).max() <= 60 * (kind == "JPEG")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_turns_nothing(tmp_path, kind):
    """Whatever is in it: the picture is read, upright or turned as a whole, never lost."""
    image, exif = draw(np.random.default_rng(0), 40, 24), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    whole, rng = exif.tobytes(), np.random.default_rng(2)
    plain = read(tmp_path, saved(image, kind))
    turned = read(tmp_path, saved(image, kind, exif=whole))
    assert turned.shape == (40, 24, 3)
    head = whole[:6]
    bad = [head + b"nonsense", head + b"MM\x00*\xff\xff\xff\xff", whole[:20], whole[:-8]]
    bad += [head + bytes(np.where(rng.random(len(whole) - 6) < 0.1, rng.integers(
        0, 256, len(whole) - 6), np.frombuffer(whole[6:], np.uint8)).astype(np.uint8))
        for _ in range(60)]
    for exif in bad:
        got = read(tmp_path, saved(image, kind, exif=exif))
        assert got.shape in (plain.shape, turned.shape)
        assert got.shape != plain.shape or np.abs(got - plain).max() <= 255 and (
            (got == plain).all() or (got[::-1] == plain).all() or (got[:, ::-1] == plain).all()
            or (got[::-1, ::-1] == plain).all())


JPEGS = [dict(), dict(progressive=True), dict(restart_marker_blocks=4), dict(quality=98),
         dict(progressive=True, restart_marker_rows=1), dict(optimize=True, quality=30)]


@pytest.mark.parametrize("mode, options", [*itertools.product(["RGB", "L", "CMYK"], JPEGS)])
def test_a_jpeg_may_lack_its_end_marker_but_no_pixels(tmp_path, mode, options):
    """Without FF D9, the picture is the same; without a bit of its scans it is refused or equal."""
    content = saved(draw(np.random.default_rng(0), 97, 70).convert(mode), "JPEG", **options)
    want = read(tmp_path, content)
    for end in (content[:-2], content[:-1], content[:-2] + bytes(3000)):
        assert (read(tmp_path, end) == want).all()
    scans = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7\xc4\xda]", content)]
    cuts = {*scans[3:][-25:], *range(len(content) - 20, len(content) - 2), len(content) // 2}
    refused = 0
    for cut in cuts:
        for filled in (b"", bytes(len(content) - cut)):
            try:
                assert (read(tmp_path, content[:cut] + filled) == want).all()
            except baseline.ImageError:
                refused += 1
    assert refused > len(cuts) / 2
    assert "runcated" in refusal(tmp_path, content[:len(content) // 2])


@pytest.mark.parametrize("content, words", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
    (b"<!DOCTYPE html><html>404 Not Found", "<!DOCTYPE html>"), (b'{"error": "no"}', "error"),
    (b"", "begins with b''")])
def test_what_is_no_picture_is_named_for_what_it_is(tmp_path, content, words):
    """A Git LFS pointer says how to get the picture; of anything else the beginning is shown."""
    said = refusal(tmp_path, content)
    assert words in said and ("LFS" in said) is (b"git-lfs" in content)
