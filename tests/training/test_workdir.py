"""The workdir with several processes: nothing is written before all have looked, and one that sees nothing says so."""

import pytest

from structmat.training import workdir
from structmat.training.errors import RunError


@pytest.fixture
def process(monkeypatch, tmp_path):
    """Call with an index: this is process `index` of 2; returns what it sees of the folder at each meeting."""
    seen = []

    def meet(name):
        seen.append((name, (tmp_path / "run" / workdir.RUN).exists()))

    def be(index):
        monkeypatch.setattr(workdir.jax, "process_count", lambda: 2)
        monkeypatch.setattr(workdir.jax, "process_index", lambda: index)
        monkeypatch.setattr(workdir.multihost_utils, "sync_global_devices", meet)
        monkeypatch.setattr(workdir, "_VISIBLE", 0.3)
        return seen

    return be


def test_process_0_writes_between_the_meetings(process, tmp_path):
    seen = process(0)
    workdir.occupy(tmp_path / "run", {"a": 1})
    assert seen == [("workdir claimed", False), ("workdir occupied", True)]


def test_a_folder_that_is_not_shared_is_named(process, tmp_path):
    seen = process(1)
    with pytest.raises(
        RunError, match=r"run' is not shared: process 1 on .* does not see the config.json of process 0"
    ):
        workdir.occupy(tmp_path / "run", {"a": 1})
    assert len(seen) == 2 and not (tmp_path / "run").exists()


def test_urls_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="'gs://bucket/run' is a URL; mount it"):
        workdir.claim("gs://bucket/run", {})
    assert not list(tmp_path.iterdir())
