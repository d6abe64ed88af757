"""What a result says of the machine that it was measured on."""

import platform

import pytest

from spectralmoe.machine import _first_cpu, describe_machine

TWO_CORES = """processor\t: 0
model\t\t: 207
model name\t: Some CPU 3.0 GHz
flags\t\t: fpu vme
power management:

processor\t: 1
model\t\t: 1
model name\t: Another
"""


@pytest.mark.parametrize(
    ("listing", "named"),
    [
        (TWO_CORES, "Some CPU 3.0 GHz, model 207"),
        ("model name : Old CPU\npower management:\n", "Old CPU"),
        ("processor : 0\nBogoMIPS : 50.00\n", platform.machine()),
        ("", platform.machine()),
    ],
)
def test_the_processor_is_the_first_that_linux_lists(listing, named):
    assert _first_cpu(listing) == named


def test_a_description_names_the_processor():
    assert describe_machine()["cpu"].strip()
