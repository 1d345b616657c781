"""Conversations as token ids, in ChatML, with the weight of each token from the same pass.

    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎Hello<|im_end|>⏎
                                                       └────────────┘ supervised: content and its end

ChatML has no BOS. The header, the content and the newline are tokenised apart, as generation produces them.

A tokenizer without the ChatML control tokens (a pretrained one from elsewhere) gets the same format with the markers
as ordinary text, after its BOS, which such models expect; its EOS, where it has one, ends the assistant's turns in
place of <|im_end|>, so that generation can stop on one id.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tritium.core.config import UserError
from tritium.core.tokenizer import END_THINK, IM_END, IM_START, THINK, Tokenizer

# Which role may follow which; "" stands for the beginning.
_FOLLOWERS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
ROLES = tuple(role for role in _FOLLOWERS if role)


class ChatError(UserError, ValueError):
    """A conversation that cannot be rendered."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens: `weights[i]` is the weight of predicting `ids[i]` from what stands before it."""

    ids: list[int]
    weights: list[float]


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool = False) -> Rendered:
    """Render `{"role": …, "content": …, "weight": …}` messages; the optional weight is the assistant's (1 by default).

    `generation_prompt` appends the header of the assistant's next turn. Content never becomes a control token.

    Raises: ChatError for no messages, an unknown role, roles out of order, content that is not text, a bad weight.
    """
    _check(messages, generation_prompt)
    chatml = _control_ids(tokenizer)
    header, end, answer_end = _markers(tokenizer, chatml)
    newline = tokenizer.encode("\n")
    parts = [([tokenizer.bos_id], 0.0)] if chatml is None and tokenizer.bos_id is not None else []
    for message in messages:
        content = tokenizer.encode(message["content"])
        parts.append((header(message["role"]), 0.0))
        if message["role"] == "assistant":
            parts.append((content + answer_end, float(message.get("weight", 1.0))))
        else:
            parts.append((content + end, 0.0))
        parts.append((newline, 0.0))
    if generation_prompt:
        parts.append((header("assistant"), 0.0))
    ids = [i for part, _ in parts for i in part]
    weights = [weight for part, weight in parts for _ in part]
    return Rendered(ids, weights)


def stop_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end the assistant's turn: <|im_end|> where it is a token, and EOS where there is one."""
    chatml = _control_ids(tokenizer)
    ends = [chatml[1]] if chatml else []
    return ends if tokenizer.eos_id is None else [*ends, tokenizer.eos_id]


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


def _control_ids(tokenizer: Tokenizer) -> tuple[int, int] | None:
    """The ids of <|im_start|> and <|im_end|>; None unless the tokenizer has both."""
    start, end = tokenizer.special_id(IM_START), tokenizer.special_id(IM_END)
    return None if start is None or end is None else (start, end)


def _markers(tokenizer: Tokenizer, chatml: tuple[int, int] | None):
    """A function from a role to its header's ids, the ids that end a turn, and those that end the assistant's."""
    if chatml is not None:
        start, end = chatml
        return lambda role: [start, *tokenizer.encode(f"{role}\n")], [end], [end]
    end = tokenizer.encode(IM_END)
    answer_end = end if tokenizer.eos_id is None else [tokenizer.eos_id]
    return lambda role: tokenizer.encode(f"{IM_START}{role}\n"), end, answer_end


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
