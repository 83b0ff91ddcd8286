"""Everything that needs a GPU, in one command: `megamask bench-gpu`. Not run on a GPU yet.

settings.py   the flags and the names of the parts
parts.py      the parts in their order, their time limits and their functions
run_parts.py  runs the parts, each in a process of its own, until the time limit
preparation.py  what is checked, held and prepared before anything is measured
child.py      the processes of the parts
machine.py    the machine and its versions
figures.py    the file of figures: one JSON line for each, written as soon as it is measured
sizes.py      how large everything is, on a GPU and tiny
timing.py     seconds and bytes of work on a device
kernels.py    ceilings, attention, statistics of predictions
steps.py      training steps: speed, their parts, memory, ZeRO stages
compared.py   entropy sources, late [MASK]s and the Trainer, in turn with plain steps
commands.py   the tests for GPUs, and a run of five minutes
goals.py      the goals, and whether the figures reach them
page.py       figures and goals as one HTML file
"""
