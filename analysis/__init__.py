"""Results from run folders on disk, without torch. Each file knows only those before it:

run, labels, ours, peers    what one run is, which runs are one method, and the readers of three formats
formats                     a table that is laid out -> text, Markdown, LaTeX, HTML
filters                     which runs are read at all
frames                      run folders -> tidy frames, and what was left out
selection, statistics       frame -> chosen steps and draws -> means, errors, differences, ranks; pure
caveats, tables             what a reader should know of the runs in a table; the tables, laid out, and CSV
drawing, plots, figures     frame, ax -> ax; which rows, and in how many axes
page, provenance, report    one HTML page
"""
