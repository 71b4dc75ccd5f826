"""Reads run folders and makes tables, plots and a report, without torch. Each file imports only those listed before it:

formats                                           `Sheet`, a finished table, as text, Markdown, LaTeX and HTML
read.run, read.labels                             the `Run` type and the Protocol of readers; method labels
read.gsdg_runs, read.domainbed_runs               the readers of GSDG's, DomainBed's and SWAD's run folders
read.filters                                      `--where` and `--exclude`: which runs are kept
read.frames, read.run_folders                     run folders -> pandas frames; paths and run ids -> run folders
selection, statistics                             frame -> selected steps and draws -> means, errors, ranks; pure
caveats, tables                                   notes about how a table's runs were made; the tables and the CSV
significance, intervals                           tests of several methods; bootstrap intervals, and rliable's arrays
style, plots, figures                             plot style; one function per kind of plot; rows -> axes
prediction_plots, prediction_figures              the same for the predictions for single images
html, provenance, report                          HTML helpers; the report's last section; the whole report
"""
