"""Decoding and preparing images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mnv2_fused.data import images
from mnv2_fused.data.images import ImageError
from mnv2_fused.weights import PUBLISHED, TENSORFLOW, TORCHVISION


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(x: torch.Tensor, convention) -> torch.Tensor:
    """The pixels 0..255 (h, w, 3) that were normalised."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (convention.mean, convention.std))
    return ((x * std + mean) * 255).round().permute(1, 2, 0)


# --------------------------------------------------------------------------------------------------------- preparation


@pytest.mark.parametrize("size", [(500, 333), (33, 500), (224, 224), (1, 1), (301, 224), (640, 231)])
@pytest.mark.parametrize("resolution", [None, 96, 33])
@pytest.mark.parametrize("convention", [TORCHVISION, TENSORFLOW], ids=lambda c: c.name)
def test_shape_and_type(size, resolution, convention):
    x = images.prepare(noise(*size), convention, resolution)
    side = resolution or 224
    assert x.shape == (3, side, side) and x.dtype == torch.float32 and x.is_contiguous()


def test_torchvision_normalisation():
    x = images.prepare(Image.new("RGB", (300, 256), (255, 0, 128)), TORCHVISION)
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (128 / 255 - 0.406) / 0.225]
    for channel, value in enumerate(expected):
        torch.testing.assert_close(x[channel], torch.full((224, 224), value))


def test_tensorflow_normalisation_is_127_5():
    image = noise(224, 224)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(images.prepare(image, TENSORFLOW), expected)


def test_torchvision_crops_the_centre_of_a_resized_image():
    image = noise(384, 300)
    resized = image.resize((int(256 * 384 / 300), 256), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 224) / 2), 16
    expected = np.array(resized)[top : top + 224, left : left + 224]
    assert np.array_equal(pixels(images.prepare(image, TORCHVISION), TORCHVISION).numpy(), expected)


def test_second_edition_of_the_weights_resizes_to_232():
    convention = PUBLISHED["IMAGENET1K_V2"].convention
    image = noise(232, 232)
    expected = np.array(image)[4:228, 4:228]
    assert np.array_equal(pixels(images.prepare(image, convention), convention).numpy(), expected)


def test_tensorflow_squeezes_the_whole_image():
    image = noise(300, 400)
    expected = np.array(image.resize((224, 224), Image.Resampling.BICUBIC))
    assert np.array_equal(pixels(images.prepare(image, TENSORFLOW), TENSORFLOW).numpy(), expected)


def test_resolution_keeps_the_share_that_is_cropped_away():
    image = noise(128, 128)  # 112 * 256 / 224
    expected = np.array(image)[8:120, 8:120]
    assert np.array_equal(pixels(images.prepare(image, TORCHVISION, 112), TORCHVISION).numpy(), expected)


def test_batches(tmp_path):
    for i in range(2):
        noise(50 + i, 40, seed=i).save(tmp_path / f"{i}.png")
    batch = images.load_batch([tmp_path / "0.png", tmp_path / "1.png"], TORCHVISION, 64)
    assert batch.shape == (2, 3, 64, 64)
    assert torch.equal(batch[1], images.prepare(images.read(tmp_path / "1.png"), TORCHVISION, 64))


# ------------------------------------------------------------------------------------------------------------ decoding


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
def test_kinds_of_files(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    noise(20, 10).save(path)
    image = images.read(path)
    assert (image.mode, image.size) == ("RGB", (20, 10))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_modes(tmp_path, mode):
    path = tmp_path / ("picture.tiff" if mode in ("CMYK", "YCbCr") else "picture.png")
    Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode).save(path)
    image = images.read(path)
    assert image.mode == "RGB"
    assert np.array(image).min() >= 254


def test_transparency_is_dropped_not_blended(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(tmp_path / "clear.png")
    assert images.read(tmp_path / "clear.png").getpixel((0, 0)) == (200, 100, 50)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (32768, 128), (65535, 255)])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, value, expected):
    grey = np.full((4, 4), value, dtype=np.uint16)
    grey[0, 0] = 65535
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert images.read(tmp_path / "grey.png").getpixel((3, 3)) == (expected,) * 3


def test_exif_orientation_is_followed(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert images.read(tmp_path / "turned.jpg").size == (10, 20)


# -------------------------------------------------------------------------------------------------------------- errors


def test_missing(tmp_path):
    with pytest.raises(ImageError, match=r"no such image: .*nothing\.png"):
        images.read(tmp_path / "nothing.png")


def test_directory(tmp_path):
    with pytest.raises(ImageError, match="expected an image, got a directory"):
        images.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"some text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + b"0" * 50])
def test_not_an_image(tmp_path, content):
    (tmp_path / "fake.png").write_bytes(content)
    with pytest.raises(ImageError, match=r"fake\.png"):
        images.read(tmp_path / "fake.png")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"", "an empty file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14\n",
            "a Git LFS pointer; `git lfs pull`",
        ),
        (b"<!doctype html><html></html>", "an HTML page;"),
    ],
)
def test_other_kinds_of_files(tmp_path, content, got):
    (tmp_path / "fake.jpg").write_bytes(content)
    with pytest.raises(ImageError) as caught:
        images.read(tmp_path / "fake.jpg")
    assert str(caught.value).startswith(f"expected an image in {tmp_path / 'fake.jpg'}, got {got}")


def test_url():
    with pytest.raises(ImageError, match=r"expected the path of an image, got a URL: https://a\.b/c\.png\. Download"):
        images.read("https://a.b/c.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ImageError, match=r"cut\..* damaged"):
        images.read(path)


def test_decompression_bomb(tmp_path, monkeypatch):
    noise(64, 64).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too large to decode safely"):
        images.read(tmp_path / "huge.png")
