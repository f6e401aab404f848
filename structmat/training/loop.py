"""The training loop, one function to be read from top to bottom."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from structmat.parallel import describe, local_rows, make_mesh, on_mesh, shard_batch
from structmat.training import workdir
from structmat.training.build import (
    as_ended,
    compile_step,
    evaluate,
    make_eval_step,
    optimizer_for,
    step_for,
    stored_plan,
    stored_task,
)
from structmat.training.checkpoint import Checkpointer
from structmat.training.config import identity, profile_steps, validate
from structmat.training.environment import peak_flops, versions
from structmat.training.errors import Interrupted, RunError
from structmat.training.methods import method_of, report_of, rule_for
from structmat.training.metrics import MetricWriter
from structmat.training.progress import ProgressLine, Runs
from structmat.training.recalibrate import recalibrated
from structmat.training.record import Record
from structmat.training.rule import Rule
from structmat.training.sigterm import listening_for_sigterm
from structmat.training.state import create_state, plan_state, variables_of
from structmat.training.step import leaf_paths
from structmat.training.switch import refuse_rule, switches
from structmat.training.switching import carried_out, line, noted
from structmat.training.task import dump_tables

log = logging.getLogger(__name__)


def train(
    config: ConfigDict,
    folder: str | Path,
    *,
    rule: Rule | None = None,
    name: str | None = None,
    runs: Runs | None = None,
    on_step: Callable[[int, dict[str, Any]], None] | None = None,
) -> Record:
    """Train a config in a folder, from the newest checkpoint there that verifies, else from the start.

    On the same mesh and process layout a resumed run ends with the bits of an uninterrupted one.

    Args:
      folder: of this run alone; gets config.json, checkpoints, metrics.jsonl, tensorboard and, at the end, record.json.
      rule: acts on the state after the optimiser, in place of what `config.method` names.
      name: of the record and the progress line; default the folder's.
      runs: the outer loop of a comparison, for its ETA.
      on_step: called with (step, metrics) once the metrics of a step are known.

    Raises:
      ConfigError, DataError, RunError, CheckpointError: what is wrong, before anything is compiled or overwritten.
      RunError: `max_skips` steps in a row were not finite; names step, quantity, parameter and the checkpoint to use.
      Interrupted: SIGTERM; every step taken was saved.
    """
    # ---- Config: nothing is read, written or compiled before it is valid ------------------------------------------
    began = time.perf_counter()
    task = validate(config)
    refuse_rule(config, rule_for(config, task.table, rule))  # which refuses two of them
    ahead = {switch.step: switch for switch in switches(config)}
    run = identity(config, rule)
    finished = workdir.claim(folder, run)
    if finished:
        log.warning("%s: this run has finished; its record is returned (remove the folder to run again)", folder)
        return Record.read(Path(folder) / workdir.RECORD)
    name = name or Path(folder).name
    source = task.load()
    mesh = make_mesh(config.mesh.to_dict())
    workdir.occupy(folder, run)

    with contextlib.ExitStack() as stack:
        stop_asked = stack.enter_context(listening_for_sigterm())
        stack.enter_context(on_mesh(mesh))
        checkpoints = stack.enter_context(
            Checkpointer(str(folder), keep=config.checkpoint.keep, every=config.checkpoint.every)
        )

        # ---- Model: from the checkpoint's site table if there is one, for rules describe step 0 only ---------------
        found = checkpoints.latest()
        if found is not None:
            if found.extra["data_hash"] != source.sha256:
                raise RunError(
                    f"the data changed since {folder} was begun: hash {found.extra['data_hash'][:12]} there, "
                    f"{source.sha256[:12]} now ({source.description}); restore it, or give another folder"
                )
        restored = checkpoints.restore(partial(stored_plan, config, task, rule, mesh)) if found is not None else None
        if restored is not None:
            task = stored_task(config, task, restored.extra)
        active, rule = as_ended(config, rule, restored.extra) if restored else (config, rule)
        rule = rule_for(active, task.table, rule)

        # ---- Optimiser and state: every leaf on the mesh -----------------------------------------------------------
        tx, schedule = optimizer_for(active, task)
        template = plan_state(task, tx, rule, mesh)
        for step, reason in restored.skipped if restored else ():
            log.warning("%s: checkpoint of step %d skipped: %s", folder, step, reason)
        state = restored.state if restored else create_state(task, tx, rule, template, config.seed)
        start = restored.step if restored else 0
        began -= restored.extra["seconds"] if restored else 0
        if restored:
            log.info("%s: resumed from step %d", folder, start)
        extra = {
            "config": json.loads(config.to_json()),
            **dump_tables(task),
            "switches": restored.extra["switches"] if restored else [],
            "method_report": restored.extra.get("method_report", {}) if restored else {},
            "data_hash": source.sha256,
            "versions": versions(),
            "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        }

        # ---- Compile -----------------------------------------------------------------------------------------------
        peak = peak_flops()
        progress = stack.enter_context(
            ProgressLine(
                name,
                config.steps,
                start=start,
                per_step=task.units,
                unit=f"{task.unit}s",
                step_flops=task.step_flops(executed=True) * task.units,
                peak_flops=peak * mesh.devices.size if peak else None,
                runs=runs,
            )
        )
        step_fn = compile_step(task, step_for(active, task, tx, rule, schedule), template, mesh)
        eval_step = make_eval_step(task, mesh)

        if stop_asked(start):
            raise Interrupted(
                f"{folder}: stopped by SIGTERM before step {start + 1}; nothing is lost, run again to go on"
            )

        # ---- Loop: step n is dispatched before the metrics of step n-1 are read ------------------------------------
        rows = local_rows(mesh, config.batch)
        writer = stack.enter_context(MetricWriter(folder, start if restored else None))
        trace = stack.enter_context(contextlib.ExitStack())
        first_profiled, last_profiled = profile_steps(config) if config.profile else (-1, -1)
        paths, seconds, last, done_at = leaf_paths(template.params), [], {}, None
        held_out: dict[str, float] = {}

        def process(step: int, pending: Any) -> None:
            """Log the metrics of a step, and stop a run that has gone astray."""
            nonlocal last, done_at
            row = jax.device_get(pending)
            now = time.perf_counter()
            if done_at is not None:
                seconds.append(now - done_at)
            done_at = now
            bad = row.pop("bad")
            last = {key: float(value) for key, value in row.items()}
            if step % config.log_every == 0 or step == config.steps or last["skipped"]:
                writer.write(step, last)
            progress.tick(step, {"loss": last["loss"]})
            if on_step is not None:
                on_step(step, last)
            if last["skipped"]:
                what = "loss" if not math.isfinite(last["loss"]) else "gradient or update"
                where = next((path for path, wrong in zip(paths, bad) if wrong), "no parameter")
                log.warning("step %d skipped: non-finite %s, first at %s", step, what, where)
                if last["skipped"] >= config.max_skips:
                    checkpoints.wait()
                    saved = checkpoints.steps()
                    raise RunError(
                        f"stopped at step {step}: {int(last['skipped'])} steps in a row (max_skips) had a non-finite "
                        f"{what}, first at {where}; last checkpoint: "
                        f"{checkpoints.folder / str(saved[-1]) if saved else 'none yet'}. A lower optim.lr, in another folder, may help."
                    )

        fetched = lambda step: shard_batch(mesh, source.batch(step, rows), config.batch)
        calibration = lambda: (fetched(step) for step in range(config.eval.recalibrate))
        pending = None
        for step in range(start + 1, config.steps + 1):
            if step - 1 == first_profiled:
                trace.enter_context(jax.profiler.trace(str(Path(folder) / "profile")))
            batch = fetched(step - 1)

            # ---- Switch: other structures from this step on; checkpoints of the step before know nothing of it -----
            if step - 1 in ahead:
                if pending is not None:
                    process(*pending)
                    pending = None
                with progress.beside():
                    after = carried_out(config, ahead[step - 1], task, mesh, state, batch)
                    task, template, state = after.task, after.template, after.state
                    step_fn = compile_step(task, step_for(config, task, after.tx, None, after.schedule), template, mesh)
                row = after.row | {"step_seconds": _median(seconds)}
                log.info("%s: %s", name, line(row))
                extra = noted(extra, task, row)
                eval_step, paths, seconds, done_at = make_eval_step(task, mesh), leaf_paths(template.params), [], None
                progress.step_flops = task.step_flops(executed=True) * task.units

            state, metrics = step_fn(state, batch)
            if pending is not None:
                process(*pending)
            pending = (step, metrics)
            if step == last_profiled:
                jax.block_until_ready(state)
                trace.close()

            # ---- Evaluation and checkpoints; the metrics of a step are on file before the step is saved ------------
            final, leaving = step == config.steps, stop_asked(step)
            evaluates = final or (config.eval.every and step % config.eval.every == 0)
            saves = final or leaving or checkpoints.due(step)
            if evaluates or saves:
                process(*pending)
                pending = None
                with progress.beside():
                    if final and config.eval.recalibrate:
                        state = recalibrated(task, state, calibration())
                    if evaluates:
                        held_out = evaluate(eval_step, state, source, mesh)
                        writer.write(step, {f"heldout_{key}": value for key, value in held_out.items()})
                        log.info("%s: step %d held-out %s %.4f", name, step, task.metric, held_out[task.metric])

                    if final:
                        extra["method_report"] = report_of(config, task.table, variables_of(state))

                    # ---- Switch at the end: what was trained, projected; the checkpoint and the record have it ------
                    if final and step in ahead:
                        after = carried_out(config, ahead[step], task, mesh, state, batch)
                        task, state = after.task, after.state
                        row = after.row | {"step_seconds": _median(seconds)}
                        log.info("%s: %s", name, line(row))
                        row["heldout_before"], eval_step = held_out, make_eval_step(task, mesh)
                        extra = noted(extra, task, row)
                        if config.eval.recalibrate:
                            state = recalibrated(task, state, calibration())
                        held_out = evaluate(eval_step, state, source, mesh)
                        log.info("%s: after it held-out %s %.4f", name, task.metric, held_out[task.metric])
                    if saves:
                        checkpoints.save(step, state, extra | {"seconds": time.perf_counter() - began})
                done_at = None
            if leaving and not final:
                checkpoints.wait()
                raise Interrupted(f"{folder}: stopped by SIGTERM after step {step}, which is saved; run again to go on")

        # ---- Record ------------------------------------------------------------------------------------------------
        checkpoints.wait()
        if not held_out:
            held_out = evaluate(eval_step, state, source, mesh)
        record = Record.create(
            name=name,
            kind="train",
            config=json.loads(config.to_json()),
            structures={path: site.bound.structure for path, site in task.table.items()},
            seed=config.seed,
            data_hash=source.sha256,
            seconds=time.perf_counter() - began,
            metrics={
                "metric": task.metric,
                "heldout": held_out,
                "train": last,
                "reference": dict(source.reference),
                "steps": config.steps,
                "method": str(method_of(config) or ""),
                "method_report": extra["method_report"],
                "unit": task.unit,
                "units_per_step": task.units,
                "step_seconds": _median(seconds),
                "step_bytes": describe(step_fn, mesh).bytes,
                "params": task.params,
                "site_params": sum(site.bound.params for site in task.table.values()),
                "dense_site_params": sum(site.bound.dense_params for site in task.table.values()),
                "flops_per_unit": task.flops(),
                "skipped": int(state.skips[1]),
                "switches": extra["switches"],
                "data": source.description,
            },
        )
        if jax.process_index() == 0:
            record.write(Path(folder) / workdir.RECORD)
    return record


def _median(seconds: list[float]) -> float | None:
    return statistics.median(seconds) if seconds else None
