"""Conversations as token ids and weights, in the format that a model was made for."""

from tritium.core.chat.render import ROLES, THINKING, ChatError, parse_reasoning, render, stop_ids
from tritium.core.chat.templates import TEMPLATES, find_template
