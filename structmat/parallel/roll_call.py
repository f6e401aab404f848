"""Before jax connects the processes of a run: who is there, and who is missing.

jax aborts a process whose peers do not come with a stack that names nobody. So process 0 first calls the roll over
TCP; all keep those connections, and `watch` listens on them. Messages are JSON, one a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any

from structmat.parallel.hosts import HostsError, Place

_LIMIT = 1 << 16  # bytes of a message
_PAUSE = 0.2
_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}


class Line:
    """One connection to a peer: messages out, messages in."""

    def __init__(self, sock: socket.socket, name: str = "a process"):
        self.socket, self.name, self._rest = sock, name, b""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send, unless the peer is gone."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that came, once there is something to read; None when the connection ended."""
        try:
            data = self.socket.recv(_LIMIT)
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LIMIT or not (data or lines):
            return None
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return [message for message in found if isinstance(message, dict)]

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


def call_roll(place: Place, about: str, timeout: float) -> dict[int, Line]:
    """Returns once all processes are there: process 0 gets a Line to each other one, they get one to process 0.

    Args:
      about: what must be the same in all processes, such as versions; compared as text.
      timeout: seconds that process 0 waits for the others, and that each of them waits for process 0 to answer.

    Raises:
      HostsError: names the processes that are missing, that differ, or that were started twice.
    """
    return _call(place, about, timeout) if place.index == 0 else _answer(place, about, timeout)


def _call(place: Place, about: str, timeout: float) -> dict[int, Line]:
    deadline = time.monotonic() + timeout
    here: dict[int, Line] = {}
    strangers: list[Line] = []
    with contextlib.closing(_listen(place)) as listener, selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        while len(here) < place.count - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _refuse(here, _missing(place, here, timeout))
            for key, _ in ready.select(left):
                if key.fileobj is listener:
                    stranger = Line(listener.accept()[0])
                    strangers.append(stranger)
                    ready.register(stranger.socket, selectors.EVENT_READ, stranger)
                    continue
                line = key.data
                messages = line.receive()
                if messages == []:
                    continue
                known = next((i for i, other in here.items() if other is line), None)
                if known is not None:  # it went away while others were awaited; it may come back
                    del here[known]
                if not messages or known is not None:
                    ready.unregister(line.socket)
                    line.close()
                    continue
                fault = _admit(place, about, messages[0], line, here)
                if fault:
                    raise _refuse(here | {-1: line}, fault)
    for line in strangers:
        if line not in here.values():
            line.close()
    for line in here.values():
        line.send({"go": True, "name": own_name()})
    return here


def _admit(place: Place, about: str, hello: Mapping[str, Any], line: Line, here: dict[int, Line]) -> str | None:
    """Takes the process that says hello into `here`; returns what is wrong with it."""
    index, count, name = hello.get("process"), hello.get("of"), str(hello.get("name"))[:200]
    if not isinstance(index, int) or not isinstance(count, int):
        return f"something else than a process of this run called at port {place.roll_call_port}; try another port"
    if count != place.count or not 0 < index < count:
        return f"process {index} ({name}) was started as one of {count}, but process 0 as one of {place.count}"
    if index in here:
        return f"two processes say they are number {index}: {here[index].name} and {name}; each needs its own"
    if hello.get("about") != about:
        return f"process {index} ({name}) runs {str(hello.get('about'))[:200]}, but process 0 {about}"
    line.name = name
    here[index] = line
    return None


def _missing(place: Place, here: Mapping[int, Line], timeout: float) -> str:
    absent = [i for i in range(1, place.count) if i not in here]
    present = ", ".join(["0", *(f"{i} ({here[i].name})" for i in sorted(here))])
    named = ", ".join(map(str, absent[:20])) + (f" and {len(absent) - 20} more" if len(absent) > 20 else "")
    return (
        f"missing after {timeout:g} s: process {named} of {place.count} (here: {present}); start it, see why it ended, "
        f"or whether it can reach {place.host}:{place.roll_call_port}"
    )


def _refuse(here: Mapping[int, Line], fault: str) -> HostsError:
    """Tell those that are here; the error to raise."""
    for line in here.values():
        line.send({"fault": fault})
        line.close()
    return HostsError(fault)


def _answer(place: Place, about: str, timeout: float) -> dict[int, Line]:
    deadline = time.monotonic() + timeout
    address = f"{place.host}:{place.roll_call_port}"
    hello = {"process": place.index, "of": place.count, "name": own_name(), "about": about}
    while True:
        try:
            line = Line(socket.create_connection((place.host, place.roll_call_port), timeout=5), "process 0")
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostsError(
                    f"missing after {timeout:g} s: process 0 of {place.count} does not answer process {place.index} at "
                    f"{address} ({error.strerror or error}); start it, see why it ended, or whether the port is open"
                ) from None
            time.sleep(_PAUSE)
            continue
        line.socket.settimeout(None)  # from here on process 0 decides how long to wait
        line.send(hello)
        messages = line.receive()
        while messages == []:
            messages = line.receive()
        if messages and "fault" in messages[0]:
            raise HostsError(str(messages[0]["fault"]))
        if messages and "go" in messages[0]:
            line.name = str(messages[0].get("name"))
            return {0: line}
        line.close()  # process 0 ended, or something else listens there; it may be started again
        if time.monotonic() > deadline:
            raise HostsError(f"process 0 of {place.count} was reached at {address}, but ended before all were there")
        time.sleep(_PAUSE)


def _listen(place: Place) -> socket.socket:
    local = place.host in ("127.0.0.1", "localhost", "::1")
    try:
        if local or not socket.has_dualstack_ipv6():
            return socket.create_server((place.host if local else "", place.roll_call_port), backlog=512)
        address = ("", place.roll_call_port)
        return socket.create_server(address, family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
    except OSError as error:
        raise HostsError(
            f"process 0 cannot call the roll at port {place.roll_call_port} ({error.strerror}); end what uses it, or "
            "give --coordinator another port"
        ) from None


def own_name() -> str:
    """Of this process, for others."""
    return f"host {socket.gethostname()}, pid {os.getpid()}"
