"""Adapter files: detect, read, write.

Importing this package makes its readers known to `devec.Adapter.from_pretrained`.
"""

from devec.adapter import READERS
from devec.formats import peft

READERS.append(peft.read)
