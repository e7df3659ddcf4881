"""Small tokenizers of every kind that models have, each with the text that its tokens must make.

That text is worked out from the tokens' own bytes and rules, never by the tokenizers library.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SPECIAL = ("<s>", "</s>", "<pad>")
#: Ids that no tokenizer here has: in a gap or just behind it, and far away.
UNKNOWN_IDS = (100_000, 4_000_000_000)

#: Bytes that are common where characters are broken: whole, half and impossible ones.
_BROKEN = (
    "🌶".encode(),
    "好".encode(),
    "é".encode(),
    b"\n",
    b" ",
    b"\xf0\x9f",
    b"\xe5\xa5",
    b"\xc3",
    b"\x80",
    b"\xff",
    b"\xed\xa0\x80",
    b"\xc0\xaf",
    b"\xf4\x90\x80\x80",
    b"\xef\xbf\xbd",
)


@dataclass(frozen=True, kw_only=True)
class OddTokenizer:
    name: str
    tokenizer: Tokenizer
    #: The ids of the tokens that give no text wherever they stand, of those that it has.
    silent: frozenset[int]
    #: The text of an answer, and whether text comes before it.
    text: Callable[[Sequence[int], bool], str]
    #: Runs of ids that random sequences are made of.
    runs: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        return self.name

    def id(self, token: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        assert token_id is not None, token
        return token_id

    def ids(self, *tokens: str) -> list[int]:
        return [self.id(token) for token in tokens]

    def expected(self, prompt: Sequence[int], answer: Sequence[int]) -> str:
        known = self.tokenizer.get_vocab_size()
        loud = [i for i in answer if 0 <= i < known and i not in self.silent]
        follows = any(0 <= i < known and i not in self.silent for i in prompt)
        return self.text(loud, follows)

    def sequence(self, rng: random.Random, longest: int) -> list[int]:
        """Return random ids: single ones, broken and whole characters, silent and unknown ones."""
        ids: list[int] = []
        length = rng.randint(0, longest)
        vocabulary = self.tokenizer.get_vocab_size()
        while len(ids) < length:
            dice = rng.random()
            if dice < 0.45:
                ids.append(rng.randrange(vocabulary))
            elif dice < 0.9:
                ids.extend(rng.choice(self.runs))
            elif dice < 0.97:
                ids.append(rng.choice(tuple(self.silent)))
            else:
                ids.append(rng.choice(UNKNOWN_IDS))
        return ids


def _finished(
    name: str,
    tokenizer: Tokenizer,
    text: Callable[[Sequence[int], bool], str],
    runs: Sequence[Sequence[int]],
) -> OddTokenizer:
    silent = frozenset(i for token in SPECIAL if (i := tokenizer.token_to_id(token)) is not None)
    return OddTokenizer(
        name=name,
        tokenizer=tokenizer,
        silent=silent,
        text=text,
        runs=tuple(tuple(run) for run in runs),
    )


def _numbered(tokens: Sequence[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def byte_letters() -> list[str]:
    """Return the letter that byte-level tokenizers write for each byte (GPT-2's table)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_level() -> OddTokenizer:
    """As GPT-2, Llama 3 and Qwen: a token is bytes, and may end anywhere in a character."""
    letters = byte_letters()
    bytes_of = {letter: byte for byte, letter in enumerate(letters)}
    rng = random.Random(5)
    texts = ["Hello", " world", "nd", "v", " the", " 好", "a🌶", REPLACEMENT, "<0x41>"]
    pieces = [text.encode() for text in texts]
    pieces += [b"\xf0\x9f", b"\x8c\xb6", b" \xf0\x9f\x8c", b"\xb6 x"]
    pieces += [b"  ", b"\n\n"] + [rng.randbytes(rng.randint(2, 5)) for _ in range(60)]
    spelled = ["".join(letters[byte] for byte in piece) for piece in pieces]
    vocabulary = _numbered([*SPECIAL, *letters, *spelled, ""])
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(["<think>"])
    vocabulary["<think>"] = tokenizer.get_vocab_size() - 1
    tokens = {token_id: bytes(bytes_of[c] for c in token) for token, token_id in vocabulary.items()}

    def text(ids: Sequence[int], follows: bool) -> str:
        return b"".join(tokens[i] for i in ids).decode("utf-8", "replace")

    runs = [[vocabulary[letters[byte]] for byte in piece] for piece in _BROKEN]
    return _finished("byte-level", tokenizer, text, runs)


def byte_fallback(name: str, *, strips: bool) -> OddTokenizer:
    """As Llama 2, Mistral and Phi-3, which strip a space, and Gemma, which does not."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁▁", "e", "v", "T", "▁Hello", "Hello", "▁wor", "ld", "好", "é", "🌶", "<0x", ">"]
    words += [REPLACEMENT, f"▁{REPLACEMENT}", f"a{REPLACEMENT}", "<0xZZ>", "\n", "▁.", "e▁"]
    vocabulary = _numbered([*SPECIAL, *bytes_, *words, ""])
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strips:
        chain.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(chain)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokens = {token_id: token for token, token_id in vocabulary.items()}
    values = {vocabulary[token]: byte for byte, token in enumerate(bytes_)}

    def text(ids: Sequence[int], follows: bool) -> str:
        made, run = "", b""
        for token_id in [*ids, None]:
            if token_id in values:
                run += bytes([values[token_id]])
                continue
            made += _run_text(run)
            run = b""
            made += "" if token_id is None else tokens[token_id].replace("▁", " ")
        return made.removeprefix(" ") if strips and not follows else made

    runs = [[vocabulary[bytes_[byte]] for byte in piece] for piece in _BROKEN]
    return _finished(name, tokenizer, text, [*runs, [vocabulary["▁"]] * 3])


def _run_text(run: bytes) -> str:
    try:
        return run.decode()
    except UnicodeDecodeError:
        return REPLACEMENT * len(run)


def metaspace() -> OddTokenizer:
    """As T5 and other Unigram models: the first token of a text loses its spaces."""
    words = ["▁", "▁▁", "▁the", "▁cat", "s", "▁好", "🌶", "▁a▁b", REPLACEMENT, "<0x41>"]
    scored = [(token, -float(number)) for number, token in enumerate([*SPECIAL, *words])]
    tokenizer = Tokenizer(Unigram(scored, unk_id=0))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokens = [token for token, _ in scored]

    def text(ids: Sequence[int], follows: bool) -> str:
        first = "" if follows or not ids else tokens[ids[0]].replace("▁", "")
        rest = ids if follows else ids[1:]
        return first + "".join(tokens[i].replace("▁", " ") for i in rest)

    start = len(SPECIAL)
    return _finished("metaspace", tokenizer, text, [[start] * 4, [start + 2, start + 4]])


def word_piece() -> OddTokenizer:
    """As BERT's family: a token that continues no word brings a space, but not before a comma."""
    words = ["hello", "##s", "wor", "##ld", ",", ".", "n't", "##好", REPLACEMENT, "[UNK]"]
    vocabulary = _numbered([*SPECIAL, *words])
    tokenizer = Tokenizer(WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokens = {token_id: token for token, token_id in vocabulary.items()}

    def piece(token: str) -> str:
        if token.startswith("##"):
            return token.removeprefix("##")
        return token if token in {",", ".", "n't"} else f" {token}"

    def text(ids: Sequence[int], follows: bool) -> str:
        first = "" if follows or not ids else tokens[ids[0]]
        return first + "".join(piece(tokens[i]) for i in (ids if follows else ids[1:]))

    start = len(SPECIAL)
    return _finished("word-piece", tokenizer, text, [[start, start + 1], [start + 2, start + 3]])


def words_alone() -> OddTokenizer:
    """A tokenizer without a decoder: words with spaces between them."""
    vocabulary = _numbered([*SPECIAL, "a", "b", "好", REPLACEMENT, "<0x41>"])
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokens = {token_id: token for token, token_id in vocabulary.items()}

    def text(ids: Sequence[int], follows: bool) -> str:
        return "".join(f" {tokens[i]}" for i in ids).removeprefix("" if follows else " ")

    return _finished("words-alone", tokenizer, text, [[len(SPECIAL)] * 2])


def all_kinds() -> tuple[OddTokenizer, ...]:
    return (
        byte_level(),
        byte_fallback("byte-fallback", strips=True),
        byte_fallback("byte-fallback-without-strip", strips=False),
        metaspace(),
        word_piece(),
        words_alone(),
    )
