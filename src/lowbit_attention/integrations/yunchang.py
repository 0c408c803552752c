"""A recipe as yunchang's attention processor: ``LongContextAttention(attn_type="lowbit", attn_processor=…)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..call.request import OnEmulation
from ..call.torch_call import TorchCall
from ..errors import UnsupportedError, shown
from ..recipes.definition import Recipe
from ..recipes.machine import Machine
from .rerouting import Rerouter


class attn_processor:
    """What yunchang calls for each block of keys, by a recipe.

    Args:
        recipe, like, on_emulation: as in `attention`.

    Attributes:
        report: a `CallReport` that counts the blocks.

    Give ``attn_type`` a value that is none of yunchang's own ("lowbit"): those it looks up before it looks at the
    processor.

    >>> import torch
    >>> process = attn_processor("sage2_8b")  # LongContextAttention(attn_type="lowbit", attn_processor=process)
    >>> q = k = v = torch.randn(1, 64, 2, 32)
    >>> out, lse = process(q, k, v, softmax_scale=0.2, causal=True)
    >>> out.shape, lse.shape
    (torch.Size([1, 64, 2, 32]), torch.Size([1, 2, 64]))

    Raises:
        InvalidArgumentError, InvalidRecipeError: a wrong argument, an unknown recipe.
    """

    def __init__(
        self, recipe: str | Recipe = "auto", *, like: str | Machine | None = None, on_emulation: OnEmulation = "warn"
    ) -> None:
        self._rerouter = Rerouter(recipe, like=like, training="refuse", on_emulation=on_emulation)
        self.report = self._rerouter.report

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float | None = 0.0,
        alibi_slopes: Tensor | None = None,
        return_softmax: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """One block, in flash-attn's words: ``[B, N, H, D]`` (NHD) → the output, and lse float32 ``[B, Hq, N]``.

        Raises:
            UnsupportedError: gradients, dropout, a window, a soft cap, ALiBi, or a word that nobody here knows.
        """
        asked = {"softcap": softcap, "return_softmax": return_softmax, **others}
        said = [f"{name}={shown(value)}" for name, value in asked.items() if value is not None and value]
        said += [] if tuple(window_size) == (-1, -1) else [f"window_size={shown(window_size)}"]
        said += [] if alibi_slopes is None else ["alibi_slopes"]
        if said:
            raise UnsupportedError(f"{', '.join(said)}: a recipe in yunchang's attention has no such option")
        query, key, value = (t.transpose(1, 2) for t in (q, k, v))
        gqa = query.shape[1] != key.shape[1]
        if causal and query.shape[2] != key.shape[2]:
            raise UnsupportedError(
                f"causal with {query.shape[2]} queries and {key.shape[2]} keys: lengths must be equal"
            )
        call = TorchCall(query, key, value, None, dropout_p, causal, softmax_scale, gqa)
        out, lse = self._rerouter.answer_with_lse(call)
        return out.transpose(1, 2).contiguous(), lse
