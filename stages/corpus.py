"""Write the ladder recipe's data: text, conversations and problems, generated without any download.

    tritium corpus --out=runs/ladder/data

    library.jsonl      docstrings and sources of Python's standard library           pretraining
    arithmetic.jsonl   worked problems, one to a document                            pretraining
    cold.jsonl         problems, the reasoning in <think>, then the answer           cold-start SFT
    worked.jsonl       more of them                                                  a teacher
    chat.jsonl         the same, questions about Python functions, multi-turn chat   overall SFT
                       (most answers to stories are bare results, as people give them)
    sample.jsonl, rl.jsonl, test.jsonl   {"question", "answer"}                      sampling, RL, evaluation
                       (in rl.jsonl, every fourth comes after a greeting: {"prompt": [messages], "answer"})

Every file's problems come from a seed of their own, and no question of test.jsonl is in another file.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from tritium.core.arithmetic import Problem, chat_answer, equation, problems
from tritium.core.config import check_ranges, opt
from tritium.core.corpus import SAYINGS, library_questions, library_texts, small_talk, turns, worked_or_terse
from tritium.core.output import make_folder, write_lines
from tritium.core.run import Result

ONE_PROCESS = True  # others would write the same files


@dataclass
class Config:
    out: str = opt("runs/corpus", "output folder")
    library_characters: int = opt(6_000_000, "characters of the standard library", least=0)
    arithmetic: int = opt(60_000, "worked problems for pretraining", least=0)
    cold: int = opt(1_500, "problems of the cold start", least=0)
    chat: int = opt(4_000, "conversations of the overall SFT", least=0)
    worked: int = opt(4_000, "problems with full working, for a teacher", least=0)
    sample: int = opt(800, "problems to sample answers to", least=0)
    rl: int = opt(6_000, "problems for reinforcement learning", least=0)
    test: int = opt(500, "held-out problems", least=0)
    seed: int = opt(0, "random seed", least=0)

    def __post_init__(self):
        check_ranges(self)


def train(config: Config) -> Result:
    """Write the files; the result's `megabytes` is their size."""
    folder = make_folder(config.out, "out")
    test = problems(config.seed + 1_000_000, config.test)
    held_out = {p.question for p in test}

    def fresh(part: int, count: int) -> list[Problem]:
        """Problems of a seed of this part's own, none of them in the test."""
        made = (p for extra in itertools.count() for p in problems(config.seed + 10_000 * part + extra, count))
        return list(itertools.islice((p for p in made if p.question not in held_out), count))

    chat = fresh(3, config.chat)
    rows = {
        "library": [{"text": text} for text in library_texts(config.library_characters, config.seed)],
        "arithmetic": [{"text": equation(p)} for p in fresh(1, config.arithmetic)],
        "cold": [{"messages": turns(p.question, chat_answer(p))} for p in fresh(2, config.cold)],
        "chat": [{"messages": m} for m in overall(chat, config.seed)],
        "worked": [{"messages": turns(p.question, chat_answer(p))} for p in fresh(6, config.worked)],
        "sample": [question(p) for p in fresh(4, config.sample)],
        "rl": [in_company(p) if i % 4 == 0 else question(p) for i, p in enumerate(fresh(5, config.rl))],
        "test": [question(p) for p in test],
    }
    size = 0
    for name, values in rows.items():
        write_lines(file := folder / f"{name}.jsonl", values)
        size += file.stat().st_size
    return Result(config.out, {"megabytes": size / 1e6})


def question(problem: Problem) -> dict:
    return {"question": problem.question, "answer": problem.answer, "difficulty": problem.difficulty}


def in_company(problem: Problem) -> dict:
    """The problem in a conversation that began with a greeting: what is reinforced should hold there too."""
    return {"prompt": turns("Hi", SAYINGS["welcomes"][0], problem.question), "answer": problem.answer}


def overall(chat: list[Problem], seed: int) -> list[list[dict]]:
    """As many conversations as problems: half are problems alone, a quarter about Python functions, a quarter chat."""
    count = len(chat)
    rng = np.random.default_rng([seed, 4])
    alone = [turns(p.question, worked_or_terse(p, rng)) for p in chat[: count // 2]]
    functions = library_questions(seed)[: count // 4]
    mixed = small_talk(chat[count // 2 :], count - len(alone) - len(functions), seed)
    conversations = alone + functions + mixed
    return [conversations[i] for i in rng.permutation(count)]


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("corpus"))
