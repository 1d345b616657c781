"""Rollouts: sampling answers to problems and scoring them, for `sample`, `evaluate` and reinforcement learning."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from tritium.core.batch import Document, Group, PackedBatch, pack, plan_bins
from tritium.core.chat import stop_ids
from tritium.core.config import REQUIRED, ConfigError, check_ranges, opt
from tritium.core.data import SourcesConfig
from tritium.core.problems import Problem
from tritium.core.rewards import Answer, Judged, Reward, Score, judge
from tritium.core.setup import load_model, load_tokenizer
from tritium.core.tokenizer import Tokenizer
from tritium.core.tools import TOOLS, Tool, ToolUse
from tritium.model.cache import PagedCache, cache_pages
from tritium.model.generate import Completion, Engine, generate
from tritium.model.sampling import Options
from tritium.model.stops import Text
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh, local_device


@dataclass
class SamplingConfig:
    """How answers are sampled."""

    temperature: float = opt(1.0, "sampling temperature (0: greedy decoding)")
    top_k: int = opt(0, "sample from the k likeliest tokens (0: all)")
    top_p: float = opt(1.0, "nucleus sampling: from the likeliest tokens with this total probability (1: all)")
    min_p: float = opt(0.0, "drop tokens less likely than this fraction of the likeliest one's probability (0: none)")
    repetition_penalty: float = opt(1.0, "divides the logits of tokens already in the prompt or answer (1: off)")
    presence_penalty: float = opt(0.0, "subtracted from the logits of tokens already in the answer")
    frequency_penalty: float = opt(0.0, "subtracted from the logit of a token once per occurrence in the answer")
    no_repeat_ngram: int = opt(0, "forbid n-grams of this many tokens to occur twice (0: off)")
    stop: list[str] = opt([], "strings that end an answer, besides the end token")
    tool: str = opt("", "tool that the model may call, in <tool_call> tags at the end of a turn", choices=("", *TOOLS))
    max_calls: int = opt(4, "most tool calls per answer", least=0)
    max_tokens: int = opt(128, "most new tokens per answer")
    max_batch: int = opt(256, "sequences generated at once: bounds the KV cache", least=1)
    cache_mb: float = opt(0.0, "size of the KV cache in MB (0: as much as max_batch sequences can need)", least=0)

    def __post_init__(self):
        check_ranges(self, "sampling.")
        try:
            self.options()
        except ValueError as error:
            raise ConfigError(f"sampling.{error}") from None

    def options(self, stop_ids: Sequence[int] | None = None) -> Options:
        """The sampler's options for a request."""
        own = {f.name: getattr(self, f.name) for f in fields(Options) if hasattr(self, f.name)}
        return Options(stop_ids=stop_ids, **own)

    def pages(self, model: Transformer) -> int | None:
        """Pages of the KV cache that fit into `cache_mb`; None if that is 0. Raises: ConfigError for less than two."""
        if not self.cache_mb:
            return None
        page = PagedCache.page_bytes(model)
        pages = int(self.cache_mb * 1e6 / page)
        if pages < 2:
            raise ConfigError(f"sampling.cache_mb={self.cache_mb} is less than two pages of {page} bytes, the least")
        return pages


@dataclass
class AskConfig:
    """The settings of every stage that only runs a model."""

    model: str = opt(REQUIRED, "model folder, with its tokenizer")
    template: str = opt("", "name of the chat template (empty: the model's own)")
    sampling: SamplingConfig = opt(SamplingConfig, "how answers are sampled")
    seed: int = opt(0, "sampling seed", least=0)
    dtype: str = opt("auto", "parameter dtype (auto: bf16 where it is fast)", choices=("auto", "bf16", "fp32", "fp64"))
    device: str = opt("auto", "device to run on", choices=("auto", "cpu", "cuda"))

    def __post_init__(self):
        check_ranges(self)

    def open(self, mesh: Mesh | None = None) -> tuple[Transformer, Tokenizer]:
        """The frozen model and its tokenizer; by default on a single process."""
        try:
            mesh = mesh or Mesh.single(local_device(self.device))
        except ValueError as error:
            raise ConfigError(str(error)) from None
        model = load_model(self.model, self.dtype, mesh, frozen=True)
        return model, load_tokenizer(self.model, model, self.template)

    def engine(self, model: Transformer, tokenizer: Tokenizer, tool: Tool | None = None) -> Engine:
        """The engine that samples answers, with the configured tool or `tool` in its place."""
        sampling, tool = self.sampling, tool or TOOLS.get(self.sampling.tool)
        pages = sampling.pages(model) or cache_pages(sampling.max_batch, model.config.max_positions)
        extend = ToolUse(tokenizer, tool, sampling.max_calls) if tool else None
        return Engine(model, pages, sampling.max_batch, tokenizer.incremental, extend)


@dataclass
class Sample:
    """One sampled answer, its text without the stop string, and its score (None if the judge failed)."""

    problem: Problem
    completion: Completion
    text: str
    score: Score | None = None
    verified: Score | None = None  # the verifier's, which measures accuracy only

    def shown(self, decoder: Callable | None = None) -> Answer:
        """What a judge is given."""
        problem = self.problem
        prompt = problem.messages[-1]["content"]
        return Answer(self.completion.tokens, self.text, prompt, problem.reference, problem.messages, decoder)

    @property
    def right(self) -> bool:
        """Whether the verifier, or else the judge, found the answer right; False if it failed."""
        score = self.verified or self.score
        return score is not None and score.solved


@dataclass
class Rollout:
    """The samples of each problem as a group, and the judge's failures."""

    groups: list[list[Sample]]
    failures: Counter = field(default_factory=Counter)
    greedy: list[float] | None = None  # the reward of each problem's greedy answer

    @property
    def samples(self) -> list[Sample]:
        return [sample for group in self.groups for sample in group]


def roll_out(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    reward: Reward,
    sampling: SamplingConfig,
    *,
    n: int = 1,
    seed: Sequence[int] = (0,),
    verifier: Reward | None = None,
    tool: Tool | None = None,
) -> Rollout:
    """Sample and score `n` answers to each problem of this data-parallel rank's `share`.

    A `verifier` decides which are right if the reward does not; a `tool` (default: that of `sampling`) may be called
    in answers, see core/tools.py. A sample's randomness depends on `seed`, its problem's place among those of all ranks
    and its number, so not on the number of ranks; a problem that comes twice gets different samples. All ranks of a
    replica get the first one's samples and scores, since tools, time limits and endpoints may answer each differently.
    """
    places = [model.mesh.dp_rank + model.mesh.dp * i for i in range(len(problems))]  # as `share` dealt them
    tool = tool or TOOLS.get(sampling.tool)
    drawn = {"n": n, "seed": [sample_seed(*seed, place, i) for place in places for i in range(n)]}
    drawn |= {"max_batch": sampling.max_batch, "pages": sampling.pages(model)}
    drawn |= {"decoder": tokenizer.incremental} if sampling.stop else {}
    drawn |= {"extend": ToolUse(tokenizer, tool, sampling.max_calls)} if tool else {}
    options = sampling.options(stop_ids(tokenizer))
    completions = generate(model, [p.ids for p in problems], options=options, **drawn)
    texts = [Text.of(tokenizer.incremental(), sampling.stop, c.tokens) for c in completions]
    samples = [Sample(problems[i // n], *both) for i, both in enumerate(zip(completions, texts, strict=True))]
    answers = [sample.shown(tokenizer.incremental) for sample in samples]
    judged = judge(reward, answers)
    verdicts = judge(verifier, answers) if verifier else Judged([None] * len(answers))
    unknown = Score(0.0, "the verifier failed", right=False) if verifier else None
    for sample, score, verdict in zip(samples, judged.scores, verdicts.scores, strict=True):
        sample.score, sample.verified = score, verdict or unknown
    groups = [samples[i : i + n] for i in range(0, len(samples), n)]
    return model.mesh.broadcast_object(Rollout(groups, judged.failures + verdicts.failures), ("tp", "cp"))


def sample_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def gather(rollout: Rollout, mesh: Mesh) -> Rollout:
    """The rollouts of all data-parallel ranks, in the order of the problems, on every rank."""
    parts = mesh.gather_objects(rollout)[:: mesh.cp * mesh.tp]  # the ranks of a replica hold the same
    groups = sorted((g for part in parts for g in part.groups), key=lambda g: g[0].problem.index)
    return Rollout(groups, sum((part.failures for part in parts), Counter()))


def sample_document(
    sample: Sample, fields: dict[str, float], per_token: dict[str, Sequence[float]] | None = None
) -> Document:
    """Prompt and answer as sampled, token for token. The answer's tokens, its end token included, have weight 1; the
    prompt and tool output have weight 0.

    `fields` belong to the sample, `per_token` to the answer's tokens; "sampler_logp" is the sampler's log-prob of each.
    """
    prompt, answer = sample.problem.ids, sample.completion
    silent = np.zeros(len(prompt), np.float32)
    weights = np.append(silent, np.array(answer.weights or [1.0] * len(answer.tokens), np.float32))
    spread = {"sampler_logp": answer.logps} | (per_token or {})
    arrays = {name: np.append(silent, np.array(values, np.float32)) for name, values in spread.items()}
    return Document(np.array(prompt + answer.tokens, np.int32), weights, fields | arrays)


def pack_updates(
    groups: Sequence[Group],
    data: SourcesConfig,
    updates: int,
    mesh: Mesh,
    count: Callable[[Sequence[Group]], dict[str, float]] = lambda groups: {},
) -> list[PackedBatch]:
    """Pack this rank's groups into at least `updates` batches, if there are enough; `count` adds denominators."""
    lengths = [sum(map(len, group)) for group in groups]
    bins = plan_bins(lengths, min(data.bin_tokens, -(-sum(lengths) // updates)))
    chosen = [[groups[i] for i in members] for members in bins]
    return [pack(own, count(own), data.quantum).to(mesh.device) for own in chosen]
