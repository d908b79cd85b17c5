"""An object store for tests: an emulator of Google Cloud Storage, behind a door that fails and is slow on demand."""

import contextlib
import http.client
import http.server
import random
import re
import threading
import time
from collections.abc import Iterator

from gcp_storage_emulator.server import create_server

BUCKET = "bucket"
_MOVE = re.compile(r"/storage/v1(?P<bucket>/b/[^/]+)/o/(?P<source>[^/]+)/moveTo/o/(?P<target>[^/?]+).*")
_HOP = {"connection", "transfer-encoding", "content-length", "date", "server"}  # headers that the door writes itself


class Door(http.server.ThreadingHTTPServer):
  """Passes requests on to the emulator. `failing` of them get an error instead, and each waits up to `slow` seconds."""
  daemon_threads = True

  def __init__(self, port: int):
    super().__init__(("localhost", 0), _Request)
    self.port_behind = port
    self.failing, self.slow = 0.0, 0.0
    self.requests, self.failed = 0, 0
    self.draw = random.Random(0)

  @property
  def url(self) -> str:
    return f"http://localhost:{self.server_port}"


class _Request(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def _pass_on(self) -> None:
    door = self.server
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    door.requests += 1
    time.sleep(door.draw.random() * door.slow)
    if door.draw.random() < door.failing:
      door.failed += 1
      self._answer(door.draw.choice([500, 502, 503]), {}, b"try again")
      return
    if move := _MOVE.fullmatch(self.path):  # the emulator cannot move
      copied = f"{move['bucket']}/o/{move['source']}/rewriteTo{move['bucket']}/o/{move['target']}"
      self._ask("POST", f"/storage/v1{copied}", b"")
      self._ask("DELETE", f"/storage/v1{move['bucket']}/o/{move['source']}", b"")
      self._answer(*self._ask("GET", f"/storage/v1{move['bucket']}/o/{move['target']}", b""))
      return
    self._answer(*self._ask(self.command, self.path, body))

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass_on

  def _ask(self, command: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """What the emulator answers: status, headers, content."""
    behind = http.client.HTTPConnection("localhost", self.server.port_behind, timeout=60)
    headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "content-length")}
    headers["Host"] = f"localhost:{self.server.server_port}"  # the emulator builds addresses of uploads from it
    behind.request(command, path, body, headers)
    answer = behind.getresponse()
    content = answer.read()
    behind.close()
    return answer.status, {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}, content

  def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if self.command != "HEAD":
      with contextlib.suppress(ConnectionError):  # who asked may have given up
        self.wfile.write(content)

  def log_message(self, *_) -> None:
    """Nobody reads it."""


@contextlib.contextmanager
def open_store() -> Iterator[Door]:
  """A store with an empty bucket."""
  server = create_server("localhost", 0, in_memory=True, default_bucket=BUCKET)
  server.start()
  door = Door(server._api._httpd.server_address[1])
  thread = threading.Thread(target=door.serve_forever, daemon=True)
  thread.start()
  try:
    yield door
  finally:
    door.shutdown()
    server.stop()
