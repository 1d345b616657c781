"""Run a recipe: stages that build on one another, from raw text to an aligned model.

    tritium run --recipe=ladder --out=runs/ladder
    tritium run --recipe=my.toml

A recipe is a TOML file:

    title = "…"
    test = "{corpus}/test.jsonl"          problems that models with the metric exact_match are measured on

    [stages.sft]                          in this order; "{NAME}" in a setting is the result folder of a stage before
    kind = "sft"                          the stage to run, where it is not the table's name
    metric = "exact_match"                shown before and after: on `test`, or one of the stage's own numbers
    higher_is_better = true               of the metric; the default is false for a loss
    config.model = "{pretrain}"           the stage's settings

`extends = "ladder"` starts from another recipe. A rerun skips what is finished and resumes what was interrupted;
a stage whose settings changed, and all after it, run anew. results.json and report.html are written as it goes.
"""

import hashlib
import json
import re
import shutil
import sys
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module, resources
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from tritium.core.config import ConfigError, from_dict, listed, opt, to_toml
from tritium.core.files import Skipped, json_lines
from tritium.core.health import PANEL, diagnose
from tritium.core.metrics import machine, peak_memory, read_lines
from tritium.core.output import make_folder
from tritium.core.report import read_curves, write_report
from tritium.core.run import Result
from tritium.stages import evaluate
from tritium.stages.cli import STAGES
from tritium.stages.plan import aligned

RECIPE_KEYS = {"title": str, "test": str, "stages": dict}
STAGE_KEYS = {"kind": str, "metric": str, "higher_is_better": bool, "config": dict}
REFERENCE = re.compile(r"\{([A-Za-z_][\w-]*)\}")  # "{sft}"; other braces, "{}" or JSON, are text

SHOWS_ITS_RESULT = True  # the command line need not
ONE_PROCESS = True  # its stages would each join torchrun's mesh, and leave it closed for the next


@dataclass
class Config:
    recipe: str = opt("ladder", "a built-in recipe (ladder, rlhf, smoke, curate-demo), or a TOML file")
    out: str = opt("", "folder of the run (default: runs/RECIPE)")


def train(config: Config) -> Result:
    """Run the recipe; the result is the last stage's checkpoint, and its metric."""
    recipe = read_recipe(config.recipe)
    out = Path(config.out or f"runs/{Path(config.recipe).stem}")
    check(recipe, out)
    ladder = Ladder(recipe, make_folder(out, "out"))
    for name in recipe["stages"]:
        ladder.climb(name)
    print(ladder.table())
    print(f"\npeak memory {peak_memory() / 1e9:.1f} GB   report {out / 'report.html'}   results {out / 'results.json'}")
    models = [row for row in ladder.rows if row["metric"] == "exact_match"]
    if models:
        command = sys.argv[0] if Path(sys.argv[0]).name == "tritium" else "tritium"
        print(f"talk to it:  {command} chat --model={models[-1]['checkpoint']}")
    last = ladder.rows[-1]
    return Result(last["checkpoint"], {last["metric"]: last["after"]})


def read_recipe(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The recipe of that name or file, merged over what it extends. Raises: ConfigError."""
    built_in = resources.files("tritium.stages.recipes")
    path = Path(name) if name.endswith(".toml") else built_in / f"{name}.toml"
    if not path.is_file() or name in seen:
        known = sorted(p.name.removesuffix(".toml") for p in built_in.iterdir() if p.name.endswith(".toml"))
        raise ConfigError(f"recipe: {name!r} is neither a file nor built in; {listed(name, known)}")
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if "extends" in recipe:
        recipe = merge(read_recipe(str(recipe.pop("extends")), (*seen, name)), recipe)
    check_table(str(path), recipe, RECIPE_KEYS)
    if not recipe.get("stages"):
        raise ConfigError(f"{path}: a recipe needs at least one [stages.NAME]")
    for stage, table in recipe["stages"].items():
        check_table(f"{path}: [stages.{stage}]", table, STAGE_KEYS)
    return recipe


def check_table(where: str, table: Any, keys: dict[str, type]) -> None:
    """Raise ConfigError unless `table` has only these keys, with values of these types."""
    words = {str: "a string", bool: "true or false", dict: "a table"}
    if not isinstance(table, dict):
        raise ConfigError(f"{where} = {table!r} must be a table")
    for key, value in table.items():
        if key not in keys:
            raise ConfigError(f"{where} has {key!r}; known are {', '.join(keys)}")
        if not isinstance(value, keys[key]):
            raise ConfigError(f"{where}: {key} = {value!r} must be {words[keys[key]]}")


def merge(base: dict, over: dict) -> dict:
    """`over` laid over `base`, table by table."""
    tables = {k for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | over | {k: merge(base[k], over[k]) for k in tables}


def check(recipe: dict[str, Any], out: Path) -> None:
    """Find what can be known to be wrong before the first stage runs. Raises: ConfigError."""
    folders: dict[str, str] = {}
    for name, table in recipe["stages"].items():
        if not REFERENCE.fullmatch(f"{{{name}}}") or name == "answers":
            raise ConfigError(f"[stages.{name!r}]: a stage's name is that of its folder: a word, not `answers`")
        _, config = configure(name, table, folders, out)
        if metric_of(table) == "exact_match":
            if begins_with(config) is None:
                raise ConfigError(f'[stages.{name}]: metric = "exact_match" measures a model, and this stage has none')
            if "test" not in recipe:
                raise ConfigError(f'[stages.{name}]: metric = "exact_match" needs test = "problems.jsonl" at the top')
            test = fill(recipe["test"], folders, "test")
            if test == recipe["test"] and not Path(test).is_file():
                raise ConfigError(f"test: {test} does not exist")
        folders[name] = str(out / name)


def configure(name: str, table: dict, folders: Mapping[str, str], out: Path) -> tuple[ModuleType, Any]:
    """The module that stage `name` runs, and its Config, which writes to out/name. Raises: ConfigError."""
    where, kind = f"[stages.{name}]", table.get("kind", name)
    if kind not in STAGES:
        raise ConfigError(f"{where}: there is no stage {kind!r}; {listed(kind, STAGES)}")
    module = import_module(f"tritium.stages.{kind}")
    options = getattr(getattr(module, "Config", None), "__dataclass_fields__", {})
    if not options.keys() & {"run", "out"}:
        raise ConfigError(f"{where}: {kind!r} makes no folder that another stage could use: a recipe can't run it")
    folder = str(out / name)
    place = {"run": {"out": folder}} if "run" in options else {"out": folder}
    settings = fill(table.get("config", {}), folders, where)
    try:
        return module, from_dict(module.Config, merge(settings, place))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def fill(value: Any, folders: Mapping[str, str], where: str) -> Any:
    """Replace "{NAME}" by the folder that stage NAME made, in every string. Raises: ConfigError."""
    if isinstance(value, dict):
        return {k: fill(v, folders, where) for k, v in value.items()}
    if isinstance(value, list):
        return [fill(v, folders, where) for v in value]
    if not isinstance(value, str):
        return value
    for name in REFERENCE.findall(value):
        if name not in folders:
            before = ", ".join(folders) or "none"
            raise ConfigError(f"{where}: {value!r}: no stage {name!r} comes before; these do: {before}")
    return REFERENCE.sub(lambda match: folders[match[1]], value)


def metric_of(table: dict) -> str:
    return table.get("metric", "eval_loss")


def begins_with(config: Any) -> str | None:
    """The model that a stage starts from: empty where it makes one, None where it has nothing to do with models."""
    return config.init if hasattr(config, "init") else getattr(config, "model", None)  # pretrain's `model` is a shape


def digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Ladder:
    """A run of a recipe: what is done, and where it is written.

    state.json holds, by stage, the key of what it was run with and, once it is finished, its Result; and by model,
    its exact match with the key of what was measured.
    """

    def __init__(self, recipe: dict[str, Any], out: Path):
        """Raises: ConfigError where a stage would write into a folder that no run of a recipe made."""
        self.recipe, self.out = recipe, out
        self.state_file = out / "state.json"
        self.state = json.loads(self.state_file.read_text(encoding="utf-8")) if self.state_file.exists() else {}
        self.done: dict[str, dict] = self.state.setdefault("stages", {})
        for name in recipe["stages"]:
            if name not in self.done and (out / name).exists():
                raise ConfigError(f"{out / name} is there, and not of a recipe's making: use another --out, or move it")
        self.rows: list[dict[str, Any]] = []
        self.configs: dict[str, str] = {}
        self.folders: dict[str, str] = {}
        self.made: dict[str, tuple[str, str]] = {}  # a result's folder → its stage's name and key
        self.key = ""  # of the stages so far: a stage is the same only if all before it are

    def climb(self, name: str) -> None:
        """Run stage `name`, or find that it is done."""
        table = self.recipe["stages"][name]
        module, config = configure(name, table, self.folders, self.out)
        self.configs[name] = to_toml(config)
        self.key = digest(self.key, module.__name__, self.configs[name])
        if self.done.get(name, {}).get("key") != self.key:
            if (self.out / name).exists():
                shutil.rmtree(self.out / name)
            self.done[name] = {"key": self.key}
            self.save_state()
        finished = "result" in self.done[name] and Path(self.done[name]["result"]["checkpoint"]).exists()
        place = f"{len(self.configs)} of {len(self.recipe['stages'])}"
        print(f"== {name} ({place}){': already done' * finished}", file=sys.stderr, flush=True)
        measured = metric_of(table) == "exact_match"
        before = self.exact_match(begins_with(config)) if measured else None
        if not finished:
            start = time.perf_counter()
            result = asdict(module.train(config))
            self.done[name] |= {"seconds": time.perf_counter() - start, "result": result}
            self.save_state()
        checkpoint = self.done[name]["result"]["checkpoint"]
        self.folders[name], self.made[checkpoint] = checkpoint, (name, self.key)
        self.rows.append(self.describe(name, table, before, self.exact_match(checkpoint) if measured else None))
        self.write()

    def describe(self, name: str, table: dict, before: float | None, after: float | None) -> dict[str, Any]:
        """A finished stage's row of results.json. Raises: ConfigError where its metric is not among its numbers."""
        metric, done = metric_of(table), self.done[name]
        metrics = done["result"]["metrics"]
        if metric != "exact_match":
            if metric not in metrics:
                raise ConfigError(f"[stages.{name}]: metric = {metric!r} is not one of its own: {', '.join(metrics)}")
            before, after = done["result"]["before"].get(metric), metrics[metric]
        row = {"name": name, "metric": metric, "before": before, "after": after}
        row |= {"higher_is_better": table.get("higher_is_better", "loss" not in metric), "seconds": done["seconds"]}
        row |= {key: metrics.get(key) for key in ("tokens_per_second", "mfu")}
        return row | {"checkpoint": done["result"]["checkpoint"]}

    def exact_match(self, model: str) -> float | None:
        """The share of the test's problems that a model solves, measured once; None for no model at all."""
        if not model:
            return None
        test = Path(fill(self.recipe["test"], self.folders, "test"))
        name, key = self.made.get(model, ("", model))
        key = digest(key, hashlib.sha256(test.read_bytes()).hexdigest())
        known = self.state.setdefault("exact_match", {})
        if known.get(name or model, {}).get("key") != key:
            answers = make_folder(self.out / "answers", "out") / f"{name}.jsonl"
            settings = evaluate.Config(model=model, data=str(test), save=str(answers) if name else "")
            known[name or model] = {"key": key, "value": evaluate.measure(settings).metrics["exact_match"]}
            self.save_state()
        return known[name or model]["value"]

    def save_state(self) -> None:
        temporary = self.state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=2), encoding="utf-8")
        temporary.replace(self.state_file)

    def write(self) -> None:
        """results.json and report.html, of the stages so far."""
        text = json.dumps({"stages": self.rows}, indent=2) + "\n"
        (self.out / "results.json").write_text(text, encoding="utf-8")
        curves, warnings = {}, []
        for row in self.rows:
            file = self.out / row["name"] / "metrics.jsonl"
            if file.exists():
                curves |= self.charts(row["name"], file)
                warnings += [f"{row['name']}: {said}" for said in diagnose([r for _, r in read_lines(file)]).values()]
        write_report(
            self.out / "report.html",
            title=self.recipe.get("title", "A run"),
            config_toml="\n".join(f"# ── {name} ──\n\n{config}" for name, config in self.configs.items()),
            stages=self.rows,
            curves=curves,
            warnings=warnings,
            samples=self.samples(),
            machine=machine(),
        )

    @staticmethod
    def charts(name: str, file: Path) -> dict[str, dict]:
        """A stage's curves, by the titles of their charts; those of reinforcement learning as a panel."""
        wanted = {name: ("loss", "eval_loss", "eval_accuracy")}
        names = dict.fromkeys(key for _, values in read_lines(file) for key in values)
        if "reward" in names:
            components = tuple(key for key in names if key.startswith("reward/"))
            wanted |= {f"{name}: {title}": keys for title, keys in PANEL.items()}
            wanted[f"{name}: reward"] += components
        found = {title: read_curves(file, keys) for title, keys in wanted.items()}
        drawn = {title: {k: v for k, v in series.items() if len(v) > 1} for title, series in found.items()}
        return {title: series for title, series in drawn.items() if series}

    def samples(self, count: int = 6) -> list[dict[str, str]]:
        """The first and the last measured model that answers at all, on the same problems."""
        models = [row for row in self.rows if row["metric"] == "exact_match"]
        files = [self.out / "answers" / f"{row['name']}.jsonl" for row in models]
        files = [file for file in files if file.exists()]
        if not files:
            return []
        ends = [islice(json_lines(str(file), Skipped()), count) for file in (files[0], files[-1])]
        first, last = ([row for _, row in rows] for rows in ends)
        prompts = [row["messages"][-1]["content"] for row in first]
        rows = zip(prompts, first, last, strict=True)
        return [{"prompt": p, "before": a["answer"], "after": b["answer"]} for p, a, b in rows]

    def table(self) -> str:
        """The stages, a line each."""
        digits = {"before": 3, "after": 3, "seconds": 0, "tokens_per_second": 0}
        rows = [("stage", "metric", "before", "after", "seconds", "tokens/s", "checkpoint")]
        for row in self.rows:
            numbers = ("–" if row[key] is None else f"{row[key]:.{n}f}" for key, n in digits.items())
            rows.append((row["name"], row["metric"], *numbers, row["checkpoint"]))
        return "\n".join(aligned(rows, left=(0, 1, 6)))


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("run"))
