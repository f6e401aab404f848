"""Which process of a run was lost, or failed and why: by the connections of the roll call, while the run lasts.

jax aborts the others with a stack that names nobody, or leaves them waiting. A connection that breaks tells at once
which process is gone (a host that falls silent, after about 20 s), so that every other one can say so and leave.
"""

from __future__ import annotations

import dataclasses
import selectors
import threading
from collections.abc import Callable, Mapping
from typing import Any

from structmat.parallel.hosts import Place
from structmat.parallel.roll_call import Line

_GONE = "is gone: it was killed, it crashed, or its host is out of reach"


@dataclasses.dataclass(frozen=True)
class Notice:
    """What happened to a process: a sentence, and the reason it gave itself ("" if it was lost without a word)."""

    sentence: str
    reason: str = ""


class Watch(threading.Thread):
    """Listens on the Lines of a roll call, and learns of the first process lost or failed; process 0 tells all.

    Args:
      lines: from `call_roll`.
      act: called once, in a thread of its own, with what happened.

    Attributes:
      notice: what happened, once `known` is set.
      known: something did. alone: all other processes have left.
    """

    def __init__(self, place: Place, lines: Mapping[int, Line], act: Callable[[Notice], None]):
        super().__init__(daemon=True, name="watch")
        self._place, self._lines, self._act = place, dict(lines), act
        self.notice: Notice | None = None
        self.known, self.alone = threading.Event(), threading.Event()

    def run(self) -> None:
        """Until all others have left."""
        left: set[int] = set()
        with selectors.DefaultSelector() as ready:
            for index, line in self._lines.items():
                ready.register(line.socket, selectors.EVENT_READ, index)
            while ready.get_map():
                for key, _ in ready.select():
                    index, line = key.data, self._lines[key.data]
                    messages = line.receive()
                    for message in messages or ():
                        if "bye" in message:
                            left.add(index)
                        if "sentence" in message:
                            self._report(Notice(str(message["sentence"]), str(message.get("reason", ""))))
                    if messages is None:
                        ready.unregister(line.socket)
                        if index not in left:
                            who = f"process {index} of {self._place.count} ({line.name})"
                            self._report(Notice(f"{who} {_GONE}"))
        self.alone.set()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send to every process there is a Line to."""
        for line in self._lines.values():
            line.send(message)

    def _report(self, notice: Notice) -> None:
        if self.known.is_set():
            return
        self.notice = notice
        self.known.set()
        if self._place.index == 0:
            self.tell({"sentence": notice.sentence, "reason": notice.reason})
        threading.Thread(target=self._act, args=(notice,), daemon=True, name="leave").start()
