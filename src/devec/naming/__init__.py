"""How the world names modules: families of base models, conventions of files, names of layers."""
