"""ΔW of one module, as an element of an exact vector space of low-rank updates."""
