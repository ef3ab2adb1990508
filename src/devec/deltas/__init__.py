"""One module's ΔW, as an element of an exact vector space of low-rank updates."""
