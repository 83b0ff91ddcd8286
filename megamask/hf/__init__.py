"""The door to transformers: our names and theirs, export and import.

A preset is a subset of one class of transformers, so a model crosses by renaming, with queries, keys and values
glued or cut, which loses no bit. What the subset lacks is refused by name. An export is compared with the original,
as transformers loads it, before it is published.

Only safetensors are read, and no code that comes with a model is ever run.

    library.py     transformers itself, imported when it is needed, and the one way in which it loads
    names.py       our name of each tensor and theirs
    settings.py    EncoderShape and config.json
    weights.py     which files and tensors of a checkpoint are the model
    encodings.py   whether transformers encodes text as training does
    tokenizer_files.py   a tokenizer folder that crosses, such that both encode alike
    exporting.py   a folder that ``from_pretrained`` loads
    card.py        what that folder says of where it comes from
    importing.py   a checkpoint of theirs as first weights
    whole.py       a folder that appears whole or not at all
    foreign.py     any other masked language model, asked for its states
    hidden.py      any encoder, asked for its states after every layer
    comparing.py   whether two tokenizers are one
    layers.py      a shallower model out of some layers of a deep one
    asking.py      what an exported model puts in the place of [MASK]
"""

from megamask.hf.card import Card
from megamask.hf.exporting import Exported, export_model
from megamask.hf.fill_mask import common_words, fill_masks
from megamask.hf.importing import import_model, save_start
from megamask.hf.layers import pick_layers

__all__ = [
    "Card",
    "Exported",
    "common_words",
    "export_model",
    "fill_masks",
    "import_model",
    "pick_layers",
    "save_start",
]
