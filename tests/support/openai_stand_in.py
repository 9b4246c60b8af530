"""A server with an OpenAI-compatible address on this machine, and the faults that servers have."""

from __future__ import annotations

import collections
import contextlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers `answer(prompt, body)` to a prompt, counting tokens by `tokenizer`.

    fault(number, prompt): what becomes of the request with that number, from 0: None, a status, (status, headers),
    "reset", "cut" (in the middle of the reply) or seconds to wait. `asked` has the body of each completion, `keys` the
    Authorization of each request, `most` how many were answered at once.
    """

    def __init__(self, tokenizer, answer=lambda prompt, body: "", window=None, model="tiny", port=0):
        self.tokenizer, self.answer, self.model = tokenizer, answer, model
        self.entry = {"id": model, "object": "model", "created": 1, "owned_by": "test"}
        if window is not None:
            self.entry["max_model_len"] = window
        self.fault = lambda number, prompt: None
        self.usage = lambda tokens: tokens
        self.render = None  # messages → text, of the template
        self.change = lambda reply: reply
        self.asked, self.keys, self.most, self.now = [], [], 0, 0
        self.tries = collections.Counter()
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.keys.append(self.headers.get("Authorization"))
                self.reply(200, {"object": "list", "data": [outer.entry]} if self.path == "/v1/models" else {})

            def do_POST(self):
                outer.keys.append(self.headers.get("Authorization"))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    self.complete(body)
                finally:
                    with outer.lock:
                        outer.now -= 1

            def complete(self, body):
                prompt = outer.render(body["messages"]) if "messages" in body else body["prompt"]
                with outer.lock:
                    number = len(outer.asked)
                    outer.asked.append(body)
                    outer.tries[prompt] += 1
                fault = outer.fault(number, prompt)
                if isinstance(fault, float):
                    time.sleep(fault)
                elif fault == "reset":
                    return self.connection.shutdown(socket.SHUT_RDWR)
                elif fault not in (None, "cut"):
                    status, headers = fault if isinstance(fault, tuple) else (fault, {})
                    said = f"no, says the server to {self.headers.get('Authorization')}"
                    return self.reply(status, {"error": {"message": said}}, headers)
                text = outer.answer(prompt, body)
                made = len(outer.tokenizer(text, add_special_tokens=False)["input_ids"])
                choice = {"index": 0, "finish_reason": "length" if made >= body["max_tokens"] else "stop"}
                choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
                tokens = len(outer.tokenizer(prompt)["input_ids"])
                usage = {"prompt_tokens": outer.usage(tokens), "completion_tokens": made}
                reply = outer.change({"model": body["model"], "choices": [choice], "usage": usage})
                self.reply(200, reply, cut=fault == "cut")

            def reply(self, status, content, headers=(), cut=False):
                data = json.dumps(content).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in {**dict(headers), "Content-Length": str(len(data))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2] if cut else data)
                if cut:
                    self.connection.shutdown(socket.SHUT_RDWR)

        class Own(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, request, address):
                pass

        self.http = Own(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.http.shutdown()
        self.http.server_close()


def serve(connection, fault, *args, **settings):
    """For a process of its own: begins at the port that `connection` sends, and sends its address."""
    with Server(*args, port=connection.recv(), **settings) as served:
        served.fault = fault
        connection.send(served.url)
        threading.Event().wait()
