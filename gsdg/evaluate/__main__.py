"""Evaluate finished runs: metrics, predictions for single images, and figures.

On the data set of the run, its own parts and transforms are used, so the accuracy is the recorded one. With
dataset=NAME, all images of another data set are used, whose classes must be among the run's:

    python -m gsdg.evaluate runs/4f2d99ea7668
    python -m gsdg.evaluate runs/4f2d99ea7668 dataset=vlcs data_dir=/data --adapt t3a
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from gsdg import __version__
from gsdg.config.messages import explain
from gsdg.config.schema import build
from gsdg.evaluate.images import Settings, compose, images_of
from gsdg.evaluate.passes import Evaluation
from gsdg.evaluate.tables import write_tables
from gsdg.evaluation import DomainMeans
from gsdg.metrics.definitions import import_sklearn_metrics
from gsdg.metrics.predictions import MEANINGS, pyarrow_needed, summary_text
from gsdg.predict import Predictor, load
from gsdg.runs.provenance import package_versions
from gsdg.utils.errors import listing
from gsdg.utils.text import let_streams_print_any_text

FROZEN = (
    "note: this run was trained with model.freeze_bn=true, so its weights expect BatchNorm's pretrained statistics.\n"
    "{} replaces them: expect lower accuracies, also on the source domains."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate each run and print its metrics. Returns the exit status: 2 if a run could not be evaluated."""
    let_streams_print_any_text()
    options = parse(arguments)
    status, tables = 0, []
    try:
        check_libraries(figures=not options.no_figures)
        settings = compose(options.overrides, adapt=options.adapt, config_dir=options.config_dir)
    except Exception as error:
        return _print_or_raise(error)
    for run in options.runs:
        try:
            tables.append(evaluate(run, settings, options).assign(run=run.absolute().name))
        except Exception as error:  # the other runs are evaluated
            status = _print_or_raise(error)
    if tables:
        pd.concat(tables).to_csv(options.out / "metrics.csv", index=False)
        print("\n".join(MEANINGS))
    return status


def _print_or_raise(error: Exception) -> int:
    if not (message := explain(error)):
        raise error
    print(message, file=sys.stderr)
    return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; `runs` are folders, `overrides` the words key=value."""
    parser = argparse.ArgumentParser(
        prog="python -m gsdg.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="+", metavar="RUN | key=value", help="folders of runs; dataset=NAME data_dir=..."
    )
    parser.add_argument("--weights", default="", help="selected, last, averaged, or a file in the run's folder")
    parser.add_argument("--adapt", metavar="NAME", help="test-time adaptation: t3a, tent, bn (default: none)")
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="images per forward pass (default: the run's)"
    )
    parser.add_argument("--map", choices=("pca", "tsne"), help="of the features (default: pca)")
    parser.add_argument("--format", choices=("png", "pdf", "svg"), help="of the figures (default: png)")
    parser.add_argument("--no-figures", action="store_true", help="only the tables")
    parser.add_argument("-o", "--out", type=Path, default=Path("evaluation"), help="folder (default: evaluation)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("-cd", "--config-dir", type=Path, metavar="FOLDER", help="with YAML files of your own")
    options, rest = parser.parse_known_args(arguments)
    if flags := [word for word in rest if word.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if options.no_figures and (options.map or options.format):
        parser.error("--map and --format are of the figures: leave them out, or --no-figures")
    words = [*options.words, *rest]  # argparse does not accept positional words after an option
    options.overrides = [word for word in words if "=" in word and not Path(word).exists()]
    options.runs = [Path(word) for word in words if word not in options.overrides]
    if not options.runs:
        parser.error("name the folder of a run, such as runs/4f2d99ea7668")
    return options


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def check_libraries(*, figures: bool) -> None:
    """UserError if a library is missing that the evaluation needs in the end."""
    import_sklearn_metrics("python -m gsdg.evaluate")
    with pyarrow_needed():
        import pyarrow  # noqa: F401
    if figures:
        from gsdg.analysis import style  # noqa: F401


def evaluate(run: Path, settings: Settings, options: argparse.Namespace) -> pd.DataFrame:
    """Evaluate one run, write its files into a folder of its own, print and return its metrics (`summary`)."""
    predictor = load(run, options.weights, device=options.device)
    images = images_of(predictor, run, settings, options.batch_size)
    evaluation = Evaluation(predictor.algorithm, images, settings.adaptation)
    if settings.adaptation and predictor.algorithm.model.freeze_bn and build(settings.adaptation).replaces_statistics:
        print(FROZEN.format(options.adapt), file=sys.stderr)
    folder = options.out / _folder_name(run, settings, options.adapt)
    try:
        frame = evaluation.predictions()
        table = write_tables(folder, frame, _about(run, predictor, evaluation))
        if not options.no_figures:
            from gsdg.evaluate.figures import write_figures  # needs matplotlib

            write_figures(folder, evaluation, frame, options.format or "png", options.map or "pca")
    finally:
        images.evaluator.close()
    adapted = f", adapted by {options.adapt}" if options.adapt else ""
    print(f"{run}, {predictor.about['file']}, on {images.about['dataset']['name']}{adapted}")
    print(summary_text(table))
    if images.recorded and not options.adapt:
        print(compared(table, images.recorded))
    print(f"files: {folder}\n")
    return table


def _folder_name(run: Path, settings: Settings, adapt: str | None) -> str:
    """`4f2d99ea7668-vlcs-t3a`."""
    dataset = [str(settings.dataset["name"])] if settings.dataset else []
    return "-".join([run.absolute().name, *dataset, *([adapt] if adapt else [])])


def compared(table: pd.DataFrame, recorded: DomainMeans) -> str:
    """Whether the accuracies are those in the run's record."""
    values = table.set_index(["domain", "part"])["accuracy"].to_dict()
    expected = {(domain, part): value for domain, parts in recorded.items() for part, value in parts.items()}
    if values == expected:
        return "All accuracies equal those in the run's record."
    differing = [
        f"{domain} {part}: {100 * expected[domain, part]:.2f} % recorded, {100 * values[domain, part]:.2f} % now"
        for domain, part in expected.keys() & values.keys()
        if values[domain, part] != expected[domain, part]
    ]
    return f"warning: the accuracies differ from the run's record (other device or versions?): {listing(differing)}"


def _about(run: Path, predictor: Predictor, evaluation: Evaluation) -> dict:
    """What evaluation.json says: everything that the figures depend on."""
    return {
        "run": str(run.absolute()),
        "weights": predictor.about,
        "classes": list(predictor.classes),
        **evaluation.images.about,
        "adaptation": evaluation.adaptation,
        "batch_size": evaluation.images.evaluator.loader.batch_size,
        "device": str(predictor.device),
        "versions": {"gsdg": __version__, **package_versions()},
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


if __name__ == "__main__":
    sys.exit(main())
