"""The boundary to transformers: tensor names, export and import.

A preset is a subset of one class of transformers, so a model crosses by renaming, with queries, keys and values
glued or cut, which loses no bit. What the subset lacks is refused by name. An export is compared with the original,
as transformers loads it, before it is published.

Only safetensors are read, and no code that comes with a model is ever run.

    lazy_transformers.py  transformers itself, imported when it is needed, and the one way in which it loads
    tensor_names.py       our name of each tensor and theirs
    config_json.py        EncoderShape and config.json
    weights.py            which files and tensors of a checkpoint are the model
    encoding_check.py     whether transformers encodes text as training does
    tokenizer_files.py    a tokenizer folder that crosses, such that both encode alike
    tokens.py             special tokens of a tokenizer of transformers
    exporting.py          a folder that ``from_pretrained`` loads
    card.py               the model card of that folder
    importing.py          a checkpoint of transformers as first weights
    whole.py              a folder that appears whole or not at all
    masked_lm.py          the hidden states of any other masked language model
    hidden_states.py      the hidden states of any encoder, after every layer
    layer_subset.py       a shallower model out of some layers of a deep one
    fill_mask.py          what an exported model predicts for [MASK]
"""

from megamask.hf.card import Card
from megamask.hf.exporting import Exported, export_model
from megamask.hf.fill_mask import common_words, fill_masks
from megamask.hf.importing import import_model, save_start
from megamask.hf.layer_subset import pick_layers

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
