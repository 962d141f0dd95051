"Bad input, contracts and real data for mint_nb.patients and mint_nb.cohort."
import gzip, json, os, zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image

from mint_nb.core import InputError, read_json
from mint_nb.tasks import Case, normalise
from mint_nb.params import CohortParams
from mint_nb.runs import open_run
from mint_nb.ontology import load_ontology
from mint_nb.notes import FRAMES, add_note, phrase
from mint_nb.splits import SHARES, check_splits, split_by_group
from mint_nb.patients import hide_labels, simulate_cohort
from mint_nb.readers import (
    InputWarning, describe_cohort, documents, file_name, load_cases, load_gmdb, load_phenopackets)
from mint_nb.cohort import make_cohort

ROOT = Path(__file__).parent.parent

@pytest.fixture(scope='module')
def ontology(): return load_ontology()

@pytest.fixture(scope='module')
def cohort(ontology): return simulate_cohort(ontology, CohortParams())

def real_data(name):
    for folder in filter(None, (os.environ.get('MINT_DATA'), ROOT.parent/'shared'/'data')):
        if (Path(folder)/name).exists(): return Path(folder)/name
    pytest.skip(f'{name} is not there; set MINT_DATA to the folder that holds it')

def packet(id='P1', terms=('HP:0001250', 'HP:0000154'), excluded=(), disease='OMIM:610954', pmid='PMID:1', **subject):
    return {'id': id, 'subject': {'id': id, 'sex': 'FEMALE', **subject},
            'phenotypicFeatures': [{'type': {'id': t}} for t in terms] + [{'type': {'id': t}, 'excluded': True} for t in excluded],
            'interpretations': [{'diagnosis': {'disease': {'id': disease, 'label': f'Disease {disease}'}}}],
            'metaData': {'externalReferences': [{'id': pmid}]}}

def write(folder, name, obj):
    path = Path(folder)/name
    path.write_text(obj if isinstance(obj, str) else json.dumps(obj))
    return path


# --- simulated patients

@pytest.mark.parametrize('seed', range(6))
def test_sizes_groups_and_classes(ontology, seed):
    p = CohortParams(seed=seed)
    cases, catalogue = simulate_cohort(ontology, p)
    check_splits(cases)
    assert Counter(c.split for c in cases) == {s: getattr(p, s) for s in SHARES}
    assert {c.labels['disease'] for c in cases if c.split == 'train'} == set(catalogue.ids)
    assert any(n > 1 for n in Counter(c.group for c in cases).values())

@pytest.mark.parametrize('style', FRAMES)
def test_note_and_findings_are_one(ontology, style):
    cases, catalogue = simulate_cohort(ontology, CohortParams(diseases=8, train=24, calibration=0, validation=0, test=16, note_style=style, note_noise=.3))
    for c in cases:
        text, told = normalise(c.note), [f for f in c.phenotypes if f.view in ('note', 'both')]
        assert told and all(normalise(f.label) in text for f in told)
        longer = ' '.join(normalise(f.label) for f in told)
        assert not [f.label for f in c.phenotypes if f not in told and not f.excluded and normalise(f.label) in text and normalise(f.label) not in longer]
        assert not any(normalise(n) in text for n in catalogue.names.values())
        assert all(f.view != 'record' for f in c.phenotypes) and '  ' not in c.note and '{' not in c.note

def test_brief_notes_are_brief(cohort):
    lengths = [len(c.note) for c in cohort[0]]
    assert np.mean(lengths) < 230 and max(lengths) < 330
    assert all(len(c.findings('note')) <= CohortParams().max_findings for c in cohort[0])

def test_views_differ_and_facial_findings_are_rare_in_notes(cohort, ontology):
    facial = [f for c in cohort[0] for f in c.phenotypes if ontology.is_facial(f.id) and not f.excluded]
    assert .05 < np.mean([f.view == 'both' for f in facial]) < .25
    assert all(ontology.is_facial(t) for c in cohort[0] for t in c.findings('portrait'))

def test_age_and_sex_give_nothing_away(cohort):
    by = pd.DataFrame([(c.labels['disease'], c.age, c.sex == 'male') for c in cohort[0]], columns=['d', 'age', 'male'])
    spread = by.groupby('d')[['age', 'male']].mean().std()
    expected = by[['age', 'male']].std()/np.sqrt(len(by)/by.d.nunique())
    assert (spread < 1.6*expected).all()

def test_noise_reaches_the_findings(ontology):
    def agreement(noise):
        cases, _ = simulate_cohort(ontology, CohortParams(diseases=8, train=64, calibration=0, validation=0, test=16, note_noise=noise))
        known = {d: {t for t, _ in ontology.disease_findings(d)} for d in {c.labels['disease'] for c in cases}}
        return np.mean([t in known[c.labels['disease']] for c in cases for t in c.findings()])
    assert agreement(0) == 1 and agreement(.6) < .6

def test_order_and_other_cases_do_not_matter(ontology, cohort):
    again, _ = simulate_cohort(ontology, CohortParams())
    assert again == cohort[0]
    c = replace(cohort[0][0], note='')
    assert add_note(c, ontology, seed=3) == add_note(c, ontology, seed=3)


# --- splits

def test_group_on_both_sides_is_refused(cohort):
    a, b = cohort[0][:2]
    with pytest.raises(InputError, match='record G, field group: the group is in two splits, train and test'):
        check_splits([replace(a, group='G', split='train'), replace(b, group='G', split='test')])

def test_splits_of_odd_cohorts():
    rng = np.random.default_rng(0)
    for trial in range(30):
        cases = [Case(f'P{g}-{i}', group=f'G{g}', labels={'disease': f'D{rng.integers(1, 9)}'}) for g in range(rng.integers(1, 40)) for i in range(rng.integers(1, 20))]
        sizes = dict(zip(SHARES, (int(n) for n in rng.integers(0, 80, 4))))
        out = split_by_group(cases, sizes, trial)
        check_splits(out)
        assert {c.id for c in out} <= {c.id for c in cases}
        assert all(sum(c.split == s for c in out) <= n for s, n in sizes.items() if n)
    assert split_by_group([], {'train': 3, 'test': 1}) == []

def test_hidden_labels_leave_no_trace(cohort):
    cases, hidden = hide_labels(cohort[0], .1, 0)
    bare = [c for c in cases if c.id in hidden]
    train = sum(c.split == 'train' for c in cases)
    assert len(bare) == train - round(.1*train) and all(c.labels == {} and c.split == 'train' for c in bare)


# --- bad input

@pytest.mark.parametrize('content, message', [
    ('{"id": "P1", ', 'file bad.json: is not valid JSON'), ('', 'file bad.json: is not valid JSON'), ('[' * 100_000, 'file bad.json: is not valid JSON'),
    ('[1]', 'file bad.json: is not a JSON object'), ('\x00', 'file bad.json: is not valid JSON'),
    ({**packet(), 'id': ''}, 'file bad.json, field id: a phenopacket needs an id'),
    (packet(terms=()), 'file bad.json, record P1, field phenotypicFeatures: has no phenotypes'),
    (packet(terms=(), excluded=('HP:0001250',)), 'record P1, field phenotypicFeatures: has no usable phenotype that is present'),
    (packet(terms=('HP:9999999',)), r'file bad.json, record P1, field phenotypicFeatures\[0\].type.id: HP:9999999 is not a term of HPO'),
    (packet(terms=('MP:0001250',)), r'field phenotypicFeatures\[0\].type.id: MP:0001250'),
    (packet(timeAtLastEncounter={'age': {'iso8601duration': 'four'}}), "field subject.timeAtLastEncounter: 'four' is not an ISO 8601 duration"),
    ({**packet(), 'phenotypicFeatures': 'none'}, 'has no phenotypes'), ({**packet(), 'phenotypicFeatures': [None, 3]}, 'has no phenotypes'),
    ({**packet(), 'phenotypicFeatures': [{'type': 'HP:0001250'}]}, 'None is not a term'),
])
def test_bad_phenopackets(tmp_path, ontology, content, message):
    path = write(tmp_path, 'bad.json', content)
    with pytest.raises(InputError, match=message): load_phenopackets(path, ontology)
    cases, problems = load_phenopackets(path, ontology, 'list')
    assert len(cases) + len(problems) >= 1 and all(isinstance(p, InputError) for p in problems) and problems

def test_odd_but_usable_phenopackets(tmp_path, ontology):
    write(tmp_path, 'a.json', {**packet('A'), 'subject': None, 'metaData': None, 'interpretations': None})
    write(tmp_path, 'b.json', {**packet('B'), 'subject': [], 'metaData': {'externalReferences': [{}]}, 'interpretations': [{'diagnosis': 7}], 'diseases': [{'term': {'id': 'OMIM:1'}}]})
    (tmp_path/'c.json').write_bytes(b'\xef\xbb\xbf' + json.dumps(packet('C', terms=('HP:0001250',)*3, excluded=('HP:0001250',))).encode())
    a, b, c = load_phenopackets(tmp_path, ontology)[0]
    assert (a.labels, a.group, a.sex, a.age) == ({}, 'A', None, None)
    assert b.labels == {'disease': 'OMIM:1'} and [f.excluded for f in c.phenotypes] == [False]

def test_obsolete_is_mapped_with_a_warning(tmp_path, ontology):
    cases, problems = load_phenopackets(write(tmp_path, 'old.json', packet(terms=('HP:0000057',))), ontology)
    assert cases[0].findings() == ['HP:0008665']
    assert isinstance(problems[0], InputWarning) and 'file old.json, record P1' in str(problems[0]) and 'obsolete' in str(problems[0])

def test_all_containers_read_the_same(tmp_path, ontology):
    packets = [packet('A'), packet('B', pmid='PMID:2')]
    folder = tmp_path/'folder'/'deep'; folder.mkdir(parents=True)
    for p in packets: write(folder, f'{p["id"]}.json', p)
    lines = '\n'.join(map(json.dumps, packets)) + '\n\n'
    write(tmp_path, 'x.jsonl', lines); (tmp_path/'y.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    with zipfile.ZipFile(tmp_path/'z.zip', 'w') as z:
        for p in packets: z.writestr(f'sub/{p["id"]}.json', json.dumps(p))
    read = [load_cases(tmp_path/n, ontology)[0] for n in ('folder', 'x.jsonl', 'y.jsonl.gz', 'z.zip')]
    assert all(r == read[0] and [c.id for c in r] == ['A', 'B'] for r in read)

@pytest.mark.parametrize('entry', ['../x.json', '/etc/x.json', 'a/../../x.json', '..\\x.json', 'C:\\x.json'])
def test_zip_that_points_outside(tmp_path, ontology, entry):
    with zipfile.ZipFile(tmp_path/'e.zip', 'w') as z: z.writestr('ok.json', json.dumps(packet())); z.writestr(entry, '{}')
    with pytest.raises(InputError, match='points outside the archive'): load_cases(tmp_path/'e.zip', ontology)

def test_broken_containers(tmp_path, ontology):
    with zipfile.ZipFile(tmp_path/'t.zip', 'w') as z: z.writestr('a.json', json.dumps(packet())*50)
    (tmp_path/'t.zip').write_bytes((tmp_path/'t.zip').read_bytes()[:-60])
    (tmp_path/'g.jsonl.gz').write_bytes(gzip.compress(b'{"id": 1}'*99)[:-9])
    write(tmp_path, 'cases.txt', 'x')
    for name, message in (('t.zip', 'not a readable zip'), ('g.jsonl.gz', 'cannot be read'), ('cases.txt', 'is none of'), ('nowhere', 'does not exist')):
        with pytest.raises(InputError, match=f'{name}: .*{message}'): list(documents(tmp_path/name))

def test_labels_are_not_read_on_request(tmp_path, ontology):
    path = write(tmp_path, 'p.jsonl', json.dumps(packet()) + '\n' + json.dumps({'id': 'N', 'note': 'A boy.', 'disease_id': 'OMIM:1', 'gene': 'X'}))
    assert [c.labels for c in load_cases(path, ontology, labels=False)[0]] == [{}, {}]
    assert all(c.labels for c in load_cases(path, ontology)[0])

def test_plain_notes(tmp_path, ontology):
    rows = [{'id': 'N1', 'note': 'Wide mouth and seizures.', 'phenotypes': ['HP:0000154', 'HP:0001250'], 'sex': 'Male', 'age': '7'}, {'id': 'N2', 'note': ' '},
            {'id': 'N3', 'note': 'x', 'age': 'seven'}, {'note': 'No id.'}]
    cases, problems = load_cases(write(tmp_path, 'n.jsonl', '\n'.join(map(json.dumps, rows))), ontology)
    assert [c.id for c in cases] == ['N1', 'n-jsonl-line-4'] and [p.field for p in problems] == ['note', 'age']
    assert (cases[0].sex, cases[0].age, cases[0].findings('note')) == ('male', 7.0, ['HP:0000154', 'HP:0001250'])
    assert add_note(cases[0], ontology) == cases[0]

def gmdb(folder, **change):
    rows = [dict(image_id=str(i), patient_id='7', omim_ids='[610954]', gender='f', age_year='4', age_month='', present_features='HP:0000154;HP:9999999', absent_features='') | change
            for i in (1, 2)]
    pd.DataFrame(rows).to_csv(folder/'image_metadata.tsv', sep='\t', index=False)
    Image.new('RGB', (112, 112)).save(folder/'1_aligned.jpg')

def test_gmdb(tmp_path, ontology):
    gmdb(tmp_path)
    with pytest.raises(InputError, match='HP:9999999'): load_gmdb(tmp_path, ontology)
    cases, problems = load_gmdb(tmp_path, ontology, 'list')
    assert [bool(c.image) for c in cases] == [True, False] and {c.group for c in cases} == {'GMDB:7'}
    assert sum('crop is missing' in str(p) for p in problems) == 1
    gmdb(tmp_path, present_features='')
    assert len(load_gmdb(tmp_path, ontology, 'list')[0]) == 1
    pd.DataFrame({'image_id': ['1']}).to_csv(tmp_path/'image_metadata.tsv', sep='\t', index=False)
    with pytest.raises(InputError, match='field patient_id, present_features: the table lacks columns'): load_gmdb(tmp_path, ontology)


# --- the stage

def packets_of(n_diseases, n_groups=3, per_group=2):
    for d in range(n_diseases):
        for g in range(n_groups):
            for i in range(per_group):
                yield packet(f'D{d}/G{g} {i}', terms=('HP:0001250', 'HP:0000154', 'HP:0001263'), disease=f'OMIM:9{d:05d}', pmid=f'PMID:{d}{g}')

def small_real(tmp_path, name='r', n=5, **over):
    source = write(tmp_path, 'cases.jsonl', '\n'.join(map(json.dumps, packets_of(n))))
    sizes = {'cohort.train': 15, 'cohort.calibration': 0, 'cohort.validation': 5, 'cohort.test': 5, 'cohort.min_cases': 4}
    return open_run(tmp_path/name, 'smoke', {'cohort.source': str(source), **sizes, **over})

def test_real_cohort(tmp_path, ontology):
    run = small_real(tmp_path)
    make_cohort(run)
    cases, catalogue, card = run.cases(), run.catalogue, read_json(run/'cases/card.json')
    check_splits(cases)
    assert len(catalogue) == 5 and card['simulated'] is False and card['read'] == 30 and 'from' in describe_cohort(card)
    assert all((run/'cases'/c.image).exists() for c in cases) and len({c.image for c in cases}) == len(cases)
    assert all(c.note and not {'OMIM'} & set(c.note.split()) for c in cases)

def test_test_cases_from_another_source_leave_training(tmp_path):
    notes = [{'id': f'N{d}', 'note': 'A child with seizures.', 'disease_id': f'OMIM:9{d:05d}', 'pmid_norm': f'PMID:{d}0'} for d in (0, 1, 2, 7)]
    other = write(tmp_path, 'notes.jsonl', '\n'.join(map(json.dumps, notes)))
    run = small_real(tmp_path, **{'cohort.test_source': str(other), 'cohort.test': 0, 'cohort.train': 12})
    make_cohort(run)
    by = {s: [c for c in run.cases() if c.split == s] for s in ('train', 'validation', 'test')}
    assert sorted(c.id for c in by['test']) == ['N0', 'N1', 'N2'] and by['train'] and by['validation']     # 7 is no answer of this cohort
    assert not {c.group for c in by['test']} & {c.group for c in by['train'] + by['validation']}
    with pytest.raises(InputError, match='cohort.test_source'): make_cohort(small_real(tmp_path, 'r2', **{'cohort.test_source': str(tmp_path/'absent.jsonl')}))

def test_stage_is_repeatable_and_mends_damage(tmp_path):
    run = open_run(tmp_path/'a', 'smoke'); first = make_cohort(run)
    assert make_cohort(run) == first
    next((run/'cases/images').glob('*.png')).write_bytes(b'')
    assert make_cohort(run)['outputs'] == first['outputs']
    assert make_cohort(open_run(tmp_path/'b', 'smoke'))['outputs'] == first['outputs']

def test_changed_source_is_read_again(tmp_path):
    run = small_real(tmp_path); before = make_cohort(run)
    write(tmp_path, 'cases.jsonl', '\n'.join(map(json.dumps, packets_of(6))))
    assert make_cohort(run)['key'] != before['key']

def test_empty_cohort_and_small_catalogue(tmp_path):
    with pytest.raises(InputError, match='no disease has 99 cases from 2 groups'): make_cohort(small_real(tmp_path, 'a', **{'cohort.min_cases': 99}))
    with pytest.raises(InputError, match='a catalogue of 3 answers is too small'): make_cohort(small_real(tmp_path, 'b', n=3))
    with pytest.raises(InputError, match='file nowhere.zip, field cohort.source: does not exist'):
        make_cohort(open_run(tmp_path/'c', 'smoke', {'cohort.source': 'nowhere.zip'}))

def test_source_with_nothing_usable(tmp_path):
    source = write(tmp_path, 'all_broken.jsonl', '{"id": \n{}\n')
    with pytest.raises(InputError, match='all_broken.jsonl: holds no usable case, but 2 problems; the first: file all_broken.jsonl, line 1'):
        make_cohort(open_run(tmp_path/'x', 'smoke', {'cohort.source': str(source)}))

def test_labels_share_and_gene_task(tmp_path):
    run = open_run(tmp_path/'g', 'smoke', {'task': 'gene', 'cohort.label_share': .5}); make_cohort(run)
    train = run.cases('train')
    assert sum(not c.labels for c in train) == 12 == len(read_json(run/'cases/hidden_labels.json'))
    assert {c.labels['gene'] for c in train if c.labels} <= set(run.catalogue.ids) and len(run.catalogue) == 8

def test_embeddings_by_path(tmp_path):
    ids = [p['id'] for p in packets_of(5)]
    table = pd.DataFrame(np.arange(len(ids)*12).reshape(-1, 12), columns=[f'e{i}' for i in range(12)]).assign(case_id=ids)
    table.iloc[1:].to_parquet(tmp_path/'e.parquet')
    run = small_real(tmp_path, **{'cohort.embeddings': str(tmp_path/'e.parquet'), 'cohort.train': 20}); make_cohort(run)
    cases = run.cases()
    c = next(c for c in cases if c.image)
    assert (np.load(run/'cases'/c.image) == np.arange(12) + 12*ids.index(c.id)).all()
    assert all((c.image is None) == (c.id == ids[0]) for c in cases)
    table.rename(columns={'case_id': 'id'}).to_parquet(tmp_path/'f.parquet')
    with pytest.raises(InputError, match='needs the columns case_id'): make_cohort(small_real(tmp_path, 'f', **{'cohort.embeddings': str(tmp_path/'f.parquet')}))

def test_file_names():
    assert file_name('PMID_1_II-2') == 'PMID_1_II-2' and '/' not in file_name('../a/b') and file_name('a b') != file_name('a_b')
    assert len(file_name('x'*300)) < 100 and not file_name('..').startswith('.')


# --- published cases

def test_published_cases(ontology, tmp_path):
    store = real_data('phenopackets.zip')
    cases, problems = load_cases(store, ontology)
    assert len(cases) > 7000 and sum(not isinstance(p, InputWarning) for p in problems) < 5
    assert all(c.group.startswith('PMID:') and c.labels['disease'].startswith('OMIM:') for c in cases)
    noted = [add_note(c, ontology) for c in cases[::25]]
    for c in noted:
        assert all(phrase(f.label).lower() in c.note.lower() for f in c.phenotypes if f.view in ('note', 'both'))
        assert len(c.phenotypes) == len(next(x for x in cases if x.id == c.id).phenotypes)
    run = open_run(tmp_path/'r', 'laptop', {'cohort.source': str(store), 'cohort.diseases': 40, 'cohort.train': 400, 'cohort.test': 200})
    make_cohort(run)
    made = run.cases(); check_splits(made)
    assert Counter(c.split for c in made) == {'train': 400, 'calibration': 24, 'validation': 24, 'test': 200}
    assert len({c.labels['disease'] for c in made if c.split == 'test'}) >= 35
