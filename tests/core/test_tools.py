"""Rollouts that call a tool: what the model wrote stays, what the tool said is not learned."""

import gc

import numpy as np
import pytest
import torch

from tritium.core import tools
from tritium.core.chat import render, stop_ids
from tritium.core.problems import Problem
from tritium.core.rewards import Score
from tritium.core.rollout import SamplingConfig, roll_out, sample_document
from tritium.core.tokenizer import Tokenizer
from tritium.core.tools import find_call, observation_ids, python
from tritium.model.generate import Engine, run
from tritium.model.hf import load
from tritium.model.sampling import Options
from tritium.parallel.mesh import init_mesh

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("4", None),
        ("<tool_call>print(1)</tool_call>", "print(1)"),
        ('So <tool_call>\n{"name": "python", "arguments": {"code": "1 + 1"}}\n</tool_call>\n', "1 + 1"),
        ('<tool_call>{"name": "x", "arguments": {"q": 3}}</tool_call>', "3"),
        ('<tool_call>{"arguments": {}}</tool_call>', '{"arguments": {}}'),
        ("<tool_call>a</tool_call> and so the answer is 4", None),
        ("<tool_call>unfinished", None),
    ],
)
def test_calls_are_found_at_the_end_of_a_turn(text, call):
    assert find_call(text) == call


def test_the_python_tool_says_what_a_program_prints_or_how_it_failed():
    assert python("print(6 * 7)") == "42" and python("x = 1") == "(no output)"
    assert python("print('a')\n1 / 0") == "a\nZeroDivisionError: division by zero"


def test_an_observation_is_a_turn_of_the_models_format(tiny):
    tokenizer = Tokenizer.load(tiny.model)
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "tool", "content": "12"}]
    whole = render(tokenizer, turns, generation_prompt=True).ids
    before = render(tokenizer, turns[:2]).ids
    end = max(i for i, t in enumerate(before) if t in stop_ids(tokenizer))
    assert whole == before[: end + 1] + observation_ids(tokenizer, "12")


def rolled_out(folder: str, tp: int, cp: int) -> list:
    """The answers of a rank on which everything that is not the model's differs from the others'."""
    mesh = init_mesh(tp, cp)
    model, tokenizer = load(folder, torch.float32, mesh=mesh), Tokenizer.load(folder)
    tools.find_call = lambda text: text
    ids = render(tokenizer, [{"role": "user", "content": "1 + 2"}], generation_prompt=True).ids
    problem = Problem(0, [{"role": "user", "content": "1 + 2"}], ids, "3")
    judge = lambda ids, text, **_: Score(float(mesh.rank))  # noqa: E731
    sampling = SamplingConfig(max_tokens=30, temperature=2.0, max_calls=1)
    rollout = roll_out(model, tokenizer, [problem], judge, sampling, n=12, tool=lambda code: "12" * (1 + mesh.rank))
    return [(s.completion, s.text, s.score.value) for s in rollout.samples]


@pytest.mark.parametrize(("tp", "cp"), [(2, 1), (1, 2)])
def test_the_ranks_of_a_replica_agree_on_what_a_tool_and_a_judge_said(tiny, pool2, tp, cp):
    """A verifier that was late on one of them only, and they trained on different batches, or waited for ever."""
    first, second = pool2.run(rolled_out, tiny.model, tp, cp)
    assert first == second and {value for _, _, value in first} == {0.0}
    assert any(0.0 in completion.weights for completion, _, _ in first)


def test_a_tool_that_says_what_is_no_text_is_told_to_the_model(tiny):
    """It ended the rollout, and on one of several ranks the others waited for its words."""
    tokenizer = Tokenizer.load(tiny.model)
    for said, words in (
        ("\ud800", "UserError: the text is not valid Unicode"),
        (None, "ChatError: message 2 (tool): the content must be text"),
    ):
        assert words in tokenizer.decode(tools.ToolUse(tokenizer, lambda code, said=said: said).say("1"))

    def fails(code: str) -> str:
        raise ValueError("\ud800")

    assert "ValueError: \\ud800" in tokenizer.decode(tools.ToolUse(tokenizer, fails).say("1"))


def test_sequences_that_called_are_forgotten_when_they_have_ended(tiny):
    """A file of a million prompts kept each of them."""
    tokenizer, model = Tokenizer.load(tiny.model), load(tiny.model, torch.float32)
    use = tools.ToolUse(tokenizer, lambda code: "12")
    engine = Engine(model, 100, extend=lambda sequence: use.calls.update({sequence: 1}))
    engine.submit([1, 2, 3], Options(max_tokens=3, stop_ids=range(340)), [(0, 0)])
    list(run(engine))
    del engine
    gc.collect()
    assert len(use.calls) == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_rollout_with_a_tool(tiny, monkeypatch, fails):
    """The tiny model can't write a call: every turn that it ends counts as one here."""
    tokenizer, model = Tokenizer.load(tiny.model), load(tiny.model, torch.float32)
    monkeypatch.setattr("tritium.core.tools.find_call", lambda text: text)
    asked = []

    def tool(code: str) -> str:
        asked.append(code)
        if fails:
            raise RuntimeError("no sandbox")
        return "12"

    ids = render(tokenizer, [{"role": "user", "content": "1 + 2"}], generation_prompt=True).ids
    problem = Problem(0, [{"role": "user", "content": "1 + 2"}], ids, "3")
    judge = lambda ids, text, **_: Score(1.0)  # noqa: E731
    sampling = SamplingConfig(max_tokens=30, temperature=2.0, max_calls=1)
    rollout = roll_out(model, tokenizer, [problem], judge, sampling, n=40, tool=tool)
    said = observation_ids(tokenizer, "RuntimeError: no sandbox" if fails else "12")
    used = [s for s in rollout.samples if 0.0 in s.completion.weights]
    cut = [s for s in rollout.samples if s.completion.finish_reason == "context"]  # no room for what the tool said
    assert used and len(used) <= len(asked) <= len(used) + len(cut)
    for sample in used:
        completion = sample.completion
        weights = np.array(completion.weights)
        silent = np.flatnonzero(weights == 0)
        assert [completion.tokens[i] for i in silent] == said and silent[-1] - silent[0] == len(said) - 1
        assert completion.tokens[silent[0] - 1] in stop_ids(tokenizer)
        document = sample_document(sample, {})
        assert document.weights.tolist() == [0.0] * len(ids) + completion.weights
        assert document.ids.tolist() == ids + completion.tokens
        logps = model.logits(torch.tensor(ids + completion.tokens)).detach().log_softmax(-1)[len(ids) - 1 : -1]
        expected = logps.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0].numpy() * weights
        np.testing.assert_allclose(completion.logps, expected, rtol=0, atol=2e-5)
