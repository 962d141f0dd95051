"A stage that trains in several processes: one lock, one line in the manifest, the adapter of one process."
import shutil

import pytest, yaml
from safetensors.torch import load_file

from mint_nb.core import InputError, read_json, read_table
from mint_nb.runs import Run, open_params
from mint_nb.align import align


def copied(run, to, **train) -> Run:
    "A copy of a finished run with other training parameters: what does not read them stays done."
    shutil.copytree(run.path, to)
    params = yaml.safe_load((to/'params.yaml').read_text()); params['train'] |= train
    (to/'params.yaml').write_text(yaml.safe_dump(params))
    return Run(to, open_params(to))


def test_a_stage_trains_in_two_processes(smoke_run, tmp_path):
    run = copied(smoke_run, tmp_path/'run', processes=2)
    before = len(run.manifest)
    entry = align(run, 'mint')
    assert entry['status'] == 'done' and [e['stage'] for e in run.manifest[before:]] == ['align/mint-0'] and not (run/'align/mint-0/work').exists()
    assert read_json(run/'align/mint-0/engine.json')['engine'] == 'mint'
    one, two = (read_table(r/'align/mint-0/log.parquet') for r in (smoke_run, run))
    exact = one.name.isin(['loss', 'nll', 'log_odds', 'chosen_logp', 'rejected_logp', 'learning_rate', 'grad_norm'])
    assert one[['phase', 'step', 'name']].equals(two[['phase', 'step', 'name']]) and two[exact].value.tolist() == pytest.approx(one[exact].value.tolist(), rel=1e-3, abs=1e-5)
    a, b = (load_file(r/'align/mint-0/adapter/adapter_model.safetensors') for r in (smoke_run, run))
    assert a.keys() == b.keys() and all((a[k] - b[k]).norm() <= 1e-3*a[k].norm() + 1e-6 for k in a)
    assert align(run, 'mint') == entry                                  # done: nothing is started


def test_what_a_process_refuses_is_refused_by_the_stage(smoke_run, tmp_path):
    run = copied(smoke_run, tmp_path/'run', processes=2, engine='trl')     # whose ORPO knows one likelihood
    with pytest.raises(InputError, match='train.nll_on'): align(run, 'mint')
    assert run.manifest[-1]['stage'] == 'align/mint-0' and run.manifest[-1]['status'] == 'failed'
    with pytest.raises(InputError, match='is for GPUs'): align(copied(smoke_run, tmp_path/'shards', processes=2, engine='separate', accelerate='fsdp2'), 'mint')
