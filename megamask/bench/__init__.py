"""Tokens per second of megamask beside the masked-language-model example of transformers, in one run on one text.

settings.py          the flags of `megamask bench`
benchmark.py         builds the variants, lets them take turns, prints and writes the results
measure.py           rounds in turn, medians
megamask_variant.py  the steps of `pretrain`, under DeepSpeed and in plain PyTorch
trainer_variant.py   those of ``run_mlm``: Trainer, BertForMaskedLM, DataCollatorForLanguageModeling
objectives.py        3ML and MAE-LM beside MLM
overheads.py         entropy sources and teachers beside a plain step
table.py             the machine and the results as Markdown and JSON
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: the benchmark needs no network
