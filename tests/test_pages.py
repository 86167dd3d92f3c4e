"""The frame of pages and their curves: whole, in two languages, safe against whatever text is put into them."""

import json
import math
import re

import pytest
from pages import Page, problems

from trimtab.report.page import Html, Mark, Series, Words, curve, frame, html, number, say, section
from trimtab.report.page.scale import Scale, fitting, smoothed, spread, thinned, thinned_band

HOSTILE = [
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "\" onload='alert(1)' x=\"",
    "</title></svg></figure></span></section>",
    "a\x00b\x1b[31mc\x85d\ud800e\ufffff",
    "right \u202eto left\u202c and \u2066isolated\u2069, \u200f\u061c\ufeff",
    "{name} {0} {__class__} %s",
    "]]> <!-- &lt; &#0; &bogus;",
    "long" * 5000,
]
LOSS = Words("Loss", "损失")


def page_of(*content):
    return frame(Words("A page", "一个页面"), section("all", LOSS, *content))


def falling(steps, name=LOSS, **more):
    return Series(name, [(n, 2.0 * 0.99**n) for n in range(1, steps + 1)], **more)


def test_a_page_is_whole():
    band = [(n, y * 0.9, y * 1.1) for n, y in falling(20).points]
    figure = curve(
        "loss",
        LOSS,
        [falling(20, band=band, mark=Mark(20, 1.6, Words("Best", "最佳"))), falling(300, "raw", raw=falling(300).points)],
    )
    text = page_of(figure, html("<p>{words}</p>", words=say(Words("{n} steps", "{n} 步"), n=3)))
    assert problems(text) == []
    assert "<path" in figure
    assert figure.count("<circle") == 20 + 2  # each point; the best one's ring, and that of the legend
    assert "3 步" in text


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_gets_out_of_its_place(text):
    innocent = page_of(
        curve("c", "x", [falling(9, "x"), falling(9, "x")]), html("<p>{a}</p>", a="x"), say(Words("{v}", "{v}"), v="x")
    )
    hostile = page_of(
        curve("c", text, [falling(9, text), falling(9, text)]), html("<p>{a}</p>", a=text), say(Words("{v}", "{v}"), v=text)
    )
    assert problems(hostile) == []
    assert re.findall(r"<[a-z]+", hostile) == re.findall(r"<[a-z]+", innocent)
    hostile.encode()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("</p>", "", 1), "within"),
        (lambda text: text.replace("</p>", "<script>alert(1)</script></p>", 1), "policy"),
        (lambda text: text.replace("</p>", "<img></p>", 1), "no page of ours"),
        (lambda text: text.replace("<p>", '<p onclick="x">', 1), "no page of ours"),
        (lambda text: text.replace("<p>", '<p id="all">', 1), "two elements"),
        (lambda text: text.replace("<p>", '<p aria-labelledby="none">', 1), "nothing has the id"),
        (lambda text: text.replace('class="zh"', 'class="en"', 1), "in one language"),
        (lambda text: text.replace("损失", "", 1), "an empty text"),
        (lambda text: text.replace("default-src 'none'", "default-src *", 1), "lets something"),
        (lambda text: text.replace("--text: #1d2733", "--text: red", 1), "know the page's style"),
        (lambda text: text.replace("<p>", "<p>\u202e", 1), "unseen"),
        (lambda text: text.replace("<p>", '<p><a href="https://example.org">x</a>', 1), "leads out"),
        (lambda text: text.replace("<p>", "<p>" + "x" * 500_000, 1), "bytes"),
    ],
)
def test_it_notices_a_broken_page(change, expected):
    text = page_of(html("<p>text</p>"))
    assert problems(text) == []
    assert any(expected in problem for problem in problems(change(text))), problems(change(text))


def test_words_that_lack_a_language_are_an_error():
    with pytest.raises(TypeError):
        Words("only one")
    with pytest.raises(KeyError):
        say(Words("{count} steps", "{number} 步"), count=3)


def test_thousands_of_steps_keep_their_extremes_and_stay_small():
    noisy = [(n, 1.0 + math.sin(n * 1.7)) for n in range(1, 50_001)]
    noisy[12_345], noisy[40_000] = (12_346, 99.0), (40_001, -5.0)
    thin = thinned(noisy)
    assert len(thin) <= 600
    assert (12_346, 99.0) in thin
    assert (40_001, -5.0) in thin
    assert thin[0] == noisy[0]
    assert thin[-1] == noisy[-1]
    assert thin == sorted(thin)
    assert thinned(noisy[:600]) == noisy[:600]
    band = thinned_band([(x, y - 1, y + 1) for x, y in noisy])
    assert len(band) <= 300
    assert max(high for *_, high in band) == 100.0
    assert min(low for _, low, _ in band) == -6.0
    assert len(curve("c", LOSS, [Series(LOSS, smoothed(noisy), raw=noisy)])) < 30_000


def test_a_smoothed_series_is_a_mean_of_its_neighbours():
    points = [(n, float(n % 2)) for n in range(100)]
    assert [x for x, _ in smoothed(points)] == [x for x, _ in points]
    assert all(0.3 < y < 0.7 for _, y in smoothed(points, 0.1))
    assert smoothed(points, 0) == points
    assert smoothed([(1, 5.0)]) == [(1, 5.0)]


def test_one_huge_value_spoils_only_the_means_around_it():
    spike = [(n, 1e30 if n == 300 else 0.5) for n in range(1000)]
    assert smoothed(spike)[300][1] > 1e28
    assert {y for _, y in smoothed(spike)[400:]} == {0.5}


@pytest.mark.parametrize(
    ("values", "logarithmic"), [([1.0, 2.0], False), ([0.01, 2.0], True), ([0.0, 100.0], False), ([-1.0, 100.0], False)]
)
def test_a_scale_is_logarithmic_where_a_linear_one_would_hide_small_values(values, logarithmic):
    scale = fitting(values, 100, 0, logarithmic=None)
    assert scale.logarithmic is logarithmic
    assert 0 <= scale(values[1]) < scale(values[0]) <= 100
    assert not fitting(values, 100, 0, logarithmic=False).logarithmic


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [5.0, 5.0], [1e-9, 1e-8], [-3.0, 7e6], [1e-8, 1e8], [2.0, 2.0000001], [2.0, 70.0]], ids=str
)
def test_ticks_are_few_round_and_within(values):
    for logarithmic in (False, None):
        scale = fitting(values, 0, 100, logarithmic=logarithmic)
        ticks = scale.ticks(6)
        assert 2 <= len(ticks) <= 7
        assert all(scale.low <= tick <= scale.high for tick in ticks)
        assert len(set(map(str, ticks))) == len(ticks)


def test_what_is_not_finite_is_left_out():
    points = [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)]
    figure = curve("c", LOSS, [Series(LOSS, points, [(1, 0.5, math.nan), (4, 1.0, 3.0)], points)])
    assert "nan" not in figure
    assert "inf" not in figure
    assert figure.count("<tr>") == 3
    assert curve("c", LOSS, [Series(LOSS, points[1:3])]) == ""
    assert curve("c", LOSS, []) == ""
    assert problems(page_of(curve("c", LOSS, [Series(LOSS, [(0, 0.0)])]))) == []


def test_the_table_has_what_is_drawn():
    band = [(n, 0.5, 1.5) for n in (0, 50, 100)]
    few = Series("few", [(n, 1.0) for n in (0, 50, 100)], band)
    figure = curve("c", LOSS, [Series("many", [(n, float(n)) for n in range(1, 1001)]), few])
    rows = re.findall(r'<th scope="row">([\d,]+)</th>', figure)
    assert {"0", "50", "100", "1,000"} <= set(rows)
    assert len(rows) <= 45
    assert "1 (<span" in figure
    assert spread([], [], 40) == []


def test_the_description_says_the_numbers():
    texts = "".join(piece for _, piece in Page(page_of(curve("c", LOSS, [falling(10)]))).languages)
    assert "Loss: 1.98 at step 1, 1.809 at step 10; lowest 1.809 at step 10, highest 1.98 at step 1." in texts
    assert "损失：第 1 步为 1.98" in texts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (12345, "12,345"),
        (0.0173349, "0.01733"),
        (-2.5, "−2.5"),
        (1e-5, "1e−5"),
        (1e21, "1e21"),
        (10**12, "1" + ",000" * 4),
        (45678.9, "45,679"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_what_is_html_already_is_taken_as_it_is():
    assert html("<p>{a}{b}{c}</p>", a=Html("<b>"), b="<b>", c=None) == "<p><b>&lt;b&gt;</p>"
    assert json.dumps(html("{a}", a="'\"&")) == json.dumps("&#x27;&quot;&amp;")


def test_a_place_beyond_a_scale_is_its_end():
    assert Scale(0, 1, 10, 20)(7) == 20
    assert Scale(0, 1, 10, 20)(-7) == 10
