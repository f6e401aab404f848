"""R5: damaged checkpoints. Nothing wrong is ever loaded, an older good step is, and the message names the file."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.torture.damages import DAMAGES
from experiments.torture.figures import Trial, figure
from structmat.training.checkpoint import Checkpointer, CheckpointError

STEPS = (10, 20, 30)


def make_state(seed: int) -> dict[str, Any]:
    """Arrays of several dtypes and sizes on the first device."""
    rng = np.random.default_rng(seed)
    state = {
        "params": {"w": rng.normal(size=(48, 32)).astype(np.float32), "b": rng.normal(size=32).astype(np.float32)},
        "frozen": {"index": rng.integers(0, 99, (8, 16), dtype=np.int32), "mask": rng.random(5) > 0.5},
        "step": np.asarray(seed, np.int32),
    }
    return jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), state)


def same_bits(a: Any, b: Any) -> bool:
    """Equal trees of equal bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def three_saves(folder: Path) -> dict[int, Any]:
    """Saves steps 10, 20 and 30; the state of each."""
    states = {step: make_state(step) for step in STEPS}
    with Checkpointer(str(folder)) as saver:
        for step, state in states.items():
            saver.save(step, state, {"step": step})
    return states


def outcome(folder: Path, states: dict[int, Any], damaged: dict[int, list[str]]) -> str:
    """What is wrong with a load after damage; "" if nothing.

    Args:
      damaged: step -> files touched. The newest step not in it has to be loaded, or an error name every step.
    """
    good = [step for step in STEPS if step not in damaged]
    try:
        with Checkpointer(str(folder)) as loader:
            found = loader.restore(states[STEPS[0]])
    except CheckpointError as error:
        if good:
            return f"refused although step {good[-1]} is good: {error}"
        reasons = {step: str(error).partition(f"\n  step {step}: ")[2].partition("\n")[0] for step in damaged}
    else:
        if not good:
            return f"loaded step {found.step}, which is damaged"
        if found.step != good[-1] or not same_bits(found.state, states[found.step]):
            return f"loaded step {found.step} instead of {good[-1]}, or other bits"
        reasons = dict(found.skipped)
    for step, files in damaged.items():
        if step > max(good, default=0) and not any(name in reasons.get(step, "") for name in files):
            return f"{reasons.get(step, 'no reason given')!r} names none of {files}"
    return ""


@contextlib.contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to any file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(folder: Path, states: dict[int, Any], size: int) -> str:
    """What is wrong with a save that runs out of space; "" if it is reported and the steps before are intact."""
    with Checkpointer(str(folder), keep=9) as saver:
        try:
            with no_file_beyond(size):
                saver.save(40, make_state(40), {"step": 40})
                saver.wait()
        except CheckpointError as error:
            if "step 40 was not saved" not in str(error) or str(folder) not in str(error):
                return f"the message names no step or folder: {error}"
        else:
            return "no error"
        found = saver.restore(states[STEPS[0]])
        if found.step != 30 or not same_bits(found.state, states[30]):
            return f"loaded step {found.step} afterwards, or other bits"
        saver.save(50, make_state(50), {"step": 50})
        saver.wait()
        return "" if saver.steps() == [10, 20, 30, 50] else f"with space again: steps {saver.steps()}"


@figure("R5", "damaged checkpoints: never loaded wrong, older good step used, file named", least=200)
def damage(trial: Trial, each: int = 18, disks: int = 12) -> None:
    """Every kind of damage `each` times (to the newest step, the newest two, all three), and `disks` full disks."""
    base = trial.folder / "base"
    states = three_saves(base)
    for kind, act in DAMAGES.items():
        for n in range(each):
            victims = STEPS[-1 - (n % 3 if n >= each // 2 else 0) :]
            folder, rng = trial.folder / f"{kind}{n}", random.Random(f"{trial.seed} {kind} {n}")
            shutil.copytree(base, folder)
            damaged = {step: act(folder / "checkpoints" / str(step), rng) for step in reversed(victims)}
            why = outcome(folder, states, damaged)
            trial.check(f"{kind} {n} of {damaged}", not why, why)
            shutil.rmtree(folder)
    for n in range(each):
        folder, stray = trial.folder / f"stray{n}", trial.random.choice((31, 40, 10**9))
        shutil.copytree(base, folder)
        (folder / "checkpoints" / str(stray)).mkdir()
        names = ("35.saving", "31.saving.orbax-checkpoint-tmp", "notes", "040", "-3", "4e1")
        for name in trial.random.sample(names, 2):
            (folder / "checkpoints" / name).mkdir()
        with Checkpointer(str(folder)) as loader:
            found = loader.restore(states[10])
        ok = found.step == 30 and same_bits(found.state, states[30]) and [s for s, _ in found.skipped] == [stray]
        trial.check(f"stray folders {n}", ok, f"loaded {found.step}, skipped {found.skipped}")
        shutil.rmtree(folder)
    for n in range(disks):
        folder, size = trial.folder / f"full{n}", trial.random.choice((0, 16, 64, 256, 700))
        shutil.copytree(base, folder)
        why = full_disk(folder, states, size)
        trial.check(f"no file beyond {size} bytes ({n})", not why, why)
        shutil.rmtree(folder)
    trial.notes["kinds of damage"] = len(DAMAGES) + 2
