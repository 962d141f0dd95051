"What a report must never do, and what its figures must survive."
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest

from mint_nb.tasks import Case, Catalogue, ChanceRanker, Finding, make_rankings
from mint_nb.metrics import difference_table, results_table, score_methods
from mint_nb.report import (
    CAPTIONS, NOTICE, all_figures, answer_list_html, by_answer, case_html, external_references, figure_html,
    known_looks, headline, heat_figure, how_made_html, in_order, look, page_html, para, portrait_bytes,
    results_markdown, results_wide, save_figure, section, table_html, training_figure, worked_cases_html,
    write_report)

CAT = Catalogue({f'OMIM:{i}': f'disease <{i}> & others' for i in range(100000, 100012)})
CASES = [Case(f'P<{i}>', note='He said "<script>alert(1)</script>".', labels={'disease': CAT.ids[i % 12]}, group=f'PMID:{i//2}',
              phenotypes=(Finding('HP:0001250', '<b>Seizure'), Finding('HP:0000154', 'Wide mouth', view='record'))) for i in range(24)]
TEACHER = ChanceRanker(CAT, 9).rank(CASES, top=3, bottom=3)


@pytest.fixture(scope='module')
def run():
    answers = {(m, s): ChanceRanker(CAT, n + 10*s).rank(CASES, 5) for n, m in enumerate(('chance', 'base', 'sft', 'mint', 'new_ranker')) for s in (0, 1)}
    answers['mint', 0] = make_rankings(r | {'answer_id': None, 'written': '<img src=x onerror=alert(1)>'} for r in answers['mint', 0].to_dict('records'))
    per_case = score_methods(answers, CASES, CAT, 'disease', {0: TEACHER}, k=3, q=3)
    return dict(answers=answers, per_case=per_case, table=results_table(per_case, 100), differences=difference_table(per_case, 'mint', 100))


def test_every_method_has_its_own_look():
    looks = known_looks()
    assert len({l.colour for l in looks.values()}) == len({l.label for l in looks.values()}) == len(looks)
    assert in_order(['zebra', 'mint', 'sft_constrained', 'sft', 'chance']) == ['chance', 'sft', 'sft_constrained', 'mint', 'zebra']
    assert 'upper reference' in look('naive_bayes', True).label and 'upper' not in look('naive_bayes').label


def test_figures_name_their_cohort_and_leave_nothing_behind(run, tmp_path):
    plt.get_backend()   # settle the backend first
    before, open_figures = plt.rcParams.copy(), plt.get_fignums()
    figures = all_figures(run['table'], run['differences'], run['per_case'], pd.DataFrame(columns=['method', 'seed', 'step', 'name', 'value']),
                          CASES, CAT, 'disease', '24 simulated patients')
    assert list(figures) == ['accuracy', 'agreement', 'differences', 'answers']
    for name, (fig, caption) in figures.items():
        assert fig.get_supxlabel() == '24 simulated patients' and 'simulated' in caption
        svg, png = save_figure(fig, tmp_path/name)
        assert png.stat().st_size > 5000 and '<dc:date>' not in svg.read_text()
    assert plt.rcParams == before and plt.get_fignums() == open_figures


def test_a_figure_needs_to_be_told_the_cohort(run):
    with pytest.raises(TypeError, match='cohort'): heat_figure(by_answer(run['per_case'], CASES, CAT, 'disease'))


def test_training_figure_survives_gaps_and_single_steps():
    log = pd.DataFrame(dict(method=['mint']*3, seed=0, step=[0, 1, 1], name=['loss', 'loss', 'log_odds'], value=[2., np.nan, .1]))
    training_figure(log, cohort='1 simulated patient')


def test_nothing_a_patient_or_model_wrote_becomes_markup(run):
    worked = worked_cases_html(run['answers'], CASES, CAT, 'disease', '.', n=3)
    page = page_html('a <title>', ['<b>'], [section('<h>', para('<p>')), worked, table_html(results_wide(run['table']), '<c>')])
    assert '<script' not in page and 'onerror=alert(1)>' not in page and '<b>Seizure' not in page and 'disease <1' not in page
    assert 'Wide mouth' in worked and NOTICE in page


def test_page_fetches_nothing(run, tmp_path):
    fig = heat_figure(by_answer(run['per_case'], CASES, CAT, 'disease'), cohort='24 simulated patients')
    page = page_html('t', [], [figure_html(fig, 'c')])
    assert external_references(page) == [] and write_report(tmp_path/'r.html', page).read_text() == page
    for bad in ('<link href="//x.org/a.css">', "<img src='http://x'>", '<style>@import "a.css"</style>', '<p style="background:url(a.png)">', '<iframe>'):
        assert external_references(bad)
        with pytest.raises(AssertionError): write_report(tmp_path/'bad.html', page + bad)
    assert not (tmp_path/'bad.html').exists()


def test_photographs_stay_out_of_the_report(tmp_path):
    (tmp_path/'images').mkdir()
    for p in ('images/P.png', 'images/P.jpg', 'P.png'): (tmp_path/p).write_bytes(b'x')
    assert portrait_bytes(Case('P', image='images/P.png'), tmp_path) == b'x'
    for image in (str(tmp_path/'P.png'), 'P.png', 'images/P.jpg', 'images/../P.png', str(tmp_path/'images/P.png'), None):
        assert portrait_bytes(Case('P', image=image), tmp_path) is None


def test_empty_answer_and_unknown_truth():
    html = case_html(Case('P1'), {'mint': ([], [])}, CAT, 'disease')
    assert 'no answer' in html and 'unknown' in html
    assert answer_list_html('MINT', '#000', [None], [''], None, CAT).count('not in the catalogue') == 1


def test_tables_quote_the_row_over_all_seeds(run):
    wide = results_wide(run['table'], ('top1',)).set_index('method')
    both = run['table'].query('method == "sft" and seed == -1 and metric == "top1"').value.iloc[0]
    assert wide.top1['SFT'].startswith(f'{100*both:.1f}')
    assert '| SFT |' in results_markdown(wide.reset_index(), 'note')


def test_headline_does_not_claim_more_than_the_interval(run):
    text = ' '.join(headline(run['table'], run['differences'], '24 simulated patients'))
    assert '24 simulated patients (12 groups), MINT' in text
    d = pd.DataFrame([dict(a='mint', b='sft', metric='top1', diff=.1, lo=-.01, hi=.2)])
    assert 'no difference shown' in headline(run['table'], d, 'x')[1]
    assert 'more often' in headline(run['table'], d.assign(lo=.01), 'x')[1] and 'less often' in headline(run['table'], d.assign(diff=-.1, lo=-.2, hi=-.01), 'x')[1]
    assert headline(run['table'][:0], d[:0], 'x') == []


def test_parameters_do_not_reveal_where_private_data_lie():
    html = how_made_html({'cohort': {'source': '/clinic/secret/cases.zip'}, 'teacher': {'weights': '/clinic/secret/vilt'}, 'student': {'model': '/clinic/secret/llama'}}, [])
    assert 'secret' not in html and 'cases.zip' in html and 'llama' in html


def test_every_figure_has_a_caption(): assert set(CAPTIONS) == {'accuracy', 'agreement', 'differences', 'training', 'answers', 'confusion', 'maps'}
