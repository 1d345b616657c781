"""A real server on localhost: what clients ask, ask wrongly, and leave unread; and files of prompts."""

import fcntl
import http.client
import io
import json
import os
import pty
import re
import resource
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from urllib.parse import quote

import pytest
import torch

from tritium.core.chat import stop_ids
from tritium.core.config import ConfigError, UserError, from_dict
from tritium.core.rollout import SamplingConfig
from tritium.core.setup import load_model, load_tokenizer
from tritium.core.web import Server
from tritium.model.beam import beam_search
from tritium.model.transformer import Transformer
from tritium.parallel.mesh import Mesh
from tritium.stages import chat, generate, serve, sft
from tritium.stages.cli import Terminated

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def server(tiny):
    config = serve.Config(model=tiny.model, port=0, dtype="fp32")
    model = load_model(tiny.model, "fp32", Mesh.single(), frozen=True)
    running = serve.ModelServer(config, model, load_tokenizer(tiny.model, model))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def ask(server, path: str, body, method: str = "POST") -> tuple[int, dict]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body if isinstance(body, (str, type(None))) else json.dumps(body))
    response = connection.getresponse()
    found = response.status, json.loads(response.read())
    connection.close()
    return found


def stream(server, path: str, body) -> list:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request("POST", path, json.dumps(body | {"stream": True}))
    response = connection.getresponse()
    assert response.status == 200 and response.headers["Content-Type"] == "text/event-stream"
    lines = [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]
    connection.close()
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "What is 1 + 2?"}]


def test_chat_completions_and_their_streams_say_the_same(server):
    body = {"messages": HELLO, "max_tokens": 12, "seed": 4, "n": 2, "logprobs": True}
    status, whole = ask(server, CHAT, body)
    assert status == 200 and whole["object"] == "chat.completion" and len(whole["choices"]) == 2
    chunks = stream(server, CHAT, body | {"stream_options": {"include_usage": True}})
    assert chunks[-1]["usage"] == whole["usage"] and whole["usage"]["completion_tokens"] > 2
    for i, choice in enumerate(whole["choices"]):
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == i]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"]["content"] for c in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"] in ("stop", "length")
        logprobs = [x["logprob"] for c in own[1:] for x in c["logprobs"]["content"]]
        assert logprobs == pytest.approx([x["logprob"] for x in choice["logprobs"]["content"]], abs=1e-5)
        assert len(logprobs) >= 1 and max(logprobs) <= 0


def test_the_likeliest_tokens_are_told_with_each(server):
    body = {"max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    status, found = ask(server, CHAT, body | {"messages": HELLO})
    assert status == 200
    for entry in found["choices"][0]["logprobs"]["content"]:
        top = [x["logprob"] for x in entry["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert entry["top_logprobs"][0] == {
            "token": entry["token"],
            "logprob": pytest.approx(entry["logprob"], abs=1e-5),
            "bytes": entry["bytes"],
        }
    del body["top_logprobs"]
    for k in (0, 2):
        logprobs = ask(server, TEXT, body | {"prompt": "1 + 2", "logprobs": k})[1]["choices"][0]["logprobs"]
        best = [max(top, key=top.get) for top in logprobs["top_logprobs"] or ()]
        assert best == (logprobs["tokens"] if k else []) and len(logprobs["token_logprobs"]) == len(logprobs["tokens"])


def test_text_completions_take_texts_and_ids(server):
    ids = server.tokenizer.encode("1 + 2", bos=server.tokenizer.adds_bos)
    body = {"max_tokens": 6, "temperature": 0}
    status, found = ask(server, TEXT, body | {"prompt": ["1 + 2", "7"]})
    assert status == 200 and [c["index"] for c in found["choices"]] == [0, 1]
    for prompt in (ids, [ids]):
        assert ask(server, TEXT, body | {"prompt": prompt})[1]["choices"][0]["text"] == found["choices"][0]["text"]
    stop = found["choices"][0]["text"][1:3]
    shorter = ask(server, TEXT, body | {"prompt": ids, "stop": stop})[1]["choices"][0]
    assert shorter["finish_reason"] == "stop" and stop not in shorter["text"]


def test_a_limit_of_any_size_is_the_context(server):
    assert ask(server, TEXT, {"prompt": "1", "max_tokens": 10**12})[0] == 200


def test_typed_content_is_text(server):
    typed = [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 2?"}]}]
    body = {"max_tokens": 6, "temperature": 0}
    (plain, parts) = (ask(server, CHAT, body | {"messages": m})[1]["choices"] for m in (HELLO, typed))
    assert plain == parts
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    status, found = ask(server, CHAT, {"messages": picture})
    assert status == 400 and "content that is not text" in found["error"]["message"]


def test_a_whole_number_of_any_size_is_a_penalty(server):
    """A tensor takes no integer beyond 64 bits: the whole step failed, and all requests in it."""
    body = {"prompt": "1 + 1", "max_tokens": 2, "repetition_penalty": 10**30}
    assert ask(server, TEXT, body)[0] == 200


def test_a_text_goes_on_with_its_space_and_an_answer_begins_without(server, monkeypatch):
    monkeypatch.setattr(server.tokenizer._engine, "adds_space", True)  # as Llama's does
    letters = range(server.tokenizer.vocab_size)
    space = next(i for i in letters if len(x := server.tokenizer.piece(i)) > 1 and x[0] == "▁" != x[1])
    word = server.tokenizer.piece(space)[1:]
    body = {"max_tokens": 1, "temperature": 0, "logit_bias": {str(space): 1000}}
    assert ask(server, TEXT, body | {"prompt": "2 +"})[1]["choices"][0]["text"] == f" {word}"
    assert ask(server, CHAT, body | {"messages": HELLO})[1]["choices"][0]["message"]["content"] == word


def test_replies_have_the_keys_of_openais(server):
    """What its own client reads with strict validation, and what others look for."""
    body = {"max_tokens": 4, "temperature": 0, "logprobs": True}
    chat = ask(server, CHAT, body | {"messages": HELLO, "top_logprobs": 2})[1]
    assert chat.keys() == {"id", "object", "created", "model", "choices", "usage"} and chat["id"].startswith(
        "chatcmpl-"
    )
    choice = chat["choices"][0]
    assert choice.keys() == {"index", "message", "finish_reason", "logprobs"}
    for entry in (told := choice["logprobs"]["content"]):
        assert entry.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        assert all(top.keys() == {"token", "logprob", "bytes"} for top in entry["top_logprobs"])
    assert (
        b"".join(bytes(x["bytes"]) for x in told)
        .decode("utf-8", "replace")
        .lstrip()
        .startswith(choice["message"]["content"].rstrip("\ufffd").lstrip())
    )
    text = ask(server, TEXT, body | {"prompt": "1 + 2", "logprobs": 1})[1]
    logprobs = text["choices"][0]["logprobs"]
    assert text["id"].startswith("cmpl-") and text["object"] == "text_completion"
    assert logprobs["text_offset"] == [len("".join(logprobs["tokens"][:i])) for i in range(4)]
    for path, more in ((CHAT, {"messages": HELLO}), (TEXT, {"prompt": "1 + 2", "logprobs": 1})):
        *chunks, last = stream(server, path, body | more | {"stream_options": {"include_usage": True}})
        assert last["choices"] == [] and last["usage"]["total_tokens"] > 4 and {c["usage"] for c in chunks} == {None}
        assert {c["object"] for c in chunks} == {"chat.completion.chunk" if path == CHAT else "text_completion"}
        assert [c["choices"][0]["finish_reason"] for c in chunks][-2:] == [None, "length"]
    offsets = [x for c in chunks for x in c["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == logprobs["text_offset"]
    error = ask(server, CHAT, {"messages": []})[1]["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_a_token_beyond_the_tokenizer_is_no_text_and_no_failure(tiny, tmp_path):
    """Models have rows for more: Qwen's are padded to a multiple. One was drawn, and all requests failed."""
    small = load_model(tiny.model, "fp32", Mesh.single(), frozen=True)
    model = Transformer(replace(small.config, vocab_size=352)).initialize(0).requires_grad_(False)
    tokenizer = load_tokenizer(tiny.model, model)
    running = serve.ModelServer(serve.Config(model=tiny.model, port=0), model, tokenizer)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    body = {"max_tokens": 3, "temperature": 0, "logit_bias": {"351": 1000}, "logprobs": True, "top_logprobs": 20}
    status, found = ask(running, CHAT, body | {"messages": HELLO})
    running.shutdown()
    running.server_close()
    assert status == 200 and found["choices"][0]["message"]["content"] == ""
    assert [x["token"] for x in found["choices"][0]["logprobs"]["content"]] == [""] * 3
    assert tokenizer.decode([351]) == tokenizer.piece(351) == ""
    with pytest.raises(ValueError, match="token id 352 is outside"):
        tokenizer.decode([352])


def test_many_clients_may_connect_at_once(server):
    """Beyond five at a time the system let them wait, for a second and then for longer."""

    class Idle(socketserver.BaseRequestHandler):
        pass

    idle = Server("127.0.0.1", 0, Idle)  # accepts nobody
    clients = [socket.create_connection(("127.0.0.1", idle.server_port), timeout=0.5) for _ in range(64)]
    for client in clients:
        client.close()
    idle.server_close()


def test_models_are_listed_and_found_by_their_names(server):
    (model,) = ask(server, "/v1/models", None, "GET")[1]["data"]
    assert model["id"] == server.name
    for name in (server.name, quote(server.name, safe="")):  # clients write the slashes of a folder either way
        assert ask(server, f"/v1/models/{name}", None, "GET") == (200, model)
    status, found = ask(server, "/v1/models/gpt-4", None, "GET")
    assert status == 404 and f"GET /v1/models or /v1/models/{server.name}" in found["error"]["message"]


def test_a_prompt_is_echoed_and_scored_and_offsets_point_into_the_text(server):
    """What lm-eval asks for; a character of several tokens stands at one place. Escapes were counted for it."""
    text, tokenizer = "é1 + 2", server.tokenizer
    ids = tokenizer.encode(text, bos=tokenizer.adds_bos)
    body = {"prompt": [text, ids], "max_tokens": 3, "temperature": 0, "logprobs": 2, "echo": True}
    found = ask(server, TEXT, body)[1]["choices"]
    alone = ask(server, TEXT, body | {"echo": False})[1]["choices"]
    logps = server.worker.engine.model.logits(torch.tensor(ids)).log_softmax(-1)
    for choice, short in zip(found, alone, strict=True):
        told, own = choice["logprobs"], short["logprobs"]
        assert choice["text"] == text + short["text"]
        n = len(ids)
        assert told["tokens"][n:] == own["tokens"]
        assert told["token_logprobs"][n:] == pytest.approx(own["token_logprobs"], abs=1e-5)  # in other company
        assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
        assert told["token_logprobs"][1:n] == pytest.approx(logps[range(n - 1), ids[1:]].tolist(), abs=1e-4)
        assert [max(t.values()) for t in told["top_logprobs"][1:n]] == pytest.approx(
            logps[:-1].amax(-1).tolist(), abs=1e-4
        )
        starts = [len(tokenizer.decode(ids[:i]).rstrip("\ufffd")) for i in range(n)]
        assert told["text_offset"][:n] == starts and 0 in starts[1:] and told["text_offset"][n] == len(text)
    chunks = [c["choices"][0] for c in stream(server, TEXT, body | {"prompt": text})]
    assert "".join(c["text"] for c in chunks) == found[0]["text"]
    assert [x for c in chunks for x in c["logprobs"]["text_offset"]] == found[0]["logprobs"]["text_offset"]


@pytest.mark.parametrize("echo", [True, False])
def test_a_prompt_is_scored_without_an_answer(server, echo):
    body = {"prompt": "1 + 2", "logprobs": 1, "echo": echo, "temperature": 0}
    status, found = ask(server, TEXT, body | {"max_tokens": 0, "n": 2})
    longer = ask(server, TEXT, body | {"max_tokens": 1})[1]["choices"][0]
    assert status == 200 and found["usage"]["completion_tokens"] == 0
    for choice in found["choices"]:
        assert choice["text"] == ("1 + 2" if echo else "") and choice["finish_reason"] == "length"
        assert choice["logprobs"]["tokens"] == longer["logprobs"]["tokens"][:-1]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(longer["logprobs"]["token_logprobs"][1:-1])
    chunks = [c["choices"][0] for c in stream(server, TEXT, body | {"max_tokens": 0})]
    assert "".join(c["text"] for c in chunks) == choice["text"] and chunks[-1]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        (CHAT, {"messages": HELLO, "max_tokens": 0}, 400, "max_tokens=0 must be at least 1"),
        (TEXT, {"prompt": "1", "max_tokens": -1}, 400, "max_tokens=-1 must be at least 1"),
        (CHAT, "{not json", 400, "not JSON"),
        (CHAT, "[" * 100_000, 400, "not JSON"),
        (CHAT, [1], 400, "must be a JSON object"),
        (CHAT, {"messages": HELLO, "temprature": 1}, 400, "unknown field 'temprature'; did you mean temperature?"),
        (CHAT, {"messages": HELLO, "prompt": "a"}, 400, "prompt is for /v1/completions"),
        (CHAT, {"messages": HELLO, "echo": True}, 400, "echo is for /v1/completions"),
        (TEXT, {"prompt": [9999], "echo": True}, 400, "the vocabulary has"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "temperature must be int or float"),
        (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature=-1.0 must be at least 0"),
        (CHAT, {"messages": HELLO, "max_tokens": True}, 400, "max_tokens must be int"),
        (CHAT, {"messages": HELLO, "n": 1000}, 400, "n=1000"),
        (CHAT, {"messages": HELLO, "logit_bias": {"a": 1}}, 400, "logit_bias must give numbers"),
        (CHAT, {"messages": HELLO, "logit_bias": {"2": 1e39}}, 400, "logit_bias=1e+39 must be from -1e+30 to 1e+30"),
        (CHAT, {"messages": HELLO, "logit_bias": {"2": 10**400}}, 400, "logit_bias must give numbers"),
        (CHAT, {"messages": HELLO, "frequency_penalty": -1e39}, 400, "must be from -1e+30"),
        (CHAT, {"messages": HELLO, "temperature": 1e-50}, 400, "temperature=1e-50 must be 0 or at least"),
        (CHAT, {"messages": HELLO, "top_p": 1e-50}, 400, "top_p=1e-50"),
        (CHAT, {"messages": HELLO, "presence_penalty": 10**400}, 400, "presence_penalty is too large"),
        (CHAT, {"messages": HELLO, "repetition_penalty": 1e-50}, 400, "repetition_penalty=1e-50"),
        (CHAT, {"messages": HELLO, "top_k": 10**30}, 400, "top_k"),
        (CHAT, {"messages": HELLO, "\ud800": 1}, 400, "unknown field"),
        (CHAT, {"messages": HELLO, "logit_bias": {"99999": 1}}, 400, "there is no token 99999"),
        (CHAT, {"messages": HELLO, "stop": [1]}, 400, "stop"),
        (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, 400, "21 top logprobs: from 0 to 20"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, 400, "top_logprobs goes with logprobs: true"),
        (TEXT, {"prompt": "1", "logprobs": -1}, 400, "-1 top logprobs"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 400, "unknown role 'king'"),
        (CHAT, {"messages": ["x"]}, 400, "messages must be a list"),
        (CHAT, {}, 400, "messages must be a list"),
        (TEXT, {"messages": HELLO}, 400, "messages is for /v1/chat/completions"),
        (TEXT, {"prompt": ""}, 400, "the prompt is empty"),
        (TEXT, {"prompt": [1] * 100}, 400, "the prompt has 100 tokens; the model's context is 96"),
        (TEXT, {"prompt": [-1]}, 400, "the vocabulary has"),
        (TEXT, {"prompt": [[1], {}]}, 400, "prompt must be text"),
        (TEXT, {"prompt": [True] * 32}, 400, "prompt must be text"),  # a step of booleans alone failed, for all
        ("/v1/completion", {}, 404, "there is no /v1/completion"),
    ],
)
def test_what_cannot_be_served_gets_a_sentence_and_others_go_on(server, path, body, status, words):
    found, error = ask(server, path, body)
    assert found == status and words in error["error"]["message"]
    assert ask(server, TEXT, {"prompt": "1", "max_tokens": 1})[0] == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"no http at all\r\n\r\n",
        b"GET /v1/models HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"DELETE /v1/models HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    ],
)
def test_malformed_http_gets_an_error_in_json(server, raw):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as client:
        client.sendall(raw)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n") if answer.startswith(b"HTTP") else (b" 400 ", b"", answer)
    assert b" 4" in head or b" 50" in head
    assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_goes_away_ends_its_own_request_only(server, streaming):
    engine, slow = server.worker.engine, threading.Event()
    step = engine.step
    engine.step = lambda: slow.wait(0.02) or step()  # slow enough to leave in the middle
    try:
        other: list = []
        thread = threading.Thread(target=lambda: other.append(ask(server, TEXT, {"prompt": "1", "max_tokens": 60})))
        client = socket.create_connection(("127.0.0.1", server.server_port), timeout=60)
        body = json.dumps({"prompt": "2", "max_tokens": 90, "n": 3, "stream": streaming, "logit_bias": {"2": -100}})
        client.sendall(f"POST {TEXT} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        if streaming:
            assert client.recv(64)
        thread.start()
        deadline = time.monotonic() + 30
        while len(engine.running) < 4 and time.monotonic() < deadline:
            slow.wait(0.005)
        client.close()
        while len(engine.running) > 1 and time.monotonic() < deadline:
            slow.wait(0.005)
        left = len(engine.running)
        thread.join(60)
    finally:
        engine.step = step
    assert left <= 1 and other[0][0] == 200


def test_a_body_in_chunks_is_told_what_it_lacks(server):
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 411 ") and b"no Content-Length: send the body whole" in answer


def test_a_stream_that_the_servers_end_cuts_says_so(tiny):
    model = load_model(tiny.model, "fp32", Mesh.single(), frozen=True)
    running = serve.ModelServer(serve.Config(model=tiny.model, port=0), model, load_tokenizer(tiny.model, model))
    engine, slow = running.worker.engine, threading.Event()
    step = engine.step
    engine.step = lambda: slow.wait(0.02) or step()
    threading.Thread(target=running.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=60)
    body = {"prompt": "1", "max_tokens": 90, "stream": True, "logit_bias": {str(model.config.eos_id): -100}}
    connection.request("POST", TEXT, json.dumps(body))
    response = connection.getresponse()
    assert response.readline().startswith(b"data:")
    running.shutdown()
    running.server_close()
    *_, last = [line for line in response.read().split(b"\n") if line]
    assert json.loads(last.removeprefix(b"data: "))["error"]["message"] == "the server has been stopped"


def test_a_failing_engine_fails_the_request_and_not_the_server(server, monkeypatch):
    engine = server.worker.engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode", lambda: 1 / 0)
        status, found = ask(
            server, TEXT, {"prompt": "123", "max_tokens": 4, "temperature": 0}
        )  # drawn, the first token may end it
    assert status == 500 and "ZeroDivisionError" in found["error"]["message"]
    assert ask(server, TEXT, {"prompt": "123", "max_tokens": 4})[0] == 200


def test_a_connection_beyond_the_thousandth_is_served():
    one, other = socket.socketpair()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 1100:
        pytest.skip("this process may open no 1100 files")
    with one, other, socket.socket(fileno=fcntl.fcntl(one.fileno(), fcntl.F_DUPFD, 1100)) as high:
        assert not serve.gone(high)
        other.close()
        assert serve.gone(high)


def test_requests_advance_together(server):
    engine, most = server.worker.engine, []
    step = engine.step
    engine.step = lambda: (time.sleep(0.01), step(), most.append(len(engine.running)))[1]
    try:
        threads = [
            threading.Thread(target=ask, args=(server, TEXT, {"prompt": "1", "max_tokens": 40, "seed": i}))
            for i in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        engine.step = step
    assert max(most) > 1


def test_a_port_in_use_is_a_sentence(server, tiny):
    with pytest.raises(UserError, match=f"port={server.server_port}: Address already in use"):
        serve.ModelServer(
            serve.Config(model=tiny.model, port=server.server_port), server.worker.engine.model, server.tokenizer
        )


def test_a_host_that_is_none_is_a_sentence(server, tiny):
    for host in ("no.such.host.invalid", "a" * 300):
        config = serve.Config(model=tiny.model, host=host, port=0)
        with pytest.raises(UserError, match=f"host={host}, port=0: "):
            serve.ModelServer(config, server.worker.engine.model, server.tokenizer)


# Chat -----------------------------------------------------------------------------------------------------------------


def test_a_tool_that_would_never_run_is_refused():
    with pytest.raises(ConfigError, match="sampling.tool=python: the server runs no tools"):
        serve.Config(model="m", sampling=SamplingConfig(tool="python"))


def test_ctrl_c_ends_an_answer_and_not_the_chat(tiny, tmp_path, monkeypatch, capsys):
    whole = chat.run

    def interrupted(engine):
        yield from islice(whole(engine), 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "run", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"Hi\n/save {tmp_path / 'a.jsonl'}\n"))
    chat.train(chat.Config(model=tiny.model, dtype="fp32"))
    said = capsys.readouterr()
    (turns,) = (json.loads(line)["messages"] for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert "cancelled" in said.err and len(turns) == 2 and turns[1]["content"] in said.out


def test_a_chat_switches_to_an_adapter_and_back(tiny, tmp_path, monkeypatch, capsys):
    settings = {"model": tiny.model, "data": {"sources": [tiny.data("chats.jsonl")], "bin_tokens": 512}}
    settings |= {"run": {"out": str(tmp_path / "lora"), "steps": 3, "dtype": "fp32"}, "optim": {"lr": 0.1}}
    adapter = sft.train(from_dict(sft.Config, settings | {"finetune": {"kind": "lora", "rank": 4}})).checkpoint
    model, typed = load_model(tiny.model, "fp32", Mesh.single(), frozen=True), [f"/adapter {adapter}", "/adapter none"]
    seen, lines, config = [], iter([*typed, None]), chat.Config(model=tiny.model)
    monkeypatch.setattr(config, "open", lambda: (model, None), raising=False)
    monkeypatch.setattr(chat, "ask", lambda: (seen.append(model.logits(torch.arange(9))), next(lines))[1])
    chat.train(config)
    first, second, third = seen
    assert torch.equal(first, third) and not torch.allclose(first, second, atol=1e-3)
    said = capsys.readouterr().out
    assert f"(adapters: {adapter}; acting: {adapter})" in said and f"(adapters: {adapter}; acting: none)" in said


@pytest.mark.skipif(not find_spec("readline"), reason="this Python has no readline")
def test_a_line_in_a_terminal_may_be_long_and_edited():
    """A terminal itself ends a line at 4096 bytes, and an arrow key was a question."""
    ours, theirs = pty.openpty()
    code = "from tritium.stages.chat import ask\nfor _ in range(3): print('heard', str(ask())[-6:])"
    typed, shown = [b"x" * 6000 + b"yend\n", b"\x1b[A" + b"\x7f" * 3 + b"END\n", b"\x04"], b""

    def read(mark: bytes) -> bytes:
        nonlocal shown
        while mark not in shown:
            shown += os.read(ours, 1 << 16)
        before, _, shown = shown.partition(mark)
        return before

    with subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs):
        os.close(theirs)
        heard = [(read(b"you> "), os.write(ours, keys), read(b"heard "), read(b"\r\n"))[-1] for keys in typed]
    os.close(ours)
    assert heard == [b"xxyend", b"xxyEND", b"None"]


def test_ctrl_c_clears_the_line_and_a_second_one_ends_the_chat(monkeypatch, capsys):
    def asked(*typed, terminal: bool = True) -> list[str | None]:
        lines = iter(typed)

        def line(prompt: str) -> str:
            if isinstance(said := next(lines), BaseException):
                raise said
            return said

        monkeypatch.setattr(sys, "stdin", io.StringIO())
        monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
        monkeypatch.setattr("builtins.input", line)
        return list(iter(chat.ask, None))

    stop = KeyboardInterrupt()
    assert asked(stop, "Hi", stop, "you", stop, stop) == ["Hi", "you"]
    assert capsys.readouterr().out.count("(a second Ctrl-C, or Ctrl-D, ends the chat)") == 3
    for end, terminal in ((Terminated(signal.SIGTERM), True), (stop, False)):
        with pytest.raises(type(end)):
            asked("Hi", end, "you", terminal=terminal)


def test_what_is_no_text_does_not_end_a_chat(tiny, tmp_path, monkeypatch, capsys):
    typed = b"\xff\xfe\nHi\n/save " + str(tmp_path / "a.jsonl").encode() + b"\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    config = chat.Config(model=tiny.model)
    config.sampling.max_tokens = 4
    chat.train(config)
    assert "lone surrogate" in capsys.readouterr().out
    (saved,) = (json.loads(line)["messages"] for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert [m["content"] for m in saved[:-1]] == ["Hi"]


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_of_prompts_becomes_a_file_of_answers_in_order_and_goes_on(tiny, tmp_path):
    rows = [{"prompt": f"{i} + 1", "id": i} for i in range(5)]
    rows += [{"messages": HELLO}, {"question": "What is 3 + 4?"}, {"nothing": 1}, {"prompt": "1 " * 200}]
    (source := tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = generate.Config(model=tiny.model, sources=[str(source)], out=str(tmp_path / "a" / "out.jsonl"), n=2)
    config.sampling.max_tokens, config.sampling.max_batch, config.dtype, config.logprobs = 6, 3, "fp32", True
    result = generate.train(config)
    text = (tmp_path / "a" / "out.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert [{k: v for k, v in row.items() if k not in ("answers", "error")} for row in found] == rows
    assert all(len(row["answers"]) == 2 and row["answers"][0]["text"] is not None for row in found[:7])
    assert 'needs "prompt"' in found[7]["error"] and "the model's context is 96" in found[8]["error"]
    assert result.metrics["answers"] == 7 and result.metrics["failed"] == 2
    for cut in (0, len(text) // 2, len(text)):  # in the middle of a line
        (tmp_path / "a" / "out.jsonl").write_text(text[:cut])
        generate.train(config)
        again = [json.loads(line) for line in (tmp_path / "a" / "out.jsonl").read_text().splitlines()]
        assert [[a["text"] for a in row.get("answers", [])] for row in again] == [
            [a["text"] for a in row.get("answers", [])] for row in found
        ]


def test_beams_search_for_one_answer_and_what_draws_is_refused(tiny, tmp_path):
    rows = [{"prompt": f"{i} + 1"} for i in range(4)] + [{"nothing": 1}, {"question": "What is 3 + 4?"}]
    (source := tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"model": tiny.model, "sources": [str(source)], "out": str(tmp_path / "out.jsonl"), "dtype": "fp32"}
    config = generate.Config(**given, beams=4, length_penalty=0.5, logprobs=True)
    config.sampling.max_tokens, config.sampling.max_batch = 8, 16  # of two prompts' beams
    assert generate.train(config).metrics["answers"] == 5
    found = list(map(json.loads, (text := (tmp_path / "out.jsonl").read_text()).splitlines()))
    model, tokenizer = config.open()
    for row in found[:4]:
        prompt = tokenizer.encode(row["prompt"], bos=tokenizer.adds_bos)
        (best,) = beam_search(model, [prompt], 4, 8, 0.5, stop_ids(tokenizer))
        (answer,) = row["answers"]
        assert [piece for piece, _ in answer["logprobs"]] == [tokenizer.piece(token) for token in best.tokens]
        assert tokenizer.decode(prompt + best.tokens) == row["prompt"] + answer["text"]
    assert 'needs "prompt"' in found[4]["error"]
    (tmp_path / "out.jsonl").write_text(text[: len(text) // 2])
    generate.train(config)
    assert (tmp_path / "out.jsonl").read_text() == text
    for options, words in (
        ({"beams": 4, "n": 2}, "leave out n=2"),
        ({"beams": 4, "sampling": SamplingConfig(top_p=0.5)}, "leave out sampling.top_p=0.5"),
        ({"beams": 4, "sampling": SamplingConfig(stop=["\n"])}, "leave out sampling.stop"),
        ({"length_penalty": 0.5}, "set e.g. beams=4"),
    ):
        with pytest.raises(ConfigError, match=words):
            generate.Config(**given, **options)


def test_answers_of_another_model_or_other_options_are_not_gone_on_with(tiny, tmp_path):
    (source := tmp_path / "prompts.jsonl").write_text('{"prompt": "1 + 1"}\n{"prompt": "2 + 2"}\n')
    out = tmp_path / "out.jsonl"

    def draw(model=tiny.model, temperature=1.0, **options):
        config = generate.Config(model=model, sources=[str(source)], out=str(out), dtype="fp32", **options)
        config.sampling.max_tokens, config.sampling.temperature = 3, temperature
        generate.train(config)

    draw()
    out.write_text(before := out.read_text().splitlines(keepends=True)[0])
    other = load_model(tiny.model, "fp32", Mesh.single(), frozen=True)
    other.norm.mul_(1.5)
    other.save(str(tmp_path / "other"))
    load_tokenizer(tiny.model, other).save(str(tmp_path / "other"))
    for options, words in (
        ({"temperature": 0.5}, "was written with sampling.temperature=1.0"),
        ({"seed": 3}, "was written with seed=0"),
        ({"model": str(tmp_path / "other")}, "was written with model="),
    ):
        with pytest.raises(ConfigError, match=words):
            draw(**options)
    assert out.read_text() == before
    draw()
    assert len(out.read_text().splitlines()) == 2


def test_a_prompt_that_is_no_unicode_does_not_end_the_file(tiny, tmp_path):
    (source := tmp_path / "prompts.jsonl").write_text('{"prompt": "\\ud800"}\n{"prompt": "1"}\n')
    config = generate.Config(model=tiny.model, sources=[str(source)], out=str(tmp_path / "out.jsonl"), dtype="fp32")
    config.sampling.max_tokens = 2
    assert generate.train(config).metrics["failed"] == 1
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert first["prompt"] == "\ud800" and "lone surrogate" in first["error"] and len(second["answers"]) == 1


@pytest.mark.parametrize(
    "row",
    [{"prompt": "2 + 1", "answers": [{}]}, {"prompt": "1 + 1", "answer": "2"}, {"prompt": "1 + 1", "answers": []}],
)
def test_a_file_of_other_answers_is_neither_kept_as_done_nor_added_to(tiny, tmp_path, row):
    (source := tmp_path / "prompts.jsonl").write_text('{"prompt": "1 + 1"}\n')
    (out := tmp_path / "out.jsonl").write_text(before := json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match="line 1 of .* is not n=1 answers to record 1"):
        generate.train(generate.Config(model=tiny.model, sources=[str(source)], out=str(out)))
    assert out.read_text() == before


def test_prompts_that_could_not_be_answered_are_counted_aloud(tiny, tmp_path, capsys):
    (source := tmp_path / "prompts.jsonl").write_text('{"instruction": "Add.", "output": "2"}\n')
    generate.train(generate.Config(model=tiny.model, sources=[str(source)], out=str(tmp_path / "out.jsonl")))
    assert "not answered: 1 of " in capsys.readouterr().err


def test_a_server_that_has_answered_ends_with_0_and_not_by_an_abort(tiny):
    """The engine's thread within torch when the interpreter ended: "terminate called without an active exception"."""
    command = [sys.executable, "-m", "tritium.stages", "serve", f"--model={tiny.model}", "--port=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = iter(process.stderr.readline, "")
        port = next(int(found[1]) for line in lines if (found := re.search(r"http://\S+:(\d+)/v1", line)))
        connection = http.client.HTTPConnection("localhost", port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "1+1=", "max_tokens": 4}))
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0 and "terminate called" not in said
