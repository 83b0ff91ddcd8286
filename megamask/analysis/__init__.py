"""What can be read off a trained encoder.

effective_rank.py   how many dimensions some rows fill, and how much of one set lies outside of another's span
layers.py           any encoder, asked for its states after every layer
deficiency.py       both, of real tokens and of [MASK], with and without [MASK] in the input
drawing.py          the figures as a table and as a picture
settings.py         what is asked for
ranking.py          all of it: encoders read, measured, printed, written
"""
