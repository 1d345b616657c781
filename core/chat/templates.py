"""The chat formats of the open models, read from templates.toml, and which of them is a model's."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from tritium.core.chat.tools import HERMES, TOOLS, Tools
from tritium.core.config import UserError, listed
from tritium.core.tokenizer import Tokenizer


@dataclass(frozen=True)
class Template:
    """A format. The assistant's turn is `header`, then what is learned (`answer`, `end`), then `after`."""

    user: str
    header: str
    end: str
    after: str = ""
    answer: str = "{}"
    system: str = ""  # a turn of its own; empty: see `fold`
    fold: str = ""  # the system's text before that of the first user; empty as well: refused
    fold_last: bool = False  # before that of the last user instead
    default_system: str = ""
    preamble: str = ""  # before any system text, which is then always there
    tool: str = ""  # the turn that brings tools' results (empty: the user's)
    begin: str = ""
    prompt: str = ""  # opens a reply, where that is not `header`
    closing: str = ""  # at the end of a conversation, not learned
    closing_eos: bool = False  # the original text has no end token: the last answer gets one that is learned
    strip: str = ""  # white space around the content goes: of "all" turns, or of the "answer"
    thinks: bool = False  # reasoning stands in a block of its own form: <think>⏎…⏎</think>⏎⏎
    thinking: str = "keep"  # what becomes of reasoning, by default: "keep" or "history" (none before the last question)
    tools: Tools = HERMES
    marks: tuple[str, ...] = ()  # by which a model's Jinja text is recognised
    unlike: tuple[str, ...] = ()  # what a Jinja text with the marks holds where it is another, unknown format
    tokens: tuple[str, ...] = ()  # by which, where there is no such text, its special tokens are (empty: the marks)


def _read() -> dict[str, Template]:
    tables = tomllib.loads(Path(__file__).with_name("templates.toml").read_text("utf-8"))

    def whole(table: dict) -> dict:
        return (whole(tables[table["like"]]) if "like" in table else {"tools": "hermes"}) | table

    return {
        name: Template(**{k: TOOLS[v] if k == "tools" else v for k, v in whole(table).items() if k != "like"})
        for name, table in tables.items()
    }


TEMPLATES = _read()


def find_template(tokenizer: Tokenizer) -> str:
    """The name of a model's format: the one named for it, or found by its Jinja text, or by its special tokens.

    A tokenizer that shows none of them gets ChatML. Raises: UserError for an unknown name, or an unknown Jinja text.
    """
    if name := tokenizer.template:
        if name not in TEMPLATES:
            raise UserError(f"template: no chat template {name!r}; {listed(name, TEMPLATES)}")
        return name
    text = tokenizer.chat_template
    for name, template in TEMPLATES.items():
        found = text and template.marks and all(mark in text for mark in template.marks)
        if found and not any(mark in text for mark in template.unlike):
            return name
        tokens = template.tokens or template.marks
        if not text and tokens and all(tokenizer.special_id(token) is not None for token in tokens):
            return name
    if text:
        raise UserError(
            f"the model's own chat template is none of those known here ({', '.join(TEMPLATES)}): name the nearest one "
            "with --data.template=NAME, or --template=NAME where the model is only asked"
        )
    return "chatml"
