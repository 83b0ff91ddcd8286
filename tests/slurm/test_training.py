"""slurm/run.sh with the trainer itself on two nodes: whatever happens to a run, its losses are bit for bit the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, losses
from tests.slurm.story import DEEDS, Story

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def story(cluster: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    story = Story(cluster, data, tmp_path_factory.mktemp("story"), DEEDS)
    try:
        story.happens()
        yield story
    finally:
        cluster.clean()


def nodes(job: Job, restart: int = 0) -> list[str]:
    """Where the ranks of a launch ran, by rank."""
    where = {int(name.split("-rank")[1]): name.split("-rank")[0] for name in job.ranks(restart)}
    return [where[rank] for rank in sorted(where)]


def told(story: Story, deed: str) -> str:
    """What the log said when ``deed`` was done."""
    return story.told[story.deeds.index(deed)]


def kept(story: Story, deed: str) -> int:
    """The newest checkpoint when ``deed`` was done."""
    return story.held[story.deeds.index(deed)] - 1


def test_two_nodes_and_four_ranks_train_to_the_end(story: Story) -> None:
    where = nodes(story.twin)
    assert len(where) == 4
    assert where[0] == where[1] != where[2] == where[3]
    assert any("on 4 x cpu" in text for text in story.twin.ranks().values())
    assert len(list(story.twin.run.glob(f"checkpoints/step-{story.steps}/rank-*"))) == 4


def test_losses_are_the_same_whatever_happens(story: Story) -> None:
    curve = losses(story.twin.run)
    steps = {line["train/loss"]: line["step"] for line in curve if "train/loss" in line}
    assert list(steps.values()) == [*range(1, story.steps + 1)]  # no two alike: one left out or mixed up would show
    assert losses(story.job.run) == curve


@pytest.mark.parametrize("deed", ["limit", "signal", "preemption"])
def test_a_job_that_is_stopped_saves_and_requeues_itself(story: Story, deed: str) -> None:
    assert "got USR1: asking the ranks to save and stop" in told(story, deed)
    saved = kept(story, deed) + 2  # it had taken one step since, and takes the one before which it waited
    assert f"ranks ended with 75 after USR1, newest checkpoint {saved}\n" in told(story, deed)
    assert f"requeueing job {story.links[0].number}\n" in told(story, deed)


def test_a_lost_rank_ends_the_others_and_the_job_requeues(story: Story) -> None:
    assert "Killed" in told(story, "failure")
    assert f"newest checkpoint {kept(story, 'failure')}\n" in told(story, "failure")
    assert f"requeueing job {story.links[0].number}\n" in told(story, "failure")


def test_a_spare_node_replaces_one_that_fails_the_check(story: Story) -> None:
    first = story.links[0]
    assert "failed the check: node1 " in first.text()
    assert f"job {first.number}, restart 0, on node2 node3, node2:" in first.text()
    assert nodes(first) == ["node2", "node2", "node3", "node3"]


def test_a_cancelled_job_stops_and_the_chain_continues(story: Story) -> None:
    cancelled, following, last = story.links
    assert f"requeueing job {cancelled.number}\n" not in told(story, "cancel")
    assert story.slurm.state(cancelled.number) == "CANCELLED"
    begins = re.search(r"resuming after step (\d+) ", "".join(following.ranks(1).values()))
    assert begins
    # with the last step saved, if there was time for that
    assert int(begins[1]) in (kept(story, "cancel"), kept(story, "cancel") + 2)
    assert "nothing to do: the run is finished" in last.text()
    assert not last.ranks()


def test_a_bad_node_is_excluded_from_the_requeued_job(story: Story) -> None:
    following = story.links[1]
    bad = told(story, "cancel").split("failed the check: ")[1].split()[0]
    assert not following.ranks(0)
    assert story.slurm.job(following.number)["ExcNodeList"] == bad
    assert bad not in nodes(following, 1)


def test_a_crashed_node_is_replaced(story: Story) -> None:
    before, after = nodes(story.links[1], 1), nodes(story.links[1], 2)
    assert len(after) == 4
    assert before[0] not in after


def test_each_array_task_is_its_own_run(story: Story) -> None:
    twin = story.slurm.job(story.twin.number)
    assert twin["ArrayJobId"] == story.slurm.job(story.links[0].number)["ArrayJobId"]
    assert (twin["JobState"], twin["Restarts"]) == ("COMPLETED", "0")
    assert f"finished: {story.twin.run}\n" in story.twin.text()
