"""Linear algebra on plain tensors: thin factors, subspaces, chance. Independent of adapters."""
