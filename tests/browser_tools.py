"""Short ways to ask a browser about a page."""

from __future__ import annotations

BLANK_CANVASES = """
return [...document.querySelectorAll("main canvas")].filter((canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const first = data.slice(0, 4).join();
  for (let i = 4; i < data.length; i += 4) if (data.slice(i, i + 4).join() !== first) return false;
  return true;
}).map((canvas) => canvas.outerHTML)"""


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
