"""How good an encoder is: fine-tuning, frozen features and zero-shot scores on benchmark tasks, without a network."""
