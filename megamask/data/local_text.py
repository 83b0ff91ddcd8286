"""English prose that every machine has: the documentation of Python and of the installed packages.

Sources are the docstrings of .py files, which are read but never executed, the .rst, .md and .txt files of packages and
their descriptions in METADATA. Only paragraphs of prose are kept, each once: no code, doctests, tables of parameters,
lists of links or licenses. Takes about 15 seconds on one core for the 220 MB of torch and transformers, and gives 11 MB
of text. Text and order depend only on the installed packages.
"""

from __future__ import annotations

import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from email.parser import BytesParser
from pathlib import Path

LIMIT = 15_000_000
METHOD = 1
FILE_BYTES = 2_000_000

_LICENSE = re.compile(
    r"copyright|warranty|licen[cs]ed? |redistribut|permission is hereby|all rights reserved|merchantab", re.IGNORECASE
)
_LINK = re.compile(r"<?https?://\S+>?")
_MARKUP = re.compile(
    r":[a-z:]+:`~?\.?([^`<]+?)(?:\s*<[^>]*>)?`"  # :class:`~a.b <c>`
    r"|``?([^`]+)``?|\[([^\]]+)\]\([^)]*\)|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*"
)
_NOT_PROSE = re.compile(
    r"^\s*(>>>|\.\.\s|\$ |# |:[a-z]|@|[-=~^*#+|_]{3,}|[|+]|\d+\s*$|[-\w.*]+\s*:\s|<|\{|\[)", re.IGNORECASE
)
_QUOTED = re.compile(r"[rRuU]?(?P<quotes>\"{3}|'{3})(?P<text>.*?)(?P=quotes)", re.DOTALL)
_SENTENCE_END = (".", "!", "?", ".)", '."')


def collect_local_text(limit: int = LIMIT) -> Iterator[str]:
    """Documents, one for each file with enough prose, up to about ``limit`` characters in all."""
    seen: set[str] = set()
    size = 0
    for file in _files():
        kept = []
        for paragraph in paragraphs(_texts(file)):
            key = re.sub(r"\W+", "", paragraph.lower())
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        document = "\n".join(kept)
        if len(document) >= 200:
            yield document
            size += len(document)
            if size >= limit:
                return


def paragraphs(texts: Iterable[str]) -> Iterator[str]:
    """The paragraphs of ``texts`` that are prose, each as one line without markup."""
    for text in texts:
        fenced = False
        after_code_mark = False
        for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n").expandtabs()):
            fences = block.count("```")
            inside, fenced = fenced or fences > 0, fenced != bool(fences % 2)
            lines = block.strip("\n").split("\n")
            # after "::" an indented block is code
            is_code = after_code_mark and lines[0].startswith("  ")
            after_code_mark = is_code or block.rstrip().endswith("::")
            if inside or is_code or any(_NOT_PROSE.match(line) for line in lines):
                continue
            prose = _plain(" ".join(line.strip() for line in lines))
            if is_prose(prose):
                yield prose


def is_prose(paragraph: str) -> bool:
    """Whether ``paragraph`` consists of English sentences: long enough, with an end, mostly words, not a license."""
    words = paragraph.split()
    if len(words) < 8 or not paragraph.endswith(_SENTENCE_END) or not paragraph[0].isupper():
        return False
    letters = sum(c.isascii() and c.isalpha() for c in paragraph)
    plain = sum(word.strip("().,;:'\"!?").isalpha() for word in words)
    # English has an article, "of", "to", ... every few words; a list of names does not
    common = sum(word.lower() in _COMMON for word in words)
    return (
        letters >= 0.72 * len(paragraph)
        and plain >= 0.75 * len(words)
        and common >= 0.2 * len(words)
        and not _LICENSE.search(paragraph)
    )


_COMMON = frozenset(
    re.findall(
        r"\w+",
        "the a an of to in is are was be and or for with that this it its as by on not if from at can will you which "
        "when has have but all one any may no each other than then so into only use used using",
    )
)


def _plain(text: str) -> str:
    text = _MARKUP.sub(lambda match: next(group for group in match.groups() if group), _LINK.sub("", text))
    return re.sub(r"\s+", " ", text).replace(" .", ".").replace("::", ":").strip()


# ---- files


def _files() -> list[Path]:
    """The files of Python and of the installed packages, in an order that does not depend on their folders."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    files: dict[str, Path] = {}
    for root in sorted(roots):
        for file in root.rglob("*"):
            parts = file.relative_to(root).parts
            # of another root, or of no environment
            is_within = "site-packages" in parts or "dist-packages" in parts
            if not is_within and _is_wanted(file, parts):
                files.setdefault("/".join(parts), file)
    return [files[name] for name in sorted(files)]


def _is_wanted(file: Path, parts: tuple[str, ...]) -> bool:
    if not (file.suffix in (".py", ".rst", ".md", ".txt") or file.name == "METADATA"):
        return False
    name = file.name.lower()
    is_ignored = (
        "licen" in name or "copying" in name or name in ("top_level.txt", "entry_points.txt", "requirements.txt")
    )
    is_test = name.startswith("test_") or not {"test", "tests", "idle_test"}.isdisjoint(parts)
    return not is_ignored and not is_test and file.is_file() and file.stat().st_size <= FILE_BYTES


def _texts(file: Path) -> Iterator[str]:
    """The docstrings of a .py file, the description of a METADATA file, the whole of any other file."""
    raw = file.read_bytes()
    if file.suffix == ".py":
        # by their quotes: parsing all these files takes a minute
        yield from _docstrings(raw.decode("utf-8", errors="ignore"))
    elif file.name == "METADATA":
        yield str(BytesParser().parsebytes(raw).get_payload())
    else:
        yield raw.decode("utf-8", errors="ignore")


def _docstrings(source: str) -> Iterator[str]:
    """Every triple-quoted string that begins a line: mostly docstrings."""
    for match in _QUOTED.finditer(source):
        if not source[source.rfind("\n", 0, match.start()) + 1 : match.start()].strip():
            yield inspect.cleandoc(match["text"])
