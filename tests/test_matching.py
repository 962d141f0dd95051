"Contracts of the matching rankers: against slow reference code, on odd input, and on real phenopackets."
import os
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest

from mint_nb.core import InputError
from mint_nb.tasks import Case, Catalogue, Finding, Ranker, normalise
from mint_nb.params import CohortParams
from mint_nb.ontology import load_ontology
from mint_nb.patients import simulate_cohort
from mint_nb.readers import load_phenopackets
from mint_nb.baselines import (
    LinearRanker, NaiveBayesRanker, ResnikRanker, answer_diseases, background_frequencies, catalogue_of,
    close_upwards, finding_matrix)

ROOT = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def ontology(): return load_ontology()

@pytest.fixture(scope='module')
def omim(ontology): return catalogue_of(ontology)

@pytest.fixture(scope='module')
def cohort(ontology): return simulate_cohort(ontology, CohortParams(diseases=10, train=60, calibration=8, validation=8, test=30))

@pytest.fixture(scope='module')
def rankers(ontology, cohort):
    cases, catalogue = cohort
    train = [c for c in cases if c.split == 'train']
    return [NaiveBayesRanker(ontology, catalogue), NaiveBayesRanker(ontology, catalogue, 'all', True), NaiveBayesRanker(ontology, catalogue, use_excluded=True),
            ResnikRanker(ontology, catalogue), LinearRanker.fit(train, catalogue, ontology)]

def test_names_of_all_omim_are_unique(ontology, omim):
    assert len({normalise(n) for n in omim.names.values()}) == len(omim) > 8000
    twins = [d for d, n in ontology.diseases.items() if n == 'Anus, imperforate']
    assert len(twins) == 2 and all(omim.names[d] == f'Anus, imperforate ({d[5:]})' for d in twins)
    assert catalogue_of(ontology, twins[:1]).names == {twins[0]: 'Anus, imperforate'}      # alone, it needs no number

def test_naive_bayes_equals_the_formula(ontology, cohort):
    cases, catalogue = cohort
    ranker, case = NaiveBayesRanker(ontology, catalogue, noise=.1), cases[0]
    P = background_frequencies(ontology)
    for j, d in enumerate(catalogue.ids):
        known = dict(ontology.disease_findings(d))
        total = 0
        for t in set(case.findings('note')):
            share = max((known.get(s, 0) for s in ontology.descendants(t)), default=0)
            total += np.log((.9*share + .1*P[ontology.index[t]])/P[ontology.index[t]])
        assert np.isclose(ranker.scores([case])[0, j], total, atol=1e-3)

def test_absent_findings_count_only_when_asked(ontology, cohort):
    cases, catalogue = cohort
    bare = [replace(c, phenotypes=tuple(f for f in c.phenotypes if not f.excluded)) for c in cases]
    plain, full = (NaiveBayesRanker(ontology, catalogue, use_excluded=e) for e in (False, True))
    assert np.array_equal(plain.scores(cases), plain.scores(bare))
    assert np.allclose(full.scores(bare), plain.scores(bare))
    denied = [replace(c, phenotypes=c.phenotypes + (Finding('HP:0001263', excluded=True, view='note'),)) for c in bare]
    assert (full.scores(denied) <= full.scores(bare) + 1e-4).all() and (full.scores(denied) < full.scores(bare) - .01).any()

def test_leak_control_touches_only_the_diseases_of_the_publication(ontology, omim):
    disease = 'OMIM:105830'
    paper = next(r for refs in ontology.annotations[ontology.annotations.disease_id == disease].references for r in refs if r.startswith('PMID'))
    terms = [t for t, _ in ontology.disease_findings(disease)][:8]
    case = Case('P1', phenotypes=tuple(Finding(t) for t in terms), group=paper)
    plain, own, strict = (NaiveBayesRanker(ontology, omim, leak_control=l).scores([case])[0] for l in (False, True, 'strict'))
    cited = {omim.index[d] for d in ontology.cited_in(paper)}
    for other in (own, strict): assert set(np.flatnonzero(~np.isclose(plain, other, atol=1e-4))) <= cited
    assert strict[omim.index[disease]] < plain[omim.index[disease]]
    elsewhere = replace(case, group='PMID:0')
    assert np.array_equal(NaiveBayesRanker(ontology, omim, leak_control=True).scores([elsewhere])[0], plain)

def test_a_disease_that_the_paper_alone_describes_goes_last(ontology, omim):
    rows = ontology.rows[ontology.rows.aspect == 'P'].groupby('disease_id').reference
    disease = next(d for d, r in rows if r.nunique() == 1 and r.iloc[0].startswith('PMID') and ';' not in r.iloc[0] and d in omim)
    case = Case('P1', phenotypes=tuple(Finding(t) for t, _ in ontology.disease_findings(disease)), group=ontology.rows[ontology.rows.disease_id == disease].reference.iloc[0])
    clean = NaiveBayesRanker(ontology, omim, leak_control=True).scores([case])[0]
    assert clean[omim.index[disease]] == clean.min()
    assert NaiveBayesRanker(ontology, omim).scores([case])[0].argmax() == omim.index[disease]

def test_every_ranker_keeps_the_protocol(rankers, cohort):
    cases, catalogue = cohort
    test = [c for c in cases if c.split == 'test']
    for r in rankers:
        assert isinstance(r, Ranker) and r.name
        out = r.rank(test, top=4, bottom=3)
        assert out.groupby('case_id')['rank'].apply(list).map(tuple).unique().tolist() == [(1, 2, 3, 4, 8, 9, 10)]
        assert set(out.answer_id) <= set(catalogue.ids) and len(r.rank([])) == 0
        assert out.equals(r.rank(test, top=4, bottom=3))                                    # deterministic
        assert r.rank(test, top=50).groupby('case_id').size().eq(len(catalogue)).all()      # more asked for than there is

def test_company_and_order_do_not_matter(rankers, cohort):
    cases = [c for c in cohort[0] if c.split == 'test']
    for r in rankers: assert np.allclose(r.scores(cases)[::-1], r.scores(cases[::-1]), atol=1e-4)

def test_diagnoses_are_never_read(rankers, cohort):
    cases = [c for c in cohort[0] if c.split == 'test']
    blind = [replace(c, labels={}, split='') for c in cases]
    for r in rankers: assert r.rank(cases).equals(r.rank(blind))

def test_the_note_view_sees_no_portrait(rankers, cohort):
    cases = cohort[0]
    masked = [replace(c, phenotypes=tuple(f for f in c.phenotypes if f.view in ('note', 'both'))) for c in cases]
    for r in rankers: assert np.array_equal(r.scores(cases), r.scores(masked)) == (r.view == 'note')

def test_odd_cases(ontology, rankers):
    odd = [Case('empty'), Case('unknown', phenotypes=(Finding('HP:9999999'),)), Case('old', phenotypes=(Finding('HP:0000057'), Finding('HP:0008665')))]
    assert np.asarray(finding_matrix(odd, ontology).sum(axis=1)).ravel().tolist() == [0, 0, 1]      # an old id and its successor are one finding
    for r in rankers: assert len(r.rank(odd, top=3)) == 9 and not np.isnan(r.scores(odd)).any()
    assert set(np.unique(close_upwards(finding_matrix(odd, ontology), ontology).data)) <= {1}

def test_answers_that_the_ontology_does_not_know(ontology):
    mixed = Catalogue({'OMIM:105830': 'Angelman syndrome', 'OMIM:999999': 'A disease of tomorrow', 'UBE3A': 'UBE3A', 'NOGENE': 'NOGENE'})
    assert [len(p) for p in np.split(answer_diseases(ontology, mixed)[0], answer_diseases(ontology, mixed)[1][1:])] == [1, 1, 1, 1]
    case = Case('P1', phenotypes=(Finding('HP:0001250'), Finding('HP:0000748')))
    for r in (NaiveBayesRanker(ontology, mixed), ResnikRanker(ontology, mixed)):
        s = r.scores([case])[0]
        assert s[0] == s[2] > s[1] == s[3]

def test_linear_needs_two_answers_and_skips_the_unlabelled(ontology, cohort):
    cases, catalogue = cohort
    train = [c for c in cases if c.split == 'train']
    hidden = [replace(c, labels={}) for c in train]
    with pytest.raises(InputError, match='field labels.disease: a linear model needs cases of two answers, there are 0'): LinearRanker.fit(hidden, catalogue, ontology)
    full, more = (LinearRanker.fit(t, catalogue, ontology) for t in (train, train + hidden))
    assert np.allclose(full.scores(train), more.scores(train))
    outside = [replace(c, labels={'disease': 'OMIM:0'}) for c in train[:5]]
    assert np.allclose(full.scores(train), LinearRanker.fit(train + outside, catalogue, ontology).scores(train))

def real_data(name):
    for folder in filter(None, (os.environ.get('MINT_DATA'), ROOT.parent/'shared'/'data')):
        if (Path(folder)/name).exists(): return Path(folder)/name
    pytest.skip(f'{name} is not there; set MINT_DATA to the folder that holds it')

def test_real_patients_over_all_of_omim(ontology, omim):
    "Order and rough size of the figures; a broken parser or a leak would move them far outside."
    cases, _ = load_phenopackets(real_data('phenopackets.zip'), ontology, on_error='list')
    cases = [c for c in cases if c.labels.get('disease') in omim and c.findings('all')]
    assert len(cases) > 5000
    def top1(ranker):
        first = ranker.rank(cases, top=1).set_index('case_id').answer_id
        return np.mean([first[c.id] == c.labels['disease'] for c in cases])
    plain, clean, strict = (top1(NaiveBayesRanker(ontology, omim, 'all', leak)) for leak in (False, True, 'strict'))
    resnik = top1(ResnikRanker(ontology, omim, 'all'))
    assert .4 < plain < .6 and .35 < resnik < plain
    assert .2 < clean < .35 and .03 < strict < clean
