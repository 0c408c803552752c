"""Small trained models whose attention is worth quantising: a language model, a diffusion transformer, an encoder.

docs/subjects.md says what they are, what they were trained on and how to train them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowbit_attention import InvalidArgumentError

if TYPE_CHECKING:
    from .base import Subject

SUBJECTS = ("lm", "dit", "minilm")


def load_subject(name: str, **options: Any) -> Subject:
    """A subject by its name, with its class's options.

    Raises:
        InvalidArgumentError: an unknown name, or no weights. MissingExtraError: the encoder without the extra ``demo``.
    """
    if name == "lm":
        from .lm import LanguageSubject

        return LanguageSubject(**options)
    if name == "dit":
        from .dit import DiffusionSubject

        return DiffusionSubject(**options)
    if name == "minilm":
        from .encoder import EncoderSubject

        return EncoderSubject(**options)
    raise InvalidArgumentError(f"no subject {name!r}; known: {', '.join(SUBJECTS)}")
