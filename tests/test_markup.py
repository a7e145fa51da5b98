"""Tables of HTML."""

from effkit.markup import Cell, table


def test_what_was_given_is_text_unless_it_is_said_to_be_html():
    rows = [["<b>", Cell("<i>&amp;</i>", "th", ' class="a"')], [3, "'"]]
    assert table(["&", ""], rows, caption="all<br>of it", attributes=' id="t"') == (
        '<table id="t"><caption>all<br>of it</caption><thead><tr><th>&amp;</th><th></th></tr></thead>'
        '<tbody><tr><td>&lt;b&gt;</td><th class="a"><i>&amp;</i></th></tr>'
        "<tr><td>3</td><td>&#x27;</td></tr></tbody></table>"
    )
    assert table([], []) == "<table><thead><tr></tr></thead><tbody></tbody></table>"
