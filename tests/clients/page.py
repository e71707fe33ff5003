"""The page in a headless Chromium: python page.py URL FOLDER. Screenshots go to FOLDER."""

import pathlib
import shutil
import sys
import time

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

url, folder = sys.argv[1], pathlib.Path(sys.argv[2])
options = webdriver.ChromeOptions()
for argument in ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1100,800", "--no-proxy-server"]:
    options.add_argument(argument)
options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def wait(condition, seconds=20):
    return WebDriverWait(driver, seconds, poll_frequency=0.02).until(lambda _: condition())


def one(selector):
    return driver.find_element(By.CSS_SELECTOR, selector)


def emulate(width, height, scheme):
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    time.sleep(0.2)


try:
    driver.get(url)
    wait(lambda: " on " in one("#model").text)

    # By keyboard alone: the field has the focus, Enter sends.
    assert driver.switch_to.active_element == one("#prompt")
    driver.switch_to.active_element.send_keys("Write a long story about a frog and a pond.", Keys.ENTER)
    lengths = []
    def growing():
        text = driver.execute_script("return document.querySelector('.assistant')?.textContent ?? ''")
        if text and (not lengths or len(text) != lengths[-1]):
            lengths.append(len(text))
        return len(lengths) >= 8
    wait(growing)
    assert lengths == sorted(lengths), lengths
    wait(lambda: "tokens/s" in one("#status").text)
    assert "running" in one("#status").text
    driver.save_screenshot(str(folder / "streaming.png"))

    # Escape stops it: the worker says so, and nothing comes any more.
    assert one("#stop").is_enabled()
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait(lambda: "stopped" in one("#status").text, 5)
    length = len(one(".assistant").text)
    time.sleep(0.5)
    assert len(one(".assistant").text) == length
    assert one("#send").is_enabled() and not one("#stop").is_enabled()

    # The button stops too.
    one("#prompt").send_keys("Go on with the story, please.", Keys.ENTER)
    wait(lambda: len(driver.find_elements(By.CSS_SELECTOR, ".assistant")) == 2 and driver.find_elements(By.CSS_SELECTOR, ".assistant")[1].text)
    one("#stop").click()
    wait(lambda: "stopped" in one("#status").text, 5)

    # The same seed gives the same answer; a setting that is wrong is said.
    one("#settings summary").click()
    one("#seed").send_keys("7")
    one("#max_tokens").send_keys("12")
    answers = []
    for _ in range(2):
        one("#clear").click()
        one("#prompt").send_keys("Name a bird.", Keys.ENTER)
        wait(lambda: "seed 7" in one("#status").text)
        answers.append(one(".assistant").text)
        driver.execute_script("document.getElementById('status').textContent = ''")
    assert answers[0] == answers[1] and answers[0]
    one("#temperature").clear()
    one("#temperature").send_keys("9")
    one("#prompt").send_keys("x", Keys.ENTER)
    wait(lambda: driver.find_elements(By.CSS_SELECTOR, ".error"))
    assert "temperature" in one(".error").text
    one("#temperature").clear()
    one("#temperature").send_keys("0.8")
    one("#settings summary").click()

    # The haiku, and the model's card.
    one("#clear").click()
    one("#haiku").click()
    wait(lambda: "seed" in one("#status").text)
    assert one(".haiku").text.strip()
    one("#card summary").click()
    assert "qwen2" in one("#facts").text
    driver.save_screenshot(str(folder / "haiku-light.png"))
    one("#card summary").click()

    # Phone width, dark and light: nothing sticks out, with the settings open too.
    for scheme, expected in [("dark", "rgb(22, 24, 27)"), ("light", "rgb(250, 248, 244)")]:
        emulate(360, 640, scheme)
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert background == expected, background
        for name in [f"phone-{scheme}", f"phone-{scheme}-settings"]:
            assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
            for selector in ["#prompt", "#send", "#clear"]:
                box = driver.execute_script("return arguments[0].getBoundingClientRect().toJSON()", one(selector))
                assert 0 <= box["top"] and box["bottom"] <= 640 and 0 <= box["left"] and box["right"] <= 360, (selector, box)
            driver.save_screenshot(str(folder / f"{name}.png"))
            one("#settings summary").click()

    # No request went anywhere else, and the console is clean (the refused request apart).
    import json
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked = message["params"]["request"]["url"]
            assert asked.startswith((url, "data:", "about:", "chrome:")), asked
    for entry in driver.get_log("browser"):
        assert entry["level"] in ("DEBUG", "INFO") or "status of 400" in entry["message"], entry
    print("passed")
finally:
    driver.quit()
