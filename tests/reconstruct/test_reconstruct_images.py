"""Images of every kind, prepared as VGGT's loader prepares them."""

from __future__ import annotations

import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from moe3d.reconstruct import images as module
from moe3d.reconstruct import load_images, prepare_image, read_image


def _photo(height, width, seed=0):
    """Smooth colours with some noise: what resampling filters disagree about, without being noise alone."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y), np.sin(12 * x * y)], axis=-1)
    return np.clip(127 + 90 * waves + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)


def _save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.real_vggt
@pytest.mark.parametrize(
    "sizes", [[(500, 741)], [(480, 640)] * 2, [(700, 300)], [(300, 518)], [(378, 504), (600, 400)]]
)
def test_equal_to_vggts_own_loader(vggt_loader, tmp_path, sizes):
    paths = [_save(tmp_path / f"{i}.png", _photo(*size, seed=i)) for i, size in enumerate(sizes)]
    torch.testing.assert_close(load_images(paths).images, vggt_loader([str(p) for p in paths]), rtol=0, atol=0)


@pytest.mark.real_vggt
def test_transparency_is_white_as_in_vggts_own_loader(vggt_loader, tmp_path):
    rgba = np.dstack([_photo(60, 80), np.tile(np.linspace(0, 255, 80).astype(np.uint8), (60, 1))])
    path = _save(tmp_path / "a.png", rgba)
    torch.testing.assert_close(load_images([path]).images, vggt_loader([str(path)]), rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 120), st.integers(2, 120), st.sampled_from([14, 56, 98]))
def test_every_size_becomes_multiples_of_the_patch_with_its_shape_kept(height, width, target):
    assume(max(height, width) <= 10 * min(height, width))
    image = prepare_image(Image.fromarray(_photo(height, width)), target)
    _, new_height, new_width = image.shape
    assert new_width == target and new_height % 14 == 0 and 14 <= new_height <= target
    assert image.dtype == torch.float32 and 0 <= image.min() and image.max() <= 1
    whole = height * target / width
    assert abs(new_height - min(max(whole, 14), target)) <= 7 + 1e-6


def test_an_image_that_fits_is_untouched():
    photo = _photo(70, 98)
    image = prepare_image(Image.fromarray(photo), 98)
    assert torch.equal(image, torch.from_numpy(photo).permute(2, 0, 1) / 255)


def test_a_tall_image_is_cropped_to_its_middle():
    photo = np.zeros((280, 70, 3), np.uint8)
    photo[105:175] = 200  # the middle 70 rows
    assert torch.equal(prepare_image(Image.fromarray(photo), 70), torch.full((3, 70, 70), 200 / 255))


@pytest.mark.parametrize("size", [(1, 1), (10, 101), (101, 10)])
def test_a_pixel_and_a_strip_are_refused(size):
    with pytest.raises(ValueError, match=f"side ratio of at most 10:1, got {size[0]}x{size[1]}"):
        prepare_image(Image.fromarray(_photo(*size)))


@pytest.mark.parametrize("width", [0, -14, 13, 500])
def test_a_width_that_is_no_multiple_of_the_patch_is_refused(width):
    with pytest.raises(ValueError, match=f"width must be a positive multiple of 14, got {width}"):
        prepare_image(Image.fromarray(_photo(20, 20)), width)


def test_grey_and_palette_become_rgb(tmp_path):
    photo = _photo(20, 30)
    grey = read_image(_save(tmp_path / "grey.png", photo[..., 0]))
    assert grey.mode == "RGB" and np.array_equal(np.asarray(grey), np.repeat(photo[..., :1], 3, axis=2))
    palette = Image.fromarray(photo).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "palette.png")), np.asarray(palette.convert("RGB")))


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 128, 257, 256 * 100, 257 * 100, 65535]], dtype=np.uint16).repeat(2, axis=0)
    read = np.asarray(read_image(_save(tmp_path / "deep.png", levels)))
    assert np.array_equal(read[0, :, 0], np.round(levels[0] / 65535 * 255))


def test_floating_point_pixels_are_scaled_or_refused(tmp_path):
    levels = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif"))[..., 0].ravel(), np.arange(256))
    Image.fromarray(2 * levels).save(tmp_path / "b.tif")
    with pytest.raises(ValueError, match=r"b\.tif .*floating-point pixels must be from 0 to 1, got 0 to 2"):
        read_image(tmp_path / "b.tif")


def test_heif_is_read_upright(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif")
    picture = Image.new("RGB", (64, 32), (200, 30, 30))
    pillow_heif.from_pillow(picture).save(tmp_path / "IMG_1.HEIC", quality=95)
    read = read_image(tmp_path / "IMG_1.HEIC")
    assert read.size == (64, 32)
    assert np.abs(np.asarray(read).astype(int) - (200, 30, 30)).max() < 8


def test_heif_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").touch()
    with pytest.raises(RuntimeError, match=r"a\.heic needs pillow-heif to be read: pip install 'moe3d\[heif\]'"):
        read_image(tmp_path / "a.heic")


def test_transparent_pixels_are_white_in_palette_and_grey_images_too(tmp_path):
    grey = np.dstack([np.full((4, 4), 90, np.uint8), np.zeros((4, 4), np.uint8)])
    Image.fromarray(grey, "LA").save(tmp_path / "la.png")
    indexed = Image.fromarray(np.zeros((4, 4), np.uint8), "P")
    indexed.putpalette([10, 20, 30])
    indexed.save(tmp_path / "p.png", transparency=0)
    for name in ("la.png", "p.png"):
        assert np.asarray(read_image(tmp_path / name)).min() == 255


def test_exif_rotation_is_applied(tmp_path):
    photo = _photo(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to see it upright
    Image.fromarray(photo).save(tmp_path / "r.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "r.png")), np.rot90(photo, -1))


def test_truncated_and_foreign_files_are_named(tmp_path):
    _save(tmp_path / "whole.jpg", _photo(200, 200))
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.png").write_text("this is no image")
    with pytest.raises(ValueError, match=r"half\.jpg is a damaged image"):
        read_image(tmp_path / "half.jpg")
    with pytest.raises(ValueError, match=r"text\.png is not an image"):
        read_image(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match=r"absent\.png"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)


def test_too_many_pixels_are_refused_and_pillows_own_limit_stays(tmp_path, monkeypatch):
    path = _save(tmp_path / "a.png", _photo(30, 40))
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(module, "MAX_PIXELS", 1198)
    with pytest.raises(ValueError, match=r"a\.png has more than"):
        read_image(path)
    monkeypatch.setattr(module, "MAX_PIXELS", 1200)
    assert read_image(path).size == (40, 30)
    assert Image.MAX_IMAGE_PIXELS == before


def _png_header(path, height, width):
    """The beginning of a PNG file that claims a size and holds no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I4s", 1000, b"IDAT"))
    return path


def test_the_limit_is_200_megapixels_and_is_checked_before_decoding(tmp_path):
    with pytest.raises(ValueError, match=r"b\.png has more than 200 megapixels"):
        read_image(_png_header(tmp_path / "b.png", 20_000, 10_001))
    with pytest.raises(ValueError, match=r"a\.png is a damaged image"):
        read_image(_png_header(tmp_path / "a.png", 20_000, 10_000))


def test_sizes_that_differ_are_padded_with_white_and_said(tmp_path):
    wide = _save(tmp_path / "wide.png", np.zeros((42, 84, 3), np.uint8))
    high = _save(tmp_path / "high.png", np.zeros((84, 84, 3), np.uint8))
    images, notes, placements, _ = load_images([wide, high, wide], width=84)
    assert images.shape == (3, 3, 84, 84)
    assert torch.equal(images[0, :, 21:63], torch.zeros(3, 42, 84))
    assert images[0, :, :21].eq(1).all() and images[0, :, 63:].eq(1).all() and images[1].eq(0).all()
    assert notes == ["sizes differ: padded with white to 84x84"]
    assert [(place.top, place.rows(84)) for place in placements[:2]] == [(21, slice(21, 63)), (0, slice(0, 84))]


def test_resizing_is_said_once_per_size(tmp_path):
    paths = [_save(tmp_path / f"{i}.png", _photo(50, 75)) for i in range(2)]
    assert load_images(paths, width=84).notes == ["50x75 resized to 56x84, multiples of 14, as VGGT's loader does"]


def test_the_image_at_fault_is_named(tmp_path):
    good, strip = _save(tmp_path / "good.png", _photo(20, 20)), _save(tmp_path / "strip.png", _photo(2, 50))
    with pytest.raises(ValueError, match=r"strip.png: an image must have .* got 2x50"):
        load_images([good, strip])
    with pytest.raises(ValueError, match="at least one image"):
        load_images([])
