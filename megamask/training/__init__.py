"""The parts of a run put together: setup, step, validation, end, export."""
