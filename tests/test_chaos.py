"""kill -9 at random moments of the smoke pipeline: started again, it ends with the tables of the undisturbed run. Three kills here; `make chaos` has 50."""
import os, random, time
from collections import Counter
from datetime import date
from pathlib import Path

import pandas as pd

from mint_nb.core import write_json
from mint_nb.runs import versions
from mint_nb.pipeline import status
from test_pipeline import kill, results, start

KILLS = int(os.environ.get('MINT_KILLS', 3))
RECORD = os.environ.get('MINT_CHAOS')     # a file for the result, as `make chaos` sets it
METHODS = ('chance', 'mint')


def at_work(run: Path) -> str:
    "The notebook whose copy was written last, or what comes before the first."
    copies = sorted((run/'notebooks').glob('*.ipynb'), key=lambda p: p.stat().st_mtime_ns)
    return copies[-1].stem if copies else 'before the first notebook'


def disturb(run: Path, seconds: float) -> str:
    "Start the command and kill it after some seconds; says in which notebook, or '' if it had ended by then."
    process, end = start(run, METHODS), time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end: time.sleep(.02)
    if process.poll() is None: kill(process); return at_work(run)
    assert process.returncode == 0, process.stdout.read()
    return ''


def finish(run: Path, expected: pd.DataFrame) -> float:   # s
    "Start the command once more, let it end, and compare."
    begun, process = time.monotonic(), start(run, METHODS)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    assert (status(run).state == 'done').all()
    pd.testing.assert_frame_equal(results(run, METHODS), expected)
    return time.monotonic() - begun


def test_killed_at_random_moments(smoke_run, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    rng, begun, where, runs, longest = random.Random(seed), time.monotonic(), Counter(), 0, 12.
    expected = results(smoke_run.path, METHODS)
    if KILLS > 3: longest, runs = finish(tmp_path/'first', expected)/2, 1      # s; several kills a run
    while where.total() < KILLS:
        run, runs = tmp_path/f'run-{runs}', runs + 1
        while where.total() < KILLS and (step := disturb(run, rng.uniform(0, longest))):
            where[step] += 1
            print(f'kill {where.total()} of {KILLS} (seed {seed}, run {runs}): {step}', flush=True)
        finish(run, expected)
    if RECORD: write_json(RECORD, {'command': 'make chaos', 'kills': where.total(), 'runs': runs, 'tables': 'equal to the undisturbed run in every run', 'rows compared': len(expected),
                                   'killed in': dict(sorted(where.items())), 'seconds': round(time.monotonic() - begun), 'seed': seed,
                                   'date': str(date.today()), 'versions': versions()})
