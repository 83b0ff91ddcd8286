"""Whether a run is well: hangs, stragglers, loss spikes, stop signals."""
