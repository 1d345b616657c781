"""Configurations: what users write, where it may be written, and what they hear when it is wrong."""

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tritium.core.config import REQUIRED, ConfigError, UserError, check_ranges, from_dict, load, nearest, opt, to_toml


@dataclass
class Optim:
    lr: float = opt(3e-4, "peak learning rate")
    name: str = opt("adamw", "which optimizer", choices=("adamw", "muon"))
    betas: list[float] = opt([0.9, 0.95], "decay rates of the moments")
    clip: float | None = opt(1.0, "largest gradient norm", above=0)
    ema: float = opt(0.0, "decay of the mean", least=0, below=1)

    def __post_init__(self):
        check_ranges(self, "optim.")
        if self.lr < 0:
            raise ConfigError("optim.lr must not be negative")


@dataclass
class Data:
    sources: list[str] = opt(REQUIRED, "files of training text")
    mix: dict[str, float] = opt({}, "share of each source")


@dataclass
class Config:
    data: Data = opt(Data, "what to train on")
    optim: Optim = opt(Optim(lr=1e-3), "how to train")
    steps: int = opt(10, "number of updates")
    resume: bool = opt(False, "continue the last run")
    seed: int | None = opt(None, "seed of everything random")
    dtype: str = opt("bf16", "compute dtype", choices=("bf16", "fp32"))
    out: str = opt("runs/a", "folder of the run")


def read(*arguments: str) -> Config:
    return load(Config, ["--data.sources=a.txt", *arguments], "tritium sft", "Fine-tune a model.")


def error(*arguments: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(*arguments)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)
    return str(caught.value)


def test_defaults_come_from_the_fields_and_from_the_section_instance():
    config = read()
    assert config == Config(data=Data(sources=["a.txt"]))
    assert config.optim.lr == 1e-3 and config.steps == 10 and config.seed is None


def test_instances_do_not_share_mutable_defaults():
    one, two = Config(data=Data(sources=[])), Config(data=Data(sources=[]))
    one.optim.betas.append(0.5)
    one.data.mix["x"] = 1.0
    assert two.optim.betas == [0.9, 0.95] and two.data.mix == {} and read().optim.betas == [0.9, 0.95]


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        (["--optim.lr=1e-5"], "optim.lr", 1e-5),
        (["--optim.lr", "2"], "optim.lr", 2.0),
        (["--steps", "1_000_000"], "steps", 1_000_000),
        (["--steps=1e6"], "steps", 1_000_000),
        (["--seed=-1"], "seed", -1),
        (["--seed", "-1"], "seed", -1),
        (["--resume"], "resume", True),
        (["--resume=false"], "resume", False),
        (["--resume", "True"], "resume", True),
        (["--optim.clip=none"], "optim.clip", None),
        (["--optim.betas=0.8, 0.9"], "optim.betas", [0.8, 0.9]),
        (["--optim.betas="], "optim.betas", []),
        (["--data.mix=a=1,b=0.5"], "data.mix", {"a": 1.0, "b": 0.5}),
        (["--data.sources=b.txt,c=d.txt"], "data.sources", ["b.txt", "c=d.txt"]),
        (["--dtype=fp32"], "dtype", "fp32"),
        (["--out="], "out", ""),
        (["--out=1"], "out", "1"),
        (["--steps=1", "--steps=2"], "steps", 2),
    ],
)
def test_command_line_values(arguments, key, value):
    config = asdict(read(*arguments))
    for name in key.split("."):
        config = config[name]
    assert config == value and type(config) is type(value)


def test_later_files_win_and_the_command_line_wins_over_files(tmp_path):
    (tmp_path / "a.toml").write_text('steps = 1\nseed = 1\nout = "a"\n[optim]\nlr = 1\nname = "muon"\n')
    (tmp_path / "b.toml").write_text("seed = 2\n[optim]\nlr = 2.0\n")
    config = read("--steps=3", "--config", f"{tmp_path}/a.toml", f"--config={tmp_path}/b.toml")
    assert (config.steps, config.seed, config.out) == (3, 2, "a")
    assert (config.optim.lr, config.optim.name) == (2.0, "muon") and type(config.optim.lr) is float


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--optim.lrr=1", ["--optim.lrr", "optim.lr"]),
        ("--lr=1", ["did you mean --optim.lr?"]),
        ("--stpes=1", ["did you mean --steps?"]),
        ("--qqqqq=1", ["qqqqq", "--help"]),
        ("--optim=1", ["section", "optim.lr"]),
        ("--optim.lr=fast", ["optim.lr", "fast", "float"]),
        ("--steps=1.5", ["steps", "1.5", "int"]),
        ("--steps=inf", ["steps", "inf", "int"]),
        ("--optim.lr=inf", ["optim.lr", "inf", "float"]),
        ("--optim.lr=nan", ["optim.lr", "nan", "float"]),
        ("--steps=true", ["steps", "int"]),
        ("--steps=none", ["steps", "int"]),
        ("--seed=x", ["seed", "int or none"]),
        ("--resume=maybe", ["resume", "maybe", "bool"]),
        ("--optim.betas=0.9,high", ["optim.betas", "list of float"]),
        ("--data.mix=a", ["data.mix", "table of float"]),
        ("--dtype=fp16", ["dtype", "bf16, fp32"]),
        ("--optim.name=adam", ["optim.name", "did you mean adamw?"]),
        ("--optim.lr", ["optim.lr needs a value", "float"]),
        ("--config", ["config needs a value", "TOML"]),
        ("steps=1", ["unexpected argument 'steps=1'", "--name=value"]),
        ("--optim.lr=-1", ["optim.lr must not be negative"]),
        ("--config=/no/such.toml", ["/no/such.toml", "No such file"]),
    ],
)
def test_a_mistake_is_named_with_the_remedy(argument, words):
    message = error(argument)
    assert all(word in message for word in words), message


def test_an_option_does_not_swallow_the_next_one():
    assert "out needs a value" in error("--out", "--steps=1")


def test_validation_of_the_dataclass_passes_through_unchanged():
    assert error("--optim.lr=-1") == "optim.lr must not be negative"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps = 1\nseed = = 2\n", ["line 2"]),
        ("[optim]\nlrr = 1\n", ["optim.lrr", "did you mean optim.lr?"]),
        ("[optim]\nlr = '1e-5'\n", ["optim.lr = '1e-5'", "float"]),
        ("steps = true\n", ["steps = True", "int"]),
        ("optim = 3\n", ["optim = 3", "section"]),
        ("[steps]\na = 1\n", ["steps", "int"]),
        ("out = 3\n", ["out = 3", "str"]),
        ("[data]\nsources = 'a.txt'\n", ["data.sources = 'a.txt'", "list of str"]),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, words):
    path = tmp_path / "my.toml"
    path.write_text(text)
    message = error(f"--config={path}")
    assert all(word in message for word in [str(path), *words]), message


def test_a_file_that_is_not_utf8_is_a_mistake_not_a_crash(tmp_path):
    (tmp_path / "my.toml").write_bytes(b'out = "\xff"\n')
    assert "my.toml" in error(f"--config={tmp_path}/my.toml")


def test_what_must_be_given_is_asked_for_with_its_meaning():
    with pytest.raises(ConfigError, match="data.sources must be given: files of training text"):
        load(Config, [], "tritium sft", "")
    with pytest.raises(TypeError, match="sources"):
        Data()


def test_toml_round_trip_is_exact():
    config = Config(
        data=Data(sources=['a "b"\\c', "ü\n\t\x7f\x00😀", ""], mix={"x y": 0.1, "": 1e300}),
        optim=Optim(lr=1 / 3, betas=[1e-30, 1e22], clip=None),
        steps=10**18,
        resume=True,
        seed=None,
    )
    assert from_dict(Config, tomllib.loads(to_toml(config))) == config
    assert from_dict(Config, asdict(config)) == config
    assert "seed" not in to_toml(config) and 'clip = "none"' in to_toml(config)
    assert from_dict(Config, tomllib.loads(to_toml(config, whole=False))) == config
    assert (
        to_toml(read("--optim.lr=3", "--data.sources=a"), whole=False)
        == '[data]\nsources = ["a"]\n\n[optim]\nlr = 3.0\n'
    )


def test_paths_are_taken_as_text():
    config = from_dict(Config, {"data": {"sources": [Path("a") / "b"]}, "out": Path("c")})
    assert config.data.sources == ["a/b"] and config.out == "c"


def test_help_shows_every_field_with_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit) as stopped:
        read("--help")
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "Fine-tune a model." in shown
    for words in (
        ("--optim.lr", "float", "default 0.001", "peak learning rate"),
        ("--optim.name", "adamw|muon", "which optimizer"),
        ("--optim.clip  (float > 0 or none; default 1.0)", "--optim.ema  (float ≥ 0 < 1; default 0.0)"),
        ("--data.sources", "list of str", "must be given", "files of training text"),
        ("--seed", "int or none", "default none"),
        ("--dtype", "bf16|fp32", "compute dtype"),
        ("[optim]", "how to train"),
    ):
        assert all(word in shown for word in words), words


@pytest.mark.parametrize(
    ("option", "said"),
    [("clip=0", "clip=0.0 must be above 0"), ("ema=1", "ema=1.0 must be below 1"), ("clip=none", "")],
)
def test_numbers_are_held_to_their_bounds(option, said):
    assert error(f"--optim.{option}") == f"optim.{said}" if said else read(f"--optim.{option}").optim.clip is None


def test_a_field_of_a_type_that_cannot_be_read_is_the_programmers_error():
    @dataclass
    class Bad:
        where: tuple[int, int] = opt((0, 0), "nothing can fill this from a command line")

    with pytest.raises(TypeError, match="where"):
        load(Bad, [], "x", "")


def test_nearest_prefers_the_whole_name_then_its_last_part():
    assert nearest("srt", ["sft", "dpo"]) == "sft"
    assert nearest("lr", ["optim.lr", "critic.lr", "layers"]) == "optim.lr"
    assert nearest("zzz", ["sft", "dpo"]) is None
