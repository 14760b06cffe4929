"""Smaller forms of KV for slow links and lower tiers: `none`, `fp8`, `int8`, `int4`."""

from __future__ import annotations

from bascule.errors import ConfigError
from bascule.kv.codecs.base import EXACT, Codec
from bascule.kv.codecs.exact import ExactCodec
from bascule.kv.codecs.floats import FORMS
from bascule.kv.codecs.fp8 import Fp8Planes
from bascule.kv.codecs.grouped import Int4Planes, Int8Planes, of_keys, of_values
from bascule.kv.codecs.lossy import LossyCodec, PlaneCoder
from bascule.kv.codecs.native import compiled
from bascule.types import KVLayout

NAMES = (EXACT, "fp8", "int8", "int4")
"""New ones go to the end: frames of the TCP transport name a codec by its place here."""


def codec_named(name: str, layout: KVLayout) -> Codec:
    """The codec `name` for blocks of `layout`; raises ConfigError if there is none or it cannot represent them."""
    if name not in NAMES:
        raise ConfigError(f"there is no codec {name!r}; use one of {', '.join(NAMES)}")
    if name == EXACT:
        return ExactCodec(layout)
    form = FORMS.get(layout.dtype)
    if form is None:
        raise ConfigError(f"codec {name} needs KV of {', '.join(FORMS)}, and this KV is {layout.dtype}; use none")
    numbers = layout.kv_heads * layout.head_dim
    if layout.planes != 2 * layout.layers or layout.token_bytes != numbers * form.bits.itemsize:
        raise ConfigError(
            f"codec {name} needs a plane of keys and one of values a layer, which {layout} has not; use none"
        )
    if name == "fp8":
        planes = Fp8Planes(form, layout.block_size * numbers)
        return LossyCodec(name, layout, planes, planes)
    kind = Int8Planes if name == "int8" else Int4Planes
    groupings = of_keys(layout), of_values(layout)
    try:
        coders: list[PlaneCoder] = [kind(form, grouping) for grouping in groupings]
    except ValueError as error:
        raise ConfigError(f"codec {name} cannot represent this KV: {error}; use int8 or none") from error
    if layout.dtype == "bfloat16":
        coders = [compiled(kind(form, grouping), grouping) for grouping in groupings]
    return LossyCodec(name, layout, *coders)
