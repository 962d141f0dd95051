"""Measures of calibration against torchmetrics and scikit-learn, treatments on the engine, and the resumable grid."""
import shutil

import numpy as np, pytest, torch

from mint_nb.runs import open_run
from mint_nb.calibration import MEASURES, calibration_error, conformal_lists, ece_bounds, fit_conformal, list_table
from mint_nb.recalibrate import (
    TREATMENTS, bin_accuracy, calibration_loss, calibration_targets, published_calibration_loss)


def table(seed, n=300, N=6, heat=2.0):
    rng = np.random.default_rng(seed)
    z = rng.normal(0, heat, (n, N)); p = np.exp(z)/np.exp(z).sum(1, keepdims=True)
    return p, np.where(rng.random(n) < .6, p.argmax(1), rng.integers(0, N, n))


@pytest.mark.parametrize('seed', range(8))
def test_equal_to_torchmetrics(seed):
    from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error
    p, y = table(seed, heat=.5 + seed/2)
    P, Y = torch.tensor(p), torch.tensor(y)
    assert MEASURES['ece'](p, y)[0] == pytest.approx(multiclass_calibration_error(P, Y, 6, n_bins=10, norm='l1').item(), abs=1e-6)
    right = torch.tensor(p.argmax(1) == y)
    assert MEASURES['auroc'](p, y)[0] == pytest.approx(binary_auroc(P.max(1).values, right.long()).item(), abs=1e-6)


def test_class_wise_error_is_the_mean_of_the_binary_errors_of_torchmetrics():
    from torchmetrics.functional.classification import binary_calibration_error
    p, y = table(3)
    # torchmetrics takes the probability of a class and whether it is the truth; it bins max(p, 1 - p) for neither, so the columns compare directly
    theirs = np.mean([binary_calibration_error(torch.tensor(p[:, j]), torch.tensor(y == j).long(), n_bins=10, norm='l1').item() for j in range(p.shape[1])])
    assert MEASURES['cw_ece'](p, y)[0] == pytest.approx(theirs, abs=1e-6)


def test_equal_to_scikit_learn():
    from sklearn.metrics import brier_score_loss, log_loss
    p, y = table(5)
    assert MEASURES['nll'](p, y)[0] == pytest.approx(log_loss(y, p, labels=range(6)), abs=1e-6)
    mine = np.mean([brier_score_loss(y == j, p[:, j]) for j in range(6)])*6
    assert MEASURES['brier'](p, y)[0] == pytest.approx(mine, abs=1e-6)


def test_weights_are_repetitions():
    p, y = table(1, n=40)
    w = np.random.default_rng(0).integers(0, 3, 40)
    again = np.repeat(np.arange(40), w)
    for name, f in MEASURES.items():
        if name == 'ece_mass': continue                 # its cuts are those of the sample
        loose = .01 if name == 'aurc' else 1e-9          # a repeated case is one step of the curve, not two
        assert f(p, y, w[None].astype(float))[0] == pytest.approx(f(p[again], y[again])[0], abs=loose), name


def test_bounds_hold_on_a_thousand_tables():
    for s in range(1000):
        p, y = table(s, n=5 + s % 60, N=2 + s % 17, heat=.1 + s/100)
        y = y % p.shape[1]
        c, ok = p.max(1), p.argmax(1) == y
        b = ece_bounds(ok.mean(), c.mean(), p.shape[1])
        assert b.lower - 1e-9 <= calibration_error(c, ok)[0] <= b.upper + 1e-9


def test_targets_are_distributions_without_gradient():
    z = torch.randn(50, 7, requires_grad=True)
    logp = z.log_softmax(1)
    acc = np.linspace(.05, .95, 10)
    t = calibration_targets(logp, acc)
    assert not t.requires_grad and torch.allclose(t.sum(1), torch.ones(50))
    g, = torch.autograd.grad(calibration_loss(logp, acc, 'kl'), z)
    assert torch.allclose(g, (logp.exp() - t).detach()/50, atol=1e-6)


def test_published_form_forgets_the_surest_answers():
    logp = torch.tensor([[4., 0, 0, 0], [6., 0, 0, 0]]).log_softmax(1)
    assert (logp.exp().max(1).values > .9).all()
    acc = bin_accuracy(np.array([.95]*20), np.array([1, 0]*10))
    assert published_calibration_loss(logp, acc) == 0 and published_calibration_loss(logp, acc, bins=10) > .1
    assert calibration_loss(logp, acc) > .1


def test_published_targets_add_up():
    "The targets of the other answers add to what the accuracy leaves (four options, as in the published code)."
    p, acc = torch.tensor([[.5, .3, .15, .05]]), .7
    g = np.log(3)/p[0, 1]/(1 - acc)
    bend = torch.tanh(g*p[0, 1:])
    t = (1 - acc)/(bend.sum() + 3)*(bend + 1)
    assert t.sum().item() == pytest.approx(1 - acc)
    expected = (p[0, 0] - acc)**2 + ((p[0, 1:] - t)**2).sum()
    assert published_calibration_loss(p.log(), np.full(10, acc)).item() == pytest.approx(expected.item(), abs=1e-6)


def test_lists_cover_by_group():
    p, _ = table(0, n=2000, N=16)
    rng = np.random.default_rng(9)
    y = np.array([rng.choice(16, p=q) for q in p])
    sharp = p**2/(p**2).sum(1, keepdims=True)
    for price in (0., .02):
        lists = conformal_lists(sharp[600:], fit_conformal(sharp[:600], y[:600], penalty=price))
        row = list_table(lists, y[600:], np.arange(1400)//3).set_index('metric').loc['coverage of lists']
        assert row.lo <= .9 <= row.hi


def test_grid_goes_on_where_it_was(smoke_run, tmp_path):
    from mint_nb.calibration_study import calibrate_run
    run, grid = open_run(shutil.copytree(smoke_run.path, tmp_path/'run')), {'mint': ('none', 'temperature', 'cft'), 'mint_cal': ('none', 'temperature')}
    first = calibrate_run(run, grid, workers=1)
    stages = {e['stage']: e['time'] for e in run.manifest}
    (run/'calibrate/mint-cft-0.parquet').unlink()                     # as if it had been killed before this was written
    again = calibrate_run(open_run(run.path), grid, workers=1)
    changed = {e['stage'] for e in run.manifest if e['time'] != stages.get(e['stage'])}
    assert changed <= {'calibrate/mint-cft-0/confidence'}
    assert first.equals(again)
    assert {'cohort', 'method', 'treatment', 'seed', 'metric', 'value', 'lo', 'hi', 'n'} <= set(first.columns) and set(first.method) == {'mint', 'mint_cal'}


def test_command_names_a_bad_question(tmp_path):
    from typer.testing import CliRunner
    from mint_nb.cli import app
    bad = tmp_path/'bad.jsonl'
    bad.write_text('{"question": "2 + 2?", "options": ["3", "4"]}\n')
    result = CliRunner().invoke(app, ['calibrate', '--questions', str(bad), '--student', 'tiny', '--profile', 'smoke'])
    assert result.exit_code == 2 and 'question 1' in result.stderr and 'answer' in result.stderr


def test_every_treatment_is_explained():
    from mint_nb.calibration_study import FITTED
    from mint_nb.honest import TREATED
    assert set(TREATED) - {'none', *FITTED} <= set(TREATMENTS)
