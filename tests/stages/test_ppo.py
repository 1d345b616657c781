"""PPO as a stage: it learns from a verifier and from a reward model, resumes to the bit, and says what went wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import tritium
from tritium.core.chat import render
from tritium.core.config import ConfigError, UserError, from_dict
from tritium.core.files import Skipped
from tritium.core.health import PANEL, TROUBLES
from tritium.core.reference import Follower
from tritium.core.rewards import Answer, Score, judge
from tritium.core.rewards.model import open_reward
from tritium.core.tokenizer import Tokenizer
from tritium.core.trainer import Trainer, TrainingError
from tritium.model.heads import ScalarModel
from tritium.parallel.mesh import Mesh
from tritium.stages import dpo, grpo, ppo, reward
from tritium.stages import tokenizer as tokenizer_stage
from tritium.stages.cli import run_stage

pytestmark = pytest.mark.usefixtures("quick")


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def config(tiny, out: Path, steps: int, **sections) -> ppo.Config:
    fixed = {"model": tiny.model, "reward": "exact", "data": {"sources": [tiny.data("problems.jsonl")]}}
    fixed |= {"run": {"out": str(out), "steps": steps, "dtype": "fp32"}, "sampling": {"max_tokens": 6}}
    return from_dict(ppo.Config, fixed | {"ppo": {"prompts": 6, "group": 4, "epochs": 2}} | sections)


@pytest.fixture
def odd_is_right(monkeypatch):
    judged = lambda ids, text, **_: Score(float(ids[-1] % 2))  # noqa: E731
    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: judged)


def test_ppo_reinforces_what_is_rewarded_and_its_critic_learns(tiny, tmp_path, odd_is_right):
    settings = {"prompts": 6, "group": 8, "epochs": 2, "minibatches": 2, "beta": 0.01, "value_warmup": 1}
    data = {"sources": [tiny.data("problems.jsonl")], "bin_tokens": 256}
    made = config(tiny, tmp_path, 48, ppo=settings, data=data, optim={"lr": 2e-3, "weight_decay": 0.0})
    made.sampling.max_tokens, made.verifier = 4, ""
    result = ppo.train(made)
    steps = [m for m in rows(tmp_path) if "loss" in m]
    assert len(steps) == 48
    rewards = [m["reward"] for m in steps if "reward" in m]
    assert len(rewards) == 12 and sum(rewards[-2:]) / 2 > sum(rewards[:2]) / 2 + 0.2
    assert steps[0]["explained_variance"] == 0.0  # its head begins with zeros
    assert sum(m["value_loss"] for m in steps[-8:]) < 0.8 * sum(m["value_loss"] for m in steps[:8])
    assert "grad_norm.policy" not in steps[0] and "grad_norm.policy" in steps[4]  # one rollout for the critic alone
    assert steps[4]["kl_k1"] == steps[4]["kl_k3"] == 0.0 < steps[-4]["kl_k3"]
    assert tritium.load(result.checkpoint, dtype=torch.float32).config.vocab_size


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory) -> str:
    """The tiny model with another tokenizer."""
    folder, made = (tmp_path_factory.mktemp(name) for name in ("other", "tokenizer"))
    shutil.copytree(tiny.model, folder, dirs_exist_ok=True)
    tokenizer_stage.train(tokenizer_stage.Config([tiny.data("text.jsonl")], vocab_size=330, out=str(made)))
    for file in made.iterdir():
        shutil.copy(file, folder)
    return str(folder)


@pytest.fixture(scope="module")
def scorer(tiny, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("scorer")
    sections = {"model": tiny.model, "data": {"sources": [tiny.data("pairs.jsonl")], "bin_tokens": 512}}
    made = from_dict(reward.Config, sections | {"run": {"out": str(out), "steps": 2, "dtype": "fp32"}})
    return reward.train(made).checkpoint


def test_a_reward_model_judges_each_answer_by_itself_and_counts_what_it_cannot_read(tiny, scorer):
    judged = open_reward("", scorer, 0.0, "fp32", Mesh.single())
    answers = [Answer([1], "7", "What is 3 + 4?"), Answer([1], "it is 12", "What is 5 + 7?", "12")]
    both = judge(judged, answers).scores
    for answer, score in zip(answers, both, strict=True):
        (alone,) = judge(judged, [answer]).scores
        assert alone.value == pytest.approx(score.value, abs=1e-6) and alone.parts == {"reward_model": alone.value}
    failed = judge(judged, [Answer([1], "and " * 200, "?")])
    assert failed.scores == [None] and "longer than the reward model's context of 96" in str(failed.failures)
    total = judge(open_reward("exact", scorer, 0.0, "fp32", Mesh.single(), 0.5), answers).scores[1]
    assert total.value == pytest.approx(0.5 * both[1].value + total.parts["reward"])
    assert total.solved  # as exact says: a reward model knows nothing of that


def test_with_a_reward_model_and_text_beside(tiny, scorer, tmp_path):
    text = {"sources": [tiny.data("chats.jsonl")], "bin_tokens": 256}
    more = {
        "reward_model": scorer,
        "reward": "",
        "model_weight": 0.5,
        "text": text,
        "shaping": {"clip": 2.0, "missing_eos": 1.0},
    }
    settings = {"prompts": 4, "group": 2, "epochs": 2, "target_kl": 0.01, "beta": 0.1, "critic_lr": 0.0}
    ppo.train(config(tiny, tmp_path, 6, ppo=settings, **more))
    steps = [m for m in rows(tmp_path) if "loss" in m]
    assert len(steps) == 6 and all(m["ptx"] > 0 for m in steps)
    found = [m for m in steps if "reward" in m]  # each rollout's numbers once
    assert len(found) == 3 and all(m["reward/reward_model"] == pytest.approx(2 * m["reward"]) for m in found)
    assert all("grad_norm.policy" in m and "grad_norm.critic" not in m for m in steps)
    assert all(m["shaped_reward"] < m["reward"] for m in found)  # hardly an answer ends within six tokens
    watched = {name for names in PANEL.values() for name in names} | {name for name, *_ in TROUBLES.values()}
    assert watched <= {name for m in steps for name in m}  # what the panel shows and warns of is there
    assert all("right" in m for m in found)  # PPO's verifier by default; else nobody knows
    blind = config(tiny, tmp_path / "b", 1, reward_model=scorer, reward="", verifier="", ppo={"prompts": 2})
    ppo.train(blind)
    assert "right" not in rows(tmp_path / "b")[-1]
    assert found[-1]["beta"] < 0.1 * 0.98 + 1e-9  # the policy is nearer than it may be
    assert len({m["tokens"] for m in found}) > 1 and all(m["right"] <= 1 for m in found)


def test_a_rollout_is_left_once_the_policy_is_too_far_and_the_next_one_begins(tiny, tmp_path, odd_is_right):
    settings = {"prompts": 6, "group": 4, "epochs": 4, "stop_kl": 1e-6}
    ppo.train(config(tiny, tmp_path, 8, ppo=settings, optim={"lr": 3e-3}))
    assert [m["step"] for m in rows(tmp_path) if "loss" in m] == [1, 2, 5, 6]


class Killed(Exception):
    pass


def test_killed_and_resumed_equals_uninterrupted(tiny, tmp_path, monkeypatch, odd_is_right):
    def run(name: str) -> None:
        made = config(tiny, tmp_path / name, 6, ppo={"prompts": 4, "group": 2, "epochs": 2, "target_kl": 0.1})
        made.run.save_every, made.run.keep, made.optim.lr = 2, 9, 1e-3
        ppo.train(made)

    run("whole")
    step = Trainer.step

    def fatal(trainer, *args):
        if trainer.index == 3:
            trainer.finish_save()
            raise Killed
        return step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", fatal)
        with pytest.raises(Killed):
            run("cut")
    run("cut")
    for file in ("model.safetensors", "trainer/policy.safetensors", "trainer/critic.safetensors"):
        cut, whole = (tmp_path / name / "step-00000006" / file for name in ("cut", "whole"))
        assert cut.read_bytes() == whole.read_bytes(), file
    cut, whole = ([m.get("beta") for m in rows(tmp_path / name)] for name in ("cut", "whole"))
    assert cut == whole and len(set(cut)) == 4  # of three rollouts, and None


def test_a_reference_moves_and_is_found_again(tiny, tmp_path, odd_is_right):
    """Refreshed after every rollout, its KL is 0 at each one's start; as an average, it lags; resumed, it is there."""

    def run(name: str, steps: int, **reference) -> list[dict]:
        made = config(tiny, tmp_path / name, steps, reference=reference, optim={"lr": 3e-3})
        made.run.keep = 9
        ppo.train(made)
        return [m["kl_k3"] for m in rows(tmp_path / name) if m["step"] % 2]

    fixed, average, refreshed = run("fixed", 6), run("average", 6, every=1, decay=0.5), run("new", 6, every=1)
    assert 0 == refreshed[1] == refreshed[2] < average[2] < fixed[2]
    run("first", 4, every=1, decay=0.5)
    assert run("first", 6, every=1, decay=0.5) == average  # its first checkpoint was at step 4


@pytest.mark.parametrize("stage", ["ppo", "grpo", "dpo"])
def test_a_rollout_that_the_end_cut_short_moves_the_reference_once_when_the_run_is_extended(
    tiny, tmp_path, monkeypatch, odd_is_right, stage
):
    moves, betas = [], []
    follow = Follower.follow
    monkeypatch.setattr(Follower, "follow", lambda self, decay: (moves.append(decay), follow(self, decay))[1])
    monkeypatch.setattr(ppo, "adapted", lambda beta, *_: (betas.append(beta), beta / 2)[1])

    def run(steps: int) -> None:
        if stage == "ppo":
            made = config(tiny, tmp_path, steps, reference={"every": 1})
            made.ppo.target_kl = 0.1
        else:
            made = {"model": tiny.model, "data": {"sources": [tiny.data("problems.jsonl")], "bin_tokens": 512}}
            made |= {"run": {"out": str(tmp_path), "steps": steps, "dtype": "fp32"}}
            short, options = {"max_tokens": 6}, {"prompts": 4, "updates": 2}
            online = {"online": True, "draw": options | {"refresh": 1, "sampling": short}}
            reinforced = {"grpo": options | {"beta": 0.1, "group": 2}, "reference": {"every": 1}, "sampling": short}
            made = from_dict(*((dpo.Config, made | online) if stage == "dpo" else (grpo.Config, made | reinforced)))
        {"ppo": ppo, "grpo": grpo, "dpo": dpo}[stage].train(made)

    run(3)
    assert len(moves) == 1
    run(4)
    assert len(moves) == 2 and betas == [0.05, 0.025] * (stage == "ppo")


def test_the_base_of_an_adapter_is_the_reference(tiny, tmp_path, odd_is_right):
    made = config(tiny, tmp_path, 6, finetune={"kind": "lora", "rank": 4}, optim={"lr": 1e-2})
    ppo.train(made)
    found = [m["kl_k3"] for m in rows(tmp_path) if "kl_k3" in m]
    assert found[0] == 0.0 < found[-1]
    with pytest.raises(ConfigError, match="can't be updated from a policy that is an adapter"):
        ppo.train(config(tiny, tmp_path / "b", 2, finetune={"kind": "lora"}, reference={"every": 1}))


def test_a_reward_that_also_pays_for_length_is_named(tiny, tmp_path, monkeypatch, capsys):
    """A planted hack: what is verified does not improve, while answers grow and are paid for it."""
    long = lambda ids, text, **_: Score(len(ids) / 12, parts={"length": len(ids) / 12})  # noqa: E731
    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: long)
    settings = {"prompts": 6, "group": 8, "epochs": 1, "beta": 0.0}
    made = config(tiny, tmp_path, 28, ppo=settings, sampling={"max_tokens": 12}, optim={"lr": 5e-3})
    ppo.train(made)
    assert "likely reward hacking; what grows is length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reward="], "nothing is rewarded"),
        (["--reward_model={model}"], "is a language model: train one with `tritium reward`"),
        (["--ppo.epochs=0"], "ppo.epochs=0 must be at least 1"),
        (["--ppo.target_kl=1", "--ppo.beta=0"], "ppo.beta, which must start above 0"),
        (["--ppo.importance=2", "--sampling.top_k=5"], "needs sampling.temperature=1"),
        (["--ppo.importance=2", "--sampling.min_p=0.1"], "needs sampling.temperature=1"),
        (["--ppo.importance=2", "--sampling.repetition_penalty=1.1"], "needs sampling.temperature=1"),
        (["--data.band=0.5"], "must be two pass rates"),
        (["--data.band=0.1,0.9", "--reward=", "--verifier="], "which a reward model does not give: set --verifier"),
        (
            ["--ppo.beta=0", "--reference.every=2"],
            "reference has no effect without a KL to the reference: set ppo.beta",
        ),
        (["--ppo.beta=0", "--ppo.kl_in=loss"], "ppo.kl_in has no effect without a KL to the reference"),
        (["--reference.model={other}"], "has another vocabulary (330 tokens)"),
        (["--critic={other}"], "critic={other} has another vocabulary"),
        (["--shaping.clip=-1"], "shaping.clip=-1.0 must be at least 0"),
        (["--reward_model={model}"], "is a language model: train one with `tritium reward`"),
        (["--verifier=exat"], "exat"),
    ],
)
def test_what_cannot_be_is_told(tiny, other, tmp_path, capsys, arguments, words):
    fixed = [f"--model={tiny.model}", f"--data.sources={tiny.data('problems.jsonl')}", f"--run.out={tmp_path}"]
    filled = [a.format(model=tiny.model, other=other) for a in arguments]
    assert run_stage("ppo", [*fixed, "--reward=exact", *filled]) == 2
    assert words.format(other=other) in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_reward_model_may_have_another_base_and_tokenizer(tiny, other, tmp_path, monkeypatch):
    """It reads the text, not the policy's tokens."""
    ScalarModel(tritium.load(other, dtype=torch.float32)).initialize(0).save(str(tmp_path / "scorer"))
    for file in Path(other).glob("tokenizer*"):
        shutil.copy(file, tmp_path / "scorer")
    judged, tokenizer = open_reward("", str(tmp_path / "scorer"), 0.0, "fp32", Mesh.single()), Tokenizer.load(other)
    (score,) = judge(judged, [Answer([1], "it is 12", "What is 5 + 7?")]).scores
    chat = [{"role": "user", "content": "What is 5 + 7?"}, {"role": "assistant", "content": "it is 12"}]
    ids, model = torch.tensor(render(tokenizer, chat).ids), judged.judges["reward_model"].model
    assert score.value == pytest.approx(float(model.values(ids)[-1]), abs=1e-5)
    read, read_model = [], ppo.read_model
    monkeypatch.setattr(ppo, "read_model", lambda *given: (read.append(given[0]), read_model(*given))[1])
    ppo.open_networks(config(tiny, tmp_path, 1, reward_model=str(tmp_path / "scorer")), Mesh.single())
    assert read == [tiny.model]  # the critic reads the policy's tokens


def test_a_group_of_one_has_nothing_to_compare_with():
    with pytest.raises(ConfigError, match="rloo compares answers"):
        grpo.GRPOConfig(algorithm="rloo", group=1)
    assert grpo.GRPOConfig(algorithm="remax", group=1).group == 1
    with pytest.raises(ConfigError, match="rounds=2 looks for groups whose scores differ"):
        grpo.GRPOConfig(algorithm="remax", group=1, rounds=2)


def test_a_kl_in_the_loss_has_a_gradient_unless_k1_is_asked_for():
    """k1's is zero in the mean there, and it is the default in the reward."""
    for where, kind in (("reward", "k1"), ("loss", "k3")):
        assert ppo.objective_of(ppo.Config(model="", ppo=ppo.PPOConfig(kl_in=where))).kl == kind
        assert grpo.objective_of(grpo.GRPOConfig(algorithm="rloo", kl_in=where), grpo.SamplingConfig()).kl == kind
    assert ppo.objective_of(ppo.Config(model="", ppo=ppo.PPOConfig(kl_in="loss", kl="k1"))).kl == "k1"


def test_options_reach_the_objective():
    given = {"gamma": 0.9, "lam": 0.8, "value_clip": 0.0, "value_coefficient": 0.1, "beta": 0.2, "ptx": 3.0}
    objective = ppo.objective_of(ppo.Config(model="", ppo=ppo.PPOConfig(whiten=False, clip=0.1, **given)))
    assert vars(objective) | given | {"scale": "none", "clip_low": 0.1, "clip_high": 0.1} == vars(objective)
    given = {"clip_low": 0.1, "clip_high": 0.3, "normalization": "constant", "constant": 7.0, "scale": "none"}
    objective = grpo.objective_of(grpo.GRPOConfig(entropy=0.01, **given), grpo.SamplingConfig(temperature=0.8))
    assert vars(objective) | given | {"entropy": 0.01, "temperature": 0.8} == vars(objective)
    assert grpo.objective_of(grpo.GRPOConfig(algorithm="dr_grpo"), grpo.SamplingConfig(max_tokens=9)).constant == 9


def test_text_beside_answers_is_of_the_turns_that_were_asked_for(tiny, tmp_path):
    chat = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    tokenizer, counts = Tokenizer.load(tiny.model), []
    for turns in ("all", "last"):
        text = {"sources": [str(tmp_path / "chats.jsonl")], "turns": turns}
        made = config(tiny, tmp_path, 1, text=text)
        (batch,) = ppo.open_text(made, tokenizer, 256, Mesh.single(), Skipped()).step(0)
        counts.append(batch.counts["tokens"])
    assert counts[0] == 2 * counts[1] > 0


def test_records_of_the_text_that_are_left_out_are_told_before_the_first_step(tiny, tmp_path, monkeypatch, capsys):
    chats = Path(tiny.data("chats.jsonl")).read_text()
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "no answer"}]}\n' + chats)
    text, told, step = {"sources": [str(tmp_path / "chats.jsonl")], "bin_tokens": 256}, [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda *rest: (told.append(capsys.readouterr().err), step(*rest)))
    ppo.train(config(tiny, tmp_path / "out", 1, ppo={"prompts": 2, "epochs": 1}, text=text))
    assert f"skipped 1 × a record without an answer (keys: messages) (first: {tmp_path}/chats.jsonl:1)" in told[0]
    with pytest.raises(UserError, match="chats.jsonl:1: a record without an answer"):
        ppo.train(config(tiny, tmp_path / "other", 1, text=text | {"on_error": "raise"}))


def test_text_leaves_no_gradient_behind_where_no_answer_was_judged(tiny, tmp_path, monkeypatch):
    """Nothing moves then: the text's gradient must not wait for the next step."""
    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: lambda ids, text, **_: Score(0.0))
    monkeypatch.setattr("tritium.core.experience.Experience.batches", lambda *_, **__: [])
    seen = []
    step = Trainer.step

    def watched(trainer, *rest):
        step(trainer, *rest)
        seen.extend(float(f.gradient.abs().sum()) for f in trainer.flat["policy"].trained)

    monkeypatch.setattr(Trainer, "step", watched)
    text = {"sources": [tiny.data("chats.jsonl")], "bin_tokens": 256}
    ppo.train(config(tiny, tmp_path, 2, ppo={"prompts": 2, "epochs": 1}, text=text))
    assert seen and not any(seen)


@pytest.mark.parametrize("algorithm", ["rloo", "remax", "reinforce++", "gspo", "dr_grpo"])
def test_every_algorithm_runs_as_a_stage(tiny, tmp_path, monkeypatch, algorithm):
    odd = lambda ids, text, **_: Score(float(ids[-1] % 2))  # noqa: E731
    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: odd)
    settings = {"algorithm": algorithm, "prompts": 3, "group": 4, "beta": 0.02, "rounds": 2, "importance": 2.0}
    sections = {"model": tiny.model, "grpo": settings, "sampling": {"max_tokens": 6}}
    data = {"sources": [tiny.data("problems.jsonl")], "band": [0.1, 0.9]}
    run = {"out": str(tmp_path), "steps": 2, "dtype": "fp32"}
    grpo.train(from_dict(grpo.Config, sections | {"data": data, "run": run, "shaping": {"overlong": 3}}))
    for m in rows(tmp_path):
        assert m["grad_norm"] > 0 and m["sampler_gap"] < 1e-4 and m["sampled_tokens_per_second"] > 0
        assert m["shaped_reward"] < m["reward"]
    state = json.loads((tmp_path / "step-00000002" / "trainer" / "state.json").read_text())
    assert all(0 <= rate <= 1 for rate, _ in state["notes"]["pass_rates"].values())


def test_ppo_goes_on_where_the_judge_fails_on_every_answer(tiny, tmp_path, monkeypatch):
    def broken(ids, text, **_):
        raise OSError("the grader is down")

    monkeypatch.setattr("tritium.core.experience.open_reward", lambda *_: broken)
    settings = {"prompts": 2, "group": 1, "epochs": 2, "target_kl": 0.1, "stop_kl": 0.1}
    ppo.train(config(tiny, tmp_path, 2, ppo=settings))
    assert rows(tmp_path)[0]["beta"] == 0.05 and len(rows(tmp_path)) == 2


@pytest.mark.parametrize(("steps", "updates"), [(2, [1, 2]), (5, [1, 2, 3, 4, 5])])
def test_steps_are_optimizer_steps_also_where_a_rollout_is_left_half_used(tiny, tmp_path, odd_is_right, steps, updates):
    settings = {"prompts": 3, "group": 2, "epochs": 4}
    ppo.train(config(tiny, tmp_path, steps, ppo=settings))
    found = [m for m in rows(tmp_path) if "loss" in m]
    assert [m["step"] for m in found] == updates and sum("reward" in m for m in found) == -(-steps // 4)


def test_a_kl_that_blows_up_is_counted_and_ends_the_run_at_its_limit(tiny, tmp_path, monkeypatch, odd_is_right):
    made = config(tiny, tmp_path, 12, reference={"max_kl": 1e-4}, optim={"lr": 3e-2})
    monkeypatch.setattr("tritium.core.experience.BLOWN_UP", 1e-6)
    with pytest.raises(TrainingError, match=r"the KL to the reference is .* above reference.max_kl=0.0001"):
        ppo.train(made)
    counted = [m["kl_blowups"] for m in rows(tmp_path) if "kl_blowups" in m]
    assert counted == [0.0]  # of the first rollout; then it ended
    for steps in (5, 6):  # extended in the middle of a rollout, which is done again
        ppo.train(config(tiny, tmp_path / "on", steps, optim={"lr": 3e-2}))
    assert [m["kl_blowups"] for m in rows(tmp_path / "on") if "kl_blowups" in m] == [0.0, 1.0, 2.0, 2.0]


def test_actor_critic_reference_and_reward_share_a_base(tiny, tmp_path, monkeypatch):
    """Each is an adapter, or none, on one base in memory; a run that is resumed goes on to the bit."""
    lora = {"kind": "lora", "rank": 4}
    sections = {"model": tiny.model, "data": {"sources": [tiny.data("pairs.jsonl")], "bin_tokens": 512}}
    sections |= {"finetune": lora, "run": {"out": str(tmp_path / "scorer"), "steps": 2, "dtype": "fp32"}}
    scorer, seen = reward.train(from_dict(reward.Config, sections)).checkpoint, []
    opened = ppo.open_networks
    monkeypatch.setattr(ppo, "open_networks", lambda *a: (seen.append(opened(*a)), seen[-1])[1])
    judges = []
    monkeypatch.setattr(
        "tritium.core.experience.open_reward", lambda *a: (judges.append(open_reward(*a)), judges[-1])[1]
    )

    def run(name: str, steps: int) -> Path:
        made = config(tiny, tmp_path / name, steps, finetune=lora, reward_model=scorer, optim={"lr": 1e-2})
        return Path(ppo.train(made).checkpoint)

    whole = run("whole", 4)
    policy, critic = seen[0]["policy"], seen[0]["critic"].backbone
    model = judges[0].judges["reward_model"].model.backbone
    for other in (critic, model):
        shared = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
        own = {p.data_ptr() for p in other.parameters()} - shared
        adapters = [p for name, p in other.named_parameters() if ".pairs." in name]
        assert own == {p.data_ptr() for p in adapters} and adapters
    assert all(p.requires_grad for n, p in critic.named_parameters() if ".pairs." in n)
    assert not any(p.requires_grad for p in model.parameters())
    run("cut", 2)
    cut = run("cut", 4)
    for file in ("adapter_model.safetensors", "trainer/critic.safetensors"):
        assert (cut / file).read_bytes() == (whole / file).read_bytes(), file
