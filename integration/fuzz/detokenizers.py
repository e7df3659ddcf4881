"""Random token ids into text, by every kind of tokenizer, at every cut, across a hand-over."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from integration.fuzz.target import Case, WrongAnswer
from paraserve_backend.generation.answer import Answer
from paraserve_backend.generation.text import Detokenizer, StopWords
from paraserve_backend.protocol.sampling import ChosenToken, Ranking
from tests.support.odd_tokenizers import OddTokenizer, all_kinds

_ODD_IDS = (-1, 2**31, 2**32, 2**70)
_WORDS = ("a", " ", "\n", "e", "好", "\N{REPLACEMENT CHARACTER}", "Hello", "he", "<")


class Detokenizers:
    name = "detokenizers"

    def __init__(self) -> None:
        self._kinds = all_kinds()

    def case(self, rng: Random) -> Case:
        kind = rng.choice(self._kinds)
        prompt, answer = kind.sequence(rng, 8), kind.sequence(rng, 24)
        for _ in range(rng.choice((0, 0, 0, 1, 3))):
            answer.insert(rng.randint(0, len(answer)), rng.choice(_ODD_IDS))
        answer.append(rng.choice(kind.runs)[0])
        cut = rng.randrange(len(answer))
        words = tuple(rng.sample(_WORDS, rng.choice((0, 0, 1, 3))))

        async def run() -> None:
            _check_pieces(kind, prompt, answer, cut)
            _check_answer(kind, prompt, answer, cut, words)

        return Case(
            shown=f"{kind} prompt={prompt} answer={answer} cut={cut} words={words}", run=run
        )


def _check_pieces(
    kind: OddTokenizer, prompt: Sequence[int], answer: Sequence[int], cut: int
) -> None:
    detokenizer = Detokenizer(kind.tokenizer, list(prompt))
    early = "".join([detokenizer.add(token_id) for token_id in answer[:cut]])
    cut_here = early + detokenizer.held()
    whole = early + "".join([detokenizer.add(token_id) for token_id in answer[cut:]])
    whole += detokenizer.finish()
    if whole != (expected := kind.expected(prompt, answer)):
        raise WrongAnswer(f"{whole!r}, not {expected!r}")
    if cut_here != (expected := kind.expected(prompt, answer[:cut])):
        raise WrongAnswer(f"cut {cut_here!r}, not {expected!r}")


def _check_answer(
    kind: OddTokenizer,
    prompt: Sequence[int],
    answer: Sequence[int],
    cut: int,
    words: tuple[str, ...],
) -> None:
    """Compare what one replica sends with what two send, one after the other."""
    whole, _ = _sent(_answer(kind, prompt, words), answer)
    moved, has_ended = _sent(_answer(kind, prompt, words), answer[:cut], is_cut=True)
    if not has_ended:
        second = _answer(kind, prompt, words)
        second.replay(map(_chosen, answer[:cut]))
        moved += _sent(second, answer[cut:])[0]
    if moved != whole:
        raise WrongAnswer(f"handed over {moved!r}, not {whole!r}")
    text = kind.expected(prompt, answer)
    found = [at for word in words if (at := text.find(word)) >= 0]
    if whole != (expected := text[: min(found, default=len(text))]):
        raise WrongAnswer(f"answered {whole!r}, not {expected!r}")


def _answer(kind: OddTokenizer, prompt: Sequence[int], words: tuple[str, ...]) -> Answer:
    return Answer(
        detokenizer=Detokenizer(kind.tokenizer, list(prompt)),
        stop_words=StopWords(words),
        is_stream=True,
        prefix="",
        num_input_tokens=len(prompt),
    )


def _sent(answer: Answer, ids: Sequence[int], *, is_cut: bool = False) -> tuple[str, bool]:
    """Return the text that is sent for these tokens, and whether a stop word ended it."""
    text = ""
    for number, token_id in enumerate(ids, start=1):
        is_last = number == len(ids) and not is_cut
        delta = answer.add(_chosen(token_id), "length" if is_last else None)
        assert delta is not None
        text += delta.text
        if delta.finish_reason == "stop":
            return text, True
    return text, False


def _chosen(token_id: int) -> ChosenToken:
    ranking = Ranking(rank=2, token_ids=(5, 300), logprobs=(-0.25, -0.75))
    return ChosenToken(token_id=token_id, logprob=-0.5, ranking=ranking)
