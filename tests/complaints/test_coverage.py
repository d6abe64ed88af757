"""Every thread that users of MoE libraries complained in is answered by a test of this folder, or by a reason.

A test is named by its thread, ``test_<project>_<number>_...`` (several: ``test_peft_2527_and_3340_...``), and its
module lists the threads that it answers.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

PROJECTS = {
    "DeepSpeed": "deepspeed",
    "Liger-Kernel": "liger",
    "Megatron-LM": "megatron",
    "NeMo Automodel": "automodel",
    "Tutel": "tutel",
    "bitsandbytes": "bitsandbytes",
    "megablocks": "megablocks",
    "minimind": "minimind",
    "peft": "peft",
    "st-moe-pytorch": "st_moe",
    "torchtitan": "torchtitan",
    "transformers": "transformers",
    "trl": "trl",
    "unsloth": "unsloth",
    "unsloth-zoo": "unsloth_zoo",
}

THREADS = """
transformers #28255, #31464, #39203, #44242, #44243, #44274, #44284, #44586, #45120, #45131, #46743, #48205, #48644,
#48687, #48911; NeMo Automodel #1232, #1408, #2635, #3156, #3359; trl #4611, #6083; Megatron-LM #1330, #1482, #1498,
#1984, #2121, #2398, #4168, #5844, #7081; torchtitan #1246, #4594, #4772; megablocks #82, #85, #91, #113, #119, #155,
#168; Tutel #167, #178, #186, #206, #226, #248, #251; DeepSpeed #2517; unsloth #4812; unsloth-zoo #647; minimind #858;
st-moe-pytorch #3, #6; peft #2527, #2710, #3340; bitsandbytes #1849; Liger-Kernel #1255
"""

REPAIRS = {
    ("transformers", 44243): ("transformers", 44242),
    ("transformers", 44274): ("transformers", 44242),
    ("transformers", 44284): ("transformers", 44242),
    ("transformers", 44586): ("transformers", 44242),
    ("transformers", 45131): ("transformers", 45120),
}
"""Threads that mend what another one complained of: its tests answer both."""

NOT_HERE = {
    ("transformers", 48687): "experts are not spread over devices yet: tested for data parallelism and sharding",
    ("bitsandbytes", 1849): "nothing here quantises: tested for casts and files",
    ("megablocks", 155): "only the CPU and CUDA are tested",
}
"""The part of a complaint that cannot occur in this library, or that no test can show."""


def read(text):
    """The threads of a list in words.

    >>> sorted(read("trl #4611, #6083; peft #2527."))
    [('peft', 2527), ('trl', 4611), ('trl', 6083)]
    """
    groups = [group.split("#", 1) for group in text.split(";")]
    return {(" ".join(project.split()), int(n)) for project, rest in groups for n in re.findall(r"\d+", rest)}


def answers():
    """Thread -> the tests named by it, and test -> its module, from the sources."""
    found, homes = {}, {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and path.name != Path(__file__).name:
                assert node.name not in homes, f"{node.name} is there twice"
                homes[node.name] = path
                threads = threads_of(node.name)
                named = ", ".join(f"{project} #{number}" for project, number in threads)
                assert str(ast.get_docstring(node)).startswith(f"{named}: "), f"{node.name} does not say what of"
                for thread in threads:
                    found.setdefault(thread, []).append(node.name)
    return found, homes


def threads_of(test):
    """The threads that a test is named by.

    >>> threads_of("test_automodel_3359_and_trl_6083_accumulation")
    [('NeMo Automodel', 3359), ('trl', 6083)]
    """
    found, rest, project = [], test.removeprefix("test"), None
    short = "|".join(sorted(PROJECTS.values(), key=len, reverse=True))
    while part := re.match(rf"_(?:and_)?(?:({short})_)?(\d+)(?=_|$)", rest):
        project = next((name for name, word in PROJECTS.items() if word == part[1]), project)
        found.append((project, int(part[2])))
        rest = rest[part.end() :]
    return found


def test_every_thread_has_an_answer():
    listed = read(THREADS)
    found, homes = answers()
    assert found.keys() | REPAIRS.keys() == listed
    assert {*REPAIRS.values()} <= found.keys()
    assert NOT_HERE.keys() <= listed
    assert sorted(homes) == sorted({name for names in found.values() for name in names}), "tests that name no thread"


def test_every_module_lists_the_threads_that_it_answers():
    found, homes = answers()
    for path in {*homes.values()}:
        own = {thread for thread, names in found.items() if any(homes[name] == path for name in names)}
        own |= {thread for thread, mended in REPAIRS.items() if mended in own}
        text = str(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))
        assert read(text.split("Threads:")[1]) == own, path.name
