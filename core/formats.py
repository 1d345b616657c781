"""The forms in which people keep conversations, preferences and problems.

    conversation   {"messages": [{"role", "content"}, …], "tools"?}            OpenAI; typed content, tool_calls
                   {"conversations": [{"from": "human"|"gpt"|"function_call"|"observation", "value"}, …], "tools"?}
                   {"conversation": [{"system"?, "input", "output"}, …]}       unified
                   {"instruction", "input"?, "output", "system"?, "history"?}  alpaca; dolly's "context" and "response"
                   {"question", "answer", "system"?}                           GSM8K and friends; "solution" first
                   {"query", "answers", "tools"}                               xLAM's function calls
                   {"system", "chat": "USER: …"}                               Glaive's
    preference     any of these (its answer left out, or ignored) with "chosen" and "rejected"; {"prompt", …} too; two
                   whole conversations alone, "chosen" and "rejected", as messages or as HH-RLHF's texts
    ranking        the same with "ranked": a list of answers, best first; answers of equal worth as a list in the list
    feedback       the same with "label": whether its answer, or "completion", is good
    score          the same with "completion" and "score", in [0, 1]
    steps          the same with "completions" and "labels": the steps of an answer, and whether each is right
    problem        {"question", "answer"}; the answer is what follows "####" where there is one, or what a "solution"
                   boxes; also the shapes of SVAMP, MBPP, HumanEval and verl, and {"question", "tests": [assert, …]} or
                   {"question", "cases": [{"input", "output"}, …]}, as in rewards/code.py

The form is found from the record's keys, or named (`of_form`). A record that can't be used raises `RecordError`, whose
message says why; `files.py` reads them from files.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tritium.core.chat import ROLES
from tritium.core.config import UserError
from tritium.core.files import Skipped
from tritium.core.rewards.maths import boxed

Message = dict[str, Any]  # {"role": …, "content": …}, and "weight" where it is not 1

VARIABLE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
CODE_KEYS = ("tests", "setup", "entry_point", "prefix", "cases", "checker")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
SHAREGPT_ROLES |= {"function": "tool", "ipython": "tool", "developer": "system"}
SHAREGPT_ROLES |= dict.fromkeys(("model", "bot", "chatgpt", "bing", "bard"), "assistant")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # of HH-RLHF's texts, and of Glaive's
SPEAKERS |= {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
SPEAKER = re.compile(rf"(?:\A|\n\n)\n*({'|'.join(SPEAKERS)}): ?")
SOLUTIONS = ("solution", "generated_solution")  # worked out: of a record with a bare answer, too, what is to be learned
ANSWERS = ("output", "answer", "Answer", "response", "completion", "canonical_solution", "code", "ground_truth")
REFERENCES = ("answer", "Answer", "ground_truth", "reference", "reference_answer", "expected_answer", *SOLUTIONS)
# A form's name → the keys that tell it.
FORMS = {"openai": ("messages",), "sharegpt": ("conversations",), "unified": ("conversation",)}
FORMS |= {"alpaca": ("instruction",), "prompt": ("prompt",), "glaive": ("chat",)}
FORMS |= {"question": ("question", "problem", "query")}
PROMPTS = {key for keys in FORMS.values() for key in keys}


class RecordError(ValueError):
    """A record that can't be used."""


@contextmanager
def usable(skipped: Skipped, place: str) -> Iterator[None]:
    """Around what is made of a record: what is wrong with it is counted. Raises: DataError where nothing may be."""
    try:
        yield
    except (RecordError, UserError) as error:  # of the conversation's form, or of its text
        skipped.add(str(error), place)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        skipped.add(f"a record that can't be used ({type(error).__name__}: {error})", place)


def fill(value: Any, variables: dict[str, str]) -> Any:
    """A record with `{{name}}` replaced wherever its texts hold it; names that are not given stay as they are."""
    if isinstance(value, str):
        return VARIABLE.sub(lambda match: variables.get(match[1], match[0]), value) if "{{" in value else value
    if isinstance(value, list):
        return [fill(item, variables) for item in value]
    return {key: fill(item, variables) for key, item in value.items()} if isinstance(value, dict) else value


def of_form(record: dict, form: str) -> dict:
    """The record without what would make it one of another form. Raises: RecordError where it is none of this one."""
    if not {*FORMS[form]} & {*record}:
        raise RecordError(f"a record that is not of the form {form}: it has no {' or '.join(FORMS[form])}")
    return {key: value for key, value in record.items() if key in FORMS[form] or key not in PROMPTS}


def conversation(record: dict) -> list[Message]:
    """The messages of a record in any of the module's forms. Raises: RecordError."""
    messages = prompt_of(record)
    if messages[-1]["role"] != "assistant":
        key = answer_key(record)
        if "tools" in record and "answers" in record:  # xLAM's
            calls = loaded(record["answers"], "list of calls")
            messages = [*messages, one_message({"role": "assistant", "tool_calls": calls})]
        elif key == "completion" and record.get("label") is False:
            raise RecordError("an answer that is labelled as bad")
        elif key and isinstance(record[key], list):
            messages = messages + listed_messages({"messages": record[key]})
        elif key:
            messages = [*messages, {"role": "assistant", "content": plain_answer(record[key])}]
    if not any(m["role"] == "assistant" for m in messages):
        raise RecordError(f"a record without an answer{keys_of(record)}")
    return messages


def answer_key(record: dict) -> str | None:
    """Where a record has what is to be learned."""
    solution = next((k for k in SOLUTIONS if isinstance(record.get(k), str) and record[k].strip()), None)
    return solution or next((k for k in ANSWERS if record.get(k) is not None), None)


def keys_of(record: dict) -> str:
    """What a record has instead of what was looked for."""
    if "chosen" in record:
        return ' ("chosen" and "rejected" are for reward and dpo)'
    return f" (keys: {', '.join(sorted(map(str, record))[:8])})"


def prompt_of(record: dict) -> list[Message]:
    """The messages that a record spells out, without an alpaca or GSM8K answer. Raises: RecordError."""
    if "messages" in record or "conversations" in record:
        return listed_messages(record)
    if isinstance(turns := record.get("conversation"), list):
        listed = turns and isinstance(turns[0], dict) and {"role", "from"} & turns[0].keys()  # LMSYS-Chat's
        return listed_messages(record | {"messages": turns}) if listed else unified_messages(turns)
    if "instruction" in record:
        return alpaca_prompt(record)
    if isinstance(record.get("prompt"), list):
        return listed_messages(record | {"messages": record["prompt"]})
    if isinstance(record.get("chat"), str):  # Glaive's
        system = str(record.get("system") or "").removeprefix("SYSTEM: ")
        return listed_messages({"system": system, "messages": dialogue(record["chat"])})
    if "Body" in record and "Question" in record:  # SVAMP
        body, question = (required_text(record[key], "question").strip() for key in ("Body", "Question"))
        return [{"role": "user", "content": f"{body}{'' if body.endswith('.') else '.'} {question}"}]
    for key in ("prompt", "question", "problem", "query", *(("text",) if "test_list" in record else ())):
        if key in record:
            return asked(record, required_text(record[key], "question" if key == "text" else key))
    raise RecordError(f"a record of unknown form{keys_of(record)}")


def asked(record: dict, text: str) -> list[Message]:
    """A question as messages, with the record's system text and tools. Raises: RecordError."""
    if text.startswith("\n\nHuman:"):
        return listed_messages(record | {"messages": dialogue(text)})
    if "test_list" in record:  # MBPP: its tests show the function's name
        text = "\n".join([text, *texts(record["test_list"], "test_list")])
    return with_tools([*system_turn(record), {"role": "user", "content": text}], record)


def dialogue(text: str) -> list[dict]:
    """The turns of one text that says who speaks; without an answer that is still to come."""
    parts, turns = SPEAKER.split(text)[1:], []
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        said, _, call = said.strip().removesuffix("<|endoftext|>").partition("<functioncall>")
        turns.append({"role": SPEAKERS[speaker], "content": said.strip()})
        if call:  # its arguments are JSON in single quotes
            call = loaded(call.replace("'{", "{").replace("}'", "}"), "function call")
            turns[-1]["tool_calls"] = [call]
    return turns[:-1] if turns and turns[-1] == {"role": "assistant", "content": ""} else turns


def unified_messages(rounds: list) -> list[Message]:
    """`[{"system"?, "input", "output"}, …]`: one form for all. Raises: RecordError."""
    messages = []
    for i, turn in enumerate(rounds):
        if not isinstance(turn, dict):
            raise RecordError("a turn that is not an object")
        if turn.get("system") and i:
            raise RecordError("a system text after the first turn")
        messages += system_turn(turn)
        if turn.get("input") or i:
            messages.append({"role": "user", "content": required_text(turn.get("input"), "input")})
        if turn.get("output") is not None:
            messages.append({"role": "assistant", "content": required_text(turn["output"], "answer")})
    if not messages:
        raise RecordError("a record whose conversation is not a list of turns")
    return messages


def system_turn(record: dict) -> list[Message]:
    """The system's message, if the record has one."""
    text = record.get("system") or record.get("system_prompt")
    return [{"role": "system", "content": required_text(text, "system")}] if text else []


def listed_messages(record: dict) -> list[Message]:
    """OpenAI's and sharegpt's lists of turns. Raises: RecordError naming the role, or what is missing."""
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise RecordError("a record whose conversation is not a list of turns")
    messages = system_turn(record)
    for turn in turns:
        if not isinstance(turn, dict):
            raise RecordError("a turn that is not an object")
        message = one_message(turn)
        if "tool_calls" in message and messages and messages[-1]["role"] == "assistant":
            messages[-1] = joined(messages[-1], message)  # sharegpt: what it says, then what it calls
        else:
            messages.append(message)
    return with_tools(messages, record)


def with_tools(messages: list[Message], record: dict) -> list[Message]:
    tools = record.get("tools")
    return [messages[0] | {"tools": tool_list(tools)}, *messages[1:]] if tools else messages


def one_message(turn: dict) -> Message:
    """A turn of OpenAI's or sharegpt's. Raises: RecordError."""
    said = turn.get("role", turn.get("from"))
    role = SHAREGPT_ROLES.get(said, said) if isinstance(said, str) else said
    if role not in ROLES:
        raise RecordError(f"an unknown role {role!r}")
    message = {"role": role} | typed_content(turn.get("content", turn.get("value")))
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if not isinstance(calls, list):
        raise RecordError("tool_calls that are not a list")
    calls = calls + message.pop("tool_calls", [])
    if said == "function_call":
        calls, message["content"] = loaded(message["content"], "function call"), ""
    if calls:
        message["tool_calls"] = [tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    if isinstance(turn.get("tool_call_id"), str):
        message["tool_call_id"] = turn["tool_call_id"]
    for key in ("reasoning_content", "reasoning"):
        if turn.get(key):
            message["reasoning_content"] = required_text(turn[key], key)
    if role == "assistant" and not calls:
        required_text(message["content"], "turn")
    weight = turn.get("weight", turn.get("loss_weight"))
    if weight is not None:
        if not isinstance(weight, int | float):
            raise RecordError(f"a weight that is not a number: {weight!r}")
        message["weight"] = float(weight)
    return message


def typed_content(content: Any) -> dict:
    """A turn's content, a string or a list of typed parts: text, reasoning, tool calls. Raises: RecordError."""
    if not isinstance(content, list):
        if content is not None and not isinstance(content, str):
            raise RecordError("an empty turn" if not content else "a turn with content that is not text")
        return {"content": content or ""}
    parts = {"text": [], "reasoning": [], "tool_call": []}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        said = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in parts or not (isinstance(said, str) or kind == "tool_call"):
            raise RecordError("a turn with content that is not text")
        parts[kind].append(said)
    message = {"content": "".join(parts["text"])}
    if parts["reasoning"]:
        message["reasoning_content"] = "".join(parts["reasoning"])
    if parts["tool_call"]:
        message["tool_calls"] = [loaded(call, "tool call") for call in parts["tool_call"]]
    return message


def tool_call(call: Any) -> dict:
    """`{"name", "arguments"}`, whatever it was wrapped in. Raises: RecordError."""
    id = call.get("id") if isinstance(call, dict) else None
    call = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise RecordError("a tool call without a name")
    arguments = call.get("arguments", call.get("parameters", {}))
    return {"name": call["name"], "arguments": arguments} | ({"id": id} if isinstance(id, str) else {})


def joined(first: Message, second: Message) -> Message:
    content = "\n".join(filter(None, (first["content"], second["content"])))
    return first | second | {"content": content, "tool_calls": [*first.get("tool_calls", ()), *second["tool_calls"]]}


def tool_list(tools: Any) -> list:
    tools = loaded(tools, "list of tools") if isinstance(tools, str) else tools
    return tools if isinstance(tools, list) else [tools]


def loaded(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        raise RecordError(f"a {name} that is not JSON") from None


def alpaca_prompt(record: dict) -> list[Message]:
    messages = system_turn(record)
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RecordError("a history that is not a list of [question, answer]")
    for question, answer in history:
        messages.append({"role": "user", "content": required_text(question, "question")})
        messages.append({"role": "assistant", "content": required_text(answer, "answer")})
    instruction, extra = record["instruction"] or "", record.get("input") or record.get("context") or ""
    if not isinstance(instruction, str) or not isinstance(extra, str):
        raise RecordError("an instruction or input that is not text")
    text = "\n".join(filter(None, (instruction, extra)))
    return [*messages, {"role": "user", "content": required_text(text, "instruction")}]


def preference(record: dict) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected). Raises: RecordError, also where the two answers are equal."""
    if "chosen" not in record or "rejected" not in record:
        raise RecordError('a record without "chosen" and "rejected"')
    both = [record["chosen"], record["rejected"]]
    if all(isinstance(text, str) and text.startswith("\n\nHuman:") for text in both):
        both = [dialogue(text) for text in both]
    chosen, rejected = answer_text(both[0], "chosen"), answer_text(both[1], "rejected")
    if chosen == rejected:
        raise RecordError("a pair whose answers are equal")
    if all(isinstance(turns, list) for turns in both) and both[0][:-1] != both[1][:-1]:
        raise RecordError("a pair of conversations that differ before their last turns")
    if isinstance(both[0], list) and not PROMPTS & {*record}:
        record = record | {"messages": both[0]}  # the prompt is what both conversations begin with
    return open_prompt(record), chosen, rejected


def feedback(record: dict) -> tuple[list[Message], list[tuple[str, bool]]]:
    """(prompt, [(answer, whether it is good)]): one of "completion" and "label", or both of a pair.

    Raises: RecordError.
    """
    if "label" not in record:
        prompt, chosen, rejected = preference(record)
        return prompt, [(chosen, True), (rejected, False)]
    label = record["label"]
    if label not in (True, False):
        raise RecordError(f"a label that is neither true nor false: {str(label)[:40]!r}")
    answer = next((record[key] for key in ("completion", "messages", "conversations") if key in record), None)
    return open_prompt(record), [(answer_text(answer, "completion"), bool(label))]


def scored(
    record: dict, names: Sequence[str] = ("score",), highest: float = 1.0
) -> tuple[list[Message], str, dict[str, float]]:
    """(prompt, answer, the scores of these names in [0, highest], as shares of that). Raises: RecordError."""
    scores = {name: record.get(name) for name in names}
    for name, score in scores.items():
        if score is None:
            raise RecordError(f"a record without {name}")
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= highest:
            raise RecordError(f"a {name} that is not a number in [0, {highest:g}]: {score!r}")
    answer = answer_text(record.get("completion", record.get("response")), "completion")
    return open_prompt(record), answer, {name: score / highest for name, score in scores.items()}


def steps(record: dict) -> tuple[list[Message], list[tuple[str, bool]]]:
    """(prompt, [(step, whether it is right)]). Raises: RecordError."""
    texts, labels = record.get("completions"), record.get("labels")
    if not isinstance(texts, list) or not isinstance(labels, list) or not texts or len(texts) != len(labels):
        raise RecordError('a record without "completions" and "labels", two lists of one length (see trl-lib/prm800k)')
    if any(label not in (True, False) for label in labels):
        raise RecordError(f"a label that is neither true nor false: {labels}")
    return open_prompt(record), [(required_text(t, "step"), bool(x)) for t, x in zip(texts, labels, strict=True)]


def ranking(record: dict) -> tuple[list[Message], list[list[str]]]:
    """(prompt, levels of answers from best to worst; those of a level are equal). Raises: RecordError, also where
    nothing is better than anything, or an answer comes twice."""
    ranked = record.get("ranked")
    if not isinstance(ranked, list) or len(ranked) < 2:
        raise RecordError('a record without "ranked", a list of two answers or more')
    tied = [isinstance(level, list) and bool(level) and not isinstance(level[0], dict) for level in ranked]
    levels = [
        [answer_text(a, "ranked") for a in (level if many else [level])]
        for level, many in zip(ranked, tied, strict=True)
    ]
    answers = [answer for level in levels for answer in level]
    if len(set(answers)) < len(answers):
        raise RecordError("a ranking that holds an answer twice")
    return open_prompt(record), levels


def open_prompt(record: dict) -> list[Message]:
    """A prompt that waits for an answer: what the record says up to its last user turn."""
    messages = prompt_of(record)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise RecordError("a record without a prompt")
    return messages


def answer_text(value: Any, name: str) -> str:
    """An answer given as a string, as one turn, or as a conversation whose last turn it is."""
    if isinstance(value, list) and value:
        value = value[-1]
    if not isinstance(value, dict):
        return required_text(value, name)
    message = one_message({"from": "assistant"} | value)
    if message["role"] != "assistant":
        raise RecordError(f"a {name} conversation that does not end with an answer")
    return required_text(message["content"], name)


def problem(record: dict) -> tuple[list[Message], str]:
    """(prompt, reference answer): what follows the last "####" or "A:", or, of a programming task, its tests as
    `rewards/code.py` reads them.

    Raises: RecordError.
    """
    if tests := tests_of(record):
        return open_prompt({k: v for k, v in record.items() if k not in CODE_KEYS}), json.dumps(tests)
    if isinstance(judge := record.get("reward_model"), dict):  # verl's
        record = record | {"ground_truth": judge.get("ground_truth")}
    key = next((key for key in REFERENCES if record.get(key) not in (None, "")), None)
    if key is None:
        raise RecordError(f"a record without an answer{keys_of(record)}")
    answer = plain_answer(record[key]).rpartition("\nA: " if key == "ground_truth" else "####")[2].strip()
    answer = boxed(answer) or answer if key in SOLUTIONS else answer
    return open_prompt({k: v for k, v in record.items() if k != key}), required_text(answer, "answer")


def tests_of(record: dict) -> dict:
    """The tests of a programming task, in this project's own keys, HumanEval's or MBPP's; empty where it is none."""
    if "test" in record and "entry_point" in record:  # HumanEval
        tests = {"tests": ["check(candidate)"], "setup": required_text(record["test"], "test")}
        return tests | {"entry_point": record["entry_point"], "prefix": required_text(record.get("prompt"), "prompt")}
    if "test_list" in record:  # MBPP
        tests = texts(record["test_list"], "test_list")
        setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or ())
        return {"tests": tests, "setup": setup} | called(record)
    if "tests" in record:
        texts(record["tests"], "tests")
    if "cases" in record and not (isinstance(record["cases"], list) and record["cases"]):
        raise RecordError('"cases" that are not a list of {"input", "output"}')
    return {key: record[key] for key in CODE_KEYS if key in record} if {"tests", "cases"} & {*record} else {}


def called(record: dict) -> dict:
    """MBPP's entry point: what its own solution defines and its tests call."""
    code = record.get("code")
    names = re.findall(r"^(?:def|class) (\w+)", code if isinstance(code, str) else "", re.MULTILINE)
    used = [name for name in names if re.search(rf"\b{name}\b", "\n".join(record["test_list"]))]
    return {"entry_point": used[0]} if used else {}


def plain_answer(value: Any) -> str:
    """An answer that is a text or a number. Raises: RecordError."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
    return number_text(value) if number else required_text(value, "answer")


def number_text(value: int | float) -> str:
    """145.0 → "145"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def texts(value: Any, name: str) -> list[str]:
    """Raises: RecordError where it is not a list of texts."""
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise RecordError(f'"{name}" that is not a list of texts')
    return value


def required_text(value: Any, name: str) -> str:
    if value and not isinstance(value, str):
        raise RecordError(f"a record whose {name} is not text")
    if not value or not value.strip():
        without = f"a record without an answer (its {name} is empty)"
        raise RecordError(without if name == "answer" else f"an empty {name}")
    return value
