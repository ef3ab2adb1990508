"""Linear algebra on plain tensors: thin factors, subspaces, chance. Knows nothing of adapters."""
