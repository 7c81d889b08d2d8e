"""How a block's payload is coded, one layer at a time, straight in the arenas that other workers read.

`raw` keeps the model's dtype and is the exact control; `zip` is ours, and attended over as it is; `int8`, `int4` and
`zipcache` are the rivals, decoded before each use.
"""

from zipserve.common.kv.layout import Layout
from zipserve.engine.codec.arenas import TORCH_DTYPES, Arenas
from zipserve.engine.codec.interface import REFUSALS, Codec, Sealed, decoded
from zipserve.engine.codec.raw import RawCodec
from zipserve.engine.codec.uniform import Int4Codec, Int8Codec
from zipserve.engine.codec.zip import ZipCodec
from zipserve.engine.codec.zipcache import ZipCacheCodec

__all__ = ["REFUSALS", "TORCH_DTYPES", "Arenas", "Codec", "Sealed", "codec_for", "decoded"]

_CODECS: dict[str, type[Codec]] = {
    "raw": RawCodec,
    "int8": Int8Codec,
    "int4": Int4Codec,
    "zipcache": ZipCacheCodec,
    "zip": ZipCodec,
}


def codec_for(layout: Layout, arenas: Arenas) -> Codec:
    """The codec that a layout names, over the arenas of a worker."""
    return _CODECS[layout.codec.partition("-")[0]](layout, arenas)
