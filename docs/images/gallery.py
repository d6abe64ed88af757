"""Makes the pictures of docs/gallery.md anew: runs the page's commands in a folder, then takes what they drew.

python docs/images/gallery.py FOLDER

Parts of reports are photographed by headless Chromium (extra ``dev``; apt-get install chromium chromium-driver).
"""

from __future__ import annotations

import base64
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from browser_tools import look, one, start_chromium  # noqa: E402

DRAWN = {"comparison.svg": "runs/demo/comparison.svg", "restored.png": "runs/scenes/restored.png"}
"""Pictures that a command writes."""
PARTS = {
    "load.png": ("runs/loads.html", "#load", 640, 700),
    "report.png": ("runs/prototype-look/report.html", "#summary", 900, 700),
    "text.png": ("runs/language-look/report.html", "#text", 700, 680),
    "patches.png": ("runs/emoe-vit-look/report.html", "#examples", 900, 920),
    "receipt.png": ("runs/receipt.html", "#receipts", 700, 900),
}
"""Parts of reports: the page, the part, the width of the page, and how many pixels of the part at most."""


def main(folder: Path) -> None:
    """Run, then copy and photograph."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "examples", folder / "examples", dirs_exist_ok=True)
    shutil.copytree(ROOT / "docs" / "images", folder / "docs" / "images", dirs_exist_ok=True)
    for command in page_commands():
        print("$", command, flush=True)
        subprocess.run(words_of(command, folder), cwd=folder, check=True)
    take(folder)


def page_commands() -> list[str]:
    """The commands of the page, in its order."""
    found = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in found for line in block.replace("\\\n", " ").splitlines()]


def words_of(command: str, folder: Path) -> list[str]:
    """The command by this interpreter; of a sample to correct that is right on this machine, the first wrong one."""
    program, *words = shlex.split(command, comments=True)
    wrong = [int(re.search(r"\d+", path.name)[0]) for path in (folder / "runs" / "wrong").glob("*.png")]
    if "--sample" in words and wrong:
        place = words.index("--sample") + 1
        if int(words[place].removeprefix("test:")) not in wrong:
            words[place] = f"test:{min(wrong)}"
    return [sys.executable, *(("-m", program) if program == "spectralmoe" else ()), *words]


def take(folder: Path) -> None:
    """Copy what was drawn, and photograph the parts of reports."""
    for name, source in DRAWN.items():
        shutil.copyfile(folder / source, ROOT / "docs" / "images" / name)
    for name, (page, part, width, height) in PARTS.items():
        browser = start_chromium()  # anew for each: of several pictures from one, a later one may be cut
        if browser is None:
            raise SystemExit("parts of reports need Chromium: apt-get install chromium chromium-driver")
        look(browser, width, scale=1.5)
        browser.get((folder / page).absolute().as_uri())
        box = one(browser, part).rect
        clip = {"x": 0, "y": box["y"], "width": width, "height": min(box["height"], height), "scale": 1}
        options = {"format": "png", "clip": clip, "captureBeyondViewport": True}
        picture = browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"]
        browser.quit()
        (ROOT / "docs" / "images" / name).write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
