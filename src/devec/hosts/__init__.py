"""Live models: adapters of models that PEFT, transformers or diffusers hold in memory.

All hosts store adapters as PEFT does, in layers that wrap those of the model. They differ in what
wraps the model: a `PeftModel`, a model of transformers or diffusers, or a pipeline of several.
"""
