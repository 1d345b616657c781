"""Conversations as token ids with the weight of each token from the same pass.

    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello<|im_end|>⏎
                                                       └────────────┘ supervised: the answer and its end

The format is the model's (core/chat/templates.py). What lies between control tokens is tokenised as one text, as the
models' own libraries do, except that an answer begins a new one, as it does when it is generated. There is one BOS:
the template's, or, where it has none, the one that the tokenizer's configuration asks for.

A tokenizer without the template's control tokens (a pretrained one from elsewhere) gets the same format with the
markers as ordinary text, after its BOS, which such models expect; its EOS, where it has one, ends the assistant's turns
in place of the template's, so that generation can stop on one id.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritium.core.chat.templates import TEMPLATES, Template, find_template
from tritium.core.chat.tools import LITERAL, literal
from tritium.core.config import UserError
from tritium.core.tokenizer import END_THINK, THINK, Tokenizer

# Which role may follow which; "" stands for the beginning.
_FOLLOWERS = {"": ("system", "user"), "system": ("user",), "user": ("assistant",)}
_FOLLOWERS |= {"assistant": ("user", "tool"), "tool": ("tool", "assistant", "user")}
ROLES = tuple(role for role in _FOLLOWERS if role)
THINKING = ("", "keep", "history", "mask")

Message = Mapping[str, Any]


class ChatError(UserError, ValueError):
    """A conversation that cannot be rendered."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens: `weights[i]` is the weight of predicting `ids[i]` from what stands before it."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Part:
    """A stretch of a conversation's text. In a `marker`, the text of control tokens means these tokens, but where
    it is `tools.literal`."""

    text: str
    marker: bool = True
    answer: bool = False  # of what the assistant says
    weight: float = 0.0


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], *, generation_prompt: bool = False, thinking: str = ""
) -> Rendered:
    """Render messages in the tokenizer's chat format.

    A message is `{"role", "content"}`, an assistant's perhaps with "weight" (1 by default), "reasoning_content" and
    "tool_calls" (`[{"name", "arguments"}]`); the first may hold "tools". Content never becomes a control token.
    `generation_prompt` appends the header of the assistant's next turn. `thinking` says what becomes of <think>
    sections: "keep", "history" (kept after the last question only), "mask" (kept at weight 0), "" as the model does.

    Raises: ChatError for no messages, an unknown role, roles out of order or that the format lacks, content that is
    not text, a bad weight.
    """
    template = TEMPLATES[find_template(tokenizer)]
    if stand_in := _lacks_end(tokenizer, template):
        template = Template(**vars(template) | {"end": "{eos}"})
    bos, eos = ("" if i is None else tokenizer.piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    parts = list(_parts(template, messages, bos, eos, generation_prompt, thinking))
    has_bos = bool(bos) and parts[0].text.startswith(bos)
    ids = [tokenizer.bos_id] if not has_bos and bos and (stand_in or tokenizer.adds_bos) else []
    rendered = Rendered(ids, [0.0] * len(ids))
    if template.closing_eos and eos and not generation_prompt and parts[-1].answer:
        parts.append(Part(eos, True, True, parts[-1].weight))
    _encode(tokenizer, parts, rendered)
    return rendered


def _encode(tokenizer: Tokenizer, parts: Sequence[Part], rendered: Rendered) -> None:
    """Append the parts' ids: ordinary text up to the next control token, or the next kind of part, is one text."""
    pending, kind = "", None

    def flush() -> None:
        if pending:
            begins = not rendered.ids or tokenizer.begins_after(rendered.ids[-1], pending)
            ids = tokenizer.encode(pending, first=begins)
            rendered.ids.extend(ids)
            rendered.weights.extend([kind[1]] * len(ids))

    for part in parts:
        if (part.answer, part.weight) != kind:
            flush()
            pending, kind = "", (part.answer, part.weight)
        for piece in _pieces(tokenizer, part):
            if isinstance(piece, str):
                pending += piece
                continue
            flush()
            pending = ""
            rendered.ids.append(piece)
            rendered.weights.append(part.weight)
    flush()


def _pieces(tokenizer: Tokenizer, part: Part) -> Iterator[str | int]:
    """Ordinary text, and the ids of control tokens."""
    for i, run in enumerate(part.text.split(LITERAL) if part.marker else ("", part.text)):
        yield from (run,) if i % 2 else tokenizer.split(run)


def _parts(
    template: Template, messages: Sequence[Message], bos: str, eos: str, generation_prompt: bool, thinking: str
) -> Iterator[Part]:
    """The conversation's text in the template's format, in order."""
    _check(messages, generation_prompt)
    names = {"{bos}": bos, "{eos}": eos}
    system, folded, rest = _system(template, messages)
    questions = [i for i, message in enumerate(rest) if message["role"] == "user"]
    folds_at = questions[-1] if template.fold_last and questions else 0
    yield from _framed(template.begin, "", names)
    if system is not None:
        yield from _framed(template.system, system, names)
    for i, message in enumerate(rest):
        role, previous = message["role"], rest[i - 1]["role"] if i else ""
        if role == "user":
            where = {"first": i == 0, "last": i == questions[-1]}.get(template.tools.where, False)
            tools = template.tools.describe(messages[0]["tools"]) if where and messages[0].get("tools") else ""
            if template.tools.where == "last" and tools:
                yield Part(tools)
                tools = ""
            said = tools + (folded if i == folds_at else "") + _content(template, message)
            yield from _framed(template.user, said, names)
        elif role == "tool":
            if previous != "tool":
                results = _results(template, rest[i:])
                yield from _framed(template.tool or template.user, results, names, template.tool == "{}")
        else:
            if not (previous == "tool" and template.tools.resumes):
                yield from _framed(template.header, "", names)
            last = i == len(rest) - 1
            current = not questions or i > questions[-1]
            yield from _answer(template, message, names, current, last, thinking or template.thinking)
    if generation_prompt:
        if not (rest[-1]["role"] == "tool" and template.tools.resumes):
            yield from _framed(template.prompt or template.header, "", names)
    else:
        yield from _framed(template.closing, "", names)


def _framed(form: str, content: str, names: Mapping[str, str], marker: bool = False) -> Iterator[Part]:
    """A template's string with its content in place."""
    before, hole, after = form.partition("{}")
    for text, is_marker in ((before, True), (content if hole else "", marker), (after, True)):
        if is_marker and text is not content:
            for name, token in names.items():
                text = text.replace(name, token)
        if text:
            yield Part(text, is_marker)


def _system(template: Template, messages: Sequence[Message]) -> tuple[str | None, str, Sequence[Message]]:
    """(the system turn's text or None, the text that goes before the first user's, the other messages)."""
    given = messages[0]["role"] == "system"
    text = messages[0]["content"] if given else template.default_system
    text = text.strip() if template.strip == "all" else text
    tools = messages[0].get("tools")
    if tools and template.tools.where == "system":
        described = template.tools.describe(tools)
        text, given = f"{text}\n\n{described}" if text or given else described, True
    if template.preamble:
        text = ("Environment: ipython\n" if tools else "") + template.preamble + text
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    if not given and not text:
        return None, "", rest
    if template.system:
        return text, "", rest
    if not template.fold:
        raise ChatError("this model's chat template has no system role, and no place for tools: put it into the user's")
    return None, template.fold.format(text), rest


def _content(template: Template, message: Message) -> str:
    return message["content"].strip() if template.strip == "all" else message["content"]


def _results(template: Template, messages: Sequence[Message]) -> str:
    """What the tools of one round returned."""
    style, results = template.tools, []
    for message in messages:
        if message["role"] != "tool":
            break
        content = json.dumps(message["content"], ensure_ascii=False) if style.quoted else message["content"]
        content = literal(content) if template.tool == "{}" else content  # a text of markers; elsewhere there are none
        results.append(style.result(message) if callable(style.result) else style.result.format(content))
    return style.begin + style.between.join(results) + style.end


def _answer(
    template: Template, message: Message, names: Mapping[str, str], current: bool, last: bool, thinking: str
) -> Iterator[Part]:
    """The parts of an assistant's turn after its header."""
    reasoning, content = _reasoning(template, message)
    if thinking == "history" and not current:
        reasoning = ""
    elif template.thinks and last and current and not reasoning:
        reasoning = f"{THINK}\n\n{END_THINK}\n\n"
    content = content.strip() if template.strip else content
    weight = float(message.get("weight", 1.0))
    before, _, after = template.answer.partition("{}")
    before = before if content or not message.get("tool_calls") else ""  # a turn that only calls
    if reasoning:
        yield Part(before + reasoning, False, True, 0.0 if thinking == "mask" else weight)
        before = ""
    yield Part(before + content, False, True, weight)
    if calls := message.get("tool_calls"):
        yield Part(template.tools.call(calls, content), True, True, weight)
    for part in _framed(after + template.end, "", names):
        yield Part(part.text, True, True, weight)
    yield from _framed(template.after, "", names)


def _reasoning(template: Template, message: Message) -> tuple[str, str]:
    """(the <think> section with its tags and what separates it from the answer, the answer)."""
    content, reasoning = message["content"], message.get("reasoning_content")
    if not reasoning and END_THINK in content:
        before, _, answer = content.rpartition(END_THINK)
        if not template.thinks:
            bare = answer.lstrip("\n")
            return content[: len(content) - len(bare)], bare
        content, reasoning = answer.lstrip("\n"), before.rpartition(THINK)[2]
    return (f"{THINK}\n{reasoning.strip(chr(10))}\n{END_THINK}\n\n" if reasoning else ""), content


def _lacks_end(tokenizer: Tokenizer, template: Template) -> bool:
    """Whether the end of a turn is a marker that this tokenizer has no token for, and its EOS stands in."""
    marker = template.end.startswith("<")
    return marker and tokenizer.special_id(template.end) is None and tokenizer.eos_id is not None


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end the assistant's turn: the template's end where it is a token, and EOS where there is one."""
    end = tokenizer.special_id(TEMPLATES[find_template(tokenizer)].end)
    return list(dict.fromkeys(i for i in (end, tokenizer.eos_id) if i is not None))


def parse_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, answer) of `<think>reasoning</think>answer`, both without surrounding white space.

    The opening tag may be part of the prompt and so be missing. Without a closing tag, everything after an opening
    one is reasoning, cut off before the answer; without any tag, everything is the answer.
    """
    before, closing, answer = text.partition(END_THINK)
    if not closing:
        answer, _, reasoning = text.partition(THINK)
    else:
        reasoning = before.partition(THINK)[2] if THINK in before else before
    return reasoning.strip(), answer.strip()


def _check(messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> None:
    if not messages:
        raise ChatError("a conversation needs at least one message")
    previous = ""
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ChatError(f"message {i}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ChatError(f"message {i} ({role}): the content must be text, not {type(content).__name__}")
        if role not in _FOLLOWERS[previous]:
            where = f"after {previous!r}" if previous else "at the beginning"
            raise ChatError(f"message {i}: {role!r} {where}; expected {' or '.join(_FOLLOWERS[previous])}")
        _check_weight(i, role, message.get("weight"))
        previous = role
    if generation_prompt and "assistant" not in _FOLLOWERS[previous]:
        raise ChatError(f"a reply can be asked for after a user's or tool's message, not after the {previous}'s")


def _check_weight(i: int, role: str, weight: Any) -> None:
    if weight is None:
        return
    if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
        raise ChatError(f"message {i}: the weight {weight!r} must be a number ≥ 0")
    if weight and role != "assistant":
        raise ChatError(f"message {i}: a weight on the {role}'s message; only the assistant's are learned")
