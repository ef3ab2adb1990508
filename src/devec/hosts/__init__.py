"""Live models: adapters that PEFT, transformers or diffusers hold in memory.

All of them keep adapters the way PEFT does, in layers of its own inside of the model, and differ in
what wraps the model: a `PeftModel`, a model of transformers or diffusers, or a pipeline of several.
"""
