import pytest

from hintjax.experiments.report import page

pytestmark = pytest.mark.quick

HOSTILE = "<script>alert('x')</script> & \"q\""


def test_every_part_escapes_what_it_is_given():
    made = page.page(
        HOSTILE,
        page.section(HOSTILE, page.paragraph(HOSTILE, "note"), page.points([HOSTILE])),
        page.folded(HOSTILE, page.table([HOSTILE], [[HOSTILE]], HOSTILE)),
        page.values({HOSTILE: HOSTILE}),
        page.matrix([HOSTILE], [[3]], HOSTILE),
        page.pictures(page.image(b"\x89PNG", "png", HOSTILE)),
    )
    assert "<script" not in made and "'x'" not in made and '"q"' not in made
    assert made.count("&lt;script&gt;") == 15


def test_what_is_made_here_is_not_escaped_again():
    bold = page.Html("<b>1</b>")
    assert page.text(bold) is bold
    assert "<td><b>1</b></td>" in page.table(["n"], [[bold]])


def test_a_dollar_sign_in_a_page_is_only_a_dollar_sign():
    assert "$body $1" in page.page("$title", page.paragraph("$body $1"))


def test_empty_parts_leave_nothing():
    parts = page.points([]), page.pictures(), page.wide(page.Html(""))
    assert page.section("Warnings", *parts) == ""


def test_the_color_of_a_cell_is_its_part_of_its_row():
    made = page.matrix(["a", "b"], [[3, 1], [0, 0]], "")
    parts = [f"--part: {part}" for part in ("0.750", "0.250", "0.000")]
    assert all(part in made for part in parts)


def test_a_page_forbids_all_that_it_would_have_to_fetch():
    made = page.page("a run")
    assert "default-src 'none'; img-src data:" in made
    assert 'name="viewport" content="width=device-width' in made
    assert "prefers-color-scheme: dark" in made and "overflow-x: auto" in made
