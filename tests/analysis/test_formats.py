"""A sheet in each format: all text is there and escaped, the best and the second are marked."""

from __future__ import annotations

import shutil
import string
import subprocess
from pathlib import Path

import pytest

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
ASCII = string.ascii_letters + string.digits + string.punctuation


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
    assert r"a\textbar{}b \textless{}i\textgreater{}\& & \underline{80.0} & -- \\" in lines
    assert r"algorithm & 50\% & average \\" in lines
    assert "% selection: the last step" in lines
    assert r"\begin{tabular}{lcc}" in lines

    row = r"a\textbackslash{}b\{c\}\$d\#e\_f\textasciitilde{}g\textasciicircum{}h\%i\&j \\"
    assert row in latex(Sheet("t", ["algorithm"], [[Entry(r"a\b{c}$d#e_f~g^h%i&j")]])).splitlines()


def test_latex_has_minus_signs_before_numbers_and_hyphens_in_words():
    entries = [Entry(word) for word in ("a-b 1e-3 x-1", "-4.0 [-5.1, -0.2] 0/2", "lr=-0.1", "2026-11-30")]
    row = r"a-b 1e-3 x-1 & $-$4.0 [$-$5.1, $-$0.2] 0/2 & lr=$-$0.1 & 2026-11-30 \\"
    assert row in latex(Sheet("t", list("abcd"), [entries])).splitlines()


def test_every_line_of_a_latex_note_is_a_comment():
    lines = latex(Sheet("t", ["algorithm"], [], ["missing: erm: loss is nan\nat step 3", "50 %"])).splitlines()
    assert lines[:4] == ["% t", "% missing: erm: loss is nan", "% at step 3", "% 50 %"]


@pytest.mark.slow
def test_pdflatex_compiles_every_character_with_booktabs_only(tmp_path):
    if not shutil.which("pdflatex") or run("kpsewhich", "booktabs.sty", cwd=tmp_path).returncode:
        pytest.skip("needs pdflatex and booktabs (apt-get install texlive-latex-base texlive-latex-recommended)")
    hostile = Sheet(
        "all", ["algorithm", *"ab"], [[Entry(ASCII), Entry("-4.0 ± 0.1", "best"), Entry("<0.001", "second")]], ["a\nb"]
    )
    tables = "\n\n".join(latex(sheet) for sheet in (SHEET, hostile))
    head = "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n"
    (tmp_path / "t.tex").write_text(f"{head}{tables}\n\\end{{document}}\n")
    done = run("pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "t.log").read_text(errors="replace")


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8", errors="replace", timeout=120)


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
