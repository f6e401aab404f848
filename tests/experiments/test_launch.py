"""Launchers say what they would do: quoted commands, refused values, and what happens after a preemption."""

import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.launch import command_line, local, slurm, tpu_pod
from experiments.launch.command_line import LaunchError
from experiments.launch.pod import Pod

ROOT = Path(__file__).parents[2]
TRAIN = ["python", "-m", "experiments.train", "--config=configs/demo_lm.py:monarch(blocks=4)"]
POD = {
    "name": "llama",
    "project": "my-project",
    "zone": "us-east5-a",
    "accelerator": "v5p-16",
    "nfs": "10.0.0.2:/share",
}


def set_flags(monkeypatch, module, **values):
    module.flags.FLAGS.mark_as_parsed()
    for name, value in values.items():
        assert name in module.flags.FLAGS
        monkeypatch.setattr(module.flags.FLAGS[name], "value", value)
        module.flags.FLAGS[name].present = 1


def printed(monkeypatch, capsys, module, command, **values):
    set_flags(monkeypatch, module, dry_run=True, **values)
    assert module.launch(command) == 0
    return capsys.readouterr().out


def test_local_dry_run_tells_every_process_its_place(monkeypatch, capsys):
    lines = printed(monkeypatch, capsys, local, [*TRAIN, "--workdir=my runs/x"], processes=3, devices=2).splitlines()
    assert len(lines) == 3
    for i, line in enumerate(lines):
        words = shlex.split(line)
        assert words[5:] == [*TRAIN, "--workdir=my runs/x"]
        assert {"STRUCTMAT_PROCESSES=3", f"STRUCTMAT_PROCESS={i}", "JAX_NUM_CPU_DEVICES=2"} <= set(words[:5])


def test_slurm_script(monkeypatch, capsys, tmp_path):
    workdir = str(tmp_path / "it's one")
    values = {"nodes": 4, "tasks_per_node": 8, "gpus_per_task": 1, "partition": "gpu", "time": "1-12", "requeues": 3}
    text = printed(monkeypatch, capsys, slurm, [*TRAIN, f"--workdir={workdir}"], **values)
    for line in (
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-task=1",
        "--partition=gpu",
        "--time=1-12",
        "--requeue",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "#SBATCH --signal=TERM@120\n" in text and "account" not in text
    run = next(line for line in text.splitlines() if line.startswith("srun"))
    assert shlex.split(run)[2:] == [*TRAIN, f"--workdir={workdir}"]

    def end(code, done, restarts=0):
        """Exit code and requeues of the script with an srun that ends so."""
        (tmp_path / "it's one").mkdir(exist_ok=True)
        record = tmp_path / "it's one" / "record.json"
        record.write_text("") if done else record.unlink(missing_ok=True)
        fakes = f"srun() {{ return {code}; }}\nscontrol() {{ echo scontrol $*; }}\n"
        env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "PATH": "/usr/bin:/bin"}
        made = subprocess.run(["bash"], input=fakes + text, capture_output=True, text=True, env=env)
        assert not made.stderr
        return made.returncode, made.stdout

    again = "scontrol requeue 7\n"
    assert end(0, done=True) == (0, "")
    assert end(0, done=False) == (0, again) and end(75, done=False) == (75, again)
    assert end(2, done=False) == (2, "") and end(75, done=False, restarts=3) == (75, "")


def test_tpu_pod_dry_run(monkeypatch, capsys):
    command = [*TRAIN, "--workdir=/mnt/shared/my run"]
    text = printed(monkeypatch, capsys, tpu_pod, command, **POD, slices=2, spot=True)
    assert text.startswith("# 2 x v5p-16: 4 hosts")
    made = [shlex.split(line) for line in text.splitlines() if not line.startswith("#")]
    verbs = [words[4] if words[0] == "gcloud" else words[1] for words in made]
    assert verbs == ["create", "describe", "archive", "scp", "scp", "ssh", "ssh", "ssh", "ssh", "ssh", "delete"]
    assert {"--node-count=2", "--node-prefix=llama", "--spot", "--accelerator-type=v5p-16"} <= set(made[0])
    assert all({"--project=my-project", "--zone=us-east5-a"} <= set(words) for words in made if words[0] == "gcloud")
    assert made[5][5:7] == ["llama-0", "--worker=all"] and "10.0.0.2:/share /mnt/shared" in made[5][-1]
    remote = made[7][-1].removeprefix("--command=")
    assert shlex.split(remote)[-len(command) :] == command
    assert made[9][-1] == "--command=test -e '/mnt/shared/my run/record.json'"


@pytest.mark.parametrize(
    ("module", "values", "command", "said"),
    [
        (local, {"processes": 0}, ["x"], "--processes=0: must be in 1 .. 64"),
        (local, {"devices": 65}, ["x"], "--devices=65"),
        (slurm, {"time": "1 day; rm -rf ~"}, ["x", "--workdir=a"], "--time='1 day; rm -rf ~'"),
        (slurm, {"partition": "a b"}, ["x", "--workdir=a"], "--partition='a b'"),
        (slurm, {"nodes": 0}, ["x", "--workdir=a"], "--nodes=0"),
        (slurm, {}, ["x"], "no --workdir=DIR"),
        (tpu_pod, POD | {"name": None}, ["x"], "--name is needed, such as --name=llama"),
        (tpu_pod, POD | {"name": "x; reboot"}, ["x"], "--name='x; reboot'"),
        (tpu_pod, POD | {"zone": "mars"}, ["x"], "--zone='mars'"),
        (tpu_pod, POD | {"accelerator": "v5e-16"}, ["x"], "v5e is called v5litepod"),
        (tpu_pod, POD | {"accelerator": "v6-16"}, ["x"], "did you mean 'v6e'?"),
        (tpu_pod, POD | {"nfs": "nowhere"}, ["x"], "--nfs='nowhere'"),
        (tpu_pod, POD, ["x", "--workdir=/tmp/a"], "must be in the shared folder, such as /mnt/shared/llama"),
        (tpu_pod, POD | {"nfs": None}, ["x", "--workdir=/tmp/a"], "the 2 hosts of v5p-16 share no disk"),
        (tpu_pod, POD, ["x"], "no --workdir=DIR"),
    ],
)
def test_what_nothing_should_be_launched_with_is_refused(module, values, command, said, monkeypatch):
    set_flags(monkeypatch, module, dry_run=True, **values)
    with pytest.raises(LaunchError) as caught:
        module.launch(command)
    assert said in str(caught.value)


def test_options_of_a_command():
    assert command_line.option_of(["a", "--workdir=x", "--workdir", "y"], "workdir") == "y"
    assert command_line.option_of(["a", "--workdirs=x"], "workdir") is None
    assert command_line.split(["--a=1", "--", "b", "--", "c"]) == (["--a=1"], ["b", "--", "c"])
    with pytest.raises(LaunchError, match="give the command after --"):
        command_line.split(["--a=1", "b"])


class Cloud:
    """A gcloud that answers from a script: (state of the resource, exit code, record there, seconds) of each run."""

    def __init__(self, *runs, refuse=False):
        self.runs, self.log, self.state, self.done, self.refuse = list(runs), [], None, False, refuse
        self.now = 0.0

    def __call__(self, command):
        verb = " ".join(command[3:5])
        if verb.endswith("describe"):
            return (0, f"{self.state}\n") if self.state else (1, "")
        self.log.append(verb.split()[1] if command[0] == "gcloud" else "pack")
        if verb.endswith("create"):
            self.state = None if self.refuse else "ACTIVE"
            return int(self.refuse), ""
        if verb.endswith("delete"):
            self.state = None
        line = command[-1]
        if "test -e" in line:
            self.log[-1] = "done?"
            return int(not self.done), ""
        if "experiments.train" in line:
            self.log[-1] = "run"
            self.state, code, self.done, seconds = self.runs.pop(0)
            self.now += seconds
            return code, ""
        return 0, ""

    def drive(self, keep=False):
        pod = Pod("llama", "p", "z", "v5p-8", "r", (*TRAIN, "--workdir=/mnt/shared/a"))
        return tpu_pod.drive(pod, self, keep, wait=lambda s: None, say=lambda t: None, clock=lambda: self.now)


ONCE = ["pack", "scp", "ssh", "run", "done?"]


def test_a_preempted_slice_is_asked_for_anew_and_the_run_goes_on():
    cloud = Cloud(("SUSPENDED", 255, False, 50), ("ACTIVE", 0, False, 5000), ("ACTIVE", 0, True, 50))
    assert cloud.drive() == 0
    assert cloud.log == ["create", *ONCE, "delete", "create", *ONCE, *ONCE, "delete"]


def test_a_run_that_is_done_leaves_the_slice_only_if_asked():
    cloud = Cloud(("ACTIVE", 0, True, 50))
    cloud.state = "ACTIVE"
    assert cloud.drive(keep=True) == 0 and cloud.log == ONCE


@pytest.mark.parametrize("code", [0, 2])
def test_a_command_that_fails_on_a_healthy_slice_is_given_up(code):
    cloud = Cloud(*[("ACTIVE", code, False, 50)] * 3)
    with pytest.raises(LaunchError, match=r"failed 3 times on a healthy slice.*queued-resources delete llama"):
        cloud.drive()
    assert cloud.log == ["create", *ONCE * 3] and not cloud.runs


def test_a_refused_resource_is_said():
    with pytest.raises(LaunchError, match="was refused: gcloud compute tpus queued-resources create llama"):
        Cloud(refuse=True).drive()


def test_local_processes_are_prefixed_named_and_ended(monkeypatch):
    """Plain processes, no jax: one dies, the other does not leave."""
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, write_through=True))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, write_through=True))
    code = (
        "import os, signal, sys, time; i = os.environ['STRUCTMAT_PROCESS']; print('hello', i, flush=True)\n"
        "print('[Gloo] Rank 0 is connected to 1 peer ranks. Expected', file=sys.stderr, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL) if i == '1' else time.sleep(60)"
    )
    job = local.Job([sys.executable, "-c", code], 2, 1, grace=0.5)
    assert job.run() == 128 + 9
    assert sorted(out.getvalue().splitlines()) == [b"[0] hello 0", b"[1] hello 1"]
    said = err.getvalue().decode()
    assert "process 1 of 2 was killed by SIGKILL; 1 more have 0.5 s to leave" in said
    assert "process 0 did not leave and is killed" in said and "Gloo" not in said


@pytest.mark.parametrize(("grace", "wanted"), [(30, 128 + 9), (0.2, local.LOST)])
def test_a_survivor_that_ends_first_does_not_hide_the_process_it_lost(grace, wanted, capfd):
    code = (
        "import os, signal, sys, time; os.environ['STRUCTMAT_PROCESS'] == '0' and sys.exit(75)\n"
        "time.sleep(1.5); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert local.Job([sys.executable, "-c", code], 2, 1, grace=grace).run() == wanted
    assert "process 0 of 2 ended with exit code 75" in capfd.readouterr().err


def test_a_launcher_answers_mistakes_in_one_line():
    command = [sys.executable, "-m", "experiments.launch.slurm", "--tiem=1", "--", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "'tiem'" in done.stderr and "time" in done.stderr
