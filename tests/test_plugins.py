"""A loss, a ranker, a metric and a task from one file outside the package: they stand in the tables, the results and the report of a run."""
import textwrap
from pathlib import Path

import pytest

from mint_nb import params
from mint_nb.core import InputError, read_table
from mint_nb.tasks import TASKS
from mint_nb.params import resolve_params
from mint_nb.runs import open_run, stage_done
from mint_nb.metrics import METRICS
from mint_nb.recipes import LOSSES, RECIPES
from mint_nb.methods import METHODS
from mint_nb.pipeline import plan, run_pipeline, status

TOY = '''
    from dataclasses import dataclass, replace
    import numpy as np
    from mint_nb.losses import nll
    from mint_nb.methods import METHODS, Method
    from mint_nb.metrics import METRICS, Metric
    from mint_nb.recipes import LOSSES, RECIPES, Loss, Phase, Recipe
    from mint_nb.tasks import TASKS, Catalogue, rankings_from_scores

    def hinge(lp, total=None, margin=1., **_):
        "Likelihood, and the rejected list at least a margin below the chosen one, by mean log-probability."
        gap = (lp.chosen/lp.chosen_len)[lp.owner] - lp.rejected/lp.rejected_len
        loss = nll(lp, total=total) + (margin - gap).clamp(min=0).sum()/total.pairs
        return loss, {'gap': gap.sum().detach()/total.pairs}

    @dataclass
    class Alphabet:
        "The first names of the alphabet, whoever the patient is."
        catalogue: Catalogue
        name: str = 'alphabet'
        def rank(self, cases, top=10, bottom=0):
            order = np.argsort(np.argsort(list(self.catalogue.names.values())))
            scores = np.tile(-order.astype(float), (len(cases), 1))
            return rankings_from_scores([c.id for c in cases], scores, self.catalogue, top, bottom)

    LOSSES.register('hinge', Loss(hinge, options={'margin': 1.}))
    RECIPES.register('hinge', Recipe((Phase('hinge'),), 'Hinge', '#123456'))
    METHODS.register('alphabet', Method(lambda run, seed: Alphabet(run.catalogue), lambda run, seed: []))
    second = lambda ids, truth, catalogue: len(ids) > 1 and ids[1] == truth
    METRICS.register('second', Metric('the true answer is named second', ('note',), score=second))
    TASKS.register('advice', replace(TASKS['disease'], name='advice', system='You give advice. Answer with a numbered list.'))
'''


@pytest.fixture(scope='module')
def plugin(tmp_path_factory) -> Path:
    "The file; what it has added is taken away at the end."
    file = tmp_path_factory.mktemp('plugin')/'toy.py'
    file.write_text(textwrap.dedent(TOY))
    yield file
    params._plugins.clear()
    for table, name in ((LOSSES, 'hinge'), (RECIPES, 'hinge'), (METHODS, 'alphabet'), (METHODS, 'hinge'), (METRICS, 'second'), (TASKS, 'advice')):
        table.pop(name, None)


@pytest.fixture(scope='module')
def run(plugin, tmp_path_factory):
    over = {'plugins': [str(plugin)], 'task': 'advice', 'methods': ['chance', 'alphabet', 'hinge'], 'train.loss': {'margin': 2.}}
    return run_pipeline(tmp_path_factory.mktemp('toy')/'run', 'smoke', over, quiet=True, say=lambda line: None)


def test_all_four_are_in_the_results(run):
    table = read_table(run/'analysis/table.parquet')
    assert set(table.method) == {'chance', 'alphabet', 'hinge'} and set(table.task) == {'advice'}
    assert (table.metric == 'second').sum() == 3 and table[table.metric == 'second'].value.between(0, 1).all()
    page = (run/'analysis/report.html').read_text()
    assert 'Hinge' in page and 'alphabet' in page and 'the true answer is named second' in page
    assert 'You give advice.' in (run/'analysis/checklist.md').read_text()
    log = read_table(run/'align/hinge-0/log.parquet')
    assert set(log.phase) == {'hinge'} and 'gap' in set(log.name)


def test_nothing_of_it_is_done_again_until_the_file_changes(run, plugin):
    assert (status(run).state == 'done').all()
    digest = params._plugins[str(plugin)]
    params._plugins[str(plugin)] = 'another'
    try: assert stage_done(run, 'cohort') is None and (status(run).state == 'stale').all()
    finally: params._plugins[str(plugin)] = digest
    assert stage_done(run, 'cohort')


def test_the_plan_knows_what_is_trained(plugin):
    steps = plan(resolve_params('smoke', {'plugins': [str(plugin)], 'methods': ['alphabet', 'hinge']}))
    assert [s.stage for s in steps] == ['cohort', 'upstream/0', 'predict/alphabet-0', 'preferences/mint-0', 'align/hinge-0',
                                        'predict/hinge-0', 'analysis']


@pytest.mark.parametrize('text,said', [
    ('import nowhere_to_be_found', 'ModuleNotFoundError'), ('def f(:', 'SyntaxError'),
    ('from mint_nb.tasks import TASKS\nTASKS.register("disease", TASKS["gene"])', 'there is a task of that name already')])
def test_a_plugin_that_cannot_be_used_is_named(tmp_path, text, said):
    (tmp_path/'bad.py').write_text(text)
    with pytest.raises(InputError, match=said) as e: open_run(tmp_path/'r', 'smoke', {'plugins': [str(tmp_path/'bad.py')]})
    assert ('bad.py' in str(e.value) or 'task' in str(e.value)) and not (tmp_path/'r').exists()


def test_a_plugin_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match='field plugins'): resolve_params('smoke', {'plugins': [str(tmp_path/'gone.py')]})
    with pytest.raises(InputError, match='field plugins'): resolve_params('smoke', {'plugins': ['no_such_package']})


def test_a_hyper_parameter_that_no_loss_has(smoke_run, tmp_path):
    from mint_nb.align import align
    run = open_run(tmp_path/'r', 'smoke', {'train.loss': {'warmth': 1.}})
    with pytest.raises(InputError, match='field train.loss.warmth'): align(run, 'mint')


def test_a_run_folder_brings_no_plugin(tmp_path):
    "A folder that came by mail names a file that came with it."
    run = open_run(tmp_path/'r', 'smoke')
    (run/'evil.py').write_text('raise SystemExit("was run")')
    text = (run/'params.yaml').read_text().replace('plugins: []', f"plugins: ['{run/'evil.py'}']")
    assert 'evil' in text
    (run/'params.yaml').write_text(text)
    for look in (lambda: open_run(run.path), lambda: status(run.path)):
        with pytest.raises(InputError, match='lies in a run folder is not loaded'): look()
