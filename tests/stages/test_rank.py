"""Ranking by hand: what comes first, what is written, and what the page refuses."""

import http.client
import io
import json
import socket
import struct
import threading

import pytest

from tritium.core.config import UserError
from tritium.core.files import DataError, Skipped, read_records
from tritium.core.formats import ranking
from tritium.stages import rank
from tritium.stages.cli import run_stage


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(prompt: str, answers: list[str], **more) -> dict:
    return {"prompt": prompt, "answers": answers} | more


@pytest.fixture
def session(tmp_path) -> rank.Session:
    rows = [row("wide", ["a", "b"], scores=[1, 9]), row("near", ["a", "b", "<b>c</b>"], scores=[1.0, 5.0, 1.1])]
    return rank.Session(rank.read_items(write(tmp_path / "a.jsonl", rows), Skipped()), tmp_path / "out.jsonl")


def rankings(session) -> list[list]:
    return [ranking(record)[1] for _, record in read_records(str(session.out), Skipped("raise"))]


def test_disagreement_comes_first_then_the_smallest_margin_then_what_has_no_scores(tmp_path):
    rows = [
        row("plain", ["a", "b"]),
        row("wide", ["a", "b"], scores=[0, 9]),
        row("near", ["a", "b", "c"], scores=[0, 9, 9.5]),
        row("agreed", ["a", "b"], scores=[[0, 0, 0], [0.1, 0.1, 0.1]]),
        row("disputed", ["a", "b"], scores=[[0, 9, 0], [5, 5, 5]]),
        row("split", ["a", "b"], scores=[[0, 9], [5, 5]]),
    ]
    items = rank.read_items(write(tmp_path / "a.jsonl", rows), Skipped())
    assert [i.messages[0]["content"] for i in items] == ["split", "disputed", "agreed", "near", "wide", "plain"]


def test_the_answers_that_evaluate_saves_are_gathered_by_prompt(tmp_path):
    turns = [{"role": "user", "content": "q"}]
    rows = [{"messages": turns, "answer": a, "score": {"value": v}} for a, v in (("x", 1), ("y", 0), ("x", 1))]
    skipped = Skipped()
    (item,) = rank.read_items(write(tmp_path / "a.jsonl", [*rows, {"messages": turns, "answer": ""}]), skipped)
    assert item.answers == ["x", "y"] and item.scores == [[1.0], [0.0]] and skipped.reasons.total() == 1
    with pytest.raises(DataError, match="two different answers"):
        rank.read_items(write(tmp_path / "b.jsonl", rows[:1]), Skipped())
    with pytest.raises(DataError, match="more different answers than there are letters"):
        rank.read_items(write(tmp_path / "c.jsonl", [row("q", [str(i) for i in range(27)])]), Skipped())


def test_the_answers_that_generate_writes_can_be_ranked(tmp_path):
    answers = [{"text": text, "finish_reason": "stop", "tokens": 1} for text in ("x", "y", "x")]
    (item,) = rank.read_items(write(tmp_path / "a.jsonl", [{"question": "q", "answers": answers}]), Skipped())
    assert item.answers == ["x", "y"]


def test_records_that_can_not_be_shown_or_compared_are_skipped_and_counted(tmp_path):
    good = json.dumps(row("good", ["a", "b"]))
    bad = [row("q", ["\ud800", "b"]), row("\udfff", ["a", "b"]), row("q", ["a", "b"], scores=[float("nan"), 1])]
    bad += [row("q", ["a", "b"], scores=5), row("q", ["a", "b"], score={"value": "x"}), [1]]
    lines = [good, *map(json.dumps, bad), "[" * 100_000, '{"prompt": ' + "9" * 5000 + "}", '{"prompt": "q']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    skipped = Skipped()
    assert [i.messages[0]["content"] for i in rank.read_items(str(tmp_path / "a.jsonl"), skipped)] == ["good"]
    assert skipped.reasons.total() == 9 and skipped.reasons["malformed JSON"] == 3


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("B>A=C", [[1], [0, 2]]),
        ("b > c > a", [[1], [2], [0]]),
        ("5 3 5", [[0, 2], [1]]),
        ("-1,2,0", [[1], [2], [0]]),
        ("c", [[2], [0, 1]]),
    ],
)
def test_a_ranking_scores_or_a_choice(text, levels):
    assert rank.parse_verdict(text, 3) == levels


@pytest.mark.parametrize("text", ["", "A>B", "A>A>B", "A>B>D", "1 2", "1 2 nan", "D", "best", "A>B>C>"])
def test_a_verdict_that_makes_no_sense_is_refused(text):
    with pytest.raises(UserError):
        rank.parse_verdict(text, 3)


def test_a_ranking_is_written_as_the_reward_stage_reads_it_with_who_and_when(session):
    shown = session.shown(0, "anna")
    session.record(0, "anna", "B>A=C")
    assert rankings(session) == [[[shown[1]], [shown[0], shown[2]]]]
    written = json.loads(session.out.read_text())
    assert written["who"] == "anna" and written["when"].endswith("+00:00")


def test_what_was_ranked_is_not_asked_again_but_of_another(session):
    session.record(0, "anna", "A>B>C")
    again = rank.Session(session.items, session.out)
    assert again.left("anna") == [1] and again.left("ben") == [0, 1]


def test_the_terminal_asks_until_it_understands(session, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\nA=B>C\n\n"))
    rank.ask(session, "anna")
    out = capsys.readouterr().out
    assert "write a ranking" in out and "[user] near" in out and len(rankings(session)) == 1


def test_the_stage_says_what_is_wrong_with_a_missing_file(capsys):
    assert run_stage("rank", ["--data=/no/such.jsonl", "--terminal"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.fixture
def ask_page(session):
    server = rank.make_server(session, 0, "someone")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def ask(method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body, kind | {k.replace("_", "-"): v for k, v in headers.items()})
        reply = connection.getresponse()
        data = reply.read().decode()
        connection.close()
        return reply.status, json.loads(data) if data.startswith("{") else data

    ask.port = server.server_port
    yield ask
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_gives_an_item_and_takes_its_verdict(session, ask_page):
    assert "<title>tritium rank</title>" in ask_page("GET", "/")[1]
    _, item = ask_page("GET", "/next?who=anna")
    assert item["messages"] == [{"role": "user", "content": "near"}] and item["left"] == 2
    assert sorted(item["answers"]) == ["<b>c</b>", "a", "b"]
    body = {"id": item["id"], "who": "anna", "verdict": "B>A>C"}
    assert ask_page("POST", "/rank", json.dumps(body)) == (200, {"left": 1})
    assert rankings(session) == [[[item["answers"][i]] for i in (1, 0, 2)]]
    _, other = ask_page("GET", "/next?who=anna&skip=1")
    assert other == {"left": 0, "who": "anna"} and ask_page("GET", "/next")[1]["who"] == "someone"


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        '{"id": 0}',
        '{"id": 99, "verdict": "A>B"}',
        '{"id": 0, "verdict": "A>Z"}',
        '{"id": -1, "verdict": "A"}',
        '{"id": 1e999, "verdict": "A>B>C"}',
        '{"id": 0, "who": "\\ud800", "verdict": "A>B>C"}',
        "[" * 100_000,
    ],
)
def test_a_malformed_request_is_answered_and_the_page_goes_on(session, ask_page, body):
    code, reply = ask_page("POST", "/rank", body)
    assert code == 400 and reply["error"] and not (session.out.exists() and session.out.read_text())
    assert ask_page("GET", "/next?skip=%C2%B2")[0] == 200
    assert ask_page("GET", "/next")[0] == 200 and ask_page("GET", "/other")[0] == 404


@pytest.mark.parametrize("raw", [b"no http at all\r\n\r\n", b"POST /rank HTTP/1.1\r\n\r\n", b"PUT / HTTP/1.1\r\n\r\n"])
def test_malformed_http_and_a_client_that_goes_are_no_tracebacks(ask_page, capsys, raw):
    with socket.create_connection(("127.0.0.1", ask_page.port), timeout=10) as client:
        client.sendall(raw)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert b'"error"' in answer and b"<html" not in answer.lower()
    client = socket.create_connection(("127.0.0.1", ask_page.port), timeout=10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    client.close()
    assert ask_page("GET", "/next")[0] == 200 and "Traceback" not in capsys.readouterr().err


def test_a_port_that_can_not_be_is_told(tmp_path, capsys):
    assert run_stage("rank", ["--data=x.jsonl", "--port=70000"]) == 2
    assert "port=70000 must be below 65536" in capsys.readouterr().err


def test_other_sites_reach_neither_the_page_nor_the_file(session, ask_page):
    assert ask_page("GET", "/next", Host="evil.example")[0] == 403
    body = json.dumps({"id": 0, "who": "x", "verdict": "A>B>C"})
    assert ask_page("POST", "/rank", body, Host="evil.example")[0] == 400
    assert ask_page("POST", "/rank", body, Content_Type="text/plain")[0] == 400 and not session.out.exists()
