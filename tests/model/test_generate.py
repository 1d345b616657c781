"""Sampling: the same tokens in any company, options that cut what they say, and how a sequence ends."""

import gc
import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tritium.core.rollout import SamplingConfig
from tritium.model.adapters import attach
from tritium.model.beam import beam_search
from tritium.model.cache import PagedCache
from tritium.model.config import ModelConfig
from tritium.model.generate import Engine, Running, generate, run
from tritium.model.lora import LoraConfig, merge
from tritium.model.packed import PackedWeights
from tritium.model.sampling import History, Options, Sampler, invert
from tritium.model.stops import Text
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import init_mesh

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


def check_logps(model, asked, completions) -> None:
    """Against those of the training forward: to rounding."""
    bf16 = model.dtype == torch.bfloat16
    for prompt, completion in zip(asked, completions, strict=True):
        ids = torch.tensor(prompt + completion.tokens)
        expected = model.logprob(model.hidden(ids[:-1]), ids[1:]).logp[len(prompt) - 1 :].detach().numpy()
        np.testing.assert_allclose(completion.logps, expected, rtol=0, atol=0.2 if bf16 else 1e-5)
        assert np.abs(completion.logps - expected).mean() < 0.08


@pytest.mark.parametrize("count", [3, 20])  # in bf16, and where that is faster in fp32
def test_bf16_logps_are_those_of_the_training_forward_to_rounding(count):
    model = Transformer(SHAPE, dtype=torch.bfloat16).initialize(0)
    check_logps(model, prompts(count), generate(model, prompts(count), max_tokens=12, stop_ids=[]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_a_step_of_training_has_changed_are_those_that_generate(dtype):
    model = Transformer(SHAPE, dtype=dtype).initialize(0)
    other = Transformer(SHAPE, dtype=dtype).initialize(1)
    engine = Engine(model, 100, max_batch=20)
    for change in (None, Tensor.copy_, lambda p, q: p.data.copy_(q.data / 2)):  # the last unseen by autograd
        for p, q in zip(model.parameters(), other.parameters(), strict=True) if change else ():
            with torch.no_grad():
                change(p, q)
        engine = engine if change is Tensor.copy_ else Engine(model, 100, max_batch=20)
        made = [engine.submit(p, Options(max_tokens=8, stop_ids=[]), [(0, i)])[0] for i, p in enumerate(prompts(18))]
        list(run(engine))
        check_logps(model, prompts(18), [s.completion for s in made])


def test_weights_that_lie_anywhere_in_a_flat_buffer_generate():
    """From an odd place on, their bits were read eight bytes at a time: that is an error."""
    model = Transformer(SHAPE, dtype=torch.float32).initialize(0)
    expected = generate(model, prompts(2), max_tokens=5)
    for p in model.parameters():
        p.data = torch.cat([p.data.new_zeros(1), p.data.flatten()])[1:].view(p.shape)
    assert tokens(generate(model, prompts(2), max_tokens=5)) == tokens(expected)


def test_packed_weights_go_with_the_parameters_that_they_are_of(monkeypatch):
    """Of a merged model the old ones are dropped; without oneDNN (a Mac) there are none."""
    model = Transformer(SHAPE).initialize(0)
    before = PackedWeights.of(model)
    assert before is not None and PackedWeights.of(model) is before
    attach(model, LoraConfig(2))
    merge(model)
    after = PackedWeights.of(model)
    assert after.own.keys() == {id(p) for p in model.parameters() if p.dim() == 2}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert PackedWeights.of(model) is None
    check_logps(model, prompts(3), generate(model, prompts(3), max_tokens=5, stop_ids=[]))


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
    token, logp, sampled, *_ = sampler(LOGITS, torch.tensor([0.3]))
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


# The cache ------------------------------------------------------------------------------------------------------------


def engine_for(asked, pages: int, n: int = 1, **options):
    engine = Engine(asked[0], pages, max_batch=16, decoder=options.pop("decoder", None))
    made = [engine.submit(p, Options(**options), [(i, j) for j in range(n)]) for i, p in enumerate(asked[1])]
    return engine, [s for samples in made for s in samples]


def test_where_pages_run_out_sequences_give_way_and_nothing_changes(model):
    asked, options = prompts(6, seed=3), {"max_tokens": 40, "stop_ids": []}
    roomy, expected = engine_for((model, asked), 200, **options)
    list(run(roomy))
    tight, found = engine_for((model, asked), 8, **options)  # 112 tokens for six sequences of up to 60
    most, restarts, running = 0, 0, []
    while tight.busy:
        tight.step()
        restarts += sum(s not in tight.running and not s.completion.finish_reason for s in running)
        running = list(tight.running)
        most = max(most, tight.cache.usable - len(tight.cache.free))
    assert restarts and most <= 7 and tight.cache.pages.shape[2] == 8
    assert [s.completion.tokens for s in found] == [s.completion.tokens for s in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.completion.logps, other.completion.logps, rtol=0, atol=1e-5)
    assert sorted(tight.cache.free) == list(range(1, 8)) and not any(tight.cache.uses)


def test_the_cache_takes_the_memory_that_it_was_given_and_no_more(model):
    for megabytes in (0.1, 0.05):
        pages = SamplingConfig(cache_mb=megabytes).pages(model)
        engine, _ = engine_for((model, prompts(8)), pages, n=2, max_tokens=40, stop_ids=[])
        size, place = engine.cache.pages.nbytes, engine.cache.pages.data_ptr()
        assert size == pages * PagedCache.page_bytes(model)
        assert megabytes * 1e6 - PagedCache.page_bytes(model) < size <= megabytes * 1e6
        list(run(engine))
        assert (engine.cache.pages.nbytes, engine.cache.pages.data_ptr()) == (size, place)


@pytest.mark.parametrize("length", [2, 15, 16, 17, 33])
@pytest.mark.parametrize("pages", [60, 7])
def test_samples_of_a_prompt_read_it_once_and_share_its_pages(model, length, pages):
    prompt = np.random.default_rng(5).integers(0, 48, length).tolist()
    options = {"max_tokens": 8, "stop_ids": []}
    engine, made = engine_for((model, [prompt]), pages, n=5, **options)
    read = []
    stream = engine.stream
    engine.stream = lambda parts: read.append(sum(n for _, n in parts)) or stream(parts)
    engine.step()
    engine.admit()
    shared = (length - 1) // 16
    if pages == 60:
        assert len(engine.running) == 5
        assert engine.cache.usable - len(engine.cache.free) == shared + 5 * (-(-length // 16) - shared)
    list(run(engine))
    for j, sequence in enumerate(made):
        alone, (single,) = engine_for((model, [prompt]), 60, **options)
        single.draws = sequence.draws
        list(run(alone))
        assert sequence.completion.tokens == single.completion.tokens, j
        np.testing.assert_allclose(sequence.completion.logps, single.completion.logps, rtol=0, atol=1e-5)
    assert read == [length] or pages == 7
    assert len(engine.cache.free) == engine.cache.usable


def test_long_prompts_are_read_in_parts(model, monkeypatch):
    asked = [[(7 * i + j) % 48 for j in range(n)] for i, n in enumerate((40, 5, 23, 1, 30))]
    expected = generate(model, asked, max_tokens=9, temperature=0)
    monkeypatch.setattr("tritium.model.generate.PREFILL_TOKENS", 16)
    found = generate(model, asked, max_tokens=9, temperature=0)
    assert tokens(found) == tokens(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, rtol=0, atol=1e-5)


def test_a_request_that_can_never_fit_is_refused_and_the_others_go_on(model):
    engine, (one,) = engine_for((model, [[1, 2, 3]]), 3, max_tokens=20)
    with pytest.raises(ValueError, match="10 tokens and up to 30 new ones do not fit the cache, which holds 32"):
        engine.submit([1] * 10, Options(max_tokens=30), [(0, 0)])
    with pytest.raises(ValueError, match="stop_ids: there is no token 48 in a vocabulary of 48"):
        engine.submit([1], Options(stop_ids=[48]), [(0, 0)])
    with pytest.raises(ValueError, match="ids are 1 to 48; the vocabulary has 48"):
        engine.submit([1, 48], Options(), [(0, 0)])
    list(run(engine))
    assert one.completion.finish_reason == "length"


def test_a_cancelled_sequence_leaves_its_pages_and_the_others_alone(model):
    asked = prompts(3)
    engine, made = engine_for((model, asked), 100, n=2, max_tokens=12, stop_ids=[])
    engine.step()
    for sequence in (made[0], made[3], made[5]):
        engine.cancel(sequence)
    list(run(engine))
    assert len(engine.cache.free) == engine.cache.usable and made[0].completion.finish_reason == "cancelled"
    alone, expected = engine_for((model, asked), 100, n=2, max_tokens=12, stop_ids=[])
    list(run(alone))
    assert [made[i].completion.tokens for i in (1, 2, 4)] == [expected[i].completion.tokens for i in (1, 2, 4)]


def generate_with_a_broken_tool():
    mesh = init_mesh(tp=2)
    model = Transformer(SHAPE, mesh).initialize(0)
    every = list(range(SHAPE.vocab_size))  # whatever is drawn stops
    try:
        generate(model, [[1, 2, 3]], max_tokens=12, stop_ids=every, extend=lambda sequence: lambda: [1 / 0])
    except ZeroDivisionError as error:
        return str(error)


def test_what_a_tool_raises_all_ranks_raise(pool2):
    assert pool2.run(generate_with_a_broken_tool) == ["division by zero"] * 2


def test_what_a_tool_says_goes_on_in_the_same_sequence(model):
    def extend(sequence):
        return (lambda: [9, 8, 7] * 6) if len(sequence.completion.tokens) < 20 else None  # more than a page

    (free,) = generate(model, [[1, 2, 3]], max_tokens=12, temperature=0, stop_ids=[])
    stop = free.tokens[3]
    (found,) = generate(model, [[1, 2, 3]], max_tokens=12, temperature=0, stop_ids=[stop], extend=extend)
    first = free.tokens.index(stop) + 1
    assert found.tokens[: first + 18] == free.tokens[:first] + [9, 8, 7] * 6
    assert found.weights == [1.0] * first + [0.0] * 18 + [1.0] * (len(found.tokens) - first - 18)
    (again,) = generate(model, [[1, 2, 3] + found.tokens[: first + 18]], max_tokens=12 - first, temperature=0,
                        stop_ids=[stop])  # fmt: skip
    assert again.tokens == found.tokens[first + 18 :] and len(again.tokens) > 1
    np.testing.assert_allclose(again.logps, found.logps[first + 18 :], rtol=0, atol=1e-5)
    assert found.logps[first : first + 18] == [0.0] * 18


def test_a_tool_at_work_holds_up_nobody_else(model):
    """The tool waits until the other sequence has drawn ten tokens more: never, if that waited for it."""
    (free,) = generate(model, [[1, 2, 3]], max_tokens=12, temperature=0, stop_ids=[])
    (alone,) = generate(model, [[4, 5]], max_tokens=40, temperature=0, stop_ids=[])
    others, waited = threading.Event(), []

    def extend(sequence):
        return (lambda: waited.append(others.wait(30)) or [9, 8, 7]) if not waited else None

    engine = Engine(model, 100, extend=extend)
    options = Options(max_tokens=40, temperature=0, stop_ids=[free.tokens[3]])
    (one,) = engine.submit([1, 2, 3], options, [(0, 0)])
    (other,) = engine.submit([4, 5], replace(options, stop_ids=[]), [(0, 1)])
    for _ in run(engine):
        if one in engine.calling and len(other.completion.tokens) > 20:
            others.set()
    assert waited == [True] and other.completion.tokens == alone.tokens
    assert one.completion.weights.count(0.0) == 3 and not engine.calling
    assert sorted(engine.cache.free) == list(range(1, 100))


def test_what_a_tool_says_beyond_the_context_ends_its_sequence_and_one_that_is_cancelled_is_not_heard(model):
    (free,) = generate(model, [[1, 2, 3]], max_tokens=12, temperature=0, stop_ids=[])
    options = Options(max_tokens=12, temperature=0, stop_ids=[free.tokens[3]])
    engine = Engine(model, 100, extend=lambda sequence: lambda: [9] * 64, decoder=Letters)
    one, two = (engine.submit([1, 2, 3], options, [(0, i)])[0] for i in range(2))
    events = []
    while engine.busy:
        events += engine.step()
        if two in engine.calling:
            engine.cancel(two)
    assert [e.finish_reason for e in events if e.token is None] == ["context"] == [one.completion.finish_reason]
    assert two.completion.finish_reason == "cancelled" and len(engine.cache.free) == engine.cache.usable


# The options ----------------------------------------------------------------------------------------------------------


def distribution(logits: torch.Tensor, o: Options, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """What a token is drawn from, spelled out in fp64."""
    z = logits.double().clone()
    for t in set(prompt + answer):
        z[t] = z[t] / o.repetition_penalty if z[t] > 0 else z[t] * o.repetition_penalty
    for t in set(answer):
        z[t] -= o.presence_penalty + o.frequency_penalty * answer.count(t)
    for t, bias in o.logit_bias.items():
        z[t] += bias
    ids, n = prompt + answer, o.no_repeat_ngram
    for i in range(len(ids) - n + 1) if n else ():
        if ids[i : i + n - 1] == ids[len(ids) - n + 1 :]:
            z[ids[i + n - 1]] = -torch.inf
    p = (z / o.temperature).softmax(-1)
    order = p.argsort(descending=True)
    if o.top_k:
        p[order[o.top_k :]] = 0
    before = p[order].cumsum(0) - p[order]
    p[order[before >= o.top_p * p.sum()]] = 0 if o.top_p < 1 else p[order[before >= o.top_p * p.sum()]]
    p[p < o.min_p * p.max()] = 0
    return p / p.sum()


MIXED = [
    Options(),
    Options(temperature=0.7),
    Options(temperature=1.3, top_k=40),
    Options(top_p=0.8),
    Options(temperature=2.0, top_p=0.97, top_k=400),  # more than the candidates hold at first
    Options(min_p=0.05),
    Options(repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3),
    Options(no_repeat_ngram=2, logit_bias={3: 4.0, 600: -2.0}, top_k=7),
    Options(no_repeat_ngram=1, temperature=0.5, min_p=0.1),
]


def test_every_option_is_the_distribution_that_it_says_whatever_the_other_rows_want():
    torch.manual_seed(0)
    logits = torch.randn(len(MIXED), 700) * 2  # not a multiple of a block
    prompt, answer = [5, 3, 9, 3, 5], [600, 3, 600]
    histories = []
    for o in MIXED:
        history = History(o, prompt)
        for t in answer:
            history.push(t)
        histories.append(history if o.edits else None)
    sampler, uniforms = Sampler(MIXED), torch.rand(400, len(MIXED))
    wanted = torch.stack([distribution(z, o, prompt, answer) for z, o in zip(logits, MIXED, strict=True)])
    rows = torch.arange(len(MIXED))
    for u in uniforms:
        drawn = sampler(logits.clone(), u, histories)
        p = wanted[rows, drawn.tokens]
        np.testing.assert_allclose(drawn.sampled_logps, p.log(), rtol=0, atol=2e-5)
        np.testing.assert_allclose(drawn.logps, logits.log_softmax(-1)[rows, drawn.tokens], rtol=0, atol=1e-5)
    bf16 = sampler(logits.bfloat16(), uniforms[0], histories)
    assert (wanted[rows, bf16.tokens] > 0).float().mean() > 0.8 and bf16.logps.dtype == torch.float32


def test_drawn_tokens_follow_the_distribution_in_two_levels():
    torch.manual_seed(1)
    logits = torch.randn(1, 600)
    drawn = Sampler([Options(temperature=1.5)] * 20000)(logits.expand(20000, -1), (torch.arange(20000) + 0.5) / 20000)
    observed = torch.bincount(drawn.tokens, minlength=600) / 20000
    assert (observed - (logits[0] / 1.5).softmax(-1)).abs().max() < 2.5 / 20000  # the uniforms are a grid


def scan(x: Tensor, dim: int) -> Tensor:
    """Cumulative sums as a GPU makes them (Hillis and Steele 1986): each place has an order of its own."""
    for step in (1 << i for i in range(x.shape[dim].bit_length())):
        x = x + torch.nn.functional.pad(x[:, : max(x.shape[dim] - step, 0)], (min(step, x.shape[dim]), 0))
    return x


def test_a_token_that_was_cut_is_not_drawn_whatever_order_sums_are_made_in(monkeypatch):
    torch.manual_seed(0)
    weights = torch.rand(1, 5 * 256).masked_fill(torch.rand(1, 5 * 256) < 0.9, 0.0)
    weights[:, 300:700] = 0.0
    monkeypatch.setattr(Tensor, "cumsum", scan)
    places = weights.cumsum(-1)
    assert ((places.diff() != 0) & (weights[:, 1:] == 0)).any()  # what a draw fell between
    exact = (places[0].double() / places[0, -1].double()).float()
    uniforms = torch.cat([exact.nextafter(torch.tensor(x)) for x in (0.0, 1.0)] + [exact, torch.rand(4000)]).clamp(
        0, 1 - 2**-24
    )
    tokens, logps = invert(weights.expand(len(uniforms), -1), uniforms)
    assert (weights[0, tokens] > 0).all() and logps.isfinite().all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_interval_give_tokens_that_can_be(u):
    logits = torch.full((1, 5000), -torch.inf)
    logits[0, [700, 701, 2000]] = torch.tensor([1.0, 2.0, 0.5])
    for o in (Options(), Options(top_k=2), Options(top_p=0.5), Options(min_p=0.9), Options(temperature=0)):
        assert Sampler([o])(logits, torch.tensor([u])).tokens.item() in (700, 701, 2000)


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1e30])
@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {1: 1e9, 2: -1e9}},
        {"logit_bias": dict.fromkeys(range(48), -1e9)},
        {"repetition_penalty": 1e-30},
        {"no_repeat_ngram": 1, "top_k": 2},
    ],
)
def test_no_temperature_makes_a_draw_that_ends_the_batch(temperature, options):
    """Scores became infinite, the probabilities NaN, and the token one beyond the vocabulary: the step failed."""
    torch.manual_seed(0)
    row = Options(temperature=temperature, **options)
    drawn = Sampler([row])(torch.randn(1, 48), torch.tensor([0.5]), [History(row, range(48))])
    assert 0 <= drawn.tokens.item() < 48 and drawn.logps.isfinite().all() and drawn.sampled_logps.isfinite().all()
    assert "logit_bias" not in options or temperature > 1 or len(options["logit_bias"]) > 2 or drawn.tokens.item() == 1


def test_the_likeliest_token_is_the_first_of_equals():
    logits = torch.zeros(2, 900)
    logits[0, [300, 600, 299]] = 2.0
    assert Sampler([Options(temperature=0)] * 2)(logits, torch.zeros(2)).tokens.tolist() == [299, 0]


def test_no_ngram_comes_twice(model):
    (free,) = generate(model, [[1, 2, 3]], max_tokens=50, temperature=0, stop_ids=[])
    (found,) = generate(model, [[1, 2, 3]], max_tokens=50, temperature=0, stop_ids=[], no_repeat_ngram=2)

    def pairs(ids):
        return list(zip(ids, ids[1:], strict=False))

    assert len(set(pairs(free.tokens))) < 49
    ids = [1, 2, 3, *found.tokens]
    assert len(set(pairs(ids))) == len(ids) - 1


class Letters:
    """A decoder: token i is the i-th letter."""

    def push(self, token: int) -> str:
        return chr(97 + token % 26)

    def finish(self) -> str:
        return ""


def test_stop_strings_end_a_sequence_and_are_not_shown(model):
    (free,) = generate(model, [[1, 2, 3]], max_tokens=20, temperature=0, stop_ids=[], decoder=Letters)
    text = "".join(Letters().push(t) for t in free.tokens)
    stop = text[4:7]
    at = text.index(stop)
    engine, (one,) = engine_for((model, [[1, 2, 3]]), 20, max_tokens=20, temperature=0, stop_ids=[], decoder=Letters,
                                stop=["~", stop])  # fmt: skip
    shown = "".join(event.text for event in run(engine))
    assert shown == one.text.shown == text[:at] and one.completion.finish_reason == "stop"
    assert one.completion.tokens == free.tokens[: at + 3]
    with pytest.raises(ValueError, match="needs a decoder"):
        generate(model, [[1]], stop=["a"])


def test_what_may_begin_a_stop_string_is_shown_when_it_does_not():
    text = Text(Letters(), ["bcd", "cx"])
    assert [text.push(ord(c) - 97) for c in "abcbcx"] == ["a", "", "", "bc", "", "b"] and text.stopped
    text = Text(Letters(), ["bcd"])
    assert [text.push(ord(c) - 97) for c in "abc"] == ["a", "", ""] and text.finish() == "bc" and text.shown == "abc"


# Beams ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_wide_beams_find_the_best_of_all(length_penalty):
    small = Transformer(ModelConfig(6, 16, 16, 1, 2, 1, 8, max_positions=64, init_std=0.6)).initialize(1)
    asked, stop = [[3, 1], [2] * 17], 5
    found = beam_search(small, asked, beams=6**3, max_tokens=3, length_penalty=length_penalty, stop_ids=[stop])
    for prompt, completion in zip(asked, found, strict=True):
        best = {}
        for answer in itertools.product(range(6), repeat=3):
            answer = list(answer[: answer.index(stop) + 1] if stop in answer else answer)
            logps = small.logits(torch.tensor(prompt + answer)).detach().log_softmax(-1)[len(prompt) - 1 : -1]
            score = float(logps.gather(1, torch.tensor(answer)[:, None]).sum())
            best[tuple(answer)] = score / len(answer) ** length_penalty
        assert tuple(completion.tokens) == max(best, key=best.get)
        assert sum(completion.logps) / len(completion.tokens) ** length_penalty == pytest.approx(
            max(best.values()), abs=1e-5
        )


def test_one_beam_is_greedy_and_more_are_no_worse(model):
    asked = prompts(3)
    greedy = generate(model, asked, max_tokens=20, temperature=0, stop_ids=[])
    assert tokens(beam_search(model, asked, beams=1, max_tokens=20, stop_ids=[])) == tokens(greedy)
    for one, more in zip(greedy, beam_search(model, asked, beams=8, max_tokens=20, stop_ids=[]), strict=True):
        assert sum(more.logps) >= sum(one.logps) - 1e-4 and len(more.tokens) == 20


def test_beams_that_were_dropped_are_forgotten(model, monkeypatch):
    """Each kept its tokens until the end: gigabytes, of a few long answers."""
    alive, decode = [], Engine.decode

    def counting(engine):
        alive.append(sum(type(o) is Running for o in gc.get_objects()))
        return decode(engine)

    gc.collect()
    before = sum(type(o) is Running for o in gc.get_objects())
    monkeypatch.setattr(Engine, "decode", counting)
    beam_search(model, prompts(2), beams=3, max_tokens=30, stop_ids=[])
    assert len(alive) == 29 and max(alive) - before <= 2 * 2 * 3
