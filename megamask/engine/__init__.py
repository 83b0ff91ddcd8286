"""The door to DeepSpeed: its file (`ds_file`), the optimizer, and the engine that steps and holds the state."""
