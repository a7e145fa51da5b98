"""The claims page and its mini-labs, executed and compared, one after the other."""

import time

from test_notebooks import NOTEBOOKS, REPO, num_code_cells, strict_nbval

MOST_S = 360


def test_all_claims_run_within_six_minutes():
    seconds = {}
    for notebook in NOTEBOOKS:
        if notebook.name.startswith("06"):
            start = time.perf_counter()
            num_passed, text = strict_nbval(notebook, REPO)
            seconds[notebook.stem] = time.perf_counter() - start
            assert num_passed == num_code_cells(notebook), text
            print(f"  {notebook.name}: {seconds[notebook.stem]:.0f} s")
    print(f"  together: {sum(seconds.values()):.0f} s")
    assert len(seconds) == 6
    assert sum(seconds.values()) <= MOST_S
