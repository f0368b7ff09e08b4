"""Speaks names by espeak-ng, whose library and voices ship in the wheel `espeakng-loader`, called through ctypes."""

import ctypes
from functools import cache

import espeakng_loader
import numpy as np
import soxr

SAMPLE_RATE = 16_000
_NATIVE_RATE = 22_050
TRAIN_VOICES = tuple(
    f"{accent}+{speaker}"
    for accent in ("en-us", "en", "en-gb-scotland", "en-gb-x-rp")
    for speaker in ("m1", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f4", "f5")
)
HELD_OUT_VOICES = ("en-us+m2", "en+f3")
_SYNCHRONOUS, _UTF8, _RATE, _SUCCESS = 2, 1, 1, 0  # constants of speak_lib.h


class Speaker:
    """A voice whose `say(text, voice, words_per_minute)` returns the speech as int16 at `SAMPLE_RATE`. One per process: the
    library is not re-entrant."""

    def __init__(self) -> None:
        self.chunks: list[np.ndarray] = []
        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        if self.library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0) != _NATIVE_RATE:
            raise RuntimeError(f"espeak-ng did not start with its voices in {data.decode()}")
        receiver = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.receiver = receiver(self._receive)  # kept alive: the library holds only its address
        self.library.espeak_SetSynthCallback(self.receiver)

    def _receive(self, samples, count: int, _events) -> int:
        if samples and count:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, words_per_minute: int) -> np.ndarray:
        self.chunks.clear()
        if self.library.espeak_SetVoiceByName(voice.encode()) != _SUCCESS:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        self.library.espeak_SetParameter(_RATE, words_per_minute, 0)
        data = text.encode()
        self.library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, _UTF8, None, None)
        return soxr.resample(np.concatenate(self.chunks), _NATIVE_RATE, SAMPLE_RATE)


speaker = cache(Speaker)  # the one of this process: a second would take the first one's sound
