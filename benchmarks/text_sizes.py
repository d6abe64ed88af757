"""Bytes of the texts that have a name: of the running Python, and of Debian's package fortunes.

python benchmarks/text_sizes.py --out benchmarks/results/DATE-text-sizes.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from spectralmoe.data.text_sources import TEXTS
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine


def main() -> None:
    """Read every text and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    texts = []
    for name, read in TEXTS.items():
        documents = read(None).documents
        size = sum(len(document.text.encode()) for document in documents)
        texts.append({"text": name, "bytes": size, "documents": len(documents)})
        print(texts[-1])
    if out is not None:
        write_json(out, {"machine": describe_machine(), "texts": texts})


if __name__ == "__main__":
    main()
