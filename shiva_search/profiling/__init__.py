"""From a model and a device to measured costs: blocks, whole forwards, energy, memory, operations."""
