"""How a tensor comes out of others that are stored packed: one module a format.

A format is found in the base's ``quantization_config``; it makes a decoding of each packed module,
which knows what it reads and what comes out. (``nf4`` unpacks nothing: it rounds what is there.) A
worker loads it and takes the rows that it needs, so that no decoded tensor is ever whole in memory.
To add a format is to write its module and to name it here and in ``merge_core.quantised``.
"""

from __future__ import annotations

from merge_core.decoding.awq import AwqDecoding
from merge_core.decoding.awq_gemv import GemvDecoding, GemvFastDecoding
from merge_core.decoding.four_bit import FourBitDecoding
from merge_core.decoding.fp8 import Fp8Decoding
from merge_core.decoding.gptq import GptqDecoding
from merge_core.decoding.int8 import Int8Decoding
from merge_core.decoding.nf4 import Nf4Rounding

Decoding = (
    GptqDecoding
    | AwqDecoding
    | GemvDecoding
    | GemvFastDecoding
    | FourBitDecoding
    | Int8Decoding
    | Fp8Decoding
    | Nf4Rounding
)
"""All of them carry a ``kind``, what they read as ``stored``, the ``shape`` and ``dtype`` that come
out, and ``load`` what the rows are decoded from."""

__all__ = [
    "AwqDecoding", "Decoding", "FourBitDecoding", "Fp8Decoding", "GemvDecoding", "GemvFastDecoding",
    "GptqDecoding", "Int8Decoding", "Nf4Rounding",
]  # fmt: skip
