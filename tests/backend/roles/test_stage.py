from __future__ import annotations

import pytest
import torch

from paraserve_backend.protocol.forward import ForwardBatch, ForwardResult, Row
from paraserve_backend.protocol.sampling import Sampling
from tests.support.models import Chain, TinyModel, write_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [7, 11, 13, 17, 19, 23]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_model(tmp_path_factory.mktemp("stage"), "qwen3", seed=4)


def test_only_the_last_stage_chooses_tokens(model: TinyModel) -> None:
    first, last = Chain(model, [2, 3]).engines
    batch = prefill(Sampling())
    hidden = first.step(batch, torch.tensor(PROMPT))
    assert isinstance(hidden, torch.Tensor)
    assert hidden.shape == (len(PROMPT), model.spec.hidden_size)
    result = last.step(batch, hidden)
    assert isinstance(result, ForwardResult)
    assert list(result.token_ids) == model.greedy(PROMPT, 1)


def test_a_batch_without_sampling_chooses_nothing(model: TinyModel) -> None:
    result = Chain(model).step(prefill(None), PROMPT)
    assert result == ForwardResult(token_ids=(), logprobs=())


def test_log_probabilities_are_those_of_the_model(model: TinyModel) -> None:
    result = Chain(model, [4, 1]).step(prefill(Sampling(temperature=3.0, top_k=2, seed=1)), PROMPT)
    with torch.inference_mode():
        expected = model.oracle(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)
    assert result.logprobs[0] == pytest.approx(float(expected[result.token_ids[0]]), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_sampled_tokens_do_not_depend_on_the_cut_the_chunks_or_the_batch(
    model: TinyModel, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=50, top_p=0.95, seed=99)
    alone = Chain(model)
    expected = alone.generate(alone.request(PROMPT, sampling=sampling), 12)
    chain = Chain(model, [1, 2, 2])
    watched = chain.request(PROMPT, range(16), sampling)
    others = [
        chain.request([3] * 5, range(16, 32), Sampling(temperature=2.0, seed=1)),
        chain.request([8] * 9, range(32, 48)),
    ]
    while len(watched.ids) < len(PROMPT) + 12:
        chain.advance([others[0], watched, others[1]], chunk=4)
    assert watched.ids[len(PROMPT) :] == expected


def test_seeds_lead_to_different_texts(model: TinyModel) -> None:
    chain = Chain(model)
    texts = {
        tuple(
            chain.generate(chain.request(PROMPT, sampling=Sampling(temperature=1.5, seed=seed)), 8)
        )
        for seed in range(8)
    }
    assert len(texts) == 8


def prefill(sampling: Sampling | None) -> ForwardBatch:
    row = Row(start=0, num_tokens=len(PROMPT), block_table=(1, 0), sampling=sampling)
    return ForwardBatch(rows=(row,))
