"""The command of tests/fuzz/__init__.py; the exit status is 1 if anything is wrong."""

import argparse
import os
import sys
import tempfile
import warnings

from .harness import run_all, run_kind, table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="over all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="only this kind")
    parser.add_argument("--case", type=int, help="only the case of this number of the kind")
    options = parser.parse_args()
    warnings.simplefilter("error")  # as under pytest
    with tempfile.TemporaryDirectory(prefix="mhc-jax-fuzz-cache-") as cache:
        os.environ["MHC_JAX_CACHE"] = cache
        from .kinds import KINDS

        chosen = [kind for kind in KINDS if options.kind in (None, kind.NAME)]
        if not chosen:
            parser.error(f"--kind is one of {', '.join(kind.NAME for kind in KINDS)}")
        if options.case is not None:
            tallies = [run_kind(kind, [options.case], options.seed) for kind in chosen]
        else:
            tallies = run_all(chosen, options.cases, options.seed)
    for tally in tallies:
        for report in tally.wrong:
            print(report, end="\n\n")
    print(table(tallies))
    return int(any(tally.wrong for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
