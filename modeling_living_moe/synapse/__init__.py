"""Synapses: short-term memory between tokens and experts, as a model of what a synapse's two sides do."""
