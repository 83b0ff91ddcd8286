"""What trained encoders reveal.

show_masks.py       a sentence under every way to mask it
rank_analysis.py    analyze-rank: read encoders, measure, print, write
deficiency.py       ranks of the states of real tokens and of [MASK], with and without [MASK] in the input
effective_rank.py   how many dimensions a set of vectors fills, and how much of one set is outside another's span
layers.py           the states of any encoder after every layer
texts.py            the text on which encoders are compared
drawing.py          the results as tables and as a picture
settings.py         the settings of both commands
"""
