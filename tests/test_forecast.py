"""How long a run will take and what it says meanwhile: counted work, the probe, corrections, the heart-beat, the growing table."""
import json, math, subprocess, sys, time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import ROOT, SMOKE_METHODS
from mint_nb import forecast as fc
from mint_nb.core import read_json, read_table
from mint_nb.params import resolve_params
from mint_nb.runs import Run, open_run
from mint_nb.pipeline import Step, Watch, learnt_before, plan, run_pipeline, unfinished, wall_seconds, work_seconds
from mint_nb.cli import app

LAPTOP, SMOKE = resolve_params('laptop'), resolve_params('smoke')
TABLE = ('chance', 'teacher', 'naive_bayes', 'linear')     # rows of the smoke run that need no language model


def test_neither_torch_nor_plots_are_imported():
    code = 'import sys, mint_nb.scores, mint_nb.forecast, mint_nb.pipeline; print([m for m in ("torch", "matplotlib", "transformers", "sklearn") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_what_a_recipe_costs():
    from mint_nb.methods import METHODS
    assert fc.lessons_of('mint') == [fc.Lesson(1., True)] and fc.lessons_of('sft') == [fc.Lesson(1., False)]
    assert fc.lessons_of('dpo') == [fc.Lesson(.5, False), fc.Lesson(.5, True, before=1)]
    assert fc.lessons_of('kto') == [fc.Lesson(.5, False), fc.Lesson(.5, True, before=2, beside=1.)]
    assert {m for m in METHODS if fc.reads_alone(m)} == {m for m in METHODS if not METHODS[m].texts}


@pytest.mark.parametrize('profile,method', [('laptop', 'mint'), ('laptop', 'sft'), ('smoke', 'mint')])
def test_tokens_are_those_that_the_engine_packs(ontology_cases, profile, method):
    "Simulated patients, the student's own tokenizer, random lists: within a tenth of what is said."
    from mint_nb.packing import Item, lay_out
    from mint_nb.students import load_student
    from mint_nb.tasks import get_task
    p = resolve_params(profile)
    cases, catalogue = ontology_cases(p)
    student, task, names = load_student('tiny'), get_task(p.task), list(catalogue.names.values())
    packed = []
    for n, c in enumerate(cases):
        lists = [[names[(n + i + j) % len(names)] for i in range(p.pairs.k)] for j in range(2 if method == 'mint' else 1)]
        packed.append(len(lay_out([Item(c.id, student.prompt_ids(task, c.note, p.pairs.k, p.student.max_prompt), [student.answer_ids(task.answer(x)) for x in lists])]).ids))
    assert sum(packed)/len(packed) == pytest.approx(fc.row_tokens(p, method == 'mint'), rel=.1)


@pytest.fixture(scope='module')
def ontology_cases():
    "Some simulated patients of a profile and their catalogue."
    from mint_nb.ontology import load_ontology
    from mint_nb.patients import simulate_cohort
    return lambda p: simulate_cohort(load_ontology(), p.cohort.model_copy(update=dict(train=24, calibration=1, validation=1, test=6)), p.task)


def test_weights_are_those_of_the_students():
    from mint_nb.doctor import sizes
    from mint_nb.students import add_lora, load_student
    tiny = add_lora(load_student('tiny'), SMOKE.student)
    have, said = sizes(tiny), fc.weights_of(SMOKE)
    assert round(said.adapter*1e9) == have['adapter'] and round(said.head*1e9) == have['head']
    assert 0 <= have['frozen'] - (said.lower + said.upper)*1e9 < .05*have['frozen']      # the rest are norms


def test_work_by_hand():
    w, updates = fc.weights_of(LAPTOP), 720
    sft, mint, dpo = (fc.train_work(LAPTOP, m, first=False) for m in ('sft', 'mint', 'dpo'))
    assert sft['train'] == pytest.approx(updates*(143.4*(2*w.upper + 3*w.adapter) + 2*56.4*w.head))
    reference = 240*(199.8*(w.upper + w.adapter) + 112.8*w.head)
    assert dpo['train'] == pytest.approx(sft['train']/2 + mint['train']/2 + reference)
    assert fc.write_work(LAPTOP, 'base')['write'] == pytest.approx(96*160*(w.lower + w.upper + w.head))
    assert fc.train_work(resolve_params('laptop', {'student.lora_layers': 0}), 'sft')['train'] > sft['train']
    mine = resolve_params('laptop', {'predict.constrained': ['mint']})
    row = lambda m: Step('59_predict', f'predict/{m}-0', {'method': m, 'seed': 0})
    assert fc.work_of(row('mint'), mine)['write'] == pytest.approx(2*fc.work_of(row('mint'), LAPTOP)['write'])


@pytest.mark.parametrize('profile,over', [('smoke', {}), ('smoke', {'task': 'tissue'}), ('laptop', {}), ('laptop', {'task': 'tissue'}), ('laptop', {'task': 'gene'}),
                                          ('reasoning', {}), ('study', {}), ('gpu', {}), ('paper', {}), ('paper', {'task': 'tissue'})])
def test_every_profile_has_a_forecast(profile, over):
    p = resolve_params(profile, over)
    p = p.model_copy(update={'cohort': p.cohort.model_copy(update={k: getattr(p.cohort, k) or 1000 for k in ('train', 'test')})})
    steps = plan(p)
    parts = fc.parts_of(p, steps, fc.REFERENCE, 2)
    assert set(parts) == {s.stage for s in steps} and all(0 < x.start + x.body < math.inf and x.body >= 0 for x in parts.values())
    end = fc.Forecast(steps, parts, 2).finish()
    assert end['analysis'] == max(end.values()) < math.inf


def test_the_probe_is_small():
    "Bounded work, not time: what a call multiplies, and how long calls are repeated."
    pieces = {f: make() for f, make in fc.spec(LAPTOP).items()}
    assert pieces['train'][1] < 2 and pieces['write'][1] < 2 and pieces['small'][1] < .1 and pieces['elements'][1] < .01    # 10^9
    calls = {'n': 0}
    def call(): calls['n'] += 1
    start = time.perf_counter(); fc.rate(call, .05)
    assert calls['n'] > 2 and fc.rate.__defaults__ == (.2, 4) and fc.probe.__defaults__[-1] == .2      # 9 measurements of .2 s: under two seconds
    assert time.perf_counter() - start < 5
    found = fc.probe(SMOKE, 2, ['python'], .01)
    assert found['beside'].train == fc.REFERENCE['beside'].train and found['alone'].python > 0


def test_a_probe_leaves_the_threads_as_they_were():
    import torch
    before = torch.get_num_threads()
    fc.probe(LAPTOP, 2, ['small'], .01)
    assert torch.get_num_threads() == before


def test_corrections_by_hand():
    seen = [fc.Seen('align', 59., 119.), fc.Seen('rank', 9., 9.), fc.Seen('write', 119., 59.)]
    weights = {'align': (2., .1*9/60, .1), 'write': (.1*59/60, .1*9/60, 2.)}
    for kind, w in weights.items():
        assert math.log(fc.correction(seen, kind)) == pytest.approx((w[0]*math.log(2) - w[2]*math.log(2))/(sum(w) + .5))
    assert fc.correction(seen, 'align') > 1 > fc.correction(seen, 'write')


def toy(seconds: float = 90.) -> tuple[list[Step], fc.Forecast]:
    steps = [Step('49_align', f'align/{m}-0', {'method': m, 'seed': 0}) for m in ('sft', 'mint')]
    return steps, fc.Forecast(steps, {s.stage: fc.Part('align', 10., seconds) for s in steps}, 1)


def test_a_line_at_least_every_half_minute(tmp_path):
    steps, forecast = toy()
    now, lines = [0.], []
    watch = Watch(Run(tmp_path, SMOKE), steps, forecast, lambda: None, lambda line: lines.append((now[0], line)), True, clock=lambda: now[0])
    for t in range(201):
        now[0] = float(t)
        if t == 100: watch.began.clear(); forecast.learn('align/sft-0', 100., 90.); watch.speak('done')
        if t in (0, 100): watch.began[steps[t//100].stage] = now[0]
        watch.tick()
    assert [t for t, _ in lines] == [30, 60, 90, 100, 130, 160, 190]
    assert '49_align-sft-0 for 30 s; about 3 min left' in lines[0][1] and 'about 70 s left' in lines[4][1]


def test_lines_reach_a_pipe_at_once():
    code = 'import time; from mint_nb.pipeline import aloud; aloud("a line"); time.sleep(60)'
    process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    try: assert process.stdout.readline() == 'a line\n' and process.poll() is None
    finally: process.kill(); process.wait()


def test_rows_without_a_model_come_first():
    stages = [s.stage for s in plan(resolve_params('smoke', {'methods': list(SMOKE_METHODS), 'seeds': [0, 1]}))]
    at = stages.index
    assert at('upstream/1') < min(at(f'predict/{m}-{s}') for m in TABLE for s in (0, 1))
    assert max(at(f'predict/{m}-{s}') for m in TABLE for s in (0, 1)) < at('preferences/mint-0') < at('align/sft-0') < at('predict/base-0')
    assert len(stages) == len(set(stages)) and stages[-1] == 'analysis'


def test_until_still_stops_before_the_answers(tmp_path):
    run = run_pipeline(tmp_path/'r', 'smoke', {'methods': ['chance', 'mint']}, until='29_upstream', quiet=True, say=lambda line: None)
    assert (run/'upstream/both-0/heldout.parquet').exists() and not (run/'predictions').exists()


@pytest.fixture(scope='module')
def small_run(tmp_path_factory) -> tuple[Run, list[str]]:
    "A small run, one step at a time, whose lines are kept; a row that needs no model is always waited for."
    lines: list[str] = []
    folder, over = tmp_path_factory.mktemp('forecast')/'r', {'methods': ['chance', 'teacher', 'base']}
    with pytest.MonkeyPatch.context() as m:
        m.setattr('mint_nb.pipeline.SOON', float('inf'))
        return run_pipeline(folder, 'smoke', over, say=lines.append, quiet=True, workers=1), lines


def test_the_table_grows(small_run):
    run, lines = small_run
    tables = [t for t in lines if t.startswith('rows so far')]
    assert len(tables) == 1 and 'still to come: base in about' in tables[0]
    assert lines.index(tables[0]) < next(i for i, t in enumerate(lines) if '59_predict-base-0' in t and '/6]' in t)
    final = read_table(run/'analysis/table.parquet').set_index(['method', 'metric'])
    for m in ('chance', 'teacher'):
        said = next(t.split() for t in tables[0].splitlines() if t.split()[0] == m)
        top1 = final.loc[m, 'top1']
        assert said[1:5] == [f'{100*top1.value:.0f}', f'({100*top1.lo:.0f}', 'to', f'{100*top1.hi:.0f})']
    assert 'about' in lines[0] and all('left' in t for t in lines[1:-1] if t.startswith('['))


def test_what_was_said_and_what_it_took_are_kept(small_run):
    run, _ = small_run
    said, steps = read_json(run/'forecast.json'), plan(run.params)
    assert set(said['steps']) == {s.stage for s in steps} and said['seconds'] > 0 and set(said['speeds']['alone']) == set(fc.Speeds._fields)
    assert all(wall_seconds(run, s) > work_seconds(run, s) >= 0 for s in steps)
    assert learnt_before(run.params)      # the digest is the one that the teacher's stage makes
    done = subprocess.run([sys.executable, str(ROOT/'tools/forecast.py'), str(run.path)], capture_output=True, text=True)
    assert done.returncode == 0 and '59_predict-base-0' in done.stdout and 'MEASURED = {' in done.stdout, done.stderr


def test_report_of_an_unfinished_run(small_run, tmp_path):
    import shutil
    run = Run(shutil.copytree(small_run[0].path, tmp_path/'copy'), small_run[0].params)
    shutil.rmtree(run/'analysis'); (run/'predictions/base-0.parquet').unlink()
    shown = CliRunner().invoke(app, ['report', str(run.path)])
    assert shown.exit_code == 0 and '2 of 6 steps are missing' in shown.output, shown.output
    assert 'teacher' in shown.output and '59_predict-base-0 (would run again), 69_analysis (would run again)' in shown.output
    assert CliRunner().invoke(app, ['report', str(run.path), '--csv', str(tmp_path/'x.csv')]).exit_code == 2
    fresh = open_run(tmp_path/'new', 'smoke')
    assert 'no row is ready yet' in unfinished(fresh) and CliRunner().invoke(app, ['report', str(fresh.path)]).exit_code == 0


def test_a_run_of_the_old_order_goes_on(small_run, tmp_path):
    "Where the answers of chance came last, they are made, and nothing else again."
    import shutil
    run = Run(shutil.copytree(small_run[0].path, tmp_path/'copy'), small_run[0].params)
    kept = [e for e in (run/'manifest.jsonl').read_text().splitlines() if json.loads(e)['stage'] not in ('predict/chance-0', 'analysis')]
    (run/'manifest.jsonl').write_text('\n'.join(kept) + '\n'); (run/'predictions/chance-0.parquet').unlink()
    lines: list[str] = []
    run_pipeline(run.path, 'smoke', {'methods': ['chance', 'teacher', 'base']}, say=lines.append, quiet=True)
    assert '2 to do' in lines[0] and len([t for t in lines if 'done before' in t]) == 4
    assert not [t for t in lines if t.startswith('rows so far')]      # the whole table follows at once


def test_the_calibration_writes_its_cell_and_nothing_else(tmp_path, monkeypatch):
    import importlib.util
    spec = importlib.util.spec_from_file_location('forecast_tool', ROOT/'tools/forecast.py')
    tool = importlib.util.module_from_spec(spec); spec.loader.exec_module(tool)
    file = tmp_path/'71_forecast.ipynb'
    before = (ROOT/'nbs/71_forecast.ipynb').read_text()
    file.write_text(before)
    monkeypatch.setattr(tool, 'nbs_folder', lambda: Path(tmp_path))
    tool.write_cell(tool.cell_of({'align': fc.Cost(1.5, .25, .5)}, 'from a test'))
    a, b = json.loads(before)['cells'], json.loads(file.read_text())['cells']
    changed = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    assert len(changed) == 1 and ''.join(changed[0][1]['source']).splitlines()[1:3] == ["MEASURED = {   # from a test", "    'align': Cost(1.5, 0.25, 0.5),"]
