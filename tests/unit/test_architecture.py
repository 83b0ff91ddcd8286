"""Rules of the source that no library checks by itself: names, who imports what, and nothing that runs foreign code."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
import jaxtyping
import networkx as nx
import pytest
import torch
from importlinter.cli import lint_imports

from megamask.batch import Layout
from tests.unit.runtime.test_private_api import ATTRIBUTES, METHODS

ROOT = Path(__file__).parent.parent.parent
SOURCES = [*sorted((ROOT / "megamask").rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
PRIVATE_API = "megamask/runtime/private_api.py"
# parts of torch that only these files may name; for whole libraries import-linter has contracts
ALLOWED_IN = {
    "torch.distributed": {"megamask/runtime/ranks.py", PRIVATE_API},
    "torch.utils.tensorboard": {"megamask/metrics/logger.py"},
}

DEEPSPEED = {name.split(".")[1] for name in (*ATTRIBUTES, *METHODS)} - {"optimizer", "step", "zero_grad"}
DEEPSPEED |= {"__compatible_ops__"}


def named(source: str) -> Iterator[str]:
    """The dotted names that ``source`` imports or reads, as they are written."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def restricted(source: str) -> set[str]:
    """The modules of ``ALLOWED_IN`` that ``source`` names."""
    return {module for module in ALLOWED_IN for name in named(source) if f"{name}.".startswith(f"{module}.")}


def private_uses(source: str) -> list[str]:
    """Uses of private names that are not defined in ``source``, and of DeepSpeed's internal attributes."""
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    documented = {"_exit", "_current_frames", "_fields"}  # of os, sys and named tuples
    uses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name, owner = node.attr, ast.unparse(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "delattr", "hasattr"):
            name, owner = ast.unparse(node.args[1]).strip("'"), ast.unparse(node.args[0])
        else:
            continue
        private = name.startswith("_") and not name.startswith("__") and owner not in ("self", "cls", "super()")
        if (private and name not in own | documented) or name in DEEPSPEED:
            uses.append(f"line {node.lineno}: {owner}.{name}")
    return uses


def dangers(source: str) -> list[str]:
    """Calls that may unpickle a file or run a model's own code, of which ruff knows nothing."""
    problems = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if ast.unparse(call.func) == "torch.load" and given.get("weights_only") != "True":
            problems.append(f"line {call.lineno}: torch.load without weights_only=True")
        if ast.unparse(call.func).endswith(".from_pretrained") and "trust_remote_code" not in given:
            problems.append(f"line {call.lineno}: from_pretrained without trust_remote_code=False")
        for name in ("allow_pickle", "trust_remote_code"):
            if given.get(name, "False") != "False":
                problems.append(f"line {call.lineno}: {name}")
    return problems


def ruff(source: str) -> subprocess.CompletedProcess[str]:
    """Ruff's verdict on ``source`` if it stood in megamask/."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--stdin-filename", "megamask/new.py", "-"]
    return subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True)


@pytest.mark.parametrize("folder", ["megamask", "tools"])
def test_no_name_shadows_a_library(folder: str) -> None:
    """`deepspeed megamask/pretrain.py` puts megamask/ first on the path: a `types.py` there would be everyone's."""
    names = {path.stem for path in (ROOT / folder).glob("*") if path.suffix == ".py" or path.is_dir()}
    assert not names & (set(sys.stdlib_module_names) | set(packages_distributions())) - {"__init__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_restricted_modules_are_named_only_where_allowed(path: Path) -> None:
    place, source = path.relative_to(ROOT).as_posix(), path.read_text()
    assert not [module for module in restricted(source) if place not in ALLOWED_IN[module]]
    assert not dangers(source)
    assert place == PRIVATE_API or not private_uses(source)


def renames(source: str) -> list[str]:
    """Calls that rename or replace a file: `os.rename`, `os.replace`, `shutil.move`, and a method with one argument."""
    problems = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        method = isinstance(call.func, ast.Attribute) and call.func.attr in ("rename", "replace", "renames")
        arguments = len(call.args) + len(call.keywords)
        if name in ("os.rename", "os.replace", "os.renames", "shutil.move") or (method and arguments == 1):
            problems.append(f"line {call.lineno}: {name}")
    return problems


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_storage_renames_files(path: Path) -> None:
    """Every file and folder appears whole: see storage/atomic_write.py."""
    assert not renames(path.read_text()) or path.parent == ROOT / "megamask" / "storage"


@pytest.mark.parametrize("call", ["os.rename(a, b)", "os.replace(a, b)", "path.rename(b)", "(a / b).replace(c)"])
def test_a_rename_is_found(call: str) -> None:
    assert renames(f"import os\n{call}") and not renames("text.replace(a, b); replace(config, a=1)")


def test_public_names_are_unique() -> None:
    """One word for one thing: no two modules define a public class or function of the same name; `main` may recur."""
    places: dict[str, list[str]] = {}
    for path in sorted((ROOT / "megamask").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: paths for name, paths in places.items() if len(paths) > 1 and name != "main"} == {}


def test_no_file_is_long() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > 350} == {}


def test_import_contracts_hold() -> None:
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True) == 0


def test_packages_form_a_small_acyclic_graph() -> None:
    """What docs/architecture.md promises of the imports, beyond the contracts."""
    graph = grimp.build_graph("megamask", cache_dir=None)

    def package(module: str) -> str:
        return ".".join(module.split(".")[:2])

    edges = {
        (package(module), package(other))
        for module in graph.modules - {"megamask"}
        for other in graph.find_modules_directly_imported_by(module)
        if package(module) != package(other)
    }
    modules = [path for path in (ROOT / "megamask").glob("*.py") if path.stem != "__init__"]
    assert not list(nx.simple_cycles(nx.DiGraph(list(edges))))
    assert len(edges) <= 180
    assert len(modules) <= 8


@pytest.mark.skipif(os.environ.get("MEGAMASK_CHECK_SHAPES") == "0", reason="switched off")
def test_shapes_and_types_are_checked() -> None:
    whole = torch.arange(3, dtype=torch.int32)
    Layout(whole, 3, whole)
    for wrong in (whole.long(), whole[None]):
        with pytest.raises(jaxtyping.TypeCheckError):
            Layout(whole, 3, wrong)


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.nn import all_reduce",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_every_way_to_name_a_module_is_seen(source: str) -> None:
    assert restricted(source) == {"torch.distributed"}
    assert not restricted(source.replace("distributed", "distributions"))


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("torch._foreach_norm(x)", "torch.norm(x)"),
        ("self.engine._config", "self._config"),
        ("getattr(zero, '_check')", "getattr(zero, 'check')"),
        ("zero.averaged_gradients[0]", "zero.param_groups[0]"),
        ("other._sum", "def _sum(): ...\nother._sum"),
        ("os._execvpe()", "os._exit(1)"),
        ("deepspeed.ops.__compatible_ops__", "deepspeed.ops.__name__"),
    ],
)
def test_uses_of_private_names_are_seen(bad: str, good: str) -> None:
    assert private_uses(bad)
    assert not private_uses(good)


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("torch.load(file)", "torch.load(file, weights_only=True)"),
        ("torch.load(file, weights_only=False)", "torch.load(file, weights_only=True)"),
        ("np.load(file, allow_pickle=True)", "np.load(file)"),
        *(
            (f"AutoModel.from_pretrained(name{bad})", "AutoModel.from_pretrained(name, trust_remote_code=False)")
            for bad in ("", ", trust_remote_code=flag", ", trust_remote_code=True", ", **settings")
        ),
    ],
)
def test_calls_that_run_the_code_of_others_are_seen(bad: str, good: str) -> None:
    assert dangers(bad)
    assert not dangers(good)


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ("import pickle\n\nprint(pickle)\n", "import json\n\nprint(json)\n"),
        ("print(eval('1'))\n", "print(float('1'))\n"),
        ("exec('1')\n", "print('1')\n"),
        ("import os\n\nos.system('ls')\n", "import os\n\nos.listdir('.')\n"),
        (
            "import subprocess\n\nsubprocess.run('ls', shell=True)\n",
            "import subprocess\n\nsubprocess.run(['ls'])\n",
        ),
        ("import yaml\n\nyaml.load('a', yaml.Loader)\n", "import yaml\n\nyaml.safe_load('a')\n"),
        ("import yaml\n\nyaml.unsafe_load('a')\n", "import yaml\n\nyaml.safe_load('a')\n"),
    ],
)
def test_ruff_refuses_what_runs_the_code_of_others(bad: str, good: str) -> None:
    assert ruff(bad).returncode
    assert not (fine := ruff(good)).returncode, fine.stdout
