"""What all tests share: no network, quiet bars, the real data where it is, and one finished smoke run."""
import os, shutil
from pathlib import Path

os.environ |= {'HF_HUB_OFFLINE': '1', 'MINT_QUIET': '1', 'TOKENIZERS_PARALLELISM': 'false'}

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
SMOKE_METHODS = ('chance', 'teacher', 'naive_bayes', 'linear', 'base', 'sft', 'mint')


LONG = ('test_pipeline', 'test_engine', 'test_browser', 'test_chaos', 'test_faults', 'test_grid', 'test_privacy', 'test_study', 'test_export')


def pytest_collection_modifyitems(items):
    "The longest files first: two workers that take file by file end at about the same time."
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda i: order.get(i.module.__name__, len(LONG)))


@pytest.fixture(scope='session')
def data() -> Path:
    "Folder of the real data: $MINT_DATA, or ../shared/data beside the checkout; tests that need it are skipped without."
    places = [os.environ.get('MINT_DATA'), ROOT.parent/'shared/data']
    for p in places:
        if p and Path(p).is_dir(): return Path(p)
    pytest.skip('no real data: set MINT_DATA to a folder with phenopackets.zip')


@pytest.fixture(scope='session')
def smoke_run(tmp_path_factory, worker_id):
    "A run of the smoke profile, finished through the Python interface: once for all workers of pytest-xdist, a copy for each."
    from mint_nb.core import Run
    from mint_nb.pipeline import run_pipeline
    own = tmp_path_factory.mktemp('runs')/'smoke'
    first = own if worker_id == 'master' else tmp_path_factory.getbasetemp().parent/'smoke'
    with FileLock(f'{first}.lock'): run = run_pipeline(first, 'smoke', {'methods': list(SMOKE_METHODS)}, quiet=True)
    return run if first == own else Run(shutil.copytree(first, own), run.params)
