"""Modules of one shape, computed together: LoRAs in batches, all else one module at a time."""
