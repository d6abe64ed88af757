"""A headless browser, and short ways to ask it about a page."""

from __future__ import annotations

import shutil

FLAGS = ("--no-sandbox", "--headless=new", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,1400")
BLANK_CANVASES = """
return [...document.querySelectorAll("main canvas")].filter((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const first = data.slice(0, 4).join();
  for (let i = 4; i < data.length; i += 4) if (data.slice(i, i + 4).join() !== first) return false;
  return true;
}).map((canvas) => canvas.outerHTML)"""


def start_chromium():
    """Chromium with its console and traffic in logs; None where it or its driver is not installed."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        return None
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = program
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Chrome(options=options, service=ChromeService(driver))


def look(browser, width, *, dark=False, height=1000, scale=1):
    """Show pages so wide, light or dark; ``scale``: dots a pixel."""
    features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def errors(browser):
    return [line for line in browser.get_log("browser") if line["level"] != "DEBUG"]


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


def one(browser, selector):
    return browser.find_element("css selector", selector)


def choose(browser, selector, value):
    browser.execute_script(
        "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))",
        one(browser, selector),
        value,
    )


def press(browser, key):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(key).perform()


def column(page, selector, index):
    rows = "[...document.querySelector(arguments[0]).tBodies[0].rows]"
    return page.execute_script(f"return {rows}.map((row) => row.cells[arguments[1]].dataset.value)", selector, index)
