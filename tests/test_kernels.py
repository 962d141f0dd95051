"""Forked kernels: each is what an ordinary kernel would be, dies when it should, and leaves nothing behind."""
import os, resource, signal, subprocess, sys, textwrap, time
from pathlib import Path

import nbformat, psutil, pytest
from nbclient import NotebookClient

from conftest import ROOT
from mint_nb.kernels import can_fork, kernels_of, run_notebook, warm_manager

pytestmark = pytest.mark.skipif(not can_fork(), reason='kernels are not forked here: a GPU, another system than Linux, or MINT_WARM=0')
FEW = "import sys; import mint_nb.kernels as k; k.load_libraries.__defaults__ = (('ipykernel.kernelapp',),); k.serve_kernels(sys.argv[1], int(sys.argv[2]))"


def notebook(*cells: str):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata['kernelspec'] = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    return nb


def printed(tmp_path: Path, *cells: str, **kw) -> list[str]:
    "Lines that a notebook prints in a kernel of `run_notebook`."
    nbformat.write(notebook(*cells), tmp_path/'n.ipynb')
    copy = nbformat.read(run_notebook(tmp_path/'n.ipynb', tmp_path/'copy.ipynb', quiet=True, **kw), 4)
    return ''.join(o.text for c in copy.cells for o in c.outputs if o.get('name') == 'stdout').splitlines()


PARENT = 'import os, psutil; print("serve_kernels" in " ".join(psutil.Process(os.getppid()).cmdline()))'


def test_it_has_the_folder_and_the_environment_of_whoever_asked(tmp_path, monkeypatch):
    monkeypatch.setenv('WARD', 'genetics')
    cell = 'import os, sys, time; print(os.getcwd(), os.environ["WARD"], "MINT_WARM" in os.environ, [m for m in sys.modules if m.startswith("mint_nb")])'
    assert printed(tmp_path, PARENT, cell, cwd=tmp_path) == ['True', f'{tmp_path} genetics True []']


def test_it_starts_without_the_work_of_importing(tmp_path):
    "Processor time of a kernel that has what a stage needs, by its own clock; an ordinary one takes seconds."
    cell = 'import time, numpy, pandas, torch, peft, sklearn.linear_model\nfrom transformers import AutoModelForCausalLM\nprint(time.process_time())'
    printed(tmp_path, 'pass')
    assert float(printed(tmp_path, cell)[0]) < 1.5


def test_two_are_not_the_same(tmp_path):
    "Python's and NumPy's global generators start anew in each, as in processes of their own; PyTorch's has its constant seed."
    cell = 'import random, numpy as np, torch; print(random.random(), np.random.rand()); print(torch.initial_seed(), torch.rand(1).item())'
    (drawn, seed), (other, same) = printed(tmp_path, cell), printed(tmp_path, cell)
    assert not set(drawn.split()) & set(other.split()) and seed == same


@pytest.mark.parametrize('threads', ['1', '2'])
def test_libraries_have_the_threads_they_were_given(tmp_path, monkeypatch, threads):
    monkeypatch.setenv('OMP_NUM_THREADS', threads)
    cell = 'import threadpoolctl, torch; print(torch.get_num_threads(), sorted({p["num_threads"] for p in threadpoolctl.threadpool_info()}))'
    n = min(int(threads), len(os.sched_getaffinity(0)))
    assert printed(tmp_path, cell) == [f'{threads} {sorted({n, int(threads)})}']


def test_limits_of_the_command_hold_in_its_kernel(tmp_path):
    "The command may write files of 100 kB: a kernel of the warm process, which may write more, may not either."
    script = textwrap.dedent(f"""
        import resource
        from mint_nb.kernels import run_notebook, NotebookFailed
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try: run_notebook({str(tmp_path/'n.ipynb')!r}, {str(tmp_path/'copy.ipynb')!r}, cwd={str(tmp_path)!r}, quiet=True)
        except NotebookFailed as e: print(e.error, e.index, e.message)
    """)
    printed(tmp_path, 'pass')                    # the warm process is there, with the limits of this one
    nbformat.write(notebook(PARENT, 'open("big", "wb").write(bytes(200_000))'), tmp_path/'n.ipynb')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith('OSError') and 'File too large' in done.stdout, done.stdout + done.stderr
    said = [o.text for c in nbformat.read(tmp_path/'copy.ipynb', 4).cells for o in c.get('outputs', []) if o.get('name') == 'stdout']
    assert said == ['True\n'] and resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_a_variable_that_libraries_read_when_they_are_loaded(tmp_path, monkeypatch):
    "The warm process was started with another value: an ordinary kernel, which says why."
    printed(tmp_path, 'pass')
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    with pytest.warns(UserWarning, match='HF_HUB_OFFLINE differs'):
        said = printed(tmp_path, PARENT, 'from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE)')
    assert said == ['False', 'False']


def test_it_can_be_interrupted_and_goes_on(tmp_path):
    nb = notebook('import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print("interrupted")', 'print("goes on")')
    done = NotebookClient(nb, kernel_name='python3', timeout=3, interrupt_on_timeout=True, kernel_manager_class=warm_manager()).execute()
    assert [c.outputs[0].text for c in done.cells] == ['interrupted\n', 'goes on\n']


def test_figures_are_drawn_into_the_notebook(tmp_path):
    nbformat.write(notebook('import matplotlib.pyplot as plt', 'plt.plot([1, 2]);'), tmp_path/'n.ipynb')
    copy = nbformat.read(run_notebook(tmp_path/'n.ipynb', tmp_path/'copy.ipynb', quiet=True), 4)
    assert 'image/png' in copy.cells[-1].outputs[-1].data


def test_a_killed_command_leaves_no_kernel_and_no_warm_process(tmp_path):
    "kill -9 of the command alone: the warm process sees it, and ends with its kernels."
    nbformat.write(notebook('import os, time; open("pid", "w").write(str(os.getpid())); time.sleep(600)'), tmp_path/'n.ipynb')
    script = textwrap.dedent(f"""
        import mint_nb.kernels as k
        k.START = {FEW!r}
        k.run_notebook({str(tmp_path/'n.ipynb')!r}, {str(tmp_path/'copy.ipynb')!r}, cwd={str(tmp_path)!r}, quiet=True)
    """)
    alone = {k: v for k, v in os.environ.items() if k != 'MINT_WARM'}
    command, end = subprocess.Popen([sys.executable, '-c', script], env=alone, cwd=ROOT), time.monotonic() + 120
    while not (tmp_path/'pid').exists() or not (tmp_path/'pid').read_text():
        assert command.poll() is None and time.monotonic() < end
        time.sleep(.05)
    family = psutil.Process(command.pid).children(recursive=True)
    assert int((tmp_path/'pid').read_text()) in [p.pid for p in family] and len(family) == 2
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert not psutil.wait_procs(family, timeout=20)[1]


def test_a_killed_command_leaves_no_kernel_of_a_shared_warm_process(tmp_path):
    nbformat.write(notebook('import time; time.sleep(600)'), tmp_path/'n.ipynb')
    script = f"from mint_nb.kernels import run_notebook; run_notebook({str(tmp_path/'n.ipynb')!r}, {str(tmp_path/'copy.ipynb')!r}, quiet=True)"
    command, end = subprocess.Popen([sys.executable, '-c', script], cwd=ROOT), time.monotonic() + 120
    while not (forked := kernels_of(command.pid)):
        assert command.poll() is None and time.monotonic() < end
        time.sleep(.05)
    kernel = psutil.Process(forked[0])
    command.send_signal(signal.SIGKILL)
    command.wait()
    assert not psutil.wait_procs([kernel], timeout=20)[1] and kernels_of(command.pid) == []


def test_it_is_switched_off_by_a_variable(tmp_path, monkeypatch):
    monkeypatch.setenv('MINT_WARM', '0')
    assert printed(tmp_path, PARENT) == ['False'] and os.environ['MINT_WARM'] == '0'
