"""Label Studio's brush masks: RGBA pixels in the bit-packed run lengths of thi.ng's rle-pack; not COCO's.

The bits, most significant first: 32 for the number of words, 5 for the size of a word less 1, four times 4 for the
sizes of a length less 1; then blocks. A block is 1 bit that says whether one word is repeated, 2 bits that choose the
size of the length, the length less 1, and its one word or all its words.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sa_engine.formats.model import FormatError

_CHANNELS = 4  # RGBA
_HEADER_BITS = 32 + 5 + 4 * 4
_LARGEST_WORD = 8
_WORD_BITS = 8
_LENGTH_BITS = (3, 4, 8, 16)  # as Label Studio itself has them
_LONGEST = 1 << 16


class _Blocks(NamedTuple):
    """All (N,) int64."""

    repeats: np.ndarray  # whether one word fills it
    starts: np.ndarray  # its first word
    bits: np.ndarray  # where its words are in the stream


def decode_brush(values: Sequence[int], height: int, width: int, where: str) -> np.ndarray:
    """Decode a brush mask: all pixels that are not wholly transparent, as Label Studio itself has it.

    Args:
        values: bytes of the stream.
        height, width: of the image.
        where: which mask it is, for messages.

    Returns:
        (H, W) bool.

    Raises:
        FormatError: no bytes, a stream that ends early, or of an image of another size.
    """
    if not isinstance(values, list) or not set(map(type, values)) <= {int}:
        raise FormatError(f"{where}: its rle is {str(values)[:60]!r}: expected a list of bytes")
    try:
        data = bytes(values)
    except ValueError:
        raise FormatError(f"{where}: its rle has numbers that are no bytes, 0 to 255") from None
    if len(data) * 8 < _HEADER_BITS:
        raise FormatError(f"{where}: its rle has {len(data)} bytes: expected 7 at least")
    header = int.from_bytes(data[:7], "big") >> (56 - _HEADER_BITS)
    words, word_bits = header >> 21, (header >> 16 & 31) + 1
    if words != height * width * _CHANNELS:
        raise FormatError(
            f"{where}: its rle has {words} values: expected {height * width * _CHANNELS} for the RGBA of an image "
            f"of {width} x {height} pixels"
        )
    if word_bits > _LARGEST_WORD:
        raise FormatError(f"{where}: its rle has values of {word_bits} bits: expected 8 at most")
    sizes = [(header >> shift & 15) + 1 for shift in (12, 8, 4, 0)]
    blocks = _split(data, words, word_bits, sizes, where)
    return (_alpha(data, words, word_bits, blocks) > 0).reshape(height, width)


def _split(data: bytes, words: int, word_bits: int, sizes: list[int], where: str) -> _Blocks:
    """Find the blocks; their words are left where they are."""
    repeats, starts, bits = [], [], []
    word, bit, end = 0, _HEADER_BITS, len(data) * 8
    while word < words:
        window = int.from_bytes(data[bit >> 3 : (bit >> 3) + 4].ljust(4, b"\0"), "big")
        window = window << (bit & 7) & 0xFFFFFFFF
        size = sizes[window >> 29 & 3]
        length = (window << 3 & 0xFFFFFFFF) >> (32 - size)
        repeat = window >> 31
        bit += 3 + size
        repeats.append(repeat)
        starts.append(word)
        bits.append(bit)
        word += length + 1
        bit += word_bits * (1 if repeat else length + 1)
        if bit > end:
            raise FormatError(
                f"{where}: its rle is cut off: {len(data)} bytes, and values from {starts[-1]} on of {words} are "
                "missing"
            )
    if word != words:
        raise FormatError(f"{where}: its rle has {word} values, and says that it has {words}")
    return _Blocks(*(np.array(one, np.int64) for one in (repeats, starts, bits)))


def _alpha(data: bytes, words: int, word_bits: int, blocks: _Blocks) -> np.ndarray:
    """The last of every four words: (words // 4,) uint8."""
    stream = np.frombuffer(data + b"\0", np.uint8)

    def read(bits: np.ndarray) -> np.ndarray:
        first = bits >> 3
        pair = stream[first].astype(np.uint16) << 8 | stream[first + 1]
        shift = (16 - word_bits - (bits & 7)).astype(np.uint16)
        return ((pair >> shift) & ((1 << word_bits) - 1)).astype(np.uint8)

    firsts = blocks.starts // _CHANNELS  # the pixels whose alpha is in a block start here
    counts = np.diff(firsts, append=words // _CHANNELS)
    alpha = np.repeat(read(blocks.bits), counts)
    literal = ~blocks.repeats.astype(bool)
    lengths = counts[literal]
    if lengths.any():
        begins = np.repeat(firsts[literal], lengths)
        within = np.arange(len(begins)) - np.repeat(lengths.cumsum() - lengths, lengths)
        pixels = begins + within
        offsets = pixels * _CHANNELS + _CHANNELS - 1 - np.repeat(blocks.starts[literal], lengths)
        alpha[pixels] = read(np.repeat(blocks.bits[literal], lengths) + offsets * word_bits)
    return alpha


def encode_brush(mask: np.ndarray) -> list[int]:
    """The inverse of `decode_brush`: pixels of 255 in all four channels, because an alpha of 1 cannot be seen.

    Args:
        mask: (H, W) bool.

    Returns:
        Bytes of the stream.
    """
    flat = mask.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0], edges])
    lengths = np.diff(np.append(starts, flat.size)) * _CHANNELS
    bits = [f"{flat.size * _CHANNELS:032b}{_WORD_BITS - 1:05b}"]
    bits += [f"{size - 1:04b}" for size in _LENGTH_BITS]
    for value, length in zip(flat[starts].tolist(), lengths.tolist(), strict=True):
        word = "1" * _WORD_BITS if value else "0" * _WORD_BITS
        for begin in range(0, length, _LONGEST):
            count = min(length - begin, _LONGEST) - 1
            which = next(i for i, size in enumerate(_LENGTH_BITS) if count < 1 << size)
            bits.append(f"1{which:02b}{count:0{_LENGTH_BITS[which]}b}{word}")
    stream = np.frombuffer("".join(bits).encode(), np.uint8) - ord("0")
    return np.packbits(stream).tolist()
