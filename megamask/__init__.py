"""megamask: pretraining masked-language-model encoders on one's own text, from one core to a thousand GPUs."""

__version__ = "0.1.0"
