"""Local text: only prose is kept, and the result is repeatable."""

from __future__ import annotations

import itertools

import pytest

from megamask.data import local_text

PROSE = "This function returns the sum of the two numbers, and it is used in all of the examples below."
SECOND = "The `value` is taken from the file if it is there, or else from the :class:`~a.Table` that was given."


def test_prose_is_kept_without_its_markup():
    assert list(local_text.paragraphs([f"{PROSE}\n\n{SECOND}"])) == [
        PROSE,
        "The value is taken from the file if it is there, or else from the a.Table that was given.",
    ]


@pytest.mark.parametrize(
    "other",
    [
        ">>> this is the code of an example, and it is not to be read as prose.",
        "Parameters\n----------\nvalue : int\n    The value that is to be used in the sum of the numbers.",
        "value: The value that is to be used in the sum of the two numbers.",
        "```\nThis is the code of an example, and it is not to be read as prose.\n```",
        "Copyright is held by the authors, and you may use it as it is if you keep this notice in all of the copies.",
        "See https://example.org/a/b for more.",
        "| this | is a table | of the numbers that are used in the sum |",
        "x = f(a_1, b_2) + g(c[3], d.e)(f_g) - h(i * j) ** 2 or k(l) and (m, n) if o(p) else q.",
        "Les nombres sont pris dans le fichier quand il existe et sinon dans la table des valeurs.",
        "too short.",
    ],
)
def test_text_that_is_not_prose_is_left_out(other):
    assert list(local_text.paragraphs([f"{other}\n\n{PROSE}"])) == [PROSE]


def test_code_after_a_double_colon_is_left_out():
    code = "    This is the code of an example, and it is not to be read as prose."
    first = PROSE.replace(".", "::")
    assert list(local_text.paragraphs([f"{first}\n\n{code}\n\n{PROSE}"])) == [PROSE]


def test_local_text_is_english_and_repeatable():
    documents = list(local_text.collect_local_text(50_000))
    assert documents == list(local_text.collect_local_text(50_000))
    assert 50_000 <= sum(map(len, documents)) < 300_000
    lines = list(itertools.chain.from_iterable(document.split("\n") for document in documents))
    assert all(map(local_text.is_prose, lines))
    assert len(set(lines)) == len(lines)
