"""Decoding and transforming; limits; what a batch looks like to a tower."""

import io

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmcontrast.modalities import AudioModality, DecodeError, ImageModality, TextModality, VectorModality


def encoded(write):
    target = io.BytesIO()
    write(target)
    return target.getvalue()


@pytest.mark.parametrize(
    ("format", "mode", "channels"),
    [(f, *mode) for f in ("PNG", "JPEG", "WEBP") for mode in (("RGB", 3), ("L", 1))]
    + [(f, mode, 3) for f in ("PNG", "WEBP") for mode in ("RGBA", "P")],  # a JPEG has neither
)
def test_images(format, mode, channels):
    picture = Image.new("RGB", (40, 20), (255, 255, 255)).convert(mode)
    modality = ImageModality(16, channels=channels)
    raw = modality.decode(encoded(lambda f: picture.save(f, format)))
    for training in (True, False):
        batch = modality.collate([modality.transform(raw, training)])
        assert batch.dtype == torch.uint8 and batch.shape == (1, channels, 16, 16)
        torch.testing.assert_close(modality(batch), torch.ones(1, channels, 16, 16))  # white is (1 − 0.5) / 0.5
    assert modality.blank().shape == (channels, 16, 16)


def photograph(width, height):
    """Colour, edges and noise."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    noise = generator.integers(-9, 10, (height, width, 3))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def decibels(a, b):
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_is_as_pillow_decodes_and_scales_it(options):
    """Decoded alike to a level of 255, scaled alike to 60 dB; from a fraction of its size to 40 dB."""
    picture = photograph(640, 480)
    data = encoded(lambda f: picture.save(f, "JPEG", quality=90, **options))
    for channels, mode in ((3, "RGB"), (1, "L")):
        exact = Image.open(io.BytesIO(data)).convert(mode)
        raw = ImageModality(224, channels).decode(data)
        reference = torch.from_numpy(np.asarray(exact).reshape(480, 640, channels).copy()).permute(2, 0, 1)
        assert raw.shape == reference.shape and decibels(raw, reference) > 45
        scaled = exact.resize((298, 224), Image.Resampling.BICUBIC).crop((37, 0, 261, 224))
        scaled = torch.from_numpy(np.asarray(scaled).reshape(224, 224, channels).copy()).permute(2, 0, 1)
        whole, part = ImageModality(224, channels), ImageModality(224, channels, scaled_decode=True)
        assert part.decode(data).shape[1:] == (240, 320)
        assert decibels(whole.transform(raw, False), scaled) > 60
        assert decibels(part.transform(part.decode(data), False), scaled) > 40


def test_a_jpeg_of_four_colours_is_read():
    data = encoded(lambda f: photograph(64, 48).convert("CMYK").save(f, "JPEG"))
    assert ImageModality(16).decode(data).shape == (3, 48, 64)


@pytest.mark.parametrize("format", ["FLAC", "WAV", "OGG"])
def test_audio_is_one_channel_at_one_rate(format):
    time = np.arange(8000) / 8000
    stereo = np.stack([np.sin(2 * np.pi * 440 * time)] * 2, 1) * 0.5
    modality = AudioModality(sample_rate=16_000, seconds=1.5, mels=32, window=512, hop=256)
    raw = modality.decode(encoded(lambda f: soundfile.write(f, stereo, 8000, format=format)))
    assert raw.dtype == torch.int16 and abs(len(raw) - 16_000) < 50
    batch = modality.collate([modality.transform(raw, False), modality.blank()])
    mel = modality(batch)
    assert mel.shape == (2, 1, 32, (24_000 - 512) // 256 + 1)
    loudest = int(mel[0, 0, :, 20].argmax())  # of 440 Hz on the slaney mel scale from 0 to 8 kHz
    centre = (440 / (200 / 3)) / (15 + 27 * np.log(8) / np.log(6.4)) * 33
    assert abs(loudest + 1 - centre) < 1.5
    assert mel[1].max() == mel[1].min()


def test_audio_is_cut_and_padded():
    modality = AudioModality(sample_rate=1000, seconds=0.1, mels=8, window=64, hop=32, shift=0.05)
    long, short = torch.arange(1, 301, dtype=torch.int16), torch.ones(60, dtype=torch.int16)
    assert modality.transform(long, False).tolist() == list(range(101, 201))
    starts = {int(modality.transform(long, True)[0]) for _ in range(50)}
    assert len(starts) > 10
    assert modality.transform(short, False).tolist() == [1] * 60 + [0] * 40
    assert {int(modality.transform(short, True).argmax()) for _ in range(200)} <= set(range(41))


def test_text():
    modality = TextModality(context_length=6)
    tokens = [modality.transform(text, False) for text in ("a", "one two three four five six seven")]
    batch = modality.collate(tokens)
    assert batch.shape == (2, 6) and batch[0, 3:].tolist() == [-1, -1, -1]
    assert batch[1, 0] == 49406 and batch[1, -1] == 49407


def test_every_line_may_be_a_caption():
    modality = TextModality(context_length=8, captions="lines")
    raw = modality.decode(b"first\n\n second \nthird\n")
    wanted = [TextModality(context_length=8).transform(word, False).tolist() for word in ("first", "second", "third")]
    assert modality.transform(raw, False).tolist() == wanted[0]
    drawn = [modality.transform(raw, True).tolist() for _ in range(60)]
    assert all(tokens in wanted for tokens in drawn) and all(tokens in drawn for tokens in wanted)
    with pytest.raises(ValueError, match="captions is 'some'"):
        TextModality(captions="some")


def test_centred_spectra_do_not_hear_the_loudness():
    modality = AudioModality(seconds=0.5, mels=16, window=512, hop=256, center=True)
    quiet = (torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)) * 3000).to(torch.int16)
    spectrum = modality(quiet)
    torch.testing.assert_close(spectrum.mean(3), torch.zeros(1, 1, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(modality(quiet * 2), spectrum, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("modality", "data", "message"),
    [
        (ImageModality(8), b"GIF89a", "not a picture"),
        (AudioModality(), b"RIFF....", "not a sound"),
        (AudioModality(), encoded(lambda f: soundfile.write(f, np.zeros(0), 8000, format="WAV")), "empty sound"),
        (AudioModality(max_seconds=1), encoded(lambda f: soundfile.write(f, np.ones(9000), 8000, format="WAV")), "more than 1"),
        (TextModality(max_bytes=3), b"four", "more than max_bytes=3"),
        (VectorModality(3), encoded(lambda f: np.save(f, np.zeros(4))), r"shape \(4,\) where width=3"),
        (VectorModality(3), encoded(lambda f: np.save(f, np.array([{}], dtype=object), allow_pickle=True)), "not an array"),
        (VectorModality(3), b"\x93NUMPY", "not an array"),
    ],
)
def test_what_cannot_be_decoded_is_said(modality, data, message):
    with pytest.raises(DecodeError, match=message):
        modality.decode(data)


def test_vectors():
    modality = VectorModality(3)
    raw = modality.decode(encoded(lambda f: np.save(f, np.array([1, 2, 3], np.float64))))
    assert raw.dtype == torch.float32 and raw.tolist() == [1, 2, 3] and modality.blank().tolist() == [0, 0, 0]


def test_one_line_of_the_captions():
    """All captions of a sample: a field for each line; a sample with fewer lacks the field."""
    data = b"a dog\n\n  two dogs \nthree"
    found = [TextModality(context_length=8, captions=k) for k in range(4)]
    tokens = [modality.transform(modality.decode(data), training) for modality in found for training in (True, False)]
    assert tokens[6] is tokens[7] is None
    whole = TextModality(context_length=8)
    for k, text in enumerate(("a dog", "two dogs", "three")):
        assert torch.equal(tokens[2 * k], whole.tokens(text)) and torch.equal(tokens[2 * k + 1], whole.tokens(text))
    assert torch.equal(found[2].tokens("a prompt"), whole.tokens("a prompt")), "prompts are texts, not captions of a sample"
    for wrong in ("line", -1):
        with pytest.raises(ValueError, match="captions is"):
            TextModality(captions=wrong)


def test_waveforms_of_any_length():
    """Normalised over the sound alone; NaN beyond its end; cut at `seconds`."""
    modality = AudioModality(sample_rate=8000, seconds=1.0, representation="waveform", variable=True)
    sounds = [torch.randint(-3000, 3000, (n,), dtype=torch.int16) for n in (5000, 8000, 9000, 2000)]
    batch = modality.collate([modality.transform(sound, False) for sound in sounds])
    waves = modality(batch)
    assert waves.shape == (4, 8000) and waves.isfinite().sum(1).tolist() == [5000, 8000, 8000, 2000]
    for wave, sound in zip(waves, sounds, strict=True):
        alone = modality(modality.transform(sound, False).unsqueeze(0))[0]
        torch.testing.assert_close(wave[: len(alone)], alone, atol=1e-5, rtol=0)
        assert abs(float(alone.mean())) < 1e-4 and float(alone.std()) == pytest.approx(1, abs=1e-3)
    loud = encoded(lambda f: soundfile.write(f, np.full(3000, -32768, dtype=np.int16), 8000, format="WAV"))
    assert modality(modality.transform(modality.decode(loud), False).unsqueeze(0)).isfinite().all(), "no sample is padding"
    fixed = AudioModality(sample_rate=8000, seconds=1.0, representation="waveform")
    assert fixed(fixed.collate([fixed.transform(sound, False) for sound in sounds])).isfinite().all()
    for options in ({"variable": True}, {"representation": "spectrum"}):
        with pytest.raises(ValueError, match=r"variable is for waveforms|representation is"):
            AudioModality(**options)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 48), (10, 200)])
def test_random_crops_are_torchvisions(height, width):
    """The same distribution of sizes and places; the same answer where no crop of the wanted shape fits."""
    from torchvision.transforms import v2

    ours = ImageModality(16).train_transform.transforms[0]
    theirs = v2.RandomResizedCrop(16, scale=ours.scale)
    picture = torch.zeros(3, height, width, dtype=torch.uint8)
    drawn = [[list(crop.make_params([picture]).values()) for _ in range(4000)] for crop in (ours, theirs)]
    a, b = (torch.tensor(values, dtype=torch.float64) for values in drawn)
    assert ((a[:, 0] + a[:, 2] <= height) & (a[:, 1] + a[:, 3] <= width) & (a.min(1).values >= 0)).all()
    spread = torch.maximum(a.std(0), b.std(0))
    assert ((a.mean(0) - b.mean(0)).abs() <= 0.12 * spread + 1e-9).all() and (
        (a.std(0) - b.std(0)).abs() <= 0.12 * spread
    ).all()
    assert (a.min(0).values - b.min(0).values).abs().max() <= 3 and (a.max(0).values - b.max(0).values).abs().max() <= 3
