"""Decompositions are tested with two stacks at a time."""

from support.threads import torch_threads as torch_threads
