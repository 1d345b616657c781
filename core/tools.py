"""Tools in a rollout: what the model calls runs, and what it says comes back as tokens that are not learned.

A call is the text between <tool_call> and </tool_call> at the end of a turn; of a JSON object {"name", "arguments"},
the arguments' "code", or the only one. The tool's answer is a turn of the role "tool" in the model's own chat format,
followed by the header of the assistant's next. The model's tokens stay as they were sampled.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

from tritium.core.chat import render, stop_ids
from tritium.core.sandbox import run_python
from tritium.core.tokenizer import Tokenizer
from tritium.model.generate import Running

Tool = Callable[[str], str]

LONGEST = 2000  # characters of what a tool says
CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>\s*\Z", re.DOTALL)


def find_call(text: str) -> str | None:
    """What is to be run at the end of this turn; None where nothing is."""
    found = CALL.search(text)
    if found is None:
        return None
    try:
        arguments = json.loads(found[1])["arguments"]
        return str(arguments["code"] if "code" in arguments else next(iter(arguments.values())))
    except (ValueError, TypeError, KeyError, StopIteration, AttributeError):
        return found[1]


def observation_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """What stands between the end token of a turn that calls and the first token of the next turn."""
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    before, ends = render(tokenizer, turns).ids, set(stop_ids(tokenizer))
    ids = render(tokenizer, [*turns, {"role": "tool", "content": text}], generation_prompt=True).ids
    return ids[max((i for i, token in enumerate(before) if token in ends), default=len(before) - 1) + 1 :]


def python(code: str) -> str:
    """What a program prints, run in the sandbox, and the last line of its error; the end of what is too long."""
    outcome = run_python(code)
    error = (outcome.stderr.strip().splitlines() or [f"exit code {outcome.returncode}"])[-1]
    wrong = f"stopped: {outcome.killed}" if outcome.killed else error
    return (outcome.stdout + ("" if outcome.ok else wrong)).strip()[-LONGEST:] or "(no output)"


TOOLS: dict[str, Tool] = {"python": python}


class ToolUse:
    """The engine's `extend`: at most `max_calls` calls of `tool` in a sequence. A tool that raises says so itself.

    What is returned runs in a thread of its own, and several at once.
    """

    def __init__(self, tokenizer: Tokenizer, tool: Tool, max_calls: int = 4):
        self.tokenizer, self.tool, self.max_calls = tokenizer, tool, max_calls
        self.calls: WeakKeyDictionary[Running, int] = WeakKeyDictionary()

    def __call__(self, sequence: Running) -> Callable[[], list[int]] | None:
        completion = sequence.completion
        start = max((i + 1 for i, w in enumerate(completion.weights) if not w), default=0)
        call = find_call(self.tokenizer.decode(completion.tokens[start:]))
        made = self.calls.get(sequence, 0)
        if call is None or made >= self.max_calls:
            return None
        self.calls[sequence] = made + 1
        return partial(self.say, call)

    def say(self, call: str) -> list[int]:
        """The tokens of what the tool says."""
        try:
            return observation_ids(self.tokenizer, self.tool(call))
        except Exception as error:  # of the tool, or of a text that is none
            said = f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()
            return observation_ids(self.tokenizer, said)
