"""`python -m weightdecomp report`: any saved decomposition as one page, in a browser without a network."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import graphs
import weightdecomp as wd
from tests import browser
from tests.browser import Browser
from tests.graph_models import decomposed_exactly, relu_batches, relu_net
from weightdecomp import digits
from weightdecomp.__main__ import main
from weightdecomp.engine import batch_digest

HOSTILE = '</script><img src=x onerror="document.title=1">'
MODEL = ["--model", "tests.graph_models:relu_net", "--data", "tests.graph_models:relu_batches"]
QUICK = ["--steps", "20", "--no-progress"]
needs_browser = pytest.mark.skipif(
    browser.executable() is None, reason=f"no browser is installed (none of {', '.join(browser.NAMES)})"
)


def few_digits() -> list[torch.Tensor]:
    return [digits.batches("test")[0][:64]]


def few_labels() -> torch.Tensor:
    return digits.labels("test")[:64]


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    decomposed_exactly(relu_net(), relu_batches()[0], closed=0.3).save(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a quick decomposition of the digits."""
    folder = tmp_path_factory.mktemp("digits")
    config = wd.Config(steps=0, sample=128)
    few = [torch.cat(digits.batches("train"))[:128]]
    wd.decompose(digits.model(), few, tolerance=0.3, divergence="kl", config=config, progress=False).save(folder)
    own = ["--model", "weightdecomp.digits:model", "--data", "tests.test_report_command:few_digits"]
    shown = ["--side", "8", "--labels", "tests.test_report_command:few_labels", "--title", HOSTILE]
    assert main(["report", str(folder), *own, *shown, "--edges", "100", *QUICK]) in (0, 1)
    return folder / "report.html"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a language model, its decomposition, and their report."""
    pytest.importorskip("transformers")
    from tests.hf_models import saved

    folder = tmp_path_factory.mktemp("texts")
    saved("llama, grouped queries, tied", folder / "model")
    ids = np.random.default_rng(0).integers(3, 61, (16, 8))
    np.save(folder / "ids.npy", ids)
    (folder / "pieces.json").write_text(json.dumps({i: f" w{i}" for i in range(50)} | {50: HOSTILE}))
    config = wd.Config(steps=0, sample=16)
    sites = ["model.layers.1.mlp.down_proj"]
    model, batches = wd.load_hf(folder / "model"), [torch.from_numpy(ids)]
    wd.decompose(model, batches, sites=sites, tolerance=0.5, config=config, progress=False).save(folder / "run")
    assert main(["report", str(folder / "run"), *_language(folder), "--input", "2", *QUICK]) in (0, 1)
    return folder


def _language(folder: Path) -> list[str]:
    own = ["--hf", str(folder / "model"), "--tokens", str(folder / "ids.npy")]
    return [*own, "--vocabulary", str(folder / "pieces.json")]


def test_a_model_without_pictures_or_tokens_has_a_report(saved: Path, capsys: pytest.CaptureFixture[str]):
    code = main(["report", str(saved), *MODEL, *QUICK, "--json", "--out", str(saved.parent / "pages")])

    document = json.loads(capsys.readouterr().out)
    page = (saved.parent / "pages" / "report.html").read_text()
    assert code in (0, 1)
    assert document["report"] == str(saved.parent / "pages" / "report.html")
    assert document["verification"]["n_inputs"] == 12
    assert "Circuit graph" in page
    assert wd.load(saved, relu_net()).tolerance


def test_a_comparison_is_made_where_it_is_asked_for(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("weightdecomp.__main__._rivals", lambda: ["pca"])

    main(["report", str(saved), *MODEL, *QUICK, "--compare"])

    assert "Beside other methods" in (saved / "report.html").read_text()
    assert "weight decomposition" in (saved / "report.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--side", "8"], "--side and --labels go together"),
        (["--side", "8", "--labels", "tests.test_report_command:few_labels"], "expected inputs of shape (input, 64)"),
        (["--labels", "tests.test_report_command:few_digits", "--side", "2"], "expected"),
        (["--vocabulary", "x.json"], "--vocabulary: the inputs are no token ids"),
        (["--input", "12"], "there is no input 12"),
        (["--out", f"{__file__}/report"], f"'{__file__}' is a file, expected a directory"),
    ],
)
def test_mistakes_are_named_before_any_attack(
    words: list[str], message: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("weightdecomp.__main__._verified", lambda *_: pytest.fail("it attacked"))

    code = main(["report", str(saved), *MODEL, *QUICK, *words])

    assert code == 2
    assert message in capsys.readouterr().err
    assert not (saved / "report.html").exists()


def test_heading_and_recipe_name_the_class_and_the_directory_of_a_checkpoint(texts: Path):
    told = (texts / "run" / "report.md").read_text()

    assert told.startswith("# LlamaForCausalLM of model, decomposed")
    assert "\nmodel: LlamaForCausalLM of model\n" in told


def test_the_recipe_tells_what_the_run_was_made_from(texts: Path):
    told = dict(line.split(": ", 1) for line in (texts / "run" / "report.md").read_text().splitlines() if ": " in line)
    ids = torch.from_numpy(np.load(texts / "ids.npy"))

    assert told["seed of the run"] == "0"
    assert told["inputs of the run"] == f"16, sha256 {batch_digest([ids])}"
    assert told["version of the run"] == version("weightdecomp")


def test_the_recipe_tells_versions_and_every_flag_that_was_given(saved: Path):
    main(["report", str(saved), *MODEL, *QUICK, "--input", "0", "--seed", "0"])

    told = dict(line.split(": ", 1) for line in (saved / "report.md").read_text().splitlines() if ": " in line)
    assert {"input 0", "seed 0", "steps 20", "no_progress True"} <= set(told["report"].split(", "))
    assert not {"json False", "compare False", "title None"} & set(told["report"].split(", "))
    assert told["weightdecomp"] == version("weightdecomp")
    assert told["torch"] == torch.__version__


def test_graphs_of_a_language_model_name_its_tokens(texts: Path):
    out = texts / "one.json"

    code = main(["graph", str(texts / "run"), *_language(texts), "--input", "2", "--out", str(out), "--no-progress"])

    graph, ids = graphs.read(out), np.load(texts / "ids.npy")[2]
    titles = {data["position"]: data["title"] for _, data in graph.nodes(data=True) if data["kind"] == "input"}
    assert code == 0
    assert titles
    for position, title in titles.items():
        assert title == {50: HOSTILE}.get(
            ids[position], f" w{ids[position]}" if ids[position] < 50 else f"[{ids[position]}]"
        )
    outputs = [data for _, data in graph.nodes(data=True) if data["kind"] == "output"]
    assert all(data["title"] != f"output/{data['index']}" for data in outputs)


def test_cards_of_a_language_model_show_texts_and_promoted_tokens(texts: Path):
    page = (texts / "run" / "report.html").read_text()

    cards = re.findall(r"<article.*?</article>", page, re.DOTALL)

    assert cards
    assert any(re.search(r'class="t5 peak"> w\d+<', card) for card in cards)
    assert any(re.search(r"promotes .*?<code> w\d+</code>", card) for card in cards)
    assert "Circuit graph of input 2" in page


def test_the_policy_allows_the_scripts_and_styles_of_the_page_and_its_frames_alone(texts: Path):
    page = (texts / "run" / "report.html").read_text()
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[0]
    frames = [html.unescape(one) for one in re.findall(r'srcdoc="([^"]*)"', page)]

    for kind in ("style", "script"):
        texts_of = [text for one in (page, *frames) for text in re.findall(f"<{kind}>(.*?)</{kind}>", one, re.DOTALL)]
        hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts_of}
        assert set(re.findall(f"{kind}-src ([^;]*)", policy)[0].split()) == {f"'sha256-{one}'" for one in hashes}
    assert len(frames) == 2
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


# ---------------------------------------------------------------- in a browser


@needs_browser
def test_the_page_opens_alone_and_hostile_names_stay_text(window: Browser, pictures: Path, texts: Path):
    for page in (pictures, texts / "run" / "report.html"):
        window.open(page)

        assert window.errors == []
        assert window.refusals == []
        assert [one for one in window.requests if not one.startswith(("file:", "data:", "about:"))] == []
        assert window.run("document.title") != "1"
        assert window.run("document.querySelectorAll('img[onerror]').length") == 0
        assert page.stat().st_size < 2_000_000


@needs_browser
@pytest.mark.parametrize("width", [1400, 390, 320])
def test_nothing_is_wider_than_the_window(width: int, window: Browser, pictures: Path, texts: Path):
    window.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    wide = []
    for page in (pictures, texts / "run" / "report.html"):
        window.open(page)
        window.run("document.querySelectorAll('details').forEach(e => e.open = true)")
        # As of a real vocabulary, where tokens begin with spaces, and some are long.
        window.run("document.querySelectorAll('code').forEach((e, i) => e.textContent = ' ' + 'w'.repeat(2 + i % 60))")
        wide.append(window.run("document.documentElement.scrollWidth - innerWidth"))
    window.ask("Emulation.clearDeviceMetricsOverride")

    assert max(wide) <= 0


@needs_browser
@pytest.mark.parametrize(("scheme", "bright"), [("light", True), ("dark", False)])
def test_plots_are_as_bright_as_the_page(scheme: str, bright: bool, window: Browser, pictures: Path, tmp_path: Path):
    window.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    window.open(pictures)
    window.run("document.querySelector('figure').scrollIntoView()")

    window.screenshot(tmp_path / "window.png")

    assert (imread(tmp_path / "window.png")[..., :3].mean() > 0.5) == bright


@needs_browser
def test_finding_leaves_the_cards_with_every_word(window: Browser, pictures: Path):
    window.open(pictures)
    window.run("document.getElementById('find').focus()")

    window.write("layers.1 circuit")

    shown = window.run("[...document.querySelectorAll('.card:not([hidden]) h4')].map(e => e.textContent)")
    assert shown
    assert all(one.startswith("layers.1 ") for one in shown)
    n = window.run("document.querySelectorAll('.card').length")
    assert window.text("#found") == f"{len(shown)} of {n} cards"
    assert window.run(_OPEN) == [False, True, False]


@needs_browser
def test_finding_a_number_leaves_the_components_of_that_number(window: Browser, pictures: Path):
    window.open(pictures)
    window.run("document.getElementById('find').focus()")

    window.write("layers.1 7")

    assert window.run("[...document.querySelectorAll('.card:not([hidden]) h4')].map(e => e.textContent)") == [
        "layers.1 7"
    ]


@needs_browser
def test_sites_are_as_they_were_when_a_search_ends(window: Browser, pictures: Path):
    window.open(pictures)
    window.run("document.querySelectorAll('details.site')[2].open = true")
    before = window.run(_OPEN)
    window.run("document.getElementById('find').focus()")

    window.write("no such word")
    during = window.run(_OPEN)
    window.run("document.execCommand('selectAll')")
    window.run("document.execCommand('delete')")

    assert before == [True, False, True]
    assert during == [False, False, False]
    assert window.run(_OPEN) == before
    assert window.run("document.querySelectorAll('.card[hidden]').length") == 0


@needs_browser
def test_a_link_shows_the_heading_of_a_card_that_is_higher_than_the_window(window: Browser, texts: Path):
    window.open(texts / "run" / "report.html")
    window.ask("Emulation.setDeviceMetricsOverride", width=1400, height=200, deviceScaleFactor=1, mobile=False)

    window.run("document.querySelector('.circuits a').focus()")
    window.press("Enter")
    card, heading = (f"document.activeElement{place}" for place in ("", ".querySelector('h4')"))
    higher = window.run(f"{card}.offsetHeight > innerHeight")
    top, bottom = (window.run(f"{heading}.getBoundingClientRect().{end}") for end in ("top", "bottom"))
    window.ask("Emulation.clearDeviceMetricsOverride")

    assert higher
    assert 0 <= top < bottom <= 200


@needs_browser
def test_the_contents_lead_to_their_sections(window: Browser, pictures: Path):
    window.open(pictures)

    window.run("document.querySelector('nav a:last-child').focus()")
    window.press("Enter")

    assert window.run("location.hash") == "#" + window.run("document.querySelector('section:last-of-type').id")
    assert window.errors == []


@needs_browser
def test_the_keyboard_leads_from_a_circuit_to_its_card(window: Browser, pictures: Path):
    window.open(pictures)
    window.run("document.querySelector('.circuits a[href^=\"#c2-\"]').focus()")

    window.press("Enter")

    target = window.run("location.hash.slice(1)")
    assert target.startswith("c2-")
    assert window.run("document.activeElement.id") == target
    assert window.run("document.activeElement.closest('details').open")


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(scheme: str, window: Browser, pictures: Path):
    window.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    window.open(pictures)

    for selector in ("body", ".note", ".card", "a", "code", "pre", ".no, .yes"):
        assert window.run(_CONTRAST % json.dumps(selector)) >= 4.5, selector


_OPEN = "[...document.querySelectorAll('details.site')].map(e => e.open)"

# Contrast of WCAG 2: the text's colour on what lies under it, translucent layers mixed.
_CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const mix = (a, b) => a.slice(0, 3).map((x, i) => x * (a[3] ?? 1) + b[i] * (1 - (a[3] ?? 1)));
  const light = (c) => c.map((x) => x / 255).map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const e = document.querySelector(%s), layers = [];
  for (let one = e; one; one = one.parentElement) layers.push(parse(getComputedStyle(one).backgroundColor));
  const under = layers.reverse().reduce((below, layer) => mix(layer, below), [255, 255, 255]);
  const [a, b] = [light(parse(getComputedStyle(e).color)), light(under)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
})()"""
