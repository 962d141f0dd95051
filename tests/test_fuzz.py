"""Whatever a file holds, a loader answers with values of the promised types or with an InputError that names the place; the same for written answers and names.

Each target gets damaged versions of good input: 300 of each here, 10,000 with `make fuzz`, which writes benchmarks/fuzz.json.
"""
import gzip, io, json, os, stat, time, zipfile, zlib
from collections import Counter, defaultdict
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np, pandas as pd, pytest, yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from mint_nb.core import InputError, write_json
from mint_nb.tasks import TASKS, Case, Catalogue, Finding, Resolved, normalise, read_cases, write_cases
from mint_nb.params import Params, resolve_params
from mint_nb.runs import Run, open_params, open_run, stage_done, versions
from mint_nb.ontology import Ontology, load_ontology, parse_genes, parse_hpoa, parse_obo
from mint_nb.notes import add_note
from mint_nb.splits import check_splits
from mint_nb.readers import age_in_years, load_cases, use_embeddings
from mint_nb.findings import read_findings_text
from mint_nb.portraits import load_image
from mint_nb.tiles import MORPHOLOGY, load_tiles, open_tile
from mint_nb.decode import parse_answer
from mint_nb.baselines import gene_catalogue, gene_names
from mint_nb.endpoint import TryAgain, read_reply
from mint_nb.predict import read_texts
from mint_nb.grid import Grid, read_grid
from mint_nb.recalibrate import read_questions
from mint_nb.cli import comma_list, parse_sets

N = int(os.environ.get('MINT_FUZZ', 300))
RECORD = os.environ.get('MINT_FUZZ_RECORD')      # a file for the counts, as `make fuzz` sets it
QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]
# few examples: always the same ones, so that nobody's change fails for something else; many: new ones each time
examples = settings(max_examples=N, deadline=None, derandomize=N <= 300, database=None, suppress_health_check=QUIET)
COUNTS = defaultdict(Counter)


@pytest.fixture(scope='module', autouse=True)
def table():
    "Writes the counts at the end, if a file for them is named."
    yield
    if not RECORD: return
    rows = {k: {'inputs': c['inputs'], 'accepted': c['accepted'], 'refused': c['refused'], 'cpu_seconds': round(c['ms']/1000, 1)} for k, c in COUNTS.items()}
    write_json(RECORD, {'command': 'make fuzz', 'examples': N, 'targets': rows, 'crashes': 'none: one would have failed the command', 'cpu_seconds': round(time.process_time()),
                        'date': str(date.today()), 'versions': versions()})


@cache
def ontology() -> Ontology: return load_ontology()


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path: return tmp_path_factory.mktemp('fuzz')


def place_is_named(e: InputError) -> None:
    assert (e.file, e.record, e.field) != (None, None, None), f'names no place: {e}'
    assert len(str(e)) < 1500, 'a message is not a copy of the file'
    str(e).encode()                       # can be printed


def attempt(target: str, call, check=lambda value: None) -> None:
    "Call a loader on one input: the right types, or an error that names the place."
    start, n = time.process_time(), COUNTS[target]
    try: value = call()
    except InputError as e: place_is_named(e); n['refused'] += 1
    else: check(value); n['accepted'] += 1
    n['inputs'] += 1; n['ms'] += 1000*(time.process_time() - start)


# -------------------------------------------------------------------------------------------------- what damages good input

TEXT = st.one_of(st.text(max_size=12), st.sampled_from(['', ' ', '\x00', '\ud800', 'é\u202e', '1e999', 'NaN', '-1', '../../x', "'; --", 'HP:0001250', 'HP:9999999', '<b>', 'word '*400, '٣', 'İ', 'null']))
NUMBER = st.one_of(st.integers(), st.floats(), st.sampled_from([10**400, -10**400, 0, -1, 2**63, 1e308]))
JUNK = st.recursive(st.one_of(st.none(), st.booleans(), NUMBER, TEXT), lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(TEXT, x, max_size=3)), max_leaves=4)


def nodes(obj, path=()):
    "Every place inside a plain value."
    yield path
    for k, v in obj.items() if isinstance(obj, dict) else enumerate(obj) if isinstance(obj, list) else (): yield from nodes(v, (*path, k))


def change(obj, path, how, junk):
    "A copy with one place replaced, removed, doubled or wrapped."
    if not path: return {'replace': junk, 'wrap': [obj], 'double': [obj, obj], 'remove': {}, 'name': {str(junk): obj}}[how]
    out, at = json.loads(json.dumps(obj)), None
    at = out
    for k in path[:-1]: at = at[k]
    k = path[-1]
    if how == 'remove': del at[k]
    elif how == 'name' and isinstance(at, dict): at[str(junk)] = at.pop(k)
    else: at[k] = {'replace': junk, 'wrap': [at[k]], 'double': [at[k], at[k]], 'name': junk}[how]
    return out


@st.composite
def damaged(draw, good):
    "A plain value in which one to three places are wrong."
    obj = good
    for _ in range(draw(st.integers(1, 3))):
        try: obj = change(obj, draw(st.sampled_from(list(nodes(obj)))), draw(st.sampled_from(['replace', 'replace', 'replace', 'remove', 'wrap', 'double', 'name'])), draw(JUNK))
        except (ValueError, TypeError): break
    return obj


PIECES = st.one_of(st.binary(max_size=8), st.sampled_from([b'\x00', b'\xff\xfe', b'\n', b'\t', b',', b'"', b'[' * 3000, b'{"a":', b'9' * 5000, '\u2028'.encode(), b'\r', b'#', b': ', b'&a [*a]', b'!!python/object:os.system']))


@st.composite
def garbled(draw, good: bytes):
    "Bytes that are cut, repeated, overwritten or mixed with others."
    raw = good
    for _ in range(draw(st.integers(1, 3))):
        a, b = sorted((draw(st.integers(0, len(raw))), draw(st.integers(0, len(raw)))))
        how = draw(st.sampled_from(['cut', 'drop', 'insert', 'over', 'repeat', 'swap']))
        raw = {'cut': lambda: raw[:a], 'drop': lambda: raw[:a] + raw[b:], 'insert': lambda: raw[:a] + draw(PIECES) + raw[a:], 'over': lambda: raw[:a] + (p := draw(PIECES)) + raw[a + len(p):],
               'repeat': lambda: raw[:b] + raw[a:b][:2000] + raw[b:], 'swap': lambda: raw[b:] + raw[a:b] + raw[:a]}[how]()
    return raw


@st.composite
def cells(draw, rows: list[list[str]], sep: str):
    "A table as bytes, with wrong cells, lines or columns."
    rows = [list(r) for r in rows]
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(rows) - 1))
        j, how = draw(st.integers(0, max(0, len(rows[i]) - 1))), draw(st.sampled_from(['cell', 'cell', 'cell', 'line', 'column', 'longer', 'shorter', 'twice']))
        if how == 'cell' and rows[i]: rows[i][j] = draw(TEXT)
        elif how == 'line': rows[i] = [draw(TEXT)]
        elif how == 'column': rows = [r[:j] + r[j + 1:] for r in rows]
        elif how == 'longer': rows[i] = rows[i] + [draw(TEXT)]
        elif how == 'shorter': rows[i] = rows[i][:j]
        else: rows.insert(i, list(rows[i]))
    return '\n'.join(sep.join(r) for r in rows).encode('utf-8', 'surrogatepass')


def text(obj) -> bytes: return json.dumps(obj).encode()


# -------------------------------------------------------------------------------------------------- what must hold of what is accepted

def right_cases(value) -> None:
    "Cases as the docstring of `Case` promises, writable and readable again."
    cases, problems = value
    for p in problems: place_is_named(p)
    for c in cases:
        assert isinstance(c, Case) and type(c.id) is str and c.id and type(c.note) is str and type(c.group) is str and c.group
        assert c.sex in ('female', 'male', None) and (c.age is None or type(c.age) is float and 0 <= c.age < 130)
        assert all(type(k) is str and type(v) is str and v for k, v in c.labels.items()) and (c.image is None or Path(c.image).is_file())
        assert all(type(f) is Finding and f.id in ontology() and type(f.excluded) is bool for f in c.phenotypes)
        assert len({f.id for f in c.phenotypes}) == len(c.phenotypes) and (c.note or c.phenotypes or c.image)
    check_splits(list(cases))
    if cases and zlib.crc32(repr(cases).encode('utf-8', 'replace')) % 5 == 0:         # a fifth of them goes to the disk and back
        noted = [add_note(c, ontology()) if c.findings() else c for c in cases]
        file = Path(SCRATCH)/'cases.parquet'
        write_cases(file, noted)
        assert read_cases(file) == noted


SCRATCH = ''


@pytest.fixture(scope='module', autouse=True)
def scratch(tmp_path_factory):
    global SCRATCH
    SCRATCH = str(tmp_path_factory.mktemp('scratch'))


PACKET = {'id': 'P1', 'subject': {'id': 'P1', 'sex': 'MALE', 'timeAtLastEncounter': {'age': {'iso8601duration': 'P4Y6M'}}},
          'phenotypicFeatures': [{'type': {'id': 'HP:0001250', 'label': 'Seizure'}}, {'type': {'id': 'HP:0000154'}, 'excluded': True}, {'type': {'id': 'HP:0001388'}}],
          'interpretations': [{'diagnosis': {'disease': {'id': 'OMIM:105830', 'label': 'Angelman syndrome'},
                                             'genomicInterpretations': [{'variantInterpretation': {'variationDescriptor': {'geneContext': {'valueId': 'HGNC:12496', 'symbol': 'UBE3A'}}}}]}}],
          'diseases': [{'term': {'id': 'OMIM:105830', 'label': 'Angelman syndrome'}}], 'metaData': {'externalReferences': [{'id': 'PMID:1'}]}}
NOTE = {'id': 'N1', 'note': 'A 4-year-old boy with seizures.', 'age': 4, 'sex': 'male', 'phenotypes': ['HP:0001250'], 'disease_id': 'OMIM:105830', 'disease': 'Angelman syndrome', 'gene': 'UBE3A', 'pmid': '1'}
MODES = st.sampled_from(['raise', 'list'])


@examples
@given(st.one_of(damaged(PACKET).map(text), garbled(text(PACKET))), MODES, st.booleans())
def test_phenopackets(folder, raw, mode, labels):
    (folder/'p.json').write_bytes(raw)
    attempt('phenopackets, JSON', lambda: load_cases(folder/'p.json', ontology(), mode, labels), right_cases)


@examples
@given(st.one_of(st.none(), NUMBER, TEXT, damaged({'age': {'iso8601duration': 'P4Y6M2W1D'}}), damaged({'ageRange': {'start': {'iso8601duration': 'P4Y'}}}), damaged({'ontologyClass': {'id': 'HP:0003577'}}),
                 st.text('PYMWDT0123456789.', max_size=12).map(lambda t: {'age': {'iso8601duration': 'P' + t}})))
def test_ages(time_element):
    def check(age): assert age is None or type(age) is float and 0 <= age < 130
    attempt('ages', lambda: age_in_years(time_element), check)


def archive(entries: list[tuple[str, bytes]], how: int = zipfile.ZIP_DEFLATED, link: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', how) as z:
        for name, raw in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = how
            if link: info.external_attr = (stat.S_IFLNK | 0o777) << 16
            z.writestr(info, raw)
    return out.getvalue()


NAMES = st.one_of(st.sampled_from(['a.json', 'b/c.json', '../up.json', '/etc/x.json', 'C:\\x.json', '..\\x.json', 'a/../../x.json', '.hidden.json', 'a.json/', 'é.json', 'x.txt']), st.text(st.characters(codec='utf-8'), min_size=1, max_size=8))
GOOD_ZIP = archive([('a.json', text(PACKET)), ('b/c.json', text(PACKET | {'id': 'P2'}))])


@examples
@given(st.one_of(garbled(GOOD_ZIP), st.builds(archive, st.lists(st.tuples(NAMES, st.one_of(damaged(PACKET).map(text), st.just(text(PACKET)))), max_size=3),
                                              st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]), st.booleans())), MODES)
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_archives_of_phenopackets(folder, raw, mode):
    (folder/'p.zip').write_bytes(raw)
    before = sorted(p for p in folder.parent.rglob('*.json'))
    attempt('phenopackets, zip', lambda: load_cases(folder/'p.zip', ontology(), mode), right_cases)
    assert before == sorted(p for p in folder.parent.rglob('*.json')), 'something was unpacked'


LINES = b'\n'.join([text(NOTE), text(NOTE | {'id': 'N2', 'age': None, 'phenotypes': []}), text(PACKET)])


@examples
@given(st.one_of(st.lists(damaged(NOTE), min_size=1, max_size=2).map(lambda ds: b'\n'.join(map(text, ds))), garbled(LINES)), st.booleans(), MODES)
def test_notes(folder, raw, zipped, mode):
    file = folder/('n.jsonl.gz' if zipped else 'n.jsonl')
    file.write_bytes(gzip.compress(raw, 1) if zipped else raw)
    attempt('notes, JSONL', lambda: load_cases(file, ontology(), mode), right_cases)


@examples
@given(garbled(gzip.compress(LINES)))
def test_damaged_gzip(folder, raw):
    (folder/'d.jsonl.gz').write_bytes(raw)
    attempt('notes, damaged gzip', lambda: load_cases(folder/'d.jsonl.gz', ontology()), right_cases)


GMDB = [['image_id', 'patient_id', 'disorder_names', 'omim_ids', 'present_features', 'absent_features', 'age_year', 'age_month', 'gender', 'internal_syndrome_id', 'internal_syndrome_name'],
        ['1', '7', 'Angelman syndrome', '[105830]', 'HP:0001250;HP:0000154', 'HP:0000252', '4', '6', 'male', '11', 'Angelman'], ['2', '7', '', '', 'HP:0001250', '', '', '', 'f', '', '']]


@examples
@given(st.one_of(cells(GMDB, '\t'), garbled('\n'.join('\t'.join(r) for r in GMDB).encode())), MODES)
def test_gmdb(folder, raw, mode):
    where = folder/'gmdb'
    if not where.exists():
        (where/'crops').mkdir(parents=True); Image.new('RGB', (112, 112)).save(where/'crops/1_aligned.jpg')
    (where/'image_metadata_v1.tsv').write_bytes(raw)
    attempt('GMDB folder', lambda: load_cases(where, ontology(), mode), right_cases)


OBO = b'''format-version: 1.2
data-version: hp/releases/2025-01-16

[Term]
id: HP:0000001
name: All

[Term]
id: HP:0000118
name: Phenotypic abnormality
is_a: HP:0000001 ! All

[Term]
id: HP:0001250
name: Seizure
alt_id: HP:0002279
synonym: "Epilepsy" EXACT []
is_a: HP:0000118 ! Phenotypic abnormality

[Term]
id: HP:0000057
name: obsolete
is_obsolete: true
replaced_by: HP:0001250
'''
HPOA = [['#description: annotations'], ['database_id', 'disease_name', 'qualifier', 'hpo_id', 'reference', 'evidence', 'onset', 'frequency', 'sex', 'modifier', 'aspect', 'biocuration'],
        ['OMIM:105830', 'Angelman syndrome', '', 'HP:0001250', 'PMID:1;PMID:2', 'PCS', '', '7/12', '', '', 'P', 'x'], ['OMIM:105830', 'Angelman syndrome', 'NOT', 'HP:0000118', 'PMID:1', 'PCS', '', '45%', '', '', 'P', 'x'],
        ['OMIM:194190', 'Wolf-Hirschhorn syndrome', '', 'HP:0001250', 'PMID:3', 'PCS', '', 'HP:0040281', '', '', 'P', 'x'], ['ORPHA:1', 'Y', '', 'HP:0001250', 'PMID:3', 'PCS', '', '', '', '', 'P', 'x']]
GENES = [['ncbi_gene_id', 'gene_symbol', 'hpo_id', 'hpo_name', 'frequency', 'disease_id'], ['7337', 'UBE3A', 'HP:0001250', 'Seizure', '-', 'OMIM:105830'], ['10', 'NAT2', 'HP:0001250', 'Seizure', '-', 'OMIM:194190']]
HGNC = [['hgnc_id', 'symbol', 'alias_symbol', 'prev_symbol', 'name'], ['HGNC:12496', 'UBE3A', 'ANCR|AS', 'EPVE6AP', 'ubiquitin'], ['HGNC:7646', 'NAT2', '"AAC2"', '', 'n']]
table_bytes = lambda rows, sep='\t': '\n'.join(sep.join(r) for r in rows).encode()


@examples
@given(st.one_of(st.tuples(garbled(OBO), st.just(table_bytes(HPOA)), st.just(table_bytes(GENES))),
                 st.tuples(st.just(OBO), st.one_of(cells(HPOA, '\t'), garbled(table_bytes(HPOA))), st.just(table_bytes(GENES))),
                 st.tuples(st.just(OBO), st.just(table_bytes(HPOA)), st.one_of(cells(GENES, '\t'), garbled(table_bytes(GENES))))))
def test_hpo_files(folder, raws):
    files = [folder/n for n in ('hp.obo', 'phenotype.hpoa', 'genes_to_phenotype.txt')]
    for f, raw in zip(files, raws): f.write_bytes(raw)
    def read():
        version, terms, merged = parse_obo(files[0])
        rows = parse_hpoa(files[1], merged)
        return Ontology(version, terms, merged, rows[rows.hpo_id.isin(set(terms.id))], parse_genes(files[2]))
    def check(o):
        assert all(t in o.ancestors(t) for t in o.terms) and all(type(n) is str for n in o.diseases.values()) and type(o.version) is str
        assert all(0 <= p <= 1 for d in o.diseases for _, p in o.disease_findings(d)) and all(type(s) is str for d in o.diseases for _, s in o.genes(d))
        for t in [*o.merged, *o.terms, 'HP:9']: assert o.resolve(t)[0] is None or o.resolve(t)[0] in o
    attempt('HPO files', read, check)


@examples
@given(st.one_of(cells(HGNC, '\t'), garbled(table_bytes(HGNC)), ))
def test_gene_tables(folder, raw):
    (folder/'hgnc.tsv').write_bytes(raw)
    def check(names):
        assert all(type(s) is str and all(type(n) is str for n in ns) for s, ns in names.items())
        gene_catalogue(ontology(), ['UBE3A', 'NAT2'], names).resolve('AAC2')
    attempt('gene names, HGNC table', lambda: gene_names(folder/'hgnc.tsv'), check)


@examples
@given(st.one_of(damaged(PACKET).map(text), garbled(text(PACKET))))
def test_gene_names_of_phenopackets(folder, raw):
    (folder/'g.json').write_bytes(raw)
    attempt('gene names, phenopackets', lambda: gene_names(folder/'g.json'), lambda names: gene_catalogue(ontology(), ['UBE3A'], names))


# -------------------------------------------------------------------------------------------------- pictures

def picture(kind: str = 'PNG', size: tuple = (48, 48), mode: str = 'RGB') -> bytes:
    out = io.BytesIO()
    Image.new(mode, size).save(out, kind)
    return out.getvalue()


PICTURES = {k: picture(k) for k in ('PNG', 'JPEG', 'TIFF')}
SHAPES = st.sampled_from([picture('PNG', s, m) for s in ((48, 48), (1, 1), (48, 90)) for m in ('RGB', 'L', 'RGBA', 'P', '1', 'I;16')])
RAW_PICTURE = st.one_of(st.sampled_from(list(PICTURES.values())).flatmap(garbled), SHAPES, SHAPES.flatmap(garbled), st.binary(max_size=40))


def right_tile(image) -> None: assert isinstance(image, Image.Image) and image.mode == 'RGB' and min(image.size) >= 32


@examples
@given(RAW_PICTURE)
@pytest.mark.filterwarnings('ignore')
def test_pictures(raw): attempt('tile pictures', lambda: open_tile(raw, file='a.png'), right_tile)


@examples
@given(RAW_PICTURE)
@pytest.mark.filterwarnings('ignore')
def test_photographs(folder, raw):
    (folder/'face.png').write_bytes(raw)
    def check(x): assert x.shape == (3, 32, 32) and x.dtype == np.float32 and np.isfinite(x).all() and 0 <= x.min() <= x.max() <= 1
    attempt('photographs', lambda: load_image(folder/'face.png', 32), check)


def npy(x) -> bytes:
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()


@examples
@given(st.one_of(garbled(npy(np.ones(6, 'float32'))), st.sampled_from([npy(np.ones(s, d)) for s in ((0,), (2, 3), (6,), ()) for d in ('float64', 'int8', 'U3', 'complex64', 'bool')])))
def test_embedding_files(folder, raw):
    (folder/'v.npy').write_bytes(raw)
    def check(x): assert x.ndim == 1 and x.dtype == np.float32 and np.isfinite(x).all()
    attempt('embeddings, one patient', lambda: load_image(folder/'v.npy'), check)


def parquet(t: pd.DataFrame) -> bytes:
    out = io.BytesIO()
    t.to_parquet(out, index=False)
    return out.getvalue()


EMBEDDINGS = pd.DataFrame({'case_id': ['P1', 'P2'], 'e0': [.1, .2], 'e1': [.3, .4]})
ODD = [EMBEDDINGS.assign(e0=v) for v in ('text', None, [[1], [2]], True, float('nan'), pd.Timestamp(0))] + [EMBEDDINGS.drop(columns='case_id'), EMBEDDINGS.iloc[:0], EMBEDDINGS[['case_id']], EMBEDDINGS.assign(case_id=[1, 2]), EMBEDDINGS.assign(case_id='P1')]


@examples
@given(st.one_of(garbled(parquet(EMBEDDINGS)), st.sampled_from([parquet(t) for t in ODD]), st.sampled_from([parquet(t) for t in ODD]).flatmap(garbled)))
def test_embedding_tables(folder, raw):
    (folder/'e.parquet').write_bytes(raw)
    (folder/'images').mkdir(exist_ok=True)
    def check(cases):
        assert len(cases) == 2 and all(c.image is None or load_image(folder/c.image).ndim == 1 for c in cases)
    attempt('embeddings, table', lambda: use_embeddings([Case('P1'), Case('P2')], folder/'e.parquet', folder/'images'), check)


LABELS = [['file', 'label', 'patient', 'split', 'fold'], ['a.png', 'Breast', 'P1', 'train', ''], ['b/c.png', 'Colon', 'P2', 'test', '']]


def right_tiles(tiles) -> None:
    for p in tiles.problems: place_is_named(p)
    assert len({c.id for c in tiles.cases}) == len(tiles.cases)
    for c in tiles.cases:
        assert type(c.id) is str and c.id and type(c.group) is str and c.group and set(c.labels.values()) <= set(MORPHOLOGY)
        try: right_tile(tiles.read(c.id))
        except InputError as e: place_is_named(e)


LABEL_BYTES = st.one_of(cells(LABELS, ','), garbled(table_bytes(LABELS, ',')), st.just(table_bytes(LABELS, ',')))


@examples
@given(LABEL_BYTES, st.one_of(st.just(PICTURES['PNG']), RAW_PICTURE), MODES, st.booleans())
@pytest.mark.filterwarnings('ignore')
def test_tile_folders(folder, table, raw, mode, labels):
    where = folder/'tiles'
    (where/'b').mkdir(parents=True, exist_ok=True)
    for name, content in (('labels.csv', table), ('a.png', PICTURES['PNG']), ('b/c.png', raw)): (where/name).write_bytes(content)
    attempt('tiles, folder', lambda: load_tiles(where, mode, labels), right_tiles)


TILE_ZIP = archive([('labels.csv', table_bytes(LABELS, ',')), ('a.png', PICTURES['PNG']), ('b/c.png', PICTURES['PNG'])])


@examples
@given(st.one_of(garbled(TILE_ZIP), st.builds(lambda t, n, l: archive([('labels.csv', t), ('a.png', PICTURES['PNG']), (n, PICTURES['PNG'])], link=l), LABEL_BYTES, NAMES, st.booleans())), MODES)
@pytest.mark.filterwarnings('ignore')
def test_tile_archives(folder, raw, mode):
    (folder/'t.zip').write_bytes(raw)
    attempt('tiles, zip', lambda: load_tiles(folder/'t.zip', mode), right_tiles)


IMAGES, TYPES = npy(np.full((3, 32, 32, 3), 120.)), npy(np.array(['Breast', 'Colon', 'Bile-duct'], '<U13'))
OTHER_IMAGES = st.sampled_from([npy(np.zeros(s, d)) for s in ((3, 32, 32, 3), (3, 32, 32), (2, 32, 32, 3), (3, 32, 32, 4), (0, 32, 32, 3), (3, 0, 0, 3), ()) for d in ('float32', 'uint8', 'int64', 'U2', 'complex64')])
OTHER_TYPES = st.one_of(st.lists(TEXT.filter(lambda t: '\ud800' not in t), min_size=3, max_size=3).map(lambda t: npy(np.array(t, dtype=str))), st.sampled_from([npy(np.zeros(s, d)) for s in ((3,), (3, 1), (), (0,)) for d in ('U4', 'S4', 'int8')]))


@examples
@given(st.one_of(garbled(IMAGES), OTHER_IMAGES, st.just(IMAGES)), st.one_of(garbled(TYPES), OTHER_TYPES, st.just(TYPES)), MODES)
@pytest.mark.filterwarnings('ignore')
def test_pannuke(folder, images, types, mode):
    where = folder/'pannuke/Fold 1/images/fold1'
    where.mkdir(parents=True, exist_ok=True)
    for name, raw in (('images.npy', images), ('types.npy', types)):
        (where/name).unlink(missing_ok=True); (where/name).write_bytes(raw)      # a new file: the old one may still be mapped
    attempt('PanNuke arrays', lambda: load_tiles(folder/'pannuke', mode), right_tiles)


# -------------------------------------------------------------------------------------------------- questions, recipes, run folders

QUESTIONS = [{'question': 'Which gene?', 'options': ['UBE3A', 'NSD1'], 'answer': 'A'}, {'question': 'Which disease?', 'options': ['Angelman', 'Sotos', 'Marfan'], 'answer': 2}]


@examples
@given(st.one_of(damaged(QUESTIONS).map(lambda q: b'\n'.join(map(text, q)) if isinstance(q, list) else text(q)), garbled(b'\n'.join(map(text, QUESTIONS)))))
def test_questions(folder, raw):
    (folder/'q.jsonl').write_bytes(raw)
    def check(qs):
        for q in qs: assert type(q['question']) is str and len(q['options']) >= 2 and all(type(o) is str for o in q['options']) and type(q['answer']) is int and 0 <= q['answer'] < len(q['options'])
    attempt('multiple-choice questions', lambda: read_questions(folder/'q.jsonl'), check)


RECIPE = {'task': 'disease', 'methods': ['chance', 'mint'], 'seeds': [0, 1], 'cohort': {'train': 24, 'label_share': .5, 'source': None}, 'pairs': {'k': 2, 'gold': 'keep'}, 'train': {'lr': .0005}}
as_yaml = lambda obj: yaml.safe_dump(obj).encode('utf-8', 'surrogatepass')


def right_params(p) -> None: assert isinstance(p, Params) and Params(**json.loads(p.model_dump_json())) == p


def dumped(obj) -> bytes:
    try: return as_yaml(obj)
    except yaml.YAMLError: return text(obj)


@examples
@given(st.one_of(damaged(RECIPE).map(dumped), garbled(as_yaml(RECIPE))))
def test_recipes(folder, raw):
    (folder/'recipe.yaml').write_bytes(raw)
    attempt('recipes, YAML', lambda: resolve_params(str(folder/'recipe.yaml')), right_params)


@examples
@given(st.one_of(damaged({'train.lr': .1, 'cohort': {'train': 3}, 'cohort.test': 4, 'seeds': [1]}), st.dictionaries(st.sampled_from(['train', 'train.lr', 'train.lr.x', 'seeds', '', '.', 'a..b', 'task', 'methods', 'cohort.source']), JUNK, max_size=3)).filter(lambda o: isinstance(o, dict)))
def test_overrides(over): attempt('overrides', lambda: resolve_params('smoke', over), right_params)


@examples
@given(st.lists(st.one_of(TEXT, st.builds(lambda n, v: f'{n}={v}', st.sampled_from(['train.lr', 'cohort.train', 'task', '']), TEXT), st.text('=[]{}:,&*!|>%@`\'" a1.', max_size=10)), max_size=3))
def test_options(sets): attempt('options, --set', lambda: parse_sets(sets), lambda out: isinstance(out, dict) and comma_list(','.join(sets)))


@cache
def params_file() -> bytes: return yaml.safe_dump(json.loads(resolve_params('smoke').model_dump_json())).encode()


MANIFEST = [{'stage': 'cohort', 'status': 'done', 'key': 'x', 'module': 'mint_nb.cohort', 'sections': ['cohort', 'task'], 'extra': None, 'inputs': {}, 'outputs': {'cases/cases.parquet': 'abc'}, 'seconds': 1.}, {'stage': 'upstream/0', 'status': 'failed', 'outputs': {}}]


@examples
@given(st.one_of(st.deferred(lambda: garbled(params_file())), damaged(RECIPE).map(dumped)))
def test_parameter_files(folder, raw):
    (folder/'run').mkdir(exist_ok=True)
    (folder/'run/params.yaml').write_bytes(raw)
    def check(pair): right_params(pair[0]); right_params(pair[1].params)
    attempt('run folders, params.yaml', lambda: (open_params(folder/'run'), open_run(folder/'run')), check)


@examples
@given(st.one_of(damaged(MANIFEST).map(lambda m: b'\n'.join(map(text, m)) if isinstance(m, list) else text(m)), garbled(b'\n'.join(map(text, MANIFEST)))))
def test_manifests(folder, raw):
    (folder/'m').mkdir(exist_ok=True)
    (folder/'m/manifest.jsonl').write_bytes(raw)
    run = Run(folder/'m', resolve_params('smoke'))
    def check(entries): assert all(isinstance(e, dict) and isinstance(e['stage'], str) and isinstance(e['status'], str) for e in entries) and stage_done(run, 'cohort') is None
    attempt('run folders, manifest', lambda: run.manifest, check)


GRID = {'profile': 'smoke', 'methods': ['chance', 'mint'], 'seeds': [0, 1], 'overrides': {'cohort.train': 24}, 'vary': {'pairs.k': [1, 2]}, 'retries': 1, 'cpus': 1}


@examples
@given(st.one_of(damaged(GRID).map(dumped), garbled(as_yaml(GRID))))
def test_grids(folder, raw):
    (folder/'grid.yaml').write_bytes(raw)
    def check(g): assert isinstance(g, Grid) and g.methods
    attempt('grids, YAML', lambda: read_grid(folder/'grid.yaml'), check)


REPLY = {'choices': [{'message': {'role': 'assistant', 'content': "1. 'Angelman syndrome'"}, 'finish_reason': 'stop'}], 'usage': {'prompt_tokens': 5, 'completion_tokens': 7}, 'model': 'm'}


@examples
@given(damaged(REPLY))
def test_server_replies(reply):
    def ask():
        try: return read_reply(reply)
        except TryAgain as e: raise InputError(str(e), field='reply') from e      # asked again; the client names the address
    def check(r): assert type(r['text']) is str and type(r['finish']) is str and type(r['model']) is str and all(type(r[k]) is int and r[k] >= 0 for k in ('prompt', 'new'))
    attempt('replies of a server', ask, check)


TEXTS = b'\n'.join(text({'case_id': f'P{i}', 'text': "1. 'Angelman syndrome'"}) for i in range(3))


@examples
@given(st.one_of(garbled(TEXTS), damaged({'case_id': 'P1', 'text': 'x'}).map(text)))
def test_kept_texts(folder, raw):
    (folder/'texts.jsonl').write_bytes(raw)
    def check(t): assert all(type(k) is str and type(v) is str for k, v in t.items())
    attempt('texts kept by a killed run', lambda: read_texts(folder/'texts.jsonl'), check)


# -------------------------------------------------------------------------------------------------- answers and names

CATALOGUE = Catalogue({'OMIM:105830': 'Angelman syndrome', 'OMIM:117550': 'Sotos syndrome', 'OMIM:1': 'Spinocerebellar ataxia 1', 'OMIM:2': 'Spinocerebellar ataxia 2', 'OMIM:3': '3-M syndrome 1'},
                      {'OMIM:105830': ['happy puppet syndrome'], 'OMIM:117550': ['cerebral gigantism']})
NAME = st.one_of(st.sampled_from([*CATALOGUE.names.values(), 'happy puppet syndrome', 'Marfan']), st.text(max_size=30))
SHAPE = st.sampled_from(["{i}. '{n}'", '{i}) {n}', '- {n}', '**{n}**', '"{n}",', '{n};', '[{i}] {n}', '{{"name": "{n}"}},', '({i}) "{n}" - because', '{i}.{n}'])
ANSWER = st.one_of(st.text(max_size=300), st.builds(lambda head, names, shape, tail: head + '\n'.join(shape.format(i=i, n=n) for i, n in enumerate(names, 1)) + tail,
                   st.sampled_from(['', 'POTENTIAL_DISEASES:\n', 'Sure! Here is the list:\n', '[', '```json\n[', '<think>x</think>']), st.lists(NAME, max_size=6), SHAPE, st.sampled_from(['', ']', '\n```', '\n1', "\n11. 'Ang"])),
                   st.text("0123456789.)('\"*-[]{}:,;\n ab", max_size=120), st.binary(max_size=60).map(lambda b: b.decode('utf-8', 'surrogateescape')), JUNK)


@examples
@given(ANSWER, st.sampled_from(list(TASKS.values())))
def test_answers(answer, task):
    def check(names):
        assert type(names) is list and all(type(n) is str and normalise(n) and len(n) <= 300 for n in names) and len(set(map(normalise, names))) == len(names)
        for n in names: right_name(CATALOGUE.resolve(n))
    attempt('written answers', lambda: parse_answer(answer, task), check)


def right_name(found) -> None:
    assert isinstance(found, Resolved) and (found.id is None) == (found.method == 'none') and 0 <= found.score <= 1
    assert found.id is None or found.score >= .9


@cache
def genes(): return gene_catalogue(ontology(), ['UBE3A', 'NSD1', 'NSD2', 'ACTB'], {'NSD1': ['STO']})


TYPO = st.builds(lambda n, i, c: n[:i] + c + n[i + 1:], st.sampled_from([*CATALOGUE.names.values(), 'happy puppet syndrome', 'UBE3A', 'NSD1']), st.integers(0, 24), st.text(max_size=2))


@examples
@given(st.one_of(NAME, TYPO, JUNK, st.text(max_size=60)))
def test_names(name):
    attempt('names, diseases', lambda: CATALOGUE.resolve(name), right_name)
    attempt('names, genes', lambda: genes().resolve(name), right_name)


@examples
@given(st.one_of(TEXT, JUNK, st.from_regex(r'\s?HP:[0-9]{7}\s?', fullmatch=True)))
def test_terms(term):
    def check(found): assert found[1] in ('ok', 'obsolete', 'unknown') and (found[0] is None or found[0] in ontology())
    attempt('names, HPO terms', lambda: ontology().resolve(term), check)


@examples
@given(st.one_of(st.text(max_size=200), st.text('no seizures age4-year oldboy,.;:()\n', max_size=200)))
def test_free_text(note):
    def check(found): assert all(f.id in ontology() for f in found.findings)
    attempt('findings in free text', lambda: read_findings_text(note, ontology()), check)


@examples
@given(st.dictionaries(TEXT, TEXT, max_size=5), st.dictionaries(TEXT, st.lists(TEXT, max_size=3), max_size=3))
def test_catalogues(names, synonyms):
    def check(c): assert Catalogue.from_json(json.loads(json.dumps(c.to_json()))).names == c.names
    attempt('catalogues', lambda: Catalogue(names, synonyms), check)
