"""Run a recipe: stages that build on one another, from raw text to an aligned model.

    tritium run --recipe=ladder --out=runs/ladder
    tritium run --recipe=my.toml

A recipe is a TOML file:

    title = "…"
    test = "{corpus}/test.jsonl"          problems that every language model of the run is measured on

    [stages.sft]                          in this order; "{NAME}" in a setting is that stage's result folder
    kind = "sft"                          the stage to run, where it is not the table's name
    metric = "exact_match"                shown before and after: on `test`, or one of the stage's own numbers
    config.model = "{pretrain}"           the stage's settings

`extends = "ladder"` starts from another recipe. A rerun skips what is finished and resumes what was interrupted;
a stage whose settings changed, and all after it, run anew. results.json and report.html are written as it goes.
"""

import hashlib
import json
import shutil
import sys
import time
import tomllib
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from tritium.core.config import ConfigError, from_dict, opt
from tritium.core.metrics import machine, peak_memory
from tritium.core.report import read_curves, write_report
from tritium.core.trainer import Result
from tritium.stages import evaluate

STAGE_KEYS = {"kind", "metric", "before", "higher_is_better", "config"}

SHOWS_ITS_RESULT = True  # the command line need not


@dataclass
class Config:
    recipe: str = opt("ladder", "a built-in recipe (ladder, smoke), or a TOML file")
    out: str = opt("", "folder of the run (default: runs/RECIPE)")


def train(config: Config) -> Result:
    """Run the recipe; the result is the last stage's checkpoint, and its metric."""
    recipe = read_recipe(config.recipe)
    out = Path(config.out or f"runs/{Path(config.recipe).stem}")
    out.mkdir(parents=True, exist_ok=True)
    ladder = Ladder(recipe, out)
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
    built_in = resources.files("tritium.stages.recipes") / f"{name}.toml"
    path = Path(name) if name.endswith(".toml") else built_in
    if not path.is_file() or name in seen:
        known = ", ".join(
            sorted(p.name.removesuffix(".toml") for p in built_in.parent.iterdir() if p.suffix == ".toml")
        )
        raise ConfigError(f"recipe: {name!r} is not a file, and not one of {known}")
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if "extends" in recipe:
        recipe = merge(read_recipe(recipe.pop("extends"), (*seen, name)), recipe)
    if not recipe.get("stages"):
        raise ConfigError(f"{path}: a recipe needs at least one [stages.NAME]")
    for stage, table in recipe["stages"].items():
        if unknown := set(table) - STAGE_KEYS:
            raise ConfigError(f"{path}: [stages.{stage}] has {', '.join(unknown)}; known are {', '.join(STAGE_KEYS)}")
    return recipe


def merge(base: dict, over: dict) -> dict:
    """`over` laid over `base`, table by table."""
    both = {
        k: merge(base[k], v) if isinstance(v, dict) and isinstance(base.get(k), dict) else v for k, v in over.items()
    }
    return base | both


class Ladder:
    """A run of a recipe: what is done, and where it is written."""

    def __init__(self, recipe: dict[str, Any], out: Path):
        self.recipe, self.out = recipe, out
        self.state_file = out / "state.json"
        self.state = json.loads(self.state_file.read_text()) if self.state_file.exists() else {}
        self.rows: list[dict[str, Any]] = []
        self.folders: dict[str, str] = {}
        self.key = ""  # of the stages so far: a stage is the same only if all before it are

    def climb(self, name: str) -> None:
        """Run stage `name`, or find that it is done."""
        table = self.recipe["stages"][name]
        settings = self.fill(table.get("config", {}))
        folder = self.out / name
        self.key = hashlib.sha256(json.dumps([self.key, name, table, settings], sort_keys=True).encode()).hexdigest()
        known = self.state.get(name, {})
        if known.get("key") != self.key:
            shutil.rmtree(folder, ignore_errors=True)
            known = {}
        if "row" in known and Path(known["row"]["checkpoint"]).exists():
            print(f"== {name}: already done", file=sys.stderr, flush=True)
            row = known["row"]
        else:
            self.remember(name, {"key": self.key})
            print(f"== {name}", file=sys.stderr, flush=True)
            row = self.run(name, table, settings, folder)
            self.remember(name, {"key": self.key, "row": row})
        self.folders[name] = row["checkpoint"]
        self.rows.append(row)
        self.write()

    def run(self, name: str, table: dict, settings: dict, folder: Path) -> dict[str, Any]:
        """Run the stage and describe it in a row of results.json."""
        try:
            module = import_module(f"tritium.stages.{table.get('kind', name)}")
        except ModuleNotFoundError:
            raise ConfigError(f"[stages.{name}]: there is no stage {table.get('kind', name)!r}") from None
        place = {"run": {"out": str(folder)}} if "run" in module.Config.__dataclass_fields__ else {"out": str(folder)}
        config = from_dict(module.Config, merge(settings, place))
        metric = table.get("metric", "eval_loss")
        before = None
        if metric == "exact_match":
            before = self.exact_match(config.model if hasattr(config, "model") else config.init)
        start = time.perf_counter()
        result = module.train(config)
        seconds = time.perf_counter() - start
        if metric == "exact_match":
            after = self.exact_match(result.checkpoint)
        else:
            after = result.metrics[metric]
            before = result.metrics[table["before"]] if "before" in table else result.before.get(metric)
        return {
            "name": name,
            "metric": metric,
            "before": before,
            "after": after,
            "higher_is_better": table.get("higher_is_better", True),
            "seconds": seconds,
            "tokens_per_second": result.metrics.get("tokens_per_second"),
            "mfu": result.metrics.get("mfu"),
            "checkpoint": result.checkpoint,
        }

    def exact_match(self, model: str) -> float:
        """The share of the test's problems that a model solves; measured once per model."""
        known = self.state.setdefault("exact_match", {})
        if model not in known:
            answers = self.out / "answers" / f"{Path(model).parent.name}.jsonl"
            answers.parent.mkdir(exist_ok=True)
            settings = evaluate.Config(model=model, data=self.fill(self.recipe["test"]), save=str(answers))
            known[model] = evaluate.measure(settings).metrics["exact_match"]
        return known[model]

    def fill(self, value: Any) -> Any:
        """Replace "{NAME}" by the folder that stage NAME made, in every string. Raises: ConfigError."""
        if isinstance(value, dict):
            return {k: self.fill(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.fill(v) for v in value]
        if not isinstance(value, str):
            return value
        try:
            return value.format(**self.folders)
        except KeyError as error:
            raise ConfigError(f"{value!r}: no stage {error} comes before") from None

    def remember(self, name: str, entry: dict) -> None:
        self.state[name] = entry
        temporary = self.state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.state, indent=2))
        temporary.replace(self.state_file)

    def write(self) -> None:
        """results.json and report.html, of the stages so far."""
        (self.out / "results.json").write_text(json.dumps({"stages": self.rows}, indent=2) + "\n")
        curves = {}
        for row in self.rows:
            file = self.out / row["name"] / "metrics.jsonl"
            if file.exists():
                found = read_curves(file, ("loss", "eval_loss", "eval_accuracy", "right", "reward", "entropy"))
                curves[row["name"]] = {k: v for k, v in found.items() if len(v) > 1}
        write_report(
            self.out / "report.html",
            title=self.recipe.get("title", "A run"),
            config_toml=json.dumps(self.recipe, indent=2),
            stages=self.rows,
            curves={k: v for k, v in curves.items() if v},
            samples=self.samples(),
            machine=machine(),
        )

    def samples(self, count: int = 6) -> list[dict[str, str]]:
        """The first and the last measured model that answers at all, on the same problems."""
        models = [row for row in self.rows if row["metric"] == "exact_match"]
        files = [self.out / "answers" / f"{row['name']}.jsonl" for row in models]
        files = [file for file in files if file.exists()]
        if not files:
            return []
        first, last = ([json.loads(line) for line in f.read_text().splitlines()[:count]] for f in (files[0], files[-1]))
        return [
            {"prompt": a["messages"][-1]["content"], "before": a["answer"], "after": b["answer"]}
            for a, b in zip(first, last, strict=True)
        ]

    def table(self) -> str:
        """The stages, a line each."""
        show = lambda value, digits: "–" if value is None else f"{value:.{digits}f}"  # noqa: E731
        lines = [f"{'stage':<12}{'metric':<18}{'before':>8}{'after':>8}{'seconds':>9}{'tokens/s':>10}  checkpoint"]
        for row in self.rows:
            scores = f"{show(row['before'], 3):>8}{show(row['after'], 3):>8}"
            speed = f"{show(row['seconds'], 0):>9}{show(row['tokens_per_second'], 0):>10}"
            lines.append(f"{row['name']:<12}{row['metric']:<18}{scores}{speed}  {row['checkpoint']}")
        return "\n".join(lines)


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("run"))
