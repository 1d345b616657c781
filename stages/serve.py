"""Serve a model over HTTP: OpenAI's chat and text completions, on the standard library.

tritium serve --model=runs/sft --port=8000

POST /v1/chat/completions and /v1/completions ("stream": true for server-sent events; "echo": true with "logprobs"
scores a prompt), GET /v1/models. Each connection has a thread; one more thread runs the engine, which batches all
requests. An invalid request gets a sentence and a 4xx status; a client that disconnects ends only its own request.
"""

import json
import queue
import secrets
import selectors
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any
from urllib.parse import unquote

import torch

from tritium.core.chat import render, stop_ids
from tritium.core.config import ConfigError, UserError, nearest, opt
from tritium.core.formats import listed_messages
from tritium.core.rollout import AskConfig, SamplingConfig
from tritium.core.run import Result
from tritium.core.tokenizer import Tokenizer
from tritium.core.tokenizer.tokenizer import StreamDecoder
from tritium.core.web import Handler, RequestError, Server, to_json
from tritium.model.generate import Engine, Event, Running
from tritium.model.sampling import Options
from tritium.model.stops import Text
from tritium.model.transformer import Transformer

SHOWS_ITS_RESULT = True
ONE_PROCESS = True


@dataclass
class Config(AskConfig):
    host: str = opt("127.0.0.1", "address to listen on; 0.0.0.0 admits other machines, without authentication")
    port: int = opt(8000, "port to listen on (0: any free one)", least=0, below=1 << 16)
    sampling: SamplingConfig = opt(SamplingConfig(max_tokens=256, max_batch=32), "defaults of a request's options")

    def __post_init__(self):
        super().__post_init__()
        if self.sampling.tool:
            raise ConfigError(f"sampling.tool={self.sampling.tool}: the server runs no tools; `tritium generate` does")


def train(config: Config) -> Result:
    """Serve until Ctrl-C."""
    server = ModelServer(config, *config.open())
    print(f"serving {config.model} at http://{config.host}:{server.server_port}/v1 (Ctrl-C ends)", file=sys.stderr)
    server.run()
    return Result(config.model)


class Worker(threading.Thread):
    """The thread that runs the engine. Between steps it executes other threads' actions; it distributes the events."""

    def __init__(self, engine: Engine):
        super().__init__(daemon=True, name="engine")
        self.engine = engine
        self.asked: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.waiting: dict[Running, queue.SimpleQueue[Event | RequestError]] = {}

    def do(self, action: Callable[[], Any]) -> Any:
        """What `action` gives, done in this thread between two steps. Raises: what it raises."""
        done: Future = Future()

        def act():
            try:
                done.set_result(action())
            except Exception as error:
                done.set_exception(error)

        self.asked.put(act)
        return done.result()

    def submit(self, ids: list[int], options: Options, seeds: list[tuple[int, int]], decoder: Callable) -> "Samples":
        """Raises: ValueError, as `Engine.submit`."""

        def enter() -> Samples:
            samples = Samples(self.engine.submit(ids, options, seeds, decoder), queue.SimpleQueue())
            self.waiting |= dict.fromkeys(samples.sequences, samples.queue)
            return samples

        return self.do(enter)

    def cancel(self, sequences: list[Running]) -> None:
        def end():
            for sequence in sequences:
                self.waiting.pop(sequence, None)
                self.engine.cancel(sequence)

        self.asked.put(end)

    def run(self) -> None:
        while True:
            while not self.engine.busy or not self.asked.empty():
                if (action := self.asked.get()) is None:
                    return
                action()
            try:
                for event in self.engine.step():
                    self.waiting[event.sequence].put(event)
                    if event.finish_reason:
                        del self.waiting[event.sequence]
            except Exception as error:  # these requests fail; the next ones may be served
                self.fail(RequestError(f"generation failed: {type(error).__name__}: {error}", 500))

    def fail(self, error: RequestError) -> None:
        """All that wait for an answer get this one."""
        for sequence, events in self.waiting.items():
            self.engine.cancel(sequence)
            events.put(error)
        self.waiting.clear()


@dataclass
class Samples:
    """The sequences of one request, and their events as they come."""

    sequences: list[Running]
    queue: "queue.SimpleQueue[Event | RequestError]"
    prompt: Sequence[tuple] = ()  # see `read_prompt`; where it is shown before each answer

    def events(self, connection: socket.socket, silent: bool) -> Iterator[Event]:
        """Until all have ended; where they are `silent`, what is drawn is not told. Raises: ConnectionError where the
        client has gone; RequestError of the engine's.
        """
        yield from (Event(sequence, *told) for sequence in self.sequences for told in self.prompt)
        left = len(self.sequences)
        while left:
            try:
                event = self.queue.get(timeout=0.2)
            except queue.Empty:
                event = None
            if gone(connection):
                raise ConnectionResetError("the client has gone")
            if isinstance(event, RequestError):
                raise event
            if event is not None:
                yield Event(event.sequence, None, "", 0.0, "length") if silent else event
                left -= bool(event.finish_reason)


@torch.no_grad()
def read_prompt(model: Transformer, ids: list[int], decoder: StreamDecoder, top: int) -> list[tuple]:
    """What an event says of a token, for each of a prompt's; of the first no log-prob is known."""
    tokens, told = torch.tensor(ids, device=model.mesh.device), [(ids[0], decoder.push(ids[0]), None, "")]
    for hidden, next_ones in zip(model.hidden(tokens)[:-1].split(ROWS), tokens[1:].split(ROWS), strict=True):
        logps = model.project(hidden).float().log_softmax(-1)  # [ROWS, V]
        own, best = logps.gather(1, next_ones[:, None])[:, 0].tolist(), logps.topk(top)
        rows = zip(next_ones.tolist(), own, best.indices.tolist(), best.values.tolist(), strict=True)
        told += [(t, decoder.push(t), logp, "", tuple(zip(*likeliest, strict=True))) for t, logp, *likeliest in rows]
    return told


def gone(connection: socket.socket) -> bool:
    """Whether the other side has closed the connection."""
    try:
        with selectors.DefaultSelector() as selector:  # select.select takes no file number above 1023
            selector.register(connection, selectors.EVENT_READ)
            return bool(selector.select(0)) and not connection.recv(1, socket.MSG_PEEK)
    except OSError:
        return True


# Requests -------------------------------------------------------------------------------------------------------------

NUMBER, WHOLE, FLAG, TEXT = (int, float), (int,), (bool,), (str,)
FIELDS: dict[str, tuple[type, ...]] = {
    "model": TEXT, "messages": (list,), "prompt": (str, list), "max_tokens": WHOLE, "max_completion_tokens": WHOLE,
    "temperature": NUMBER, "top_k": WHOLE, "top_p": NUMBER, "min_p": NUMBER, "repetition_penalty": NUMBER,
    "presence_penalty": NUMBER, "frequency_penalty": NUMBER,
    "no_repeat_ngram": WHOLE, "logit_bias": (dict,), "stop": (str, list), "n": WHOLE,
    "seed": WHOLE, "stream": FLAG, "stream_options": (dict,), "logprobs": (bool, int), "top_logprobs": WHOLE,
    "user": TEXT, "echo": FLAG,
}  # fmt: skip
MOST_SAMPLES, MOST_TOP = 64, 20
ROWS = 64  # of logits at a time, where a prompt is scored


@dataclass
class Asked:
    """What one request wants."""

    chat: bool
    prompts: list[list[int]]
    options: Options
    n: int
    seed: int
    stream: bool
    usage: bool  # also at the end of a stream
    logprobs: bool
    echo: bool
    silent: bool


def read_request(body: Any, chat: bool, tokenizer: Tokenizer, sampling: SamplingConfig) -> Asked:
    """Raises: RequestError, UserError or ValueError for a request that can't be served."""
    if not isinstance(body, dict):
        raise RequestError("the request's body must be a JSON object")
    for name, value in list(body.items()):
        if name in (("prompt", "echo") if chat else ("messages",)):
            raise RequestError(f"{name} is for /v1/{'completions' if chat else 'chat/completions'}")
        if name not in FIELDS:
            guess = nearest(name, list(FIELDS))
            raise RequestError(f"unknown field {name!r}" + (f"; did you mean {guess}?" if guess else ""))
        if value is None:
            del body[name]
        elif not isinstance(value, FIELDS[name]) or (isinstance(value, bool) and bool not in FIELDS[name]):
            kinds = " or ".join(kind.__name__ for kind in FIELDS[name])
            raise RequestError(f"{name} must be {kinds}, not {json.dumps(value)[:40]}")
    n, stop = body.get("n", 1), body.get("stop", sampling.stop)
    if not 1 <= n <= MOST_SAMPLES:
        raise RequestError(f"n={n} must be from 1 to {MOST_SAMPLES}")
    given = {f.name: body[f.name] for f in fields(Options) if f.name in body}
    given |= {name: as_float(name, value) for name, value in given.items() if FIELDS[name] is NUMBER}
    given["top_logprobs"] = top_logprobs(body, chat)
    most = body.get("max_completion_tokens", body.get("max_tokens", sampling.max_tokens))
    silent = not chat and most == 0
    given["max_tokens"] = most + silent
    given["stop"] = [stop] if isinstance(stop, str) else stop
    try:
        given["logit_bias"] = {int(token): float(bias) for token, bias in body.get("logit_bias", {}).items()}
    except (TypeError, ValueError, OverflowError):
        raise RequestError('logit_bias must give numbers for token ids, as in {"42": -1.5}') from None
    options = replace(sampling.options(stop_ids(tokenizer)), **given)
    seed = body.get("seed", secrets.randbits(63))
    if not 0 <= seed < 1 << 64:
        raise RequestError(f"seed={seed} must be from 0 to 2^64 - 1")
    usage = bool(body.get("stream_options", {}).get("include_usage"))
    prompts = read_prompts(body, chat, tokenizer)
    logprobs = body.get("logprobs", False) is not False  # 0 asks for the tokens' own
    flags = (body.get("stream", False), usage, logprobs, body.get("echo", False), silent)
    return Asked(chat, prompts, options, n, seed, *flags)


def as_float(name: str, value: float) -> float:
    """An integer of JSON may have any number of digits; a tensor takes none that is too large."""
    try:
        return float(value)
    except OverflowError:
        raise RequestError(f"{name} is too large") from None


def top_logprobs(body: dict[str, Any], chat: bool) -> int:
    """How many of the likeliest tokens are wanted: "top_logprobs" in a chat, which "logprobs" goes with, else this."""
    wanted = body.get("top_logprobs", 0) if chat else int(body.get("logprobs", 0))
    if not 0 <= wanted <= MOST_TOP:
        raise RequestError(f"{wanted} top logprobs: from 0 to {MOST_TOP} are told")
    if "top_logprobs" in body and not (chat and body.get("logprobs")):
        raise RequestError("top_logprobs goes with logprobs: true, in a chat; a completion's logprobs is the number")
    return wanted


def read_prompts(body: dict[str, Any], chat: bool, tokenizer: Tokenizer) -> list[list[int]]:
    if chat:
        messages = body.get("messages")
        if not messages or not all(isinstance(m, dict) for m in messages):
            raise RequestError('messages must be a list of {"role", "content"}')
        return [render(tokenizer, listed_messages({"messages": messages}), generation_prompt=True).ids]
    prompts = body.get("prompt", "")
    prompts = [prompts] if isinstance(prompts, str) or all(type(x) is int for x in prompts) else prompts
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            prompt = tokenizer.encode(prompt, bos=tokenizer.adds_bos)
        if not isinstance(prompt, list) or not all(type(x) is int for x in prompt):
            raise RequestError("prompt must be text, a list of token ids, or a list of these")
        found.append(prompt)
    return found


# Answers --------------------------------------------------------------------------------------------------------------


class ModelServer(Server):
    """A server with the thread that runs its engine."""

    def __init__(self, config: Config, model: Transformer, tokenizer: Tokenizer):
        self.tokenizer, self.sampling, self.name = tokenizer, config.sampling, config.model
        self.worker, self.answering = Worker(config.engine(model, tokenizer)), set()  # threads of connections
        super().__init__(config.host, config.port, Connection)
        self.worker.start()

    def server_close(self) -> None:
        super().server_close()
        self.worker.asked.put(partial(self.worker.fail, RequestError("the server has been stopped", 503)))
        self.worker.asked.put(None)
        if self.worker.is_alive():
            self.worker.join(timeout=10)  # a thread within torch when the interpreter ends aborts the process
        for thread in list(self.answering):  # each has a last word to say
            thread.join(timeout=2)


class Connection(Handler):
    """One connection."""

    server: ModelServer
    started = False  # whether the status line has gone out

    def do_GET(self) -> None:
        model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "tritium"}
        answers = {"/v1/models": {"object": "list", "data": [model]}, f"/v1/models/{self.server.name}": model}
        if found := answers.get(unquote(self.path.partition("?")[0]).rstrip("/")):
            self.send(200, found)
        else:
            self.send_failure(f"there is no GET {self.path}, but GET {' or '.join(answers)}", 404)

    def do_POST(self) -> None:
        self.started = False
        path = self.path.partition("?")[0].rstrip("/")
        try:
            body = self.read_json()
            if path not in ("/v1/chat/completions", "/v1/completions"):
                raise RequestError(f"there is no {self.path}: POST /v1/chat/completions or /v1/completions", 404)
            asked = read_request(body, "chat" in path, self.server.tokenizer, self.server.sampling)
            self.answer(asked)
        except (RequestError, UserError, ValueError) as error:
            self.send_failure(str(error), getattr(error, "status", 400))
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            self.send_failure(f"{type(error).__name__}: {error}", 500)
        finally:
            self.server.answering.discard(threading.current_thread())

    def answer(self, asked: Asked) -> None:
        """Raises: ValueError where a prompt is impossible; ConnectionError where the client has gone."""
        worker, made, choices = self.server.worker, [], []
        self.server.answering.add(threading.current_thread())
        kind, name = ("chatcmpl", "chat.completion") if asked.chat else ("cmpl", "text_completion")
        head = {"id": f"{kind}-{secrets.token_hex(8)}", "object": name, "created": int(time.time())}
        head |= {"model": self.server.name}
        decoder = partial(self.server.tokenizer.incremental, first=asked.chat)
        try:
            for i, ids in enumerate(asked.prompts):
                seeds = [(asked.seed, i * asked.n + j) for j in range(asked.n)]
                made.append(worker.submit(ids, asked.options, seeds, decoder))
                if asked.echo:
                    whole = self.server.tokenizer.incremental()
                    read = partial(read_prompt, worker.engine.model, ids, whole, asked.options.top_logprobs)
                    made[-1].prompt = worker.do(read)
            if asked.stream:
                self.stream(asked, made, head)
                return
            for samples in made:
                spent = [event for event in samples.events(self.connection, asked.silent)]
                choices += [self.choice(asked, [e for e in spent if e.sequence is s]) for s in samples.sequences]
        finally:
            worker.cancel([s for samples in made for s in samples.sequences])  # nothing, where all have ended
        numbered = [{"index": i, **choice} for i, choice in enumerate(choices)]
        self.send(200, {**head, "choices": numbered, "usage": usage(asked, made)})

    def choice(self, asked: Asked, events: list[Event]) -> dict[str, Any]:
        text, reason = "".join(event.text for event in events), REASONS[events[-1].finish_reason]
        said = {"message": {"role": "assistant", "content": text}} if asked.chat else {"text": text}
        return {**said, "finish_reason": reason, "logprobs": self.logprobs(asked, events, self.spoken(asked))}

    def spoken(self, asked: Asked) -> Text:
        """Takes the tokens of one choice, to say where in its text each of them begins."""
        return Text(self.server.tokenizer.incremental(first=asked.echo), ())

    def logprobs(self, asked: Asked, events: list[Event], spoken: Text) -> dict[str, Any] | None:
        """Of these tokens, which come after those that are `spoken`."""
        if not asked.logprobs:
            return None
        events = [event for event in events if event.token is not None]
        if asked.chat:
            tops = [{"top_logprobs": [self.told(*pair) for pair in event.top]} for event in events]
            return {"content": [self.told(e.token, e.logp) | top for e, top in zip(events, tops, strict=True)]}
        texts = [self.spelled(event.token) for event in events]
        tops = [{self.spelled(token): logp for token, logp in e.top[::-1]} or None for e in events]  # the likelier twin
        return {
            "tokens": texts,
            "token_logprobs": [event.logp for event in events],
            "top_logprobs": tops if asked.options.top_logprobs else None,
            "text_offset": [(len(spoken.shown), spoken.push(event.token))[0] for event in events],
        }

    def told(self, token: int, logp: float) -> dict[str, Any]:
        return {"token": self.spelled(token), "logprob": logp, "bytes": [*self.server.tokenizer.token_bytes(token)]}

    def spelled(self, token: int) -> str:
        return self.server.tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")

    def stream(self, asked: Asked, made: list[Samples], head: dict[str, Any]) -> None:
        """Server-sent events, a prompt's samples as they come; what goes wrong on the way is an event, too."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")  # the end of the stream
        self.end_headers()
        self.started = self.close_connection = True
        head["object"] += ".chunk" * asked.chat
        head |= {"usage": None} if asked.usage else {}
        first, spoken = 0, defaultdict(partial(self.spoken, asked))
        for samples in made:
            places = {sequence: first + i for i, sequence in enumerate(samples.sequences)}
            first += len(places)
            for place in places.values() if asked.chat else ():
                begun = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                self.send_event({**head, "choices": [{"index": place, **begun}]})
            for event in samples.events(self.connection, asked.silent):
                said = {"delta": {"content": event.text}} if asked.chat else {"text": event.text}
                said |= {"finish_reason": REASONS.get(event.finish_reason)}
                said |= {"logprobs": self.logprobs(asked, [event], spoken[event.sequence])}
                self.send_event({**head, "choices": [{"index": places[event.sequence], **said}]})
        if asked.usage:
            self.send_event({**head, "choices": [], "usage": usage(asked, made)})
        self.wfile.write(b"data: [DONE]\n\n")

    def send_event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + to_json(value) + b"\n\n")
        self.wfile.flush()

    def send(self, status: int, value: dict[str, Any] | str) -> None:
        """What goes wrong within a stream is an event of it."""
        if self.started:
            self.send_event(value)
        else:
            super().send(status, value)


REASONS = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


def usage(asked: Asked, made: list[Samples]) -> dict[str, int]:
    prompt = sum(map(len, asked.prompts))
    answer = sum(len(s.completion.tokens) for samples in made for s in samples.sequences) * (not asked.silent)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


if __name__ == "__main__":
    from tritium.stages.cli import run_stage

    raise SystemExit(run_stage("serve"))
