"""Sound: decoded by soundfile, resampled by soxr; on the device log-mel spectrograms, or waveforms of any length."""

import io
from typing import Literal

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from mmcontrast.modalities.base import DecodeError, Modality

MAX_VALUES = 2**28  # frames × channels of a sound, by its header, before it is decoded
PADDING = -32768  # no sample of a sound has this value


class AudioModality(Modality):
    """int16 [samples] in the worker; on the device a log-mel spectrogram [1, mels, frames] of about unit variance, or float
    [samples] of zero mean and unit variance.

    Args:
        sample_rate: Hz; other rates are resampled.
        seconds: shorter sounds are padded, longer ones cut (at a random place in training, in the middle otherwise).
        mels, window, hop: bands of the mel scale, and the short-time Fourier transform's window and step in samples.
        center: subtract each band's mean over time, which takes out much of the speaker's and the microphone's colour
            (cepstral mean normalization).
        shift: in training, the padded sound starts up to this many seconds late.
        max_seconds: longer members are refused before they are decoded.
        representation: "mel", or "waveform" for towers such as wav2vec2 (input_values).
        variable: of waveforms: shorter sounds keep their own length. A batch is as long as its longest; what lies beyond a
            sound's end is NaN, which the tower masks, so that a sound's embedding does not depend on its batch.
    """

    filters: Tensor
    hann: Tensor
    of_source = frozenset({"shift", "max_seconds"})
    extensions = ("flac", "wav", "ogg", "mp3", "audio")

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
        self.representation, self.variable = representation, variable
        self.sample_rate, self.length, self.max_seconds = sample_rate, round(seconds * sample_rate), max_seconds
        self.window, self.hop, self.center, self.shift = window, hop, center, round(shift * sample_rate)
        from transformers.audio_utils import mel_filter_bank

        filters = mel_filter_bank(window // 2 + 1, mels, 0.0, sample_rate / 2, sample_rate, norm="slaney", mel_scale="slaney")
        self.register_buffer("filters", torch.tensor(filters, dtype=torch.float32), persistent=False)
        self.register_buffer("hann", torch.hann_window(window), persistent=False)

    def decode(self, data: bytes) -> Tensor:
        """int16 [samples], one channel, at `sample_rate`."""
        try:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                if file.frames > self.max_seconds * file.samplerate:
                    raise DecodeError(f"{file.frames / file.samplerate:.0f} s of sound, more than {self.max_seconds}")
                if file.frames * file.channels > MAX_VALUES:
                    raise DecodeError(f"{file.frames} × {file.channels} values of sound, more than {MAX_VALUES}")
                sound, rate = file.read(dtype="int16", always_2d=True), file.samplerate
        except (soundfile.SoundFileError, ValueError) as error:
            raise DecodeError(f"not a sound that can be decoded ({error})") from error
        if not len(sound):
            raise DecodeError("an empty sound")
        mono = sound[:, 0] if sound.shape[1] == 1 else sound.mean(1).astype(np.int16)
        sound = mono if rate == self.sample_rate else soxr.resample(mono, rate, self.sample_rate)
        return torch.from_numpy(sound).clamp_(min=PADDING + 1)

    def encode(self, value: tuple[np.ndarray, int]) -> Tensor:
        """(samples in [-1, 1], one channel, and their rate in Hz) as `decode` gives a sound."""
        samples, rate = value
        sound = np.asarray(samples, dtype=np.float32)
        if sound.ndim != 1 or not len(sound):
            raise DecodeError(f"samples of shape {sound.shape}: a sound is one channel, [samples]")
        sound = sound if rate == self.sample_rate else soxr.resample(sound, rate, self.sample_rate)
        return torch.from_numpy(sound).mul(32768).round().clamp(PADDING + 1, 32767).to(torch.int16)

    def transform(self, raw: Tensor, training: bool) -> Tensor:
        spare = len(raw) - self.length
        if spare >= 0:
            start = int(torch.randint(spare + 1, ())) if training else spare // 2
            return raw[start : start + self.length]
        late = int(torch.randint(min(self.shift, -spare) + 1, ())) if training else 0
        padded = torch.zeros(max(late + len(raw), self.window) if self.variable else self.length, dtype=torch.int16)
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
            frames = batch.unfold(1, self.window, self.hop).float() * (self.hann / 32768)
            spectrum = torch.fft.rfft(frames)
            power = spectrum.real.square().add_(spectrum.imag.square())
            mel = (power @ self.filters).add_(1e-6).log_()
            middle = mel.mean(1, keepdim=True) if self.center else -7.0  # −7 and 4: about unit variance for speech
            return mel.sub_(middle).div_(4).transpose(1, 2).unsqueeze(1)
