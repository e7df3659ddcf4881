"""Of every kind of damage, as much is found as was done."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable

import pytest

from paraserve_backend.byte_ranges import ByteRange
from paraserve_backend.weights.tiers.digests import DamagedPiece, DigestBook, DigestPiece

Damage = Callable[[bytearray, random.Random], None]


def _flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _lose_end(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content))
    content[at:] = bytes(len(content) - at)
    content[at] ^= 1  # were it zero before


def _lose_page(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content)) // 4096 * 4096
    content[at : at + 4096] = bytes(len(content[at : at + 4096]))


def _exchange_pages(content: bytearray, rng: random.Random) -> None:
    one, other = rng.sample(range(len(content) // 4096), 2)
    a, b = slice(one * 4096, one * 4096 + 4096), slice(other * 4096, other * 4096 + 4096)
    content[a], content[b] = content[b], content[a]


def _shift(content: bytearray, _: random.Random) -> None:
    content[:] = content[1:] + content[:1]


KINDS = (_flip, _lose_end, _lose_page, _exchange_pages, _shift)


@pytest.mark.parametrize("damage", KINDS)
def test_as_much_damage_is_found_as_was_done(damage: Damage) -> None:
    rng = random.Random(damage.__name__)
    book, found, done = DigestBook(), 0, 100
    for number in range(done):
        content = bytearray(rng.randbytes(rng.randrange(8192, 70_000)))
        byte_range = (number, number + len(content))
        book.learn("a", byte_range, memoryview(content))
        book.check("a", byte_range, memoryview(content))
        damage(content, rng)
        try:
            book.check("a", byte_range, memoryview(content))
        except DamagedPiece:
            found += 1
    assert found == done


def test_pieces_inside_what_comes_are_compared() -> None:
    content = bytearray(random.Random(1).randbytes(10_000))
    book = DigestBook()
    book.learn("a", (3000, 7000), memoryview(content)[3000:7000])
    content[4000] ^= 1
    with pytest.raises(DamagedPiece):
        book.check("a", (0, 10_000), memoryview(content))


@pytest.mark.parametrize(
    ("wanted", "damaged_at", "is_found"),
    [
        ((0, 5000), 1, False),  # it is told what was learnt, and sees it himself
        ((1000, 2000), 1500, True),
        ((1000, 2000), 4999, True),
        ((4000, 9000), 4500, True),
        ((4000, 9000), 7000, False),  # nobody has ever said what that is
    ],
)
def test_who_wants_a_part_of_a_piece_gets_none_of_a_damaged_one(
    wanted: ByteRange, damaged_at: int, is_found: bool
) -> None:
    content = bytearray(random.Random(1).randbytes(10_000))
    book = DigestBook()
    book.learn("a", (0, 5000), memoryview(content)[:5000])
    (learnt,) = book.of("a")
    content[damaged_at] ^= 1
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        if is_found:
            with pytest.raises(DamagedPiece):
                book.attest("a", wanted, file.fileno())
        elif wanted == (0, 5000):
            assert book.attest("a", wanted, file.fileno()) == learnt.digest
        else:
            book.attest("a", wanted, file.fileno())
        os.ftruncate(file.fileno(), wanted[0] + 1)
        if wanted != (0, 5000):
            with pytest.raises(DamagedPiece):
                book.attest("a", (wanted[0], wanted[1] - 1), file.fileno())


def test_the_store_is_right_about_its_own_bytes() -> None:
    book = DigestBook()
    book.learn("a", (0, 8), memoryview(b"12345678"))
    book.learn("a", (4, 8), memoryview(b"5678"))
    book.learn("a", (0, 8), memoryview(b"1234567x"))
    book.check("a", (0, 8), memoryview(b"1234567x"))
    assert {it.byte_range for it in book.of("a")} == {(0, 8)}  # what else was known is doubtful
    book.forget("a")
    book.add("a", [DigestPiece(start=0, end=2, digest=7)])
    with pytest.raises(DamagedPiece):
        book.check("a", (0, 2), memoryview(b"ab"))
