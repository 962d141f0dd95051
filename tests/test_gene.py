"The gene task from cohort to report, and notes as cases, on small and on real data."
import gzip, json, re
from collections import Counter

import numpy as np, pandas as pd, pytest

from mint_nb.core import InputError, read_json, read_table
from mint_nb.tasks import Case, Catalogue, Finding, get_task
from mint_nb.runs import open_run
from mint_nb.metrics import score_cases
from mint_nb.ontology import load_ontology
from mint_nb.readers import answer_table, load_cases
from mint_nb.cohort import make_cohort
from mint_nb.decode import rankings_from_texts
from mint_nb.baselines import (
    run_answers, GeneCatalogue, LinearRanker, NaiveBayesRanker, catalogue_of, diseases_of_genes, gene_catalogue,
    gene_id, gene_names, genes_from_diseases, genes_of_disease)
from mint_nb.outputs import predict_cases
from mint_nb.analysis import analysis

GENES = {'UBE3A': 'OMIM:105830', 'FGFR3': 'OMIM:187600', 'ARID1B': 'OMIM:135900', 'NSD1': 'OMIM:117550', 'FBN1': 'OMIM:154700'}


@pytest.fixture(scope='module')
def ontology(): return load_ontology()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A gene run of the smoke profile, up to the report."
    run = open_run(tmp_path_factory.mktemp('gene')/'run', 'smoke', {'task': 'gene', 'methods': ['chance', 'naive_bayes', 'linear', 'base', 'base_constrained']})
    analysis(run)
    return run


def notes(n_groups=3, per_group=2, **more):
    "Notes of patients of five genes, as a user would write them down."
    for gene, disease in GENES.items():
        for g in range(n_groups):
            for i in range(per_group):
                yield {'id': f'{gene}-{g}-{i}', 'note': f'Patient {i} of family {g}: a child with seizures and a short stature.', 'sex': 'F', 'age': 3 + i,
                       'disease_id': disease, 'gene': gene, 'pmid': f'PMID:{gene}{g}'} | more


@pytest.fixture(params=['notes.jsonl', 'notes.jsonl.gz'])
def note_file(request, tmp_path):
    text = ''.join(json.dumps(r) + '\n' for r in notes()).encode()
    (tmp_path/request.param).write_bytes(gzip.compress(text) if request.param.endswith('.gz') else text)
    return tmp_path/request.param


# --- the catalogue

def test_all_genes_with_a_disease(ontology):
    genes = gene_catalogue(ontology)
    assert len(genes) > 4500 and not {'-', ''} & set(genes.ids) and all(g == n for g, n in genes.names.items())
    assert all(any(ontology.disease_findings(d) for d in diseases_of_genes(ontology)[g]) for g in genes.ids[::50])
    assert all(gene_id(genes, g).startswith('NCBIGene:') for g in genes.ids)
    of = {g for d in ontology.diseases if ontology.disease_findings(d) for g in genes_of_disease(ontology, d)}
    assert of == set(genes.ids)


def test_a_symbol_is_right_to_the_letter(ontology):
    "No symbol with one letter changed, added or dropped is taken for another gene."
    genes, rng, letters = gene_catalogue(ontology), np.random.default_rng(0), 'ABCDEFGHIKLMNPRSTUVWXYZ0123456789'
    for g in rng.choice(genes.ids, 300, replace=False):
        i, x = rng.integers(len(g)), letters[rng.integers(len(letters))]
        for other in (g[:i] + x + g[i + 1:], g + x, g[:i] + g[i + 1:]):
            found = genes.resolve(other).id
            assert found is None or re.sub(r'\W', '', found) == re.sub(r'\W', '', other), (g, other, found)
        assert genes.resolve(g.lower()).id == genes.resolve(f'{g} (some protein)').id == genes.resolve(f' "{g}" ').id == g


def test_an_alias_of_two_genes_names_neither():
    genes = GeneCatalogue({'A1': 'A1', 'B2': 'B2'}, {'A1': ['HGNC:1', 'OLD'], 'B2': ['HGNC:2', 'OLD', 'A1']})
    assert [genes.resolve(n).id for n in ('HGNC:2', 'OLD', 'A1')] == ['B2', None, 'A1']


def test_a_written_list_of_genes(ontology):
    task, genes = get_task('gene'), gene_catalogue(ontology)
    text = task.answer(['FGFR3', 'UBE3A', 'ubiquitin protein ligase', 'FGFR3'])
    assert text.startswith("POTENTIAL_GENES:\n1. 'FGFR3'\n2. 'UBE3A'")
    free = 'Likely genes:\n1. **FGFR3** (achondroplasia)\n2. UBE3A - Angelman syndrome\n3. WAS gene\n4. F9: haemophilia'
    lists = rankings_from_texts({'P1': text, 'P2': free}, task, genes)
    assert lists[lists.case_id == 'P1'].answer_id.tolist() == ['FGFR3', 'UBE3A', None]
    assert lists[lists.case_id == 'P2'].answer_id.tolist() == ['FGFR3', 'UBE3A', 'WAS', 'F9']


def test_hgnc_table_that_is_none(tmp_path):
    (tmp_path/'hgnc.txt').write_text('symbol\tname\nUBE3A\tx\n')
    with pytest.raises(InputError, match='field hgnc_id, alias_symbol, prev_symbol: the file lacks columns'): gene_names(tmp_path/'hgnc.txt')


def test_genes_of_a_ranking_of_diseases(ontology):
    "The same order as ranking genes, up to genes that share a score; unresolved names and diseases without a gene are passed over."
    terms = ('HP:0001250', 'HP:0001251', 'HP:0001344', 'HP:0000748', 'HP:0010864')
    cases = [Case('P1', phenotypes=tuple(map(Finding, terms))), Case('P2', phenotypes=tuple(map(Finding, terms[1:3])))]
    genes = gene_catalogue(ontology)
    direct = NaiveBayesRanker(ontology, genes).rank(cases, top=20)
    through = genes_from_diseases(NaiveBayesRanker(ontology, catalogue_of(ontology)).rank(cases, top=400), ontology, genes, top=20)
    for c in ('P1', 'P2'):
        a, b = (t[t.case_id == c] for t in (direct, through))
        assert np.allclose(a.score, b.score, atol=1e-4) and b['rank'].tolist() == list(range(1, 21)) and b.answer_id.is_unique
        sure = a.score > a.score.min()
        assert set(a.answer_id[sure]) == set(b.answer_id[sure.to_numpy()])


# --- a run

def test_a_gene_run_ends_with_a_report(run):
    catalogue, cases = run.catalogue, run.cases('test')
    assert all(c.labels['gene'] in catalogue for c in cases)
    t = read_table(run/'analysis/table.parquet')
    assert set(t.method) == {'chance', 'naive_bayes', 'linear', 'base', 'base_constrained'} and set(t.task) == {'gene'}
    wide = t.set_index(['method', 'metric']).value
    assert wide['naive_bayes', 'top1'] > wide['chance', 'top1'] and wide['base_constrained', 'hfa'] == 1
    texts = [json.loads(l)['text'] for l in (run/'predictions/base_constrained-0.texts.jsonl').read_text().splitlines()]
    assert all(x.startswith("POTENTIAL_GENES:\n1. '") for x in texts)
    assert 'Among all genes' in (run/'analysis/report.html').read_text()


def test_all_genes_are_ranked_to_fifty(run, ontology):
    t = read_table(run/'analysis/omim.parquet')
    assert set(t.metric) == {'top1', 'top3', 'top5', 'top10', 'top50', 'mrr'} and {'naive_bayes', 'naive_bayes_clean', 'naive_bayes_strict'} == set(t.method)
    w = t[t.method == 'naive_bayes'].set_index('metric').value
    assert w.top1 <= w.top3 <= w.top5 <= w.top10 <= w.top50 and w.top50 > .5
    lists = read_table(run/'predictions/omim-naive_bayes.parquet')
    assert (lists.groupby('case_id').size() == 50).all() and set(lists.answer_id) <= set(gene_catalogue(ontology).ids)


def test_new_notes_are_answered_with_genes(run, note_file, tmp_path):
    "Predictions for notes: ids and symbols of genes, the evidence of the gene's disease, files for PhEval; the diagnosis is not read."
    assert not predict_cases(run, note_file, tmp_path/'out', 'base_constrained')
    t = pd.read_csv(tmp_path/'out/predictions.tsv', sep='\t', comment='#')
    assert t.columns.tolist() == ['case_id', 'rank', 'gene_id', 'gene_name', 'score'] and t.case_id.nunique() == 30
    assert t.gene_id.str.match(r'NCBIGene:\d+$').all() and set(t.gene_name) <= set(run.catalogue.ids)
    record = json.loads((tmp_path/'out/predictions.jsonl').read_text().splitlines()[0])
    assert record['note'].startswith('Patient 0') and all(a['disease_id'].startswith('OMIM:') for a in record['answers'])
    one = pd.read_parquet(next((tmp_path/'out/pheval').glob('*.parquet')))
    assert one.columns.tolist() == ['gene_symbol', 'gene_identifier', 'score']
    (tmp_path/'bare.jsonl').write_text(''.join(json.dumps({'id': r['id'], 'note': r['note']}) + '\n' for r in notes()))
    predict_cases(run, tmp_path/'bare.jsonl', tmp_path/'bare', 'base_constrained')
    same = [json.loads((tmp_path/a/'predictions.jsonl').read_text().splitlines()[0])['answers'][0]['gene_name'] for a in ('out', 'bare')]
    assert same[0] == same[1]


# --- notes as a cohort

SIZES = {'cohort.train': 10, 'cohort.calibration': 0, 'cohort.validation': 5, 'cohort.test': 5}


@pytest.mark.parametrize('task', ['disease', 'gene'])
def test_a_cohort_of_notes(task, note_file, tmp_path, ontology):
    "Notes stay as they are, the portrait is neutral, families do not cross splits; what reads findings says that there are none."
    run = open_run(tmp_path/'r', 'smoke', {'task': task, 'cohort.source': str(note_file), **SIZES})
    make_cohort(run)
    cases, catalogue, card = run.cases(), run.catalogue, read_json(run/'cases/card.json')
    assert card['read'] == 30 and not card['problems'] and set(catalogue.ids) == set(GENES if task == 'gene' else GENES.values())
    assert {c.note for c in cases} <= {r['note'] for r in notes()} and not any(c.phenotypes for c in cases) and {c.sex for c in cases} == {'female'}
    assert all((run/'cases'/c.image).exists() for c in cases) and len({(c.group, c.split) for c in cases}) == len({c.group for c in cases})
    with pytest.raises(InputError, match='no training case has a finding'): LinearRanker.fit([c for c in cases if c.split == 'train'], catalogue, ontology, label=task)
    assert len(NaiveBayesRanker(ontology, catalogue).rank(cases)) == len(cases)*len(catalogue)


def test_notes_that_cannot_be_used(tmp_path, ontology):
    rows = ['{"id": "A", "note": "A boy with ataxia.", "gene": null, "disease_id": null}', '{"id": "B", "note": ""}', '{"id": "A", "note": "Again."}', 'no json', '[]',
            '{"id": "C", "clinical_note": "A girl.", "age": 200}', '']
    (tmp_path/'n.jsonl').write_text('\n'.join(rows))
    cases, problems = load_cases(tmp_path/'n.jsonl', ontology)
    assert [c.id for c in cases] == ['A'] and cases[0].labels == {}
    assert [re.search(r'line (\d)', str(p)).group(1) for p in problems] == list('23456')


# --- real data

def test_real_genes(data, ontology):
    "HGNC ids from phenopackets: one for each symbol; the release at hand knows most of the genes."
    names = gene_names(data/'phenopackets.zip')
    assert len(names) > 500 and all(len(n) == 1 and re.fullmatch(r'HGNC:\d+', n[0]) for n in names.values())
    assert max(Counter(n[0] for n in names.values()).values()) == 1
    genes = gene_catalogue(ontology, names=names)
    assert genes.resolve(names['FBN1'][0]).id == 'FBN1' and gene_id(genes, 'FBN1') == names['FBN1'][0]
    share = np.mean([g in genes for g in names])
    print(f'{share:.3f} of {len(names)} genes of the phenopackets have an annotated disease')
    assert .7 < share < 1


def test_real_patients_among_all_genes(data, ontology):
    "Naive Bayes finds genes far above chance, and less often once a case's own publication is left out."
    cases = [c for c in load_cases(data/'phenopackets.zip', ontology)[0][::25] if 'gene' in c.labels]
    genes, top = gene_catalogue(ontology), {}
    for control in (False, 'strict'):
        scored = score_cases(NaiveBayesRanker(ontology, genes, 'all', control).rank(cases, top=50), cases, genes, 'gene', tops=(1, 10, 50))
        top[control] = scored.groupby('metric').value.mean()
    print(f'n = {len(cases)}', {c: t[['top1', 'top10', 'top50']].round(3).to_dict() for c, t in top.items()})
    assert top[False].top1 > .2 and top['strict'].top1 < top[False].top1 and top['strict'].top50 > .2


@pytest.mark.parametrize('task', ['disease', 'gene'])
def test_real_notes(data, tmp_path, ontology, task):
    cases, problems = load_cases(data/'notes.jsonl.gz', ontology)
    assert len(cases) == 600 and not problems and all(c.note and c.labels.keys() == {'disease', 'disease_name', 'gene'} and c.group.startswith('PMID:') for c in cases)
    assert set(answer_table(cases, 'gene').index) - set(gene_catalogue(ontology).ids) == {'EZH1', 'SRSF1'}       # newer than the annotations
    least = {'disease': 2, 'gene': 3}[task]
    run = open_run(tmp_path/'r', 'smoke', {'task': task, 'cohort.source': str(data/'notes.jsonl.gz'), 'cohort.min_cases': least, 'cohort.min_groups': 1})
    make_cohort(run)
    card = read_json(run/'cases/card.json')
    assert card['read'] == 600 and len(run_answers(run, ontology)) == 8 and isinstance(run_answers(run, ontology), GeneCatalogue) == (task == 'gene')
    assert isinstance(run_answers(run, ontology), Catalogue)
