"""Hangs, stragglers, loss spikes and stop signals."""
