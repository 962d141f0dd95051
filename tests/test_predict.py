"The predict stage and the delivery of predictions for new cases, on a smoke run."
import json, shutil
from pathlib import Path

import pandas as pd, pytest

import mint_nb.predict as predict
from mint_nb.core import InputError, read_json, read_table
from mint_nb.tasks import RANKING_COLUMNS, Ranker, get_task
from mint_nb.runs import Run, open_run
from mint_nb.ontology import load_ontology
from mint_nb.readers import InputWarning
from mint_nb.preferences import preference_rows, preferences
from mint_nb.decode import parse_answer
from mint_nb.predict import build_ranker, get_method, predict_method, read_texts
from mint_nb.outputs import predict_cases

NOTE_METHODS = ('chance', 'teacher', 'naive_bayes', 'naive_bayes_clean', 'resnik', 'linear', 'base', 'mint', 'base_constrained')


@pytest.fixture(scope='module')
def run(smoke_run, tmp_path_factory):
    "A copy of the smoke run without its predictions."
    copy = Run(shutil.copytree(smoke_run.path, tmp_path_factory.mktemp('predict')/'run'), smoke_run.params)
    shutil.rmtree(copy/'predictions')
    return copy


@pytest.fixture(scope='module')
def answers(run):
    for m in NOTE_METHODS: predict_method(run, m, 0)
    return {m: read_table(run/f'predictions/{m}-0.parquet') for m in NOTE_METHODS}


def packet(id, terms, diagnosis='OMIM:105830', **more):
    return {'id': id, 'subject': {'id': id, 'sex': 'FEMALE'}, 'phenotypicFeatures': [{'type': {'id': t}} for t in terms],
            'interpretations': [{'diagnosis': {'disease': {'id': diagnosis, 'label': 'x'}}}], 'metaData': {}} | more


@pytest.fixture
def folder(tmp_path):
    terms = ['HP:0001250', 'HP:0001263', 'HP:0000252']
    files = {'a.json': json.dumps(packet('A', terms)), 'b.json': '{"id": ', 'c.json': json.dumps(packet('C', [])), 'd.json': json.dumps(packet('D', terms + ['HP:9999999'])),
             'e.json': json.dumps([1, 2]), 'f.json': json.dumps(packet('F/../x', terms))}
    (tmp_path/'in').mkdir()
    for name, text in files.items(): (tmp_path/'in'/name).write_text(text)
    return tmp_path/'in'


def test_every_method_answers_the_test_cases_only(run, answers):
    ids, catalogue = {c.id for c in run.cases('test')}, run.catalogue
    for m, t in answers.items():
        assert tuple(t.columns) == RANKING_COLUMNS and set(t.case_id) <= ids, m
        assert set(t.answer_id.dropna()) <= set(catalogue.ids), m
        if m not in ('base', 'mint'): assert set(t.case_id) == ids and t.answer_id.notna().all(), m
        assert (t.groupby('case_id')['rank'].min() == 1).all(), m


def test_texts_are_kept_and_a_second_call_does_nothing(run, answers):
    before = len(run.manifest)
    for m in NOTE_METHODS: predict_method(run, m, 0)
    assert len(run.manifest) == before
    texts = read_texts(run/'predictions/base_constrained-0.texts.jsonl')
    task, catalogue = get_task('disease'), run.catalogue
    assert set(texts) == {c.id for c in run.cases('test')}
    for t in texts.values(): assert t == task.answer(parse_answer(t, task)) and all(catalogue.resolve(n).method == 'exact' for n in parse_answer(t, task))
    assert not list((run/'predictions').glob('.*jsonl'))


def test_all_of_omim_comes_with_naive_bayes(run, answers):
    for name in ('naive_bayes', 'naive_bayes_clean', 'naive_bayes_strict'):
        t = read_table(run/f'predictions/omim-{name}.parquet')
        assert set(t.case_id) == {c.id for c in run.cases('test')} and t.answer_id.nunique() > 50


def test_killed_between_batches_it_goes_on(run, answers, monkeypatch, tmp_path):
    "A run that dies after the first batch asks for the rest only, and ends with the same answers."
    copy = open_run(shutil.copytree(run.path, tmp_path/'copy'))
    shutil.rmtree(copy/'predictions')
    keep, calls = predict.append_texts, []
    def dies(path, texts):
        keep(path, texts); calls.append(len(texts))
        raise KeyboardInterrupt
    copy = type(copy)(copy.path, copy.params.model_copy(update={'predict': copy.params.predict.model_copy(update={'batch': 6})}))
    with monkeypatch.context() as m:
        m.setattr(predict, 'append_texts', dies)
        with pytest.raises(KeyboardInterrupt): predict_method(copy, 'mint', 0)
    part, = (copy/'predictions').glob('.mint-0-*.jsonl')
    with part.open('a') as f: f.write('{"case_id": "cut by a cra')
    with monkeypatch.context() as m:
        m.setattr(predict, 'append_texts', lambda path, texts: (keep(path, texts), calls.append(len(texts))))
        predict_method(copy, 'mint', 0)
    assert sum(calls) == len(run.cases('test')) and not part.exists()
    assert read_table(copy/'predictions/mint-0.parquet').equals(answers['mint'])


def test_methods_that_also_decode_constrained(run, answers):
    p = run.params.model_copy(update={'predict': run.params.predict.model_copy(update={'constrained': ('base',)})})
    predict_method(type(run)(run.path, p), 'base', 0)
    assert (run/'predictions/base_constrained-0.parquet').exists()


def test_the_preference_folder_loads_with_datasets(run, answers, tmp_path):
    "The dataset card's header tells `datasets` what to load; the rows are those of the stage."
    from datasets import load_dataset
    data = load_dataset(str(run/'preferences/mint-0'), split='train', cache_dir=str(tmp_path/'cache'))
    rows = preference_rows(run, 0)
    assert len(data) == len(rows) and data[0]['prompt'] == rows[0]['prompt'] and data[0]['chosen'][0]['role'] == 'assistant'
    card = read_json(run/'preferences/mint-0/card.json')
    assert card['rows'] == len(rows) and card['simulated'] and 0 <= card['chosen_misses_truth'] <= 1


def test_preference_variants(run):
    "The controls differ from the method's rows where they should: other rankings, same prompts."
    with pytest.raises(InputError, match='there is no such pair set'): preferences(run, 0, 'mind')
    for v in ('mint', 'mint_note', 'mint_shuffled'): preferences(run, 0, v)
    mint, shuffled = preference_rows(run, 0), preference_rows(run, 0, 'mint_shuffled')
    assert [r['prompt'] for r in mint] == [r['prompt'] for r in shuffled] and mint != shuffled
    assert sorted(map(str, [r['chosen_ids'] for r in mint])) == sorted(map(str, [r['chosen_ids'] for r in shuffled]))


@pytest.mark.parametrize('name', ['mynt', 'chance_constrained', 'naive_bayes_constrained', 'naive_bayes_rag', 'retrieval_cot', ''])
def test_unknown_methods_are_refused(run, name):
    with pytest.raises(InputError, match='there is no such method'): get_method(name)


def test_documents_and_steps_are_rows_like_others(run, answers):
    for m in ('retrieval', 'rag_constrained', 'mint_cot_rag_constrained'):
        predict_method(run, m, 0)
        t = read_table(run/f'predictions/{m}-0.parquet')
        assert set(t.case_id) == {c.id for c in run.cases('test')} and t.answer_id.notna().all(), m
    logs = [json.loads(t) for t in read_texts(run/'predictions/mint_cot_rag_constrained-0.texts.jsonl').values()]
    assert all(len(l['turns']) == 5 and l['retrieved'] for l in logs)
    before = len(run.manifest)
    predict_method(run, 'rag_constrained', 0)
    assert len(run.manifest) == before


def test_an_endpoint_needs_an_address(run):
    with pytest.raises(InputError, match='endpoint.url'): predict_method(run, 'api_cot', 0)


def test_a_student_that_was_not_trained(run):
    with pytest.raises(InputError, match='there is no such adapter'): build_ranker(run, 'dpo_full', 7)


def test_new_cases_broken_ones_listed(run, answers, folder, tmp_path):
    problems = predict_cases(run, folder, tmp_path/'out', 'base_constrained')
    assert {Path(str(p.file)).name for p in problems} == {'b.json', 'c.json', 'e.json'}
    text = (tmp_path/'out/predictions.tsv').read_text()
    assert text.startswith('# mint_nb predictions: research use only') and f'# HPO: {load_ontology().version}' in text and '# cohort: SIMULATED cases' in text
    table = pd.read_csv(tmp_path/'out/predictions.tsv', sep='\t', comment='#')
    assert table.columns.tolist() == ['case_id', 'rank', 'disease_id', 'disease_name', 'score'] and set(table.case_id) == {'A', 'D', 'F/../x'}
    records = [json.loads(l) for l in (tmp_path/'out/predictions.jsonl').read_text().splitlines()]
    assert {r['case_id'] for r in records} == set(table.case_id) and all({'for', 'against'} <= a.keys() for r in records for a in r['answers'])
    files = sorted((tmp_path/'out/pheval').iterdir())
    assert len(files) == 3 and all(pd.read_parquet(f).columns.tolist() == ['disease_identifier', 'score'] for f in files)
    assert 'HP:9999999' in (tmp_path/'out/problems.txt').read_text() and not (tmp_path/'x.parquet').exists()


def test_a_diagnosis_is_never_read(run, answers, folder, tmp_path):
    "Changing, or removing, the diagnosis in the files changes nothing in the predictions."
    lists = []
    for n, diagnosis in enumerate(('OMIM:100800', None)):
        (folder/'a.json').write_text(json.dumps(packet('A', ['HP:0001250', 'HP:0001263'], diagnosis)))
        for m in ('mint', 'naive_bayes'):
            predict_cases(run, folder, tmp_path/f'out{n}', m)
            lists.append((m, (tmp_path/f'out{n}/predictions.tsv').read_text(), (tmp_path/f'out{n}/predictions.jsonl').read_text()))
    assert len(set(lists)) == 2


def test_nothing_usable_still_leaves_files(run, answers, tmp_path):
    (tmp_path/'bad').mkdir(); (tmp_path/'bad/x.json').write_text('no json')
    problems = predict_cases(run, tmp_path/'bad', tmp_path/'out', 'mint')
    assert len(problems) == 1 and not isinstance(problems[0], InputWarning)
    assert pd.read_csv(tmp_path/'out/predictions.tsv', sep='\t', comment='#').empty


def test_errors_of_predict(run, answers, folder, tmp_path):
    with pytest.raises(InputError, match='its own run only'): predict_cases(run, folder, tmp_path/'out', 'teacher')
    with pytest.raises(InputError, match='does not exist'): predict_cases(run, tmp_path/'nowhere', tmp_path/'out')
    with pytest.raises(InputError, match='has no catalogue yet'): predict_cases(open_run(tmp_path/'new', 'smoke'), folder, tmp_path/'out')
    with pytest.raises(InputError, match='there is no such adapter'): predict_cases(run, folder, tmp_path/'out', 'dpo')
    assert isinstance(build_ranker(run, 'linear'), Ranker)
