"""A sheet in each format: all text is there and escaped, the best and the second are marked."""

from __future__ import annotations

from gsdg.analysis.formats import BOLD, FORMATS, PLAIN, UNDERLINE, Entry, Sheet, as_html, latex, markdown, text

SHEET = Sheet(
    "toy, last",
    ["algorithm", "50%", "average"],
    [
        [Entry("grad_surgery"), Entry("90.0 ± 1.0", "best"), Entry("7.0")],
        [Entry("a|b <i>&"), Entry("80.0", "second"), Entry("-")],
    ],
    ["selection: the last step", "missing: <script>"],
)


def test_text_is_aligned_and_marked_for_a_terminal_only():
    assert text(SHEET).splitlines() == [
        "toy, last",
        "algorithm            50%  average",
        "grad_surgery  90.0 ± 1.0      7.0",
        "a|b <i>&            80.0        -",
        "selection: the last step",
        "missing: <script>",
    ]
    marked = text(SHEET, terminal=True)
    assert f"{BOLD}90.0 ± 1.0{PLAIN}" in marked
    assert f"{UNDERLINE}80.0{PLAIN}" in marked
    for code in (BOLD, UNDERLINE, PLAIN):
        marked = marked.replace(code, "")
    assert marked == text(SHEET)


def test_markdown_has_a_row_a_method_and_a_bar_in_a_name_is_no_column():
    table = [line for line in markdown(SHEET).splitlines() if line.startswith("|")]
    assert table == [
        "| algorithm | 50% | average |",
        "| :-- | --: | --: |",
        "| grad_surgery | **90.0 ± 1.0** | 7.0 |",
        r"| a\|b <i>& | <u>80.0</u> | - |",
    ]


def test_latex_has_an_escape_for_every_character_that_it_reads():
    lines = latex(SHEET).splitlines()
    assert r"grad\_surgery & \textbf{90.0 $\pm$ 1.0} & 7.0 \\" in lines
    assert r"a|b <i>\& & \underline{80.0} & - \\" in lines
    assert r"algorithm & 50\% & average \\" in lines
    assert "% selection: the last step" in lines
    assert r"\begin{tabular}{lcc}" in lines

    row = r"a\textbackslash{}b\{c\}\$d\#e\_f\textasciitilde{}g\textasciicircum{}h\%i\&j \\"
    assert row in latex(Sheet("t", ["algorithm"], [[Entry(r"a\b{c}$d#e_f~g^h%i&j")]])).splitlines()


def test_html_escapes_every_text():
    page = as_html(SHEET)
    assert "<b>90.0 ± 1.0</b>" in page
    assert "<u>80.0</u>" in page
    assert "a|b &lt;i&gt;&amp;" in page
    assert "<script>" not in page
    assert page.count("<tr>") == 3


def test_a_sheet_without_rows_is_shown_all_the_same():
    for name, formatted in FORMATS.items():
        assert "toy, last" in formatted(Sheet("toy, last", ["algorithm"], [])), name
