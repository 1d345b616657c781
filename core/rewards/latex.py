"""LaTeX and the signs of mathematics, in plain operators: \\frac12 is ((1)/(2)), ≤ stays, a set's brackets are ⟨ ⟩."""

import re
from math import comb

from tritium.core.rewards.words import WORDS

SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "∞": " infty ", "°": " deg ", "√": " sqrt ", "∅": "⟨⟩"}
    | {"²": "^2", "³": "^3", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "∈": "=", "∓": "±", "∣": "|"}
    | {"π": " pi ", "θ": " theta ", "α": " alpha ", "β": " beta ", "λ": " lamda "}
)
LATEX = [  # in this order
    (r"\\(?:left|right|displaystyle|[bB]igg?[lr]?|,|;|!|:| |quad|qquad)(?![a-zA-Z])|\\(?=\s)|\{,\}(?=\d{3})", ""),
    (r"\\[()\[\]]", ""),  # a formula's beginning and end
    (r"\\log\s*_\s*(?:\{(\w+)\}|(\w))", r" log_\1\2 "),
    (r"\\([a-zA-Z]+)", lambda m: WORDS["commands"].get(m[1], m[0])),
    (r"^\$([\d.,]+)$|\\\$\s*([\d.,]+)", r"\1\2 dollar "),
    (r"\$|(?<!^)~", " "),  # at the beginning it is "about"
    (r"\\(?:text|mathrm|textbf|mbox|mathbf|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"^\s*\(([A-J])\)\s+[^-+*/=^].*$", r"\1"),  # a choice, and what stands there: (C) 5
    (r"(?<=[a-z])\s*\^\s*(?:\{([23])\}|([23]))(?!\d)", r"^\1\2"),  # \text{ cm}^{2} is one unit
    (r"\\mathbb\s*(?:R|\{R\})|ℝ|(?i:all real numbers)", r"(-\\infty,\\infty)"),
    (r"(?<=[\w)}])[,\s(]+[a-z]\s*=\s*(?:\\mathbb\s*\{?[ZN]\}?|ℤ)[\s)]*$", ""),  # 2kπ, k ∈ ℤ
    (r"\^\s*\{?\s*\\circ\s*\}?", " deg "),
    (r"\\([%{}])", lambda m: {"%": "%", "{": "⟨", "}": "⟩"}[m[1]]),  # a set's brackets, apart from LaTeX's grouping
    (r"([<>!])=", lambda m: {"<": "≤", ">": "≥", "!": "≠"}[m[1]]),
    (r"(?<![a-zA-Z])(?:oo|infinity)(?![a-zA-Z])", " infty "),
    (r"(?<![a-zA-Z])(square|cubic)\s+([a-z]+)", lambda m: m[2] + ("^2" if m[1] == "square" else "^3")),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d,])", lambda m: m[0].replace(" ", "")),
    (r"_\{(\w+)\}", r"_\1 "),
    (r"\\binom\s*\{(\d{1,3})\}\s*\{(\d{1,3})\}", lambda m: str(comb(int(m[1]), int(m[2])))),
    (r"\\binom\s*\{([^{}]+)\}\s*\{2\}", r"((\1)((\1)-1)/2)"),
    (r"(\d*\.(\d*))\\overline\s*\{(\d+)\}", lambda m: f"(0{m[1]}0+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})"),
    (r"\\frac\s*(\d|(?<=\s)[a-zA-Z]|\\pi)", r"\\frac{\1}"),
    (r"\\frac\s*(\{[^{}]*\})\s*(\d|[a-zA-Z]|\\pi)", r"\\frac\1{\2}"),
    (r"(?<![\w}])(-?)(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1(\2 + \3/\4))"),  # mixed numbers: 1\frac{1}{2}
    (r"(?<![\w./])(-?)(\d+)\s+(\d+)\s*/\s*(\d+)", r"(\1(\2 + \3/\4))"),
    (r"\\sqrt\s*(\d)", r" sqrt(\1)"),
]
FRACTION = re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
ROOT = re.compile(r"\\sqrt\s*(?:\[([^\[\]{}]*)\])?\s*\{([^{}]*)\}")


def latex_to_plain(text: str) -> str:
    text = text.strip().translate(SIGNS)
    for pattern, replacement in LATEX:
        text = re.sub(pattern, replacement, text)
    for _ in range(20):  # from the inside out
        before = text
        text = FRACTION.sub(r"((\1)/(\2))", text)
        text = ROOT.sub(lambda m: f"(({m[2]})^(1/({m[1]})))" if m[1] else f" sqrt({m[2]})", text)
        text = re.sub(r"\^\s*\{([^{}]*)\}", r"^(\1)", text)
        if text == before:
            break
    text = re.sub(r"((?:log_\w+|\|)\s*)\{([^{},;]*)\}", r"\1(\2)", text)  # other braces may be a set's
    text = re.sub(r"\\([a-zA-Z]+)", r" \1 ", text).strip().rstrip("\\")
    return re.sub(r"(?<!\.)\.$", "", text)
