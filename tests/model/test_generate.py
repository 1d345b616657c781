"""Sampling: the same tokens in any company, options that cut what they say, and how a sequence ends."""

import numpy as np
import pytest
import torch

from tritium.model.config import ModelConfig
from tritium.model.generate import generate
from tritium.model.sampling import Options, Sampler
from tritium.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("quick")
SHAPE = ModelConfig(48, 32, 48, 2, 4, 2, 8, max_positions=64, init_std=0.3)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(SHAPE, dtype=torch.float32).initialize(0)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of 1 to 20 tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 48, rng.integers(1, 21)).tolist() for _ in range(count)]


def tokens(completions) -> list[list[int]]:
    return [c.tokens for c in completions]


def test_greedy_is_the_argmax_of_the_training_forward(model):
    for prompt, completion in zip(prompts(4), generate(model, prompts(4), max_tokens=10, temperature=0), strict=True):
        ids = list(prompt)
        for token in completion.tokens:
            assert token == model.logits(torch.tensor(ids))[-1].argmax()
            ids.append(token)


@pytest.mark.parametrize("max_batch", [1, 2, 3, 100])
def test_tokens_do_not_depend_on_the_batch(model, max_batch):
    asked = prompts(7)
    options = {"max_tokens": 12, "stop_ids": [5, 6], "top_k": 20, "top_p": 0.95}
    together = generate(model, asked, seed=list(range(7)), max_batch=max_batch, **options)
    for i, completion in enumerate(together):
        (alone,) = generate(model, [asked[i]], seed=[i], **options)
        assert completion.tokens == alone.tokens and completion.finish_reason == alone.finish_reason
        np.testing.assert_allclose(completion.logps, alone.logps, rtol=0, atol=1e-5)
    order = [3, 0, 6, 2, 5, 1, 4]
    shuffled = generate(model, [asked[i] for i in order], seed=order, max_batch=max_batch, **options)
    assert tokens(shuffled) == [together[i].tokens for i in order]
    assert len({len(c.tokens) for c in together}) > 1  # some ended early and made room


def test_a_seed_for_all_gives_each_sample_its_own(model):
    same = [prompts(1)[0]] * 2
    found = tokens(generate(model, same, n=3, max_tokens=8, seed=7))
    assert len({tuple(t) for t in found}) == 6
    assert tokens(generate(model, same, n=3, max_tokens=8, seed=7)) == found
    assert tokens(generate(model, same, n=3, max_tokens=8, seed=8)) != found
    assert tokens(generate(model, same[:1], n=3, max_tokens=8, seed=7)) == found[:3]


def test_neighbouring_large_seeds_are_different_seeds(model):
    seeds = [2**63 + 5, 2**63 + 6, 2**64 - 1]  # they were once rounded to multiples of 2048
    found = tokens(generate(model, [[1, 2]], n=3, max_tokens=12, seed=seeds))
    assert len({tuple(t) for t in found}) == 3


def test_samples_follow_the_models_distribution():
    small = Transformer(ModelConfig(8, 16, 16, 1, 2, 1, 8, max_positions=64, init_std=0.5)).initialize(0)
    drawn = [c.tokens[0] for c in generate(small, [[3, 1]], n=4000, max_tokens=1, temperature=0.7, max_batch=4000)]
    wanted = (small.logits(torch.tensor([3, 1]))[-1] / 0.7).softmax(-1).detach().numpy()
    observed = np.bincount(drawn, minlength=8) / 4000
    assert np.abs(observed - wanted).max() < 4 * np.sqrt(0.25 / 4000)


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])  # probabilities 0.64, 0.24, 0.09, 0.03, 1e-5


UNIFORMS = torch.cat([torch.linspace(0, 1, 2001)[:-1], torch.tensor([1 - 2**-24])])


def kept(**options) -> set[int]:
    """The tokens that a sampler can draw, by sweeping the uniform number."""
    sampler = Sampler([Options(**options)] * len(UNIFORMS))
    return set(sampler(LOGITS.expand(len(UNIFORMS), -1), UNIFORMS).tokens.tolist())


def test_top_k_and_top_p_cut_the_tail():
    assert kept() == {0, 1, 2, 3, 4}
    assert kept(top_k=2) == {0, 1}
    assert kept(top_k=9) == {0, 1, 2, 3, 4}
    assert kept(top_p=0.6) == {0}
    assert kept(top_p=0.7) == {0, 1}
    assert kept(top_p=0.95) == {0, 1, 2}
    assert kept(top_p=0.95, top_k=2) == {0, 1}
    assert kept(top_p=0.7, temperature=3.0) == {0, 1, 2}
    assert kept(min_p=0.3) == {0, 1} == kept(min_p=0.3, top_p=0.95) and kept(min_p=0.1) == {0, 1, 2}
    assert kept(temperature=0) == {0}


def test_logps_are_the_policys_own_whatever_was_cut():
    sampler = Sampler([Options(temperature=0.5, top_k=1)])
    token, logp, sampled = sampler(LOGITS, torch.tensor([0.3]))
    assert token == 0 and sampled == 0 and logp.item() == pytest.approx(LOGITS.log_softmax(-1)[0, 0].item(), abs=1e-6)


def test_how_a_sequence_ends(model):
    (free,) = generate(model, [[1, 2, 3]], max_tokens=10, temperature=0)
    assert free.finish_reason == "length" and len(free.tokens) == 10
    stop = free.tokens[4]
    (stopped,) = generate(model, [[1, 2, 3]], max_tokens=10, temperature=0, stop_ids=[stop])
    assert stopped.finish_reason == "stop" and stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    (full,) = generate(model, [[1] * 60], max_tokens=10, temperature=0)
    assert full.finish_reason == "context" and len(full.tokens) == 4  # 64 positions in all


def test_a_model_with_a_short_context_generates(model):
    short = Transformer(ModelConfig(**vars(SHAPE) | {"max_positions": 8})).initialize(0)
    found = generate(short, [[1, 2, 3], [4]], max_tokens=20, temperature=0)
    assert [(len(c.tokens), c.finish_reason) for c in found] == [(5, "context"), (7, "context")]
    for prompt, tokens in zip(([1, 2, 3], [4]), (c.tokens for c in found), strict=True):
        expected = generate(model, [prompt], max_tokens=len(tokens), temperature=0)[0].tokens
        assert tokens == expected  # the same weights, with room
        short.hidden(torch.tensor(prompt + tokens))  # what was drawn can be trained on


def test_the_models_eos_stops_where_no_other_is_named():
    ends = Transformer(ModelConfig(**vars(SHAPE) | {"eos_id": 3})).initialize(0)
    found = generate(ends, prompts(20), max_tokens=60, temperature=2.0)
    assert any(c.finish_reason == "stop" for c in found)
    assert all((3 in c.tokens) == (c.finish_reason == "stop") and 3 not in c.tokens[:-1] for c in found)


def test_tokens_are_told_as_they_come(model):
    told: dict[int, list[int]] = {}
    found = generate(
        model, prompts(3), n=2, max_tokens=5, max_batch=2, on_token=lambda i, t: told.setdefault(i, []).append(t)
    )
    assert [told[i] for i in range(6)] == tokens(found)


@pytest.mark.parametrize(
    ("asked", "options", "words"),
    [
        ([[]], {}, "prompt 0: the prompt is empty"),
        ([[1], [1] * 64], {}, "prompt 1: the prompt has 64 tokens; the model's context is 64"),
        ([[1]], {"max_tokens": 0}, "max_tokens=0"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"seed": [1, 2]}, "2 seeds for 1 samples"),
    ],
)
def test_requests_that_cannot_be(model, asked, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model, asked, **options)


def test_nothing_asked_nothing_given(model):
    assert generate(model, []) == []
