"""Pools of adapters with their dense truth."""
