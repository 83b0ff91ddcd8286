"""slurm/run.sh against a real Slurm, with a toy in the place of the trainer: what becomes of a job whatever happens."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import HERE, ROOT, Job, checkout, losses, python_first

pytestmark = pytest.mark.slurm
TOY = HERE / "toy.py"
STEPS = 12


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return checkout(tmp_path / "megamask", TOY)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The loss curve of a run to which nothing happens."""
    job = Job(cluster, checkout(tmp_path_factory.mktemp("undisturbed") / "megamask", TOY), "--steps", STEPS)
    job.finishes()
    values = losses(job.run)
    assert [line["step"] for line in values] == list(range(1, STEPS + 1))
    return values


def told(job: Job, restart: int = 0) -> dict[str, dict]:
    """The rank, size and address that each rank received."""
    return {name: json.loads(text.splitlines()[0]) for name, text in job.ranks(restart).items()}


def test_the_header_alone_starts_sixteen_ranks(slurm: Cluster, root: Path) -> None:
    job = Job(slurm, root, "--steps", 3, size=[])
    job.finishes()
    environments = told(job)
    assert set(environments) == {f"node{1 + rank // 8}-rank{rank}" for rank in range(16)}
    for rank in range(16):
        its = environments[f"node{1 + rank // 8}-rank{rank}"]
        assert (its["rank"], its["world"], its["SLURM_LOCALID"]) == (rank, 16, str(rank % 8))
        assert its["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
        assert (its["MASTER_ADDR"], its["HF_HUB_OFFLINE"]) == ("node1", "1")
    assert len({its["MASTER_PORT"] for its in environments.values()}) == 1


def test_a_signal_reaches_ranks_that_still_import(
    slurm: Cluster, root: Path, tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    job = Job(slurm, root, "--steps", STEPS, HOLD="5", DEAF=str(tmp_path / "imported"))
    slurm.until(lambda: len(list(job.run.glob("started-*"))) == 4, "ranks", job.everything)
    job.signal()
    job.says("asking the ranks")
    (tmp_path / "imported").touch()
    job.requeued()
    job.finishes()
    assert all(its["ignored"] for its in told(job).values())  # else the signal would have killed them
    assert all("after step 6" in text for text in job.ranks(0).values())
    # when the first has ended with 75, srun may be faster with its TERM to the others than with the next USR1
    assert any("stopped by SIGUSR1" in text for text in job.ranks(0).values())
    assert losses(job.run) == undisturbed


def test_a_signal_during_the_check_starts_no_ranks(slurm: Cluster, root: Path, tmp_path: Path) -> None:
    check = f"touch {tmp_path}/checked; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done"
    job = Job(slurm, root, "--steps", STEPS, MEGAMASK_CHECK=check)
    slurm.until((tmp_path / "checked").exists, "the check", job.everything)
    job.signal()
    (tmp_path / "go").touch()
    job.requeued()
    job.finishes()
    assert not job.ranks(0)


def test_a_failed_rank_is_retried(slurm: Cluster, root: Path, undisturbed: list[dict[str, float]]) -> None:
    job = Job(slurm, root, "--steps", STEPS, "--every", 4, FAIL="7")
    job.requeued()
    job.finishes()
    assert "boom" in job.text()
    assert "node2: task 3: Exited with exit code 9" in job.text()
    assert losses(job.run) == undisturbed


BOUND = 'count_failure || exit "$CODE"'


@pytest.mark.parametrize("bounded", [True, False])
def test_failures_without_progress_are_bounded(slurm: Cluster, tmp_path: Path, bounded: bool) -> None:
    script = (ROOT / "slurm" / "run.sh").read_text()
    assert script.count(BOUND) == 1
    root = checkout(tmp_path / "megamask", TOY, script if bounded else script.replace(BOUND, "count_failure"))
    job = Job(slurm, root, ENDS="6", MEGAMASK_RETRIES="2")
    job.requeued()
    if bounded:
        job.ends("FAILED")
        assert slurm.job(job.number)["ExitCode"] == "6:0"
        assert slurm.job(job.number)["Restarts"] == "1"
    else:  # what the bound is for
        job.requeued()


def test_a_wrong_flag_ends_the_job_at_once(slurm: Cluster, root: Path) -> None:
    job = Job(slurm, root, "--step", "x")
    job.ends("FAILED")
    assert slurm.job(job.number)["ExitCode"] == "2:0"
    assert slurm.job(job.number)["Restarts"] == "0"
    assert "invalid int value: 'x'" in job.text()


def test_an_error_that_the_doctor_finds_starts_no_rank(slurm: Cluster, root: Path) -> None:
    (root / "megamask" / "__init__.py").touch()
    (root / "megamask" / "__main__.py").write_text(
        "import os, sys\nprint('ranks', os.environ['WORLD_SIZE'], *sys.argv[1:])\nsys.exit(2)\n"
    )
    job = Job(slurm, root, "--steps", STEPS, MEGAMASK_DOCTOR="1")
    job.ends("FAILED")
    assert slurm.job(job.number)["ExitCode"] == "2:0"
    assert f"ranks 4 doctor --steps {STEPS} --output {job.run} --gpus 4 --nodes 2" in job.text()
    assert job.ranks() == {}


def test_without_its_trap_a_signal_ends_the_job(slurm: Cluster, tmp_path: Path) -> None:
    trap = "trap on_usr1 USR1\n"
    script = (ROOT / "slurm" / "run.sh").read_text()
    assert script.count(trap) == 1
    job = Job(slurm, checkout(tmp_path / "megamask", TOY, script.replace(trap, "")), "--steps", STEPS, HOLD="5")
    job.held(5)
    job.signal()
    with pytest.raises(AssertionError, match="JobState"):
        job.requeued()


def test_a_requeue_without_a_task_number_affects_the_array(slurm: Cluster, tmp_path: Path) -> None:
    own = "JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    script = (ROOT / "slurm" / "run.sh").read_text()
    assert script.count(own) == 1
    root = checkout(tmp_path / "megamask", TOY, script.replace(own, "JOB=$SLURM_ARRAY_JOB_ID"))
    array = Job(slurm, root, "--steps", STEPS, "--output", "run-%a", options=("--array=1-2",), HOLD="5")
    one, two = array.task(1), array.task(2)
    one.held(5)
    two.held(5)
    one.signal()
    two.requeued()


def test_bad_nodes_accumulate_until_too_few_are_left(slurm: Cluster, root: Path) -> None:
    job = Job(slurm, root, options=("--nodes=1", "--exclude=node[3-4]"), MEGAMASK_CHECK="false", MEGAMASK_RETRIES="2")
    job.requeued()
    job.ends("FAILED")
    assert "Submit again with --exclude=node2,node1,node[3-4]." in job.text()


def test_a_chain_continues_and_its_last_jobs_do_nothing(
    slurm: Cluster, root: Path, undisturbed: list[dict[str, float]]
) -> None:
    chain = ("--dependency=singleton", "--job-name=chain", "--no-requeue")
    arguments = ("--steps", STEPS, "--output", "runs/chain")
    first, second, third = (Job(slurm, root, *arguments, options=chain, HOLD="5") for _ in range(3))
    first.held(5)
    assert slurm.state(second.number) == "PENDING"
    first.signal()
    first.ends("FAILED")  # it may not be requeued, and says so
    assert "Submit it again with --output" in first.text()
    second.finishes()
    third.ends()
    assert not third.ranks()
    assert "nothing to do" in third.text()
    assert losses(first.run) == undisturbed


@pytest.mark.parametrize("name", ["a b", "$(touch pwned)", "a;touch pwned", "a/b", "'", "x" * 65, "é"])
def test_a_job_name_cannot_inject_shell_code(root: Path, name: str) -> None:
    command = ["bash", "-c", f'. {root}/slurm/job.sh; check_name "$1"; touch passed', "name", name]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2
    assert "`--job-name` must be" in done.stderr
    assert not (root / "pwned").exists()
    assert not (root / "passed").exists()


def test_names_and_flags_stay_single_words(slurm: Cluster, root: Path) -> None:
    bad = Job(slurm, root, options=("--job-name=$(touch pwned)",))
    bad.ends("FAILED")
    assert "`--job-name` must be" in bad.text()
    assert not (root / "runs").exists()
    good = Job(slurm, root, "--steps", 3, "--output", "runs/$(touch pwned) a", options=("--job-name=a.B-1_",))
    good.finishes()
    assert not list(root.rglob("pwned"))


def test_apptainer_gets_the_folders_and_the_ranks(slurm: Cluster, root: Path, tmp_path: Path) -> None:
    stand_in = tmp_path / "bin" / "apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\necho "$@" > $TOLD\nwhile [[ $1 != *.sif ]]; do shift; done; shift; exec "$@"\n')
    stand_in.chmod(0o755)
    more = {"MEGAMASK_CONTAINER": "apptainer:/images/torch.sif", "MEGAMASK_MOUNTS": "/text:/text"}
    job = Job(slurm, root, "--steps", 3, PATH=python_first(stand_in.parent), TOLD=str(tmp_path / "told"), **more)
    job.finishes()
    binds = f"--bind {root}:{root},{job.run}:{job.run},/text:/text"
    assert f"exec --nv --pwd {root} {binds} /images/torch.sif bash -c" in (tmp_path / "told").read_text()


def test_pyxis_gets_the_folders(slurm: Cluster, root: Path, tmp_path: Path) -> None:
    """Without pyxis srun knows no such options, so a stand-in for srun takes them away."""
    stand_in = tmp_path / "bin" / "srun"
    stand_in.parent.mkdir()
    stand_in.write_text(
        '#!/bin/bash\nfor word; do case $word in --container-*) echo "$word" >> $TOLD ;; *) kept+=("$word") ;; esac; '
        'done\nexec /usr/bin/srun "${kept[@]}"\n'
    )
    stand_in.chmod(0o755)
    more = {"MEGAMASK_CONTAINER": "pyxis:nvcr.io#nvidia/pytorch:25.01", "TOLD": str(tmp_path / "told")}
    job = Job(slurm, root, "--steps", 3, PATH=python_first(stand_in.parent), **more)
    job.finishes()
    assert (tmp_path / "told").read_text().splitlines() == [
        "--container-image=nvcr.io#nvidia/pytorch:25.01",
        f"--container-workdir={root}",
        f"--container-mounts={root}:{root},{job.run}:{job.run}",
    ]


def test_a_setup_file_takes_precedence(slurm: Cluster, root: Path, tmp_path: Path) -> None:
    setup = tmp_path / "setup.sh"
    setup.write_text(f'export HF_HUB_OFFLINE=no$UNSET\nmodule() {{ echo "$@" > {tmp_path}/loaded; }}\nmodule load x\n')
    job = Job(slurm, root, "--steps", 3, MEGAMASK_SETUP=str(setup))
    job.finishes()
    assert (tmp_path / "loaded").read_text() == "load x\n"
    assert {its["HF_HUB_OFFLINE"] for its in told(job).values()} == {"no"}


SAY = "import sys\nprint('told', *sys.argv[1:])\n"


def test_text_is_prepared_on_one_node(slurm: Cluster, root: Path) -> None:
    (root / "tools").mkdir()
    (root / "tools" / "prepare_data.py").write_text(SAY)
    arguments = ("--input", "my text", "--output", "shards")
    job = Job(slurm, root, *arguments, size=["--cpus-per-task=3"], script="prepare.sh")
    job.ends()
    assert job.text() == "told --input my text --output shards --workers 3\n"
    job = Job(slurm, root, "--input", "text", size=[], script="prepare.sh")
    job.ends("FAILED")
    assert "`--output` must name the folder of the shards." in job.text()


def test_every_run_of_a_study_is_a_task_of_an_array(slurm: Cluster, root: Path) -> None:
    one = ["--gpus-per-node=1", "--cpus-per-task=1"]
    (root / "tools").mkdir()
    (root / "tools" / "study.py").write_text(SAY)
    options = ("--array=0-2", f"--output={root}/%a.out")
    Job(slurm, root, "plan.toml", "--output", "my study", size=one, options=options, script="study.sh")
    slurm.until(lambda: not slurm.run("squeue", "-h").stdout, "the end", lambda: slurm.run("squeue").stdout)
    last_lines = [(root / f"{task}.out").read_text().splitlines()[-1] for task in range(3)]
    assert last_lines == [f"told plan.toml --output my study --only {task} --jobs 1" for task in range(3)]
    assert (root / "my study").is_dir()
    job = Job(slurm, root, "plan.toml", size=one, options=("--array=0",), script="study.sh")
    job.ends("FAILED")
    assert "`--output` must name the folder of the study" in job.text()


def test_every_glue_task_runs_with_every_seed(slurm: Cluster, root: Path) -> None:
    one = ["--gpus-per-node=1", "--cpus-per-task=1"]
    (root / "tools").mkdir()
    (root / "tools" / "evaluate.py").write_text(SAY)
    env = {"MEGAMASK_TASKS": "rte cola", "MEGAMASK_SEEDS": "3 4 5"}
    options = ("--array=0-6", f"--output={root}/%a.out")
    Job(slurm, root, "--model", "m", size=one, options=options, script="glue.sh", **env)
    logs = [root / f"{task}.out" for task in range(7)]
    slurm.until(lambda: not slurm.run("squeue", "-h").stdout, "the end", lambda: slurm.run("squeue").stdout)
    last_lines = [log.read_text().splitlines()[-1] for log in logs]
    runs = [(task, seed) for task in ("rte", "cola") for seed in (3, 4, 5)]
    assert last_lines[:6] == [f"told --tasks {task} --first-seed {seed} --model m" for task, seed in runs]
    assert "`--array` must lie in 0-5, 2 tasks with 3 seeds, but is 6." in last_lines[6]
