"The engine against TRL's own trainers, against ordinary rows, and against itself with and without its store."
import json, os, subprocess, sys

import pytest, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig, Qwen2Config, TrainingArguments

from mint_nb.core import InputError
from mint_nb.params import StudentParams, TrainParams
from mint_nb.recipes import LOSSES
from mint_nb.students import Student, add_lora, load_student
from mint_nb.packing import Item
from mint_nb.engine import Engine, TensorStore, mismatched, reference_logps, separate_logps
from mint_nb.trainer import PreferenceTrainer, train, trainer_settings, trl_rows, trl_trainer
from mint_nb.launch import LEAVE, launch_command
from mint_nb.bench import Setting, bench_items, bench_student, differences

os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'
SHORT = Setting(prompt=30, answer=10)

def grads(student): return torch.cat([p.grad.flatten() for n, p in student.model.named_parameters() if p.grad is not None and '.ref.' not in n])

def same(a, b, tolerance=1e-5): assert (a - b).norm() <= tolerance*b.norm(), ((a - b).norm()/b.norm()).item()

def move(student, seed=5):
    "Change the adapter, so that policy and reference differ."
    gen = torch.Generator().manual_seed(seed)
    for n, p in student.model.named_parameters():
        if 'lora_B' in n and '.ref.' not in n: p.data += torch.randn(p.shape, generator=gen)*.05

def our_step(student, items, loss, folder, reference=None, **params):
    "Loss of one of our steps; the gradient stays in the model."
    p = TrainParams(batch=len(items), **params)
    engine = Engine(student)
    trainer = PreferenceTrainer(student, engine, loss, p, reference and reference(engine), args=TrainingArguments(**trainer_settings(p, folder, 1, 1e-4, 0)), train_dataset=items)
    move(student); student.model.zero_grad()
    return trainer.training_step(student.model, {'items': items}).item()

def their_step(student, trainer, rows):
    "Loss of one of TRL's steps."
    trainer.current_gradient_accumulation_steps = 1
    move(student); student.model.zero_grad()
    return trainer.training_step(student.model, trainer.data_collator(rows)).item()

@pytest.mark.parametrize('loss', ['sft', 'orpo', 'dpo'])
@pytest.mark.parametrize('rejected', [1, 4])
def test_value_and_gradient_equal_trls_trainer(loss, rejected, tmp_path):
    if loss == 'sft' and rejected > 1: pytest.skip('SFT reads no rejected answer')
    s = SHORT._replace(rejected=rejected)
    ours, theirs, items = bench_student(s, 'tiny'), bench_student(s, 'tiny'), bench_items(s, 1000)
    reference = (lambda e: reference_logps(e, items)) if loss == 'dpo' else None
    a = our_step(ours, items, loss, tmp_path, reference, nll_on='trl' if loss == 'orpo' else 'response')
    params = TrainParams(batch=4, nll_on='trl')
    b = their_step(theirs, trl_trainer(theirs, items, loss, params, trainer_settings(params, tmp_path, 1, 1e-4, 0)), trl_rows(items, loss))
    assert a == pytest.approx(b, rel=1e-5)
    same(grads(ours), grads(theirs))

def kin_trainer(kind, student, items, folder):
    "TRL's IPO, SimPO and KTO trainers with rows of our tokens."
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    base = trainer_settings(TrainParams(batch=4), folder, 1, 1e-4, 0)
    toy = dict(processing_class=student.tokenizer, train_dataset=Dataset.from_list([dict(prompt='a', chosen='b', rejected='c')]*4))
    if kind == 'ipo': return DPOTrainer(student.model, args=DPOConfig(**base, loss_type='ipo', beta=.3, max_length=None), **toy), trl_rows(items, 'dpo')
    if kind == 'simpo': return CPOTrainer(student.model, args=CPOConfig(**base, loss_type='simpo', cpo_alpha=0., beta=2., simpo_gamma=.5), **toy), trl_rows(items, 'orpo')
    toy['train_dataset'] = Dataset.from_list([dict(prompt='a', completion='b', label=True), dict(prompt='a', completion='c', label=False)]*2)
    rows = [dict(prompt_ids=i.prompt, completion_ids=a, KL_completion_ids=b, label=n == 0) for i, o in zip(items, mismatched(items)) for n, (a, b) in enumerate(zip(i.answers, o.answers))]
    return KTOTrainer(student.model, args=KTOConfig(**base, beta=.3, max_length=None, train_sampling_strategy='sequential'), **toy), rows

@pytest.mark.parametrize('kind', ['ipo', 'simpo', 'kto'])
def test_the_kin_equal_trls_trainers(kind, tmp_path):
    ours, theirs, items = bench_student(SHORT, 'tiny'), bench_student(SHORT, 'tiny'), bench_items(SHORT, 1000)
    a = our_step(ours, items, kind, tmp_path, (lambda e: reference_logps(e, items)) if LOSSES[kind].reference else None, beta=2., dpo_beta=.3, simpo_gamma=.5)
    trainer, rows = kin_trainer(kind, theirs, items, tmp_path)
    b = their_step(theirs, trainer, rows)
    assert a == pytest.approx(b, rel=2e-5)
    same(grads(ours), grads(theirs), 2e-5)

def test_likelihood_of_llama_factory(tmp_path):
    student, items = bench_student(SHORT, 'tiny'), bench_items(SHORT, 1000)
    a = our_step(student, items, 'sft', tmp_path, nll_on='llama-factory')
    with torch.no_grad(): want = -sum(separate_logps(student, i)[0]/len(i.answers[0]) for i in items)/len(items)
    assert a == pytest.approx(want.item(), rel=1e-5)

def curve(kind, model, steps, folder, setting=SHORT, **params):
    "Losses of a short training."
    p = TrainParams(batch=2, nll_on='trl', engine=kind, lr=1e-3, **params)
    student, items = bench_student(setting, model), bench_items(setting._replace(batch=8), 1000)
    return [r['loss'] for r in train(student, items, 'orpo', p, folder/kind, steps)]

def test_a_hundred_steps_follow_trls_curve(tmp_path):
    a, b = (curve(k, 'tiny', 100, tmp_path) for k in ('mint', 'trl'))
    assert len(a) == 100 and a[-1] < a[0] and a == pytest.approx(b, rel=1e-3)

def test_ten_steps_of_smollm2_follow_trls_curve(tmp_path):
    short = Setting(prompt=24, answer=8, layers=4)
    a, b = (curve(k, 'smollm2', 10, tmp_path, short) for k in ('mint', 'trl'))
    assert len(a) == 10 and a[-1] < a[0] and a == pytest.approx(b, rel=1e-3)

def test_smollm2_value_and_gradient(tmp_path):
    off = differences(Setting(prompt=40, answer=12, batch=2), 'smollm2', str(tmp_path))
    assert all(max(v) < 1e-5 for v in off.values()), off

def test_store_changes_nothing(tmp_path):
    def losses(**how):
        s = SHORT._replace(layers=1)
        student, items = bench_student(s, 'tiny'), bench_items(s, 1000)
        p = TrainParams(batch=2, lr=1e-3, checkpoint_every=100)
        return [r['loss'] for r in train(student, items, 'orpo', p, tmp_path/str(how)[-12:-8], 20, engine=Engine(student, **how))]
    plain = losses(cached=False)
    assert losses(store=TensorStore(tmp_path/'store')) == pytest.approx(plain, rel=1e-5)
    assert losses(store=TensorStore(tmp_path/'store'), budget=1) == pytest.approx(plain, rel=1e-5)    # other rows, same numbers
    assert len(list((tmp_path/'store').rglob('*.safetensors'))) == 4*3

def test_store_serves_other_combinations(tmp_path):
    s = SHORT._replace(layers=1, rejected=3)
    student, item = bench_student(s, 'tiny'), bench_items(s, 1000)[0]
    engine = Engine(student, TensorStore(tmp_path))
    engine.logps(Item('a', item.prompt, item.answers[:2]))
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob('*.safetensors')}
    lp = engine.logps(item)
    assert len(before) == 3 and len(list(tmp_path.rglob('*.safetensors'))) == 5 and all(f.stat().st_mtime_ns == t for f, t in before.items())
    assert torch.allclose(torch.cat([lp.chosen, lp.rejected]), separate_logps(student, item), rtol=1e-5)

def test_reference_is_kept_by_adapter(tmp_path):
    student, items = bench_student(SHORT._replace(layers=1), 'tiny'), bench_items(SHORT, 1000)
    engine = Engine(student, TensorStore(tmp_path))
    first = reference_logps(engine, items)
    engine.logps = None                                              # a second computation would fail
    assert reference_logps(engine, items) == first
    move(student); engine = Engine(student, TensorStore(tmp_path))
    assert reference_logps(engine, items) != first

@pytest.mark.parametrize('config', [Qwen2Config, Gemma2Config, MistralConfig])
@pytest.mark.parametrize('window', [None, 12])
def test_families(config, window):
    torch.manual_seed(0)
    shape = dict(vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    if window and config is not Qwen2Config: shape['sliding_window'] = window
    if config is Gemma2Config and not window: shape['layer_types'] = ['full_attention']*3
    if window and config is Qwen2Config: shape |= dict(use_sliding_window=True, sliding_window=window, max_window_layers=1)
    model = AutoModelForCausalLM.from_config(config(**shape), attn_implementation='eager').eval()
    student = add_lora(Student(model, load_student('tiny').tokenizer, config.__name__), StudentParams(lora_r=4, lora_layers=1), seed=1)
    move(student)
    items = bench_items(SHORT._replace(rejected=2), 1000)
    lp = Engine(student).logps(items)
    want = torch.cat([separate_logps(student, i) for i in items]).view(4, 3)
    assert torch.allclose(lp.chosen, want[:, 0], rtol=1e-5) and torch.allclose(lp.rejected, want[:, 1:].flatten(), rtol=1e-5)

def test_a_model_that_ignores_the_mask_is_refused(monkeypatch):
    import mint_nb.engine as e
    monkeypatch.setattr(e, 'masks_for', lambda *a, **k: None)         # as a model that makes a causal mask of its own would
    with pytest.raises(InputError, match='does not honour'): Engine(bench_student(SHORT, 'tiny'))

def test_trl_engine_says_what_it_cannot(tmp_path):
    student, items = bench_student(SHORT, 'tiny'), bench_items(SHORT, 1000)
    with pytest.raises(InputError, match='train.nll_on'): train(student, items, 'orpo', TrainParams(engine='trl'), tmp_path, 1)
    with pytest.raises(InputError, match='train.engine'): train(student, items, 'kto', TrainParams(engine='trl'), tmp_path, 1)

TWO = """
import json, os, sys, numpy as np, torch
from mint_nb.params import TrainParams
from mint_nb.recipes import LOSSES
from mint_nb.packing import Item
from mint_nb.engine import Engine, reference_logps
from mint_nb.trainer import train
from mint_nb.bench import *
rng = np.random.default_rng(0)
tokens = lambda lo, hi: rng.integers(10, 1000, rng.integers(lo, hi)).tolist()
items = [Item(str(i), tokens(10, 40), [tokens(3, 30) for _ in range(2 + i % 2)]) for i in range(5)]      # no two of one length; batches of 4 and of 1
found = {}
for loss, how in (('orpo', dict(nll_on='trl')), ('orpo', {}), ('kto', dict(dpo_beta=.5)), ('sft', {})):
    student = bench_student(Setting(layers=1), 'tiny'); engine = Engine(student)
    ref = reference_logps(engine, items) if LOSSES[loss].reference else None
    log = train(student, items, loss, TrainParams(batch=4, lr=1e-2, dpo_lr=1e-2, checkpoint_every=100, **how), f'{sys.argv[1]}/{loss}{len(how)}', 4, 0, ref, engine)
    found[f'{loss} {how}'] = dict(processes=torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1, log=log, weights=torch.cat([p.detach().flatten() for p in student.model.parameters() if p.requires_grad]).tolist())
if int(os.environ.get('RANK', 0)) == 0: json.dump(found, open(sys.argv[1] + '/train.json', 'w'))
"""

SHARDS = """
import json, os, sys, torch
from torch.distributed.fsdp import fully_shard
from transformers import TrainingArguments
from mint_nb.params import TrainParams
from mint_nb.engine import SeparateEngine, adapter_digest, whole
from mint_nb.trainer import PreferenceTrainer, save_adapter, trainer_settings
from mint_nb.bench import *
from peft import load_peft_weights
student, items = bench_student(Setting(layers=0), 'tiny'), bench_items(Setting(prompt=20, answer=8, batch=3), 1000)
params = TrainParams(batch=3, engine='separate')
trainer = PreferenceTrainer(student, SeparateEngine(student), 'orpo', params, args=TrainingArguments(**trainer_settings(params, sys.argv[1], 1, 1e-4, 0)), train_dataset=items)
before = adapter_digest(student.model)
if trainer.accelerator.num_processes > 1:
    from torch.distributed.device_mesh import init_device_mesh
    mesh = init_device_mesh('cpu', (2,))
    for layer in student.model.get_base_model().model.layers: fully_shard(layer, mesh=mesh)
    fully_shard(student.model, mesh=mesh)
loss = trainer.training_step(student.model, {'items': items})
grads = torch.cat([whole(p.grad).flatten() for p in student.model.parameters() if p.grad is not None]).tolist()
first = trainer.accelerator.is_main_process
after = adapter_digest(student.model)
save_adapter(student.model, sys.argv[1] + '/adapter', first)
if first: json.dump(dict(processes=trainer.accelerator.num_processes, loss=loss.item(), grads=grads, same=before == after, seen=trainer.seen, adapter={k: v.flatten().tolist() for k, v in load_peft_weights(sys.argv[1] + '/adapter').items()}), open(sys.argv[1] + '/shards.json', 'w'))
"""

@pytest.fixture(scope='module')
def launched(tmp_path_factory) -> dict[str, tuple[dict, dict]]:
    "What the two scripts write as JSON, each run by one process and by two; one start serves both."
    folder = tmp_path_factory.mktemp('launched')
    (folder/'go.py').write_text(TWO + SHARDS + LEAVE)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MINT_QUIET': '1', 'PYTHONPATH': os.pathsep.join(sys.path)}
    alone, together = [sys.executable, str(folder/'go.py')], launch_command(TrainParams(processes=2), folder/'go.py')
    for name, how in (('one', alone), ('two', together)):
        (folder/name).mkdir()
        done = subprocess.run([*how, str(folder/name)], capture_output=True, text=True, env=env, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
    found = lambda what: tuple(json.loads((folder/n/f'{what}.json').read_text()) for n in ('one', 'two'))
    return {'train': found('train'), 'shards': found('shards')}

def test_two_processes_train_as_one(launched):
    "Lengths differ and batches do not go into equal parts: loss, gradient, what is logged and the weights are those of one process."
    one, two = launched['train']
    assert one.keys() == two.keys() and len(one) == 4
    for how, a in one.items():
        b = two[how]
        assert (a['processes'], b['processes']) == (1, 2)
        assert len(a['log']) == len(b['log']) == 4 and a['log'][0]['loss'] != a['log'][-1]['loss']
        for x, y in zip(a['log'], b['log']): assert x.keys() == y.keys() and {'loss', 'grad_norm', 'nll', 'chosen_logp'} <= x.keys() and y == pytest.approx(x, rel=1e-4, abs=1e-6), how
        same(torch.tensor(b['weights']), torch.tensor(a['weights']), 1e-4)


def test_benchmark_writes_what_the_table_reads(tmp_path):
    from mint_nb.bench import bench, bench_figure, bench_table, detail_table
    from mint_nb.core import read_json
    found = read_json(bench(tmp_path, 'tiny', 1, Setting(prompt=24, answer=8, batch=2)))
    assert found['loss_diff'] < 1e-5 and found['grad_diff'] < 1e-5 and found['repeats'] == 1 and found['device'].startswith('cpu')
    assert {'speed_ratio', 'speed_ratio_response', 'memory_ratio', 'speed_ratio_4_rejected', 'speed_ratio_cached', 'versions'} <= set(found)
    assert len(bench_table(found)) == len(bench_table(None)) == 7 and 'not yet measured' in bench_table(None).to_string()
    assert len(detail_table(found)) == 6
    bench_figure(found)

def test_doctor_reads_a_dataset_from_disk(smoke_run):
    from typer.testing import CliRunner
    from mint_nb.cli import app
    out = CliRunner().invoke(app, ['doctor', str(smoke_run/'preferences/mint-0/train.parquet'), '--model', 'tiny', '--max-prompt', '80'])
    assert out.exit_code == 0, out.output
    for said in ('tokens of an item', 'their notes lose', 'padding <|endoftext|>', 'chat template', 'answers first differ', 'roughly', '0 errors'): assert said in out.output, said

@pytest.mark.parametrize('method', ['dpo', 'mint'])
def test_trl_trains_a_method_of_a_run(tmp_path, method):
    from mint_nb.align import align, load_aligned
    from mint_nb.runs import open_run
    run = open_run(tmp_path/'run', 'smoke', {'train.engine': 'trl', 'train.nll_on': 'trl'})
    assert align(run, method)['status'] == 'done'
    assert sorted(p.name for p in (run/f'align/{method}-0/adapter').iterdir() if p.suffix != '.md') == ['adapter_config.json', 'adapter_model.safetensors']
    load_aligned(run, method)

def test_what_a_killed_training_left_counts_only_if_nothing_has_changed(tmp_path, monkeypatch):
    import mint_nb.align as module
    from mint_nb import trainer
    from mint_nb.core import file_digest
    from mint_nb.runs import Run, open_run
    run, keep, done = open_run(tmp_path/'run', 'smoke'), module.keep, []
    def dies_at_the_end(model, folder):
        if folder.name == 'adapter' and 'work' not in folder.parts: raise KeyboardInterrupt
        keep(model, folder)
    monkeypatch.setattr(module, 'keep', dies_at_the_end)
    with pytest.raises(KeyboardInterrupt): module.align(run, 'sft')             # the phase is finished, the stage is not
    monkeypatch.setattr(module, 'keep', keep)
    monkeypatch.setattr(trainer, 'train', lambda *a, real=trainer.train, **kw: done.append(a[4]) or real(*a, **kw))
    other = Run(run.path, run.params.model_copy(update={'train': run.params.train.model_copy(update={'lr': 1e-2})}))
    module.align(other, 'sft'); first = file_digest(run/'align/sft-0/adapter')
    assert len(done) == 1, 'another rate: trained anew, and not taken from what the first left'
    module.align(run, 'sft')
    assert file_digest(run/'align/sft-0/adapter') != first and not (run/'align/sft-0').joinpath('work').exists()


def test_a_model_in_shards_trains_as_a_whole_one(launched):
    "FSDP2 on two CPU processes with a row for each answer: loss, gradient and the adapter on disk are those of the whole model."
    one, two = launched['shards']
    assert (one['processes'], two['processes']) == (1, 2) and one['same'] and two['same'] and two['loss'] == pytest.approx(one['loss'], rel=1e-5) and two['seen'] == pytest.approx(one['seen'], rel=1e-5)
    same(torch.tensor(two['grads']), torch.tensor(one['grads']))
    assert one['adapter'].keys() == two['adapter'].keys() and all(two['adapter'][k] == pytest.approx(v) for k, v in one['adapter'].items())

@pytest.mark.parametrize('blind', [False, True])
def test_auto_trains_with_what_the_model_takes(tmp_path, blind):
    "A model whose attention is not the usual one, as Unsloth makes them: our engine if it takes a mask, TRL's trainer if it is causal whatever it is told."
    student, items = bench_student(SHORT, 'tiny'), bench_items(SHORT, 1000)
    for layer in student.model.get_base_model().model.layers:
        def forward(*a, attention_mask=None, plain=layer.self_attn.forward, **kw): return plain(*a, attention_mask=None if blind else attention_mask, **kw)
        forward.__module__ = 'unsloth.models.llama'; layer.self_attn.forward = forward
    log = train(student, items, 'orpo', TrainParams(engine='auto', batch=2, lr=1e-3, checkpoint_every=100), tmp_path, 4)
    assert len(log) == 4 and ('rewards/accuracies' in log[0]) == blind and ('chosen_logp' in log[0]) != blind
