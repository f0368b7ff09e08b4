"""Sound, decoded by soundfile and resampled by soxr; on the device log-mel spectrograms, or waveforms of any length."""

import io
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.modalities.base import DecodeError, Modality

STARTS = (b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"caff", b"NIST")  # of files
# libsndfile's readers of rarer formats print, and take long for a few bytes
KNOWN = "WAV, FLAC, Ogg, MP3, AIFF, AU, CAF, NIST"
# By a file's start: its name, byte order, the first chunk's place, the bytes of a chunk's size, the chunk of samples.
CHUNKS: dict[bytes, tuple[str, Literal["little", "big"], int, int, bytes]] = {
    b"RIFF": ("WAV", "little", 12, 4, b"data"),
    b"RIFX": ("WAV", "big", 12, 4, b"data"),
    b"FORM": ("AIFF", "big", 12, 4, b"SSND"),
    b"caff": ("CAF", "big", 8, 8, b"data"),
}
MAX_VALUES = 2**28  # frames × channels of a sound, by its header, or as it is decoded if the header has no length
UNKNOWN = 2**63 - 1  # frames of a stream without a length in its header, as encoders write it into a pipe
MP3_SLACK = 4 * 1152  # frames that a decoder may drop at both ends
BLOCK = 2**18  # values that are decoded at a time
LOUDEST = 64.0  # times full scale. Codecs and float recorders overshoot it by less; integers stored as floats exceed it
PADDING = -32768  # no sample of a sound has this value


class AudioModality(Modality):
    """Sounds: int16 [samples] in the worker; on the device a log-mel spectrogram [1, mels, frames] of about unit variance, or
    float [samples] of zero mean and unit variance.

    Args:
        sample_rate: Hz; other rates are resampled.
        seconds: shorter sounds are padded, longer ones cut (at a random place in training, in the middle otherwise).
        mels, window, hop: bands of the mel scale, and the short-time Fourier transform's window and step in samples.
        center: subtract each band's mean over time, which removes much of the speaker's and the microphone's colour
            (cepstral mean normalization).
        shift: in training, the padded sound starts up to this many seconds late.
        max_seconds: longer members are refused before they are decoded.
        representation: "mel", or "waveform" for towers such as wav2vec2 (input_values).
        variable: for waveforms: shorter sounds keep their own length. A batch is as long as its longest sound; values after a
            sound's end are NaN, which the tower masks, so that a sound's embedding does not depend on its batch.
    """

    filters: Tensor
    hann: Tensor
    of_source = frozenset({"shift", "max_seconds"})
    extensions = ("flac", "wav", "ogg", "mp3", "audio")
    max_values = MAX_VALUES

    def __init__(
        self,
        sample_rate: int = 16_000,
        seconds: float = 10.0,
        mels: int = 64,
        window: int = 1024,
        hop: int = 320,
        center: bool = False,
        shift: float = 0.0,
        max_seconds: float = 3600.0,
        representation: Literal["mel", "waveform"] = "mel",
        variable: bool = False,
    ) -> None:
        super().__init__()
        if representation not in ("mel", "waveform"):
            raise ValueError(f'representation is {representation!r}, it must be "mel" or "waveform"')
        if variable and representation == "mel":
            raise ValueError("variable is for waveforms: the towers of spectrograms know no mask")
        for name, value in {"sample_rate": sample_rate, "seconds": seconds, "max_seconds": max_seconds}.items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, it must be more than 0")
        for name, value in {"mels": mels, "window": window, "hop": hop}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, it must be at least 1")
        if not 0 <= shift < math.inf:
            raise ValueError(f"shift is {shift}, it must be seconds, 0 or more")
        self.representation, self.variable = representation, variable
        self.sample_rate, self.length, self.max_seconds = sample_rate, round(seconds * sample_rate), max_seconds
        if not self.length:
            raise ValueError(f"seconds is {seconds:g}: less than a sample at sample_rate={sample_rate}")
        self.window, self.hop, self.center, self.shift = window, hop, center, round(shift * sample_rate)
        from transformers.audio_utils import mel_filter_bank

        filters = mel_filter_bank(window // 2 + 1, mels, 0.0, sample_rate / 2, sample_rate, norm="slaney", mel_scale="slaney")
        self.register_buffer("filters", torch.tensor(filters, dtype=torch.float32), persistent=False)
        self.register_buffer("hann", torch.hann_window(window), persistent=False)

    def decode(self, data: bytes) -> Tensor:
        """Decode to int16 [samples], one channel, at `sample_rate`; values outside [-1, 1] are clipped."""
        return self.stored(self._read(data))

    def encode(self, value: tuple[Any, float]) -> Tensor:
        """Return (samples of one channel, their rate in Hz) in the form of `decode`. Floats are in [-1, 1], integers in the
        range of their type."""
        samples, rate = value
        sound = np.asarray(samples)
        if sound.ndim != 1 or not len(sound) or sound.dtype.kind not in "iuf":
            raise DecodeError(f"samples of shape {sound.shape}, {sound.dtype}: a sound is one channel of numbers, [samples]")
        if not 0 < rate < math.inf:
            raise DecodeError(f"a sample rate of {rate} Hz")
        if sound.dtype.kind != "f":
            half = 2.0 ** (8 * sound.itemsize - 1)
            if sound.itemsize > 2 and 0 < (loudest := int(sound.max())) < half / 2**15:
                raise DecodeError(f"{sound.dtype} samples of at most {loudest}: if they are of 16 bits, give them as int16")
            sound = sound / half - (sound.dtype.kind == "u")
        sound = _checked(sound.astype(np.float32))
        return self.stored([sound if rate == self.sample_rate else soxr.resample(sound, rate, self.sample_rate)])

    def stored(self, parts: Iterable[np.ndarray]) -> Tensor:
        """Join parts of a sound, float32 at `sample_rate`, to int16, which `transform` takes."""
        scaled = [part * 32768 for part in parts]
        for part in scaled:  # in place, which halves the time of a WAV
            np.clip(np.rint(part, part), PADDING + 1, 32767, part)
        return joined([part.astype(np.int16) for part in scaled])

    def _read(self, data: bytes) -> Iterator[np.ndarray]:
        """Decode a file in parts, float32 [samples], one channel, at `sample_rate`; its length need not be known."""
        check_whole(data)
        try:
            with open_sound(data) as file:
                rate, channels = file.samplerate, file.channels
                if file.frames < UNKNOWN:
                    self._check_length(file.frames, rate, channels)
                resampler = None if rate == self.sample_rate else soxr.ResampleStream(rate, self.sample_rate, 1)
                frames = 0
                while len(block := file.read(max(1, BLOCK // channels), dtype="float32", always_2d=True)):
                    frames += len(block)
                    self._check_length(frames, rate, channels)
                    mono = _checked(block[:, 0] if channels == 1 else block.mean(1))
                    yield resampler.resample_chunk(mono) if resampler else mono
                if file.format == "MP3" and frames + MP3_SLACK < file.frames < UNKNOWN:
                    raise DecodeError(f"a truncated MP3: {frames} of {file.frames} frames")
                if resampler:
                    yield resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
        except (soundfile.SoundFileError, ValueError) as error:
            reason = getattr(error, "error_string", error)  # libsndfile's, without the object that it read
            raise DecodeError(f"not a sound that can be decoded ({reason})") from error

    def _check_length(self, frames: int, rate: int, channels: int) -> None:
        """Check a sound's length against the limits.

        Raises:
            DecodeError: if it is too long.
        """
        if frames > self.max_seconds * rate:
            raise DecodeError(f"{frames / rate:.0f} s of sound, more than {self.max_seconds}")
        if frames * channels > self.max_values:
            raise DecodeError(f"{frames} × {channels} values of sound, more than {self.max_values}")

    def suspicious(self, raw: Tensor) -> str | None:
        if (raw == raw[0]).all():
            return f"a constant sound: each of its {len(raw)} samples is {raw[0].item():g}"
        return None

    def transform(self, raw: Tensor, training: bool) -> Tensor:
        spare = len(raw) - self.length
        if spare >= 0:
            start = int(torch.randint(spare + 1, ())) if training else spare // 2
            return raw[start : start + self.length]
        late = int(torch.randint(min(self.shift, -spare) + 1, ())) if training else 0
        length = max(late + len(raw), min(self.window, self.length)) if self.variable else self.length
        padded = torch.zeros(length, dtype=torch.int16)
        padded[late : late + len(raw)] = raw
        return padded

    def blank(self) -> Tensor:
        return torch.zeros(self.length, dtype=torch.int16)

    def collate(self, samples: list[Tensor]) -> Tensor:
        if self.variable:
            return torch.nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=PADDING)
        return super().collate(samples)

    def forward(self, batch: Tensor) -> Tensor:
        if self.representation == "waveform":
            sounds = batch.float().masked_fill(batch == PADDING, torch.nan)
            centred = sounds - sounds.nanmean(1, keepdim=True)
            return centred / (centred.square().nanmean(1, keepdim=True) + 1e-7).sqrt()
        with torch.autocast(batch.device.type, enabled=False):  # a spectrum's range is beyond bf16's precision
            batch = F.pad(batch, (0, max(0, self.window - batch.shape[1])))  # sounds shorter than a window have one frame
            frames = batch.unfold(1, self.window, self.hop).float() * (self.hann / 32768)
            spectrum = torch.fft.rfft(frames)
            power = spectrum.real.square().add_(spectrum.imag.square())
            mel = (power @ self.filters).add_(1e-6).log_()
            mean = mel.mean(1, keepdim=True) if self.center else -7.0  # −7 and 4: about unit variance for speech
            return mel.sub_(mean).div_(4).transpose(1, 2).unsqueeze(1)


class _Stream(soundfile.SoundFile):
    """A sound file that is read once from the beginning: soundfile seeks after each read if it can, which fails in streams of
    unknown length."""

    def seekable(self) -> bool:
        return False


class _Bytes(io.BytesIO):
    """Bytes that ignore invalid seeks of a damaged header, as libsndfile's callbacks print what they raise."""

    def __repr__(self) -> str:  # in libsndfile's messages
        return f"{self.getbuffer().nbytes} bytes"

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return self.tell()


def check_whole(data: bytes) -> None:
    """Check that a sound has the bytes of samples that its header says; libsndfile would read fewer.

    Raises:
        DecodeError: if it is truncated.
    """
    if data[:4] == b".snd":
        _check_size("AU", data, int.from_bytes(data[4:8], "big"), int.from_bytes(data[8:12], "big"), 2**32 - 1)
    name, order, place, width, samples = CHUNKS.get(data[:4], ("", "big", len(data), 4, b""))
    while place + 4 + width <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 4 + width], order)
        place += 4 + width
        if kind == samples:
            _check_size(name, data, place, size, 2 ** (8 * width) - 1)
            break
        place += size + size % 2 * (width == 4)


def _check_size(name: str, data: bytes, start: int, size: int, unknown: int) -> None:
    if size not in (0, unknown) and start + size > len(data):  # as what writes to a pipe leaves it
        raise DecodeError(f"a truncated {name}: {len(data) - start} of {size} bytes of samples")


def open_sound(data: bytes) -> soundfile.SoundFile:
    """Open a sound to read its header, or all of it by `read(frames)` from the beginning.

    Raises:
        DecodeError: for an unknown format.
        soundfile.SoundFileError: for a damaged file.
    """
    if not data.startswith(STARTS) and not (data[:1] == b"\xff" and data[1:2] >= b"\xe0"):
        raise DecodeError(f"not a sound that can be decoded (no {KNOWN})")
    return _Stream(_Bytes(data))


def _checked(sound: np.ndarray) -> np.ndarray:
    """Return samples after checking that they are finite, and about within full scale.

    Raises:
        DecodeError: if they are not.
    """
    peak = float(max(sound.max(), -sound.min()))  # NaN if a sample is
    if not math.isfinite(peak):
        raise DecodeError("samples that are infinite or no numbers (NaN)")
    if peak > LOUDEST:
        raise DecodeError(f"samples up to {peak:g} where full scale is 1: integers as floats, to be divided by their largest")
    return sound


def joined(parts: list[np.ndarray]) -> Tensor:
    """Return the parts of a sound joined.

    Raises:
        DecodeError: if they have no samples.
    """
    sound = torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0)
    if not len(sound):
        raise DecodeError("an empty sound")
    return sound
