"""The runs of a plan: their order, their pairing, their steps, and commands that give the planned configuration."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megamask.config.cli import parse_command
from megamask.config.phases import run_phases
from megamask.config.pretrain_config import as_dict
from megamask.config.settings import PhaseConfig
from megamask.errors import ConfigError
from megamask.schedules import Schedule
from megamask.storage.dotted import flatten
from megamask.study import planned_runs
from megamask.study.plan import Axis, PlannedArm, StudyPlan
from megamask.study.plan_file import find_plan, read_plan, shipped_plans
from megamask.study.planned_cost import Texts, mean_step_flops, pack_flops
from megamask.study.planned_runs import PAIRED, as_flag, plan_runs, select_runs
from megamask.study.time_left import planned_tokens
from tests.unit.study.conftest import LENGTHS

ROOT = Path(__file__).parent.parent.parent.parent
STUDY = Path("/study")
UNITS = ("token", "span")


@pytest.mark.parametrize("name", shipped_plans())
def test_every_shipped_plan_can_be_run(name: str, text: Path) -> None:
    plan = find_plan(name)
    runs = plan_runs(plan, STUDY, text)
    assert len(runs) == len(plan.seeds) * len(plan.budgets) * len(plan.arms)


def test_the_plan_in_the_documentation_can_be_run(text: Path, tmp_path: Path) -> None:
    _, _, example = (ROOT / "docs" / "studies.md").read_text().partition("```toml\n")
    (tmp_path / "plan.toml").write_text(example.partition("```")[0])
    runs = plan_runs(read_plan(tmp_path / "plan.toml"), STUDY, text)
    assert len({run.arm.name for run in runs}) == 4


AXES = {
    "masking.ratio.start": ("random", [0.15, 0.3, 0.5]),
    "masking.entropy.strategy": ("entropy-self-probe", ["low", "middle", "both"]),
    "entropy.source": ("entropy-self-probe", ["frequency", "exact"]),
    "distill.weight.at": ("entropy-kd-after-init", [0.1, 0.4]),
    "objective.depth": ("three-ml", [1, 3]),
    "recipe": ("random", ["mrd-linear-tiny", "mrd-cosine-tiny"]),
}


@pytest.mark.parametrize("setting", AXES)
def test_axes_of_the_papers(setting: str, plan: StudyPlan, text: Path) -> None:
    name, values = AXES[setting]
    arm = PlannedArm(name, f"{name}-tiny", teacher="base" if "kd" in name else "")
    base = replace(plan.arm[0], name="base", set={"masking.ratio.start": 0.25})
    runs = plan_runs(replace(plan, arm=(base, arm), axis=(Axis(setting, tuple(values), (name,)),)), STUDY, text)
    assert len(runs) == len(plan.seeds) * (2 + len(values))
    assert len({run.settings for run in runs if run.arm.name != "base"}) >= len(values)


def test_an_axis_over_texts(plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(text, other)
    (other / "manifest.json").write_text((text / "manifest.json").read_text().replace("wiki.txt", "books.txt"))
    runs = plan_runs(replace(plan, axis=(Axis("data", (str(other),)),)), STUDY, text)
    assert runs[2].arm.name == "random@data=other"
    assert runs[2].config.data == other


def test_commands_give_the_planned_configuration(plan: StudyPlan, text: Path) -> None:
    arm = PlannedArm(
        "many",
        "entropy-self-probe-tiny",
        set={
            "masking.entropy.standardise": False,
            "masking.ratio.start": 0.3,
            "entropy.audit.every": None,
            "init_layers": None,
        },
    )
    for run in plan_runs(replace(plan, arm=(*plan.arm, arm)), STUDY, text):
        assert as_dict(parse_command(run.pretrain_arguments()).run) == as_dict(run.config)


def test_order_is_seed_by_seed_and_seeds_are_paired(plan: StudyPlan, text: Path) -> None:
    runs = plan_runs(replace(plan, budgets=("tokens=40960", "flops=1e12")), STUDY, text)
    assert [run.seed for run in runs] == [1] * 4 + [2] * 4
    assert [run.references for run in runs] == [True] + [False] * 7
    for first, second in zip(runs[::2], runs[1::2], strict=True):
        ours, theirs = (flatten(as_dict(run.config)) for run in (first, second))
        same = {name for name in ours if name.partition(".")[0] in (*PAIRED, "seed", "data")}
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


def test_settings_are_hashed_without_the_seed(plan: StudyPlan, text: Path) -> None:
    runs = plan_runs(plan, STUDY, text)
    assert runs[0].settings == runs[2].settings != runs[1].settings


def test_results_count_with_moved_text_and_after_a_setting_was_added(
    plan: StudyPlan, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(text, tmp_path / "elsewhere")
    here = [run.settings for run in plan_runs(plan, STUDY, text)]
    assert [run.settings for run in plan_runs(plan, STUDY, tmp_path / "elsewhere")] == here
    monkeypatch.setitem(planned_runs.ADDED, "masking.unit", "token")
    assert [run.settings for run in plan_runs(plan, STUDY, text)] != here  # as if it had not been there before
    monkeypatch.setitem(planned_runs.ADDED, "masking.unit", "word")
    assert [run.settings for run in plan_runs(plan, STUDY, text)] == here


@pytest.mark.parametrize("name", ["packs.tokens", "model.num_layers", "validation.packs"])
def test_settings_that_break_pairs_are_refused_unless_they_are_declared(name: str, plan: StudyPlan, text: Path) -> None:
    arm = PlannedArm("other", "random-tiny", set={name: 4096 if name == "packs.tokens" else 2})
    with pytest.raises(ConfigError, match=f"arm other: `{name}`.*not paired"):
        plan_runs(replace(plan, arm=(*plan.arm, arm)), STUDY, text)
    declared = replace(arm, unpaired=(name,))
    assert len(plan_runs(replace(plan, arm=(*plan.arm, declared)), STUDY, text)) == 6
    axis = Axis(name, (arm.set[name],))
    assert len(plan_runs(replace(plan, axis=(axis,)), STUDY, text)) == 6


def test_problems_of_all_arms_come_together(plan: StudyPlan, text: Path) -> None:
    arms = (
        PlannedArm("a", "randon-tiny", set={"masking.ratio.strt": 0.3}, unpaired=("pakcs", "model")),
        PlannedArm("b", "random-tiny", set={"masking.ratoi": 0.3}),
        PlannedArm("c", "random-tiny", set={"masking.ratio.start": 1.5}),
        PlannedArm("d", "random-tiny", set={"entropy.audit.every": 3}),
        PlannedArm("e", "entropy-kd-complete-tiny"),
    )
    with pytest.raises(ConfigError) as error:
        plan_runs(replace(plan, arm=(*plan.arm, *arms)), STUDY, text)
    for start, word in zip("abcde", ("random-tiny", "masking.ratio", "1.5", "audit", "teacher.path"), strict=True):
        assert any(each.startswith(f"arm {start}: ") and word in each for each in error.value.problems)
    of_a = [each for each in error.value.problems if each.startswith("arm a: ")]
    assert [each.split("`")[1] for each in of_a] == ["randon-tiny", "masking.ratio.strt", "pakcs"]


def test_an_arm_that_repeats_another_is_refused_unless_it_is_a_check(plan: StudyPlan, text: Path) -> None:
    rate = plan_runs(plan, STUDY, text)[0].config.masking.ratio.start
    same = PlannedArm("same", "random-tiny", set={"masking.ratio.start": rate})
    axis = Axis("masking.ratio.start", (rate,))
    for changed, name in (
        (replace(plan, arm=(*plan.arm, same)), "same"),
        (replace(plan, axis=(axis,)), f"random@masking.ratio.start={rate}"),
    ):
        with pytest.raises(ConfigError) as error:
            plan_runs(changed, STUDY, text)
        (problem,) = error.value.problems
        assert problem.startswith(f"arm {name}: its settings and seeds are those of the arm random")
    for other in (replace(same, role="check"), replace(same, seed_offset=9), replace(same, budget_share=0.5)):
        assert len(plan_runs(replace(plan, arm=(*plan.arm, other)), STUDY, text)) == 6


def test_a_cause_is_said_once_with_the_arms_that_it_concerns(plan: StudyPlan, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        plan_runs(plan, STUDY, tmp_path / "nowhere")
    (problem,) = error.value.problems
    assert problem.startswith(f"all 2 arms: `data`: {tmp_path / 'nowhere'} is not a folder")

    wrong = {"masking.ratoi": 0.3, "model.num_layers": 2}
    arms = [PlannedArm(f"{unit}s", "random-tiny", set={"model.num_layers": 2, "masking.unit": unit}) for unit in UNITS]
    with pytest.raises(ConfigError) as error:
        plan_runs(replace(plan, arm=(*plan.arm, *arms, PlannedArm("c", "random-tiny", set=wrong))), STUDY, text)
    starts = [problem.partition(" is ")[0] for problem in error.value.problems]
    assert starts == ["arm c: `masking.ratoi`", "arms tokens, spans: `model.num_layers`"]


def test_budgets_in_tokens_and_flops(plan: StudyPlan, text: Path) -> None:
    plan = replace(plan, budgets=("tokens=819200", "flops=1e13"))
    by_name = {run.name: run for run in plan_runs(plan, STUDY, text)}
    random, probe = (by_name[f"{arm}/tokens=819200/seed-1"] for arm in ("random", "probe"))
    assert random.config.steps == probe.config.steps == 819_200 / (2048 * 4)
    texts = Texts()
    shards, squares = texts.open(text), {128: texts.squares_per_token(text, 128)}
    for arm in ("random", "probe"):
        config = by_name[f"{arm}/flops=1e13/seed-1"].config
        flops = mean_step_flops(config, pack_flops(config, shards), squares)
        total = config.steps * (flops["student"] + flops["scoring"] + flops["teacher"])
        assert abs(total - 1e13) < total / config.steps + 0.02 * 1e13  # whole steps; the probe learns less often later
    steps = [by_name[f"{arm}/flops=1e13/seed-1"].config.steps for arm in ("random", "probe")]
    assert steps[0] > steps[1]


@pytest.mark.parametrize("budget", ["tokens=8191", "tokens=1e30", "flops=1", "flops=1e40"])
def test_a_budget_of_less_than_a_step_or_without_end_is_refused(plan: StudyPlan, text: Path, budget: str) -> None:
    with pytest.raises(ConfigError, match="must be worth 1 to 10,000,000 steps") as error:
        plan_runs(replace(plan, budgets=(budget,)), STUDY, text)
    assert all("`budgets` must be worth" in problem for problem in error.value.problems)
    assert all(run.config.steps == 1 for run in plan_runs(replace(plan, budgets=("tokens=8192",)), STUDY, text))


@pytest.fixture(scope="module")
def sources(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two folders of a mixture; the second is a copy of the first."""
    folder = tmp_path_factory.mktemp("sources")
    return [str(shutil.copytree(text, folder / name)) for name in ("wiki", "books")]


def test_a_mixture_is_a_text_and_an_arm_may_have_other_shares(plan: StudyPlan, sources: list[str]) -> None:
    words = [f"{folder}={share}" for folder, share in zip(sources, (3, 1), strict=True)]
    even = {"mixture.shares": [1.0, 1.0]}
    with pytest.raises(
        ConfigError, match=r"arm even: `mixture.shares` is \[1.0, 1.0\], but \[3.0, 1.0\] for the baseline"
    ):
        plan_runs(replace(plan, arm=(*plan.arm, PlannedArm("even", "random-tiny", set=even))), STUDY, words)
    arm = PlannedArm("even", "random-tiny", set=even, unpaired=("mixture",))
    axis = Axis("mixture.shares", ([1.0, 9.0], [9.0, 1.0]))
    runs = plan_runs(replace(plan, seeds=(1,), arm=(*plan.arm, arm), axis=(axis,)), STUDY, words)
    shares = {run.arm.name: run.config.mixture.shares for run in runs}
    assert [*shares.values()] == [(3.0, 1.0), (3.0, 1.0), (1.0, 1.0), (1.0, 9.0), (9.0, 1.0)]
    assert len({run.settings for run in runs}) == 5 and len({run.text for run in runs}) == 1
    for run in runs:
        assert run.config.data == tuple(map(Path, sources))
        words_of_run = [*run.pretrain_arguments(), "--seed", str(run.config.seed), "--output", str(run.run_folder)]
        assert as_dict(parse_command(words_of_run).run) == as_dict(run.config)
    moved = plan_runs(plan, STUDY, [str(Path(words[0])), words[1]])
    assert moved[0].settings == plan_runs(plan, STUDY, words)[0].settings


def test_a_study_may_compare_mixtures_of_several_folders(plan: StudyPlan, text: Path, sources: list[str]) -> None:
    runs = plan_runs(replace(plan, axis=(Axis("data", (sources, [str(text), *sources])),)), STUDY, text)
    names = [run.arm.name for run in runs if run.arm.name.startswith("random@")]
    assert names[:2] == ["random@data=wiki+books", f"random@data={text.name}+wiki+books"]
    assert [len(run.text) for run in runs] == [64] * len(runs) and len({run.text for run in runs}) == 3


def test_problems_of_a_mixture_are_found_before_the_study(plan: StudyPlan, text: Path, sources: list[str]) -> None:
    with pytest.raises(ConfigError, match="`data` must have a share for each folder or for none"):
        plan_runs(plan, STUDY, [f"{sources[0]}=1", sources[1]])
    with pytest.raises(ConfigError, match=r"`mixture.shares` has no effect with a single folder"):
        plan_runs(replace(plan, set={"mixture.shares": [1.0, 2.0]}), STUDY, text)
    with pytest.raises(ConfigError, match="`text` is missing in the plan"):
        plan_runs(plan, STUDY, [])


def test_budgets_hold_for_runs_in_phases(plan: StudyPlan, text: Path) -> None:
    phases = [{"steps": 10, "per_step": 8, "length": 64}, {"until": 0.5, "per_step": 2}]
    arm = PlannedArm("phased", "random-tiny", set={"phases": phases}, unpaired=("phases",))
    budgets = ("tokens=819200", "flops=1e13")
    by_name = {run.name: run for run in plan_runs(replace(plan, arm=(*plan.arm, arm), budgets=budgets), STUDY, text)}
    run = by_name["phased/tokens=819200/seed-1"]
    most = max(phase.per_step for phase in run_phases(run.config).phases) * run.config.packs.tokens
    assert abs(planned_tokens(run) - 819_200) < most
    assert parse_command(run.pretrain_arguments()).run.phases == run.config.phases
    config, texts = by_name["phased/flops=1e13/seed-1"].config, Texts()
    parts = mean_step_flops(config, pack_flops(config, texts.open(text)), texts.squares_of_run(config))
    step = parts["student"] + parts["scoring"] + parts["teacher"]
    assert abs(step * config.steps - 1e13) < 8 * step


def test_phases_that_only_change_the_masking_rate_keep_runs_paired(plan: StudyPlan, text: Path) -> None:
    short, higher = {"length": 64}, {"mask_ratio": 0.4}

    def planned(arm_phases: list[dict], baseline_phases: list[dict]) -> None:
        first = replace(plan.arm[0], set={"phases": baseline_phases} if baseline_phases else {})
        arm = PlannedArm("rates", "random-tiny", set={"phases": arm_phases})
        plan_runs(replace(plan, arm=(first, arm), budgets=("tokens=819200",)), STUDY, text)

    planned([{"until": 0.5} | higher], [])
    planned([{"until": 0.5} | higher], [{"until": 0.3} | higher])
    planned([{"until": 0.3} | short | higher, {"until": 0.5} | short], [{"until": 0.5} | short])
    planned([{"until": 0.5} | short, {"until": 0.7} | higher], [{"until": 0.5} | short])
    for phases in ([{"until": 0.6} | short | higher], [{"until": 0.3} | higher, {"until": 0.5} | short]):
        with pytest.raises(ConfigError, match=r"arm rates: `phases` is .*not paired"):
            planned(phases, [{"until": 0.5} | short])


def test_flops_of_a_run_in_phases_are_those_of_its_steps(plan: StudyPlan, text: Path) -> None:
    texts = Texts()
    base = plan_runs(plan, STUDY, text)[0].config
    pack = pack_flops(base, texts.open(text))

    def total(config) -> float:
        return config.steps * mean_step_flops(config, pack, texts.squares_of_run(config))["student"]

    base = replace(base, steps=100)
    first = PhaseConfig(steps=30, length=64, per_step=8, mask_ratio=0.5)
    alone = replace(base, steps=30, packs=replace(base.packs, length=64, per_step=8))
    alone = replace(alone, masking=replace(alone.masking, ratio=Schedule(start=0.5)))
    assert total(replace(base, phases=(first,))) == pytest.approx(total(alone) + total(replace(base, steps=70)))


def test_a_budget_of_time_and_checks_of_the_harness(plan: StudyPlan, text: Path) -> None:
    arms = (
        replace(plan.arm[0], name="half", role="check", budget_share=0.5),
        replace(plan.arm[0], name="others", role="check", seed_offset=100),
    )
    runs = plan_runs(replace(plan, budgets=("time=10m",), arm=(*plan.arm, *arms)), STUDY, text)
    assert [run.config.time_budget for run in runs[:4]] == ["600s", "600s", "300s", "600s"]
    assert [(run.seed, run.config.seed) for run in runs[3::4]] == [(1, 101), (2, 102)]


def test_a_teacher_is_the_run_with_the_same_seed(plan: StudyPlan, text: Path) -> None:
    arm = PlannedArm("kd", "entropy-kd-complete-tiny", teacher="random")
    runs = plan_runs(replace(plan, arm=(*plan.arm, arm)), STUDY, text)
    assert [run.config.teacher.path for run in runs[2::3]] == [str(run.run_folder) for run in runs[::3]]
    assert [run.teacher_key for run in runs[2::3]] == [run.key for run in runs[::3]]
    assert len({run.key for run in runs}) == len(runs) and not any(run.teacher_key for run in runs[::3])
    assert runs[2].settings == runs[5].settings


def test_mean_of_squares_is_that_of_the_cut_documents(text: Path) -> None:
    pieces = [min(62, length - start) + 2 for length in LENGTHS for start in range(0, length, 62)]
    assert Texts().squares_per_token(text, 64) == pytest.approx(sum(p**2 for p in pieces) / sum(pieces))


def test_parts_of_a_study_are_selected_by_name_or_number(plan: StudyPlan, text: Path) -> None:
    runs = plan_runs(plan, STUDY, text)
    assert select_runs(runs, ()) == runs
    assert select_runs(runs, ["probe/seed-2"]) == [runs[3]]
    assert select_runs(runs, ["random", "1"]) == [runs[0], runs[1], runs[2]]
    with pytest.raises(ConfigError) as error:
        select_runs(runs, ["prob", "9"])
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("export", False, ["--no-export"]),
        ("a.b.flag", True, ["--a.b.flag"]),
        ("a.flag", False, ["--a.no-flag"]),
        ("tasks", ["x", "y"], ["--tasks", "x", "y"]),
        ("rate", 1e-5, ["--rate", "1e-05"]),
        ("none", None, ["--none", "None"]),
    ],
)
def test_flags(name: str, value: object, words: list[str]) -> None:
    assert as_flag(name, value) == words
