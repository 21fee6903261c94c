import base64
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import weightdecomp as wd
from weightdecomp import _circuit_html, _figures, _page, _report, digits
from weightdecomp._curve import FACTORS, curve
from weightdecomp._figures import Images
from weightdecomp._report import Report

HOSTILE = '<script>alert("hi")</script> & digits'


@pytest.fixture(scope="module")
def report() -> Report:
    """A quick report on few images, with a title that no page should run."""
    few = [torch.cat(digits.batches("train"))[:128]]
    config = wd.Config(steps=0, sample=128)
    decomposition = wd.decompose(digits.model(), few, tolerance=0.2, divergence="kl", config=config, progress=False)
    pixels = torch.cat(digits.batches("test"))[:64]
    verification = decomposition.verify([pixels], steps=20, restarts=1)
    images = Images(pixels, digits.labels("test")[:64], side=8)
    points = curve(decomposition, [pixels], factors=(1.0, 2.0))
    return Report(HOSTILE, decomposition, verification, [pixels], images=images, curve=points, recipe={"run": HOSTILE})


@pytest.fixture(scope="module")
def images(report: Report) -> Images:
    assert report.images is not None
    return report.images


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return _page.html(report)


class _Outline(HTMLParser):
    """Tags that are open at the end, and everything a page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_hostile_title_is_escaped(page: str):
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&quot;hi&quot;)&lt;/script&gt; &amp; digits" in page


def test_every_tag_is_closed(page: str):
    outline = _Outline()

    outline.feed(page)

    assert outline.open == []


def test_the_page_loads_nothing_from_elsewhere(page: str):
    outline = _Outline()
    outline.feed(page)

    pictures = [
        re.fullmatch(r"data:image/png;base64,(.+)", source) for source in outline.sources if not source.startswith("#")
    ]

    assert len(pictures) > 4
    assert all(one and base64.b64decode(one[1]).startswith(b"\x89PNG") for one in pictures)


def test_links_lead_to_cards_and_the_whole_page_is_small(page: str):
    outline = _Outline()
    outline.feed(page)
    places = set(re.findall(r'id="([^"]+)"', page))

    links = [source[1:] for source in outline.sources if source.startswith("#")]

    assert any(link.startswith("c") for link in links)
    assert set(links) <= places
    assert len(page) < 2_000_000


def test_fewer_active_components_do_more_damage(report: Report):
    whole, half = report.curve

    assert half.active < whole.active
    assert half.adversarial.damage > whole.adversarial.damage
    assert whole.gates.damage == pytest.approx(report.verification.gates.damage, rel=1e-4)


@pytest.mark.parametrize(
    "active",
    [
        (172.0, 161.0, 140.0, 106.0, 70.1, 34.4),
        (172e3, 161e3, 140e3, 106e3, 70.1e3, 34.4e3),
        (1.72, 1.61, 1.4, 1.06, 0.1, 0.0),
        (5.0,) * 6,
    ],
)
def test_labels_of_the_curve_never_overlap_and_the_decompositions_own_is_there(
    active: tuple[float, ...], report: Report
):
    whole = report.curve[0]
    points = [whole._replace(factor=f, active=a) for f, a in zip(FACTORS, active, strict=True)]

    figure = _figures.curve(points, report.verification)

    figure.draw_without_rendering()
    (below,) = figure.axes
    (above,) = below.child_axes
    for axis in (below, above):
        boxes = sorted(one.get_window_extent().intervalx.tolist() for one in axis.get_xticklabels())
        assert all(left[1] < right[0] for left, right in itertools.pairwise(boxes))
    named = [one.get_text() for one in above.get_xticklabels()]
    assert below.get_xticks()[named.index("x 1")] == active[3]
    assert not below.texts, "a label inside the axes may hide behind a marker"


def test_a_failed_verification_stands_above_everything_else(report: Report):
    verification = replace(report.verification, converged=False, reason="damage 0.5 exceeds 0.2")

    page = _page.html(report._replace(verification=verification))

    assert page.index("Outside the tolerance") < page.index("<ul>")
    assert page.index("damage 0.5 exceeds 0.2") < page.index("<ul>")
    assert 'class="no"' in page


def test_a_result_that_compresses_nothing_says_so_at_the_top(report: Report):
    outcome = replace(report.decomposition.outcome, compresses=False, verdict="nothing compresses: 2 bits, 1")
    decomposition = _with_outcome(report.decomposition, outcome)

    found = _report.problems(report._replace(decomposition=decomposition))

    assert "The run's verdict: nothing compresses: 2 bits, 1." in found


def test_a_run_that_did_not_converge_says_so(report: Report):
    outcome = replace(report.decomposition.outcome, converged=False, reason="0.9 is too much")
    decomposition = _with_outcome(report.decomposition, outcome)

    found = _report.problems(report._replace(decomposition=decomposition))

    assert "The run did not converge: 0.9 is too much." in found


def test_nothing_is_wrong_where_all_went_well(report: Report):
    outcome = replace(report.decomposition.outcome, converged=True, compresses=True)
    verification = replace(report.verification, converged=True)
    decomposition = _with_outcome(report.decomposition, outcome)

    found = _report.problems(report._replace(decomposition=decomposition, verification=verification))

    assert found == []


def test_the_active_components_are_named_with_the_verifications_own_number(report: Report):
    active = sum(site.active for site in report.verification.sites)

    said = " ".join(_report.findings(report))

    assert f"{active:.1f} components are active on a mean row (an input, or a position of one) of the 64" in said


def test_the_markdown_title_stays_one_line(report: Report):
    text = _report.markdown(report._replace(title="two\nlines"))

    assert text.startswith("# two lines\n")


def test_activity_by_class_is_a_share_of_that_class():
    images = Images(torch.zeros(4, 1), torch.tensor([0, 0, 2, 2]), side=1)

    share = images.by_class(torch.tensor([True, False, True, True]))

    assert share.tolist() == [0.5, 0.0, 1.0]


def test_a_circuit_is_active_where_any_member_is(report: Report, images: Images):
    active = _figures.active_circuits(report.decomposition, images)

    importances = report.decomposition.importances(images.pixels)
    circuit = max(report.decomposition.circuits, key=lambda one: len(one.members))
    expected = sum(importances[path][:, index] for path, index in circuit.members)
    assert torch.equal(active[report.decomposition.circuits.index(circuit)], torch.as_tensor(expected) > 0)


def test_activity_that_follows_the_class_tells_most_about_it():
    labels = torch.arange(10).repeat(4)
    images = Images(torch.zeros(40, 1), labels, side=1)

    follows, constant = (
        _circuit_html._told_about_class(labels == 3, images),
        _circuit_html._told_about_class(labels < 99, images),
    )

    assert constant == pytest.approx(0, abs=1e-12)
    assert follows == pytest.approx(0.1 * torch.log(torch.tensor(10.0)).item() + 0.9 * 0.105360516, abs=1e-6)


def test_what_a_component_reads_is_free_of_its_gauge(report: Report, images: Images):
    component = report.decomposition.component("layers.0", 0)
    scaled = replace(component, left=-3 * component.left, right=component.right / -3)

    one = _figures._reading(report.decomposition, component, images)
    other = _figures._reading(report.decomposition, scaled, images)

    torch.testing.assert_close(one.direction.abs(), other.direction.abs())


def _with_outcome(decomposition: wd.Decomposition, outcome: object) -> wd.Decomposition:
    twin = object.__new__(wd.Decomposition)
    twin.__dict__.update(decomposition.__dict__, outcome=outcome)
    return twin
