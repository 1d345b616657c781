"""The chat formats of the open models, as data. `{}` is the content, `{bos}` and `{eos}` the tokenizer's own tokens."""

from dataclasses import dataclass, replace

from tritium.core.chat.tools import DEEPSEEK, HERMES, LLAMA, MISTRAL, Tools
from tritium.core.config import UserError, nearest
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
    default_system: str = ""
    preamble: str = ""  # before any system text, which is then always there
    tool: str = ""  # the turn that brings tools' results (empty: the user's)
    begin: str = ""
    prompt: str = ""  # opens a reply, where that is not `header`
    closing: str = ""  # at the end of a conversation, not learned
    closing_eos: bool = False  # the original text has no end token: the last answer gets one that is learned
    strip: bool = False  # white space around the content goes
    thinks: bool = False  # reasoning stands in a block of its own form: <think>⏎…⏎</think>⏎⏎
    thinking: str = "keep"  # what becomes of reasoning, by default: "keep" or "history" (none before the last question)
    tools: Tools = HERMES
    marks: tuple[str, ...] = ()  # by which a model's Jinja text, or else its special tokens, are recognised


def _turn(role: str, end: str = "<|im_end|>\n") -> str:
    return f"<|im_start|>{role}\n{{}}{end}"


_CHATML = Template(
    system=_turn("system"),
    user=_turn("user"),
    tool=_turn("tool"),
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
    after="\n",
    marks=("<|im_start|>",),
)
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_LLAMA3 = Template(
    begin="{bos}",
    system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    tool="<|start_header_id|>ipython<|end_header_id|>\n\n{}<|eot_id|>",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    strip=True,
    marks=("<|start_header_id|>",),
)
_GEMMA = Template(
    begin="{bos}",
    user="<start_of_turn>user\n{}<end_of_turn>\n",
    header="<start_of_turn>model\n",
    end="<end_of_turn>",
    after="\n",
    strip=True,
    marks=("<start_of_turn>",),
)
_DEEPSEEK = Template(
    begin="{bos}",
    system="{}",
    user="<｜User｜>{}",
    header="<｜Assistant｜>",
    prompt="<｜Assistant｜><think>\n",
    end="{eos}",
    thinking="history",
    tools=DEEPSEEK,
    tool="{}",
    marks=("<｜Assistant｜>",),
)
_MISTRAL = Template(
    begin="{bos}", user="[INST] {} [/INST]", header="", end="{eos}", tools=MISTRAL, tool="{}", marks=("[INST]",)
)
_CODER = (
    "You are an AI programming assistant, utilizing the DeepSeek Coder model, developed by DeepSeek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer.\n"
)

# In the order in which they are looked for: what is more special first.
TEMPLATES = {
    "qwen3": replace(
        _CHATML, tool="", thinks=True, thinking="history", marks=("<|im_start|>", "<think>", "<tool_call>")
    ),
    "qwen2_5": replace(_CHATML, tool="", default_system=_QWEN, marks=("<|im_start|>", "You are Qwen")),
    "chatml": _CHATML,
    "llama3_1": replace(
        _LLAMA3,
        preamble="Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n",
        tools=LLAMA,
        marks=("<|start_header_id|>", "Cutting Knowledge Date"),
    ),
    "llama3": _LLAMA3,
    "gemma3": replace(_GEMMA, fold="{}\n\n", marks=("<start_of_turn>", "first_user_prefix")),
    "gemma": _GEMMA,
    "phi3": Template(
        system="<|system|>\n{}<|end|>\n",
        user="<|user|>\n{}<|end|>\n",
        header="<|assistant|>\n",
        end="<|end|>",
        after="\n",
        closing="{eos}",
        marks=("<|user|>", "<|end|>"),
    ),
    "deepseek_r1": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_coder": Template(
        begin="{bos}",
        system="{}",
        default_system=_CODER,
        user="### Instruction:\n{}\n",
        header="### Response:",
        answer="\n{}\n",
        end="<|EOT|>",
        after="\n",
        marks=("### Instruction:", "### Response:"),
    ),
    "deepseek_llm": Template(
        begin="{bos}",
        system="{}\n\n",
        user="User: {}\n\n",
        header="Assistant:",
        answer=" {}",
        end="{eos}",
        marks=("User: ", "Assistant:"),
    ),
    "llama2": Template(
        fold="<<SYS>>\n{}\n<</SYS>>\n\n",
        user="{bos}[INST] {} [/INST]",
        header="",
        answer=" {} ",
        end="{eos}",
        strip=True,
        marks=("[INST]", "<<SYS>>"),
    ),
    "mistral_v3": replace(_MISTRAL, user="[INST] {}[/INST]", answer=" {}", marks=("[INST]", "[AVAILABLE_TOOLS]")),
    "mistral": _MISTRAL,
    "minicpm": Template(
        system="{}", user="<用户>{}", header="<AI>", end="", closing_eos=True, strip=True, marks=("<用户>", "<AI>")
    ),
    "plain": Template(begin="{bos}", system="{}\n\n", user="{}\n", header="", end="{eos}", after="\n"),
}


def find_template(tokenizer: Tokenizer) -> str:
    """The name of a model's format: the one named for it, or found by its Jinja text, or by its special tokens.

    A tokenizer that shows none of them gets ChatML. Raises: UserError for an unknown name, or an unknown Jinja text.
    """
    if name := tokenizer.template:
        if name not in TEMPLATES:
            guess = nearest(name, list(TEMPLATES))
            hint = f"did you mean {guess}? " if guess else ""
            raise UserError(f"data.template: no chat template {name!r}; {hint}There are: {', '.join(TEMPLATES)}")
        return name
    text = tokenizer.chat_template
    for name, template in TEMPLATES.items():
        if template.marks and all(m in text if text else tokenizer.special_id(m) is not None for m in template.marks):
            return name
    if text:
        raise UserError(
            f"the model's own chat template is none of those known here ({', '.join(TEMPLATES)}): name the nearest one "
            "with --data.template=NAME"
        )
    return "chatml"
