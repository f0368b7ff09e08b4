"""Sounds as others write them: every subtype of every container, loud, endless, damaged; and what their options refuse."""

import io
import wave
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.modalities import AudioModality, DecodeError
from mmcontrast.modalities.library import LibraryAudio
from mmcontrast.models import make_model
from mmcontrast.models.options import FieldOptions, ModelOptions

RATE = 16_000
CONTAINERS = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "NIST")
SUBTYPES = [(container, subtype) for container in CONTAINERS for subtype in soundfile.available_subtypes(container)]
LENIENT = ("DWVW_12", "MPEG_LAYER_I", "MPEG_LAYER_II")  # which soundfile lists and cannot write


def tone(frequency=440.0, seconds=1.0, amplitude=0.5, rate=RATE):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def written(samples, rate=RATE, **options):
    target = io.BytesIO()
    soundfile.write(target, samples, rate, **options)
    return target.getvalue()


@cache
def modality(rate=RATE):
    return AudioModality(rate, seconds=1.0)


def assert_same(raw, samples, tolerance=0.03):
    """Correlated, of the same loudness, of about the same length; without the beginning, where codecs swing in."""
    heard = raw.numpy() / 32768
    assert abs(len(heard) - len(samples)) <= 0.02 * len(samples) + 320  # blocks of GSM
    both = np.stack([heard[: len(samples)], samples[: len(heard)]])[:, len(samples) // 4 :]
    assert np.corrcoef(both)[0, 1] > 0.99
    assert np.std(both[0]) == pytest.approx(np.std(both[1]), rel=tolerance)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_subtype_is_heard_as_it_was_written(container):
    tried = 0
    for subtype in soundfile.available_subtypes(container):
        for channels in (1, 2):
            try:
                data = written(np.stack([tone()] * channels, 1), format=container, subtype=subtype)
            except soundfile.SoundFileError:
                assert channels == 2 or subtype in LENIENT or (container, subtype) == ("WAV", "MPEG_LAYER_III")
                continue
            assert_same(modality().decode(data), tone())
            tried += 1
    assert tried


def test_what_scipy_and_the_standard_library_write():
    for dtype, scale, middle in (("u1", 127, 128), ("i2", 32767, 0), ("i4", 2**31 - 1, 0), ("f4", 1, 0), ("f8", 1, 0)):
        target = io.BytesIO()
        wavfile.write(target, RATE, (tone() * scale + middle).astype(dtype))
        assert_same(modality().decode(target.getvalue()), tone())
    for width in (1, 2, 3, 4):
        target, half = io.BytesIO(), 2 ** (8 * width - 1)
        values = (tone() * (half - 1)).astype(np.int64) + (half if width == 1 else 0)
        with wave.open(target, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(width)
            file.setframerate(RATE)
            file.writeframes(b"".join(int(value).to_bytes(width, "little", signed=width > 1) for value in values))
        assert_same(modality().decode(target.getvalue()), tone())


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(
        [(c, s) for c, s in SUBTYPES if s.startswith(("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW", "VORBIS")) and c != "MP3"]
    ),
    rate=st.sampled_from([8000, 11_025, 16_000, 22_050, 44_100, 48_000]),
    at=st.sampled_from([8000, 16_000, 24_000, 48_000]),
    frequency=st.floats(80, 2000),
    amplitude=st.floats(0.1, 1.0),
    channels=st.integers(1, 3),
)
def test_a_tone_survives_any_subtype_rate_and_number_of_channels(form, rate, at, frequency, amplitude, channels):
    samples = np.stack([tone(frequency, 0.6, amplitude, rate)] * channels, 1)
    data = written(samples, rate, format=form[0], subtype=form[1])
    assert_same(modality(at).decode(data), tone(frequency, 0.6, amplitude, at), tolerance=0.06)


def test_loud_sounds_are_clipped_and_keep_their_sign():
    loud = np.clip(tone(amplitude=3.0), -1, 1)
    for options in ({"format": "OGG"}, {"format": "OGG", "subtype": "OPUS"}, {"format": "MP3"}):
        data = written(loud, **options)
        assert np.abs(soundfile.read(io.BytesIO(data))[0]).max() > 1, "the codec overshoots, or nothing is tested"
        heard = modality().decode(data).numpy()[: len(loud)].astype(int)
        far = (np.abs(loud[: len(heard)]) == 1) & (np.arange(len(heard)) > 1000)
        assert (np.sign(heard[far]) == np.sign(loud[: len(heard)][far])).mean() > 0.99
    heard = modality().decode(written(tone(amplitude=2.0), format="WAV", subtype="FLOAT"))
    assert (heard.min(), heard.max()) == (-32767, 32767)


def test_samples_that_are_no_sound_are_refused():
    bad = tone()
    for value, message in ((np.nan, "no numbers"), (np.inf, "infinite"), (-np.inf, "infinite"), (1e300, "infinite")):
        bad[4000] = value
        with pytest.raises(DecodeError, match=message):
            modality().decode(written(bad, format="WAV", subtype="DOUBLE"))
        with pytest.raises(DecodeError, match=message), np.errstate(over="ignore"):
            modality().encode((bad, RATE))
    integers = (tone() * 32767).astype(np.float32)
    for refused in (modality().decode, lambda data: modality().encode(soundfile.read(io.BytesIO(data)))):
        with pytest.raises(DecodeError, match="full scale is 1"):
            refused(written(integers, format="WAV", subtype="FLOAT"))


def test_integers_in_a_program_are_of_their_types_range():
    for dtype, scale, middle in ((np.int16, 32767, 0), (np.int32, 2**31 - 1, 0), (np.uint8, 127, 128), (np.float64, 1, 0)):
        assert_same(modality().encode(((tone() * scale + middle).astype(dtype), RATE)), tone())
    sixteen = (tone() * 32767).astype(np.int16)
    for dtype in (np.int32, np.int64):  # as a sum of channels, or a list, makes of it
        with pytest.raises(DecodeError, match=r"int.. samples of at most \d+: if they are of 16 bits, give them as int16"):
            modality().encode((sixteen.astype(dtype), RATE))
    assert not modality().encode((np.zeros(9000, dtype=np.int64), RATE)).any()
    for samples, rate in (
        (tone(), 0),
        (tone(), -1),
        (tone(), np.nan),
        ([], RATE),
        ([[0.5]], RATE),
        (["a"], RATE),
        ([1j], RATE),
    ):
        with pytest.raises(DecodeError, match=r"a sample rate of|samples of shape"):
            modality().encode((samples, rate))


def endless(samples, rate=RATE):
    """A FLAC as an encoder leaves it that writes into a pipe: its header says 0 samples, which stands for unknown."""
    data = bytearray(written(samples, rate, format="FLAC"))
    data[18:26] = (int.from_bytes(data[18:26], "big") >> 36 << 36).to_bytes(8, "big")
    assert soundfile.info(io.BytesIO(bytes(data))).frames == 2**63 - 1
    return bytes(data)


def test_streams_of_unknown_length_are_read_up_to_the_limits(monkeypatch):
    data = endless(tone(seconds=3))
    assert torch.equal(modality().decode(data), modality().decode(written(tone(seconds=3), format="FLAC")))
    with pytest.raises(DecodeError, match="3 s of sound, more than 2"):
        AudioModality(max_seconds=2).decode(data)
    monkeypatch.setattr("mmcontrast.modalities.audio.BLOCK", 1000)
    monkeypatch.setattr(AudioModality, "max_values", 30_000)
    with pytest.raises(DecodeError, match="31000 × 1 values of sound, more than 30000"):  # not one block more is read
        AudioModality().decode(data)


def test_blocks_and_channels_are_joined_without_a_seam(monkeypatch):
    noise = np.random.default_rng(0).normal(0, 0.1, (30_000, 3)).astype(np.float32)
    data = written(noise, 44_100, format="WAV", subtype="FLOAT")
    monkeypatch.setattr("mmcontrast.modalities.audio.BLOCK", 5000)
    expected = soxr.resample(noise.mean(1), 44_100, RATE)
    heard = modality().decode(data)
    assert len(heard) == len(expected) and np.abs(heard.numpy() / 32768 - expected).max() < 1e-4
    exact = LibraryAudio(torch.from_numpy, 44_100)
    assert np.array_equal(exact.transform(exact.decode(data), False).numpy(), noise.mean(1)), "nothing is rounded to 16 bits"


def test_too_short_to_be_heard():
    with pytest.raises(DecodeError, match="an empty sound"):  # one sample at 48 kHz is none at 8 kHz
        modality(8000).decode(written(tone()[:1], 48_000, format="WAV"))
    with pytest.raises(DecodeError, match="a sound of 19 samples at 16000 Hz: this model needs 20"):
        LibraryAudio(torch.from_numpy, RATE, shortest=20).decode(written(tone()[:19], format="WAV"))
    short = AudioModality(RATE, seconds=0.04, window=512, hop=128)
    raw = short.decode(written(tone()[:3], format="WAV", subtype="FLOAT"))
    assert short(short.collate([short.transform(raw, True)])).shape == (1, 1, 64, 2)
    cut = AudioModality(
        RATE, seconds=0.02, representation="waveform", variable=True
    )  # shorter than the window, which it has not
    assert len(cut.transform(raw, False)) == len(cut.transform(cut.decode(written(tone(), format="WAV")), False)) == 320


def test_a_tower_of_waveforms_is_not_given_less_than_it_takes():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    layers = {"conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "feat_extract_norm": "layer"}
    tower = {"type": "transformers", "model": "wav2vec2", "config": sizes | layers | {"num_feat_extract_layers": 2}}

    def model(**options):
        sound = {"type": "audio", "sample_rate": RATE, "representation": "waveform", **options}
        return make_model({"a": FieldOptions(modality=sound, tower="t")}, {"t": tower}, ModelOptions(embed_dim=8), 0)

    with pytest.raises(UserError, match=r"fields.a: sounds may have 19 samples, its tower needs 20: set a longer window"):
        model(window=19, variable=True)
    with pytest.raises(UserError, match=r"fields.a: sounds may have 16 samples, its tower needs 20: set a longer seconds"):
        model(seconds=0.001)
    shortest = Embedder(model(window=20, variable=True), "m", "cpu").embed(audio=[(tone()[1:2], RATE), (tone(), RATE)])
    assert shortest.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [{"seconds": 1e-6}, {"window": 0}, {"hop": 0}, {"mels": 0}, {"sample_rate": 0}, {"sample_rate": -1}, {"shift": -1.0}]
    + [{name: value} for name in ("seconds", "max_seconds") for value in (0, -1.0, float("nan"), float("inf"))]
    + [{"seconds": 1e-6, "representation": "waveform"}],
)
def test_options_that_leave_nothing_to_hear_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AudioModality(**options)


def test_constant_sounds_are_suspicious():
    for value in (0.0, 0.25):
        raw = modality().decode(written(np.full(800, value), format="WAV", subtype="FLOAT"))
        assert "a constant sound: each of its 800 samples" in modality().suspicious(raw)
    assert modality().suspicious(modality().decode(written(tone(amplitude=0.001), format="WAV"))) is None


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from([("WAV", "IMA_ADPCM"), ("AIFF", "FLOAT"), ("CAF", "ALAC_16"), ("W64", "PCM_24"), ("NIST", "PCM_16")]),
    changes=st.lists(st.tuples(st.integers(0, 119), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 2500),
)
def test_damaged_sounds_are_refused_or_heard(form, changes, cut):
    data = bytearray(written(tone(seconds=0.05), format=form[0], subtype=form[1]))
    for place, value in changes:
        data[place] = value
    with suppress(DecodeError):
        raw = modality().decode(bytes(data[: len(data) - cut] if cut < len(data) else data))
        assert raw.dtype == torch.int16 and len(raw)


@pytest.mark.parametrize(
    ("container", "options"),
    [
        ("WAV", {}),
        ("WAV", {"endian": "BIG"}),
        ("MP3", {}),
        ("AIFF", {}),
        ("AIFF", {"subtype": "FLOAT"}),
        ("CAF", {"subtype": "ALAC_16"}),
        ("AU", {}),
    ],
)
def test_half_of_a_file_is_no_shorter_sound(container, options):
    """libsndfile reads what there is."""
    out, sound = io.BytesIO(), tone(seconds=3.0)
    soundfile.write(out, sound, RATE, format=container, **options)
    data, whole = out.getvalue(), AudioModality(RATE, max_seconds=5)
    assert abs(len(whole.decode(data)) - 3 * RATE) < 2000
    with pytest.raises(DecodeError, match=f"truncated {container}"):
        whole.decode(data[: len(data) // 2])


def test_a_damaged_header_prints_nothing(capfd):
    """A chunk of negative size sends libsndfile to before the beginning: Python's BytesIO raises where no one can catch it."""
    data = bytearray(written(tone(), format="AIFF"))
    for place in range(12, 60):
        for value in (0x80, 0xFF):
            damaged = data[:place] + bytes([value] * 4) + data[place + 4 :]
            with suppress(DecodeError):
                modality().decode(bytes(damaged))
    assert capfd.readouterr() == ("", "")


def test_rare_containers_are_not_tried(capfd):
    """Libsndfile's reader of SDS prints a line for each damaged block."""
    for container in ("SDS", "MAT4", "XI", "VOC", "PVF"):
        with pytest.raises(DecodeError, match="not a sound that can be decoded .no WAV, FLAC, Ogg"):
            modality().decode(written(tone(), format=container))
    assert capfd.readouterr() == ("", "")
