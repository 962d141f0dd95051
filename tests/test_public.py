"""The names that `mint_nb` itself has, the lines of Python that the README shows, and a preference dataset of one's own."""
import json, subprocess, sys

import datasets, pytest

import mint_nb
from mint_nb import InputError, load_student, open_run, train
from mint_nb.core import named_object
from mint_nb.params import Params
from mint_nb.runs import VERBS

from conftest import ROOT


def test_every_name_and_verb_is_there():
    for where in (*mint_nb.PUBLIC.values(), *VERBS.values()): assert named_object(where) is not None, where
    assert set(mint_nb.PUBLIC) <= set(dir(mint_nb)) and 10 < len(mint_nb.PUBLIC) < 16
    with pytest.raises(AttributeError, match='has no attribute'): mint_nb.__getattr__('nothing')


def test_the_package_loads_nothing_until_it_is_asked():
    code = 'import sys, mint_nb; mint_nb.open_run; print([m for m in ("numpy", "pandas", "torch") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'


def test_the_lines_of_the_readme(tmp_path):
    "Training, ranking and new cases, from a folder that does not exist yet."
    run = open_run(tmp_path/'demo', 'smoke')
    run.align('mint')
    rankings = run.ranker('base').rank(run.cases('test'))
    problems = run.predict(ROOT/'data/examples/notes.jsonl', out=tmp_path/'answers')
    assert set(rankings.case_id) <= {c.id for c in run.cases('test')} and len(run.catalogue) > 4
    assert not [p for p in problems if 'record' in str(p)]
    rows = [json.loads(l) for l in (tmp_path/'answers/predictions.jsonl').read_text().splitlines()]
    notes = [json.loads(l) for l in (ROOT/'data/examples/notes.jsonl').read_text().splitlines()]
    assert len([r for r in rows if 'answers' in r or 'case_id' in r or 'id' in r]) >= len(notes)


TEXTS = [{'prompt': f'Patient {i}: long fingers and a high palate.', 'chosen': 'Marfan syndrome', 'rejected': 'Gout'} for i in range(4)]
say = lambda role, text: [{'role': role, 'content': text}]
CHATS = [{k: say('user' if k == 'prompt' else 'assistant', v) for k, v in r.items()} for r in TEXTS]
WHOLE = [{k: r['prompt'] + r[k] for k in ('chosen', 'rejected')} for r in CHATS]


@pytest.mark.parametrize('rows', [TEXTS, CHATS, WHOLE], ids=['text', 'chat', 'whole conversations'])
def test_the_forms_of_a_dataset_train_alike_or_learn(rows):
    "Text and chat are one dataset; it comes as a `datasets.Dataset`, as from a file or the hub."
    params = Params().model_copy(update={'train': Params().train.model_copy(update={'epochs': 6, 'lr': 1e-2})})
    student, log = train(load_student('tiny'), datasets.Dataset.from_list(rows), 'orpo', params)
    assert len(log) == 24 and log[-1]['loss'] < log[0]['loss'] and hasattr(student.model, 'peft_config')


@pytest.mark.parametrize('loss', ['sft', 'dpo', 'kto'])
def test_any_loss_of_the_table(loss):
    params = Params().model_copy(update={'train': Params().train.model_copy(update={'epochs': 1})})
    assert len(train(load_student('tiny'), TEXTS, loss, params).log) == 4


def test_rows_that_lack_something_are_named():
    with pytest.raises(InputError, match='field rejected'): train(load_student('tiny'), [{'prompt': 'x', 'chosen': 'y'}])
    with pytest.raises(InputError, match='field prompt'): train(load_student('tiny'), [{'chosen': 'y', 'rejected': 'z'}])
    with pytest.raises(InputError, match='no such loss'): train(load_student('tiny'), TEXTS, 'ppo')


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, '-m', 'mint_nb', '--version'], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f'mint-nb {mint_nb.__version__}\n'
