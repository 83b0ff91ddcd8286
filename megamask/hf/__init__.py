"""Import from and export to transformers. No other package but the benchmark imports that library.

A family is a subset of one class of transformers, so a model is converted by renaming its tensors and concatenating or
splitting queries, keys and values, which changes no bit. What a family lacks is refused by name. An export is loaded
with transformers and compared with the original before it is published. Only safetensors are read, and code that comes
with a model never runs.

    exporting.py          a run's model as a folder that ``from_pretrained`` loads
    card.py               the model card of that folder
    importing.py          a checkpoint of transformers as initial weights
    families.py           the names of settings and tensors in each family of models
    config_json.py        EncoderShape <-> config.json
    tensor_names.py       our name of each tensor <-> the name in transformers
    select_tensors.py     which tensors of a checkpoint are encoder and head
    tied_head.py          the output matrix must be the token table
    layer_subset.py       a shallower model from some layers of a deeper one
    encoder_and_head.py   our encoder and head from tensors by name
    tokenizer_folder.py   import and export of tokenizers
    encoding_check.py     whether transformers encodes text as training does
    weights.py            the safetensors files of a model folder, and the check for NaN and Inf
    model_folder.py       download, check and load a model folder
    masked_lm.py          the states of any masked language model, for teachers
    predictions.py        what a model predicts for [MASK], and how unsure it is
    lazy_transformers.py  the library itself, imported on first use
"""

from megamask.hf.card import Card
from megamask.hf.exporting import Exported, export_model
from megamask.hf.importing import import_model, save_start
from megamask.hf.predictions import common_words, fill_masks
from megamask.hf.tokenizer_folder import to_fast_tokenizer

__all__ = [
    "Card",
    "Exported",
    "common_words",
    "export_model",
    "fill_masks",
    "import_model",
    "save_start",
    "to_fast_tokenizer",
]
