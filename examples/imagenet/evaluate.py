"""Draw samples of a finished run, once, over all processes, and judge them.

    python examples/imagenet/evaluate.py RUN [evaluation.KEY=VALUE ...] [--averages]

Each sample follows from its number alone. Files of samples are kept: the same command goes on
where it was stopped. ``evaluation.sets=3`` draws three sets. ``--average DECAY`` ships and judges
another average of the weights than the first; ``--averages`` judges all that the run keeps, names
the best and ships it.
"""

import argparse
from pathlib import Path

import settings


def main() -> None:
    """Judge a run, by one or by each of its averages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", type=Path, help="the folder that train.py made")
    add("changes", nargs="*", help="such as evaluation.sets=3")
    add("--average", type=float, help="the decay of the average that is shipped")
    add("--averages", action="store_true", help="judge all, and ship the best")
    options = parser.parse_args()
    config = settings.of_run(options.run, options.changes)
    settings.check_evaluation(config)

    import report
    import ship  # with torch, which a wrong folder need not wait for
    import train
    from loop import locked_by_first

    accelerator = train.accelerator_of(config)
    with locked_by_first(config.out, accelerator):
        if options.averages:
            ship.best_average(config, accelerator)
        else:
            if options.average is not None:
                ship.change_average(config, accelerator, options.average)
            ship.evaluate(config, accelerator)
        if accelerator.is_main_process:
            path = report.write(config)
            print(f"the page of the run: {path}")
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    settings.run_program(main)
