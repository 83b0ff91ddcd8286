"""What differs between a run and the launch that resumes it, in settings and text."""

from __future__ import annotations

import json

from megamask.checkpoint.run_folder import RunFolder
from megamask.data.compare_tokenizers import tokenizer_differences
from megamask.data.manifest import manifest_changes
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER
from megamask.errors import ConfigError, DataError
from megamask.storage import strict_json
from megamask.storage.dotted import flatten, is_under
from megamask.storage.old_setting_names import with_added, with_new_names


def find_changes(
    run: RunFolder, config: dict, may_differ: tuple[str, ...], text: Shards | None
) -> dict[str, list[object]]:
    """The settings of ``config`` that differ from those of ``run``, as [of the run, of this launch].

    Raises ConfigError if one does that is not under ``may_differ``, DataError if only the text differs.
    """
    here = flatten(json.loads(json.dumps(config)))
    there = with_added(flatten(with_new_names(strict_json.read_json(run.config))), here)
    pairs = {key: [there.get(key, "absent"), here.get(key, "absent")] for key in sorted(there | here)}
    changes = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    refused = {key: pair for key, pair in changes.items() if not is_under(key, may_differ)}
    data = there.get("data"), here.get("data")
    if refused.keys() == {"text"} and text:
        raise _other_text(run, text, _describe_data(*data))
    if refused:
        cures = (
            "Choose another output folder, undo the changes, or, if they are meant and a resume may change them, name "
            "them after --change"
        )
        fields = [
            _describe_data(*data) if key == "text" else f"`{key}` is {current!r} here, but {recorded!r} there."
            for key, (recorded, current) in refused.items()
        ]
        raise ConfigError(f"{run.path} holds another run. {cures}:", *fields)
    return changes


def _describe_data(recorded: object, current: object) -> str:
    """The sentence for another text than that of the run, from the setting `data` of both."""
    before, now = (" ".join(map(str, data)) if isinstance(data, list) else data for data in (recorded, current))
    if recorded == current:
        return (
            f"`data` is {now or 'not given'} as before, but contains another text now. Prepare the text of the run "
            "again."
        )
    cure = f"Resume with --data {before}." if before else "Resume without --data."
    return f"`data` is {now or 'not given'} here, but {before or 'not given'} there, and the texts differ. {cure}"


def _other_text(run: RunFolder, text: Shards, cure: str) -> ConfigError | DataError:
    """DataError that names the shards that changed since the run began, or ConfigError if its tokenizer changed."""
    try:
        before = strict_json.read_json(run.text)
        changes = manifest_changes(before, text.manifest) or ["the same files, but from other sources or settings"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        before, changes = {}, [f"the changes are unknown without {run.text}"]
    cure = f"{cure} Or choose another output folder."
    own, now = run.path / TOKENIZER, text.folder / TOKENIZER
    if before.get("tokenizer", text.manifest["tokenizer"]) != text.manifest["tokenizer"] and own.is_dir():
        problem = f"{text.folder} has another tokenizer than the run in {run.path} began with. {cure}"
        return ConfigError(problem, *tokenizer_differences(now, str(now), own, str(own)))
    shown = ", ".join(changes[:10]) + (f", and {len(changes) - 10} more" if len(changes) > 10 else "")
    return DataError(f"{text.folder} is not the text that the run in {run.path} began with: {shown}. {cure}")
