"""Exports of a finished run: every format answers like the student, one that equals the base is refused, and nothing is uploaded unasked."""
import json, shutil
from pathlib import Path

import pytest, yaml
from typer.testing import CliRunner

from mint_nb.core import InputError, read_json
from mint_nb.export import FORMATS, export_student, push
from mint_nb.cli import app

call = lambda *args: CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope='module')
def trained(smoke_run, tmp_path_factory):
    "The smoke run, its adapter enlarged: a dozen updates of a random student leave almost nothing to compare, and its ten likeliest tokens lie closer together than half precision resolves."
    from safetensors.torch import load_file, save_file
    from mint_nb.runs import Run
    copy = tmp_path_factory.mktemp('export')/'run'
    shutil.copytree(smoke_run.path, copy)
    file = copy/'align/mint-0/adapter/adapter_model.safetensors'
    save_file({k: v*(3000. if 'lora_B' in k else 1.) for k, v in load_file(file).items()}, file, metadata={'format': 'pt'})
    return Run(copy, smoke_run.params)


@pytest.mark.parametrize('format', FORMATS)
def test_every_format_answers_like_the_student(trained, tmp_path, format):
    out = tmp_path/'out'
    shown = call('export', trained.path, '--format', format, '--out', out)
    assert shown.exit_code == 0 and 'of the top ten agree' in shown.output, shown.output
    found = read_json(out/'export_check.json')
    assert found['prompts'] == 16 and found['export_to_student']['kl'] <= .05*found['student_to_base']['kl'] and found['export_to_student']['top10'] >= .95
    assert found['export_to_base']['kl'] > 5*found['export_to_student']['kl']
    assert {'adapter': 'adapter_model.safetensors', 'merged': 'model.safetensors', 'gguf': 'mint-0-f16.gguf'}[format] in {p.name for p in out.iterdir()}
    assert str(trained.path.parent) not in ''.join(p.read_text() for p in out.iterdir() if p.suffix in ('.json', '.md')), 'a path of this machine left the house'


def test_full_precision_is_exact(trained, tmp_path):
    found = export_student(trained, tmp_path/'out', 'merged', half=False)
    assert found['export_to_student']['logit'] < 1e-3 and found['export_to_student']['top10'] > .999


@pytest.mark.parametrize('format', ['merged', 'gguf'])
def test_an_export_that_equals_the_base_is_refused(trained, tmp_path, format, monkeypatch):
    "As peers have shipped it: the adapter is lost on the way."
    import mint_nb.export as export
    real = export.load_student
    monkeypatch.setattr(export, 'load_student', lambda name, adapter=None, **kw: real(name, **kw))
    with pytest.raises(InputError, match='it equals the base model'): export_student(trained, tmp_path/'out', format)
    assert not (tmp_path/'out').exists() and not list(tmp_path.iterdir()), 'a refused export left something behind'


def test_an_adapter_that_changes_nothing_is_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file
    from mint_nb.runs import Run
    shutil.copytree(trained.path, tmp_path/'run')
    file = tmp_path/'run/align/mint-0/adapter/adapter_model.safetensors'
    save_file({k: v*(0. if 'lora_B' in k else 1.) for k, v in load_file(file).items()}, file, metadata={'format': 'pt'})
    with pytest.raises(InputError, match='changes nothing'): export_student(Run(tmp_path/'run', trained.params), tmp_path/'out', 'adapter')


def test_another_tokenizer_is_noticed(trained, tmp_path, monkeypatch):
    import mint_nb.export as export
    real = export.write_format
    def spoilt(run, adapter, format, out, half):
        real(run, adapter, format, out, half)
        t = json.loads((out/'tokenizer.json').read_text())
        t['model']['merges'] = t['model']['merges'][200:]
        (out/'tokenizer.json').write_text(json.dumps(t))
    monkeypatch.setattr(export, 'write_format', spoilt)
    with pytest.raises(InputError, match='tokenizer of the export cuts a text differently'): export_student(trained, tmp_path/'out', 'merged')


def test_the_card_says_where_it_comes_from(trained, tmp_path):
    export_student(trained, tmp_path/'out', 'adapter')
    text = (tmp_path/'out/README.md').read_text()
    head = yaml.safe_load(text.split('---')[1])
    assert head['library_name'] == 'peft' and 'simulated' in head['tags'] and head['license'] == 'apache-2.0'
    for said in ('Research use only, not for clinical decision making', 'simulated patients', 'Human Phenotype Ontology 20', '95 % interval', '| mint | top1 |', '| base | top1 |', 'Intended use', 'Limits', 'largest logit difference'):
        assert said in text, said


@pytest.mark.parametrize('args,said', [(['--method', 'dpo'], 'there is no such adapter'), (['--seed', '7'], 'there is no such adapter'), (['--format', 'onnx'], 'there are merged, adapter, gguf')])
def test_wrong_input(trained, tmp_path, args, said):
    shown = call('export', trained.path, '--out', tmp_path/'out', *args)
    assert shown.exit_code == 2 and said in shown.stderr and not (tmp_path/'out').exists()


def test_a_full_folder_is_left_alone(trained, tmp_path):
    (tmp_path/'note.txt').write_text('mine')
    shown = call('export', trained.path, '--out', tmp_path, '--format', 'adapter')
    assert shown.exit_code == 2 and 'is not empty' in shown.stderr and (tmp_path/'note.txt').read_text() == 'mine'


def test_nothing_is_uploaded_unless_asked(trained, tmp_path, monkeypatch):
    import huggingface_hub
    calls = []
    class Recorder:
        def create_repo(self, repo, **kw): calls.append(('create', repo, kw['private']))
        def upload_folder(self, **kw): calls.append(('upload', kw['repo_id'], sorted(p.name for p in Path(kw['folder_path']).iterdir())))
    monkeypatch.setattr(huggingface_hub, 'HfApi', Recorder)
    assert call('export', trained.path, '--out', tmp_path/'a', '--format', 'adapter').exit_code == 0 and calls == []
    shown = call('export', trained.path, '--out', tmp_path/'b', '--format', 'adapter', '--push', 'me/student')
    assert shown.exit_code == 0 and 'huggingface.co/me/student' in shown.output and calls[0] == ('create', 'me/student', True) and calls[1][:2] == ('upload', 'me/student') and 'README.md' in calls[1][2]


def test_offline_is_said(trained, tmp_path):
    export_student(trained, tmp_path/'out', 'adapter')
    with pytest.raises(InputError, match='the hub refused'): push(tmp_path/'out', 'me/student')
