"""Flags of every command that runs a config: errors of the user are a few lines and exit code 2, never a traceback."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments.own_flags import OwnFlags
from structmat.data.errors import DataError
from structmat.parallel import HostsError, MeshError, current_group
from structmat.structures import StructureError
from structmat.structures.errors import suggest
from structmat.training.checkpoint import CheckpointError
from structmat.training.errors import ConfigError, Interrupted, RunError

USER_ERRORS = (ConfigError, RunError, DataError, StructureError, MeshError, HostsError, CheckpointError)

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The run: configs/<file>.py, or configs/<file>.py:argument; --config.field=value overrides."
)


def parse(argv: Sequence[str] | None = None) -> None:
    """Parse the flags; a wrong one ends the process with code 2 and one line."""
    argv = list(sys.argv if argv is None else argv)
    try:
        rest = flags.FLAGS(argv)
        if flags.FLAGS["config"].present:
            flags.FLAGS["config"].value.keys()  # a file that failed to load tells only when it is read
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError, ImportError) as error:
        # ml_collections reports wrong fields as AttributeError or KeyError, wrong types as TypeError
        fail(_explain(argv) or error)
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags read --name=value")


def _explain(argv: Sequence[str]) -> str | None:
    """What to say about a missing config file, or the first `--config.x.y` that names no field."""
    text = next((value for arg in argv if (value := re.sub(r"^--?config=", "", arg)) != arg), None)
    if text is None:
        return None
    if not Path(file := text.partition(":")[0]).is_file():
        return f"--config={text}: there is no file {file!r}"
    try:
        config = flags.FLAGS["config"].parser.parse(text)
    except ValueError as error:  # what get_config raised, wrapped with a traceback by ml_collections
        return str(error.__context__ or error)
    except Exception:
        return None
    for arg in argv:
        match, node = re.match(r"--?(?:no)?config\.([\w.]+)", arg), config
        for key in match[1].split(".") if match else ():
            if not isinstance(node, ConfigDict):
                break
            if key not in node:
                return f"{match[0]}: no field {key!r}" + suggest(key, node.keys())
            node = node[key]
    return None


def fail(error: Any) -> NoReturn:
    """Print what is wrong and leave with code 2."""
    print(f"error: {str(error).strip()}", file=sys.stderr)
    raise SystemExit(2)


def run(main: Callable[[], Any], own: OwnFlags) -> None:
    """Parse the flags, the command's own among them, and call `main`; what the user got wrong is printed, all else is a traceback.

    A run stopped by SIGTERM has saved its state, so it ends with code 0. Of several processes, all learn of an error.
    """
    own.parse(parse)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.getLogger("structmat").addHandler(handler)
    logging.getLogger("structmat").setLevel(logging.INFO)
    logging.getLogger("structmat").propagate = False
    try:
        main()
    except Interrupted as stopped:
        if current_group().primary:
            print(stopped, file=sys.stderr)
    except USER_ERRORS as error:
        current_group().abandon(error, f"error: {str(error).strip()}", 2)
        fail(error)
    except KeyboardInterrupt as error:
        current_group().abandon(error, "interrupted", 130)
        raise
    except Exception as error:
        current_group().abandon(error, traceback.format_exc(), 1)
        raise
    current_group().close()
