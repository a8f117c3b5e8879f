"""Random bad input from a seed: whatever a user can get wrong must give one message or a right result, never a traceback or nonsense.

    python -m tests.fuzz --cases 1000 --seed 0

Each kind of input is a module with a function `case(rng, room)` that makes one case: a description and a check. docs/fuzzing.md says what
is covered.
"""

import sys
from pathlib import Path

# The helpers of other tests (small.py, experiments/fake_run.py) are found as they are under pytest.
for folder in (Path(__file__).parents[1], Path(__file__).parents[1] / "experiments"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
