"""Where a process stands among those of a run, and the roll call; threads stand in for processes."""

import json
import socket
import threading
import time

import pytest

from experiments.launch.local import free_port
from structmat.parallel import HostsError
from structmat.parallel.hosts import Place, find_place
from structmat.parallel.roll_call import call_roll
from structmat.parallel.watch import Watch

AT = "127.0.0.1:9000"
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-009],other1",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "4",
}


def test_places_from_arguments_and_the_environment():
    told = {"STRUCTMAT_COORDINATOR": AT, "STRUCTMAT_PROCESSES": "3", "STRUCTMAT_PROCESS": "2"}
    assert find_place(environment=told) == Place(2, 3, AT)
    assert find_place(process=0, environment=told) == Place(0, 3, AT)
    assert find_place("[::1]:9000", 2, 1, environment=told) == Place(1, 2, "[::1]:9000")
    assert find_place("[::1]:9000", 2, 1, environment={}).host == "::1"
    assert find_place(processes=1, environment={}) == find_place(environment={}) == Place()
    assert Place(0, 2, "h:9000").roll_call_port == 13096 and Place(0, 2, "h:61441").roll_call_port == 57345


def test_places_under_slurm(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    found = find_place()
    assert (found.index, found.count, found.host, found.told) == (4, 6, "node007", False)
    assert find_place(processes=1) == Place()
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert find_place() == Place()


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ((None, 2, 0), {}, "not --coordinator (or STRUCTMAT_COORDINATOR)"),
        ((AT, None, 0), {}, "not --processes (or STRUCTMAT_PROCESSES)"),
        ((AT, 2, None), {}, "--processes=2, but which one this is was not said: --process (or STRUCTMAT_PROCESS)"),
        ((AT, 2, 2), {}, "--process=2: with 2 processes it must be in 0 .. 1"),
        ((AT, 2, -1), {}, "--process=-1"),
        ((AT, 0, 0), {}, "--processes=0: the number of processes must be at least 1"),
        (("host", 2, 0), {}, "--coordinator='host' must be host:port"),
        (("host:80", 2, 0), {}, "port in 1024 .. 65535"),
        ((AT, None, 0), {"STRUCTMAT_PROCESSES": "two"}, "STRUCTMAT_PROCESSES='two' must be a number"),
        ((AT, 2, None), {"STRUCTMAT_PROCESS": "5"}, "STRUCTMAT_PROCESS=5: with 2 processes"),
    ],
)
def test_wrong_places_are_refused(arguments, environment, said):
    with pytest.raises(HostsError) as caught:
        find_place(*arguments, environment=environment)
    assert said in str(caught.value)


class Caller(threading.Thread):
    """One process of a roll call; keeps what came of it."""

    def __init__(self, place, about="v1", timeout=20.0):
        super().__init__(daemon=True)
        self.place, self.about, self.timeout = place, about, timeout
        self.lines, self.error = None, None
        self.start()

    def run(self):
        try:
            self.lines = call_roll(self.place, self.about, self.timeout)
        except HostsError as error:
            self.error = str(error)


def together(*callers):
    for caller in callers:
        caller.join(30)
    return callers


@pytest.fixture
def at():
    return f"127.0.0.1:{free_port()}"


def test_missing_processes_are_named_to_all_that_are_there(at):
    zero, two = together(Caller(Place(0, 4, at), timeout=1.5), Caller(Place(2, 4, at)))
    assert zero.error == two.error
    assert "missing after 1.5 s: process 1, 3 of 4 (here: 0, 2 (host " in zero.error


def test_a_missing_process_0_is_named(at):
    (one,) = together(Caller(Place(1, 2, at), timeout=0.5))
    assert "missing after 0.5 s: process 0 of 2 does not answer process 1 at 127.0.0.1:" in one.error


@pytest.mark.parametrize(
    ("place", "about", "said"),
    [
        (lambda at: Place(1, 3, at), "v1", "was started as one of 3, but process 0 as one of 2"),
        (lambda at: Place(1, 2, at), "v2", "runs v2, but process 0 v1"),
    ],
)
def test_processes_that_do_not_belong_are_named(place, about, said, at):
    zero, one = together(Caller(Place(0, 2, at)), Caller(place(at), about))
    assert zero.error == one.error and said in zero.error and zero.error.startswith("process 1 (host ")


def test_a_process_started_twice_is_named(at):
    callers = together(Caller(Place(0, 3, at)), Caller(Place(1, 3, at)), Caller(Place(1, 3, at)))
    assert all("two processes say they are number 1: host" in caller.error for caller in callers)


def test_strangers_and_those_that_went_away_do_not_count(at):
    zero = Caller(Place(0, 3, at), timeout=20)
    port = zero.place.roll_call_port
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"", json.dumps({"process": 1, "of": 3, "about": "v1"}).encode() + b"\n"):
        for _ in range(50):
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(said)
                    time.sleep(0.1)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    assert zero.is_alive()
    one, two, _ = together(Caller(Place(1, 3, at)), Caller(Place(2, 3, at)), zero)
    assert not (zero.error or one.error or two.error)
    assert sorted(zero.lines) == [1, 2] and zero.lines[1].name.startswith("host ") and list(two.lines) == [0]


def watched(at, count, without=()):
    """The Watch of each process, and the notices each was given; those of `without`, about to end, do not listen."""
    callers = together(*[Caller(Place(i, count, at)) for i in range(count)])
    notices = [[] for _ in range(count)]
    watches = [Watch(c.place, c.lines, notices[i].append) for i, c in enumerate(callers)]
    for watch in watches:
        if watches.index(watch) not in without:
            watch.start()
    return callers, watches, notices


def hang_up(caller):
    for line in caller.lines.values():
        line.socket.shutdown(socket.SHUT_RDWR)
        line.close()


@pytest.mark.parametrize("lost", [0, 2])
def test_all_learn_which_process_was_lost(lost, at):
    callers, watches, notices = watched(at, 3, without=[lost])
    hang_up(callers[lost])
    for i in {0, 1, 2} - {lost}:
        assert watches[i].known.wait(5)
        assert watches[i].notice.sentence.startswith(f"process {lost} of 3 (host ") and not watches[i].notice.reason
        assert "is gone" in watches[i].notice.sentence
        time.sleep(0.1)
        assert notices[i] == [watches[i].notice]


def test_all_learn_why_a_process_stopped_and_a_leave_is_no_loss(at):
    callers, watches, _ = watched(at, 3, without=[1, 2])
    watches[1].tell({"bye": True})
    hang_up(callers[1])
    time.sleep(0.2)
    assert not watches[0].known.is_set()
    watches[2].tell({"sentence": "process 2 stopped: disk full", "reason": "disk full"})
    hang_up(callers[2])
    assert watches[0].known.wait(5) and watches[0].notice.reason == "disk full"
    assert watches[0].alone.wait(5)
