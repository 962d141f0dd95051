"""What all tests share: no network, quiet bars, the real data where it is, and one finished smoke run."""
import os, re, shutil
from pathlib import Path

os.environ |= {'HF_HUB_OFFLINE': '1', 'MINT_QUIET': '1', 'TOKENIZERS_PARALLELISM': 'false'}

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
SMOKE_METHODS = ('chance', 'teacher', 'naive_bayes', 'linear', 'base', 'sft', 'mint')


LONG = ('test_pipeline', 'test_engine', 'test_browser', 'test_chaos', 'test_faults', 'test_grid', 'test_privacy', 'test_study', 'test_export')
SLOW = ()


def pytest_configure(config):
    "One warm process for all kernels of the session, those of all workers and of the commands that they start; it begins with the first kernel."
    from mint_nb.kernels import share_kernels
    if not hasattr(config, 'workerinput'): share_kernels()


def is_slow(item) -> bool:
    "Does `make check` leave a test out?"
    return item.module.__name__ in SLOW or f'{item.module.__name__}::{getattr(item, "originalname", item.name)}' in SLOW


def pytest_collection_modifyitems(items):
    "The longest files first: two workers that take file by file end at about the same time."
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda i: order.get(i.module.__name__, len(LONG)))
    for i in filter(is_slow, items): i.add_marker('slow')


@pytest.fixture(scope='session')
def data() -> Path:
    "Folder of the real data: $MINT_DATA, or ../shared/data beside the checkout; tests that need it are skipped without."
    places = [os.environ.get('MINT_DATA'), ROOT.parent/'shared/data']
    for p in places:
        if p and Path(p).is_dir(): return Path(p)
    pytest.skip('no real data: set MINT_DATA to a folder with phenopackets.zip')


def smoke_key() -> str:
    "What the smoke run depends on: the stage notebooks, the code that they import, its parameters, versions, and the threads it computes with."
    from mint_nb.core import code_digest, digest, file_digest, resolve_params, versions
    stages = sorted((ROOT/'nbs').glob('[0-9]9_*.ipynb'))
    modules = sorted({'pipeline', *re.findall(r'from mint_nb\.(\w+) import', ''.join(p.read_text() for p in stages))})
    return digest([[file_digest(p) for p in stages], [code_digest(f'mint_nb.{m}') for m in modules],
                   resolve_params('smoke', {'methods': list(SMOKE_METHODS)}).model_dump(), versions(), os.environ.get('OMP_NUM_THREADS')])


@pytest.fixture(scope='session')
def smoke_run(tmp_path_factory):
    "A run of the smoke profile, finished through the Python interface: made once for the code as it is (kept in .make/smoke), a copy for each worker."
    from mint_nb.core import Run
    from mint_nb.pipeline import run_pipeline
    home, key = ROOT/'.make/smoke', smoke_key()
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home/'lock'):
        for old in home.iterdir():
            if old.is_dir() and old.name != key: shutil.rmtree(old)
        run = run_pipeline(home/key, 'smoke', {'methods': list(SMOKE_METHODS)}, quiet=True)
        return Run(shutil.copytree(run.path, tmp_path_factory.mktemp('runs')/'smoke'), run.params)
