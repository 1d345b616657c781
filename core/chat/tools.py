"""How tools are described to a model, how it calls them, and how it is told what they returned."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Calls = Sequence[Mapping[str, Any]]

_HERMES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)
_LLAMA = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {{"name": function name, "parameters": dictionary of argument '
    "name and its value}}.Do not use variables.\n\n{}"
)


@dataclass(frozen=True)
class Tools:
    """`describe` goes into the system message, or before the user's text; `results` joins those of one round."""

    describe: Callable[[Sequence[Any]], str]
    call: Callable[[Calls, str], str]  # of the calls, and of the text before them
    result: str | Callable[[Mapping[str, Any]], str]  # of a tool's message; in a text, "{}" is what it says
    begin: str = ""  # before the results of a round
    end: str = ""
    between: str = "\n"
    where: str = "system"  # of the description: "system", the "first" or the "last" user's turn
    quoted: bool = False  # results are JSON strings
    resumes: bool = False  # the assistant goes on after results without a new header


LITERAL = "\0"  # of what a tool's text holds, others wrote what stands between two of these: see `literal`


def literal(text: str) -> str:
    """The text, marked as no control token whatever it holds. (A NUL in it is lost.)"""
    return f"{LITERAL}{text.replace(LITERAL, '')}{LITERAL}"


def dumps(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _hermes_calls(calls: Calls, before: str) -> str:
    lines = [
        f'<tool_call>\n{{"name": "{literal(c["name"])}", "arguments": {literal(dumps(c["arguments"]))}}}\n</tool_call>'
        for c in calls
    ]
    return ("\n" if before else "") + "\n".join(lines)


def _llama_calls(calls: Calls, before: str) -> str:
    return "\n".join(literal(f'{{"name": "{c["name"]}", "parameters": {dumps(c["arguments"])}}}') for c in calls)


def _mistral(space: str) -> Tools:
    """Of v3; Nemo's has no space after a marker. A result is JSON where it can be, else a JSON string, as in Mistral's
    own library."""

    def calls(calls: Calls, before: str) -> str:
        listed = []
        for c in calls:
            id = f', "id": "{c["id"]}"' if "id" in c else ""
            listed.append(f'{{"name": "{c["name"]}", "arguments": {dumps(c["arguments"])}{id}}}')
        return f"[TOOL_CALLS]{space}{literal('[' + ', '.join(listed) + ']')}"

    def result(message: Mapping[str, Any]) -> str:
        content = message["content"]
        try:
            json.loads(content)
        except ValueError:
            content = json.dumps(content, ensure_ascii=False)
        id = f', "call_id": "{message["tool_call_id"]}"' if "tool_call_id" in message else ""
        said = literal(f'{{"content": {content}{id}}}')
        return f"[TOOL_RESULTS]{space}{said}[/TOOL_RESULTS]"

    def describe(tools: Sequence[Any]) -> str:
        return f"[AVAILABLE_TOOLS]{space}{literal(json.dumps(tools, ensure_ascii=False))}[/AVAILABLE_TOOLS]"

    return Tools(describe, calls, result, between="", where="last", resumes=True)


def _deepseek_calls(calls: Calls, before: str) -> str:
    form = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
    listed = "\n".join(form.format(literal(c["name"]), literal(dumps(c["arguments"]))) for c in calls)
    return f"<｜tool▁calls▁begin｜>{listed}<｜tool▁calls▁end｜>"


def _hermes_tools(tools: Sequence[Any]) -> str:
    return _HERMES.format("".join(f"\n{dumps(tool)}" for tool in tools))


HERMES = Tools(_hermes_tools, _hermes_calls, "<tool_response>\n{}\n</tool_response>")
LLAMA = Tools(
    lambda tools: _LLAMA.format("".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools)),
    _llama_calls, "{}", where="first", quoted=True,
)  # fmt: skip
DEEPSEEK = Tools(
    _hermes_tools, _deepseek_calls, "<｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", resumes=True,
)  # fmt: skip
TOOLS = {"hermes": HERMES, "llama": LLAMA, "deepseek": DEEPSEEK}
TOOLS |= {"mistral": _mistral(" "), "mistral_nemo": _mistral("")}
