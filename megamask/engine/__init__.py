"""DeepSpeed: its file (`ds_file`), the optimizers, and the engine. Only this package imports DeepSpeed."""
