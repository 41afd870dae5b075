"""A server of the OpenAI protocol on this machine, for tests: it can also do what real ones do on a bad day."""

import collections
import contextlib
import dataclasses
import http.server
import json
import math
import threading
import time


def echo(prompt, sample):
    """The samples of "w" are "w 0", "w 1", ..."""
    return f"{prompt} {sample}"


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the server does next. `body`: bytes as they are, anything else as JSON, None for a good answer."""

    body: object = None
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    delay_s: float = 0.0
    hang_up: bool = False
    cut: int | None = None  # bytes of the body that are sent before the server hangs up


class Server(http.server.ThreadingHTTPServer):
    """Writes `write(prompt, sample)`; `replies` come first, one a request, then what `script(fields)` gives, where that
    is not None. Of `most` samples a request it gives no more."""

    daemon_threads = True

    def __init__(self, write):
        super().__init__(("127.0.0.1", 0), Answer)
        self.write = write
        self.replies = collections.deque()
        self.script = lambda fields: None
        self.most = None
        self.models = Reply({"object": "list", "data": [{"id": "small"}]})
        self.asked = []  # (path, headers, fields), in order of arrival
        self.under_way = self.most_under_way = 0
        self.slow = {}  # prompt -> seconds
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # a client that timed out has hung up

    def good(self, chat, prompt, n):
        texts = [self.write(prompt, i) for i in range(n)]
        choices = [
            {"index": i, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            if chat
            else {"index": i, "finish_reason": "stop", "text": text}
            for i, text in enumerate(texts)
        ]
        return {"choices": choices, "usage": {"completion_tokens": 5 * n}}


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *arguments):
        pass

    def do_GET(self):
        with self.server.lock:
            self.server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}, None))
        self.send(self.server.models, self.server.models.body)

    def do_POST(self):
        server = self.server
        fields = json.loads(self.rfile.read(int(self.headers["content-length"])))
        chat = self.path.endswith("/chat/completions")
        prompt = fields["messages"][0]["content"] if chat else fields["prompt"]
        with server.lock:
            server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}, fields))
            reply = server.replies.popleft() if server.replies else server.script(fields) or Reply()
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        time.sleep(reply.delay_s or server.slow.get(prompt, 0))
        with server.lock:
            server.under_way -= 1
        n = min(fields.get("n", 1), server.most or math.inf)
        self.send(reply, server.good(chat, prompt, n) if reply.body is None else reply.body)

    def send(self, reply, body):
        if reply.hang_up:
            self.close_connection = True
            return
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(reply.status)
        for name, value in (("content-type", "application/json"), *reply.headers):
            self.send_header(name, value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: reply.cut])
        self.close_connection = self.close_connection or reply.cut is not None


@contextlib.contextmanager
def serving(server):
    """The server at work, until the end of the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
