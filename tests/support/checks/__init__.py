"""Checks that several tests make."""
