"""Adapters made by PEFT and written by hand, and what they do."""
