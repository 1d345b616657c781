"""Strings that end an answer."""

from collections.abc import Sequence


class Text:
    """The text of an answer as it grows, up to a stop string: what could be the beginning of one is held back."""

    def __init__(self, decoder, stops: Sequence[str]):
        self.decoder, self.stops, self.shown, self.held, self.stopped = decoder, stops, "", "", False

    def push(self, token: int) -> str:
        """What this token adds to `shown`."""
        return self._show(self.decoder.push(token))

    def finish(self) -> str:
        """And what was held back, now that nothing more comes."""
        more = "" if self.stopped else self._show(self.decoder.finish())
        self.shown, more, self.held = self.shown + self.held, more + self.held, ""
        return more

    @classmethod
    def of(cls, decoder, stops: Sequence[str], tokens: Sequence[int]) -> str:
        """The text of a whole answer, as it was shown."""
        text = cls(decoder, stops)
        for token in tokens:
            text.push(token)
        text.finish()
        return text.shown

    def _show(self, text: str) -> str:
        text = self.held + text
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        starts = (n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        end = min(found) if found else len(text) - max(starts, default=0)
        self.stopped, self.held = bool(found), "" if found else text[end:]
        self.shown += text[:end]
        return text[:end]
