"""Peak memory of ``spectralmoe inspect MODEL --router-only`` on layers as large as those of Mixtral 8x7B.

    python benchmarks/router_only_memory.py --out benchmarks/results/DATE-router-only-memory.json

A layer has 8 experts of three matrices of 4,096 by 14,336 and a gate, in bf16: 2.8 GB. A checkpoint of one layer and
one of two, a shard each, are written to a temporary folder and inspected in a process of their own. `own_bytes`: the
most that the process held of its own (RssAnon), seen every 10 ms; pages of the files, which the system takes back when
it needs them, do not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from spectralmoe.machine import describe_machine

D, H, E = 4096, 14336, 8


def main() -> None:
    """Measure one layer and two, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for layers in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            size = write(Path(folder), layers)
            rows.append(
                {"layers": layers, "file_bytes": size, "own_bytes": measured([folder, "--router-only", "--json"])}
            )
    sizes = {"dim": D, "hidden": H, "experts": E, "dtype": "bfloat16"}
    options.out.write_text(json.dumps({"machine": describe_machine(), "sizes": sizes, "rows": rows}, indent=1) + "\n")


def write(folder: Path, layers: int) -> int:
    """A checkpoint with Mixtral's names, a shard a layer; returns its bytes."""
    torch.manual_seed(0)
    drawn, names = torch.randn(H, D, dtype=torch.bfloat16), dict[str, str]()
    for layer in range(layers):
        start, shard = f"model.layers.{layer}.block_sparse_moe", f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        tensors = {f"{start}.gate.weight": drawn[:E].clone()}
        for expert in range(E):
            for place, (name, shape) in enumerate({"w1": (H, D), "w2": (D, H), "w3": (H, D)}.items()):
                values = drawn.roll(3 * expert + place).reshape(shape)  # others for every matrix
                tensors[f"{start}.experts.{expert}.{name}.weight"] = values
        save_file(tensors, folder / shard)
        names |= dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": E}
    (folder / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 2, "num_hidden_layers": layers}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured(arguments: Sequence[str]) -> int:
    """The most memory of its own, in bytes, that ``spectralmoe inspect`` held with these arguments."""
    own = 0
    process = subprocess.Popen([sys.executable, "-m", "spectralmoe", "inspect", *arguments], stdout=subprocess.DEVNULL)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = [line.split() for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        own = max(own, *(1024 * int(words[1]) for words in lines), 0)
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit("inspect failed; see its message above")
    return own


if __name__ == "__main__":
    main()
