"""Both ends of a check by asserts; each runs as a script in a sandbox of its own. Standard library only.

    python code_pipe.py checker      tests.json: the tests, which are trusted; sees the program through a pipe
    python code_pipe.py candidate    program.py: the model's program, which answers calls

The program can return *data*, rebuilt here from JSON as plain lists, numbers, …: an object with an `__eq__` of its own
never arrives (it is a `Remote`, equal to itself only), and nothing that the program patches, exits or reads is in the
process that decides. Standard error of the checker holds its verdicts, "P" or "F" for each test.
"""

import builtins
import itertools
import json
import operator
import os
import sys

LONGEST = 1 << 22  # bytes of a message
CONTAINERS = ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "f"))


def pack(value, keep):
    """JSON of plain data; `keep(value)` gives the number of what is none."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    for base, letter in CONTAINERS:
        if isinstance(value, base):
            return [letter, [pack(item, keep) for item in base.__iter__(value)]]
    if isinstance(value, dict):
        return ["d", [[pack(k, keep), pack(v, keep)] for k, v in dict.items(value)]]
    if kind in (bytes, bytearray):
        return ["b", value.hex()]
    if kind is complex:
        return ["c", [value.real, value.imag]]
    return ["r", keep(value)]


def unpack(value, find):
    if not isinstance(value, list):
        return value
    letter, body = value
    for base, own in CONTAINERS:
        if letter == own:
            return base(unpack(item, find) for item in body)
    if letter == "d":
        return {unpack(k, find): unpack(v, find) for k, v in body}
    if letter == "b":
        return bytes.fromhex(body)
    return complex(*body) if letter == "c" else find(body)


# ── the program's end ────────────────────────────────────────────────────────────────────────────────────────────


def candidate():
    source, out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    kept, space = [], {"__name__": "candidate"}
    operations = {
        "name": lambda name: space[name], "call": lambda function, args, kwargs: function(*args, **kwargs),
        "attribute": getattr, "set": setattr, "item": operator.getitem, "length": len, "truth": bool,
        "list": lambda items: list(itertools.islice(items, 100_000)),
    }  # fmt: skip

    def keep(value):
        kept.append(value)
        return len(kept) - 1

    def send(reply):
        out.write(json.dumps(reply).encode() + b"\n")
        out.flush()

    with open("program.py", encoding="utf-8") as file:
        text = file.read()
    exec(compile(text, "program.py", "exec"), space)
    send([name for name in space if not name.startswith("__")])
    for line in source:
        try:
            operation, arguments = json.loads(line)
            values = [unpack(a, kept.__getitem__) for a in arguments]
            result = operations[operation](*values)
            send({"value": pack(result, keep), "changed": pack(values[1:2], keep) if operation == "call" else None})
        except BaseException as error:
            send({"raised": type(error).__name__, "message": str(error)[:1000]})


# ── the tests' end ───────────────────────────────────────────────────────────────────────────────────────────────


class Lost(BaseException):
    """The program has ended, or talks nonsense: no `except Exception` of a test can pass over it."""


class Remote:
    """Something of the program's that is no plain data."""

    def __init__(self, number):
        object.__setattr__(self, "_number", number)

    def __setattr__(self, name, value):
        ask("set", self, name, value)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return ask("attribute", self, name)

    def __call__(self, *args, **kwargs):
        return ask("call", self, args, kwargs)

    def __iter__(self):
        return iter(ask("list", self))

    def __getitem__(self, key):
        return ask("item", self, key)

    def __len__(self):
        return ask("length", self)

    def __bool__(self):
        return ask("truth", self) is True


def ask(operation, *arguments):
    try:
        channel.write(json.dumps([operation, [pack(a, number_of) for a in arguments]]).encode() + b"\n")
        channel.flush()
        reply = read()
        if "raised" not in reply:
            value = unpack(reply["value"], Remote)
            if reply["changed"] is not None:
                take_over(arguments[1], unpack(reply["changed"], Remote)[0])
            return value
        kind = getattr(builtins, reply["raised"], RuntimeError)
    except Exception as error:
        raise Lost from error
    raise kind(reply["message"]) if issubclass(kind, Exception) else RuntimeError(reply["raised"])


def number_of(value):
    if isinstance(value, Remote):
        return value._number
    raise Lost(f"a test passes {type(value)}, which can't be sent")


def take_over(arguments, changed):
    """What the program did to the lists, dicts and sets that it was called with."""
    for mine, theirs in zip(arguments, changed, strict=True):
        if type(mine) is list and type(theirs) is list:
            mine[:] = theirs
        elif type(mine) in (dict, set) and type(theirs) is type(mine):
            mine.clear()
            mine.update(theirs)


def read():
    line = sys.stdin.buffer.readline(LONGEST)
    if not line.endswith(b"\n"):
        raise Lost
    return json.loads(line)


def checker():
    global channel
    channel, verdicts = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(2), "w")
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)  # what tests print is no verdict
    with open("tests.json", encoding="utf-8") as file:
        spec = json.load(file)
    space, entry = {"__name__": "tests"}, spec.get("entry_point")
    for name in [str(name) for name in read()]:
        # No program's `sorted` for the tests.
        if name == entry or not (hasattr(builtins, name) or name.startswith("__")):
            space[name] = ask("name", name)
    if entry in space:
        space["candidate"] = space[entry]
    try:
        exec(spec.get("setup", ""), space)
    except Exception as error:
        print(f"E {type(error).__name__}: {error}", file=verdicts, flush=True)
        return
    for test in spec["tests"]:
        try:
            exec(test, space)
            print("P", end="", file=verdicts, flush=True)
        except BaseException:
            print("F", end="", file=verdicts, flush=True)


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)  # JSON writes a whole number out, however long
    {"checker": checker, "candidate": candidate}[sys.argv[1]]()
