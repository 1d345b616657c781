"""Files of records, and the forms in which people keep conversations, preferences and problems.

    conversation   {"messages": [{"role", "content"}, …]}                      OpenAI
                   {"conversations": [{"from": "human"|"gpt"|…, "value"}, …]}  sharegpt
                   {"instruction", "input"?, "output", "system"?, "history"?}  alpaca
                   {"question", "answer"}                                      GSM8K and friends
    preference     any of these (its answer left out, or ignored) with "chosen" and "rejected"; {"prompt", …} too
    ranking        the same with "ranked": a list of answers, best first
    problem        {"question", "answer"}; the answer is what follows "####" where there is one

The form is found from the record's keys. A record that can't be used raises `RecordError`, whose message says why;
`read_records` adds the file and the line.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritium.core.chat import ROLES
from tritium.core.config import UserError

Message = dict[str, Any]  # {"role": …, "content": …}, and "weight" where it is not 1

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character: JSON can spell it, UTF-8 can't
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class DataError(UserError):
    """A file that can't be used: missing, empty, not text."""


class RecordError(ValueError):
    """A record that can't be used."""


@dataclass
class Skipped:
    """Counts what was left out, by reason, with the first place of each. `on_error="raise"` stops at the first."""

    on_error: str = "skip"
    reasons: Counter = field(default_factory=Counter)
    places: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Raises: DataError where nothing may be skipped."""
        if self.on_error == "raise":
            raise DataError(f"{place}: {reason}")
        self.reasons[reason] += 1
        self.places.setdefault(reason, place)

    def summary(self) -> str:
        """One line per reason; empty when nothing was skipped."""
        return "\n".join(f"skipped {n} × {reason} (first: {self.places[reason]})" for reason, n in self.reasons.items())


def open_text(path: Path):
    """As UTF-8, with or without the mark that Windows puts at the beginning."""
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig")


def read_text(path: str) -> str:
    """The text of a file. Raises: DataError where it is missing, empty or not UTF-8."""
    try:
        with open_text(Path(path)) as file:
            text = file.read()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise DataError(f"{path} is not UTF-8 text ({where}); convert it, e.g. with iconv") from None
    except (OSError, EOFError, zlib.error) as error:  # the last two: of a .gz file that is cut off or damaged
        raise DataError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def read_records(path: str, skipped: Skipped) -> Iterator[tuple[str, dict]]:
    """(place, record) for each record of a .jsonl or .json file (optionally .gz); malformed lines are skipped.

    Raises: DataError where the file can't be read, or holds no record at all.
    """
    text, found = read_text(path), False
    # A list over several lines is one, whatever its file is called; a line of its own may begin with "[" by mistake.
    if Path(path.removesuffix(".gz")).suffix == ".json" or text.lstrip().split("\n", 1)[0].strip() == "[":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: malformed JSON: {error.msg}") from None
        if not isinstance(rows, list):
            raise DataError(f"{path} must hold a list of records")
        numbered = ((f"{path}: record {i}", row) for i, row in enumerate(rows))
    else:
        numbered = json_lines(path, text, skipped)
    for place, row in numbered:
        if isinstance(row, dict):
            found = True
            yield place, row
        else:
            skipped.add("a record that is not a JSON object", place)
    if not found:
        raise DataError(f"{path} holds no record")


def json_lines(path: str, text: str, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError:
                skipped.add("malformed JSON", f"{path}:{number}")


def read_documents(path: str, skipped: Skipped) -> Iterator[str]:
    """Raw texts: the "text" of each record of a .jsonl or .json file; any other file is one document."""
    if Path(path.removesuffix(".gz")).suffix not in (".json", ".jsonl"):
        yield read_text(path)
        return
    for place, record in read_records(path, skipped):
        text = record.get("text")
        if not isinstance(text, str) or not text:
            skipped.add('a record without a "text"', place)
        elif LONE_SURROGATE.search(text):
            skipped.add("a text that is not valid Unicode", place)
        else:
            yield text


def conversation(record: dict) -> list[Message]:
    """The messages of a record in any of the module's forms. Raises: RecordError."""
    messages = prompt_of(record)
    if "output" in record or "answer" in record:
        answer = record["output"] if "output" in record else record["answer"]
        messages = [*messages, {"role": "assistant", "content": required_text(answer, "answer")}]
    if not any(m["role"] == "assistant" for m in messages):
        raise RecordError("a record without an answer")
    return messages


def prompt_of(record: dict) -> list[Message]:
    """The messages that a record spells out, without an alpaca or GSM8K answer. Raises: RecordError."""
    if "messages" in record or "conversations" in record:
        return listed_messages(record)
    if "instruction" in record:
        return alpaca_prompt(record)
    if isinstance(record.get("prompt"), list):
        return listed_messages({"messages": record["prompt"]})
    for key in ("prompt", "question"):
        if key in record:
            return [{"role": "user", "content": required_text(record[key], key)}]
    raise RecordError(f"a record of unknown form (keys: {', '.join(sorted(record)[:8])})")


def listed_messages(record: dict) -> list[Message]:
    """OpenAI's and sharegpt's lists of turns. Raises: RecordError naming the role, or what is missing."""
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise RecordError("a record whose conversation is not a list of turns")
    messages = []
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
    for turn in turns:
        if not isinstance(turn, dict):
            raise RecordError("a turn that is not an object")
        role = turn.get("role", turn.get("from"))
        role = SHAREGPT_ROLES.get(role, role)
        if role not in ROLES:
            raise RecordError(f"an unknown role {role!r}")
        message = {"role": role, "content": turn_text(turn)}
        weight = turn.get("weight", turn.get("loss_weight"))
        messages.append(message if weight is None else message | {"weight": float(weight)})
    return messages


def turn_text(turn: dict) -> str:
    """The text of a turn: a string, or a list of typed parts, of which the text ones are joined."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [p.get("text", p.get("value")) for p in content if isinstance(p, dict) and p.get("type") == "text"]
        if len(parts) != len(content):
            raise RecordError("a turn with content that is not text")
        content = "".join(map(str, parts))
    return required_text(content, "turn")


def alpaca_prompt(record: dict) -> list[Message]:
    messages = []
    if isinstance(record.get("system"), str) and record["system"]:
        messages.append({"role": "system", "content": record["system"]})
    for question, answer in record.get("history") or []:
        messages.append({"role": "user", "content": required_text(question, "question")})
        messages.append({"role": "assistant", "content": required_text(answer, "answer")})
    instruction, extra = required_text(record["instruction"], "instruction"), record.get("input") or ""
    messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction})
    return messages


def preference(record: dict) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected). Raises: RecordError, also where the two answers are equal."""
    if "chosen" not in record or "rejected" not in record:
        raise RecordError('a record without "chosen" and "rejected"')
    chosen, rejected = answer_text(record["chosen"], "chosen"), answer_text(record["rejected"], "rejected")
    if chosen == rejected:
        raise RecordError("a pair whose answers are equal")
    return open_prompt(record), chosen, rejected


def ranking(record: dict) -> tuple[list[Message], list[str]]:
    """(prompt, answers from best to worst). Raises: RecordError."""
    answers = record.get("ranked")
    if not isinstance(answers, list) or len(answers) < 2:
        raise RecordError('a record without "ranked", a list of two answers or more')
    return open_prompt(record), [answer_text(a, "ranked") for a in answers]


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
    return turn_text(value) if isinstance(value, dict) else required_text(value, name)


def problem(record: dict) -> tuple[list[Message], str]:
    """(prompt, reference answer). Raises: RecordError."""
    if "answer" not in record:
        raise RecordError("a record without an answer")
    answer = record["answer"]
    answer = str(answer) if isinstance(answer, int | float) else required_text(answer, "answer")
    return open_prompt({k: v for k, v in record.items() if k != "answer"}), answer.rpartition("####")[2].strip()


def required_text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RecordError(
            f"a record without an answer (its {name} is empty)" if name == "answer" else f"an empty {name}"
        )
    return value
