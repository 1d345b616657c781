"""`python -m tritium.bench sandbox [--write]`: what hostile programs achieve in the sandbox; bench/results/sandbox.md.

Each program is run at both levels of containment, and then handed in as a solution of "f(x) = x²", which none of them
is. It is contained where it did not print ESCAPED, ended by its deadline, and left no process and no file behind;
it is scored as failed where the judge gives 0.
"""

import json
import os
import platform
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tritium.core.config import load, opt
from tritium.core.rewards.code import Code
from tritium.core.sandbox import PYTHON_ARGV, Limits, level, run

RESULT = Path(__file__).with_name("results") / "sandbox.md"
TASK = json.dumps({"tests": ["assert f(3) == 9", "assert sorted([f(-2), f(1)]) == [1, 4]"], "entry_point": "f"})
LIMITS = Limits(seconds=3, memory=256 << 20)

ESCAPES = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory bomb": "x = bytearray(1 << 30)\nprint('ESCAPED')",
    "memory bomb, in pieces": "x = []\nwhile True: x.append(bytearray(1 << 22))",
    "memory bomb, an integer": "x = 9\nwhile True: x = x * x",
    "memory bomb, in segments that are shared": "import ctypes\nl = ctypes.CDLL(None)\n"
    "l.shmat.restype = ctypes.c_void_p\nfor i in range(20):\n    s = l.shmget(0, ctypes.c_size_t(30 << 20), 0o1600)\n"
    "    if s < 0: break\n    p = ctypes.c_void_p(l.shmat(s, None, 0))\n"
    "    ctypes.memset(p, 1, 30 << 20); l.shmdt(p)\nelse: print('ESCAPED')",
    "memory bomb, in files without a name": "import os\nfor i in range(40):\n    f = os.memfd_create('a')\n"
    "    for _ in range(30): os.write(f, bytes(1 << 20))\nprint('ESCAPED')",
    "infinite output": "while True: print('x' * 1000)",
    "infinite loop": "while True: pass",
    "sleeps for ever": "import time\ntime.sleep(1e6)",
    "ignores SIGTERM": "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
    "    except OSError: pass\nwhile True: pass",
    "reads the environment": "import os\nif 'SECRET' in os.environ: print('ESCAPED')\n"
    "for p in (os.getpid(), os.getppid(), 1, PARENT):\n"
    "    if b'SECRET' in open(f'/proc/{p}/environ', 'rb').read(): print('ESCAPED')",
    "reads /etc/passwd": "print('ESCAPED', open('/etc/passwd').read())",
    "reads the home folder": "import os, sys\nfor d, _, names in os.walk('HOME'):\n    for n in names:\n"
    "        if not d.startswith(sys.base_prefix): open(os.path.join(d, n)); print('ESCAPED', d, n)",
    "reads a file beside its own": "print('ESCAPED', open('VICTIM/secret').read())",
    "writes outside": "import os\nfor d in ('/tmp', '/', '/usr', '/var/tmp', '/dev/shm', 'VICTIM'):\n"
    "    try:\n        open(d + '/tritium-escaped', 'w').write('x'); print('ESCAPED', d)\n    except OSError: pass",
    "climbs out of its root": "import os\nos.mkdir('a')\nos.chroot('a')\nfor _ in range(64): os.chdir('..')\n"
    "os.chroot('.')\nprint('ESCAPED', open('/etc/passwd').read())",
    "mounts": "import ctypes\nl = ctypes.CDLL(None, use_errno=True)\n"
    "if l.mount(b'proc', b'/scratch', b'proc', 0, None) == 0: print('ESCAPED')",
    "new user namespace": "import ctypes\nl = ctypes.CDLL(None)\n"
    "if l.unshare(0x10000000) == 0: print('ESCAPED')\nif l.syscall(56, 0x10000011, 0, 0, 0, 0) > 0: print('ESCAPED')",
    "fills the disk": "n = 0\nfor i in range(100):\n    with open(f'f{i}', 'wb') as f:\n"
    "        for _ in range(16): n += f.write(bytes(1 << 20))\nif n > 1 << 28: print('ESCAPED')",
    "connects by TCP": "import socket\ns = socket.create_connection(('127.0.0.1', PORT), 1)\nprint('ESCAPED')",
    "connects to a socket in the file system": "import socket\ns = socket.socket(socket.AF_UNIX)\n"
    "s.connect('VICTIM/door')\nprint('ESCAPED')",
    "sends letters by a pair of sockets": "import socket\nfor kind in (2, 3):\n"
    "    try:\n        a, b = socket.socketpair(socket.AF_UNIX, kind)\n"
    "        a.sendto(b'x', 'VICTIM/letters'); print('ESCAPED')\n    except OSError: pass",
    "changes files outside without opening them": "import os\nfor change in (os.utime, lambda p: os.chmod(p, 0o777),\n"
    "               lambda p: os.chown(p, 0, 0), lambda p: os.setxattr(p, 'user.a', b'x'),\n"
    "               lambda p: os.truncate(p, 0)):\n"
    "    try: change('VICTIM/secret'); print('ESCAPED')\n    except OSError: pass",
    "sends by UDP": "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.sendto(b'x', ('127.0.0.1', PORT))\nprint('ESCAPED')",
    "vsock, netlink": "import socket\nfor k in (40, 16, 17, 38):\n"
    "    try: socket.socket(k, socket.SOCK_RAW if k in (16, 17) else socket.SOCK_STREAM); print('ESCAPED')\n"
    "    except OSError: pass",
    "kills its parents": "import os\nfor p in (os.getppid(), PARENT, 1, -1):\n"
    "    try: os.kill(p, 9)\n    except OSError: pass",
    "kills its parents through a pipe": "import fcntl, os, socket, time\nfor p in (os.getppid(), PARENT):\n"
    "    a, b = socket.socketpair()\n"
    "    for command, value in ((10, 9), (8, p), (4, 0o20000)):  # signal, owner, async\n"
    "        try: fcntl.fcntl(a, command, value)\n        except OSError: pass\n"
    "    try: fcntl.ioctl(a, 0x8901, p.to_bytes(4, 'little'))\n    except OSError: pass\n"
    "    b.send(b'x')\ntime.sleep(0.2)",
    "leaves memory behind": "import ctypes\nl = ctypes.CDLL(None)\nl.shmget(0x74726974, 4096, 0o1666)\n"
    "l.msgget(0x74726974, 0o1666)\nl.semget(0x74726974, 1, 0o1666)",
    "ptrace by ctypes": "import ctypes, os\nl = ctypes.CDLL(None)\n"
    "if l.ptrace(16, os.getppid(), 0, 0) == 0: print('ESCAPED')",
    "crashes by ctypes": "import ctypes\nctypes.string_at(0)",
    "daemonised child": "import os, sys\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
    "        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', 'MARK'])\n    os._exit(0)",
    "zombie children": "import os\nfor _ in range(8):\n    if os.fork() == 0: os._exit(0)\nos._exit(0)",
    "closes its pipes": "import os, time\nfor i in range(3): os.close(i)\ntime.sleep(60)",
    "child keeps the pipes": "import os, time\nif os.fork() == 0: time.sleep(60)\nos._exit(0)",
    "sys.exit(0) before the asserts": "import sys\nsys.exit(0)",
    "os._exit(0) before the asserts": "import os\nos._exit(0)",
    "os._exit(0) in the function": "import os\ndef f(x): os._exit(0)",
    "prints the verdict": "import os\nfor n in range(10):\n    try: os.write(n, b'PPPP')\n    except OSError: pass\n"
    "def f(x): return 0",
    "overrides __eq__": "class Any:\n    def __eq__(self, o): return True\n    __hash__ = None\n"
    "    def __lt__(self, o): return True\ndef f(x): return Any()",
    "an int with an __eq__": "class Any(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\n"
    "def f(x): return Any(0)",
    "a list with an __eq__": "class Any(list):\n    def __eq__(self, o): return True\ndef f(x): return Any()",
    "patches builtins": "import builtins\nbuiltins.sorted = lambda *a: [1, 4]\nbuiltins.AssertionError = Warning\n"
    "sorted = builtins.sorted\ndef f(x): return 0",
    "patches the checker": "import gc, sys\nfor o in gc.get_objects():\n    if type(o) is dict and 'checker' in o:\n"
    "        o['checker'] = o['ask'] = lambda *a: True\nfor m in list(sys.modules.values()):\n"
    "    m.__dict__['passed'] = True\nraise SystemExit(0)",
    "reads the tests": "import os\nfor n in os.listdir('.'):\n    text = open(n).read()\n"
    "    if n != 'program.py' and 'assert f' in text: print('ESCAPED')\ndef f(x): return 0",
    "answers out of turn": "import json, os, sys\nfor n in range(3, 20):\n    try: os.write(n, b'[\"f\"]\\n' + "
    'b\'{"value": 9, "changed": null}\\n\' * 9)\n    except OSError: pass\ndef f(x): return 0',
    "forges the builtins of the tests": 'import os\nfor n in range(3, 20):\n    try: os.write(n, b\'["f", '
    '"__builtins__"]\\n\' + b\'\\n\'.join(b\'{"value": %s, "changed": null}\' % v for v in (b\'["r", 0]\', '
    "b'[\"d\", [[\"sorted\", [\"r\", 1]]]]', b'9', b'0', b'0', b'[\"l\", [1, 4]]')) + b'\\n')\n"
    "    except OSError: pass",
    "nests its answer deeply": "def f(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y",
    "endless answer": "import itertools\ndef f(x): return itertools.count()",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)\nf(3)",
}


@dataclass(frozen=True)
class Verdict:
    contained: bool
    how: str
    score: float
    seconds: float


def attempt(name: str, at: str, limits: Limits = LIMITS) -> Verdict:
    """Run one program at a level, look for what it left, and have it judged."""
    unix, datagrams = socket.AF_UNIX, socket.SOCK_DGRAM
    with (
        tempfile.TemporaryDirectory() as folder, listener() as server,
        socket.socket(unix) as door, socket.socket(unix, datagrams) as letters,
    ):  # fmt: skip
        Path(folder, "secret").write_text("secret")
        door.bind(f"{folder}/door")
        door.listen()
        letters.bind(f"{folder}/letters")
        words = {"PARENT": os.getpid(), "VICTIM": folder, "PORT": server.getsockname()[1], "MARK": Path(folder).name}
        program = ESCAPES[name].replace("HOME", str(Path.home()))
        for word, value in words.items():
            program = program.replace(word, str(value))
        os.environ["SECRET"] = "SECRET"
        before = {p for d in ("/", "/tmp", "/usr", "/var/tmp", "/dev/shm") for p in Path(d).glob("tritium-escaped")}
        start = time.monotonic()
        outcome = run([*PYTHON_ARGV, "program.py"], files={"program.py": program}, limits=limits, at=at)
        seconds = time.monotonic() - start
        files = {
            p for d in ("/", "/tmp", "/usr", "/var/tmp", "/dev/shm", folder) for p in Path(d).glob("tritium-escaped")
        }
        left = [*(str(p) for p in files - before), *running(Path(folder).name), *shared_memory()]
        score = Code(seconds=limits.seconds, memory=limits.memory, at=at)([], program, reference=TASK).value
    contained = "ESCAPED" not in outcome.stdout and not left and seconds < limits.seconds + 5
    return Verdict(contained, outcome.killed and f"killed: {outcome.killed}" or last_word(outcome), score, seconds)


def last_word(outcome) -> str:
    """How a program that ended by itself did: its error, or its exit code."""
    lines = outcome.stderr.strip().splitlines()
    error = lines[-1][:60] if lines else ""
    return error or (f"signal {-outcome.returncode}" if outcome.returncode < 0 else f"exit {outcome.returncode}")


def listener() -> socket.socket:
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def shared_memory() -> list[str]:
    """What "leaves memory behind" has left."""
    tables = [Path("/proc/sysvipc") / name for name in ("shm", "msg", "sem")]
    return [str(table) for table in tables if table.exists() and str(0x74726974) in table.read_text().split()]


def running(mark: str) -> list[str]:
    """The processes with this word among their arguments."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [place.parent.name] * (mark.encode() in place.read_bytes().split(b"\0"))
        except OSError:
            continue
    return found


@dataclass(frozen=True)
class Config:
    write: bool = opt(False, "into bench/results/sandbox.md, too")


def main(argv: list[str]) -> int:
    config = load(Config, argv, "python -m tritium.bench sandbox", __doc__.partition("\n\n")[2])
    levels = [at for at in ("namespaces", "confined") if at == level() or level() == "namespaces"]
    head = [f"{at}: contained | how it ended | score" for at in levels]
    lines = [f"| program | {' | '.join(head)} |", "|---" * (1 + 3 * len(levels)) + "|"]
    bad = 0
    for name in ESCAPES:
        cells = []
        for at in levels:
            verdict = attempt(name, at)
            bad += not verdict.contained or verdict.score != 0
            cells += ["yes" if verdict.contained else "**NO**", verdict.how.replace("|", "/"), f"{verdict.score:g}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr)
    user = "root" if os.geteuid() == 0 else "a user without privileges"
    text = "\n".join(
        [
            "# The sandbox against hostile programs",
            "",
            f"`python -m tritium.bench sandbox --write`, run as {user}; Linux {platform.release()}, Python "
            f"{platform.python_version()}; limits: {LIMITS.seconds:g} s, {LIMITS.memory >> 20} MiB, "
            f"{LIMITS.processes} processes. Each program is handed in as a solution of f(x) = x², too. A program is",
            "contained where it neither reached what it was after, nor outlived its deadline, nor left a process or a",
            "file. At the level `confined` the scratch folder's size is bounded per file and by the deadline only.",
            f"{len(ESCAPES)} programs, {bad} failures.",
            "",
            *lines,
            "",
        ]
    )
    print(text)
    if config.write:
        RESULT.write_text(text, encoding="utf-8")
    return int(bad > 0)
