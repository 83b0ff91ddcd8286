"""Plans: read, expanded, and refused with all problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.errors import ConfigError
from megamask.study.plan import amount_of
from megamask.study.plan_file import find_plan, plan_problems, read_plan, shipped_plans
from megamask.study.settings import StudyConfig
from megamask.study.study import run_study

PLAN = """
name = "p"
question = "q"
seeds = [1, 2]
budgets = ["tokens=1e5"]
[[arm]]
name = "random"
role = "baseline"
recipe = "random-tiny"
[[arm]]
name = "probe"
recipe = "entropy-self-probe-tiny"
set = { masking.entropy.temperature = 0.5 }
[[evaluation]]
name = "frozen"
frozen = true
tasks = ["sst2"]
"""


@pytest.fixture
def write(tmp_path: Path):
    """A plan with this text added, as a file."""

    def write(more: str = "", text: str = PLAN) -> Path:
        path = tmp_path / "plan.toml"
        path.write_text(text + more)
        return path

    return write


def test_a_folder_does_not_hide_a_shipped_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first").mkdir()  # what `--output first` makes
    assert find_plan("first").name == "first"


@pytest.mark.parametrize("name", shipped_plans())
def test_shipped_plans_have_no_problem(name: str) -> None:
    plan = find_plan(name)
    assert plan.name == name
    assert plan_problems(plan) == []


def test_settings_may_be_dotted_or_tables(write) -> None:
    assert read_plan(write()).arm[1].set == {"masking.entropy.temperature": 0.5}


def test_an_axis_adds_an_arm_for_each_value(write) -> None:
    more = '[[axis]]\nsetting = "masking.ratio.start"\nvalues = [0.3, 0.5]\narms = ["random", "probe"]\n'
    plan = read_plan(write(more))
    added = plan.arms[2:]
    assert [arm.name for arm in added] == [
        f"{arm}@masking.ratio.start={rate}" for arm in ("random", "probe") for rate in (0.3, 0.5)
    ]
    assert added[3].set == {"masking.entropy.temperature": 0.5, "masking.ratio.start": 0.5}
    assert all("masking.ratio.start" in arm.unpaired for arm in added)


def test_an_axis_over_recipes_changes_the_recipe(write) -> None:
    plan = read_plan(write('[[axis]]\nsetting = "recipe"\nvalues = ["frequency-tiny"]\n'))
    assert (plan.arms[2].recipe, plan.arms[2].role) == ("frequency-tiny", "control")


def test_an_axis_over_an_evaluation_repeats_it(write) -> None:
    plan = read_plan(write('[[axis]]\nsetting = "evaluation.frozen"\nvalues = [true, false]\n'))
    assert [each.set["frozen"] for each in plan.evaluations] == [True, False]
    assert len(plan.arms) == 2


def test_every_problem_of_the_form_is_named(write) -> None:
    with pytest.raises(ConfigError) as error:
        read_plan(write("colour = 1\n[[arm]]\nname = 3\nrecepe = 'random-tiny'\n"))
    assert len(error.value.problems) >= 3
    text = str(error.value)
    assert "recepe" in text and "`recipe`" in text and "arm.2.name" in text


def test_every_problem_of_the_content_is_named(write) -> None:
    bad = (
        PLAN.replace('budgets = ["tokens=1e5"]', 'budgets = ["epochs=3", "tokens=-1"]')
        .replace("seeds = [1, 2]", "seeds = [1, 1]")
        .replace('"sst2"', '"sst3"')
        .replace("temperature = 0.5 }", 'temperature = 0.5, seed = 3 }\nteacher = "probe"')
        .replace("frozen = true", "freeze = true")
    )
    with pytest.raises(ConfigError) as error:
        read_plan(write('[[axis]]\nsetting = "seed"\nvalues = []\narms = ["rand"]\n', bad))
    text = str(error.value)
    for word in ("epochs=3", "tokens=-1", "`seeds`", "sst3", "`seed`", "teacher", "freeze", "rand", "values"):
        assert word in text


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"tokens=1e5"', '"tokens=1e5", "tokens=1e5"', "each budget once"),
        ("[1, 2]", "[1, 4611686018427387904]", "2**62"),
        ("[1, 2]", "[1, true]", "`seeds.1`"),
        ("frozen = true", 'frozen = true\nmodel = "x"', "`evaluation frozen` names `model`, which the study decides"),
        ('role = "baseline"', 'role = "baseline"\nseed_offset = 1', "other seeds than those of the plan, which have 2"),
        ('question = "q"', 'question = "q"\nmean_variant = "last"', "must be '', 'first' or 'mean', but is 'last'"),
    ],
)
def test_what_would_repeat_a_run_or_fail_later_is_refused(old: str, new: str, words: str, write) -> None:
    with pytest.raises(ConfigError) as error:
        read_plan(write(text=PLAN.replace(old, new)))
    assert words in str(error.value)


@pytest.mark.parametrize("tasks", ['"sst2"', "3", '[["sst2"], 3]'])
def test_tasks_that_are_not_a_list_of_names_are_one_problem(tasks: str, write) -> None:
    text = PLAN.replace('tasks = ["sst2"]', f"tasks = {tasks}").replace("seeds =", 'mean_tasks = ["sst2"]\nseeds =')
    with pytest.raises(ConfigError) as error:
        read_plan(write(text=text))
    assert {each.partition("` ")[0] for each in error.value.problems} <= {
        "evaluation frozen: `tasks", "evaluation frozen: `tasks.0", "evaluation frozen: `tasks.1",
        "`mean_tasks",
    }  # fmt: skip


def test_the_axes_of_a_plan_are_checked(write) -> None:
    with pytest.raises(ConfigError) as error:
        read_plan(
            write(
                '[[axis]]\nsetting = "steps"\nvalues = [3]\n[[axis]]\nsetting = "recipe"\nvalues = [3]\n'
                '[[axis]]\nsetting = "evaluation.tasks"\nvalues = [3]\n'
            )
        )
    for words in (
        "`axis` names the setting `steps`",
        "`axis recipe: values` must be names of",
        "`tasks` must be a list",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("budget", "amount"),
    [("tokens=1e6", ("tokens", 1e6)), ("time=90m", ("time", 5400)), ("flops=2e14", ("flops", 2e14))],
)
def test_budgets(budget: str, amount: tuple[str, float]) -> None:
    assert amount_of(budget) == amount


def test_a_plan_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="first"):
        find_plan("frist")
    with pytest.raises(ConfigError, match="megamask ships, name `first`"):
        find_plan("first.toml")


def test_missing_task_files_are_reported_with_the_problems_of_the_plan(write, tmp_path: Path) -> None:
    text = PLAN.replace("[1, 2]", "[1, 1]").replace('["sst2"]', '["sst2", "sst22"]')
    config = StudyConfig(plan=str(write(text=text)), tasks_data=tmp_path, output=tmp_path / "study")
    with pytest.raises(ConfigError) as error:
        run_study(config)
    for words in ("`seeds` must name different", "`sst22` is not known", "sst2: put "):
        assert words in str(error.value)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("content", ["name = ", "a = 1979-05-27", "[["])
def test_a_file_that_is_not_toml_is_refused_with_its_name(content: str, write) -> None:
    with pytest.raises(ConfigError, match=r"plan\.toml"):
        read_plan(write(text=content))
