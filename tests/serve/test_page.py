"""The playground in a real Chromium: what a person sees, with a mouse, a keyboard, a narrow screen and a key."""

import re
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest

from dlp_lora import Engine
from server_process import ServerProcess, start
from serving import double_engine

pytestmark = pytest.mark.clients
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-quic", "--disable-background-networking", "--disable-component-update")
KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server(lively_adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with start(lively_adapters, tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture
def page(browser: Any, server: ServerProcess) -> Iterator[Any]:
    """The playground; whatever it logs as an error, a refusal of the security policy included, fails the test."""
    with_errors: list[str] = []
    context = browser.new_context()
    tab = context.new_page()
    tab.on("console", lambda message: with_errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: with_errors.append(str(error)))
    tab.goto(server.address)
    yield tab
    context.close()
    assert with_errors == []


@pytest.fixture(scope="module")
def engine(lively_adapters: Path) -> Engine:
    return double_engine(lively_adapters)


def ask(page: Any, text: str, *, tokens: int = 24) -> None:
    page.get_by_label("Tokens").fill(str(tokens))
    page.get_by_label("Prompt").fill(text)
    page.get_by_role("button", name="Send").click()
    page.locator(".note", has_text="tokens/s").first.wait_for()


def test_text_is_coloured_by_adapter_with_a_label_beside_each_colour(page: Any, engine: Engine) -> None:
    ask(page, "Tell me a tale")
    alone = engine.generate([{"role": "user", "content": "Tell me a tale"}], max_new_tokens=24)
    assert page.locator(".assistant .text").all_text_contents() == [s.text for s in alone.trace]
    labels = page.locator(".assistant .said .label")
    assert labels.count() >= 1
    for i in range(labels.count()):
        colour = re.search(r"c(\d+|base)", labels.nth(i).get_attribute("class"))
        assert colour is not None
    heaviest = [next(iter(sentence.mixture)) for sentence in alone.trace]
    colours = [f"text c{engine.bank.names.index(name)}" for name in heaviest]
    assert [text.get_attribute("class") for text in page.locator(".assistant .text").all()] == colours


def test_each_sentence_says_its_weights_probabilities_and_cost(page: Any, engine: Engine) -> None:
    ask(page, "Tell me a tale")
    page.get_by_text("How it was routed").click()
    rows = page.locator(".routing li")
    alone = engine.generate([{"role": "user", "content": "Tell me a tale"}], max_new_tokens=24)
    assert rows.count() == len(alone.trace)
    for i, sentence in enumerate(alone.trace):
        text = rows.nth(i).inner_text()
        assert all(name in text for name in sentence.probabilities)
        assert "weight" in text
        assert "route" in text
        assert "fuse" in text
        assert ("switched here" in text) == sentence.switched
        assert ("encode the context again" in text) == sentence.switched


def test_the_same_prompt_is_answered_by_the_base_and_by_a_mixture(page: Any, engine: Engine) -> None:
    messages = [{"role": "user", "content": "Tell me a tale"}]
    assert page.get_by_role("textbox", name="Mixture").is_hidden()
    for choice, mixture in [("the base model", {}), ("a mixture", {"math": 0.6, "units": 0.4})]:
        page.get_by_role("button", name="New chat").click()
        page.get_by_label("Next to").select_option(label=choice)
        if mixture:
            page.get_by_role("textbox", name="Mixture").fill("math=0.6,units=0.4")
        ask(page, "Tell me a tale")
        page.locator(".answer").nth(1).locator(".note", has_text="tokens/s").first.wait_for()
        said = page.locator(".answer").nth(1).locator(".text").all_text_contents()
        assert "".join(said) == engine.generate(messages, max_new_tokens=24, mixture=mixture).text
        assert page.locator(".answer").nth(1).get_by_text("fixed: no router was asked").count() >= 1


def test_adapters_are_listed_with_what_they_have_answered(page: Any, engine: Engine) -> None:
    listed = page.locator("#adapters > li")
    listed.nth(len(engine.bank.names)).wait_for()
    assert listed.locator(".label").all_inner_texts() == ["base", *engine.bank.names]
    ask(page, "Tell me a tale")
    alone = engine.generate([{"role": "user", "content": "Tell me a tale"}], max_new_tokens=24)
    for i, name in enumerate(engine.bank.names, 1):
        count = sum(name in sentence.mixture for sentence in alone.trace)
        assert f"{count} sentence" in listed.nth(i).inner_text()


def test_a_chat_survives_a_reload_and_goes_on(page: Any, engine: Engine) -> None:
    ask(page, "Tell me a tale")
    before = page.locator(".assistant .text").all_text_contents()
    page.reload()
    page.locator(".assistant .text").first.wait_for()
    assert page.locator(".assistant .text").all_text_contents() == before
    page.get_by_label("Prompt").fill("And then?")
    page.get_by_label("Tokens").fill("8")
    page.get_by_role("button", name="Send").click()
    page.locator(".answer").nth(1).locator(".note", has_text="tokens/s").first.wait_for()
    messages = [
        {"role": "user", "content": "Tell me a tale"},
        {"role": "assistant", "content": "".join(before)},
        {"role": "user", "content": "And then?"},
    ]
    said = "".join(page.locator(".answer").nth(1).locator(".text").all_text_contents())
    assert said == engine.generate(messages, max_new_tokens=8).text


def test_the_keyboard_is_enough(page: Any) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skips to the prompt
    page.keyboard.type("Tell me a tale")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("of two lines")
    page.keyboard.press("Enter")
    page.locator(".note", has_text="tokens/s").first.wait_for()
    assert page.locator(".user .said").inner_text() == "Tell me a tale\nof two lines"
    assert page.evaluate("document.activeElement.id") == "prompt"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_it_fits_narrow_screens_and_both_colour_schemes(page: Any, scheme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    page.emulate_media(color_scheme=scheme)
    page.get_by_label("Next to").select_option(label="the base model")
    ask(page, "Tell me a tale " + "andanotherone" * 20)
    page.get_by_text("How it was routed").first.click()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    pairs = page.evaluate(CONTRAST)
    assert pairs
    assert min(ratio for _, ratio in pairs) >= 4.5, sorted(pairs, key=lambda pair: pair[1])[:3]


def test_a_key_is_asked_for_and_stays_out_of_the_address(browser: Any, lively_adapters: Path, tmp_path: Path) -> None:
    with start(lively_adapters, tmp_path, keys={KEY: ["math"]}) as server:
        page = browser.new_page()
        page.goto(server.address)
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use it").click()
        page.get_by_role("alert").get_by_text("The key is wrong.").wait_for()
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use it").click()
        page.locator("#adapters > li").nth(1).wait_for()
        assert page.locator("#adapters > li").count() == 2  # base and what the key may use
        ask(page, "Tell me a tale")
        assert page.url == f"{server.address}/"
        page.close()
        assert KEY not in server.log_path.read_text()


def test_an_answer_is_stopped_and_its_row_freed(browser: Any, lively_adapters: Path, tmp_path: Path) -> None:
    with start(lively_adapters, tmp_path, slow_s=0.1) as server:
        page = browser.new_page()
        page.goto(server.address)
        page.get_by_label("Tokens").fill("400")
        page.get_by_label("Prompt").fill("Tell me a tale")
        page.get_by_role("button", name="Send").click()
        page.locator(".assistant .text").first.wait_for()
        page.get_by_role("button", name="Stop").click()
        page.locator(".note", has_text="stopped").first.wait_for()
        page.close()
        server.wait_until_idle()


def test_the_api_is_described_without_the_network(browser: Any, server: ServerProcess) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.address}/docs")
    page.get_by_text("/v1/load_lora_adapter", exact=True).first.wait_for()
    assert page.locator("details[open] summary").first.inner_text() == "ChatRequest"  # a body's fields are shown
    assert all(url.startswith(server.address) for url in asked)
    page.close()


# Text against what lies behind it, as WCAG 2 counts it.
CONTRAST = """
() => {
  const light = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((x) => {
      x /= 255; return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(c)) return c;
    }
    return getComputedStyle(document.body).backgroundColor;
  };
  const found = [];
  for (const e of document.querySelectorAll("main *, header *")) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    found.push([`${e.tagName} ${e.className}: ${e.textContent.slice(0, 30)}`, (a + 0.05) / (b + 0.05)]);
  }
  return found;
}
"""
