"""Frozen models as sources of soft targets and of entropies.

    settings.py              the settings `teacher` and `distill`
    annotation_settings.py   the settings of `megamask annotate entropy` and `megamask annotate targets`
    target_source.py         the protocol TargetSource: what gives a student soft targets
    teacher.py               Teacher: a TargetSource that runs a frozen model; TeacherEntropy: its entropies
    stored_targets.py        StoredTargets: a TargetSource that reads samples which a teacher wrote in advance
    frozen_lm.py             the model at a path: a run, initial weights, or any masked language model of transformers

`engine/frozen_teacher.py` runs the model, whole or partitioned by DeepSpeed. `annotate.py` writes the samples that
stored_targets.py reads, and the entropies that `entropy/sidecar.py` reads.
"""
