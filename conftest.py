"""Settings of a test run, of the tests and of the doctests alike: seed, threads, size; and what it says at its end."""

from __future__ import annotations

import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from grids import part_of
from seeds import set_first, shifted

SLOW_SECONDS = 20
EXAMPLES, FULL_EXAMPLES = 15, 50  # of a property, in the default run and with --full

ROOT = Path(__file__).parent
MEGATRON = [
    ROOT / path
    for path in ("src/spectralmoe/integrations/megatron.py", "tests/integrations/megatron", "tests/megatron_layers.py")
]
"""What imports Megatron-core, which changes what torch loads; tests/integrations/test_megatron.py runs it elsewhere."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("spectralmoe")
    group.addoption("--seed", type=int, default=0, help="where all random draws start; every seed must pass")
    group.addoption("--threads", type=int, default=1, help="threads of torch")
    group.addoption(
        "--full",
        nargs="?",
        const="all",
        help="every grid whole and the long tests too; --full 2/3 runs the second of three parts of these alone",
    )
    group.addoption("--megatron", action="store_true", help="run what imports Megatron-core in this process")
    group.addoption(
        "--require-chromium", action="store_true", help="fail the tests of the HTML page where there is no Chromium"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path in MEGATRON and not config.getoption("--megatron") else None


def pytest_configure(config: pytest.Config) -> None:
    set_first(config.getoption("--seed"))
    torch.set_num_threads(config.getoption("--threads"))
    examples = FULL_EXAMPLES if config.getoption("--full") else EXAMPLES
    hypothesis.settings.register_profile("spectralmoe", derandomize=True, deadline=None, max_examples=examples)
    hypothesis.settings.load_profile("spectralmoe")


def pytest_report_header(config: pytest.Config) -> str:
    return (
        f"seed {config.getoption('--seed')}, threads {torch.get_num_threads()}, "
        f"instructions {torch.backends.cpu.get_cpu_capability()}"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full = config.getoption("--full")
    if full != "all":
        apart = [item for item in items if "full" in item.keywords or (full and "grid" in item.keywords)]
        kept = set(part_of(apart, full)) if full else set(items) - set(apart)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "inductor" in item.keywords and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
            item.add_marker(pytest.mark.skip(reason="torch's inductor needs a CPU with vector instructions"))
        if shifted(0) and hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
            hypothesis.seed(shifted(0))(item.obj)


def seed_all() -> None:
    torch.manual_seed(shifted(0))
    np.random.seed(shifted(0))  # noqa: NPY002
    random.seed(shifted(0))


def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """What tests share is drawn alike whichever test comes first."""
    if fixturedef.scope != "function":
        seed_all()


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_all()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that take too long for the default run. It is no failure: machines differ."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    slow = {f"{r.nodeid} ({r.when})": r.duration for r in reports if getattr(r, "duration", 0) > SLOW_SECONDS}
    for name, seconds in sorted(slow.items(), key=lambda item: -item[1]):
        terminalreporter.line(f"over {SLOW_SECONDS} s: {seconds:.0f} s, {name}", yellow=True)
