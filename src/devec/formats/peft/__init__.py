"""PEFT adapter directories."""
