"""Adapter files: detect, read, write.

Importing this package makes its readers known to `devec.Adapter.from_pretrained`.
"""

from devec.formats import peft
from devec.layout import READERS

READERS.append(peft.read)
