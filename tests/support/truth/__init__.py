"""Formulas, dense and in float64, that share nothing with devec."""
