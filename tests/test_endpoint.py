"The endpoint client against a real server (`transformers serve` with SmolLM2), with a proxy in front of it that makes trouble."
import json, os, signal, threading, time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import httpx, pytest

from mint_nb.core import InputError
from mint_nb.params import EndpointParams
from mint_nb.dialogue import Dialogues
from mint_nb.endpoint import EndpointClient, EndpointDialogues, LocalServer, RateLimit

needs_server = pytest.mark.skipif(any(find_spec(p) is None for p in ('fastapi', 'uvicorn', 'openai')), reason='no local server: pip install "transformers[serving]"')
SYSTEM = 'You are a genetic counselor. Answer briefly.'
NOTES = ['A girl with seizures, ataxia and absent speech.', 'A tall boy with lens dislocation.', 'A newborn with a cleft palate.', 'A man with chorea.']
KEY = 'sk-test-9f3a77'


class Proxy(ThreadingHTTPServer):
    "Passes requests on to a server, except where `faults` says otherwise: a status and headers, 'drop' the connection, or a page 'html'."
    daemon_threads = True
    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.upstream, self.faults, self.seen, self.answered, self.before, self.lock = '', [], [], 0, lambda n: None, threading.Lock()
        self.url = f'http://127.0.0.1:{self.server_port}/v1'
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def answer(self, status, content, headers=None):
        self.send_response(status)
        for k, v in {'Content-Type': 'application/json', 'Content-Length': len(content), **(headers or {})}.items(): self.send_header(k, str(v))
        self.end_headers(); self.wfile.write(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        with self.server.lock:
            self.server.seen.append((time.monotonic(), json.loads(body), self.headers.get('Authorization')))
            fault = self.server.faults.pop(0) if self.server.faults else None
            self.server.before(len(self.server.seen))
        if fault == 'drop': self.connection.close(); return
        if fault == 'html': return self.answer(200, b'<html>maintenance</html>')
        if fault: return self.answer(fault[0], json.dumps({'error': {'message': f'trouble, your key {self.headers.get("Authorization")}'}}).encode(), fault[1])
        try: reply = httpx.post(self.server.upstream.removesuffix('/v1') + self.path, content=body, headers={'Content-Type': 'application/json'}, timeout=60)
        except httpx.RequestError: return self.answer(502, b'bad gateway')
        with self.server.lock: self.server.answered += 1
        self.answer(reply.status_code, reply.content)


@pytest.fixture
def proxy():
    with Proxy() as p:
        yield p
        p.shutdown()


@pytest.fixture(scope='module')
def folder():
    from mint_nb.students import smollm2_folder
    return smollm2_folder()


@pytest.fixture(scope='module')
def server(folder):
    with LocalServer(folder) as s: yield s


def params(proxy, model, **more): return EndpointParams(**{'url': proxy.url, 'model': str(model), 'key': 'MINT_TEST_KEY', 'concurrency': 2, 'retries': 4, 'timeout': 60} | more)


def talk_to(proxy, model, cache, notes=NOTES, **more):
    talk = EndpointDialogues(params(proxy, model, **more), cache, first_wait=.02)
    talk.start([SYSTEM]*len(notes))
    return talk


def everything_written(folder): return ''.join(p.read_text() for p in folder.rglob('*') if p.is_file())


@needs_server
def test_a_dialogue_equals_the_model_itself(server, proxy, folder, tmp_path):
    "Over HTTP the model says what it says when it is loaded here; counts are those of the tokenizer."
    from mint_nb.decode import generate
    from mint_nb.students import load_student
    proxy.upstream, student = server.url, load_student('smollm2', precision='fp32')
    talk = talk_to(proxy, folder, tmp_path/'c', NOTES[:2])
    prompts = [student.message_ids([*h, {'role': 'user', 'content': n}]) for h, n in zip(talk.history, NOTES)]
    replies = talk.turn(NOTES[:2], 8)
    assert [r.strip() for r in replies] == [t.strip() for t in generate(student, prompts, 8)] and all(replies)
    assert talk.tokens['prompt'] == sum(map(len, prompts)) and talk.tokens['new'] == 16 and talk.client.counts['cut'] == 2
    talk.turn(['Which gene?']*2, 4)
    assert [m['role'] for m in talk.history[1]] == ['system', 'user', 'assistant', 'user', 'assistant']
    assert proxy.seen[-1][1]['messages'][:3] in [h[:3] for h in talk.history]         # the server gets the history each turn


@needs_server
def test_trouble_passes(server, proxy, folder, tmp_path, monkeypatch):
    "429, 503, a broken connection and a page of HTML: asked again, Retry-After honoured, and the key is in no file."
    monkeypatch.setenv('MINT_TEST_KEY', KEY)
    proxy.upstream, proxy.faults = server.url, [(429, {'Retry-After': '0.7'}), (503, {}), 'drop', 'html']
    talk = talk_to(proxy, folder, tmp_path/'c', NOTES[:1])
    assert talk.turn(NOTES[:1], 4)[0]
    times = [t for t, _, _ in proxy.seen]
    assert len(times) == 5 and times[1] - times[0] >= .7 and talk.client.counts['retried'] == 4
    assert {k for _, _, k in proxy.seen} == {f'Bearer {KEY}'} and KEY not in everything_written(tmp_path)


def test_what_repeating_cannot_mend(proxy, tmp_path, monkeypatch):
    "400, 401, 404 and a wait of a day end the run at once, with the server's words and without the key."
    monkeypatch.setenv('MINT_TEST_KEY', KEY)
    for status, headers, words in ((400, {}, 'refused: 400 trouble'), (401, {}, 'environment variable MINT_TEST_KEY'), (404, {}, 'does the address end in /v1'),
                                   (429, {'Retry-After': '86400'}, 'asks to wait 86400 s')):
        proxy.faults, proxy.seen = [(status, headers)], []
        with pytest.raises(InputError, match=words) as e: talk_to(proxy, 'big', tmp_path/'c', NOTES[:1]).turn(NOTES[:1], 4)
        assert len(proxy.seen) == 1 and KEY not in str(e.value) and proxy.url in str(e.value) and 'record big' in str(e.value) and e.value.__cause__ is None
    assert not list(tmp_path.rglob('*.json'))


def test_it_gives_up_after_the_retries(proxy, tmp_path):
    proxy.faults = [(500, {})]*3
    with pytest.raises(InputError, match='no answer after 3 attempts; the last: 500 trouble'): talk_to(proxy, 'big', tmp_path, NOTES[:1], retries=2).turn(NOTES[:1], 4)
    assert len(proxy.seen) == 3


def test_one_refusal_calls_the_others_off(proxy, tmp_path):
    "A hundred conversations with a wrong key do not make a hundred requests."
    proxy.faults = [(401, {})]*100
    with pytest.raises(InputError, match='refused: 401'): talk_to(proxy, 'big', tmp_path, [f'Note {i}' for i in range(100)], concurrency=2).turn([f'Note {i}' for i in range(100)], 4)
    assert len(proxy.seen) < 10


@needs_server
def test_concurrency_and_rate(server, proxy, tmp_path):
    "Never more under way than allowed; no more starts in a window than allowed."
    proxy.upstream, most = server.url, []
    proxy.before = lambda n: most.append(n - proxy.answered)
    chats = [[{'role': 'user', 'content': f'Note {i}'}] for i in range(9)]
    client = EndpointClient(params(proxy, server.folder, concurrency=3), tmp_path/'a')
    client.ask(chats, 1)
    assert max(most) == 3 and client.counts['asked'] == 9
    proxy.seen, proxy.before, client = [], lambda n: None, EndpointClient(params(proxy, server.folder, concurrency=9), tmp_path/'b')
    client.limit = RateLimit(requests=4, window=1.)
    client.ask(chats, 1)
    starts = sorted(t for t, _, _ in proxy.seen)
    assert len(starts) == 9 and all(b - a >= .8 for a, b in zip(starts, starts[4:]))


@needs_server
def test_killed_and_started_again(server, folder, proxy, tmp_path):
    "The server dies after two replies: a clear error. A new server, the same command: only what is missing is asked."
    proxy.upstream = server.url
    proxy.before = lambda n: server.process.kill() if n == 3 else None
    first = talk_to(proxy, folder, tmp_path/'c', concurrency=1, retries=2)
    with pytest.raises(InputError, match='no answer after 3 attempts; the last: 502 bad gateway'): first.turn(NOTES, 4)
    assert first.history == [[{'role': 'system', 'content': SYSTEM}]]*4, 'a turn that failed leaves no trace'
    assert len(list((tmp_path/'c').rglob('*.json'))) == 2
    third = talk_to(proxy, folder, tmp_path/'c', NOTES[:2])
    assert all(third.turn(NOTES[:2], 4)), 'what was answered needs no server'
    proxy.before, proxy.seen = lambda n: None, []
    server.__exit__(); server.__enter__()                   # the same port
    again = talk_to(proxy, folder, tmp_path/'c', concurrency=1, retries=2)
    replies = again.turn(NOTES, 4)
    assert all(replies) and again.client.counts | {'asked': 2, 'cached': 2} == again.client.counts
    assert {b['messages'][1]['content'] for _, b, _ in proxy.seen} == set(NOTES[2:])      # a request that was called off may be noted late
    assert replies[:2] == [h[-1]['content'] for h in third.history]


def test_a_server_that_is_not_there(tmp_path):
    talk = EndpointDialogues(EndpointParams(url='http://127.0.0.1:9/v1', model='m', retries=2), tmp_path, first_wait=.01)
    talk.start([''])
    with pytest.raises(InputError, match='file http://127.0.0.1:9/v1/chat/completions, record m, field endpoint: no answer after 3 attempts; the last: ConnectError'): talk.turn(['x'], 4)


def test_silence_is_a_timeout(proxy, tmp_path):
    class Silent(Handler):
        def do_POST(self): self.server.seen.append(0); time.sleep(12)
    proxy.RequestHandlerClass = Silent
    start = time.monotonic()
    with pytest.raises(InputError, match='no answer after 2 attempts; the last: ReadTimeout'): talk_to(proxy, 'm', tmp_path, NOTES[:1], retries=1, timeout=.2).turn(NOTES[:1], 4)
    assert time.monotonic() - start < 10 and len(proxy.seen) == 2


def seconds_until_interrupted(asking, ready):
    "Press Ctrl-C when `ready` says so, and see how long the client takes to end."
    def interrupt():
        while not ready(): time.sleep(.01)
        time.sleep(.1); os.kill(os.getpid(), signal.SIGINT)
    start, before = time.monotonic(), signal.signal(signal.SIGINT, signal.default_int_handler)     # a runner in the background ignores it
    try:
        with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
            pool.submit(interrupt); next(asking)
    finally: signal.signal(signal.SIGINT, before)
    return time.monotonic() - start


def test_ctrl_c_does_not_wait_for_pauses(proxy, tmp_path):
    "An interrupt ends requests that sit in a long pause."
    proxy.faults = [(503, {'Retry-After': '30'})]*8
    client = EndpointClient(params(proxy, 'm', concurrency=4), tmp_path)
    asking = client._fetch([{'messages': [], 'n': i} for i in range(4)])
    assert seconds_until_interrupted(asking, lambda: len(proxy.seen) == 4) < 20


def test_dialogues_share_a_limit(tmp_path):
    "What one dialogue has used up in this minute, the next one waits for."
    p = EndpointParams(url='http://127.0.0.1:9/v1', model='shared', requests_a_minute=1)
    a, b = (EndpointDialogues(p, tmp_path).client for _ in range(2))
    assert a.limit is b.limit and a.counts is not b.counts and isinstance(EndpointDialogues(p, tmp_path), Dialogues)
    assert b.limit.reserve(1, a.limit.reserve(1, 5.)[0])[0] == 65


def test_ctrl_c_does_not_wait_for_a_silent_server(proxy, tmp_path):
    class Silent(Handler):
        def do_POST(self): self.server.seen.append(0); time.sleep(12)
    proxy.RequestHandlerClass = Silent
    asking = EndpointClient(params(proxy, 'm', timeout=10), tmp_path)._fetch([{'messages': [], 'n': i} for i in range(4)])
    assert seconds_until_interrupted(asking, lambda: len(proxy.seen) == 2) < 10


@needs_server
def test_a_damaged_reply_is_asked_again(server, proxy, tmp_path):
    proxy.upstream, chat = server.url, [[{'role': 'user', 'content': NOTES[3]}]]
    ask = lambda: EndpointClient(params(proxy, server.folder), tmp_path).ask(chat, 4)[0]['text']
    said = ask()
    assert ask() == said and len(proxy.seen) == 1
    file, = tmp_path.rglob('*.json')
    file.write_text(file.read_text()[:40])
    assert ask() == said and len(proxy.seen) == 2 and json.loads(file.read_text())['reply']['text'] == said


@needs_server
def test_a_refusal_of_the_real_server(server, tmp_path):
    talk = EndpointDialogues(EndpointParams(url=server.url, model='another'), tmp_path)
    talk.start([''])
    with pytest.raises(InputError, match="refused: 400 Server is pinned to"): talk.turn(['x'], 4)
