"""Adapter files: detect, read, write, convert.

Importing this package makes its readers known to `devec.Adapter.from_pretrained`.
"""

from devec.formats import files, peft
from devec.layout import READERS

READERS += [peft.read, files.read]
