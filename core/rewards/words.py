"""The words that judges know, from words.toml."""

import tomllib
from pathlib import Path

WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text("utf-8"))
