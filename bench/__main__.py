"""`python -m tritium.bench NAME …`; NAME is one of COMMANDS. Exit codes as the `tritium` command's."""

import sys
from importlib import import_module

from tritium.core.config import UserError, nearest

COMMANDS = ("alignment", "data", "generate", "growth", "kernels", "parallel", "sandbox", "scaling", "step", "summary")
COMMANDS += ("table", "train", "tune")


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark with the arguments `argv` (sys.argv's by default) and return the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name not in COMMANDS:
        asked, guess = name in ("--help", "-h"), nearest(name, COMMANDS)
        wrong = "" if asked else f"no benchmark {name!r}{f'; did you mean {guess}?' if guess else ''}\n"
        print(f"{wrong}usage: python -m tritium.bench {'|'.join(COMMANDS)} [--help] [--name=value …]", file=sys.stderr)
        return 0 if asked else 2
    try:
        return import_module(f"tritium.bench.{name}").main(rest)
    except UserError as error:
        print(f"tritium.bench {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tritium.bench {name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
