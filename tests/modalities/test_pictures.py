"""Transparency in every mode, and files that are small and take long."""

import io
import struct
import warnings

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_noise

from mmcontrast.modalities import DecodeError, ImageModality
from mmcontrast.modalities.library import LibraryImages
from mmcontrast.modalities.parts import MAX_PARTS, MAX_SCANS
from tests.modalities.picture_files import chunk, encoded, files, png, transparent

FILES = files()
THEIRS = LibraryImages(lambda picture: picture, 32, "RGB")
HIDING = [name for name in FILES if "A" in name.split(",")[0] or "transparent" in name or "alpha" in name]


def over(colour, pixels):
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + np.array(colour) * (1 - alpha)


@pytest.mark.parametrize(("background", "colour"), [(None, (255,) * 3), ("#ff8000", (255, 128, 0)), ([1, 2, 3], (1, 2, 3))])
def test_a_background_is_under_what_is_transparent(background, colour):
    modality = ImageModality(16) if background is None else ImageModality(16, background=background)
    for name, data in FILES.items():
        raw = modality.decode(data)
        assert raw.dtype == torch.uint8 and raw.shape == (3, 47, 61), name
        shown = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).astype(float)
        if name == "I;16":
            assert np.abs(raw.numpy() * 257.0 - np.asarray(Image.open(io.BytesIO(data)))).max() <= 129
            continue
        expected = over(colour, shown).transpose(2, 0, 1)
        assert np.abs(raw.numpy() - expected).max() <= (40 if "JPEG" in name else 1), name  # another inverse DCT
        assert (np.abs(expected - shown[..., :3].transpose(2, 0, 1)).max() > 20) == (name in HIDING), "the file tests something"
    array = torch.from_numpy(transparent())
    assert torch.equal(modality.encode(array), modality.decode(FILES["RGBA"]))
    grey = ImageModality(16, channels=1, background=colour).decode(FILES["RGBA"])
    assert np.abs(grey[0].numpy() - over(colour, transparent().astype(float)) @ [0.299, 0.587, 0.114]).max() <= 1.5


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.binary(min_size=4, max_size=4 * 64),
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    form=st.sampled_from([("PNG", {}), ("WEBP", {"lossless": True, "exact": True})]),
)
def test_any_pixels_over_any_background(pixels, colour, form):
    values = np.frombuffer(pixels[: len(pixels) // 4 * 4], dtype=np.uint8).reshape(1, -1, 4)
    raw = ImageModality(1, background=list(colour)).decode(encoded(Image.fromarray(values), form[0], **form[1]))
    assert np.abs(raw.permute(1, 2, 0).numpy() - over(colour, values.astype(float))).max() <= 1


def test_a_transparent_value_of_any_depth():
    """The specification's tRNS: of 1, 2, 4 and 16 bits, where the value is in the file's own scale."""
    trns = lambda *values: chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))  # noqa: E731
    cases = [
        (png(4, 1, 0, bytes([0b01010000]), trns(0)), [255, 255, 255, 255]),
        (png(4, 2, 0, bytes([0b00011011]), trns(2)), [0, 85, 255, 255]),
        (png(4, 4, 0, bytes([0x0F, 0x5A]), trns(15)), [0, 255, 85, 170]),
        (png(3, 8, 0, bytes([7, 8, 9]), trns(8)), [7, 255, 9]),
        (png(4, 16, 0, struct.pack(">4H", 0, 257, 514, 1028), trns(257)), [0, 255, 2, 4]),
        (png(4, 16, 0, struct.pack(">4H", 0, 257, 514, 1028)), [0, 1, 2, 4]),
        (png(2, 16, 2, struct.pack(">6H", 51399, 1, 2, 51400, 1, 2), trns(51399, 1, 2)), [255, 255]),  # 8 bits are left
        (png(2, 16, 2, struct.pack(">6H", 51399, 1, 2, 1, 51399, 2), trns(51399, 1, 2)), [255, 0]),
        (png(2, 16, 4, struct.pack(">4H", 514, 65535, 514, 0)), [2, 255]),
    ]
    for data, values in cases:
        assert ImageModality(1).decode(data)[0, 0].tolist() == values


def test_drop_shows_what_is_hidden_as_pillow_does():
    for name, data in FILES.items():
        if "JPEG" not in name:
            theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            assert np.array_equal(ImageModality(16, background="drop").decode(data).permute(1, 2, 0).numpy(), theirs), name


def test_open_clips_order_is_open_clips():
    """Equal to its transform where a mode is scaled before it is converted; elsewhere as near as uint8 scaling is."""
    theirs = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    constants = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    ours, white = (ImageModality(32, **constants, background=background) for background in ("open_clip", "white"))
    for name, data in FILES.items():
        picture = Image.open(io.BytesIO(data))
        mine = ours(ours.transform(ours.decode(data), False)[None])[0]
        exact = picture.mode not in ("RGB", "L")
        torch.testing.assert_close(mine, theirs(picture), atol=1e-5 if exact else 0.08, rtol=0, msg=name)
        assert ours.transform(ours.decode(data), True).shape == (3, 32, 32)
    other = white(white.transform(white.decode(FILES["RGBA"]), False)[None])[0]
    assert (other - theirs(Image.open(io.BytesIO(FILES["RGBA"])))).abs().max() > 1
    try:
        gaussian_noise(torch.zeros(3, 4, 4, dtype=torch.uint8))
        of_tensors = {"type": "GaussianNoise"}
    except ValueError:  # an older torchvision
        of_tensors = {"type": "GaussianBlur", "kernel_size": 3}
    augmented = ImageModality(32, background="open_clip", augment=[of_tensors, {"type": "ColorJitter"}])
    assert augmented.transform(augmented.decode(FILES["RGBA"]).resize((32, 32)), True).shape == (3, 32, 32)


def test_pillows_warnings_are_not_shown():
    libraries = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for background in ("white", "drop", "open_clip"):
            modality = ImageModality(16, background=background)
            for data in FILES.values():
                modality.transform(modality.decode(data), False)
        for mode in (None, "RGB"):
            modality = LibraryImages(libraries, 32, mode)
            modality.decode(FILES["P, alpha by colour"])


@pytest.mark.parametrize(
    "options",
    [{"background": value} for value in ("whitish", "opne_clip", [1, 2], [1, 2, 256], [0.5] * 3, None, 7, "#11223344")]
    + [{"channels": 2}, {"channels": 0}, {"size": 0}, {"mean": [0.5]}, {"std": [0.5, 0.5, 0.0]}, {"std": [float("nan")] * 3}],
)
def test_options_that_are_no_pictures_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ImageModality(**{"size": 16} | options)


def many_scans(picture, number):
    """A progressive JPEG whose last scan comes so many times more."""
    data = encoded(picture, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * number + data[-2:]


def with_segments(data, segment, number):
    return data[:2] + segment * number + data[2:]


@pytest.mark.parametrize("modality", [ImageModality(32), THEIRS], ids=["ours", "theirs"])
def test_a_jpeg_of_very_many_scans_is_refused(modality):
    picture = Image.new("RGB", (2000, 2000), (200, 100, 50))
    bomb = many_scans(picture, 500)
    assert len(bomb) < 250_000
    with pytest.raises(DecodeError, match="51. scans of 2000×2000 pixels, more than 16 × max_pixels=64000000"):
        modality.decode(bomb)
    assert modality.decode(encoded(picture, "JPEG", progressive=True)) is not None
    thumbnail = b"\xff\xe1" + struct.pack(">H", 60_002) + b"\xff\xda" * 30_000  # scans of another picture, in the metadata
    assert modality.decode(with_segments(encoded(picture, "JPEG", progressive=True), thumbnail, 5)) is not None
    small = many_scans(Image.new("RGB", (20, 20)), 500)
    assert modality.decode(small) is not None, "a small picture may have them"


def test_baseline_and_progressive_pass_at_the_largest_size():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    modality = ImageModality(32, max_pixels=640 * 480)
    for options in ({}, {"progressive": True}, {"progressive": True, "subsampling": 0}, {"optimize": True}):
        data = encoded(picture, "JPEG", **options)
        assert 1 <= data.count(b"\xff\xda") < MAX_SCANS and modality.decode(data).shape == (3, 480, 640)


def test_files_of_very_many_parts_are_refused():
    """Pillow reads them one by one, in Python: 5 million segments of 16 MiB took it half a minute."""
    jpeg, few = encoded(Image.new("RGB", (20, 20)), "JPEG"), 100
    for modality in (ImageModality(32), THEIRS):
        for kind, data in ((b"prVt", b""), (b"tEXt", b"a\0b")):
            with pytest.raises(DecodeError, match="more than 50000 chunks"):
                modality.decode(png(4, 8, 0, bytes(4), *[chunk(kind, data)] * MAX_PARTS))
            modality.decode(png(4, 8, 0, bytes(4), *[chunk(kind, data)] * few))
    for segment in (b"\xff\xfe\0\2", b"\xff\xe5\0\2", b"\xff\xdd\0\4\0\0"):
        with pytest.raises(DecodeError, match="more than 50000 segments"):
            THEIRS.decode(with_segments(jpeg, segment, MAX_PARTS + 1))
        for modality in (ImageModality(32), THEIRS):
            modality.decode(with_segments(jpeg, segment, few))


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4),
    background=st.sampled_from(["white", "drop", "open_clip"]),
)
def test_damaged_pictures_are_refused_or_seen(name, changes, background):
    data = bytearray(FILES[name])
    for place, value in changes:
        data[place % len(data)] = value
    modality = ImageModality(16, background=background, max_pixels=1_000_000)
    try:
        raw = modality.decode(bytes(data))
    except DecodeError:
        return
    assert modality.transform(raw, True).shape == (3, 16, 16)


@pytest.mark.parametrize("name", ["GIF", "BMP", "TIFF"])
def test_a_format_that_is_not_decoded_is_named(name):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, name)
    with pytest.raises(DecodeError, match=f"a {name}: convert it; no JPEG, PNG, WEBP"):
        ImageModality(16).decode(file.getvalue())
