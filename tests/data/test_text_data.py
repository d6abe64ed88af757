"""Text by name and from files: fixed parts, domains, honest errors."""

from __future__ import annotations

import codecs
import random
import sys

import pytest
from seeds import shifted

from spectralmoe.data import text_sources
from spectralmoe.data.text_data import TEXT_PARTS, load_text, part_of
from spectralmoe.data.text_sources import SECTION, TEXTS, read_path, read_text

PROSE, CODE = ["the", "cat", "sat", "on", "a", "mat", "and", "slept"], ["def", "x", "(", ")", ":", "return", "1"]


def write_corpus(root, files=120, words=40):
    """Subfolders "prose" and "code" with ``files`` documents each, all different."""
    draw = random.Random(shifted(0))
    for domain, vocabulary in (("prose", PROSE), ("code", CODE)):
        (root / domain).mkdir(parents=True)
        for i in range(files):
            text = " ".join(draw.choice(vocabulary) for _ in range(words))
            (root / domain / f"{i}.txt").write_text(f"{text} {i}\n")
    return root


def of(data):
    return {document.text: part for part in TEXT_PARTS for document in data.parts[part]}


def test_pydoc_is_always_there_and_split_by_content():
    import pydoc_data.topics

    data = load_text("pydoc")
    assert data.domains == ("pydoc",)
    sizes = {part: sum(len(document.text) for document in data.parts[part]) for part in TEXT_PARTS}
    assert sum(sizes.values()) == pytest.approx(sum(map(len, pydoc_data.topics.topics.values())), rel=0.01)
    assert 0.7 < sizes["train"] / sum(sizes.values()) < 0.9
    assert min(sizes.values()) > 10_000
    assert all(part == part_of(text) for text, part in of(data).items())
    assert of(load_text("pydoc")) == of(data)


def test_a_document_stays_in_its_part_whatever_it_is_read_with(tmp_path):
    alone = of(load_text(str(write_corpus(tmp_path / "a"))))
    (tmp_path / "a" / "prose" / "000.txt").write_text("a new document in front")
    (tmp_path / "a" / "verse").mkdir()
    (tmp_path / "a" / "verse" / "1.txt").write_text("another domain")
    later = load_text(str(tmp_path / "a"))
    assert later.domains == ("code", "prose", "verse")
    assert of(load_text(later.name.removeprefix("text:"))) == of(later)
    assert of(later).items() > alone.items()
    mixed = load_text(f"pydoc+{tmp_path / 'a'}")
    assert mixed.domains == ("a", "pydoc")
    assert of(mixed).items() > of(later).items()


def test_subfolders_are_domains_and_doubles_are_taken_once(tmp_path):
    root = write_corpus(tmp_path / "texts", files=100)
    (root / "prose" / "copy.txt").write_bytes((root / "prose" / "0.txt").read_bytes())
    data = load_text(str(root))
    documents = [document for part in TEXT_PARTS for document in data.parts[part]]
    assert len(documents) == 200
    assert {document.domain for document in documents if document.text.startswith("def")} <= {"code"}
    for part in TEXT_PARTS:
        domains = [document.domain for document in data.parts[part]]
        assert domains == sorted(domains)


def test_a_file_is_cut_at_blank_lines_and_a_mark_of_its_bytes_is_no_text(tmp_path):
    paragraphs = [f"{i} " + "word " * 100 + "\n" for i in range(60)]
    file = tmp_path / "book.txt"
    file.write_bytes(codecs.BOM_UTF8 + "\n".join(paragraphs).encode())
    documents = read_path(file).documents
    assert "".join(document.text for document in documents) == "\n".join(paragraphs)
    assert all(len(document.text) >= SECTION for document in documents[:-1])
    assert all(document.text.lstrip("\n")[0].isdecimal() for document in documents)
    assert {document.domain for document in documents} == {"book"}


def test_fortunes_have_their_topics_as_domains_and_are_one_domain_among_others(tmp_path, user_error):
    folder = tmp_path / "fortunes"
    folder.mkdir()
    for topic in ("fortunes", "art"):
        sayings = [f"{topic} says {i}.\n\t\t-- Nobody\n" for i in range(60)]
        (folder / topic).write_text("%\n".join(sayings))
        (folder / f"{topic}.dat").write_bytes(b"\0\1")
        (folder / f"{topic}.u8").symlink_to(folder / topic)
    data = load_text("fortunes", tmp_path)
    assert data.domains == ("art", "fortunes")
    assert len(of(data)) == 120
    assert "art says 3.\n\t\t-- Nobody\n" in of(data)
    assert load_text("fortunes+pydoc", tmp_path).domains == ("fortunes", "pydoc")


def test_fortunes_that_are_missing_say_how_to_get_them(tmp_path, monkeypatch, user_error):
    monkeypatch.setattr(text_sources, "FORTUNES_SYSTEM", tmp_path / "nowhere")
    with user_error("'fortunes' was not found", "apt-get install fortunes", "--data-dir"):
        load_text("fortunes", tmp_path)


def test_the_standard_library_is_read_without_its_tests():
    documents = [document.text for document in TEXTS["stdlib"](None).documents]
    assert len(documents) > 300
    assert any("class TestCase" in text for text in documents)
    assert not any("class RegrTest" in text or "topics = {" in text[:300] for text in documents)


def test_what_is_no_text_is_an_error_of_one_line(tmp_path, user_error):
    files = {"empty.txt": b" \n", "zeros.bin": b"abc\0def", "latin.txt": "Stra\xdfe".encode("latin-1")}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, words in (
        ("empty.txt", ["is empty"]),
        ("zeros.bin", ["is not text", "byte 3 is NUL"]),
        ("latin.txt", ["is not UTF-8 text", "byte 4 is 0xdf"]),
    ):
        with user_error(name, *words):
            read_text(tmp_path / name)
        with user_error(name, *words):
            load_text(str(tmp_path / name))
    with user_error("has no text", "empty.txt"):
        load_text(str(tmp_path))
    (tmp_path / "hollow").mkdir()
    with user_error("hollow", "has no text"):
        load_text(str(tmp_path / "hollow"))


def test_a_folder_passes_over_what_is_no_text_and_says_so(tmp_path):
    root = write_corpus(tmp_path / "texts")
    (root / "prose" / "picture.png").write_bytes(b"\x89PNG\0")
    (root / "code" / ".hidden").write_text("no")
    data = load_text(str(root))
    (note,) = data.notes
    assert "passed over" in note
    assert "picture.png" in note
    assert "no" not in of(data)


def test_unknown_names_and_too_little_text_are_errors_of_one_line(tmp_path, user_error):
    with user_error("unknown text 'pydok'", "did you mean 'pydoc'"):
        load_text("pydok")
    with user_error("unknown text 'stdlb'", "did you mean 'stdlib'"):
        load_text("pydoc+stdlb")
    with user_error("unknown text ''", "PATH", "pydoc"):
        load_text("")
    with user_error("'/no/such/path' does not exist"):
        load_text("/no/such/path")
    with user_error("names a domain twice"):
        load_text("pydoc+pydoc")
    (tmp_path / "one.txt").write_text("too short")
    with user_error("one.txt", "too few documents", "none of its 1 "):
        load_text(str(tmp_path / "one.txt"))


def test_reading_needs_no_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_text("pydoc").parts["train"]
