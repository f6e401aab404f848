"""Asynchronous checkpoints that are never loaded wrong: Orbax underneath, a manifest and array checksums around it.

A save goes to `<workdir>/checkpoints/<step>.saving`, gets its manifest, and is renamed to `<step>`; so a process killed
at any moment leaves no half-written step behind. Everything that touches Orbax v1, whose names still move, is here.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from structmat.training import checksum, manifest
from structmat.training.manifest import Manifest, ManifestError

HASH_LIMIT = 10 << 30  # bytes; larger checkpoints rely on file sizes and the array checksums
_SAVING = ".saving"
_ROWS_SHOWN = 12


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, does not fit the wanted state, or none verifies."""


@dataclass(frozen=True)
class Found:
    """The newest step whose files verify, its `extra`, and each newer step that was skipped with the reason."""

    step: int
    extra: dict[str, Any]
    skipped: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Restored(Found):
    """A Found together with the state, on the template's shardings."""

    state: Any


class Checkpointer:
    """Saves and restores a pytree of jax arrays under `<workdir>/checkpoints`; use as a context manager or `close()`.

    All processes call the same methods in the same order; `workdir` is shared between them (a path or a gs:// URL).

    Args:
      workdir: the run's folder.
      keep: this many newest steps are kept, >= 1.
      every: steps between saves, >= 1; see `due`.
      hash_limit: checkpoints of more bytes than this carry no SHA-256 of their files.
    """

    def __init__(self, workdir: str, *, keep: int = 3, every: int = 1000, hash_limit: int = HASH_LIMIT):
        for name, value in (("keep", keep), ("every", every)):
            if value < 1:
                raise ValueError(f"checkpoint {name} is {value}; it must be >= 1")
        root = epath.Path(workdir)
        self.folder = (root if "://" in str(workdir) else root.absolute()) / "checkpoints"
        self.keep, self.every, self._hash_limit = keep, every, hash_limit
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._primary = jax.process_index() == 0
        logging.getLogger("absl").addFilter(_quiet_orbax)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def due(self, step: int) -> bool:
        """True at every multiple of `every` above 0."""
        return step > 0 and step % self.every == 0

    def steps(self) -> list[int]:
        """The saved steps, ascending, verified or not; unfinished saves and other folders are not steps."""
        if not self.folder.exists():
            return []
        names = [path.name for path in self.folder.iterdir()]
        return sorted(int(n) for n in names if n.isascii() and n.isdigit() and str(int(n)) == n)

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Starts saving and returns once the arrays may be donated; waits for an earlier save first.

        Args:
          step: >= 0; an existing step of that number is replaced once the new one is complete.
          state: pytree of jax.Array (no numpy or Python scalars, no typed keys), each with the sharding it is to keep.
          extra: JSON values: config text, site table, versions, mesh.

        Raises:
          TypeError, ValueError: a leaf or extra that cannot be saved, named; nothing was written.
          CheckpointError: the earlier save failed.
        """
        self.wait()
        arrays = _named_leaves(state, (jax.Array,))
        for name, x in arrays.items():
            if not checksum.supported(x.dtype):
                hint = "; save jax.random.key_data(key)" if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else ""
                raise TypeError(f"state leaf {name!r} has dtype {x.dtype}, which cannot be checkpointed{hint}")
        try:
            extra = json.loads(json.dumps(dict(extra), allow_nan=False))
        except (TypeError, ValueError) as e:
            raise TypeError(f"checkpoint extra is not JSON: {e}") from e
        described = {n: {"shape": list(x.shape), "dtype": x.dtype.name} for n, x in arrays.items()}
        sums = checksum.start(arrays)
        target = self.folder / f"{int(step)}{_SAVING}"
        try:
            if self._primary:
                self._remove_unfinished()
            response = ocp.save_async(target, nest({n: x for n, x in arrays.items() if x.size}), overwrite=True)
        except Exception as e:
            raise CheckpointError(f"step {step} was not saved in {self.folder}: {type(e).__name__}: {e}") from e
        self._pending = self._pool.submit(self._finish, int(step), response, target, described, sums, extra)

    def wait(self) -> None:
        """Returns when the last save is complete (in process 0: manifest and all); raises CheckpointError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, then ends the background thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def latest(self) -> Found | None:
        """The newest step whose manifest verifies; None when nothing was ever saved. Errors as in `restore`.

        Its `extra` tells what model to build before there is a template to restore into.
        """
        self.wait()
        _everywhere(True)  # process 0 finishes a save last; list the steps only after it has
        skipped: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            found = self._verified(step, skipped)
            if found is not None:
                return Found(step, dict(found.extra), tuple(skipped))
        return self._nothing(skipped)

    def restore(self, template: Any) -> Restored | None:
        """The newest step that verifies, placed as `template` says; None when nothing was ever saved.

        Args:
          template: the state's pytree with jax.Array or jax.ShapeDtypeStruct leaves, each with a sharding; or a function
            of a step's `extra` that returns it, where the shapes of one step are not those of another.

        Raises:
          CheckpointError: the newest intact step has other paths, shapes or dtypes than the template (each named), or
            steps exist and none verifies (each named with the reason).
        """
        self.wait()
        of_step = template if callable(template) else lambda extra: template
        if not callable(template):
            _wanted(template)
        _everywhere(True)
        skipped: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            found = self._verified(step, skipped)
            if found is None:
                continue
            own = of_step(dict(found.extra))
            wanted = _wanted(own)
            self._check_fits(step, wanted, found)
            reason, leaves = self._load(step, wanted, found)
            if _everywhere(reason is None):
                state = jax.tree.unflatten(jax.tree.structure(own), leaves)
                return Restored(step, dict(found.extra), tuple(skipped), state)
            skipped.append((step, reason or "another process could not read it"))
        return self._nothing(skipped)

    def read(self, step: int, names: Iterable[str]) -> dict[str, jax.Array]:
        """Some arrays of a saved step, alone: nothing else of it is loaded, and no file is hashed (see `latest`).

        Args:
          step: one of `steps()`.
          names: slash paths of its leaves, such as `params/embed/kernel`; each array comes whole, on this process's
            first device.

        Raises:
          CheckpointError: no such step or array, or one that cannot be read or differs from its checksum.
        """
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            found = manifest.read(self.folder / str(step))
        except (ManifestError, OSError) as e:
            raise CheckpointError(f"checkpoint {self.folder / str(step)}: {e}") from e
        wanted = {}
        for name in names:
            if name not in found.arrays:
                raise CheckpointError(f"checkpoint {self.folder / str(step)} has no array {name!r}")
            array = found.arrays[name]
            wanted[name] = jax.ShapeDtypeStruct(tuple(array["shape"]), jnp.dtype(array["dtype"]), sharding=place)
        reason, leaves = self._load(step, wanted, found, partial=True)
        if reason is not None:
            raise CheckpointError(f"checkpoint {self.folder / str(step)}: {reason}")
        return dict(zip(wanted, leaves))

    def _finish(self, step: int, response: Any, target: epath.Path, arrays: dict, sums: jax.Array, extra: dict) -> None:
        try:
            response.result()
            if not self._primary:
                return
            for name, value in checksum.finish(list(arrays), sums).items():
                arrays[name]["checksum"] = value
            manifest.write(target, step, arrays, extra, self._hash_limit)
            final = self.folder / str(step)
            if final.exists():
                final.rmtree()
            target.rename(final)
            # steps beyond this one belong to a future that a fallback gave up: not ours to count or remove
            for old in [s for s in self.steps() if s <= step][: -self.keep]:
                (self.folder / str(old)).rmtree()
        except Exception as e:
            raise CheckpointError(f"step {step} was not saved in {self.folder}: {type(e).__name__}: {e}") from e

    def _remove_unfinished(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.name.partition(_SAVING)[0].isdigit() and _SAVING in path.name:
                path.rmtree()

    def _verified(self, step: int, skipped: list[tuple[int, str]]) -> Manifest | None:
        found, reason = None, "another process finds it damaged"
        try:
            found = manifest.verify(self.folder / str(step), hashes=self._primary)
        except (ManifestError, OSError) as e:
            reason = str(e)
        if _everywhere(found is not None):
            return found
        skipped.append((step, reason))
        return None

    def _check_fits(self, step: int, wanted: Mapping[str, Any], found: Manifest) -> None:
        want = {n: f"{np.dtype(x.dtype).name} {tuple(x.shape)}" for n, x in wanted.items()}
        have = {n: f"{a['dtype']} {tuple(a['shape'])}" for n, a in found.arrays.items()}
        rows = [
            f"  {n}: wanted {want.get(n, 'nothing')}, found {have.get(n, 'nothing')}"
            for n in [*want, *(n for n in have if n not in want)]
            if want.get(n) != have.get(n)
        ]
        if rows:
            more = [f"  ... and {len(rows) - _ROWS_SHOWN} more"] if len(rows) > _ROWS_SHOWN else []
            raise CheckpointError(
                "\n".join(
                    [f"checkpoint {self.folder / str(step)} does not fit this state:"]
                    + rows[:_ROWS_SHOWN]
                    + more
                    + ["use the config it was saved with, or another workdir"]
                )
            )

    def _load(
        self, step: int, wanted: Mapping[str, Any], found: Manifest, partial: bool = False
    ) -> tuple[str | None, list[jax.Array]]:
        """(None, leaves) or (why not, [])."""
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        abstract = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for n, x in wanted.items()}
        stored = nest({n: x for n, x in abstract.items() if x.size})
        try:
            with context:
                loaded = ocp.load(self.folder / str(step), stored) if stored else {}
        except Exception as e:
            text = str(e).split(" [tensorstore_spec")[0].replace(f"{self.folder / str(step)}/", "")
            return f"Orbax could not read it ({type(e).__name__}: {text[:300]})", []
        arrays = _named_leaves(loaded, (jax.Array,)) if stored else {}
        leaves = {
            n: arrays[n] if x.size else jnp.zeros(x.shape, x.dtype, device=x.sharding) for n, x in abstract.items()
        }
        for name, value in checksum.finish(list(leaves), checksum.start(leaves)).items():
            if value != found.arrays[name]["checksum"]:
                return f"array {name} differs from its checksum", []
        return None, list(leaves.values())

    def _nothing(self, skipped: list[tuple[int, str]]) -> None:
        if skipped:
            rows = "".join(f"\n  step {step}: {reason}" for step, reason in skipped)
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be trusted:{rows}\nrestore the files, or start in another workdir"
            )


def _wanted(template: Any) -> dict[str, Any]:
    """Slash path -> leaf of a template; raises ValueError naming a leaf without sharding."""
    wanted = _named_leaves(template, (jax.Array, jax.ShapeDtypeStruct))
    for name, x in wanted.items():
        if x.sharding is None:
            raise ValueError(f"template leaf {name!r} has no sharding; give ShapeDtypeStruct(..., sharding=...)")
    return wanted


def _named_leaves(tree: Any, types: tuple[type, ...]) -> dict[str, Any]:
    """Slash path -> leaf, in flattening order; raises TypeError naming a leaf of another type, ValueError on a clash."""
    named: dict[str, Any] = {}
    dotted: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, types) or not path:
            valid = " or ".join(f"jax.{t.__name__}" for t in types)
            raise TypeError(
                f"state leaf {name!r} is a {type(leaf).__module__}.{type(leaf).__name__}; it must be a {valid} inside a "
                "container (jax.device_put it with the mesh's sharding)"
            )
        # Orbax joins path parts by dots and would silently give two such leaves one file
        clash = dotted.setdefault(name.replace("/", "."), name)
        if name in named or clash != name:
            raise ValueError(f"state paths {clash!r} and {name!r} cannot be told apart on disk; rename one")
        named[name] = leaf
    for name in named:
        for i, character in enumerate(name):
            if character == "/" and name[:i] in named:
                raise ValueError(f"state path {name[:i]!r} is a leaf and the folder of {name!r}; rename one")
    if not named:
        raise TypeError("the state has no arrays")
    return named


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Slash paths as nested dicts: what is stored does not depend on which containers held it."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def _everywhere(ok: bool) -> bool:
    """True if ok in every process, so that all skip the same steps."""
    return ok if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _quiet_orbax(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or "orbax" not in record.pathname
