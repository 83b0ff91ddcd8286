"""Values that earlier versions had are refused with what to use instead, as a flag and in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.config.cli import parse_command
from megamask.config.removed import removed_values
from megamask.errors import ConfigError


@pytest.mark.parametrize(
    "arguments",
    [
        ["--entropy.source", "cache"],
        ["--entropy.source=cache"],
        ["--entropy.audit.fall-back", "probe", "cache"],
        ["--entropy.audit.fall_back", "cache"],
    ],
)
def test_a_removed_value_on_the_command_line_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^`entropy\.\S+` must not be 'cache'.* Use 'probe'"):
        parse_command(arguments)


def test_the_config_of_a_run_with_a_removed_value_is_refused(tmp_path: Path) -> None:
    config = {"entropy": {"source": "cache", "audit": {"fall_back": ["cache"]}}, "deepspeed": {}, "text": ""}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"cannot be resumed.*--init") as caught:
        parse_command(["--config", str(tmp_path / "config.json")])
    assert len(caught.value.problems) == 2


def test_other_values_are_not_refused() -> None:
    assert removed_values({"entropy.source": "probe", "entropy.audit.fall_back": ["exact"], "output": "cache"}) == {}
