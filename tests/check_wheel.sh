#!/bin/sh
# Build the wheel and use it outside of the tree, so that nothing works by accident of a checkout.
set -eu
here=$(pwd)
python=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$here"
"$python" -m pip install --quiet --no-deps --target "$work/site" "$work"/devec-*.whl
cd "$work"
PYTHONPATH="$work/site" "$python" - <<'PY'
import os

import devec
from devec.demo.evaluate import POOL

assert devec.__file__.startswith(os.environ["PYTHONPATH"]), devec.__file__
adapters = [devec.Adapter.from_pretrained(POOL / name) for name in ("ink", "chalk")]
parts = devec.decompose(adapters)
devec.save_adapters({f"out/{name}": part for name, part in parts.outputs().items()})
size = sum(file.stat().st_size for file in POOL.rglob("*") if file.is_file())
assert size <= 3_000_000, size
print(f"wheel: devec {devec.__version__} works outside of the tree, demo pool {size} bytes")
PY
