"""Tokens per second of megamask beside the masked-language-model example of transformers, in one run on one text.

settings.py  what is asked for
comparing.py the variants in turn, printed and written
measure.py   rounds in turn, medians
ours.py      the loop of ``pretrain``, under DeepSpeed and in plain PyTorch
theirs.py    ``run_mlm``'s: Trainer, BertForMaskedLM, DataCollatorForLanguageModeling
table.py     the machine and the figures as Markdown
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: neither side needs a network
