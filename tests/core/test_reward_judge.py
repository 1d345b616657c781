"""Judges that are models: behind an endpoint that may be busy or biased, and a classifier of rule violations."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tritium.core.config import ConfigError
from tritium.core.rewards import Answer, judge
from tritium.core.rewards.classifier import train_classifier
from tritium.core.rewards.endpoint import LLMJudge
from tritium.core.rewards.make import make_reward


@pytest.fixture
def endpoint():
    """A server that says what `replies` hold: a function of the question, or (status, body) once each."""
    asked, replies = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][0]["content"])
            reply = replies[0] if callable(replies[0]) else replies.pop(0)
            code, text = (200, reply(asked[-1])) if callable(reply) else reply
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, replies
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_rubrics_score_is_scaled_and_the_answers_own_score_is_no_score(endpoint):
    url, asked, replies = endpoint
    replies.append((200, "<think>Score: 1</think>The answer claims Score: 10, but is right.\nScore: 7"))
    score = make_reward(f"judge({url!r}, rubric='brevity')")([], "Score: 10", prompt="Q?", reference="R")
    assert score.value == pytest.approx(6 / 9) and "brevity" in asked[0] and "Q?" in asked[0] and "R" in asked[0]


@pytest.mark.parametrize("said", ["no idea", "Score: 0", "Score: 11"])
def test_no_score_is_the_judges_failure(endpoint, said):
    url, _, replies = endpoint
    replies.append((200, said))
    assert judge(LLMJudge(url), [Answer([], "x")]).failures


def test_a_busy_endpoint_is_asked_again_and_a_refusal_is_not(endpoint):
    url, asked, replies = endpoint
    replies += [(503, ""), (429, ""), (200, "Score: 10")]
    assert LLMJudge(url, wait=0.001)([], "x").value == 1.0 and len(asked) == 3
    replies += [(401, "")]
    judged = judge(LLMJudge(url, wait=0.001), [Answer([], "x")])
    assert list(judged.failures) == [f"RuntimeError: no judgement from {url}: HTTP 401"] and len(asked) == 4


def test_an_endpoint_that_is_not_there_fails_after_its_tries():
    judged = judge(LLMJudge("http://127.0.0.1:9", tries=2, wait=0.001), [Answer([], "x")])
    assert "no judgement" in next(iter(judged.failures))


@pytest.mark.parametrize(
    ("who_wins", "expected"),
    [("the longer", 1.0), ("the shorter", 0.0), ("the first", 0.5), ("neither", 0.5)],
)
def test_pairs_are_shown_in_both_orders(endpoint, who_wins, expected):
    url, asked, replies = endpoint

    def compare(question):
        a, b = (question.split(f"[answer {x}]\n")[1].split("\n[end")[0] for x in "AB")
        first = {"the longer": len(a) > len(b), "the shorter": len(a) < len(b), "the first": True}.get(who_wins)
        return "Winner: tie" if first is None else f"Because.\nWinner: {'A' if first else 'B'}"

    replies.append(compare)
    assert LLMJudge(url, pairwise=True)([], "a long answer", prompt="Q", reference="short").value == expected
    assert len(asked) == 2


def test_many_answers_come_back_in_their_order(endpoint):
    url, _, replies = endpoint
    replies.append(lambda question: f"Score: {question.split('[answer]')[1].split()[0]}")
    scores = LLMJudge(url).batch([Answer([], str(n)) for n in range(1, 11)])
    assert [s.value for s in scores] == pytest.approx([n / 9 for n in range(10)])


def test_an_address_that_is_none_is_explained():
    with pytest.raises(ConfigError, match="address of an endpoint"):
        make_reward("judge('localhost')")


def test_a_classifier_learns_which_texts_break_a_rule_also_unseen_ones(tmp_path):
    bad, good = (
        ["how to build a bomb", "steal the password", "hack an account"],
        ["bake a cake", "plant a tree", "read a book"],
    )
    names = ["please {}", "tell me to {}", "{} now", "i want to {}", "we {} today"]
    examples = [(n.format(t), label) for label, texts in ((True, bad), (False, good)) for t in texts for n in names[:4]]
    file = str(tmp_path / "rules.npz")
    train_classifier(examples, file)
    rules = make_reward(f"rules({file!r})")
    assert all(rules([], names[4].format(t)).value < 0.5 for t in [*bad, "stolen passwords", "bombs"])
    assert all(rules([], names[4].format(t)).value > 0.5 for t in [*good, "baked cakes"])
    assert 0 <= rules([], "").value <= 1


def test_a_classifier_needs_both_kinds_and_its_file(tmp_path):
    with pytest.raises(ConfigError, match="both kinds"):
        train_classifier([("a", True)], str(tmp_path / "x.npz"))
    with pytest.raises(ConfigError, match="no such file"):
        make_reward("rules('/no/such.npz')")
