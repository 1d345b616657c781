"""Conversations as token ids and weights, in the format that a model was made for."""

from tritium.core.chat.render import ROLES, ChatError, Rendered, parse_reasoning, render, stop_ids, template_text
from tritium.core.chat.templates import TEMPLATES, find_template

__all__ = [
    "ROLES",
    "TEMPLATES",
    "ChatError",
    "Rendered",
    "find_template",
    "parse_reasoning",
    "render",
    "stop_ids",
    "template_text",
]
