"""Text that a tokenizer loses: unknown tokens, and characters that get no token.

A character counts as lost if the normalizer keeps it, it is not whitespace, and it gets no token or is part of an
unknown token. Intended changes of the normalizer are not a loss: lower case, accents, another form of the same letter.
Characters that it removes (control characters, or what a ``Replace`` leaves out) are counted separately.

``coverage`` has the counts, ``counter`` counts a text, with one module for each kind of loss.
"""
