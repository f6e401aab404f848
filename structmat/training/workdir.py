"""Who owns a workdir: one run per folder, recognised by its config, never overwritten by another."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from structmat.training.config import FREE, differences
from structmat.training.errors import RunError

RUN = "config.json"
RECORD = "record.json"
_PART = f"{RUN}.part"
_SHOWN = 8
_VISIBLE = 60  # seconds; NFS remembers for up to a minute that a file was not there


def claim(workdir: str | Path, run: Mapping[str, Any]) -> bool:
    """Check that the folder is new, empty or this run's; writes nothing.

    Args:
      run: `identity` of the config.

    Returns:
      Whether the run already finished there.

    Raises:
      RunError: it holds another run (names the first fields that differ) or something else, or is no path.
    """
    if "://" in str(workdir):
        raise RunError(f"workdir {str(workdir)!r} is a URL; mount it, and give the folder where it is mounted")
    folder = Path(workdir)
    if folder.exists() and not folder.is_dir():
        raise RunError(f"workdir {str(folder)!r} is a file; give a new folder")
    path = folder / RUN
    if not path.exists():
        names = sorted(p.name for p in folder.iterdir() if p.name != _PART) if folder.exists() else []
        if not names:
            return False
        found = ", ".join(names[:5])
        raise RunError(f"workdir {str(folder)!r} holds {found}, but no {RUN} of a run; give a new or empty folder")
    try:
        stored = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{str(path)!r} is not readable ({error}); restore it, or give another folder") from None
    found = list(differences(stored, run))
    if found:
        rows = [f"  {key}: there {old!r}, now {new!r}" for key, old, new in found[:_SHOWN]]
        rows += [f"  ... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise RunError(
            "\n".join(
                [f"workdir {str(folder)!r} holds a run with another config:"]
                + rows
                + [f"give another --workdir, or these values (a resumed run may change only {', '.join(FREE)})"]
            )
        )
    return (folder / RECORD).exists()


def occupy(workdir: str | Path, run: Mapping[str, Any]) -> None:
    """Make the folder and note whose it is; process 0 does it for all, once all have claimed it.

    Raises:
      RunError: it cannot be written, or this process does not see what process 0 wrote there.
    """
    folder = Path(workdir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir claimed")
    if jax.process_index() == 0:
        _write(folder, run)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir occupied")
        _await(folder / RUN)


def _write(folder: Path, run: Mapping[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / RUN).exists():
            part = folder / _PART
            part.write_text(json.dumps(run, indent=1) + "\n")
            part.rename(folder / RUN)
    except OSError as error:
        raise RunError(f"workdir {str(folder)!r} cannot be written: {error.strerror}; give another folder") from None


def _await(path: Path) -> None:
    until = time.monotonic() + _VISIBLE
    while not path.exists():
        if time.monotonic() > until:
            raise RunError(
                f"workdir {str(path.parent)!r} is not shared: process {jax.process_index()} on {socket.gethostname()} "
                f"does not see the {path.name} of process 0; give a folder that all hosts have, such as an NFS mount"
            )
        time.sleep(0.2)
